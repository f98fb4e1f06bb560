//! Huge pages in virtual machines: as many as containers may use are the guest's own, beside the memory that they may use.
//!
//! kubelet tells each container's limits, and nothing of the pod's (`kuberuntime_sandbox_linux.go`, `calculateSandboxResources`: processors and
//! memory). So a machine becomes larger when such a container comes, and its guest sets the pages aside. They stay for as long as the pod
//! does: so long kubelet reserves them, and files on huge pages keep theirs when their container has gone.
//!
//! Behind them is ordinary memory of the node, for which a pod's cgroup has room only as far as the pod's overhead says so; else its limit would
//! end the whole machine some day, so the container is refused. Rejected: the node's huge pages behind all of a machine's memory, which takes many
//! times as many of them; behind a part of it, whose guest would have to take huge pages from there and from nowhere else.

use std::collections::BTreeMap;

use podvisor_proto::agent;
use podvisor_proto::cri;
use serde::{Deserialize, Serialize};

use super::record::PodRecord;
use super::request::cgroup_parent;
use super::slot::Slot;
use super::state::State;
use super::task::Task;
use super::{resize, vm};
use crate::error::{Failure, PodError};
use crate::node::Node;

const FIELD: &str = "config.linux.resources.hugepage_limits";

/// How many there are, by bytes of one.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(transparent)]
pub(crate) struct HugePages(BTreeMap<u64, u64>);

impl HugePages {
    /// What containers may use together. What is no size is for who makes the container's spec to refuse.
    fn of<'a>(containers: impl IntoIterator<Item = &'a cri::ContainerConfig>) -> Self {
        let mut pages = BTreeMap::<u64, u64>::new();
        let resources = containers.into_iter().filter_map(|config| config.linux.as_ref()?.resources.as_ref());
        for limit in resources.flat_map(|resources| &resources.hugepage_limits) {
            if let Some(size) = page_size(&limit.page_size)
                && limit.limit > 0
            {
                let count = pages.entry(size).or_default();
                *count = count.saturating_add(limit.limit.div_ceil(size));
            }
        }
        Self(pages)
    }

    /// As many as either has.
    fn or(mut self, other: &Self) -> Self {
        for (size, count) in &other.0 {
            let own = self.0.entry(*size).or_default();
            *own = (*own).max(*count);
        }
        self
    }

    /// Bytes that a machine has more for them: a kernel describes 64 pages of memory in one.
    pub(super) fn memory(&self) -> u64 {
        let bytes =
            self.0.iter().fold(0_u64, |sum, (size, count)| sum.saturating_add(size.saturating_mul(*count)));
        let bytes = bytes.saturating_add(bytes.div_ceil(63));
        bytes.checked_next_multiple_of(vm::MEMORY_UNIT).unwrap_or(u64::MAX)
    }

    pub(super) fn wire(&self) -> Vec<agent::HugePages> {
        self.0.iter().map(|(&page_size, &count)| agent::HugePages { page_size, count }).collect()
    }
}

/// `2MB` in bytes, as the kernel writes sizes (`mm/hugetlb_cgroup.c`, `mem_fmt`).
fn page_size(text: &str) -> Option<u64> {
    let unit = text.trim_start_matches(|letter: char| letter.is_ascii_digit());
    let shift = match unit {
        "KB" => 10,
        "MB" => 20,
        "GB" => 30,
        _ => return None,
    };
    let number: u64 = text.strip_suffix(unit)?.parse().ok()?;
    number.checked_mul(1 << shift).filter(|size| size.is_power_of_two())
}

impl Task {
    /// The pod's machine has what its containers and this one may use; a pod on the host's kernel has the host's.
    pub(super) async fn have_huge_pages(&mut self, container: &cri::ContainerConfig) -> Result<(), Failure> {
        let (Some(pinned), Some(machine)) = (self.record.runtime.vm(), &self.record.machine) else {
            return Ok(());
        };
        let ended =
            |slot: &Slot| matches!(slot.state, State::Exited(_) | State::Removing { .. } | State::Removed);
        let others = self.containers.values().filter(|slot| !ended(slot)).map(|slot| &slot.record.config.0);
        let wanted = HugePages::of(others.chain([container])).or(&machine.huge_pages);
        if wanted == machine.huge_pages {
            return Ok(());
        }
        if !machine.has_huge_pages {
            let why = "are more than none, and the guest of this pod is of an earlier podvisor, which has no huge pages: start the pod again";
            return Err(PodError::invalid(FIELD, why).into());
        }
        let more = wanted.memory() - machine.huge_pages.memory();
        fit(&self.node, &self.record, machine.memory.saturating_add(more))?;
        let resources = resize::of(&self.record).resources;
        let resources = resources.as_ref().map(|resources| &resources.0);
        let resized = vm::resize(pinned, machine, resources, &wanted, self.monitor.as_ref()).await?;
        self.record.machine = Some(resized);
        self.publish();
        self.persist().await
    }
}

/// Whether the pod's cgroup has room for a machine with so many bytes of memory.
fn fit(node: &Node, pod: &PodRecord, memory: u64) -> Result<(), PodError> {
    let config = &pod.config.0;
    if !vm::declares_overhead(config) {
        return Ok(());
    }
    let cgroup = node.cgroups.cgroup(&node.driver.parent_cgroup(&cgroup_parent(config)));
    // One that cannot be read has no limit that we know of.
    let limit = cgroup.stats().ok().and_then(|stats| stats.memory?.limit);
    match limit.and_then(|limit| memory.checked_sub(limit)).filter(|missing| *missing > 0) {
        None => Ok(()),
        Some(missing) => {
            let why = format!(
                "need {} MiB more than the pod's cgroup allows its virtual machine: huge pages of a guest are ordinary memory of the node. Declare so \
                 much more memory as the overhead of the pod's runtime class",
                missing.div_ceil(1 << 20)
            );
            Err(PodError::invalid(FIELD, why))
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn container(limits: &[(&str, u64)]) -> cri::ContainerConfig {
        let limits = limits
            .iter()
            .map(|(size, limit)| cri::HugepageLimit { page_size: (*size).to_owned(), limit: *limit });
        let resources =
            cri::LinuxContainerResources { hugepage_limits: limits.collect(), ..Default::default() };
        cri::ContainerConfig {
            linux: Some(cri::LinuxContainerConfig { resources: Some(resources), ..Default::default() }),
            ..Default::default()
        }
    }

    #[test]
    fn containers_add_up() {
        let (first, second) =
            (container(&[("2MB", 5 << 20), ("1GB", 0)]), container(&[("2MB", 2 << 20), ("1GB", 1)]));
        let both = HugePages::of([&first, &second, &cri::ContainerConfig::default()]);
        assert_eq!(both.0, BTreeMap::from([(2 << 20, 4), (1 << 30, 1)]));
        assert_eq!(HugePages::of([&first]).or(&both), both);
        assert_eq!(both.clone().or(&HugePages::of([&first])), both);
        let endless = container(&[("2MB", u64::MAX), ("2MB", u64::MAX), ("3MB", 3 << 20), ("x", 1)]);
        assert_eq!(HugePages::of([&endless]).memory(), u64::MAX);
    }

    #[test]
    fn memory_has_room_for_their_description() {
        let bytes = 64 << 20;
        let memory = HugePages::of([&container(&[("2MB", bytes)])]).memory();
        assert!(memory - memory / 64 >= bytes && memory == bytes + (2 << 20), "{memory}");
        assert_eq!(HugePages::default().memory(), 0);
    }

    #[test]
    fn sizes_are_the_kernels() {
        for (text, size) in [("64KB", 64 << 10), ("2MB", 2 << 20), ("1GB", 1 << 30)] {
            assert_eq!(page_size(text), Some(size));
        }
        for text in ["", "MB", "2M", "2mb", "0MB", "3MB", "-2MB", "99999999999999999999GB", "17179869184GB"] {
            assert_eq!(page_size(text), None, "{text}");
        }
    }

    #[test]
    fn records_keep_them() {
        let pages = HugePages::of([&container(&[("2MB", 8 << 20)])]);
        let text = serde_json::to_string(&pages).unwrap();
        assert_eq!(text, r#"{"2097152":4}"#);
        assert_eq!(serde_json::from_str::<HugePages>(&text).unwrap(), pages);
    }
}
