//! The end of a machine, whatever began it: the hypervisor is told, then killed; the file server is killed; when all are reaped, those
//! who waited for the start are answered, or the containers end with the machine and its own end is recorded and told.

use std::fmt;
use std::io::{Read, Seek, SeekFrom};
use std::time::Duration;

use podvisor_proto::monitor::{self as proto, Exit, event, reply};
use rustix::process::{Pid, WaitStatus};

use super::bounds::plain_end;
use super::hypervisor::CONSOLE;
use super::{Machine, Stage};
use crate::container::{Maker, State};
use crate::disk::Job;
use crate::exit_record::ExitRecord;
use crate::failure::Failure;
use crate::monitor::Monitor;
use crate::output::timestamp;
use crate::poll::{Interest, Timer, TimerId};
use crate::verbs::ReplyTo;

/// The code of whatever ended with the machine.
pub(super) const KILLED: i32 = 128 + libc::SIGKILL;
/// How long is waited for the hypervisor's word when the file server has ended, which ends too when the machine does.
const WATCHING: Duration = Duration::from_millis(300);
/// How long a hypervisor may take to end the machine, to end itself when the machine has ended, and to be gone when it is killed.
const STOPPING: Duration = Duration::from_secs(2);
const LEAVING: Duration = Duration::from_secs(1);
const DYING: Duration = Duration::from_secs(5);

/// Of the console, with the end of each container, which is kept for each of them.
const SHORT: usize = 1024;

/// Why a machine ends.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) enum Cause {
    Known {
        text: String,
        code: i32,
    },
    /// The file server ended so, perhaps because the machine did.
    Files(String),
    /// As the hypervisor ended, which is not known before it is reaped.
    Hypervisor,
}

impl Cause {
    /// What makes a guest useless.
    pub(super) fn guest(text: String) -> Self {
        Self::Known { text, code: KILLED }
    }

    fn asked() -> Self {
        Self::Known { text: "it was shut down".to_owned(), code: 0 }
    }
}

impl fmt::Display for Cause {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Known { text, .. } | Self::Files(text) => formatter.write_str(text),
            Self::Hypervisor => formatter.write_str("the hypervisor ended"),
        }
    }
}

/// A machine that ends.
#[derive(Debug)]
pub(super) struct Ending {
    pub(super) cause: Cause,
    /// Of a start that failed: at what, and who is to be answered.
    start: Option<(&'static str, Vec<ReplyTo>)>,
    rung: Rung,
    timer: TimerId,
}

/// How far down it is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Rung {
    /// The file server has ended; the hypervisor may have a word to say.
    Watching,
    /// The hypervisor ends by itself, or has been told to.
    Waiting,
    Killing,
    /// The kernel does not let go of them.
    GivenUp,
}

impl Ending {
    pub(super) fn was_starting(&self) -> bool {
        self.start.is_some()
    }
}

impl Monitor {
    /// Ends the machine, unless it is ending already.
    pub(super) fn end_machine(&mut self, cause: Cause) {
        let Self { machine: Some(machine), timers, poller, .. } = self else { return };
        let leaves = cause == Cause::Hypervisor || machine.hypervisor.ended.is_some();
        let start = match &mut machine.stage {
            Stage::Starting(starting) => {
                timers.cancel(starting.timer);
                if starting.step == super::boot::Step::Files
                    && let Some(channel) = machine.hypervisor.channel.take()
                {
                    // It has been told nothing yet, so there is nothing to stop: without its connection it ends.
                    channel.end(poller);
                }
                Some((starting.step.what(), std::mem::take(&mut starting.waiting)))
            }
            Stage::Running(_) => None,
            Stage::Ending(ending) => {
                if ending.rung == Rung::Watching && leaves {
                    timers.cancel(ending.timer);
                    ending.timer = timers.set(LEAVING, Timer::Machine(machine.key));
                    (ending.cause, ending.rung) = (cause, Rung::Waiting);
                }
                return;
            }
            Stage::Gone { .. } | Stage::Exited { .. } => return,
        };
        let (rung, patience) = match &cause {
            Cause::Files(_) if machine.hypervisor.channel.is_some() => (Rung::Watching, WATCHING),
            _ if !leaves && machine.hypervisor.stop(poller) => (Rung::Waiting, STOPPING),
            _ => (Rung::Waiting, LEAVING),
        };
        let timer = timers.set(patience, Timer::Machine(machine.key));
        machine.stage = Stage::Ending(Box::new(Ending { cause, start, rung, timer }));
        let failure = machine.gone();
        if let Some((_, channel)) = machine.agent.channel.take() {
            channel.end(poller);
        }
        let asked = std::mem::take(&mut machine.agent.asked);
        let doubtful = std::mem::take(&mut machine.agent.doubtful);
        machine.agent.waiting = Vec::new();
        self.stop_pulse();
        for (_, asked) in asked {
            if let Some(timer) = asked.timer {
                self.timers.cancel(timer);
            }
            if asked.purpose != super::agent::Purpose::Boot {
                self.agent_answered(asked.purpose, Err(failure.clone()));
            }
        }
        for (container, to) in doubtful {
            self.start_ended(container, to, Err(failure.clone()));
        }
        self.fail_dials(&failure);
        self.fail_resize(&failure);
        self.devices_gone();
        self.advance_machine_end();
    }

    /// The start's time is over, or that of one rung.
    pub(crate) fn machine_time_is_over(&mut self, key: u64) {
        let Some(machine) = self.machine.as_mut().filter(|machine| machine.key == key) else { return };
        match &mut machine.stage {
            Stage::Starting(starting) => {
                let text = format!("there was not enough time to {}", starting.step.what());
                self.end_machine(Cause::guest(text));
            }
            Stage::Ending(ending) if ending.rung == Rung::Watching => {
                ending.rung = Rung::Waiting;
                ending.timer = self.timers.set(STOPPING, Timer::Machine(key));
                machine.hypervisor.stop(&self.poller);
            }
            Stage::Ending(ending) if ending.rung == Rung::Waiting => {
                ending.rung = Rung::Killing;
                ending.timer = self.timers.set(DYING, Timer::Machine(key));
                machine.hypervisor.program.kill();
                self.advance_machine_end();
            }
            Stage::Ending(ending) => {
                ending.rung = Rung::GivenUp;
                self.journal.note("processes of the machine do not end", "machine", &"they were killed");
                self.advance_machine_end();
            }
            Stage::Running(_) | Stage::Gone { .. } | Stage::Exited { .. } => {}
        }
    }

    /// One of the machine's own processes has been reaped.
    pub(crate) fn machine_program_ended(&mut self, pid: Pid, status: WaitStatus) {
        let Self { machine: Some(machine), poller, .. } = self else { return };
        if let Some(files) = machine.files.as_mut().filter(|files| files.program.is(pid)) {
            files.program.end(status, poller);
            let fate = files.program.fate();
            self.end_machine(Cause::Files(fate));
        } else {
            machine.hypervisor.program.end(status, poller);
            // What it said last is still in its connection.
            while self.read_hypervisor() {}
            self.hypervisor_lost();
        }
        self.advance_machine_end();
    }

    /// The process that is the machine has ended.
    pub(crate) fn machine_process_gone(&mut self, key: u64) {
        let Self { machine: Some(machine), poller, .. } = self else { return };
        let Some(process) = machine.process.as_mut().filter(|_| machine.key == key) else { return };
        let _ = process.watch.set(poller, &process.relative.pidfd, None);
        process.gone = true;
        self.advance_machine_end();
    }

    /// What a process of the machine has to say on stderr.
    pub(crate) fn program_speaks(&mut self, key: u64) {
        let Self { machine: Some(machine), poller, .. } = self else { return };
        if machine.key == key {
            machine.hypervisor.program.listen(poller);
        } else if let Some(files) = machine.files.as_mut().filter(|files| files.key == key) {
            files.program.listen(poller);
        }
    }

    /// Goes on with the end of the machine as far as its processes are gone.
    pub(super) fn advance_machine_end(&mut self) {
        let Self { machine: Some(machine), poller, .. } = self else { return };
        let Stage::Ending(ending) = &machine.stage else { return };
        let given_up = ending.rung == Rung::GivenUp;
        if !machine.hypervisor.program.has_ended() && !given_up {
            return;
        }
        if let Some(process) = machine.process.as_mut().filter(|process| !process.gone) {
            process.relative.kill();
            if !given_up {
                if process.watch.set(poller, &process.relative.pidfd, Some(Interest::READ)).is_ok() {
                    return;
                }
                process.gone = true;
            }
        }
        if let Some(files) = machine.files.as_ref().filter(|files| !files.program.has_ended()) {
            files.program.kill();
            if !given_up {
                return;
            }
        }
        self.machine_gone();
    }

    /// All of its processes are gone.
    fn machine_gone(&mut self) {
        let Self { machine: Some(machine), timers, poller, .. } = self else { return };
        machine.close(poller);
        let Stage::Ending(ending) = &mut machine.stage else { return };
        timers.cancel(ending.timer);
        let (text, code) = match &ending.cause {
            Cause::Known { text, code } => (text.clone(), *code),
            Cause::Files(text) => (text.clone(), KILLED),
            Cause::Hypervisor => (machine.hypervisor.program.fate(), KILLED),
        };
        let start = ending.start.take();
        let console = machine.console();
        if let Some((what, waiting)) = start {
            self.machine = None;
            let failure =
                Failure::vm(format!("the virtual machine could not be started: {what}: {text}"), console);
            for to in waiting {
                self.reply(to, Err(failure.clone()));
            }
            return self.finish_shutdown();
        }
        let reason = if console.is_empty() { text } else { format!("{text}\n{console}") };
        let exit = Exit { code, finished_at: timestamp::nanoseconds(), oom_killed: false };
        machine.stage = Stage::Gone { exit, reason, recording: false };
        self.end_with_machine();
        self.record_machine_end();
    }

    /// What was in the machine ends with it.
    fn end_with_machine(&mut self) {
        let failure =
            self.machine.as_ref().map_or_else(|| Failure::wrong_state("gone"), |machine| machine.gone());
        let because = match plain_end(&failure.runtime_log, SHORT) {
            console if console.is_empty() => failure.detail.clone(),
            console => format!("{}\n{console}", failure.detail),
        };
        let execs: Vec<u64> =
            self.execs.iter().filter_map(|(key, exec)| exec.in_guest().is_some().then_some(*key)).collect();
        for key in execs {
            self.exec_ended_in_guest(key, KILLED);
        }
        let in_guest = self.containers.iter().filter(|(_, it)| matches!(it.maker, Maker::Guest(_)));
        let containers: Vec<u64> = in_guest.map(|(key, _)| *key).collect();
        for key in containers {
            let Some(container) = self.containers.get_mut(&key) else { continue };
            if container.is_alive() {
                container.because.clone_from(&because);
                self.container_ended(key, KILLED);
            } else if container.is_being_created() {
                self.creation_failed(key, failure.clone(), false);
            }
        }
    }

    /// Records the machine's end when all that was in it has been recorded.
    pub(crate) fn record_machine_end(&mut self) {
        let (Some(machine), Some(pod)) = (&mut self.machine, &self.pod) else { return };
        let Stage::Gone { exit, reason, recording } = &mut machine.stage else { return };
        let settled = |state: &State| matches!(state, State::Exited { .. });
        if *recording || !self.containers.values().all(|container| settled(&container.state)) {
            return;
        }
        *recording = true;
        let record = ExitRecord::new(&pod.id, exit).because(reason);
        // Key 0 belongs to no container.
        self.disk.send(Job::Finish { key: 0, record, directory: pod.state_dir.clone() });
    }

    /// The record of the machine's end is on the disk.
    pub(crate) fn machine_recorded(&mut self) {
        let (Some(machine), Some(pod)) = (&mut self.machine, &self.pod) else { return };
        let Stage::Gone { exit, reason, .. } = &mut machine.stage else { return };
        let (id, exit, reason) = (pod.id.clone(), *exit, std::mem::take(reason));
        machine.stage = Stage::Exited { exit, reason: reason.clone() };
        self.broadcast(event::Kind::Exited(proto::ProcessExit { id, exit: Some(exit), reason }));
        self.finish_shutdown();
    }

    /// Ends the machine before the monitor; `false` when there is none to wait for.
    pub(crate) fn shut_machine_down(&mut self, to: ReplyTo) -> bool {
        if self.machine.as_ref().is_none_or(|machine| matches!(machine.stage, Stage::Exited { .. })) {
            return false;
        }
        self.farewells.push(to);
        self.end_machine(Cause::asked());
        true
    }

    /// Answers those who wait for the monitor's end.
    pub(crate) fn finish_shutdown(&mut self) {
        let waiting = std::mem::take(&mut self.farewells);
        if !waiting.is_empty() {
            for to in waiting {
                self.reply(to, Ok(reply::Result::Done(proto::Done {})));
            }
            self.say_farewell();
        }
    }

    /// Connections to the hypervisor and the agent that take no more.
    pub(crate) fn sweep_machine(&mut self) {
        let Some(machine) = &self.machine else { return };
        if machine.hypervisor.channel.as_ref().is_some_and(crate::channel::Channel::is_over) {
            self.hypervisor_lost();
        }
        let Some(machine) = &self.machine else { return };
        if machine.agent.channel.as_ref().is_some_and(|(_, channel)| channel.is_over()) {
            self.agent_lost();
        }
    }
}

impl Machine {
    /// Gives up every descriptor, and removes what killed processes leave behind.
    fn close(&mut self, poller: &crate::poll::Poller) {
        if let Some(channel) = self.hypervisor.channel.take() {
            channel.end(poller);
        }
        self.hypervisor.program.deafen(poller);
        if let Some(process) = &mut self.process {
            let _ = process.watch.set(poller, &process.relative.pidfd, None);
        }
        if let Some(files) = &mut self.files {
            files.program.deafen(poller);
            if let Some((ready, mut watch)) = files.ready.take() {
                let _ = watch.set(poller, &ready, None);
            }
            let _ = std::fs::remove_file(&files.socket);
        }
        let _ = std::fs::remove_file(&self.vsock);
    }

    /// The console's last lines: as the hypervisor told, or from where it keeps them.
    fn console(&self) -> String {
        if let Some(ended) = &self.hypervisor.ended {
            return ended.console.clone();
        }
        let read = || -> std::io::Result<String> {
            let mut file = std::fs::File::open(&self.console)?;
            let length = file.metadata()?.len();
            file.seek(SeekFrom::Start(length.saturating_sub(2 * CONSOLE as u64)))?;
            let mut bytes = Vec::new();
            file.take(2 * CONSOLE as u64).read_to_end(&mut bytes)?;
            Ok(plain_end(&String::from_utf8_lossy(&bytes), CONSOLE))
        };
        read().unwrap_or_default()
    }
}
