//! One more process in a container: from its request until its end has been told and its streams are drained by whoever opened them.

use std::os::fd::{AsFd, BorrowedFd};

use oci_spec::runtime::Process;
use podvisor_cgroup::kin;
use podvisor_container::{Launch, Pending, ProcessPlan, Running};
use podvisor_proto::agent::{self as wire, Exit, KillExec, ProcessState, Started, reply};
use rustix::process::{Pid, Signal};

use crate::agent::Agent;
use crate::container::{State as ContainerState, adopt_terminal, check_id, connect, seccomp, send};
use crate::failure::Failure;
use crate::streams::Standard;
use crate::verbs::Answered;

/// Ended execs that are remembered for streams that are still to be opened.
const ENDED: usize = 256;

/// Where an exec is in its life.
#[derive(Debug)]
enum State {
    Starting { pending: Pending, request: u64 },
    Running { running: Running },
    Exited { exit: Exit },
}

/// One exec.
#[derive(Debug)]
pub(crate) struct Exec {
    pub(crate) container: String,
    state: State,
    pub(crate) standard: Standard,
}

impl Exec {
    pub(crate) fn pid(&self) -> Option<Pid> {
        match &self.state {
            State::Starting { pending, .. } => Some(pending.pid()),
            State::Running { running } => Some(running.pid),
            State::Exited { .. } => None,
        }
    }

    pub(crate) fn preparation(&self) -> Option<BorrowedFd<'_>> {
        match &self.state {
            State::Starting { pending, .. } => Some(pending.descriptor()),
            _ => None,
        }
    }

    pub(crate) fn describe(&self, id: &str) -> wire::Process {
        let (state, exit) = match &self.state {
            State::Starting { .. } => (ProcessState::Creating, None),
            State::Running { .. } => (ProcessState::Running, None),
            State::Exited { exit } => (ProcessState::Exited, Some(*exit)),
        };
        let pid = self.pid().map_or(0, Pid::as_raw_pid);
        wire::Process { id: id.to_owned(), state: state.into(), pid, exit }
    }
}

impl Agent {
    pub(crate) fn execute(&mut self, request: u64, wanted: &wire::Exec) -> Answered {
        let id = &wanted.exec_id;
        check_id(id)?;
        if self.execs.contains_key(id) || self.containers.contains_key(id) {
            return Err(Failure::exists(format!("{id:?} is there already")));
        }
        let process: Process = serde_json::from_slice(&wanted.process)
            .map_err(|error| Failure::invalid(format!("the process cannot be read: {error}")))?;
        let plan = ProcessPlan::new(&process, seccomp(wanted.seccomp.as_ref()))
            .map_err(|refused| Failure::invalid(refused.to_string()))?;
        let container = self
            .containers
            .get(&wanted.container_id)
            .ok_or_else(|| Failure::not_found(format!("no container {:?}", wanted.container_id)))?;
        let ContainerState::Running { running } = &container.state else {
            return Err(Failure::state(format!("container {:?} is not running", wanted.container_id)));
        };
        let (io, standard) = connect(process.terminal().unwrap_or(false), wanted.stdin)?;
        let pending =
            podvisor_container::execute(&plan, &running.pidfd, running.pid, &container.cgroup, &io)?;
        let state = State::Starting { pending, request };
        let exec = Exec { container: wanted.container_id.clone(), state, standard };
        self.execs.insert(id.clone(), exec);
        self.forget_ended_execs();
        Ok(None)
    }

    fn forget_ended_execs(&mut self) {
        let ended = |exec: &Exec| matches!(exec.state, State::Exited { .. });
        let finished_at = |exec: &Exec| match &exec.state {
            State::Exited { exit } => exit.finished_at,
            _ => i64::MAX,
        };
        while self.execs.values().filter(|exec| ended(exec)).count() > ENDED {
            let oldest = self.execs.iter().min_by_key(|(_, exec)| finished_at(exec));
            let Some(id) = oldest.map(|(id, _)| id.clone()) else { return };
            self.execs.remove(&id);
        }
    }

    pub(crate) fn exec_prepared(&mut self, id: &str) {
        let Some(exec) = self.execs.get_mut(id) else { return };
        let State::Starting { pending, request } = &mut exec.state else { return };
        let request = *request;
        let progress = pending.poll();
        adopt_terminal(&mut exec.standard, pending.take_terminal());
        let pid = pending.pid();
        match progress {
            Ok(Launch::Wait | Launch::Ready) => {}
            Ok(Launch::Executed) => {
                exec.state = match std::mem::replace(&mut exec.state, State::Exited { exit: Exit::default() })
                {
                    State::Starting { pending, .. } => State::Running { running: pending.into_running() },
                    other => other,
                };
                self.answer(request, Ok(reply::Result::Started(Started { pid: pid.as_raw_pid() })));
            }
            Err(error) => {
                self.execs.remove(id);
                self.answer(request, Err(error.into()));
            }
        }
    }

    pub(crate) fn exec_ended(&mut self, id: &str, exit: Exit) {
        // Its last words, if it ended before its program ran.
        self.exec_prepared(id);
        let Some(exec) = self.execs.get_mut(id) else { return };
        exec.state = State::Exited { exit };
        self.tell_exit(id, exit);
    }

    pub(crate) fn kill_exec(&mut self, kill: &KillExec) -> Result<(), Failure> {
        let exec = self
            .execs
            .get(&kill.exec_id)
            .ok_or_else(|| Failure::not_found(format!("no exec {:?}", kill.exec_id)))?;
        let (pidfd, pid) = match &exec.state {
            State::Starting { pending, .. } => (pending.pidfd(), pending.pid()),
            State::Running { running } => (running.pidfd.as_fd(), running.pid),
            State::Exited { .. } => return Ok(()),
        };
        if kill.all {
            let signal = crate::container::signal(kill.signal)?;
            let place = self.containers.get(&exec.container).map(|container| container.cgroup.place());
            kin::signal(pid, signal, || place.and_then(|place| place.all_pids().ok()).unwrap_or_default());
        }
        send(pidfd, kill.signal)?;
        if kill.all && kill.signal == Signal::KILL.as_raw() {
            kin::signal_late(pid, Signal::KILL);
        }
        Ok(())
    }
}
