//! UpdatePodSandboxResources: what kubelet is about to give a pod, or has taken back.
//!
//! The call comes before kubelet writes the pod's cgroup, which is kubelet's own; any error but UNIMPLEMENTED vetoes the resize, and the same
//! call with the former figures rolls it back (kubelet's `kuberuntime_manager.go`, `setPodCgroupConfig`). A pod on the host's kernel needs
//! nothing for it but that the figures make sense: they are recorded, and shown. A virtual machine has another size before the answer, and
//! what it has become is shown.

use std::sync::Arc;

use podvisor_proto::cri;
use serde::{Deserialize, Serialize};

use super::record::{PodRecord, Wire};
use super::task::{Reply, Task};
use super::view::Status;
use super::vm;
use crate::error::PodError;

/// What a pod may use, as kubelet said last.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
pub(crate) struct Sizes {
    /// Of what the sandbox takes beside its containers.
    pub(crate) overhead: Option<Wire<cri::LinuxContainerResources>>,
    /// Of all containers together.
    pub(crate) resources: Option<Wire<cri::LinuxContainerResources>>,
}

impl Sizes {
    /// From a request; one part may be missing, and stays then what it is.
    pub(crate) fn requested(
        overhead: Option<cri::LinuxContainerResources>,
        resources: Option<cri::LinuxContainerResources>,
    ) -> Result<Self, PodError> {
        if overhead.is_none() && resources.is_none() {
            return Err(PodError::invalid("resources", "must be given, or overhead"));
        }
        for (field, part) in [("overhead", &overhead), ("resources", &resources)] {
            if let Some(part) = part {
                check(field, part)?;
            }
        }
        Ok(Self { overhead: overhead.map(Wire), resources: resources.map(Wire) })
    }

    fn over(self, before: &Self) -> Self {
        Self {
            overhead: self.overhead.or_else(|| before.overhead.clone()),
            resources: self.resources.or_else(|| before.resources.clone()),
        }
    }
}

/// What a pod may use: as kubelet said last, else as it was made with.
pub(crate) fn of(pod: &PodRecord) -> Sizes {
    let made = pod.config.0.linux.clone().unwrap_or_default();
    let made = Sizes { overhead: made.overhead.map(Wire), resources: made.resources.map(Wire) };
    pod.sizes.clone().over(&made)
}

/// Sums of containers and remainders after an overhead, not what a cgroup takes: small or below zero can be right (a quota of -1 less an
/// overhead is still none).
fn check(field: &str, resources: &cri::LinuxContainerResources) -> Result<(), PodError> {
    let invalid = |name: &str, why: String| Err(PodError::invalid(format!("{field}.{name}"), why));
    if resources.cpu_period != 0 && !(1_000..=1_000_000).contains(&resources.cpu_period) {
        let why = format!("{} is not between 1000 and 1000000 microseconds", resources.cpu_period);
        return invalid("cpu_period", why);
    }
    if resources.cpu_shares < 0 {
        return invalid("cpu_shares", format!("{} is negative", resources.cpu_shares));
    }
    for (name, value) in [
        ("memory_limit_in_bytes", resources.memory_limit_in_bytes),
        ("memory_swap_limit_in_bytes", resources.memory_swap_limit_in_bytes),
    ] {
        if value < -1 {
            return invalid(name, format!("{value} is neither -1 (no limit) nor a size"));
        }
    }
    if !(-1000..=1000).contains(&resources.oom_score_adj) {
        return invalid(
            "oom_score_adj",
            format!("{} is not between -1000 and 1000", resources.oom_score_adj),
        );
    }
    Ok(())
}

impl Task {
    pub(super) async fn resize(&mut self, sizes: Sizes, reply: Reply<()>) {
        if !matches!(self.status, Status::Ready) {
            let id = self.record.id.to_string();
            let _ = reply.send(Err(Arc::new(PodError::NotReady { id, why: "it was stopped".into() })));
            return;
        }
        let merged = sizes.over(&self.record.sizes);
        let machine = match (self.record.runtime.vm(), &self.record.machine) {
            (Some(pinned), Some(machine)) => {
                let resources = merged.resources.as_ref().map(|resources| &resources.0);
                match vm::resize(pinned, machine, resources, &machine.huge_pages, self.monitor.as_ref()).await
                {
                    Ok(resized) => Some(resized),
                    Err(error) => {
                        // Any error but UNIMPLEMENTED makes kubelet give the resize up.
                        let _ = reply.send(Err(Arc::new(error)));
                        return;
                    }
                }
            }
            _ => None,
        };
        self.record.machine = machine.or(self.record.machine.take());
        let before = std::mem::replace(&mut self.record.sizes, merged);
        let written = self.persist().await;
        if written.is_err() {
            // Kubelet takes the resize back; so do we.
            self.record.sizes = before;
        }
        self.publish();
        let _ = reply.send(written);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    type Change = fn(&mut cri::LinuxContainerResources);

    fn with(change: impl FnOnce(&mut cri::LinuxContainerResources)) -> cri::LinuxContainerResources {
        let mut resources = cri::LinuxContainerResources { cpu_shares: 512, ..Default::default() };
        change(&mut resources);
        resources
    }

    #[test]
    fn what_makes_no_sense_is_named() {
        let cases: [(&str, Change); 6] = [
            ("cpu_period", |r| r.cpu_period = 999),
            ("cpu_period", |r| r.cpu_period = -5),
            ("cpu_shares", |r| r.cpu_shares = -1),
            ("memory_limit_in_bytes", |r| r.memory_limit_in_bytes = -2),
            ("memory_swap_limit_in_bytes", |r| r.memory_swap_limit_in_bytes = i64::MIN),
            ("oom_score_adj", |r| r.oom_score_adj = 1001),
        ];
        for (name, change) in cases {
            for (part, of_overhead) in [("overhead", true), ("resources", false)] {
                let bad = Some(with(change));
                let error =
                    if of_overhead { Sizes::requested(bad, None) } else { Sizes::requested(None, bad) };
                let error = error.unwrap_err();
                assert!(
                    matches!(&error, PodError::Invalid { field, .. } if *field == format!("{part}.{name}")),
                    "{error}"
                );
            }
        }
        assert!(Sizes::requested(None, None).is_err());
    }

    #[test]
    fn what_kubelet_computes_is_taken() {
        // No quota, less an overhead of half a CPU; and what is left of a small pod.
        for quota in [-50_001, -1, 0, 500] {
            Sizes::requested(None, Some(with(|r| (r.cpu_period, r.cpu_quota) = (100_000, quota)))).unwrap();
        }
        Sizes::requested(Some(with(|_| {})), Some(with(|r| r.memory_limit_in_bytes = -1))).unwrap();
    }

    #[test]
    fn a_part_that_is_not_given_stays() {
        let first = Sizes::requested(Some(with(|_| {})), Some(with(|r| r.cpu_quota = 1))).unwrap();
        let second = Sizes::requested(None, Some(with(|r| r.cpu_quota = 2))).unwrap().over(&first);
        assert_eq!(second.overhead, first.overhead);
        assert_eq!(second.resources.as_ref().unwrap().0.cpu_quota, 2);
        let json = serde_json::to_string(&second).unwrap();
        assert_eq!(serde_json::from_str::<Sizes>(&json).unwrap(), second);
    }
}
