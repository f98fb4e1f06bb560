//! A container that is written down: its runtime pauses it and lets CRIU dump it. It stays paused until it is resumed, so that its files
//! can be copied as they were then.
//!
//! ```text
//!  Pausing ──▶ Writing ──▶ Held ──▶ Resuming ──▶ (over)
//!     └───────────┴── failed ──────────▲
//! ```
//!
//! Whatever happens, it runs on: it is resumed at the time limit, when the client that asked is gone, when a step fails, and when it is
//! to be killed. CRIU is not interrupted half-way through a container that is to live, for its processes are not themselves just then:
//! who waits is answered at the time limit, CRIU has a moment more to come to its end.

use std::time::Duration;

use podvisor_proto::monitor::{CheckpointContainer, Place, ResumeContainer};

use super::State;
use crate::failure::{Failure, check_absolute};
use crate::monitor::Monitor;
use crate::poll::{Timer, TimerId};
use crate::runtime::{Purpose, Stopped};
use crate::verbs::{Answer, Answered, ReplyTo, done};

/// What CRIU has beyond the time limit.
const MORE: Duration = Duration::from_secs(10);

/// Between two tries to resume a container.
const AGAIN: Duration = Duration::from_secs(1);

/// A checkpoint under way.
#[derive(Debug)]
pub(crate) struct Checkpoint {
    step: Step,
    /// Whose it is: it ends with this connection.
    connection: u64,
    image_path: String,
    work_path: String,
    limit: Duration,
    timer: TimerId,
    /// Who waits for it to be written. Nobody: it is not wanted any more.
    asked: Option<ReplyTo>,
    /// Why it is not written.
    failure: Option<Failure>,
    /// Who waits for it to be resumed.
    resumes: Vec<ReplyTo>,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Step {
    Pausing,
    /// By this call.
    Writing(u64),
    /// Written, and paused.
    Held,
    Resuming,
}

impl Monitor {
    pub(crate) fn checkpoint_container(&mut self, to: ReplyTo, request: CheckpointContainer) -> Answered {
        let id = &request.container_id;
        check_absolute("image_path", &request.image_path)?;
        check_absolute("work_path", &request.work_path)?;
        let key = self.find_container(id).ok_or_else(|| Failure::no_container(id))?;
        let container = &self.containers[&key];
        let host = container.maker.on_host().filter(|host| host.place == Place::Own);
        let Some(host) = host else {
            return Err(Failure::unsupported(format!(
                "the processes of container {id} are not on this host"
            )));
        };
        if !container.is_running() {
            return Err(container.wrong_state("running"));
        }
        if container.checkpoint.is_some() {
            return Err(Failure::wrong_state(format!("container {id} is being checkpointed")));
        }
        let runtime = host.runtime.clone();
        let limit = match request.timeout_ms {
            0 => runtime.timeout(),
            limit => Duration::from_millis(limit.into()),
        };
        self.call(&runtime, "pause", &[id.into()], None, Purpose::Checkpoint(key))?;
        let timer = self.timers.set(limit, Timer::Checkpoint(key));
        if let Some(container) = self.containers.get_mut(&key) {
            container.checkpoint = Some(Checkpoint {
                step: Step::Pausing,
                connection: to.connection,
                image_path: request.image_path,
                work_path: request.work_path,
                limit,
                timer,
                asked: Some(to),
                failure: None,
                resumes: Vec::new(),
            });
        }
        Ok(Answer::Later)
    }

    pub(crate) fn resume_container(&mut self, to: ReplyTo, request: &ResumeContainer) -> Answered {
        let id = &request.container_id;
        let key = self.find_container(id).ok_or_else(|| Failure::no_container(id))?;
        let checkpoint = self.containers.get_mut(&key).and_then(|container| container.checkpoint.as_mut());
        let Some(checkpoint) = checkpoint else { return Ok(Answer::DONE) };
        checkpoint.resumes.push(to);
        self.release_checkpoint(key);
        Ok(Answer::Later)
    }

    /// A call for a checkpoint has ended.
    pub(crate) fn checkpoint_call_ended(&mut self, key: u64, outcome: Result<(), Failure>) {
        let Some(container) = self.containers.get_mut(&key) else { return };
        let alive = container.is_alive();
        let Some(checkpoint) = &mut container.checkpoint else { return };
        match (checkpoint.step, outcome) {
            (Step::Pausing, Ok(())) if checkpoint.asked.is_some() && checkpoint.failure.is_none() => {
                self.write_checkpoint(key);
            }
            (Step::Writing(_), Ok(())) if checkpoint.asked.is_some() && checkpoint.failure.is_none() => {
                checkpoint.step = Step::Held;
                let to = checkpoint.asked.take();
                if let Some(to) = to {
                    self.reply(to, Ok(done()));
                }
            }
            (Step::Pausing | Step::Writing(_), outcome) => {
                checkpoint.failure = checkpoint.failure.take().or(outcome.err());
                self.resume(key);
            }
            (Step::Resuming, Err(failure)) if alive => {
                checkpoint.step = Step::Held;
                self.timers.cancel(checkpoint.timer);
                checkpoint.timer = self.timers.set(AGAIN, Timer::Checkpoint(key));
                self.journal.note("a container stays paused for now", &container.id, &failure.detail);
                let waiting = std::mem::take(&mut checkpoint.resumes);
                let asked = checkpoint.asked.take().map(|to| (to, checkpoint.failure.take()));
                for to in waiting {
                    self.reply(to, Err(failure.clone()));
                }
                if let Some((to, why)) = asked {
                    self.reply(to, Err(why.unwrap_or(failure)));
                }
            }
            (Step::Resuming, _) => self.checkpoint_is_over(key),
            (Step::Held, _) => {}
        }
    }

    /// The time limit of a checkpoint, or the time for another try to end it.
    pub(crate) fn checkpoint_time_is_over(&mut self, key: u64) {
        let Some(container) = self.containers.get_mut(&key) else { return };
        let Some(checkpoint) = &mut container.checkpoint else { return };
        if let Some(to) = checkpoint.asked.take() {
            let limit = checkpoint.limit.as_millis();
            let detail =
                format!("the checkpoint of container {} was not written within {limit} ms", container.id);
            self.reply(to, Err(Failure::timeout(detail, String::new())));
        }
        self.release_checkpoint(key);
    }

    /// A client is gone, and with it the wish for its checkpoints.
    pub(crate) fn checkpoints_abandoned(&mut self, connection: u64) {
        let its = |checkpoint: &Checkpoint| checkpoint.connection == connection;
        let keys: Vec<u64> = self
            .containers
            .iter()
            .filter(|(_, container)| container.checkpoint.as_ref().is_some_and(its))
            .map(|(key, _)| *key)
            .collect();
        for key in keys {
            if let Some(checkpoint) = self.containers.get_mut(&key).and_then(|it| it.checkpoint.as_mut()) {
                checkpoint.asked = None;
            }
            self.release_checkpoint(key);
        }
    }

    /// A container is to die, which one that is paused may not be able to (cgroup v1): its checkpoint is given up at once.
    pub(super) fn give_up_checkpoint(&mut self, key: u64) {
        let Some(container) = self.containers.get_mut(&key) else { return };
        let Some(checkpoint) = &mut container.checkpoint else { return };
        let killed = || Failure::wrong_state(format!("container {} is being killed", container.id));
        checkpoint.failure.get_or_insert_with(killed);
        if let Step::Writing(call) = checkpoint.step
            && let Some(call) = self.calls.get_mut(&call)
        {
            call.stop(Stopped::Cancelled);
        }
        self.release_checkpoint(key);
    }

    /// Whoever waits for the checkpoint of a container that is gone altogether.
    pub(super) fn drop_checkpoint(&mut self, checkpoint: Checkpoint, id: &str) {
        self.timers.cancel(checkpoint.timer);
        if let Some(to) = checkpoint.asked {
            let gone = Failure::wrong_state(format!("container {id} is gone"));
            self.reply(to, Err(checkpoint.failure.unwrap_or(gone)));
        }
        for to in checkpoint.resumes {
            self.reply(to, Ok(done()));
        }
    }

    fn write_checkpoint(&mut self, key: u64) {
        let Some(container) = self.containers.get(&key) else { return };
        let (Some(checkpoint), Some(host)) = (&container.checkpoint, container.maker.on_host()) else {
            return;
        };
        let runtime = host.runtime.clone();
        let arguments = [
            "--image-path".into(),
            checkpoint.image_path.clone().into(),
            "--work-path".into(),
            checkpoint.work_path.clone().into(),
            "--leave-running".into(),
            // Without them CRIU refuses processes that hold a lock or a connection. What becomes of either is for the restore to say.
            "--file-locks".into(),
            "--tcp-established".into(),
            container.id.clone().into(),
        ];
        let limit = Some(checkpoint.limit + MORE);
        let called =
            self.call_within(limit, &runtime, "checkpoint", &arguments, None, Purpose::Checkpoint(key));
        let Some(checkpoint) = self.containers.get_mut(&key).and_then(|it| it.checkpoint.as_mut()) else {
            return;
        };
        match called {
            Ok(call) => checkpoint.step = Step::Writing(call),
            Err(failure) => {
                checkpoint.failure = Some(failure);
                self.resume(key);
            }
        }
    }

    /// Resumes a container that is held. One that is being written down is when that has ended.
    fn release_checkpoint(&mut self, key: u64) {
        let checkpoint = self.containers.get(&key).and_then(|container| container.checkpoint.as_ref());
        if checkpoint.is_some_and(|checkpoint| checkpoint.step == Step::Held) {
            self.resume(key);
        }
    }

    fn resume(&mut self, key: u64) {
        let Some(container) = self.containers.get_mut(&key) else { return };
        let Some(checkpoint) = &mut container.checkpoint else { return };
        checkpoint.step = Step::Resuming;
        if matches!(container.state, State::Ending(_) | State::Exited { .. }) {
            return self.checkpoint_is_over(key);
        }
        let Some(host) = container.maker.on_host() else { return };
        let (runtime, arguments) = (host.runtime.clone(), [container.id.clone().into()]);
        if let Err(failure) = self.call(&runtime, "resume", &arguments, None, Purpose::Checkpoint(key)) {
            self.checkpoint_call_ended(key, Err(failure));
        }
    }

    fn checkpoint_is_over(&mut self, key: u64) {
        let Some(container) = self.containers.get_mut(&key) else { return };
        let Some(checkpoint) = container.checkpoint.take() else { return };
        let id = container.id.clone();
        self.drop_checkpoint(checkpoint, &id);
    }
}
