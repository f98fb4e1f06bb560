//! Other resources for a container: one change at a time, seen by plugins first, applied by the monitor, written down, answered.

use std::sync::Arc;

use podvisor_proto::cri;
use podvisor_proto::monitor as wire;
use podvisor_proto::monitor::request::Verb;
use tokio::sync::{mpsc, oneshot};

use super::build;
use super::state::State;
use super::task::{Change, Command, Reply, Task};
use crate::error::{Failure, PodError};
use crate::hooks::Subject;
use crate::id::ContainerId;
use crate::monitor::{Connection, MonitorError};
use crate::node::Node;

impl Task {
    pub(super) fn update(
        &mut self,
        container: ContainerId,
        resources: cri::LinuxContainerResources,
        reply: Reply<()>,
    ) {
        let Some(slot) = self.containers.get_mut(&container) else {
            let _ = reply.send(Err(Arc::new(PodError::NoSuchContainer(container.to_string()))));
            return;
        };
        match &slot.state {
            // Made or started with what it has: the change comes after it.
            State::Creating | State::Starting { .. } => {
                let resources = Box::new(resources);
                slot.queued.push_back(Command::Update { container, resources, reply });
                return;
            }
            State::Removing { .. } | State::Removed | State::Unknown { .. } => {
                let (id, state) = (container.to_string(), slot.state.name());
                let _ = reply.send(Err(Arc::new(PodError::NotRunning { id, state })));
                return;
            }
            State::Created | State::Running | State::Stopping { .. } | State::Exited(_) => {}
        }
        // What cannot be is refused before plugins hear of it.
        if let Err(error) = build::merge_resources(&self.node, &slot.record, &resources) {
            let _ = reply.send(Err(Arc::new(error)));
            return;
        }
        let (Some(subject), true) = (self.subject(&container), self.node.hooks.are_active()) else {
            let change = Change { asked: Some(resources), plugins: None };
            return self.change(container, change, reply);
        };
        let turn = self.containers.get_mut(&container).map(|slot| slot.turns.next());
        let (node, mailbox) = (self.node.clone(), self.mailbox.clone());
        tokio::spawn(async move {
            if let Some(mut turn) = turn {
                turn.comes().await;
                let outcome = update_with_plugins(&node, &subject, resources, &mailbox).await;
                let _ = reply.send(outcome);
            }
        });
    }

    /// Changes the resources of a container.
    pub(super) fn change(&mut self, container: ContainerId, change: Change, reply: Reply<()>) {
        let Some(slot) = self.containers.get_mut(&container) else {
            let _ = reply.send(Err(Arc::new(PodError::NoSuchContainer(container.to_string()))));
            return;
        };
        if matches!(slot.state, State::Creating | State::Removing { .. } | State::Removed) {
            let (id, state) = (container.to_string(), slot.state.name());
            let _ = reply.send(Err(Arc::new(PodError::NotRunning { id, state })));
            return;
        }
        if slot.updating {
            slot.updates.push_back((change, reply));
            return;
        }
        let asked = change.asked.clone().unwrap_or_default();
        let merged = build::merge_resources(&self.node, &slot.record, &asked).and_then(|mut merged| {
            if let Some(plugins) = &change.plugins {
                self.node.hooks.overlay(&mut merged, plugins)?;
            }
            Ok(merged)
        });
        let merged = match merged {
            Ok(merged) => merged,
            Err(error) => {
                let _ = reply.send(Err(Arc::new(error)));
                return;
            }
        };
        slot.updating = true;
        let taken_back = build::resources_taken_back(&slot.record, &merged);
        // Also while it is being started: that may wait for plugins, who wait for this.
        let applies = matches!(
            slot.state,
            State::Created | State::Starting { .. } | State::Running | State::Stopping { .. }
        );
        let (monitor, mailbox) = (self.monitor.clone(), self.mailbox.clone());
        tokio::spawn(async move {
            let outcome = match monitor {
                Some(monitor) if applies => apply(&monitor, &container, &merged, taken_back).await,
                // Nothing runs any more that could be limited.
                _ => Ok(()),
            };
            let outcome = outcome.map(|()| merged);
            let _ = mailbox.send(Command::Updated { container, outcome, reply });
        });
    }

    /// The runtime has changed a container's resources, or could not: written down before it is told, as the next change
    /// is merged over this one, also after a start.
    pub(super) async fn updated(
        &mut self,
        container: ContainerId,
        outcome: Result<serde_json::Value, Failure>,
        reply: Reply<()>,
    ) {
        let Some(slot) = self.containers.get_mut(&container) else {
            let _ = reply.send(Err(Arc::new(PodError::NoSuchContainer(container.to_string()))));
            return;
        };
        slot.updating = false;
        let outcome = match outcome {
            Ok(resources) => {
                slot.record.resources = resources;
                let record = slot.record.clone();
                let written = self.write(record).await;
                podvisor_fault::point("update.recorded");
                self.publish();
                written.and_then(|()| self.limit_swap(None))
            }
            Err(failure) => Err(failure),
        };
        let _ = reply.send(outcome);
        while let Some(slot) = self.containers.get_mut(&container)
            && !slot.updating
            && let Some((change, reply)) = slot.updates.pop_front()
        {
            self.change(container.clone(), change, reply);
        }
    }
}

/// Changes the container to `wanted`. What refuses that may have done half of it: then it is changed to `taken_back`.
async fn apply(
    monitor: &Connection,
    container: &ContainerId,
    wanted: &serde_json::Value,
    taken_back: Result<serde_json::Value, serde_json::Error>,
) -> Result<(), Failure> {
    let updated = change_to(monitor, container, wanted).await;
    podvisor_fault::point("update.called");
    match updated {
        // It ended meanwhile: as good as before.
        Err(error) if error.is_wrong_state() => Ok(()),
        Err(error) if error.is_runtime_failure() => {
            let undone = match taken_back {
                Ok(taken_back) => change_to(monitor, container, &taken_back)
                    .await
                    .map_err(|error| crate::error::chain(&error)),
                Err(error) => Err(error.to_string()),
            };
            if let Err(error) = undone {
                tracing::warn!(%container, error, "limits of a refused update may be in force: taking them back failed");
            }
            Err(Arc::new(PodError::from(error)))
        }
        updated => updated.map_err(|error| Arc::new(PodError::from(error))),
    }
}

async fn change_to(
    monitor: &Connection,
    container: &ContainerId,
    resources: &serde_json::Value,
) -> Result<(), MonitorError> {
    let verb = Verb::UpdateContainer(wire::UpdateContainer {
        container_id: container.to_string(),
        resources: resources.to_string().into_bytes(),
    });
    monitor.command(verb).await.map(drop)
}

/// Asks the plugins, changes the container as they want it, and tells them of it.
async fn update_with_plugins(
    node: &Arc<Node>,
    subject: &Subject,
    asked: cri::LinuxContainerResources,
    mailbox: &mpsc::UnboundedSender<Command>,
) -> Result<(), Failure> {
    let plugins = node.hooks.update(node, subject, &asked).await.map_err(Arc::new)?;
    let container = subject.container.record.id.clone();
    let (reply, changed) = oneshot::channel();
    let change = Box::new(Change { asked: Some(asked.clone()), plugins: plugins.clone() });
    let _ = mailbox.send(Command::Change { container, change, reply });
    changed.await.map_err(|_| Arc::new(PodError::TaskGone))??;
    node.hooks.updated(node, subject, &asked, plugins).await;
    Ok(())
}
