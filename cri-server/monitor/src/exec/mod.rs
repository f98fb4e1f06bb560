//! Exec and ExecSync: another process in a running container.
//!
//! On the host (`host.rs`) the runtime starts the process detached, with streams of the monitor's, which becomes its parent when the
//! runtime has ended; in a guest the agent does (`guest/exec.rs`). The client of a stream that reads slowly slows its process down (its own output is all
//! there is); ExecSync reads everything and keeps up to its limit. When the process has ended, what is in
//! its pipes is still passed on, but nobody waits for background children that hold them open.
//!
//! The time limit of ExecSync begins when the process runs, as in containerd: on a busy node the runtime's own start
//! would otherwise eat a probe's second.

mod host;
mod output;

use std::time::{Duration, Instant};

use podvisor_proto::monitor::{
    self as proto, ExecProcess, ExecSyncReply, Exit, StreamFrame, reply, stream_frame::Frame,
};
use rustix::process::Pid;

use crate::container::Maker;
use crate::failure::{Failure, check_id};
use crate::guest::GuestExec;
use crate::monitor::Monitor;
use crate::output::timestamp;
use crate::poll::{Timer, TimerId};
use crate::process::Child;
use crate::stdio::{Streams, Wanted};
use crate::verbs::{Answer, Answered, ReplyTo};

/// Bytes that may wait for the client of a stream before its process has to.
const WINDOW: usize = 256 * 1024;
/// How long a terminal may take to report its end after its process has ended, and a guest that answers to send more of what a process there
/// wrote.
const PATIENCE: Duration = Duration::from_millis(500);

/// An exec from its request until its process is reaped and its client has everything.
#[derive(Debug)]
pub(crate) struct Exec {
    pub(crate) id: String,
    pub(crate) container: u64,
    pub(crate) wanted: Wanted,
    pub(crate) streams: Streams,
    pub(crate) client: Client,
    pub(crate) stage: Stage,
    pub(crate) known: Known,
    pub(crate) timer: Option<TimerId>,
}

/// By whom its process is known.
#[derive(Debug)]
pub(crate) enum Known {
    /// The kernel; and `inner`, the number that the runtime knows it by where that is no process of the host.
    OnHost { inner: Option<Pid> },
    /// The agent.
    InGuest(GuestExec),
}

/// Who gets the output.
#[derive(Debug)]
pub(crate) enum Client {
    Sync {
        to: ReplyTo,
        limit: usize,
        timeout: Option<Duration>,
        stdout: Vec<u8>,
        stderr: Vec<u8>,
    },
    Stream {
        to: ReplyTo,
    },
    /// Nobody any more: the client is gone, or has been told that the time was over.
    Gone,
}

/// How far it is.
#[derive(Debug)]
pub(crate) enum Stage {
    /// The runtime or the agent has been told.
    Starting,
    Running(Child),
    /// Its process has been reaped; its output may not have been passed on completely.
    Ended(Exit),
}

impl Exec {
    /// Of its process, while that is a child of the monitor that has not been reaped.
    pub(crate) fn pid(&self) -> Option<Pid> {
        match (&self.stage, &self.known) {
            (Stage::Running(child), Known::OnHost { .. }) => Some(child.pid),
            _ => None,
        }
    }

    /// Its process runs, as far as is known.
    pub(crate) fn is_alive(&self) -> bool {
        matches!(self.stage, Stage::Running(_))
    }

    pub(crate) fn has_not_ended(&self) -> bool {
        !matches!(self.stage, Stage::Ended(_))
    }

    /// What belongs to it in a guest.
    pub(crate) fn in_guest(&self) -> Option<&GuestExec> {
        match &self.known {
            Known::InGuest(guest) => Some(guest),
            Known::OnHost { .. } => None,
        }
    }

    fn connection(&self) -> Option<u64> {
        match self.client {
            Client::Sync { to, .. } | Client::Stream { to } => Some(to.connection),
            Client::Gone => None,
        }
    }

    /// Whether its client has as much waiting as it may.
    pub(crate) fn window_is_full(
        &self,
        connections: &std::collections::BTreeMap<u64, crate::connection::Connection>,
    ) -> bool {
        match self.client {
            Client::Stream { to } => {
                connections.get(&to.connection).is_some_and(|it| it.channel.queued() >= WINDOW)
            }
            Client::Sync { .. } | Client::Gone => false,
        }
    }
}

impl Monitor {
    pub(crate) fn exec_sync(&mut self, to: ReplyTo, request: proto::ExecSync) -> Answered {
        let wanted = Wanted { terminal: false, stdin: false, stdout: true, stderr: true };
        let client = Client::Sync {
            to,
            limit: usize::try_from(request.output_limit)
                .unwrap_or(usize::MAX)
                .min(proto::MAX_FRAME / 2 - 4096),
            timeout: (request.timeout_ms > 0).then(|| Duration::from_millis(request.timeout_ms)),
            stdout: Vec::new(),
            stderr: Vec::new(),
        };
        self.start_exec(request.exec, wanted, client)
    }

    pub(crate) fn exec(&mut self, to: ReplyTo, request: proto::Exec) -> Answered {
        if request.terminal && request.stderr {
            return Err(Failure::invalid("stderr of a terminal is part of its stdout"));
        }
        let wanted = Wanted {
            terminal: request.terminal,
            stdin: request.stdin,
            stdout: request.stdout,
            stderr: request.stderr,
        };
        self.start_exec(request.exec, wanted, Client::Stream { to })
    }

    fn start_exec(&mut self, process: Option<ExecProcess>, wanted: Wanted, client: Client) -> Answered {
        let process = process.ok_or_else(|| Failure::invalid("exec is missing"))?;
        let id = process.exec_id;
        check_id("exec_id", &id)?;
        let container_id = &process.container_id;
        let container =
            self.find_container(container_id).ok_or_else(|| Failure::no_container(container_id))?;
        let target = &self.containers[&container];
        if !target.is_running() {
            let state = target.state_name();
            return Err(Failure::wrong_state(format!("container {container_id} is {state}, not running")));
        }
        if self.execs.values().any(|exec| exec.id == id) {
            return Err(Failure::exists(format!("exec {id} is running")));
        }
        let guest = matches!(target.maker, Maker::Guest(_));
        let key = self.new_key();
        let known = if guest {
            Known::InGuest(self.exec_in_guest(key, container, &process.process, wanted)?)
        } else {
            Known::OnHost { inner: None }
        };
        let streams = if guest {
            Streams::default()
        } else {
            self.exec_on_host(key, container, &id, &process.process, wanted)?
        };
        let stage = Stage::Starting;
        let exec = Exec { id, container, wanted, streams, client, stage, known, timer: None };
        self.execs.insert(key, exec);
        Ok(Answer::Later)
    }

    /// An exec came to nothing.
    pub(crate) fn exec_failed(&mut self, key: u64, failure: Failure) {
        let Some(mut exec) = self.execs.remove(&key) else { return };
        exec.streams.close(&self.poller);
        if let Some(timer) = exec.timer {
            self.timers.cancel(timer);
        }
        if let Client::Sync { to, .. } | Client::Stream { to } = exec.client {
            self.reply(to, Err(failure));
        }
        self.continue_removal(exec.container);
    }

    /// An exec's process has been reaped, by the monitor or in the guest.
    pub(crate) fn exec_ended(&mut self, key: u64, code: i32) {
        let exit = Exit { code, finished_at: timestamp::nanoseconds(), oom_killed: false };
        let Some(exec) = self.execs.get_mut(&key) else { return };
        if matches!(exec.stage, Stage::Ended(_)) {
            return;
        }
        exec.stage = Stage::Ended(exit);
        if let Some(timer) = exec.timer.take() {
            self.timers.cancel(timer);
        }
        if let Some(input) = exec.streams.stdin.take() {
            input.close(&self.poller);
        }
        let guest = match &mut exec.known {
            Known::InGuest(guest) => {
                guest.ended_at = Some(Instant::now());
                true
            }
            Known::OnHost { .. } => false,
        };
        let mut wait = false;
        for output in exec.streams.outputs() {
            if guest {
                output.expect_arrival();
            } else if output.is_terminal() {
                // What was written last is still on its way through the kernel, so the terminal's end is waited for:
                // its session ends with this process, which hangs it up.
                output.give_up_slave();
            } else {
                output.limit_to_present();
                continue;
            }
            wait = true;
        }
        if wait {
            exec.timer = Some(self.timers.set(PATIENCE, Timer::Drain(key)));
        }
        let container = exec.container;
        self.flush_input(key);
        self.resume_exec_output(key);
        self.finish_exec(key);
        self.continue_removal(container);
    }

    /// What the client of an exec stream sends.
    pub(crate) fn exec_input(&mut self, key: u64, frame: StreamFrame) {
        let Some(exec) = self.execs.get_mut(&key) else { return };
        match frame.frame {
            Some(Frame::Resize(size)) => match &exec.known {
                Known::OnHost { .. } => exec.streams.resize(size.width, size.height),
                Known::InGuest(_) => self.resize_in_guest(key, size),
            },
            Some(Frame::Stdin(bytes)) => {
                let Some(input) = &mut exec.streams.stdin else { return };
                if bytes.is_empty() {
                    input.finish();
                } else {
                    input.push(&bytes);
                }
                self.flush_input(key);
            }
            _ => {}
        }
    }

    /// ExecSync's time is over: the answer goes out now, however long the killed process takes to be gone.
    pub(crate) fn exec_time_is_over(&mut self, key: u64) {
        self.kill_exec(key);
        let Some(exec) = self.execs.get_mut(&key) else { return };
        for output in exec.streams.outputs() {
            output.limit_to_present();
        }
        self.resume_exec_output(key);
        let Some(exec) = self.execs.get_mut(&key) else { return };
        exec.streams.close(&self.poller);
        if let Client::Sync { to, stdout, stderr, .. } = std::mem::replace(&mut exec.client, Client::Gone) {
            let exit_code = 128 + libc::SIGKILL;
            let exec_sync = ExecSyncReply { exit_code, stdout, stderr, timed_out: true };
            self.reply(to, Ok(reply::Result::ExecSync(exec_sync)));
        }
    }

    /// A client is gone: its execs end.
    pub(crate) fn execs_abandoned(&mut self, connection: u64) {
        let abandoned: Vec<u64> = self
            .execs
            .iter()
            .filter(|(_, exec)| exec.connection() == Some(connection))
            .map(|(key, _)| *key)
            .collect();
        for key in abandoned {
            self.kill_exec(key);
            let Some(exec) = self.execs.get_mut(&key) else { continue };
            exec.client = Client::Gone;
            // While the runtime works, the streams are its business: the terminal is still to come.
            if !matches!(exec.stage, Stage::Starting) {
                exec.streams.close(&self.poller);
            }
            self.finish_exec(key);
        }
    }

    /// Kills an exec's process and what it started; its end is noticed as any other.
    pub(crate) fn kill_exec(&mut self, key: u64) {
        let Some(exec) = self.execs.get(&key) else { return };
        match &exec.known {
            Known::OnHost { .. } => self.kill_on_host(key),
            Known::InGuest(_) => self.kill_exec_in_guest(key),
        }
    }
}
