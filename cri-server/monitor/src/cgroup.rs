//! A container's cgroup, as far as the monitor needs it: how often the kernel's OOM killer struck, and who is in it.
//!
//! The monitor finds the cgroup itself, from /proc/PID/cgroup and its own /proc/self/mountinfo, right after the
//! runtime has created the container: later the process may be gone, and what the daemon asked for is only a wish
//! (drivers translate it).

use std::collections::HashSet;
use std::fs;
use std::io;
use std::os::fd::{AsRawFd, OwnedFd};
use std::path::{Path, PathBuf};

use rustix::event::{EventfdFlags, eventfd};
use rustix::fs::inotify;
use rustix::process::{Pid, Signal};

/// Directories of one container's cgroup.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Cgroup {
    /// Where `cgroup.procs` lists its processes.
    processes: PathBuf,
    /// The memory controller's, where OOM kills are counted.
    memory: Option<PathBuf>,
    /// `processes` and `memory` are of version 2.
    unified: bool,
}

impl Cgroup {
    /// The cgroup of a process; `None` when it is not one that belongs to a container alone.
    pub(crate) fn of_process(pid: Pid) -> Option<Self> {
        let theirs = fs::read_to_string(format!("/proc/{}/cgroup", pid.as_raw_pid())).ok()?;
        let ours = fs::read_to_string("/proc/self/cgroup").ok()?;
        let mounts = fs::read_to_string("/proc/self/mountinfo").ok()?;
        Self::find(&theirs, &ours, &mounts)
    }

    fn find(theirs: &str, ours: &str, mounts: &str) -> Option<Self> {
        let directory = |controller: &str| -> Option<PathBuf> {
            let path = member_of(theirs, controller)?;
            // Never the root nor one that the monitor is in: whoever kills "all" there kills the node.
            let own = member_of(ours, controller).unwrap_or("/");
            if path == "/" || path.contains("/..") || Path::new(own).starts_with(path) {
                return None;
            }
            mounted_at(mounts, controller, path)
        };
        if let Some(memory) = directory("memory") {
            return Some(Self { processes: memory.clone(), memory: Some(memory), unified: false });
        }
        if let Some(unified) = directory("")
            && member_of(theirs, "memory").is_none()
        {
            return Some(Self { processes: unified.clone(), memory: Some(unified), unified: true });
        }
        // Version 1 without the memory controller: no OOM counter, but the processes are known.
        let processes =
            ["pids", "freezer", "devices", "cpu", "name=systemd"].into_iter().find_map(directory)?;
        Some(Self { processes, memory: None, unified: false })
    }

    /// How many processes the OOM killer has taken here. In version 1 the counter is in `memory.oom_control` (since
    /// Linux 4.13), in version 2 in `memory.events`.
    pub(crate) fn oom_kills(&self) -> Option<u64> {
        let file = if self.unified { "memory.events" } else { "memory.oom_control" };
        let text = fs::read_to_string(self.memory.as_ref()?.join(file)).ok()?;
        text.lines().find_map(|line| line.strip_prefix("oom_kill ")?.trim().parse().ok())
    }

    /// A descriptor that becomes readable when the memory controller has something to say.
    pub(crate) fn watch_memory(&self) -> io::Result<OwnedFd> {
        let memory = self.memory.as_ref().ok_or_else(|| io::Error::from_raw_os_error(libc::ENOTSUP))?;
        if self.unified {
            let watch = inotify::init(inotify::CreateFlags::CLOEXEC | inotify::CreateFlags::NONBLOCK)?;
            inotify::add_watch(&watch, memory.join("memory.events"), inotify::WatchFlags::MODIFY)?;
            return Ok(watch);
        }
        let notice = eventfd(0, EventfdFlags::CLOEXEC | EventfdFlags::NONBLOCK)?;
        let control = fs::File::open(memory.join("memory.oom_control"))?;
        // Documentation/admin-guide/cgroup-v1/memory.rst, section 9: "<event_fd> <fd of memory.oom_control>".
        let registration = format!("{} {}", notice.as_raw_fd(), control.as_raw_fd());
        fs::write(memory.join("cgroup.event_control"), registration)?;
        Ok(notice)
    }

    /// Who is in the cgroup and in the cgroups below it.
    pub(crate) fn processes(&self) -> Vec<i32> {
        let mut pids = Vec::new();
        collect(&self.processes, 0, &mut pids);
        pids
    }

    /// Sends a signal to everybody in it. SIGKILL leaves nobody out who is forked meanwhile.
    pub(crate) fn signal_all(&self, signal: Signal) {
        // One write, atomic against fork, since Linux 5.14.
        if signal == Signal::KILL
            && self.unified
            && fs::write(self.processes.join("cgroup.kill"), "1").is_ok()
        {
            return;
        }
        let looks = if signal == Signal::KILL { 64 } else { 1 };
        let mut signalled = HashSet::new();
        for _ in 0..looks {
            let new: Vec<i32> = self.processes().into_iter().filter(|pid| signalled.insert(*pid)).collect();
            if new.is_empty() {
                break;
            }
            for pid in new.into_iter().filter_map(Pid::from_raw) {
                let _ = rustix::process::kill_process(pid, signal);
            }
        }
    }
}

fn collect(directory: &Path, depth: usize, pids: &mut Vec<i32>) {
    const DEEPEST: usize = 16;
    if let Ok(text) = fs::read_to_string(directory.join("cgroup.procs")) {
        // 0 stands for a process of another pid namespace that cannot be seen from here.
        pids.extend(text.lines().filter_map(|line| line.parse::<i32>().ok()).filter(|&pid| pid > 0));
    }
    if depth == DEEPEST {
        return;
    }
    let Ok(entries) = fs::read_dir(directory) else { return };
    for entry in entries.flatten().filter(|entry| entry.file_type().is_ok_and(|kind| kind.is_dir())) {
        collect(&entry.path(), depth + 1, pids);
    }
}

/// The path in a /proc/PID/cgroup text (`4:cpu,cpuacct:/path`); the empty controller is version 2.
fn member_of<'a>(cgroups: &'a str, controller: &str) -> Option<&'a str> {
    cgroups.lines().find_map(|line| {
        let mut parts = line.splitn(3, ':');
        let (_, controllers, path) = (parts.next()?, parts.next()?, parts.next()?);
        controllers.split(',').any(|name| name == controller).then_some(path)
    })
}

/// Where a cgroup's directory can be seen, from a /proc/self/mountinfo text.
fn mounted_at(mounts: &str, controller: &str, path: &str) -> Option<PathBuf> {
    mounts.lines().find_map(|line| {
        // proc_pid_mountinfo(5): ID parent device root mount-point options optional… - type source super-options
        let (place, kind) = line.split_once(" - ")?;
        let mut place = place.split(' ').skip(3);
        let (root, mount_point) = (unescape(place.next()?), unescape(place.next()?));
        let mut kind = kind.split(' ');
        let matches = match kind.next()? {
            "cgroup2" => controller.is_empty(),
            "cgroup" => kind.nth(1)?.split(',').any(|option| option == controller),
            _ => false,
        };
        let below = Path::new(path).strip_prefix(&root).ok()?;
        matches.then(|| Path::new(&mount_point).join(below))
    })
}

/// mountinfo writes space, tab, newline and backslash as three octal digits.
fn unescape(field: &str) -> String {
    let mut bytes = Vec::with_capacity(field.len());
    let mut rest = field.as_bytes();
    while let [first, tail @ ..] = rest {
        rest = tail;
        let octal = tail.get(..3).and_then(|digits| std::str::from_utf8(digits).ok());
        match octal.and_then(|digits| u8::from_str_radix(digits, 8).ok()) {
            Some(byte) if *first == b'\\' => {
                bytes.push(byte);
                rest = &tail[3..];
            }
            _ => bytes.push(*first),
        }
    }
    String::from_utf8_lossy(&bytes).into_owned()
}

#[cfg(test)]
mod tests {
    use super::*;

    const V1_MOUNTS: &str = "\
30 24 0:26 / /sys/fs/cgroup/memory rw,relatime - cgroup cgroup rw,memory
31 24 0:27 / /sys/fs/cgroup/systemd rw,relatime - cgroup cgroup rw,name=systemd
32 24 0:28 / /sys/fs/cgroup/unified rw,relatime - cgroup2 cgroup2 rw
33 24 0:29 / /sys/fs/cgroup/cpu,cpuacct rw,relatime shared:9 - cgroup cgroup rw,cpu,cpuacct
";
    const V2_MOUNTS: &str = "29 23 0:25 / /sys/fs/cgroup rw shared:4 - cgroup2 cgroup2 rw,nsdelegate\n";

    #[test]
    fn finds_the_memory_hierarchy_of_a_hybrid_host() {
        let theirs = "4:memory:/kubepods/pod1/abc\n2:cpu,cpuacct:/kubepods/pod1/abc\n0::/\n";
        let found = Cgroup::find(theirs, "4:memory:/podvisor/m\n0::/\n", V1_MOUNTS).unwrap();
        assert_eq!(found.processes, Path::new("/sys/fs/cgroup/memory/kubepods/pod1/abc"));
        assert!(!found.unified);
        let without_memory = "2:cpu,cpuacct:/kubepods/pod1/abc\n";
        let found = Cgroup::find(without_memory, "", V1_MOUNTS).unwrap();
        assert_eq!(found.processes, Path::new("/sys/fs/cgroup/cpu,cpuacct/kubepods/pod1/abc"));
        assert_eq!(found.memory, None);
    }

    #[test]
    fn finds_the_unified_hierarchy() {
        let found = Cgroup::find("0::/kubepods/abc\n", "0::/podvisor/m\n", V2_MOUNTS).unwrap();
        assert_eq!(found.memory.as_deref(), Some(Path::new("/sys/fs/cgroup/kubepods/abc")));
        assert!(found.unified);
    }

    #[test]
    fn never_takes_a_cgroup_that_others_are_in() {
        for theirs in ["0::/\n", "0::/podvisor\n", "0::/podvisor/m\n", "0::/../other\n"] {
            assert_eq!(Cgroup::find(theirs, "0::/podvisor/m\n", V2_MOUNTS), None, "{theirs}");
        }
    }

    #[test]
    fn a_mount_of_a_part_of_the_hierarchy_is_counted_from_its_root() {
        let mounts = "29 23 0:25 /slice /mnt/cg\\040roup rw - cgroup2 cgroup2 rw\n";
        let found = Cgroup::find("0::/slice/abc\n", "", mounts).unwrap();
        assert_eq!(found.processes, Path::new("/mnt/cg roup/abc"));
        assert_eq!(Cgroup::find("0::/elsewhere/abc\n", "", mounts), None);
    }
}
