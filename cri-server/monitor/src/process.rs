//! Processes: who one is (pid, pidfd, start time).

use std::io;
use std::os::fd::OwnedFd;

use podvisor_cgroup::kin::{self, Stat};
use rustix::process::{Pid, PidfdFlags, Signal, WaitStatus, pidfd_open, pidfd_send_signal};

/// A child of the monitor that has not been reaped. While that is so its pid cannot be given to another process.
#[derive(Debug)]
pub(crate) struct Child {
    pub(crate) pid: Pid,
    /// Clock ticks since boot.
    pub(crate) start_time: u64,
    /// `None` when it was reaped before anybody knew its pid.
    pidfd: Option<OwnedFd>,
}

impl Child {
    /// Identifies a living (or not yet reaped) child by its pid.
    pub(crate) fn identify(pid: Pid) -> io::Result<Self> {
        let pidfd = pidfd_open(pid, PidfdFlags::empty())?;
        let stat = Stat::read(pid.as_raw_pid())?;
        if stat.parent != rustix::process::getpid().as_raw_pid() {
            // Not adopted by us means that we would never learn how it ended, and it may be any process at all.
            return Err(io::Error::from_raw_os_error(libc::ECHILD));
        }
        Ok(Self { pid, start_time: stat.start_time, pidfd: Some(pidfd) })
    }

    /// One that has been reaped already: its start time is not known any more (0), and it takes no signals.
    pub(crate) fn gone(pid: Pid) -> Self {
        Self { pid, start_time: 0, pidfd: None }
    }

    /// A process in what `machine` is; it takes no signals from us.
    pub(crate) fn of_relative(machine: &Relative) -> Self {
        Self { pid: machine.pid, start_time: machine.start_time, pidfd: None }
    }

    /// One that is no child of ours and takes no signals from us; it lives as long as the process `pid`.
    pub(crate) fn elsewhere(pid: Pid) -> io::Result<Self> {
        let start_time = Stat::read(pid.as_raw_pid())?.start_time;
        Ok(Self { pid, start_time, pidfd: None })
    }

    /// Signals it. That it has ended already is no error.
    pub(crate) fn signal(&self, signal: Signal) -> io::Result<()> {
        let Some(pidfd) = &self.pidfd else { return Ok(()) };
        match pidfd_send_signal(pidfd, signal) {
            Ok(()) | Err(rustix::io::Errno::SRCH) => Ok(()),
            Err(error) => Err(error.into()),
        }
    }
}

/// A process that another one says is its own.
#[derive(Debug)]
pub(crate) struct Relative {
    pub(crate) pid: Pid,
    pub(crate) start_time: u64,
    /// Readable when it has ended.
    pub(crate) pidfd: OwnedFd,
}

impl Relative {
    /// The process `pid`, which must be `of` or descend from it: nobody is to have strangers killed.
    pub(crate) fn identify(pid: Pid, of: Pid) -> io::Result<Self> {
        const GENERATIONS: usize = 16;
        let pidfd = pidfd_open(pid, PidfdFlags::empty())?;
        let start_time = Stat::read(pid.as_raw_pid())?.start_time;
        let mut ancestor = pid.as_raw_pid();
        for _ in 0..GENERATIONS {
            if ancestor == of.as_raw_pid() {
                return Ok(Self { pid, start_time, pidfd });
            }
            ancestor = Stat::read(ancestor)?.parent;
        }
        Err(io::Error::from_raw_os_error(libc::ECHILD))
    }

    pub(crate) fn kill(&self) {
        let _ = pidfd_send_signal(&self.pidfd, Signal::KILL);
    }
}

/// The exit code that the CRI reports: 128 + signal for a process that a signal ended.
pub(crate) fn exit_code(status: WaitStatus) -> i32 {
    status.exit_status().or_else(|| status.terminating_signal().map(|signal| 128 + signal)).unwrap_or(255)
}

/// Kills `leader` and what it started, which is among the `candidates`.
pub(crate) fn kill_tree(leader: &Child, candidates: impl Fn() -> Vec<i32>) {
    kin::signal(leader.pid, Signal::KILL, candidates);
    // The leader last: its children would become children of the container's init, and could not be told from others.
    let _ = leader.signal(Signal::KILL);
    kin::signal_late(leader.pid, Signal::KILL);
}

#[cfg(test)]
mod tests {
    use std::process::Command;
    use std::time::{Duration, Instant};

    use super::*;

    fn is_anywhere(marker: &str) -> bool {
        let of = |pid: i32| std::fs::read(format!("/proc/{pid}/cmdline")).unwrap_or_default();
        kin::all().into_iter().any(|pid| String::from_utf8_lossy(&of(pid)).contains(marker))
    }

    #[test]
    fn nobody_gets_away_from_one_that_forks_all_the_time() {
        for round in 0..40 {
            let marker = format!("6543.{}{round:02}", std::process::id());
            let script = format!("while :; do sleep {marker} & done");
            let mut shell = Command::new("setsid").args(["sh", "-c", &script]).spawn().unwrap();
            std::thread::sleep(Duration::from_millis(round % 8));
            let leader = Child::identify(Pid::from_child(&shell)).unwrap();
            kill_tree(&leader, kin::all);
            shell.wait().unwrap();
            let deadline = Instant::now() + Duration::from_secs(20);
            while is_anywhere(&marker) {
                assert!(Instant::now() < deadline, "somebody of round {round} is still there");
                std::thread::sleep(Duration::from_millis(2));
            }
        }
    }
}
