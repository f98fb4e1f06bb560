//! StartInit, the monitor's side: the helper process that makes the pod's init, and the init's life.
//!
//! The helper ([`crate::init`]) is this program again, with one thread and nothing inherited: a user namespace can
//! only be joined by a process with a single thread. It prepares itself, forks PID 1 of the new namespace, writes
//! its pid to the pipe that is its stdout, and ends; the init becomes a child of the monitor, the subreaper.

use std::io::Write;
use std::os::fd::OwnedFd;
use std::os::unix::process::CommandExt;
use std::process::{Command, Stdio};
use std::time::Duration;

use podvisor_proto::monitor::{self as proto, Exit, ProcessState, StartInit, event, reply};
use prost::Message;
use rustix::process::{Pid, Signal, WaitStatus};

use crate::disk::Job;
use crate::exit_record::ExitRecord;
use crate::failure::{Failure, check_absolute};
use crate::monitor::Monitor;
use crate::output::timestamp;
use crate::poll::{Timer, TimerId};
use crate::process::{Child, exit_code};
use crate::runtime::unprotect;
use crate::verbs::{Answer, Answered, ReplyTo};

/// How long the helper may take, and the init to obey SIGTERM.
const PATIENCE: Duration = Duration::from_secs(5);
/// The helper gets its instructions through a pipe that nobody reads until it runs, so they must fit.
const INSTRUCTIONS_LIMIT: usize = 32 * 1024;

/// The pod's init.
#[derive(Debug)]
pub(crate) enum PodInit {
    /// The helper works. `answer` is its stdout.
    Starting {
        helper: Pid,
        answer: OwnedFd,
        to: ReplyTo,
        timer: TimerId,
        late: bool,
    },
    Running {
        child: Child,
    },
    /// Its process was reaped, the record is on its way to the disk.
    Ending {
        pid: i32,
        start_time: u64,
        exit: Exit,
    },
    Exited {
        pid: i32,
        start_time: u64,
        exit: Exit,
    },
}

impl PodInit {
    /// Of the helper or the init, while it has not been reaped.
    pub(crate) fn pid(&self) -> Option<Pid> {
        match self {
            Self::Starting { helper, .. } => Some(*helper),
            Self::Running { child } => Some(child.pid),
            Self::Ending { .. } | Self::Exited { .. } => None,
        }
    }

    pub(crate) fn is_starting(&self) -> bool {
        matches!(self, Self::Starting { .. })
    }

    pub(crate) fn describe(&self, pod_id: &str) -> proto::Process {
        let (state, pid, start_time, exit) = match self {
            Self::Starting { .. } => (ProcessState::Creating, 0, 0, None),
            Self::Running { child } => {
                (ProcessState::Running, child.pid.as_raw_pid(), child.start_time, None)
            }
            Self::Ending { pid, start_time, .. } => (ProcessState::Running, *pid, *start_time, None),
            Self::Exited { pid, start_time, exit } => (ProcessState::Exited, *pid, *start_time, Some(*exit)),
        };
        proto::Process {
            id: pod_id.to_owned(),
            state: state.into(),
            pid,
            start_time,
            exit,
            reason: String::new(),
        }
    }
}

impl Monitor {
    pub(crate) fn start_init(&mut self, to: ReplyTo, request: &StartInit) -> Answered {
        if self.machine.is_some() {
            return Err(Failure::wrong_state("the pod is a virtual machine, which has an init of its own"));
        }
        if self.init.is_some() {
            return Err(Failure::exists("the pod has an init"));
        }
        for path in &request.cgroup_procs {
            check_absolute("cgroup_procs", path)?;
        }
        for path in &request.join_namespaces {
            check_absolute("join_namespaces", path)?;
        }
        let instructions = request.encode_to_vec();
        if instructions.len() > INSTRUCTIONS_LIMIT {
            return Err(Failure::invalid("cgroup_procs and join_namespaces are too long together"));
        }
        let failed = |error| Failure::system("start the helper that makes the pod's init", error);
        let (helper, answer) = spawn_helper(&instructions).map_err(failed)?;
        let timer = self.timers.set(PATIENCE, Timer::Init);
        self.init = Some(PodInit::Starting { helper, answer, to, timer, late: false });
        Ok(Answer::Later)
    }

    /// The helper or the init has been reaped.
    pub(crate) fn init_ended(&mut self, pid: Pid, status: WaitStatus) {
        match self.init.take() {
            Some(PodInit::Starting { answer, to, timer, late, .. }) => {
                self.timers.cancel(timer);
                self.helper_ended(&answer, to, late, status);
            }
            Some(PodInit::Running { child }) => {
                let exit = Exit {
                    code: exit_code(status),
                    finished_at: timestamp::nanoseconds(),
                    oom_killed: false,
                };
                self.init =
                    Some(PodInit::Ending { pid: pid.as_raw_pid(), start_time: child.start_time, exit });
                if let Some(pod) = &self.pod {
                    // Key 0 belongs to no container.
                    let record = ExitRecord::new(&pod.id, &exit);
                    self.disk.send(Job::Finish { key: 0, record, directory: pod.state_dir.clone() });
                }
            }
            other => self.init = other,
        }
    }

    fn helper_ended(&mut self, answer: &OwnedFd, to: ReplyTo, late: bool, status: WaitStatus) {
        let mut buffer = [0; 4096];
        let said = rustix::io::read(answer, &mut buffer).unwrap_or(0);
        let said = String::from_utf8_lossy(&buffer[..said]).trim().to_owned();
        if late {
            let limit = PATIENCE.as_secs();
            let detail = format!("the helper that makes the pod's init did not end within {limit} s");
            return self.reply(to, Err(Failure::timeout(detail, said)));
        }
        let pid =
            (status.exit_status() == Some(0)).then(|| said.parse().ok().and_then(Pid::from_raw)).flatten();
        let Some(pid) = pid else {
            let why = if said.is_empty() { format!("it exited with {}", exit_code(status)) } else { said };
            return self.reply(to, Err(Failure::system("make the pod's init", why)));
        };
        if let Some(ended) = self.strays.take(pid) {
            let why = format!("it exited with {} at once", exit_code(ended));
            return self.reply(to, Err(Failure::system("make the pod's init", why)));
        }
        match Child::identify(pid) {
            Ok(child) => {
                let started = proto::Started { pid: pid.as_raw_pid(), start_time: child.start_time };
                self.init = Some(PodInit::Running { child });
                self.reply(to, Ok(reply::Result::Started(started)));
            }
            Err(error) => self.reply(to, Err(Failure::system("find the pod's init", error))),
        }
    }

    /// The init's exit record is on the disk.
    pub(crate) fn init_recorded(&mut self, key: u64) {
        let Some(pod) = self.pod.as_ref().filter(|_| key == 0) else { return };
        let id = pod.id.clone();
        let Some(PodInit::Ending { pid, start_time, exit }) = self.init else { return };
        self.init = Some(PodInit::Exited { pid, start_time, exit });
        self.broadcast(event::Kind::Exited(proto::ProcessExit {
            id,
            exit: Some(exit),
            reason: String::new(),
        }));
        self.finish_shutdown();
    }

    /// Ends the init before the monitor; `false` when there is none to wait for.
    pub(crate) fn end_init(&mut self, to: ReplyTo) -> bool {
        match &self.init {
            Some(PodInit::Running { child }) => {
                if self.farewells.is_empty() {
                    let _ = child.signal(Signal::TERM);
                    self.timers.set(PATIENCE, Timer::Init);
                }
            }
            Some(PodInit::Starting { .. } | PodInit::Ending { .. }) => {}
            Some(PodInit::Exited { .. }) | None => return false,
        }
        self.farewells.push(to);
        true
    }

    /// The helper takes too long, or the init did not obey.
    pub(crate) fn init_time_is_over(&mut self) {
        match &mut self.init {
            Some(PodInit::Starting { helper, late, .. }) => {
                *late = true;
                let _ = rustix::process::kill_process(*helper, Signal::KILL);
            }
            Some(PodInit::Running { child }) if !self.farewells.is_empty() => {
                let _ = child.signal(Signal::KILL);
            }
            _ => {}
        }
    }
}

fn spawn_helper(instructions: &[u8]) -> std::io::Result<(Pid, OwnedFd)> {
    let mut command = Command::new("/proc/self/exe");
    command.arg0(crate::init::NAME).arg(crate::init::VERB);
    let mut child = command.stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(Stdio::null()).spawn()?;
    let invalid = || std::io::Error::from(std::io::ErrorKind::InvalidData);
    let pid = i32::try_from(child.id()).ok().and_then(Pid::from_raw).ok_or_else(invalid)?;
    unprotect(pid);
    // Fits into the pipe, so this does not wait; the helper reads until this end is closed.
    child.stdin.take().ok_or_else(invalid)?.write_all(instructions)?;
    let answer = OwnedFd::from(child.stdout.take().ok_or_else(invalid)?);
    crate::stdio::set_nonblocking(&answer)?;
    Ok((pid, answer))
}
