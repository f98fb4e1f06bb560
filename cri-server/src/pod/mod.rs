//! Pods: their states, their records, and the task that owns each.
//!
//! ```text
//!           Launched            Stop / init died / monitor died
//! Creating ──────────▶ Ready ────────────────▶ NotReady ──────▶ Removed
//!     │ failed: rolled back                        Remove
//!     ▼
//!   Failed
//! ```
//!
//! | file | idea |
//! |---|---|
//! | `state.rs` | a container's states and steps, pure |
//! | `record.rs` | what survives |
//! | `acquired.rs` | what is held on the host, as data, and how it is given back |
//! | `task.rs` | one task per pod does everything in order |
//! | `steps.rs` | how containers move from state to state |
//! | `slot.rs` | a container as the task holds it |
//! | `request.rs` | what a sandbox's configuration asks for |
//! | `launch.rs` | how a sandbox is made |
//! | `files.rs` | files that a pod's containers share |
//! | `sandbox_container.rs` | the container that holds the others, where the OCI runtime wants one |
//! | `vm.rs` | a pod that is a virtual machine |
//! | `share.rs` | what its guest sees of the host |
//! | `guest_image.rs` | a container's image in its memory |
//! | `writable.rs` | what a container writes, as a disk |
//! | `disks.rs` | block devices of the host as its disks |
//! | `resize.rs` | what kubelet says that a pod may use |
//! | `build.rs` | how a container is made |
//! | `specify.rs` | a container's OCI spec |
//! | `volumes.rs` | sources of its mounts |
//! | `image_volumes.rs` | those of them that are images |
//! | `signal.rs` | what stops it |
//! | `dismantle.rs` | how it is unmade |
//! | `runtime_state.rs` | what an OCI runtime still knows without a monitor |
//! | `recovery.rs` | records × what is observed → what to do |
//! | `view.rs` | what readers see |
//!
//! Invariants: an acquisition is recorded before it happens; a reply is sent after its record is durable; nobody but the pod's task
//! changes the pod; reading never waits.

pub(crate) mod acquired;
pub(crate) mod build;
pub(crate) mod devices;
mod disks;
mod dismantle;
mod files;
mod guest_image;
mod guest_volumes;
mod huge_pages;
pub(crate) mod image_volumes;
pub(crate) mod launch;
pub(crate) mod record;
pub(crate) mod recovery;
pub(crate) mod request;
pub(crate) mod resize;
mod runtime_state;
mod sandbox_container;
mod share;
mod shared_volumes;
pub(crate) mod signal;
pub(crate) mod slot;
mod specify;
pub(crate) mod state;
mod steps;
mod swap;
pub(crate) mod task;
mod update;
pub(crate) mod view;
pub(crate) mod vm;
mod volumes;
mod writable;

use std::collections::BTreeMap;
use std::sync::{Arc, RwLock};
use std::time::Duration;

use podvisor_proto::cri;
use tokio::sync::{mpsc, oneshot, watch};

use crate::error::{Failure, PodError};
use crate::id::{self, ContainerId, PodId};
use crate::node::Node;
use crate::selinux;
use task::{Command, Reply};
use view::{ContainerView, PodView, Status};

/// One pod, seen from outside: where to send commands and what it looks like.
#[derive(Debug, Clone)]
pub(crate) struct Pod {
    pub(crate) id: PodId,
    commands: mpsc::UnboundedSender<Command>,
    view: watch::Receiver<Arc<PodView>>,
}

/// All pods of the node.
#[derive(Debug)]
pub(crate) struct Pods {
    node: Arc<Node>,
    index: Arc<RwLock<BTreeMap<PodId, Pod>>>,
}

impl Pods {
    pub(crate) fn new(node: Arc<Node>) -> Self {
        Self { node, index: Arc::default() }
    }

    /// Makes a sandbox, or joins the making of one of the same name and configuration that is under way or done.
    pub(crate) async fn run(
        &self,
        config: cri::PodSandboxConfig,
        requested_handler: String,
    ) -> Result<PodId, Failure> {
        request::validate(&config)?;
        loop {
            let (pod, ours) = self.reserve(config.clone(), requested_handler.clone())?;
            let mut view = pod.view.clone();
            let outcome = view.wait_for(|view| !matches!(view.status, Status::Creating)).await;
            let status = match outcome {
                Ok(view) => view.status.clone(),
                Err(_) => return Err(Arc::new(PodError::TaskGone)),
            };
            return match status {
                Status::Failed(failure) => Err(failure),
                Status::Ready => Ok(pod.id),
                // One that an earlier daemon had begun, rolled back meanwhile: its name is free.
                Status::Removed if !ours => continue,
                _ if ours => {
                    let why = pod.view().why().to_owned();
                    Err(Arc::new(PodError::NotReady { id: pod.id.to_string(), why }))
                }
                _ => Err(Arc::new(taken(&pod))),
            };
        }
    }

    /// The pod of this name, new or not, under one lock.
    fn reserve(
        &self,
        config: cri::PodSandboxConfig,
        requested_handler: String,
    ) -> Result<(Pod, bool), Failure> {
        let handler = launch::select_handler(&self.node, &config, &requested_handler)?;
        // Before the lock that lists need: it looks at files.
        let mut record = launch::plan(&self.node, config.clone(), requested_handler.clone(), handler)?;
        let mut index = self.index.write().expect("no panic under this lock");
        let same = index.values().find(|pod| {
            let view = pod.view.borrow();
            !matches!(view.status, Status::Failed(_) | Status::Removed)
                && view.config().metadata == config.metadata
        });
        if let Some(pod) = same {
            let view = pod.view.borrow().clone();
            let identical = *view.config() == config && view.record.requested_handler == requested_handler;
            if identical && matches!(view.status, Status::Creating | Status::Ready) {
                return Ok((pod.clone(), false));
            }
            return Err(Arc::new(taken(pod)));
        }
        if let Some(labels) = &mut record.selinux {
            let taken = |level: &str| index.values().any(|pod| pod.view.borrow().has_level(level));
            labels.separate(selinux::pod_options(&config), id::random_number(), taken);
        }
        let pod =
            task::spawn(self.node.clone(), self.index.clone(), task::Beginning::Launch(Box::new(record)));
        index.insert(pod.id.clone(), pod.clone());
        Ok((pod, true))
    }

    /// Takes over every pod that has records. After this returns each is in lists; their tasks go on asking their monitors.
    pub(crate) async fn recover(&self) -> std::io::Result<()> {
        recovery::recover(&self.node, &self.index).await
    }

    /// Lets NRI plugins take part from now on.
    pub(crate) async fn admit_plugins(&self) {
        self.node.hooks.start(&self.node, self.index.clone()).await;
    }

    /// What plugins are told.
    pub(crate) fn hooks(&self) -> &crate::hooks::Hooks {
        &self.node.hooks
    }

    /// Views of all pods that the CRI shows.
    pub(crate) fn views(&self) -> Vec<Arc<PodView>> {
        let index = self.index.read().expect("no panic under this lock");
        index.values().map(|pod| pod.view.borrow().clone()).filter(|view| view.is_visible()).collect()
    }

    /// The pod that `id` (or an unambiguous beginning of it) means.
    pub(crate) fn find(&self, id: &str) -> Result<Pod, PodError> {
        let index = self.index.read().expect("no panic under this lock");
        unique(
            "sandbox id",
            id,
            index
                .values()
                .filter(|pod| pod.view.borrow().is_visible())
                .filter(|pod| pod.id.as_str().starts_with(id))
                .map(|pod| (pod.id.as_str().len() == id.len(), pod.clone())),
        )?
        .ok_or_else(|| PodError::NoSuchPod(id.to_owned()))
    }

    /// The container that `id` (or an unambiguous beginning of it) means, with its pod.
    pub(crate) fn find_container(&self, id: &str) -> Result<(Pod, Arc<ContainerView>), PodError> {
        let index = self.index.read().expect("no panic under this lock");
        let found = index.values().flat_map(|pod| {
            let view = pod.view.borrow();
            view.visible_containers()
                .filter(|container| container.record.id.as_str().starts_with(id))
                .map(|container| {
                    (container.record.id.as_str().len() == id.len(), (pod.clone(), container.clone()))
                })
                .collect::<Vec<_>>()
        });
        unique("container id", id, found)?.ok_or_else(|| PodError::NoSuchContainer(id.to_owned()))
    }
}

fn taken(pod: &Pod) -> PodError {
    PodError::NameTaken {
        what: "pod sandbox",
        name: pod.view.borrow().metadata().name,
        id: pod.id.to_string(),
    }
}

/// The one match; a full match beats beginnings.
fn unique<T>(
    what: &'static str,
    id: &str,
    found: impl Iterator<Item = (bool, T)>,
) -> Result<Option<T>, PodError> {
    if id.is_empty() {
        return Err(PodError::invalid(what, "must not be empty"));
    }
    let mut only = None;
    for (full, candidate) in found {
        if full {
            return Ok(Some(candidate));
        }
        if only.replace(candidate).is_some() {
            return Err(PodError::Ambiguous { what, id: id.to_owned() });
        }
    }
    Ok(only)
}

impl Pod {
    pub(crate) fn view(&self) -> Arc<PodView> {
        self.view.borrow().clone()
    }

    /// The view once the pod has been compared with what there is: at once, but for the first moments after a start. Waits within a
    /// bound; what the monitor is asked then fails by itself.
    pub(crate) async fn observed(&self) -> Arc<PodView> {
        const BOUND: Duration = Duration::from_secs(15);
        let mut view = self.view.clone();
        let _ = tokio::time::timeout(BOUND, view.wait_for(|view| view.observed)).await;
        self.view()
    }

    /// Sends a command whose answer comes on its own way.
    pub(crate) fn tell(&self, command: Command) -> Result<(), Failure> {
        self.commands.send(command).map_err(|_| Arc::new(PodError::TaskGone))
    }

    async fn ask<T>(&self, command: impl FnOnce(Reply<T>) -> Command) -> Result<T, Failure> {
        let (reply, answer) = oneshot::channel();
        self.commands.send(command(reply)).map_err(|_| self.gone())?;
        answer.await.map_err(|_| self.gone())?
    }

    /// Why nobody answers: another request has removed the pod meanwhile, or something is wrong.
    fn gone(&self) -> Failure {
        Arc::new(match self.view.borrow().status {
            Status::Removed | Status::Failed(_) => PodError::NoSuchPod(self.id.to_string()),
            Status::Creating | Status::Ready | Status::NotReady => PodError::TaskGone,
        })
    }

    pub(crate) async fn create_container(
        &self,
        config: cri::ContainerConfig,
    ) -> Result<ContainerId, Failure> {
        self.ask(|reply| Command::Create { config: Box::new(config), reply }).await
    }

    pub(crate) async fn start_container(&self, container: ContainerId) -> Result<(), Failure> {
        self.ask(|reply| Command::Start { container, reply }).await
    }

    pub(crate) async fn stop_container(
        &self,
        container: ContainerId,
        grace: Duration,
    ) -> Result<(), Failure> {
        self.ask(|reply| Command::Stop { container, grace, reply }).await
    }

    pub(crate) async fn remove_container(&self, container: ContainerId) -> Result<(), Failure> {
        self.ask(|reply| Command::Remove { container, reply }).await
    }

    pub(crate) async fn update_container(
        &self,
        container: ContainerId,
        resources: cri::LinuxContainerResources,
    ) -> Result<(), Failure> {
        self.ask(|reply| Command::Update { container, resources: Box::new(resources), reply }).await
    }

    pub(crate) async fn resize(&self, sizes: resize::Sizes) -> Result<(), Failure> {
        self.ask(|reply| Command::Resize { sizes: Box::new(sizes), reply }).await
    }

    pub(crate) async fn stop(&self) -> Result<(), Failure> {
        self.ask(|reply| Command::StopSandbox { reply }).await
    }

    pub(crate) async fn remove(&self) -> Result<(), Failure> {
        self.ask(|reply| Command::RemoveSandbox { reply }).await
    }
}
