//! How the containers of a pod move: requests and news become steps of the state machine, steps become records, effects and answers.

use std::collections::VecDeque;
use std::sync::Arc;
use std::time::Duration;

use podvisor_proto::cri;
use podvisor_proto::monitor as wire;
use podvisor_proto::monitor::request::Verb;
use podvisor_proto::nri;
use tokio::sync::oneshot;

use super::acquired::Acquisition;
use super::build::{self, Built};
use super::dismantle::Dismantling;
use super::guest_image;
use super::record::{ContainerPhase, Phase};
use super::slot::{Slot, answer};
use super::state::{Denied, Effect, Event, Exit, State, step};
use super::task::{Command, Reply, Task};
use super::view::Status;
use crate::error::{Failure, PodError};
use crate::id::ContainerId;
use crate::monitor::{Connection, process};
use crate::node::now;
use crate::timeline::timed;

/// After SIGKILL a process is gone at once, unless it hangs in the kernel.
const UNKILLABLE: Duration = Duration::from_secs(15);

impl Task {
    pub(super) async fn create(&mut self, config: cri::ContainerConfig, reply: Reply<ContainerId>) {
        if !matches!(self.status, Status::Ready) || !self.stopping.is_empty() || !self.removing.is_empty() {
            let why = match &self.record.phase {
                Phase::Failed { why } => why.clone(),
                _ => "it is stopped or being stopped".into(),
            };
            let _ = reply.send(Err(Arc::new(PodError::NotReady { id: self.record.id.to_string(), why })));
            return;
        }
        let same = self
            .containers
            .values_mut()
            .find(|slot| slot.record.config.0.metadata == config.metadata && slot.state != State::Removed);
        if let Some(slot) = same {
            if matches!(slot.state, State::Removing { .. }) {
                // Its name is free in a moment.
                slot.queued.push_back(Command::Create { config: Box::new(config), reply });
            } else if slot.record.config.0 == config && slot.state == State::Creating {
                slot.creating.push(reply);
            } else if slot.record.config.0 == config && slot.state == State::Created {
                let _ = reply.send(Ok(slot.record.id.clone()));
            } else {
                let _ = reply.send(Err(Arc::new(PodError::NameTaken {
                    what: "container",
                    name: config.metadata.unwrap_or_default().name,
                    id: slot.record.id.to_string(),
                })));
            }
            return;
        }
        let mut plan = match build::plan(&self.node, &self.record, config) {
            Ok(plan) => plan,
            Err(error) => {
                let _ = reply.send(Err(Arc::new(error)));
                return;
            }
        };
        plan.target = build::target_process(&plan.record.config.0, &self.containers);
        let others = self.containers.values().map(|slot| slot.record.image_id.as_str());
        plan.room = guest_image::room(&plan.record.image_id, others);
        if let Err(failure) = self.have_huge_pages(&plan.record.config.0).await {
            let _ = reply.send(Err(failure));
            return;
        }
        if let Err(failure) = self.limit_swap(Some(&plan.record.config.0)) {
            let _ = reply.send(Err(failure));
            return;
        }
        if let Err(failure) = self.write(plan.record.clone()).await {
            let _ = reply.send(Err(failure));
            return;
        }
        podvisor_fault::point("create.recorded");
        let container = plan.record.id.clone();
        let mut slot = Slot::new(plan.record.clone(), State::Creating);
        slot.creating.push(reply);
        self.containers.insert(container.clone(), slot);
        self.publish();
        let (node, mailbox, pod, monitor) =
            (self.node.clone(), self.mailbox.clone(), self.record.clone(), self.monitor.clone());
        let subject = self.subject(&container);
        let turn = self.containers.get_mut(&container).map(|slot| slot.turns.next());
        tokio::spawn(async move {
            let built = Box::pin(build::build(&node, &pod, plan, monitor, subject, &mailbox)).await;
            let built = built.map(Box::new).map_err(Arc::new);
            drop(turn);
            let _ = mailbox.send(Command::Built { container, built });
        });
    }

    pub(super) async fn built(&mut self, container: ContainerId, built: Result<Box<Built>, Failure>) {
        let Some(slot) = self.containers.get_mut(&container) else { return };
        podvisor_fault::point("create.built");
        match built {
            Ok(built) => {
                built.apply(&mut slot.record);
                self.advance(&container, Event::CreateDone, None).await;
            }
            Err(failure) => self.advance(&container, Event::CreateFailed, Some(failure)).await,
        }
    }

    /// A request from outside: done now, kept for later, or refused.
    pub(super) async fn request(&mut self, container: ContainerId, event: Event, reply: Reply<()>) {
        let Some(slot) = self.containers.get_mut(&container) else {
            // Stop and remove of what is not there any more is success, start is not.
            let gone = match event {
                Event::Start => Err(Arc::new(PodError::NoSuchContainer(container.to_string()))),
                _ => Ok(()),
            };
            let _ = reply.send(gone);
            return;
        };
        match step(&slot.state, event.clone()) {
            Err(Denied::Later) => {
                if matches!((&slot.state, &event), (State::Removing { .. }, Event::Remove)) {
                    slot.removing.push(reply);
                } else if matches!(slot.state, State::Starting { .. }) && event == Event::Start {
                    slot.starting.push(reply);
                } else {
                    slot.queued.push_back(match event {
                        Event::Start => Command::Start { container, reply },
                        Event::Stop { grace } => Command::Stop { container, grace, reply },
                        _ => Command::Remove { container, reply },
                    });
                }
            }
            Err(denied) => {
                let id = container.to_string();
                let _ = reply.send(Err(Arc::new(PodError::Denied { id, source: denied })));
            }
            Ok(_) => {
                match &event {
                    Event::Start => slot.starting.push(reply),
                    Event::Stop { .. } => slot.stopping.push(reply),
                    _ => slot.removing.push(reply),
                }
                self.advance(&container, event, None).await;
            }
        }
    }

    /// Moves a container one step: state, record, effects, answers.
    pub(super) async fn advance(&mut self, container: &ContainerId, event: Event, failure: Option<Failure>) {
        let Some(slot) = self.containers.get_mut(container) else { return };
        let (next, effects) = match step(&slot.state, event.clone()) {
            Ok(done) => done,
            Err(denied) => {
                // It is being stopped or removed meanwhile, or has ended, e.g. with its monitor; whoever started it still waits.
                match (&event, failure) {
                    (Event::StartFailed(_), Some(failure)) => answer(&mut slot.starting, &Err(failure)),
                    (Event::StartDone, _) => answer(&mut slot.starting, &Ok(())),
                    _ => {}
                }
                tracing::debug!(%container, state = slot.state.name(), ?denied, "an event came to nothing");
                return;
            }
        };
        if matches!(event, Event::Exited(_)) {
            podvisor_fault::point("exit.heard");
        }
        let before = std::mem::replace(&mut slot.state, next);
        let changed = before != slot.state;
        match &event {
            // With the intent, so that it is durable with it and stays what it was after a recovery.
            Event::Start => slot.record.started_at = now(),
            Event::StartFailed(_) => slot.record.started_at = 0,
            _ => {}
        }
        let durable = slot.phase().filter(|phase| *phase != slot.record.phase);
        if let Some(phase) = durable {
            slot.record.phase = phase;
            let record = slot.record.clone();
            if let Err(error) = self.write(record).await {
                if event == Event::Start {
                    let exit = failed_start(&error);
                    return Box::pin(self.advance(container, Event::StartFailed(exit), Some(error))).await;
                }
                if event == Event::CreateDone
                    && let Some(slot) = self.containers.get_mut(container)
                {
                    // What is not written down does not survive the daemon: it must not be given out.
                    (slot.state, slot.record.phase) = (before, ContainerPhase::Creating);
                    return Box::pin(self.advance(container, Event::CreateFailed, Some(error))).await;
                }
                tracing::error!(%container, error = crate::error::chain(error.as_ref()), "cannot record a container's state");
            }
        }
        if let Some(name) = fault_after(&event) {
            podvisor_fault::point(name);
        }
        for effect in effects {
            self.perform(container, effect);
        }
        if changed {
            self.settle(container, &before, &event, failure).await;
        } else if let Some(slot) = self.containers.get_mut(container)
            && matches!(slot.state, State::Exited(_))
        {
            answer(&mut slot.stopping, &Ok(()));
            answer(&mut slot.starting, &Ok(()));
        }
    }

    /// After a change of state: publish, answer, announce, and what was waiting for it.
    async fn settle(
        &mut self,
        container: &ContainerId,
        before: &State,
        event: &Event,
        failure: Option<Failure>,
    ) {
        let Some(slot) = self.containers.get_mut(container) else { return };
        let mut kind = None;
        let mut waiting = (Vec::new(), Vec::new(), Vec::new(), Vec::new());
        let mut outcome = Ok(());
        match &slot.state {
            State::Created => {
                waiting.0 = std::mem::take(&mut slot.creating);
                kind = Some(cri::ContainerEventType::ContainerCreatedEvent);
            }
            State::Running => {
                waiting.1 = std::mem::take(&mut slot.starting);
                kind = Some(cri::ContainerEventType::ContainerStartedEvent);
            }
            State::Exited(_) => {
                slot.set_timer(None);
                if let Some(failure) = failure.clone() {
                    outcome = Err(failure);
                }
                // The exit of a container whose start is still in flight: its answer comes with the start's.
                if matches!(event, Event::StartFailed(_)) {
                    waiting.1 = std::mem::take(&mut slot.starting);
                }
                waiting.2 = std::mem::take(&mut slot.stopping);
                if matches!(before, State::Removing { .. }) {
                    waiting.3 = std::mem::take(&mut slot.removing);
                } else {
                    kind = Some(cri::ContainerEventType::ContainerStoppedEvent);
                }
            }
            State::Removing { .. } => {
                // An unfinished creation is told about only when it has been undone.
                waiting.2 = std::mem::take(&mut slot.stopping);
                if let Some(failure) = failure {
                    for reply in slot.creating.drain(..) {
                        let failure = failure.clone();
                        slot.removing.push(after_undo(reply, failure));
                    }
                }
            }
            State::Removed => {
                waiting.3 = std::mem::take(&mut slot.removing);
                if slot.record.phase != ContainerPhase::Creating {
                    kind = Some(cri::ContainerEventType::ContainerDeletedEvent);
                }
            }
            State::Unknown { .. } => {
                if let Some(failure) = failure {
                    outcome = Err(failure);
                }
                waiting.3 = std::mem::take(&mut slot.removing);
            }
            // Told to stop before its start had an answer.
            State::Stopping { .. } if *event == Event::StartDone => {
                waiting.1 = std::mem::take(&mut slot.starting);
                kind = Some(cri::ContainerEventType::ContainerStartedEvent);
            }
            State::Creating | State::Starting { .. } | State::Stopping { .. } => {}
        }
        let queued = match &slot.state {
            State::Creating | State::Starting { .. } | State::Removing { .. } => VecDeque::new(),
            _ => std::mem::take(&mut slot.queued),
        };
        let removed = slot.state == State::Removed;
        if removed {
            self.containers.remove(container);
        }
        let ended = matches!(self.containers.get(container).map(|slot| &slot.state), Some(State::Exited(_)));
        self.publish();
        answer(&mut waiting.0, &Ok(container.clone()));
        answer(&mut waiting.1, &outcome);
        if ended {
            self.tell_stop(container, std::mem::take(&mut waiting.2));
        }
        answer(&mut waiting.2, &Ok(()));
        answer(&mut waiting.3, &outcome);
        if let Some(kind) = kind {
            self.announce(Some(container), kind);
        }
        if let (Event::RemoveFailed { .. }, Err(failure)) = (event, &outcome) {
            // Nobody is left to try it for, until somebody asks again.
            self.resume_removal = false;
            answer(&mut self.removing, &Err(failure.clone()));
        }
        for command in queued {
            Box::pin(self.handle(command)).await;
        }
        // Whether the sandbox can go on is looked at when this step is over, not inside it: a pod may have many containers.
        self.unsettled = true;
    }

    /// Lets the monitor end whatever creation is under way: a sandbox that is to stop waits for no OCI runtime that hangs.
    pub(super) fn cancel_creations(&self) {
        let creating = self.containers.iter().filter(|(_, slot)| slot.state == State::Creating);
        for (container, monitor) in creating.filter_map(|(id, _)| Some((id.clone(), self.monitor.clone()?))) {
            tokio::spawn(async move {
                let verb =
                    Verb::DeleteContainer(wire::DeleteContainer { container_id: container.to_string() });
                if let Err(error) = monitor.command(verb).await {
                    tracing::debug!(%container, error = crate::error::chain(&error), "a creation was not cancelled");
                }
            });
        }
    }

    /// Starts an effect; its outcome comes back as a command.
    pub(super) fn perform(&mut self, container: &ContainerId, effect: Effect) {
        let (node, subject) = (self.node.clone(), self.subject(container));
        let Some(slot) = self.containers.get_mut(container) else { return };
        let (mailbox, monitor, container) = (self.mailbox.clone(), self.monitor.clone(), container.clone());
        let id = container.to_string();
        match effect {
            Effect::Start => {
                let mut turn = slot.turns.next();
                let at = slot.record.started_at;
                tokio::spawn(async move {
                    turn.comes().await;
                    let allowed = match &subject {
                        Some(subject) => node.hooks.start_container(&node, subject).await,
                        None => Ok(()),
                    };
                    let started = match (allowed, monitor) {
                        (Err(refused), _) => Err(refused),
                        (Ok(()), Some(monitor)) => {
                            let verb = Verb::StartContainer(wire::StartContainer { container_id: id });
                            let started = timed("start", &container, monitor.command(verb)).await;
                            let started = started.map_err(PodError::from);
                            podvisor_fault::point("start.called");
                            started
                        }
                        (Ok(()), None) => Err(PodError::from(crate::monitor::MonitorError::Gone)),
                    };
                    if let (Ok(()), Some(subject)) = (&started, &subject) {
                        let running = |container: &mut nri::Container| {
                            container.state = nri::ContainerState::ContainerRunning.into();
                            container.started_at = at;
                        };
                        node.hooks.done(&node, nri::Event::PostStartContainer, subject, running).await;
                    }
                    drop(turn);
                    let (event, failure) = match started.map_err(Arc::new) {
                        Ok(()) => (Event::StartDone, None),
                        Err(failure) => (Event::StartFailed(failed_start(&failure)), Some(failure)),
                    };
                    let _ = mailbox.send(Command::Step { container, event, failure });
                });
            }
            Effect::Signal => {
                let signal = slot.record.stop_signal;
                tokio::spawn(async move { send_signal(monitor, id, signal, false).await });
            }
            Effect::Arm(grace) => {
                slot.deadline += 1;
                let number = slot.deadline;
                let clock = tokio::spawn(async move {
                    tokio::time::sleep(grace).await;
                    let _ = mailbox.send(Command::Deadline { container, number });
                });
                slot.set_timer(Some(clock.abort_handle()));
            }
            Effect::Kill => {
                slot.deadline += 1;
                tokio::spawn(send_signal(monitor, id, 9, true));
                let clock = tokio::spawn(async move {
                    tokio::time::sleep(UNKILLABLE).await;
                    let _ = mailbox.send(Command::Unkillable { container });
                });
                slot.set_timer(Some(clock.abort_handle()));
            }
            Effect::Delete => {
                let dismantling = Dismantling::of(&self.record, &slot.record);
                let mut turn = slot.turns.next();
                tokio::spawn(async move {
                    turn.comes().await;
                    if let Some(subject) = &subject {
                        node.hooks.remove_container(&node, subject).await;
                    }
                    let (event, failure) = match dismantling.run(&node, monitor).await {
                        Ok(()) => (Event::Removed, None),
                        Err(failure) => {
                            let why = crate::error::chain(&failure);
                            (Event::RemoveFailed { why }, Some(Arc::new(failure)))
                        }
                    };
                    let _ = mailbox.send(Command::Step { container, event, failure });
                });
            }
        }
    }

    /// Tells plugins that a container has ended; whoever has asked for that hears of it afterwards.
    fn tell_stop(&mut self, container: &ContainerId, mut waiting: Vec<Reply<()>>) {
        let subject = self.subject(container);
        let Some(slot) = self.containers.get_mut(container) else { return answer(&mut waiting, &Ok(())) };
        let (true, Some(subject)) = (self.node.hooks.are_active(), subject) else {
            slot.told.has_stopped();
            return answer(&mut waiting, &Ok(()));
        };
        let (node, mut turn) = (self.node.clone(), slot.turns.next());
        tokio::spawn(async move {
            turn.comes().await;
            node.hooks.stop_container(&node, &subject).await;
            answer(&mut waiting, &Ok(()));
        });
    }

    /// A plugin has moved a container that is being made to another cgroup, which is not there yet.
    pub(super) async fn moved(&mut self, container: ContainerId, cgroup: String, reply: Reply<()>) {
        let Some(slot) = self.containers.get_mut(&container) else { return };
        slot.record.acquired.push(Acquisition::Cgroup(cgroup.clone()));
        slot.record.cgroup = cgroup;
        let record = slot.record.clone();
        let _ = reply.send(self.write(record).await);
    }

    pub(super) fn unkillable(&mut self, container: &ContainerId) {
        let (wanted, machine) =
            (self.is_to_end(), self.record.init.filter(|_| self.record.runtime.vm().is_some()));
        let Some(slot) = self.containers.get_mut(container) else { return };
        if !matches!(slot.state, State::Stopping { killed: true }) {
            return;
        }
        if let Some(machine) = machine.filter(|machine| wanted && process::lives(*machine)) {
            // A guest that does not do as it is told is not needed any more: its containers end with it.
            tracing::warn!(%container, "a container in a virtual machine does not end, so the machine is killed");
            process::kill(machine);
            let (mailbox, container) = (self.mailbox.clone(), container.clone());
            let clock = tokio::spawn(async move {
                tokio::time::sleep(UNKILLABLE).await;
                let _ = mailbox.send(Command::Unkillable { container });
            });
            return slot.set_timer(Some(clock.abort_handle()));
        }
        let failure: Failure =
            Arc::new(PodError::WillNotDie { id: container.to_string(), seconds: UNKILLABLE.as_secs() });
        answer(&mut slot.stopping, &Err(failure.clone()));
        answer(&mut self.stopping, &Err(failure.clone()));
        answer(&mut self.removing, &Err(failure));
    }
}

/// The failure point that a container's step comes by when it is recorded.
fn fault_after(event: &Event) -> Option<&'static str> {
    Some(match event {
        Event::CreateDone => "create.done",
        Event::CreateFailed => "create.failed",
        Event::Start => "start.recorded",
        Event::StartDone => "start.done",
        Event::StartFailed(_) => "start.failed",
        Event::Stop { .. } => "stop.ask",
        Event::Deadline => "stop.deadline",
        Event::Exited(_) => "exit.recorded",
        Event::Remove => "remove.recorded",
        Event::Removed => "remove.done",
        Event::RemoveFailed { .. } => return None,
    })
}

/// How a container that could not be started ended: containerd's code and reason, which kubelet shows as they are.
fn failed_start(failure: &Failure) -> Exit {
    Exit { code: 128, at: now(), reason: "StartError".into(), message: crate::error::chain(failure.as_ref()) }
}

async fn send_signal(monitor: Option<Connection>, id: String, signal: i32, all: bool) {
    let Some(monitor) = monitor else { return };
    let verb = Verb::KillContainer(wire::KillContainer { container_id: id.clone(), signal, all });
    let sent = monitor.command(verb).await;
    podvisor_fault::point(if all { "stop.killed" } else { "stop.signalled" });
    if let Err(error) = sent
        && !error.is_not_found()
    {
        tracing::warn!(container = id, signal, error = crate::error::chain(&error), "cannot send a signal");
    }
}

/// Turns the reply of a creation into one that is sent when its undoing is over, with the creation's failure.
fn after_undo(reply: Reply<ContainerId>, failure: Failure) -> Reply<()> {
    let (sender, undone) = oneshot::channel();
    tokio::spawn(async move {
        let _ = undone.await;
        let _ = reply.send(Err(failure));
    });
    sender
}
