//! Execs in the guest: the agent starts the process, its streams are connected, and an event says how it ended.

use std::time::Instant;

use podvisor_proto::agent::{self as wire, KillExec, Resize, reply, request::Verb};
use podvisor_proto::monitor::{self as proto, TerminalSize};
use rustix::process::Signal;

use super::agent::{Outcome, Purpose, confused};
use crate::connection::Role;
use crate::container::Maker;
use crate::exec::{Client, Exec, Known, Stage};
use crate::failure::Failure;
use crate::monitor::Monitor;
use crate::poll::Timer;
use crate::stdio::Wanted;

/// What belongs to an exec in a guest.
#[derive(Debug)]
pub(crate) struct GuestExec {
    /// What the agent calls it: never used twice, because the agent remembers those that have ended.
    pub(super) name: String,
    /// Its streams are being connected.
    connecting: bool,
    /// The code of an end that came before its streams were there.
    ended: Option<i32>,
    /// When its end was dealt with.
    pub(crate) ended_at: Option<Instant>,
}

/// A terminal's size on its way into the guest: one at a time, and of those that wait only the newest.
#[derive(Debug, Default)]
pub(super) struct Sizes {
    under_way: bool,
    next: Option<TerminalSize>,
}

impl Monitor {
    /// Tells the agent to start a process in a container.
    pub(crate) fn exec_in_guest(
        &mut self,
        key: u64,
        container: u64,
        process: &[u8],
        wanted: Wanted,
    ) -> Result<GuestExec, Failure> {
        let target =
            self.containers.get(&container).ok_or_else(|| Failure::wrong_state("the container is gone"))?;
        let Maker::Guest(guest) = &target.maker else {
            return Err(Failure::wrong_state("the container is in no guest"));
        };
        let name = format!("exec.{key}");
        let request = wire::Exec {
            container_id: target.id.clone(),
            exec_id: name.clone(),
            process: process.to_vec(),
            seccomp: guest.wanted.seccomp.clone(),
            stdin: wanted.stdin,
        };
        self.ask_agent(Verb::Exec(request), Purpose::Exec(key))?;
        Ok(GuestExec { name, connecting: false, ended: None, ended_at: None })
    }

    /// The process runs, or has run, or could not be started.
    pub(super) fn exec_started_in_guest(&mut self, key: u64, outcome: Outcome) {
        let child = self.machine_child();
        let started = outcome.and_then(|result| match result {
            reply::Result::Started(_) => child,
            _ => Err(confused()),
        });
        let Some(exec) = self.execs.get_mut(&key) else { return };
        let child = match started {
            Ok(child) => child,
            Err(failure) => {
                // An answer that was lost with its connection may have been that it runs.
                if failure.code == proto::ErrorCode::VmFailed {
                    self.kill_exec_in_guest(key);
                }
                return self.exec_failed(key, failure);
            }
        };
        exec.stage = Stage::Running(child);
        let Known::InGuest(guest) = &mut exec.known else { return };
        guest.connecting = true;
        let (name, mut wanted) = (guest.name.clone(), exec.wanted);
        // What is not asked for is read nevertheless, or the process would wait for somebody to.
        wanted.stdout = true;
        wanted.stderr = !wanted.terminal;
        if let Client::Sync { timeout: Some(timeout), .. } = exec.client {
            exec.timer = Some(self.timers.set(timeout, Timer::Exec(key)));
        }
        if matches!(exec.client, Client::Gone) {
            self.kill_exec(key);
        }
        self.open_streams(key, &name, wanted);
    }

    /// Its streams are open.
    pub(super) fn exec_connected(&mut self, key: u64) {
        let Some(exec) = self.execs.get_mut(&key) else { return };
        let Known::InGuest(guest) = &mut exec.known else { return };
        guest.connecting = false;
        let ended = guest.ended.take();
        if let (Client::Stream { to }, Stage::Running(child)) = (&exec.client, &exec.stage) {
            let started = proto::Started { pid: child.pid.as_raw_pid(), start_time: child.start_time };
            let to = *to;
            self.stream_opened(to, started, Role::Exec(key));
        }
        match ended {
            Some(code) => self.exec_ended(key, code),
            None => self.resume_exec_output(key),
        }
    }

    /// Its process has ended, as the agent says, or with the machine.
    pub(super) fn exec_ended_in_guest(&mut self, key: u64, code: i32) {
        let Some(exec) = self.execs.get_mut(&key) else { return };
        let starting = matches!(exec.stage, Stage::Starting);
        match &mut exec.known {
            Known::InGuest(guest) if guest.connecting || starting => guest.ended = Some(code),
            _ => self.exec_ended(key, code),
        }
    }

    pub(crate) fn kill_exec_in_guest(&mut self, key: u64) {
        let Some(guest) = self.execs.get(&key).and_then(Exec::in_guest) else { return };
        let kill = KillExec { exec_id: guest.name.clone(), signal: Signal::KILL.as_raw(), all: true };
        self.tell_agent(Verb::KillExec(kill), Purpose::KillExec(key));
    }

    /// That there was nothing left to kill is no failure.
    pub(super) fn exec_killed_in_guest(&self, key: u64, outcome: Result<(), Failure>) {
        if let (Err(failure), Some(exec)) = (outcome, self.execs.get(&key))
            && failure.code != proto::ErrorCode::NotFound
        {
            self.journal.note("an exec could not be killed", &exec.id, &failure.detail);
        }
    }

    /// Sets the size of a container's or exec's terminal.
    pub(crate) fn resize_in_guest(&mut self, key: u64, size: TerminalSize) {
        let Some(machine) = &mut self.machine else { return };
        let sizes = machine.agent.sizes.entry(key).or_default();
        sizes.next = Some(size);
        if !sizes.under_way {
            self.send_size(key);
        }
    }

    pub(super) fn resized_in_guest(&mut self, key: u64) {
        if let Some(sizes) = self.machine.as_mut().and_then(|machine| machine.agent.sizes.get_mut(&key)) {
            sizes.under_way = false;
            self.send_size(key);
        }
    }

    fn send_size(&mut self, key: u64) {
        let container = self.containers.get(&key).map(|container| container.id.clone());
        let exec = self.execs.get(&key).and_then(Exec::in_guest).map(|guest| guest.name.clone());
        let Some(machine) = &mut self.machine else { return };
        let size = machine.agent.sizes.get_mut(&key).and_then(|sizes| sizes.next.take());
        let (Some(size), Some(id)) = (size, container.or(exec)) else {
            machine.agent.sizes.remove(&key);
            return;
        };
        let resize = Resize { id, columns: size.width, rows: size.height };
        if self.ask_agent(Verb::Resize(resize), Purpose::Resize(key)).is_ok()
            && let Some(sizes) = self.machine.as_mut().and_then(|machine| machine.agent.sizes.get_mut(&key))
        {
            sizes.under_way = true;
        }
    }
}
