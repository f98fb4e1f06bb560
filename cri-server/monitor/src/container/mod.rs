//! A container of the pod, from the first request for it until it is forgotten.
//!
//! ```text
//!            log open        runtime create      runtime start
//!  Opening ────────▶ Creating ──────────▶ Created ──────────▶ Running
//!     │                 │                    │                   │
//!     └──────┬──────────┘                    └────────┬──────────┘
//!            ▼ failed, timed out, deleted             ▼ its process was reaped
//!          Failed ──▶ (forgotten)                  Ending ──────────▶ Exited ──▶ (deleted, forgotten)
//!           runtime delete                          output drained, exit record durable
//! ```
//!
//! In a guest the agent has the runtime's part.

mod attach;
mod checkpoint;
mod create;
mod exit;
mod inside;
mod lifecycle;
mod log;
mod maker;

pub(crate) use create::{present_text, read_pid};
pub(crate) use maker::{InGuest, Maker, OnHost};
use std::time::Instant;

use podvisor_proto::monitor::{self as proto, Exit, ProcessState};
use rustix::process::Pid;

use crate::cgroup::Cgroup;
use crate::failure::Failure;
use crate::output::lines::Lines;
use crate::output::pace::Pace;
use crate::poll::{TimerId, Watch};
use crate::process::Child;
use crate::stdio::{Streams, Wanted};
use crate::verbs::ReplyTo;

/// One container.
#[derive(Debug)]
pub(crate) struct Container {
    pub(crate) id: String,
    pub(crate) maker: Maker,
    pub(crate) state: State,
    pub(crate) streams: Streams,
    pub(crate) cgroup: Option<Cgroup>,
    pub(crate) bundle: String,
    pub(crate) wanted: Wanted,
    stdin_once: bool,
    /// Its output goes to a log; else only to who is attached.
    logged: bool,
    stdout: Lines,
    stderr: Lines,
    /// Bytes of its log that the disk thread has not written yet.
    backlog: usize,
    /// Its output is not read until the disk thread has caught up.
    held_back: bool,
    pace: Pace,
    /// Its output is not read until a timer is due.
    resting: bool,
    reopening: Vec<ReplyTo>,
    attached: Vec<Attached>,
    memory: Option<MemoryWatch>,
    pub(crate) oom_kills: u64,
    /// Of its end, what the code does not say.
    pub(crate) because: String,
    pub(crate) removal: Removal,
    /// Its program has been started.
    started: bool,
    /// It got SIGKILL: it will not be started any more.
    killed: bool,
    /// Who waits for the `start` that is under way, besides the first who asked.
    starts: Vec<ReplyTo>,
    /// It is being written down.
    checkpoint: Option<checkpoint::Checkpoint>,
    /// Who waits for it to be deleted.
    pub(crate) deletes: Vec<ReplyTo>,
}

/// Where a container is in its life.
#[derive(Debug)]
pub(crate) enum State {
    /// The disk thread opens its log.
    Opening { reply: ReplyTo },
    /// The runtime creates it by this call, or the agent.
    Creating { reply: ReplyTo, call: Option<u64> },
    /// It came to nothing; what there is of it is removed.
    Failed { reply: ReplyTo, failure: Failure },
    /// Its process waits to become the container's program. `starting`: the runtime has been told.
    Created { child: Child, starting: bool },
    /// Its program runs.
    Running { child: Child },
    /// Its process is gone; the rest of its output and the record are on their way to the disk.
    Ending(Ending),
    /// All is written.
    Exited { pid: i32, start_time: u64, exit: Exit },
}

impl State {
    /// Stands in while a state is taken apart.
    fn nothing() -> Self {
        Self::Exited { pid: 0, start_time: 0, exit: Exit::default() }
    }
}

/// What is left to do for a container whose process has ended.
#[derive(Debug)]
pub(crate) struct Ending {
    pid: i32,
    start_time: u64,
    exit: Exit,
    /// The runtime's `start` has not ended: its answer goes out before the event.
    starting: bool,
    /// All output has been read.
    drained: bool,
    /// The exit record is durable.
    recorded: bool,
    patience: TimerId,
    since: Instant,
}

/// How far its maker is with deleting a container that has ended.
#[derive(Debug)]
pub(crate) enum Removal {
    NotBegun,
    Running {
        force: bool,
    },
    /// Not without force.
    Refused,
    Done,
    /// Not with force either.
    Failed,
}

/// The kernel's notices about a container's memory.
#[derive(Debug)]
struct MemoryWatch {
    notices: std::os::fd::OwnedFd,
    watch: Watch,
}

/// Who gets a container's output besides its log.
#[derive(Debug, Clone, Copy)]
struct Attached {
    connection: u64,
    stdout: bool,
    stderr: bool,
}

impl Container {
    /// Of its first process, while that has not been reaped; `None` for one that is no child of the monitor.
    pub(crate) fn pid(&self) -> Option<Pid> {
        self.child().filter(|_| self.maker.makes_children()).map(|child| child.pid)
    }

    fn child(&self) -> Option<&Child> {
        match &self.state {
            State::Created { child, .. } | State::Running { child } => Some(child),
            _ => None,
        }
    }

    /// It has a process, whose end will be told.
    pub(crate) fn is_alive(&self) -> bool {
        self.child().is_some()
    }

    /// Its maker works on it.
    pub(crate) fn is_being_created(&self) -> bool {
        matches!(self.state, State::Creating { .. })
    }

    pub(crate) fn is_running(&self) -> bool {
        matches!(self.state, State::Running { .. })
    }

    /// How its state is called in messages.
    pub(crate) fn state_name(&self) -> &'static str {
        match self.state {
            State::Opening { .. } | State::Creating { .. } => "being created",
            State::Failed { .. } => "being removed after it could not be created",
            State::Created { .. } => "created, not started",
            State::Running { .. } => "running",
            State::Ending(_) | State::Exited { .. } => "exited",
        }
    }

    fn wrong_state(&self, needed: &str) -> Failure {
        Failure::wrong_state(format!("container {} is {}, not {needed}", self.id, self.state_name()))
    }

    pub(crate) fn describe(&self) -> proto::Process {
        let (state, pid, start_time, exit) = match &self.state {
            State::Opening { .. } | State::Creating { .. } | State::Failed { .. } => {
                (ProcessState::Creating, 0, 0, None)
            }
            State::Created { child, .. } => {
                (ProcessState::Created, child.pid.as_raw_pid(), child.start_time, None)
            }
            State::Running { child } => {
                (ProcessState::Running, child.pid.as_raw_pid(), child.start_time, None)
            }
            // Until the record is durable the daemon hears of no end, the same as with the event.
            State::Ending(ending) => (ProcessState::Running, ending.pid, ending.start_time, None),
            State::Exited { pid, start_time, exit } => (ProcessState::Exited, *pid, *start_time, Some(*exit)),
        };
        proto::Process {
            id: self.id.clone(),
            state: state.into(),
            pid,
            start_time,
            exit,
            reason: if exit.is_some() { self.because.clone() } else { String::new() },
        }
    }
}
