//! The task that owns a pod: it takes commands and news one after the other, moves the state machine, and lets the effects run
//! beside it, so that a container that takes its time to stop holds up nobody.

use std::collections::BTreeMap;
use std::sync::{Arc, RwLock};
use std::time::Duration;

use podvisor_proto::cri;
use podvisor_proto::monitor::{self as wire, event};
use tokio::sync::{mpsc, oneshot, watch};

use super::acquired::{Acquisition, release_all};
use super::build::Built;
use super::launch::{self, Launched};
use super::record::{ContainerRecord, Phase, PodRecord, exit_of};
use super::resize::Sizes;
use super::slot::{Slot, answer};
use super::state::{Event, Exit, State};
use super::view::{PodView, Status};
use super::{Pod, recovery};
use crate::error::{Failure, PodError};
use crate::hooks::Subject;
use crate::hooks::told::Told;
use crate::id::{ContainerId, PodId};
use crate::monitor::{Connection, Notice};
use crate::node::{Node, now};
use crate::timeline::timed;

/// How an answer gets back.
pub(crate) type Reply<T> = oneshot::Sender<Result<T, Failure>>;

/// All pods by id; a task takes its own entry out at its end.
pub(crate) type Index = Arc<RwLock<BTreeMap<PodId, Pod>>>;

/// What a pod's task is told.
#[derive(Debug)]
pub(crate) enum Command {
    Create {
        config: Box<cri::ContainerConfig>,
        reply: Reply<ContainerId>,
    },
    Start {
        container: ContainerId,
        reply: Reply<()>,
    },
    Stop {
        container: ContainerId,
        grace: Duration,
        reply: Reply<()>,
    },
    Remove {
        container: ContainerId,
        reply: Reply<()>,
    },
    Update {
        container: ContainerId,
        resources: Box<cri::LinuxContainerResources>,
        reply: Reply<()>,
    },
    Resize {
        sizes: Box<Sizes>,
        reply: Reply<()>,
    },
    StopSandbox {
        reply: Reply<()>,
    },
    RemoveSandbox {
        reply: Reply<()>,
    },
    /// The sandbox is made, or could not be.
    Launched(Result<Box<Launched>, Failure>),
    /// A container is made, or could not be.
    Built {
        container: ContainerId,
        built: Result<Box<Built>, Failure>,
    },
    /// An effect's outcome; with the failure that those who wait are told.
    Step {
        container: ContainerId,
        event: Event,
        failure: Option<Failure>,
    },
    /// A grace period is over.
    Deadline {
        container: ContainerId,
        number: u64,
    },
    /// SIGKILL did not help.
    Unkillable {
        container: ContainerId,
    },
    /// From the monitor.
    Notice(Notice),
    /// Resources are to be changed; plugins have had their say.
    Change {
        container: ContainerId,
        change: Box<Change>,
        reply: Reply<()>,
    },
    /// A plugin has moved a container that is being made to another cgroup.
    Moved {
        container: ContainerId,
        cgroup: String,
        reply: Reply<()>,
    },
    /// Plugins know that the sandbox is being removed.
    RemovalTold,
    /// The container's resources were changed, or could not be.
    Updated {
        container: ContainerId,
        outcome: Result<serde_json::Value, Failure>,
        reply: Reply<()>,
    },
    /// All that a stopped sandbox has to give back was tried.
    Released {
        acquired: Vec<Acquisition>,
        outcome: Result<(), Failure>,
    },
}

/// Other resources for a container.
#[derive(Debug)]
pub(crate) struct Change {
    /// What kubelet asks for.
    pub(crate) asked: Option<cri::LinuxContainerResources>,
    /// What plugins want laid over that.
    pub(crate) plugins: Option<podvisor_proto::nri::LinuxResources>,
}

/// How a task begins.
#[derive(Debug)]
pub(crate) enum Beginning {
    /// A new sandbox.
    Launch(Box<PodRecord>),
    /// One that an earlier daemon left.
    Recover(Box<recovery::Found>),
}

/// The pod's own data; only its task sees it.
pub(crate) struct Task {
    pub(super) node: Arc<Node>,
    index: Index,
    pub(super) record: PodRecord,
    pub(super) status: Status,
    pub(super) containers: BTreeMap<ContainerId, Slot>,
    pub(super) monitor: Option<Connection>,
    view: watch::Sender<Arc<PodView>>,
    pub(super) mailbox: mpsc::UnboundedSender<Command>,
    pub(super) stopping: Vec<Reply<()>>,
    pub(super) removing: Vec<Reply<()>>,
    /// A release runs right now.
    pub(super) releasing: bool,
    /// A removal that an earlier daemon had begun goes on without anybody asking.
    pub(super) resume_removal: bool,
    /// A container has moved: a stop or removal of the sandbox may be able to go on.
    pub(super) unsettled: bool,
    observed: bool,
    /// What plugins have been told of the sandbox.
    told: Arc<Told>,
    /// They are being told of its removal.
    telling: bool,
}

/// Starts the task of a pod. Its first view is there when this returns.
pub(crate) fn spawn(node: Arc<Node>, index: Index, beginning: Beginning) -> Pod {
    let (commands, inbox) = mpsc::unbounded_channel();
    let (record, status, slots) = match &beginning {
        Beginning::Launch(record) => ((**record).clone(), Status::Creating, BTreeMap::new()),
        Beginning::Recover(found) => (found.record.clone(), found.status(), found.slots()),
    };
    let told = Arc::new(Told::recovered(
        record.phase != Phase::Creating,
        matches!(record.phase, Phase::Stopped | Phase::Removing),
    ));
    let (sender, view) = watch::channel(Arc::new(PodView {
        record: Arc::new(record.clone()),
        status: status.clone(),
        containers: slots.iter().map(|(id, slot)| (id.clone(), slot.view())).collect(),
        monitor: None,
        told: told.clone(),
        observed: matches!(beginning, Beginning::Launch(_)),
    }));
    let id = record.id.clone();
    let task = Task {
        node,
        index,
        record,
        status,
        containers: slots,
        monitor: None,
        view: sender,
        mailbox: commands.clone(),
        stopping: Vec::new(),
        removing: Vec::new(),
        releasing: false,
        resume_removal: false,
        unsettled: false,
        observed: matches!(beginning, Beginning::Launch(_)),
        told,
        telling: false,
    };
    tokio::spawn(task.run(inbox, matches!(beginning, Beginning::Recover(_))));
    Pod { id, commands, view }
}

impl Task {
    async fn run(mut self, mut inbox: mpsc::UnboundedReceiver<Command>, recovered: bool) {
        if recovered {
            recovery::observe(&mut self).await;
            self.observed = true;
            self.publish();
            self.settle_sandbox().await;
            if matches!(self.record.phase, Phase::Removing) {
                self.resume_removal = true;
                self.try_remove().await;
            }
        } else {
            self.launch().await;
        }
        while !matches!(self.status, Status::Removed | Status::Failed(_)) {
            let Some(command) = inbox.recv().await else { return };
            self.handle(command).await;
            self.settle_sandbox().await;
        }
        self.index.write().expect("no panic under this lock").remove(&self.record.id);
        self.publish();
    }

    pub(super) async fn handle(&mut self, command: Command) {
        match command {
            Command::Create { config, reply } => self.create(*config, reply).await,
            Command::Start { container, reply } => self.request(container, Event::Start, reply).await,
            Command::Stop { container, grace, reply } => {
                self.request(container, Event::Stop { grace }, reply).await;
            }
            Command::Remove { container, reply } => self.request(container, Event::Remove, reply).await,
            Command::Update { container, resources, reply } => self.update(container, *resources, reply),
            Command::Resize { sizes, reply } => self.resize(*sizes, reply).await,
            Command::Change { container, change, reply } => self.change(container, *change, reply),
            Command::Moved { container, cgroup, reply } => self.moved(container, cgroup, reply).await,
            Command::RemovalTold => {
                self.telling = false;
                self.try_remove().await;
            }
            Command::StopSandbox { reply } => {
                self.stopping.push(reply);
                self.stop_all().await;
            }
            Command::RemoveSandbox { reply } => {
                self.removing.push(reply);
                self.stop_all().await;
            }
            Command::Launched(launched) => self.launched(launched).await,
            Command::Built { container, built } => self.built(container, built).await,
            Command::Step { container, event, failure } => {
                self.advance(&container, event, failure).await;
            }
            Command::Deadline { container, number } => {
                if self.containers.get(&container).is_some_and(|slot| slot.deadline == number) {
                    self.advance(&container, Event::Deadline, None).await;
                }
            }
            Command::Unkillable { container } => self.unkillable(&container),
            Command::Notice(Notice::Event(news)) => self.news(news).await,
            Command::Notice(Notice::Closed) => recovery::monitor_lost(self).await,
            Command::Updated { container, outcome, reply } => self.updated(container, outcome, reply).await,
            Command::Released { acquired, outcome } => self.released(acquired, outcome).await,
        }
    }

    /// Publishes the pod as it is now.
    pub(super) fn publish(&self) {
        self.view.send_replace(Arc::new(PodView {
            record: Arc::new(self.record.clone()),
            status: self.status.clone(),
            containers: self.containers.iter().map(|(id, slot)| (id.clone(), slot.view())).collect(),
            monitor: self.monitor.clone(),
            told: self.told.clone(),
            observed: self.observed,
        }));
    }

    /// For the monitor's connection: news go to this task's mailbox.
    pub(super) fn notices(&self) -> impl Fn(Notice) + Send + Sync + 'static {
        let mailbox = self.mailbox.clone();
        move |notice| {
            let _ = mailbox.send(Command::Notice(notice));
        }
    }

    pub(super) async fn persist(&self) -> Result<(), Failure> {
        let (records, record) = (self.node.records.clone(), self.record.clone());
        let written = tokio::task::spawn_blocking(move || records.write_pod(&record));
        timed("record", &self.record.id, written)
            .await
            .map_err(|_| Arc::new(PodError::TaskGone))?
            .map_err(|error| Arc::new(error.into()))
    }

    /// Writes a container's record; a failure is logged where nobody waits for it.
    pub(super) async fn persist_container(&self, container: &ContainerId) {
        if let Some(slot) = self.containers.get(container)
            && let Err(error) = self.write(slot.record.clone()).await
        {
            tracing::error!(%container, error = crate::error::chain(error.as_ref()), "cannot record a container's state");
        }
    }

    /// Brings every record up to its container's state.
    pub(super) async fn persist_containers(&mut self) {
        let mut changed = Vec::new();
        for (id, slot) in &mut self.containers {
            if let Some(phase) = slot.phase()
                && phase != slot.record.phase
            {
                slot.record.phase = phase;
                changed.push(id.clone());
            }
        }
        for id in changed {
            self.persist_container(&id).await;
        }
    }

    pub(super) async fn write(&self, record: ContainerRecord) -> Result<(), Failure> {
        let (records, pod, id) = (self.node.records.clone(), self.record.id.clone(), record.id.clone());
        let written = tokio::task::spawn_blocking(move || records.write_container(&pod, &record));
        timed("record", &id, written)
            .await
            .map_err(|_| Arc::new(PodError::TaskGone))?
            .map_err(|error| Arc::new(error.into()))
    }

    // ---- the sandbox

    async fn launch(&mut self) {
        if let Err(failure) = self.persist().await {
            let _ = self.mailbox.send(Command::Launched(Err(failure)));
            return;
        }
        podvisor_fault::point("run.recorded");
        let (node, record, mailbox, notices) =
            (self.node.clone(), self.record.clone(), self.mailbox.clone(), self.notices());
        let told = self.told.clone();
        tokio::spawn(async move {
            let launched = Box::pin(launch::launch(&node, &record, notices, &told)).await.map(Box::new);
            let _ = mailbox.send(Command::Launched(launched));
        });
    }

    async fn launched(&mut self, launched: Result<Box<Launched>, Failure>) {
        let failure = match launched {
            Ok(launched) => {
                self.monitor = Some(launched.monitor.connection.clone());
                self.record.monitor = Some(launched.monitor.process);
                self.record.init = launched.init;
                self.record.machine = launched.machine;
                self.record.addresses = launched.addresses;
                self.record.cni_result = launched.cni_result;
                self.record.acquired.push(Acquisition::Cgroup(launched.monitor.cgroup.clone()));
                self.record.phase = Phase::Ready;
                podvisor_fault::point("run.launched");
                match self.persist().await {
                    Ok(()) => {
                        podvisor_fault::point("run.ready");
                        self.status = Status::Ready;
                        self.publish();
                        self.announce(None, cri::ContainerEventType::ContainerCreatedEvent);
                        self.announce(None, cri::ContainerEventType::ContainerStartedEvent);
                        return;
                    }
                    Err(failure) => failure,
                }
            }
            Err(failure) => failure,
        };
        let why = crate::error::chain(failure.as_ref());
        self.roll_back(&why, Status::Failed(failure)).await;
        self.publish();
    }

    /// Gives everything back and forgets the pod, which is then `gone`. What cannot be given back keeps it in lists, not ready: so
    /// kubelet stops and removes it, which tries again, and nothing is left that nobody knows of.
    pub(super) async fn roll_back(&mut self, why: &str, gone: Status) {
        podvisor_fault::point("run.failed");
        self.node.hooks.undo_pod(&self.record, &self.told).await;
        recovery::end_monitor(self).await;
        let mut acquired = std::mem::take(&mut self.record.acquired);
        let released = release_all(&self.node, &self.record.id, &mut acquired).await;
        self.record.acquired = acquired;
        podvisor_fault::point("run.released");
        let (records, id) = (self.node.records.clone(), self.record.id.clone());
        let forgotten = match released {
            Ok(()) => match tokio::task::spawn_blocking(move || records.remove_pod(&id)).await {
                Ok(removed) => removed.map_err(PodError::from),
                Err(_) => Err(PodError::TaskGone),
            },
            Err(error) => Err(PodError::from(error)),
        };
        let Err(error) = forgotten else {
            podvisor_fault::point("run.rolled-back");
            self.status = gone;
            return;
        };
        let left = crate::error::chain(&error);
        tracing::error!(pod = %self.record.id, error = left, "something of a failed sandbox is left until it is stopped and removed");
        self.record.phase = Phase::Failed { why: format!("{why}; and something of it is left: {left}") };
        self.status = Status::NotReady;
        if let Err(error) = self.persist().await {
            tracing::error!(pod = %self.record.id, error = crate::error::chain(error.as_ref()), "cannot record a sandbox's state");
        }
    }

    /// What the last steps of containers mean for a stop or removal of the sandbox.
    async fn settle_sandbox(&mut self) {
        while std::mem::take(&mut self.unsettled) {
            self.try_release().await;
        }
    }

    /// Moves every container towards its end; when all are there the sandbox's own things go.
    async fn stop_all(&mut self) {
        let running: Vec<_> = self
            .containers
            .iter()
            .filter(|(_, slot)| {
                slot.state.may_run() && !matches!(slot.state, State::Removing { .. } | State::Creating)
            })
            .map(|(id, _)| id.clone())
            .collect();
        for id in running {
            self.advance(&id, Event::Stop { grace: Duration::ZERO }, None).await;
        }
        self.cancel_creations();
        self.try_release().await;
    }

    /// Somebody wants the sandbox to be stopped or removed.
    pub(super) fn is_to_end(&self) -> bool {
        !self.stopping.is_empty() || !self.removing.is_empty() || self.resume_removal
    }

    /// Gives the sandbox's things back once no container needs them. Called after every change while somebody waits for it.
    pub(super) async fn try_release(&mut self) {
        if !self.is_to_end() || self.releasing {
            return;
        }
        if matches!(self.record.phase, Phase::Stopped | Phase::Removing) {
            answer(&mut self.stopping, &Ok(()));
            self.try_remove().await;
            return;
        }
        if let Some(id) = self
            .containers
            .iter()
            .find(|(_, slot)| matches!(slot.state, State::Created | State::Running))
            .map(|(id, _)| id.clone())
        {
            // It came through a transition while the sandbox was being stopped.
            return self.advance(&id, Event::Stop { grace: Duration::ZERO }, None).await;
        }
        if self.containers.values().any(|slot| slot.state.may_run()) {
            return;
        }
        self.releasing = true;
        // Not ready from now on, whatever becomes of the release.
        if matches!(self.record.phase, Phase::Ready | Phase::Creating) {
            self.record.phase = Phase::Failed { why: "it is being stopped".into() };
            let _ = self.persist().await;
            self.status = Status::NotReady;
            self.publish();
        }
        podvisor_fault::point("stop-pod.not-ready");
        let (node, mailbox, mut acquired) =
            (self.node.clone(), self.mailbox.clone(), self.record.acquired.clone());
        let ending = recovery::Ending::of(self);
        let (record, told) = (self.view.borrow().record.clone(), self.told.clone());
        let turns: Vec<_> = self.containers.values_mut().map(|slot| slot.turns.next()).collect();
        tokio::spawn(async move {
            for mut turn in turns {
                turn.comes().await;
            }
            // While the pod's network is still there.
            node.hooks.stop_pod(&record, &told).await;
            timed("end of the monitor", &record.id, ending.end()).await;
            podvisor_fault::point("stop-pod.monitor-ended");
            let outcome =
                release_all(&node, &record.id, &mut acquired).await.map_err(|e| Arc::new(PodError::from(e)));
            podvisor_fault::point("stop-pod.released");
            let _ = mailbox.send(Command::Released { acquired, outcome });
        });
    }

    async fn released(&mut self, acquired: Vec<Acquisition>, outcome: Result<(), Failure>) {
        self.releasing = false;
        self.record.acquired = acquired;
        let outcome = match outcome {
            Ok(()) => {
                self.monitor = None;
                self.record.monitor = None;
                self.record.init = None;
                // Given back: another pod may have them by now.
                self.record.addresses.clear();
                self.record.phase = Phase::Stopped;
                // It is stopped whether that can be written down or not, and a full disk is what pods are stopped for: the
                // record that there is says that it is not ready, and to give things back twice does no harm.
                if let Err(error) = self.persist().await {
                    tracing::error!(pod = %self.record.id, error = crate::error::chain(error.as_ref()), "cannot record that a sandbox is stopped");
                }
                podvisor_fault::point("stop-pod.recorded");
                Ok(())
            }
            failed => {
                let _ = self.persist().await;
                failed
            }
        };
        self.publish();
        if outcome.is_ok() {
            self.announce(None, cri::ContainerEventType::ContainerStoppedEvent);
        }
        answer(&mut self.stopping, &outcome);
        match outcome {
            Ok(()) => self.try_remove().await,
            Err(_) => answer(&mut self.removing, &outcome),
        }
    }

    /// Removes a stopped sandbox once its containers have gone.
    pub(super) async fn try_remove(&mut self) {
        let stopped = matches!(self.record.phase, Phase::Stopped | Phase::Removing);
        if !stopped || (self.removing.is_empty() && !self.resume_removal) {
            return;
        }
        if self.record.phase != Phase::Removing {
            self.record.phase = Phase::Removing;
            // A full disk must not keep what fills it: unwritten, a crash only means that kubelet asks again.
            if let Err(error) = self.persist().await {
                tracing::warn!(pod = %self.record.id, error = crate::error::chain(error.as_ref()), "cannot record that a sandbox is being removed");
            }
            podvisor_fault::point("remove-pod.recorded");
        }
        let left: Vec<_> = self
            .containers
            .iter()
            .filter(|(_, slot)| !matches!(slot.state, State::Removing { .. } | State::Removed))
            .map(|(id, _)| id.clone())
            .collect();
        for id in left {
            self.advance(&id, Event::Remove, None).await;
        }
        if !self.containers.is_empty() || self.telling {
            return;
        }
        if !self.node.hooks.pass_removal(&self.told) {
            self.telling = true;
            let (node, mailbox, told) = (self.node.clone(), self.mailbox.clone(), self.told.clone());
            let record = self.view.borrow().record.clone();
            tokio::spawn(async move {
                node.hooks.remove_pod(&record, &told).await;
                let _ = mailbox.send(Command::RemovalTold);
            });
            return;
        }
        let (records, id) = (self.node.records.clone(), self.record.id.clone());
        let removed = tokio::task::spawn_blocking(move || records.remove_pod(&id)).await;
        match removed {
            Ok(Ok(())) => {
                podvisor_fault::point("remove-pod.forgotten");
                self.announce(None, cri::ContainerEventType::ContainerDeletedEvent);
                self.status = Status::Removed;
                // Out of every list before the caller hears of it.
                self.index.write().expect("no panic under this lock").remove(&self.record.id);
                self.publish();
                answer(&mut self.removing, &Ok(()));
            }
            Ok(Err(error)) => answer(&mut self.removing, &Err(Arc::new(error.into()))),
            Err(_) => answer(&mut self.removing, &Err(Arc::new(PodError::TaskGone))),
        }
    }

    /// What the monitor reports.
    async fn news(&mut self, news: wire::Event) {
        match news.kind {
            Some(event::Kind::Exited(exited)) => {
                let exit = exited.exit.unwrap_or_default();
                self.ended(&exited.id, exit_of(exit.code, exit.finished_at, exit.oom_killed, &exited.reason))
                    .await;
            }
            Some(event::Kind::Oom(oom)) => {
                tracing::info!(
                    container = oom.container_id,
                    "the kernel killed a process for lack of memory"
                );
            }
            None => {}
        }
    }

    /// A container's first process, or the pod's init, has ended.
    pub(super) async fn ended(&mut self, id: &str, exit: Exit) {
        if id == self.record.id.as_str() {
            if !self.releasing && matches!(self.record.phase, Phase::Ready) {
                let why = match (recovery::init_name(&self.record), exit.message.as_str()) {
                    (what, "") => format!("{what} ended with code {}", exit.code),
                    (what, why) => format!("{what} ended: {why}"),
                };
                tracing::warn!(pod = id, why, "a sandbox is not ready any more");
                self.fail(why).await;
            }
        } else if let Ok(container) = id.parse() {
            self.advance(&container, Event::Exited(exit), None).await;
        }
    }

    /// The sandbox is not ready any more; what it holds stays until it is stopped.
    pub(super) async fn fail(&mut self, why: String) {
        self.record.phase = Phase::Failed { why };
        self.status = Status::NotReady;
        if let Err(error) = self.persist().await {
            tracing::error!(pod = %self.record.id, error = crate::error::chain(error.as_ref()), "cannot record a sandbox's state");
        }
        self.publish();
        self.announce(None, cri::ContainerEventType::ContainerStoppedEvent);
    }

    /// A container as hooks are told of it.
    pub(super) fn subject(&self, container: &ContainerId) -> Option<Subject> {
        let view = self.view.borrow();
        let container = view.containers.get(container)?.clone();
        Some(Subject { pod: view.record.clone(), container })
    }

    /// Tells GetContainerEvents' readers; a pod's own events carry its id in place of a container's, as kubelet expects.
    pub(super) fn announce(&self, container: Option<&ContainerId>, kind: cri::ContainerEventType) {
        if !self.node.events.is_wanted() {
            return;
        }
        let view = self.view.borrow().clone();
        let id = container.map_or_else(|| self.record.id.to_string(), ToString::to_string);
        self.node.events.announce(crate::service::answers::event(&view, id, kind, now()));
    }
}
