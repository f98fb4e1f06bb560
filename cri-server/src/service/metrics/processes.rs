//! Processes of a container: how many, and what they hold open. Bounded: what would take too long to count is unknown.

use std::fs;
use std::path::{Path, PathBuf};

use podvisor_cgroup::Cgroup;

/// A container that has made more cgroups in its own than this is not walked through.
const CGROUPS: usize = 32;

/// Processes whose descriptors are counted.
const PROCESSES: usize = 256;

/// Descriptors that are looked at to find the sockets.
const DESCRIPTORS: usize = 2048;

/// `None`: not known.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub(super) struct Processes {
    pub(super) count: Option<u64>,
    pub(super) descriptors: Option<u64>,
    pub(super) sockets: Option<u64>,
    /// Soft limit of open files of the first process; no limit is unknown, too: it cannot be said in a whole number.
    pub(super) open_files: Option<u64>,
}

/// Of everything in a cgroup, whose first process is `first`.
pub(super) fn of(cgroup: &Cgroup, first: Option<i32>) -> Processes {
    let Ok(Some(pids)) = cgroup.pids_within(CGROUPS) else { return Processes::default() };
    let (descriptors, sockets) =
        if pids.len() <= PROCESSES { count(&pids, DESCRIPTORS) } else { (None, None) };
    // The number may belong to another process by now.
    let limits =
        first.filter(|pid| pids.contains(pid)).map(|pid| PathBuf::from(format!("/proc/{pid}/limits")));
    let open_files = limits.and_then(|path| open_files(&fs::read_to_string(path).ok()?));
    Processes { count: u64::try_from(pids.len()).ok(), descriptors, sockets, open_files }
}

fn count(pids: &[i32], budget: usize) -> (Option<u64>, Option<u64>) {
    let (mut descriptors, mut sockets, mut budget) = (Some(0), Some(0), budget);
    for pid in pids {
        let directory = PathBuf::from(format!("/proc/{pid}/fd"));
        // Linux 6.2 and newer count them in the directory's size (fs/proc/fd.c, proc_readfd_count); before that it is 0.
        let size = fs::metadata(&directory).map_or(0, |metadata| metadata.len());
        if usize::try_from(size).is_ok_and(|size| size <= budget)
            && let Some((all, of_sockets)) = look(&directory, budget)
        {
            budget = budget.saturating_sub(usize::try_from(all).unwrap_or(usize::MAX));
            descriptors = descriptors.map(|sum| sum + all);
            sockets = sockets.map(|sum| sum + of_sockets);
        } else {
            descriptors = descriptors.filter(|_| size > 0).map(|sum| sum + size);
            sockets = None;
        }
    }
    (descriptors, sockets)
}

/// All and the sockets among them; `None` when there are more than `budget`.
fn look(directory: &Path, budget: usize) -> Option<(u64, u64)> {
    let (mut all, mut sockets, mut budget) = (0, 0, budget);
    // A process that has ended has none.
    for entry in fs::read_dir(directory).into_iter().flatten().flatten() {
        budget = budget.checked_sub(1)?;
        all += 1;
        if fs::read_link(entry.path())
            .is_ok_and(|target| target.as_os_str().as_encoded_bytes().starts_with(b"socket:"))
        {
            sockets += 1;
        }
    }
    Some((all, sockets))
}

/// `Max open files            1024                 1048576              files`
fn open_files(limits: &str) -> Option<u64> {
    let line = limits.lines().find_map(|line| line.strip_prefix("Max open files"))?;
    line.split_whitespace().next()?.parse().ok()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn limits() {
        let text = "Limit                     Soft Limit           Hard Limit           Units     \n\
                    Max open files            1024                 1048576              files     \n";
        assert_eq!(open_files(text), Some(1024));
        assert_eq!(
            open_files("Max open files            unlimited            unlimited            files\n"),
            None
        );
        assert_eq!(open_files(""), None);
    }

    #[test]
    fn this_process() {
        let me = i32::try_from(std::process::id()).unwrap();
        let (before, sockets) = count(&[me], DESCRIPTORS);
        let (before, sockets) = (before.unwrap(), sockets.unwrap());
        let pair: Vec<_> = (0..8).map(|_| std::os::unix::net::UnixStream::pair().unwrap()).collect();
        let (after, more) = count(&[me], DESCRIPTORS);
        // Other tests open and close some at the same time.
        assert!(
            after.unwrap() >= before.min(16) && more.unwrap() >= 16,
            "{before} {after:?} {sockets} {more:?}"
        );
        assert_eq!(count(&[me], 3).1, None);
        drop(pair);
    }

    #[test]
    fn a_process_that_has_ended_has_none() {
        assert_eq!(count(&[i32::MAX], DESCRIPTORS), (Some(0), Some(0)));
    }
}
