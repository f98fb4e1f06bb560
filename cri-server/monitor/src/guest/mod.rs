//! A pod that is a virtual machine: the machine's processes, and the agent in its guest that makes the pod's containers.
//!
//! ```text
//!            file server listens       machine runs, agent answers,
//!            hypervisor told           guest is the pod's
//!  Starting ────────────────────────────────────────────────▶ Running
//!     │ failed, timed out, shut down                              │ ended, lost, shut down
//!     └───────────────────────▶ Ending ◀──────────────────────────┘
//!                                 │ hypervisor stopped, then killed; file server killed; all reaped
//!             (was starting)      │ (was running)
//!  forgotten ◀────────────────────┴──────────▶ Gone ──────────────────▶ Exited
//!                                              its containers' ends      record durable
//!                                              are written
//! ```
//!
//! | file | idea |
//! |---|---|
//! | `boot.rs` | StartVm, from its request to the agent's last answer |
//! | `end.rs` | the way down, whatever began it |
//! | `program.rs`, `leash.rs` | the processes, and what holds them to the monitor |
//! | `hypervisor.rs` | requests to the hypervisor |
//! | `resize.rs` | the machine's size, which the guest follows |
//! | `dial.rs` | connections to ports of the guest |
//! | `agent.rs`, `link.rs` | requests to the agent, what each was for; losing it and coming back |
//! | `news.rs` | what the agent tells unasked |
//! | `pulse.rs`, `threads.rs` | whether the guest lives, and its clock; what the host lets the machine do |
//! | `devices.rs` | block volumes and images: plugged and unplugged |
//! | `container.rs`, `exec.rs`, `streams.rs` | the guest's side of the verbs for containers and execs |
//! | `volumes.rs` | volumes in the guest's memory, and what is followed on the host |
//! | `bounds.rs` | how much of the guest's words is taken, and how often |
//! | `pod.rs` | verbs for the whole guest: ports, figures |
//!
//! The guest is hostile: what it sends is bounded before it is believed, and whatever is not as agreed ends the machine, nothing else.

mod agent;
mod boot;
mod bounds;
mod container;
mod devices;
mod dial;
mod end;
mod exec;
mod hypervisor;
pub(crate) mod leash;
mod link;
mod news;
mod pod;
mod program;
mod pulse;
mod resize;
mod streams;
mod threads;
mod volumes;

use std::collections::BTreeMap;
use std::os::fd::OwnedFd;
use std::path::PathBuf;

use agent::Agent;
use boot::Starting;
use devices::Devices;
use dial::Dial;
use end::Ending;
pub(crate) use exec::GuestExec;
use hypervisor::Hypervisor;
use podvisor_proto::monitor::{self as proto, Exit, ProcessState, VmStarted};
use program::Program;
use resize::{Resizing, Size};
use rustix::process::Pid;
use volumes::Volumes;

use crate::failure::Failure;
use crate::monitor::Monitor;
use crate::poll::Watch;
use crate::process::Relative;

/// The pod's virtual machine.
#[derive(Debug)]
pub(crate) struct Machine {
    /// What events of the hypervisor's descriptors and its timers carry.
    key: u64,
    stage: Stage,
    files: Option<FileServer>,
    hypervisor: Hypervisor,
    agent: Agent,
    dials: BTreeMap<u64, Dial>,
    volumes: Volumes,
    devices: Devices,
    /// Bytes of memory that it began with, and the size that it has.
    started_with: u64,
    size: Size,
    resizing: Option<Resizing>,
    /// Where the hypervisor listens for connections to the guest's ports.
    vsock: PathBuf,
    /// Where the hypervisor keeps the console; empty: nowhere.
    console: PathBuf,
    /// The process that is the machine, once it runs.
    process: Option<MachineProcess>,
}

/// Where a machine is in its life.
#[derive(Debug)]
enum Stage {
    Starting(Box<Starting>),
    Running(Box<VmStarted>),
    Ending(Box<Ending>),
    /// Its processes are gone. `recording`: its containers' ends are written, its own is on its way to the disk.
    Gone {
        exit: Exit,
        reason: String,
        recording: bool,
    },
    Exited {
        exit: Exit,
        reason: String,
    },
}

/// podvisor-fs.
#[derive(Debug)]
struct FileServer {
    /// What events of its descriptors carry.
    key: u64,
    program: Program,
    socket: PathBuf,
    /// Ends when it listens.
    ready: Option<(OwnedFd, Watch)>,
}

/// The hypervisor's process or one that it has started.
#[derive(Debug)]
struct MachineProcess {
    relative: Relative,
    watch: Watch,
    gone: bool,
}

impl Machine {
    /// One of its own processes that has not been reaped.
    pub(crate) fn owns(&self, pid: Pid) -> bool {
        self.hypervisor.program.is(pid) || self.files.as_ref().is_some_and(|files| files.program.is(pid))
    }

    /// What became of a machine that is not running (any more).
    fn gone(&self) -> Failure {
        match &self.stage {
            Stage::Starting(_) => Failure::wrong_state("the pod's virtual machine is being started"),
            Stage::Running(_) => Failure::vm("the pod's virtual machine is lost", String::new()),
            Stage::Ending(ending) => {
                Failure::vm(format!("the pod's virtual machine has ended: {}", ending.cause), String::new())
            }
            Stage::Gone { reason, .. } | Stage::Exited { reason, .. } => {
                let (detail, console) = reason.split_once('\n').unwrap_or((reason, ""));
                Failure::vm(format!("the pod's virtual machine has ended: {detail}"), console.to_owned())
            }
        }
    }

    fn is_running(&self) -> bool {
        matches!(self.stage, Stage::Running(_))
    }

    pub(crate) fn describe(&self, pod_id: &str) -> proto::Process {
        let (state, exit, reason) = match &self.stage {
            Stage::Starting(_) => (ProcessState::Creating, None, ""),
            Stage::Ending(ending) if ending.was_starting() => (ProcessState::Creating, None, ""),
            // Until the record is durable the daemon hears of no end, the same as with the event.
            Stage::Running(_) | Stage::Ending(_) | Stage::Gone { .. } => (ProcessState::Running, None, ""),
            Stage::Exited { exit, reason } => (ProcessState::Exited, Some(*exit), reason.as_str()),
        };
        let process = self.process.as_ref().filter(|_| state != ProcessState::Creating);
        proto::Process {
            id: pod_id.to_owned(),
            state: state.into(),
            pid: process.map_or(0, |process| process.relative.pid.as_raw_pid()),
            start_time: process.map_or(0, |process| process.relative.start_time),
            exit,
            reason: reason.to_owned(),
        }
    }
}

impl Monitor {
    /// The machine, while it runs.
    fn running_machine(&self) -> Result<&Machine, Failure> {
        match &self.machine {
            None => Err(Failure::wrong_state("this pod is no virtual machine")),
            Some(machine) if machine.is_running() => Ok(machine),
            Some(machine) => Err(machine.gone()),
        }
    }

    fn machine_is_running(&self) -> bool {
        self.machine.as_ref().is_some_and(|machine| machine.is_running())
    }
}
