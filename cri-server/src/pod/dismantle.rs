//! How a container is unmade, with its monitor or without.

use std::sync::Arc;

use podvisor_proto::monitor::DeleteContainer;
use podvisor_proto::monitor::request::Verb;

use super::acquired::{Acquisition, release_all};
use super::record::{self, ContainerRecord, Engine, PodRecord, ProcessIdentity};
use super::runtime_state;
use crate::error::PodError;
use crate::id::ContainerId;
use crate::monitor::{Connection, MonitorError};
use crate::node::Node;
use crate::timeline::timed;

/// What it takes to unmake a container.
#[derive(Debug)]
pub(crate) struct Dismantling {
    id: ContainerId,
    runtime: Engine,
    cgroup: String,
    process: Option<ProcessIdentity>,
    acquired: Vec<Acquisition>,
    pod: crate::id::PodId,
}

impl Dismantling {
    pub(crate) fn of(pod: &PodRecord, container: &ContainerRecord) -> Self {
        Self {
            id: container.id.clone(),
            runtime: pod.runtime.clone(),
            cgroup: container.cgroup.clone(),
            process: container.process,
            acquired: container.acquired.clone(),
            pod: pod.id.clone(),
        }
    }

    /// Kills what runs, deletes it in the runtime, gives everything back, forgets the record. Idempotent.
    pub(crate) async fn run(mut self, node: &Arc<Node>, monitor: Option<Connection>) -> Result<(), PodError> {
        let asked = match &monitor {
            Some(monitor) => {
                let verb = Verb::DeleteContainer(DeleteContainer { container_id: self.id.to_string() });
                timed("delete", &self.id, monitor.command(verb)).await
            }
            None => Err(MonitorError::Gone),
        };
        match asked {
            Ok(()) => {}
            Err(error) if error.is_not_found() => {}
            Err(MonitorError::Gone | MonitorError::Connect { .. }) => self.without_monitor(node).await?,
            Err(error) => return Err(error.into()),
        }
        podvisor_fault::point("remove.deleted");
        release_all(node, &self.id, &mut self.acquired).await?;
        podvisor_fault::point("remove.released");
        let (records, id) = (node.records.clone(), self.id.clone());
        let forgotten = tokio::task::spawn_blocking(move || records.remove_container(&self.pod, &self.id));
        timed("forget", &id, forgotten).await.map_err(|_| PodError::TaskGone)??;
        Ok(())
    }

    /// There is nobody left to ask: kill by cgroup and identity, and let the runtime forget its state.
    async fn without_monitor(&self, node: &Arc<Node>) -> Result<(), PodError> {
        if let Some(process) = self.process {
            crate::monitor::process::kill(process);
        }
        let cgroup = node.cgroups.cgroup(&self.cgroup);
        if cgroup.exists() {
            tokio::task::spawn_blocking(move || cgroup.kill()).await.map_err(|_| PodError::TaskGone)??;
        }
        // A container in a guest is gone with its machine, which is gone with its monitor.
        let Some(runtime) = self.runtime.oci() else { return Ok(()) };
        runtime_state::forget(runtime, self.id.as_str()).await;
        let state = runtime.root.join(self.id.as_str());
        // What the runtime could not remove, its own state above all: the directory is ours.
        match std::fs::remove_dir_all(&state) {
            Err(error) if error.kind() != std::io::ErrorKind::NotFound => {
                tracing::warn!(container = %self.id, %error, "the runtime's state of a container stays");
            }
            _ => {}
        }
        Acquisition::Cgroup(self.cgroup.clone()).release(node).await?;
        Ok(())
    }
}

/// Kills whatever a container left running although its monitor is gone.
pub(crate) fn kill_orphan(node: &Node, record: &record::ContainerRecord) {
    if let Some(process) = record.process {
        crate::monitor::process::kill(process);
    }
    let cgroup = node.cgroups.cgroup(&record.cgroup);
    if cgroup.exists()
        && let Err(error) = cgroup.kill()
    {
        tracing::warn!(container = %record.id, error = crate::error::chain(&error), "cannot kill an orphaned container");
    }
}
