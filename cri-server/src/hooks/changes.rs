//! What plugins change in containers that exist: through the tasks of their pods, like any request.

use std::sync::Arc;
use std::time::Duration;

use podvisor_nri::api::{ContainerEviction, ContainerUpdate};
use podvisor_nri::{Boxed, Inventory, Runtime};
use tokio::sync::oneshot;

use super::{Hooks, describe};
use crate::error::{Failure, PodError, chain};
use crate::id::ContainerId;
use crate::node::Node;
use crate::pod::Pod;
use crate::pod::task::{Change, Command, Index, Reply};

/// How long a change may take: a pod that is stuck holds up no plugin.
const PATIENCE: Duration = Duration::from_secs(10);

/// How long the process of an evicted container has to end: Kubernetes' default, as the pod's own is not known here.
const GRACE: Duration = Duration::from_secs(30);

/// All containers of the node, for plugins.
pub(super) struct Containers {
    pub(super) node: Arc<Node>,
    pub(super) index: Index,
}

fn pods(index: &Index) -> Vec<Pod> {
    index.read().expect("no panic under this lock").values().cloned().collect()
}

/// Sends a command to the pod of a container, by the container's full id.
fn command(
    index: &Index,
    id: &str,
    command: impl FnOnce(ContainerId, Reply<()>) -> Command,
) -> Result<oneshot::Receiver<Result<(), Failure>>, Failure> {
    let gone = || Arc::new(PodError::NoSuchContainer(id.to_owned()));
    let container: ContainerId = id.parse().map_err(|_| gone())?;
    let pod = pods(index).into_iter().find(|pod| pod.view().containers.contains_key(&container));
    let (reply, answer) = oneshot::channel();
    pod.ok_or_else(gone)?.tell(command(container, reply))?;
    Ok(answer)
}

async fn update(index: &Index, asked: &ContainerUpdate) -> Result<(), Failure> {
    let Some(resources) = asked.linux.clone().and_then(|linux| linux.resources) else { return Ok(()) };
    let change = Change { asked: None, plugins: Some(resources) };
    let answer = command(index, &asked.container_id, |container, reply| Command::Change {
        container,
        change: Box::new(change),
        reply,
    });
    match tokio::time::timeout(PATIENCE, answer?).await {
        Ok(answer) => answer.unwrap_or(Err(Arc::new(PodError::TaskGone))),
        Err(_) => Err(Arc::new(PodError::NotChanged {
            id: asked.container_id.clone(),
            seconds: PATIENCE.as_secs(),
        })),
    }
}

fn evict(index: &Index, asked: &ContainerEviction) -> Result<(), Failure> {
    let container = &asked.container_id;
    tracing::info!(container, reason = asked.reason, "an NRI plugin evicts a container");
    // Nobody waits for its end: that may take the whole grace period.
    command(index, container, |container, reply| Command::Stop { container, grace: GRACE, reply }).map(drop)
}

/// Makes all changes; what failed, each with its reason.
async fn all(
    index: &Index,
    updates: Vec<ContainerUpdate>,
    evictions: Vec<ContainerEviction>,
) -> (Vec<(ContainerUpdate, Failure)>, Option<Failure>) {
    let mut failed = Vec::new();
    for asked in updates {
        if let Err(failure) = update(index, &asked).await {
            failed.push((asked, failure));
        }
    }
    let mut not_evicted = None;
    for asked in evictions {
        if let Err(failure) = evict(index, &asked) {
            not_evicted.get_or_insert(failure);
        }
    }
    (failed, not_evicted)
}

impl Hooks {
    /// What plugins ask for along with an answer. What may not fail and does is the error.
    pub(super) async fn change(
        &self,
        updates: Vec<ContainerUpdate>,
        evictions: Vec<ContainerEviction>,
    ) -> Result<(), PodError> {
        let Some(index) = self.index.get() else { return Ok(()) };
        let (failed, not_evicted) = all(index, updates, evictions).await;
        let mut outcome = Ok(());
        for (asked, failure) in failed {
            let id = asked.container_id;
            tracing::warn!(container = id, error = chain(failure.as_ref()), "an update by a plugin failed");
            if !asked.ignore_failure && outcome.is_ok() {
                outcome = Err(PodError::ByPlugin { id, source: failure });
            }
        }
        if let Some(failure) = not_evicted {
            tracing::warn!(error = chain(failure.as_ref()), "an eviction by a plugin failed");
        }
        outcome
    }
}

impl Runtime for Containers {
    fn version(&self) -> (String, String) {
        ("podvisor".to_owned(), format!("v{}", env!("CARGO_PKG_VERSION")))
    }

    fn settled(&self) -> Boxed<'_, ()> {
        Box::pin(async {
            let pods = pods(&self.index);
            let all = async {
                for pod in &pods {
                    pod.observed().await;
                }
            };
            let _ = tokio::time::timeout(Duration::from_secs(15), all).await;
        })
    }

    fn inventory(&self) -> Boxed<'_, Inventory> {
        Box::pin(async {
            let (node, pods) = (self.node.clone(), pods(&self.index));
            let read = tokio::task::spawn_blocking(move || {
                let mut inventory = Inventory::default();
                for view in pods.iter().map(Pod::view) {
                    for container in view.containers.values().filter(|container| container.told.is_known()) {
                        let spec = describe::spec(&node, container);
                        inventory.containers.push(describe::container(&view.record, container, &spec));
                    }
                    if view.told.is_known() {
                        inventory.pods.push(describe::pod(&view.record));
                    }
                }
                inventory
            });
            read.await.unwrap_or_default()
        })
    }

    fn apply(
        &self,
        updates: Vec<ContainerUpdate>,
        evictions: Vec<ContainerEviction>,
    ) -> Boxed<'_, (Vec<ContainerUpdate>, Option<String>)> {
        Box::pin(async {
            let (failed, not_evicted) = all(&self.index, updates, evictions).await;
            let reason = failed.first().map(|(_, failure)| failure.clone()).or(not_evicted);
            let failed = failed.into_iter().map(|(asked, _)| asked).collect();
            (failed, reason.map(|failure| chain(failure.as_ref())))
        })
    }
}
