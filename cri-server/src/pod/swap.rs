//! Swap of virtual machines. kubelet says of each container how much of it may be swapped (cgroup version 2, KEP-2400): nothing, unless the
//! administrator wants otherwise, so that secrets do not get to a disk. Guests have no swap, but their memory is the node's, which may.
//! So a machine may be swapped as far as its containers may together, once there are some.

use std::collections::HashMap;

use podvisor_proto::cri;
use serde_json::Value;

use super::slot::Slot;
use super::state::State;
use super::task::Task;
use super::vm;
use crate::error::{Failure, PodError};

/// The cgroup's file, by which kubelet says it.
const FILE: &str = "memory.swap.max";

/// Bytes of a container that may be swapped; `None`: nobody has set a limit.
fn asked(config: &cri::ContainerConfig) -> Option<u64> {
    let unified: &HashMap<_, _> = &config.linux.as_ref()?.resources.as_ref()?.unified;
    unified.get(FILE)?.trim().parse().ok()
}

/// The same of a container that has been made, as its resources were last set (OCI's `LinuxResources`).
fn in_force(resources: &Value) -> Option<u64> {
    resources["unified"][FILE].as_str()?.trim().parse().ok()
}

impl Task {
    /// The pod's machine may be swapped as far as its containers may, and one that comes. A pod on the host's kernel has its containers' limits.
    pub(super) fn limit_swap(&self, comes: Option<&cri::ContainerConfig>) -> Result<(), Failure> {
        let Some(path) = vm::cgroup(&self.node, &self.record) else { return Ok(()) };
        let ended =
            |slot: &Slot| matches!(slot.state, State::Exited(_) | State::Removing { .. } | State::Removed);
        let made = self.containers.values().filter(|slot| !ended(slot)).map(|slot| {
            let record = &slot.record;
            if record.resources.is_null() { asked(&record.config.0) } else { in_force(&record.resources) }
        });
        let most = made.chain(comes.map(asked)).try_fold(0_u64, |sum, one| Some(sum.saturating_add(one?)));
        self.node.cgroups.cgroup(&path).limit_swap(most).map_err(|error| PodError::from(error).into())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_number_is_a_limit() {
        for (text, wanted) in [("0", Some(0)), ("4096\n", Some(4096)), ("max", None), ("", None)] {
            let mut resources = cri::LinuxContainerResources::default();
            resources.unified.insert(FILE.to_owned(), text.to_owned());
            let linux = cri::LinuxContainerConfig { resources: Some(resources), ..Default::default() };
            let config = cri::ContainerConfig { linux: Some(linux), ..Default::default() };
            assert_eq!(asked(&config), wanted, "{text:?}");
            assert_eq!(in_force(&serde_json::json!({"unified": {FILE: text}})), wanted, "{text:?}");
        }
        assert_eq!(asked(&cri::ContainerConfig::default()), None);
        assert_eq!(in_force(&serde_json::json!({"memory": {"limit": 1}})), None);
    }
}
