//! Processes and what they have started: what /proc says of it.

use std::io;

use rustix::process::{Pid, Signal, kill_process};

/// Fields of /proc/PID/stat (proc_pid_stat(5)).
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Stat {
    /// Its parent.
    pub parent: i32,
    /// Its process group.
    pub group: i32,
    /// Its session.
    pub session: i32,
    /// When it began, in clock ticks since the machine did.
    pub start_time: u64,
}

impl Stat {
    /// Of a process that is there.
    pub fn read(pid: i32) -> io::Result<Self> {
        let text = std::fs::read(format!("/proc/{pid}/stat"))?;
        Self::parse(&text)
            .ok_or_else(|| io::Error::from_raw_os_error(rustix::io::Errno::BADMSG.raw_os_error()))
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

/// Signals what `leader` has started, but not itself: its descendants, and everything in a session or process group that one of them
/// leads. `candidates` are the pids to look among, asked again until a look finds nobody new, so that a child that is forked in between does
/// not get away. What lost its parent before it made a session of its own is nobody's any more.
pub fn signal(leader: Pid, signal: Signal, candidates: impl Fn() -> Vec<i32>) {
    const LOOKS: usize = 16;
    let mut family = vec![leader.as_raw_pid()];
    for _ in 0..LOOKS {
        let there = candidates().into_iter().filter_map(|pid| Some((pid, Stat::read(pid).ok()?))).collect();
        let found = descendants(&family, there);
        if found.is_empty() {
            break;
        }
        for pid in found.iter().copied().filter_map(Pid::from_raw) {
            // One that has just ended needs none.
            let _ = kill_process(pid, signal);
        }
        family.extend(found);
    }
}

/// The same once `leader` has got a fatal signal, which [`signal`] was too early for: what it has forked since is in its session still. From here
/// on it forks nothing (kernel/fork.c, copy_process), and who was forked a moment ago is in /proc before he is in a cgroup.
pub fn signal_late(leader: Pid, signal: Signal) {
    self::signal(leader, signal, all);
}

/// Every process there is.
pub fn all() -> Vec<i32> {
    let Ok(entries) = std::fs::read_dir("/proc") else { return Vec::new() };
    entries.flatten().filter_map(|entry| entry.file_name().to_str()?.parse().ok()).collect()
}

/// All of them are found before one is signalled: with a parent that has ended goes what tells whose child one was.
fn descendants(family: &[i32], mut there: Vec<(i32, Stat)>) -> Vec<i32> {
    let mut found = Vec::new();
    there.retain(|(pid, _)| !family.contains(pid));
    loop {
        let before = found.len();
        there.retain(|(pid, stat)| {
            let relatives = [stat.parent, stat.group, stat.session];
            let related =
                relatives.iter().any(|relative| family.contains(relative) || found.contains(relative));
            if related {
                found.push(*pid);
            }
            !related
        });
        if found.len() == before {
            return found;
        }
    }
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

    #[test]
    fn descendants_are_found_through_each_other() {
        let stat = |parent, group, session| Stat { parent, group, session, start_time: 0 };
        let there = vec![
            // A grandchild in a session of its own, listed before its parent, which is in another one.
            (12, stat(11, 12, 12)),
            (11, stat(10, 11, 11)),
            (10, stat(5, 10, 10)),
            // Without a parent, in the group of a child; and a stranger.
            (13, stat(1, 11, 11)),
            (14, stat(1, 14, 14)),
        ];
        let mut found = descendants(&[10], there);
        found.sort_unstable();
        assert_eq!(found, [11, 12, 13]);
    }
}
