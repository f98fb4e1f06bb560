//! Connections to ports of the guest, through the hypervisor's socket: one line that names the port, one that says it is there, and for
//! the agent's streams one frame each way. Nothing here waits; nothing is read that belongs to the connection's user.

use std::io;
use std::os::fd::OwnedFd;
use std::time::{Duration, Instant};

use podvisor_proto::agent::{CONTROL_PORT, Open, Opened, STREAM_PORT};
use prost::Message;
use rustix::io::Errno;
use rustix::net::{RecvFlags, SendFlags, recv, send};

use super::bounds::line;
use super::pulse::NOBODYS_PORT;
use crate::console::connect_to;
use crate::failure::Failure;
use crate::frame::frame;
use crate::monitor::Monitor;
use crate::output::lines::Stream;
use crate::poll::{Interest, Timer, TimerId, Token, Watch};
use crate::verbs::ReplyTo;

/// First pause before the next attempt to reach an agent that does not listen yet, and the longest.
const PAUSE: [Duration; 2] = [Duration::from_millis(10), Duration::from_millis(50)];
/// How long one of these attempts may take: a guest that is still booting may swallow it.
const ATTEMPT: Duration = Duration::from_secs(1);
/// How long it may take to open a stream, or to connect to a port in the pod.
const LIMIT: Duration = Duration::from_secs(10);
/// Of the line that says a port is there, and of the frame that says a stream is open. Neither has more to say.
const LINE: usize = 64;
const OPENED: usize = 16 * 1024;

/// A connection that is being made.
#[derive(Debug)]
pub(super) struct Dial {
    pub(super) goal: Goal,
    stage: Stage,
    /// Of the pause, or of the attempt.
    timer: TimerId,
    until: Instant,
    pauses: u32,
}

/// What it is for.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) enum Goal {
    /// The agent's control port.
    Control,
    /// A standard stream of a container or exec; `None`: its input.
    Standard { owner: u64, which: Option<Stream>, open: Open },
    /// Nothing: the guest's kernel is to refuse it.
    Kernel,
    /// A port in the pod.
    Port { to: ReplyTo, number: u16, open: Open },
}

#[derive(Debug)]
enum Stage {
    Pausing,
    /// The line is to come.
    Named(OwnedFd, Watch, Vec<u8>),
    /// The frame is to come.
    Opening(OwnedFd, Watch, Vec<u8>),
}

/// Why there is no connection.
#[derive(Debug, thiserror::Error)]
pub(super) enum DialError {
    #[error("nobody listens there")]
    Nobody,
    #[error("there was no answer in time")]
    Late,
    #[error("reach the hypervisor's socket")]
    Hypervisor(#[source] io::Error),
    #[error("what was answered is not what was agreed")]
    Confused,
    #[error("{0}")]
    Refused(String),
}

impl Dial {
    fn stop_watching(&mut self, poller: &crate::poll::Poller) {
        if let Stage::Named(socket, watch, _) | Stage::Opening(socket, watch, _) = &mut self.stage {
            let _ = watch.set(poller, &*socket, None);
        }
    }

    fn opens(&self) -> Option<&Open> {
        match &self.goal {
            Goal::Control | Goal::Kernel => None,
            Goal::Standard { open, .. } | Goal::Port { open, .. } => Some(open),
        }
    }
}

impl Monitor {
    /// Connects, beginning as soon as the loop comes round. `until`: for how long the agent's control port is tried.
    pub(super) fn dial(&mut self, goal: Goal, until: Option<Instant>) {
        let key = self.new_key();
        let Some(machine) = &mut self.machine else { return };
        let until = until.unwrap_or_else(|| Instant::now() + LIMIT);
        let timer = self.timers.set(Duration::ZERO, Timer::Dial(key));
        machine.dials.insert(key, Dial { goal, stage: Stage::Pausing, timer, until, pauses: 0 });
    }

    /// Connects and names the port.
    fn attempt(&mut self, key: u64) {
        let Some(machine) = &mut self.machine else { return };
        let Some(dial) = machine.dials.get_mut(&key) else { return };
        let port = match dial.goal {
            Goal::Control => CONTROL_PORT,
            Goal::Kernel => NOBODYS_PORT,
            Goal::Standard { .. } | Goal::Port { .. } => STREAM_PORT,
        };
        let mut watch = Watch::new(Token::Dial(key));
        let connected = connect_to(&machine.vsock).and_then(|socket| {
            let line = format!("CONNECT {port}\n");
            // The first that is sent fits the socket's buffer.
            let sent = send(&socket, line.as_bytes(), SendFlags::NOSIGNAL | SendFlags::DONTWAIT)?;
            if sent != line.len() {
                return Err(Errno::AGAIN.into());
            }
            watch.set(&self.poller, &socket, Some(Interest::READ))?;
            Ok(socket)
        });
        match connected {
            Ok(socket) => {
                let rest = dial.until.saturating_duration_since(Instant::now());
                let limit = if dial.goal == Goal::Control { ATTEMPT.min(rest) } else { rest };
                dial.timer = self.timers.set(limit, Timer::Dial(key));
                dial.stage = Stage::Named(socket, watch, Vec::new());
            }
            Err(error) => self.pause(key, DialError::Hypervisor(error)),
        }
    }

    /// Waits before the next attempt, or gives up. Nobody may listen yet, or have no room for one more; or the machine is ending, which
    /// is known in a moment.
    fn pause(&mut self, key: u64, error: DialError) {
        let Some(dial) = self.machine.as_mut().and_then(|machine| machine.dials.get_mut(&key)) else {
            return;
        };
        dial.stop_watching(&self.poller);
        dial.stage = Stage::Pausing;
        let now = Instant::now();
        if now >= dial.until {
            return self.dialled(key, Err(error));
        }
        let pause = PAUSE[0].saturating_mul(1 << dial.pauses.min(4)).min(PAUSE[1]).min(dial.until - now);
        dial.pauses += 1;
        dial.timer = self.timers.set(pause, Timer::Dial(key));
    }

    /// The pause or the attempt's time is over.
    pub(crate) fn dial_time_is_over(&mut self, key: u64) {
        let Some(dial) = self.machine.as_mut().and_then(|machine| machine.dials.get_mut(&key)) else {
            return;
        };
        match (&dial.stage, &dial.goal) {
            (Stage::Pausing, _) => self.attempt(key),
            (_, Goal::Control) => self.pause(key, DialError::Late),
            _ => self.dialled(key, Err(DialError::Late)),
        }
    }

    /// The other side has said something.
    pub(crate) fn dial_ready(&mut self, key: u64) {
        let Some(dial) = self.machine.as_mut().and_then(|machine| machine.dials.get_mut(&key)) else {
            return;
        };
        let outcome = match &mut dial.stage {
            Stage::Pausing => return,
            Stage::Named(socket, _, line) => read_line(socket, line).map(|there| there.then_some(())),
            Stage::Opening(socket, _, bytes) => match read_frame(socket, bytes) {
                Ok(None) => return,
                Ok(Some(Opened { error: None })) => Ok(Some(())),
                Ok(Some(Opened { error: Some(error) })) => Err(DialError::Refused(line(&error.detail, 512))),
                Err(error) => Err(error),
            },
        };
        match outcome {
            Ok(None) => {}
            Ok(Some(())) => self.dial_advances(key),
            Err(DialError::Nobody) if dial.goal != Goal::Kernel => {
                self.timers.cancel(dial.timer);
                self.pause(key, DialError::Nobody);
            }
            Err(error) => self.dialled(key, Err(error)),
        }
    }

    /// The port is there, or the stream open.
    fn dial_advances(&mut self, key: u64) {
        let Some(dial) = self.machine.as_mut().and_then(|machine| machine.dials.get_mut(&key)) else {
            return;
        };
        let open = dial.opens().map(frame);
        match (std::mem::replace(&mut dial.stage, Stage::Pausing), open) {
            (Stage::Named(socket, watch, _), Some(open)) => {
                let sent = send(&socket, &open, SendFlags::NOSIGNAL | SendFlags::DONTWAIT);
                dial.stage = Stage::Opening(socket, watch, Vec::new());
                if !matches!(sent, Ok(length) if length == open.len()) {
                    self.timers.cancel(dial.timer);
                    self.pause(key, DialError::Nobody);
                }
            }
            (Stage::Named(socket, mut watch, _) | Stage::Opening(socket, mut watch, _), _) => {
                let _ = watch.set(&self.poller, &socket, None);
                self.dialled(key, Ok(socket));
            }
            (Stage::Pausing, _) => {}
        }
    }

    /// A dial has come to its end.
    fn dialled(&mut self, key: u64, outcome: Result<OwnedFd, DialError>) {
        let Some(machine) = &mut self.machine else { return };
        let Some(mut dial) = machine.dials.remove(&key) else { return };
        dial.stop_watching(&self.poller);
        self.timers.cancel(dial.timer);
        match dial.goal {
            Goal::Control => self.control_dialled(outcome),
            Goal::Kernel => self.kernel_dialled(&outcome),
            Goal::Standard { owner, which, .. } => self.stream_dialled(owner, which, outcome),
            Goal::Port { to, number, .. } => self.port_dialled(to, number, outcome),
        }
    }

    /// Gives up the dials that `unwanted` names, without telling anybody.
    pub(super) fn hang_up(&mut self, unwanted: impl Fn(&Goal) -> bool) {
        let Self { machine: Some(machine), poller, timers, .. } = self else { return };
        machine.dials.retain(|_, dial| {
            let kept = !unwanted(&dial.goal);
            if !kept {
                dial.stop_watching(poller);
                timers.cancel(dial.timer);
            }
            kept
        });
    }

    /// The machine is gone, and so is what was being connected to it.
    pub(super) fn fail_dials(&mut self, failure: &Failure) {
        let goals: Vec<Goal> = self
            .machine
            .iter()
            .flat_map(|machine| machine.dials.values())
            .map(|dial| dial.goal.clone())
            .collect();
        self.hang_up(|_| true);
        for goal in goals {
            match goal {
                Goal::Control | Goal::Kernel => {}
                Goal::Standard { owner, .. } => self.streams_failed(owner, failure.clone()),
                Goal::Port { to, .. } => self.reply(to, Err(failure.clone())),
            }
        }
    }
}

/// Reads the line that says the port is there. Nothing comes behind it: the agent does not speak first.
fn read_line(socket: &OwnedFd, line: &mut Vec<u8>) -> Result<bool, DialError> {
    let mut bytes = [0; LINE];
    match recv(socket, &mut bytes[..LINE - line.len()], RecvFlags::DONTWAIT) {
        Ok((0, _)) => return Err(DialError::Nobody),
        Ok((length, _)) => line.extend_from_slice(&bytes[..length]),
        Err(Errno::AGAIN | Errno::INTR) => return Ok(false),
        Err(_) => return Err(DialError::Nobody),
    }
    match line.iter().position(|&byte| byte == b'\n') {
        None if line.len() < LINE => Ok(false),
        Some(end) if end + 1 == line.len() && line.starts_with(b"OK ") => Ok(true),
        _ => Err(DialError::Confused),
    }
}

/// Reads the frame that says whether a stream is open, and nothing behind it: that is the stream's.
fn read_frame(socket: &OwnedFd, bytes: &mut Vec<u8>) -> Result<Option<Opened>, DialError> {
    loop {
        let length = bytes.first_chunk::<4>().map(|header| u32::from_le_bytes(*header));
        let length = length.map(|length| usize::try_from(length).unwrap_or(OPENED));
        let wanted = length.map_or(4, |length| length.saturating_add(4));
        if wanted > OPENED {
            return Err(DialError::Confused);
        }
        if length.is_some() && bytes.len() == wanted {
            return Opened::decode(&bytes[4..]).map(Some).map_err(|_| DialError::Confused);
        }
        let mut chunk = [0; 1024];
        let room = (wanted - bytes.len()).min(chunk.len());
        match recv(socket, &mut chunk[..room], RecvFlags::DONTWAIT) {
            Ok((0, _)) => return Err(DialError::Nobody),
            Ok((length, _)) => bytes.extend_from_slice(&chunk[..length]),
            Err(Errno::AGAIN) => return Ok(None),
            Err(Errno::INTR) => {}
            Err(_) => return Err(DialError::Nobody),
        }
    }
}
