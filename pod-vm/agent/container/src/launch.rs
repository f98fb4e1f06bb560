//! The caller's side: starts the child, hears from it, starts the program. Never waits: the caller polls [`Pending::descriptor`].

use std::os::fd::{AsFd, BorrowedFd, OwnedFd};

use rustix::process::{Pid, Signal, WaitOptions, kill_process, waitpid};

use crate::cgroup::Cgroup;
use crate::child::{self, Connections};
use crate::error::ContainerError;
use crate::namespaces::{self, Opened};
use crate::plan::Plan;
use crate::process::ProcessPlan;
use crate::report::{self, Report};
use crate::sys::{self, Cloned};

/// What the process is connected to.
#[derive(Debug)]
pub enum Io {
    /// Three descriptors of the caller's; the child gets copies.
    #[allow(missing_docs)]
    Streams { stdin: OwnedFd, stdout: OwnedFd, stderr: OwnedFd },
    /// A terminal, which the child opens in the container and hands over.
    Terminal,
}

/// A process that exists. It is a child of the caller, which has to reap it.
#[derive(Debug)]
pub struct Running {
    /// In the caller's pid namespace.
    pub pid: Pid,
    /// Readable when it has ended (pidfd_open(2)).
    pub pidfd: OwnedFd,
    /// The controlling side of its terminal, when it has one.
    pub terminal: Option<OwnedFd>,
}

/// A process that is being prepared or waits for its start.
#[derive(Debug)]
pub struct Pending {
    running: Running,
    report: OwnedFd,
    /// One more process of a container: it starts by itself.
    immediate: bool,
}

/// How far a [`Pending`] is.
#[derive(Debug)]
pub enum Launch {
    /// Nothing new.
    Wait,
    /// A container's first process waits for [`Pending::start`].
    Ready,
    /// The program has been executed.
    Executed,
}

/// Starts the first process of a container, in `cgroup`.
pub fn create(plan: &Plan, cgroup: &Cgroup, io: &Io) -> Result<Pending, ContainerError> {
    let opened = namespaces::open(&plan.namespaces)?;
    let pending = start(cgroup, &opened, |report| child::first(plan, &opened, &Connections { report, io }))?;
    protect(pending.pid(), &plan.process)?;
    if plan.namespaces.makes(libc::CLONE_NEWUSER) {
        namespaces::map(pending.pid(), &plan.uid_map, &plan.gid_map)?;
        pending.nudge("let the container's process go on")?;
    }
    Ok(pending)
}

/// Clones a child that goes on with `child`, which gets its end of the socket.
///
/// What is made in a clone belongs to the user namespace of who clones. So where one is joined, a process between does that and clones from
/// there: it must be the caller's pid and mount namespaces' owner for the container to mount a /proc of its own.
///
/// ```text
/// caller ── clone ──▶ between: joins user and pid namespace ── clone (CLONE_PARENT) ──▶ child
///        ◀─────────── pid and pidfd of the child; ends
/// ```
pub(crate) fn start(
    cgroup: &Cgroup,
    opened: &Opened,
    child: impl FnOnce(BorrowedFd<'_>),
) -> Result<Pending, ContainerError> {
    let (ours, theirs) = report::channel().map_err(ContainerError::system("make a socket"))?;
    let place = cgroup.open()?;
    let cloned = if opened.user.is_some() {
        sys::clone(0, Some(place.as_fd()))
    } else {
        namespaces::clone_into(opened.pid.as_ref(), || sys::clone(opened.clone_flags, Some(place.as_fd())))
    };
    match cloned.map_err(ContainerError::system("start the container's process"))? {
        Cloned::Child => {
            drop(ours);
            if opened.user.is_some() {
                go_between(opened, theirs.as_fd());
            }
            child(theirs.as_fd());
            sys::exit_now(125)
        }
        Cloned::Parent { pid, pidfd } => {
            drop(theirs);
            let running = match &opened.user {
                Some(_) => successor(&ours, pid)?,
                None => Running { pid, pidfd, terminal: None },
            };
            Ok(Pending { running, report: ours, immediate: false })
        }
    }
}

/// The process between: returns in the child alone.
fn go_between(opened: &Opened, report: BorrowedFd<'_>) {
    let said = match namespaces::clone_below(opened) {
        Ok(Cloned::Child) => return,
        Ok(Cloned::Parent { pid, pidfd }) => report::send(report, &Report::Process(pid.as_raw_pid(), pidfd)),
        Err(failed) => report::send(report, &Report::Failed(failed.0)),
    };
    sys::exit_now(i32::from(said.is_err()))
}

/// The child of the process between, which ends.
fn successor(report: &OwnedFd, between: Pid) -> Result<Running, ContainerError> {
    let said = report::wait(report).map_err(ContainerError::system("hear from the child"));
    // It ends at once, whatever it said; killed, if it said something else.
    if !matches!(said, Ok(Report::Process(..) | Report::Failed(_))) {
        let _ = kill_process(between, Signal::KILL);
    }
    let _ = waitpid(Some(between), WaitOptions::empty());
    match said? {
        Report::Process(pid, pidfd) => {
            let pid = Pid::from_raw(pid).ok_or(ContainerError::Vanished)?;
            Ok(Running { pid, pidfd, terminal: None })
        }
        Report::Failed(text) => Err(ContainerError::Child(text)),
        Report::Terminal(_) | Report::Ready | Report::Closed => Err(ContainerError::Vanished),
    }
}

/// Starts one more process in the container whose first process is `init`. It goes on to its program by itself.
pub fn execute(
    process: &ProcessPlan,
    init: &OwnedFd,
    init_pid: Pid,
    cgroup: &Cgroup,
    io: &Io,
) -> Result<Pending, ContainerError> {
    let namespace = |kind: &str| format!("/proc/{}/ns/{kind}", init_pid.as_raw_pid());
    let pid = std::fs::File::open(namespace("pid"))
        .map_err(ContainerError::system("open the container's pid namespace"))?;
    let user = different_user_namespace(&namespace("user"))?;
    let (ours, theirs) = report::channel().map_err(ContainerError::system("make a socket"))?;
    let place = cgroup.open()?;
    let cloned = namespaces::clone_into(Some(&pid), || sys::clone(0, Some(place.as_fd())))
        .map_err(ContainerError::system("start a process in the container"))?;
    match cloned {
        Cloned::Child => {
            drop(ours);
            child::another(process, init, user, &Connections { report: theirs.as_fd(), io })
        }
        Cloned::Parent { pid, pidfd } => {
            protect(pid, process)?;
            let running = Running { pid, pidfd, terminal: None };
            Ok(Pending { running, report: ours, immediate: true })
        }
    }
}

/// Sets the child's OOM score. Here, because lowering it takes a capability that the child may not have.
fn protect(pid: Pid, process: &ProcessPlan) -> Result<(), ContainerError> {
    let Some(value) = process.oom_score_adj else { return Ok(()) };
    let path = format!("/proc/{}/oom_score_adj", pid.as_raw_pid());
    std::fs::write(&path, value.to_string())
        .map_err(ContainerError::system(format!("write {value} to {path}")))
}

/// Joining one's own user namespace is refused by the kernel (setns(2), EINVAL).
fn different_user_namespace(path: &str) -> Result<bool, ContainerError> {
    let inode = |path: &str| {
        rustix::fs::stat(path)
            .map(|status| status.st_ino)
            .map_err(|error| ContainerError::system(format!("look at {path}"))(error.into()))
    };
    Ok(inode(path)? != inode("/proc/self/ns/user")?)
}

impl Pending {
    /// Readable when [`Pending::poll`] has something new.
    pub fn descriptor(&self) -> BorrowedFd<'_> {
        self.report.as_fd()
    }

    /// Its pid, in the caller's namespace.
    pub fn pid(&self) -> Pid {
        self.running.pid
    }

    /// Its pidfd.
    pub fn pidfd(&self) -> BorrowedFd<'_> {
        self.running.pidfd.as_fd()
    }

    /// Hears what the child says. After an error the child ends by itself; the caller reaps it.
    pub fn poll(&mut self) -> Result<Launch, ContainerError> {
        loop {
            let report =
                report::receive(&self.report).map_err(ContainerError::system("hear from the child"))?;
            match report {
                None => return Ok(Launch::Wait),
                Some(Report::Terminal(terminal)) => self.running.terminal = Some(terminal),
                Some(Report::Ready) => return Ok(Launch::Ready),
                Some(Report::Failed(text)) => return Err(ContainerError::Child(text)),
                Some(Report::Closed) if self.immediate => return Ok(Launch::Executed),
                Some(Report::Closed | Report::Process(..)) => return Err(ContainerError::Vanished),
            }
        }
    }

    /// Hears what the child says until it is ready.
    pub(crate) fn wait_until_ready(&mut self) -> Result<(), ContainerError> {
        match report::wait(&self.report).map_err(ContainerError::system("hear from the child"))? {
            Report::Ready => Ok(()),
            Report::Failed(text) => Err(ContainerError::Child(text)),
            Report::Terminal(_) | Report::Process(..) | Report::Closed => Err(ContainerError::Vanished),
        }
    }

    /// Lets the program be executed; [`Pending::poll`] tells whether that went well.
    pub fn start(&mut self) -> Result<(), ContainerError> {
        self.nudge("start the container's process")?;
        self.immediate = true;
        Ok(())
    }

    /// The process, once it runs its program.
    pub fn into_running(self) -> Running {
        self.running
    }

    /// The terminal, as soon as the child has handed it over.
    pub fn take_terminal(&mut self) -> Option<OwnedFd> {
        self.running.terminal.take()
    }

    fn nudge(&self, what: &str) -> Result<(), ContainerError> {
        let flags = rustix::net::SendFlags::NOSIGNAL;
        rustix::net::send(&self.report, b"g", flags)
            .map(drop)
            .map_err(|error| ContainerError::system(what)(error.into()))
    }
}
