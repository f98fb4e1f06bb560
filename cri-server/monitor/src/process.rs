//! Processes: who one is (pid, pidfd, start time), and what /proc says of it.

use std::io;
use std::os::fd::OwnedFd;

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

/// Fields of /proc/PID/stat (proc_pid_stat(5)).
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Stat {
    pub(crate) parent: i32,
    pub(crate) group: i32,
    pub(crate) session: i32,
    pub(crate) start_time: u64,
}

impl Stat {
    pub(crate) fn read(pid: i32) -> io::Result<Self> {
        let text = std::fs::read(format!("/proc/{pid}/stat"))?;
        Self::parse(&text).ok_or_else(|| io::Error::from_raw_os_error(libc::EBADMSG))
    }

    fn parse(text: &[u8]) -> Option<Self> {
        // The second field is the program's name in parentheses, and it may itself hold spaces and parentheses.
        let end_of_name = text.iter().rposition(|&byte| byte == b')')?;
        let rest = std::str::from_utf8(&text[end_of_name + 1..]).ok()?;
        // `fields` begins with field 3, the state.
        let mut fields = rest.split_ascii_whitespace();
        let parent = fields.nth(1)?.parse().ok()?;
        let group = fields.next()?.parse().ok()?;
        let session = fields.next()?.parse().ok()?;
        let start_time = fields.nth(15)?.parse().ok()?;
        Some(Self { parent, group, session, start_time })
    }
}

/// The exit code that the CRI reports: 128 + signal for a process that a signal ended.
pub(crate) fn exit_code(status: WaitStatus) -> i32 {
    status.exit_status().or_else(|| status.terminating_signal().map(|signal| 128 + signal)).unwrap_or(255)
}

/// Kills `leader` and what it started: its descendants, and everything in a session or process group that one of them
/// leads. `candidates` are the pids to look among, asked again until a look finds nobody new, so that a child
/// that is forked in between does not get away.
pub(crate) fn kill_tree(leader: &Child, candidates: impl Fn() -> Vec<i32>) {
    const LOOKS: usize = 16;
    let mut doomed = vec![leader.pid.as_raw_pid()];
    for _ in 0..LOOKS {
        let found = descendants(&doomed, &candidates());
        if found.is_empty() {
            break;
        }
        for pid in &found {
            if let Some(pid) = Pid::from_raw(*pid) {
                let _ = rustix::process::kill_process(pid, Signal::KILL);
            }
        }
        doomed.extend(found);
    }
    // The leader last: its children would become children of the container's init, and could not be told from others.
    let _ = leader.signal(Signal::KILL);
}

fn descendants(doomed: &[i32], candidates: &[i32]) -> Vec<i32> {
    candidates
        .iter()
        .copied()
        .filter(|pid| !doomed.contains(pid))
        .filter(|&pid| {
            Stat::read(pid).is_ok_and(|stat| {
                [stat.parent, stat.group, stat.session].iter().any(|relative| doomed.contains(relative))
            })
        })
        .collect()
}

/// Every process there is, for a container whose cgroup is not known.
pub(crate) fn all_processes() -> Vec<i32> {
    let Ok(entries) = std::fs::read_dir("/proc") else { return Vec::new() };
    entries.flatten().filter_map(|entry| entry.file_name().to_str()?.parse().ok()).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn stat_is_read_past_a_name_full_of_parentheses() {
        let text = b"7 (a) 1 2 (b)) S 3 5 6 0 -1 4194560 1 2 3 4 5 6 7 8 20 0 1 0 990 1 2";
        assert_eq!(Stat::parse(text), Some(Stat { parent: 3, group: 5, session: 6, start_time: 990 }));
        assert_eq!(Stat::parse(b""), None);
        assert_eq!(Stat::parse(b"7 (a"), None);
        let own = Stat::read(rustix::process::getpid().as_raw_pid()).unwrap();
        assert_eq!(own.parent, rustix::process::getppid().unwrap().as_raw_pid());
    }
}
