//! The verbs for a container that exists: start, kill, delete, update.

use podvisor_proto::monitor::{
    self as proto, DeleteContainer, KillContainer, Place, StartContainer, UpdateContainer, reply,
};
use rustix::process::Signal;

use super::{Maker, State};
use crate::failure::Failure;
use crate::monitor::Monitor;
use crate::runtime::{Call, Purpose, Stopped};
use crate::sys;
use crate::verbs::{Answer, Answered, ReplyTo};

impl Monitor {
    pub(crate) fn start_container(&mut self, to: ReplyTo, request: &StartContainer) -> Answered {
        let id = &request.container_id;
        let key = self.find_container(id).ok_or_else(|| Failure::no_container(id))?;
        let Some(container) = self.containers.get_mut(&key) else { return Err(Failure::no_container(id)) };
        match container.state {
            State::Created { starting: false, .. } if container.killed => {
                return Err(Failure::wrong_state(format!("container {id} is being killed")));
            }
            State::Created { starting: false, .. } => {}
            // A daemon that was started again repeats what the one before it had begun.
            State::Created { starting: true, .. } => {
                container.starts.push(to);
                return Ok(Answer::Later);
            }
            State::Running { .. } | State::Ending(_) | State::Exited { .. } if container.started => {
                return Ok(Answer::DONE);
            }
            _ => return Err(container.wrong_state("created and waiting to be started")),
        }
        match &mut container.maker {
            Maker::Runtime(host) => {
                let (runtime, ends) = (host.runtime.clone(), host.ends.take());
                self.call(&runtime, "start", &[id.into()], ends, Purpose::Start(key, to))?;
            }
            Maker::Guest(_) => self.start_in_guest(key, to)?,
        }
        if let Some(State::Created { starting, .. }) = self.containers.get_mut(&key).map(|it| &mut it.state) {
            *starting = true;
        }
        Ok(Answer::Later)
    }

    /// Its maker has started it, or could not.
    pub(crate) fn start_ended(&mut self, key: u64, to: ReplyTo, outcome: Result<(), Failure>) {
        let mut waiting = vec![to];
        if let Some(container) = self.containers.get_mut(&key) {
            container.started |= outcome.is_ok();
            waiting.append(&mut container.starts);
            let state = std::mem::replace(&mut container.state, State::nothing());
            container.state = match state {
                State::Created { child, .. } if outcome.is_ok() => State::Running { child },
                State::Created { child, .. } => State::Created { child, starting: false },
                State::Ending(mut ending) => {
                    ending.starting = false;
                    State::Ending(ending)
                }
                other => other,
            };
        }
        let started = outcome.is_ok();
        for to in waiting {
            self.reply(to, outcome.clone().map(|()| reply::Result::Done(proto::Done {})));
        }
        if let Some(container) = self.containers.get(&key)
            && container.maker.place() == Some(Place::Inside)
        {
            if started {
                self.begin_wait(key);
            } else if container.killed {
                self.never_began(key);
            }
        }
        self.advance_ending(key);
    }

    pub(crate) fn kill_container(&mut self, to: ReplyTo, request: &KillContainer) -> Answered {
        let id = &request.container_id;
        let signal = parse_signal(request.signal)?;
        let key = self.find_container(id).ok_or_else(|| Failure::no_container(id))?;
        let container = &self.containers[&key];
        match &container.state {
            State::Created { .. } | State::Running { .. } => {
                self.signal_container(key, signal, request.all, Some(to))
            }
            // What it was to reach is reached.
            State::Ending(_) | State::Exited { .. } => {
                if signal == Signal::KILL {
                    self.cancel_start(key);
                }
                Ok(Answer::DONE)
            }
            State::Opening { .. } | State::Creating { .. } | State::Failed { .. } => {
                Err(container.wrong_state("created"))
            }
        }
    }

    /// Signals a container that has not ended: its first process, or `all`. `to` is answered when that happens later.
    fn signal_container(&mut self, key: u64, signal: Signal, all: bool, to: Option<ReplyTo>) -> Answered {
        if signal == Signal::KILL {
            self.give_up_checkpoint(key);
            self.cancel_start(key);
        }
        let Some(container) = self.containers.get_mut(&key) else { return Ok(Answer::DONE) };
        container.killed |= signal == Signal::KILL;
        let Some(child) = container.child() else { return Ok(Answer::DONE) };
        match &container.maker {
            Maker::Guest(_) => self.signal_in_guest(key, signal, all, to),
            Maker::Runtime(host) if host.place == Place::Inside => self.signal_inside(key, signal, all, to),
            Maker::Runtime(_) => {
                if all && let Some(cgroup) = &container.cgroup {
                    cgroup.signal_all(signal);
                }
                // The whole cgroup has got it already, but a process may have left its container's cgroup.
                if !all || container.cgroup.is_none() || signal == Signal::KILL {
                    child.signal(signal).map_err(|error| {
                        Failure::system(format!("signal container {}", container.id), error)
                    })?;
                }
                Ok(Answer::DONE)
            }
        }
    }

    /// Ends the runtime's `start`: with its container killed there is nothing left for it to do, and it may hang. (An agent cannot be
    /// stopped half-way.)
    fn cancel_start(&mut self, key: u64) {
        let starts = |call: &&mut Call| matches!(call.purpose, Purpose::Start(started, _) if started == key);
        if let Some(call) = self.calls.values_mut().find(starts) {
            call.stop(Stopped::Cancelled);
        }
    }

    pub(crate) fn delete_container(&mut self, to: ReplyTo, request: &DeleteContainer) -> Answer {
        let Some(key) = self.find_container(&request.container_id) else { return Answer::DONE };
        let Some(container) = self.containers.get_mut(&key) else { return Answer::DONE };
        container.deletes.push(to);
        match &container.state {
            // log_opened sees the delete.
            State::Opening { .. } | State::Failed { .. } => {}
            State::Ending(_) => self.cancel_start(key),
            State::Creating { call, .. } => {
                // An agent cannot be stopped half-way: its answer sees the delete.
                if let Some(call) = call.and_then(|call| self.calls.get_mut(&call)) {
                    call.stop(Stopped::Cancelled);
                }
            }
            State::Created { .. } | State::Running { .. } => {
                if let Err(failure) = self.signal_container(key, Signal::KILL, true, None) {
                    let id = &request.container_id;
                    self.journal.note("a container could not be killed", id, &failure.detail);
                }
            }
            State::Exited { .. } => self.finish_deletes(key),
        }
        Answer::Later
    }

    pub(crate) fn update_container(&mut self, to: ReplyTo, request: &UpdateContainer) -> Answered {
        let id = &request.container_id;
        let key = self.find_container(id).ok_or_else(|| Failure::no_container(id))?;
        let container = &self.containers[&key];
        if container.child().is_none() {
            return Err(container.wrong_state("created or running"));
        }
        if request.resources.is_empty() {
            return Err(Failure::invalid("resources is empty"));
        }
        let Some(host) = container.maker.on_host() else {
            return self.update_in_guest(to, key, request.resources.clone());
        };
        let runtime = host.runtime.clone();
        let serial = self.new_key();
        let file = self.run_file(&format!("{serial}.resources.json"));
        std::fs::write(&file, &request.resources)
            .map_err(|error| Failure::system(format!("write {}", file.display()), error))?;
        let arguments = ["--resources".into(), file.clone().into(), id.into()];
        let called = self.call(&runtime, "update", &arguments, None, Purpose::Update(to, file.clone()));
        if called.is_err() {
            let _ = std::fs::remove_file(&file);
        }
        called.map(|_| Answer::Later)
    }
}

fn parse_signal(number: i32) -> Result<Signal, Failure> {
    sys::signal(number).ok_or_else(|| Failure::invalid(format!("signal {number} does not exist")))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn real_time_signals_are_signals() {
        assert_eq!(parse_signal(15).unwrap(), Signal::TERM);
        // SIGRTMIN+3, "halt" to systemd: the stop signal of its images.
        assert_eq!(parse_signal(37).unwrap().as_raw(), 37);
        for number in [0, -1, 65, i32::MAX, i32::MIN] {
            assert!(parse_signal(number).is_err(), "{number}");
        }
    }
}
