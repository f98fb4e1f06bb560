//! What a sandboxed command left behind: processes, mounts, network interfaces, packet filter tables, cgroups, files.

use std::collections::BTreeSet;
use std::fs;
use std::path::Path;
use std::process::Command;
use std::time::{Duration, Instant};

use anyhow::{Context, Result};

use super::cgroups::MOUNT_POINT;
use super::mounts::{ASIDE, COVERED, EMPTY, VOLATILE, mount_points};

/// Processes and mounts go away a moment after the call that ended them.
const PATIENCE: Duration = Duration::from_secs(30);

/// Everything that is looked at, one line each.
#[derive(Debug, Default)]
pub(super) struct Snapshot {
    seen: BTreeSet<String>,
}

impl Snapshot {
    /// What is there now.
    pub(super) fn take() -> Result<Self> {
        let mut seen = BTreeSet::new();
        processes(&mut seen)?;
        let mounted = mount_points()?;
        seen.extend(mounted.iter().map(|point| format!("mount {point}")));
        for interface in fs::read_dir("/sys/class/net").context("listing the network interfaces")? {
            seen.insert(format!("network interface {}", interface?.file_name().display()));
        }
        packet_filter(&mut seen);
        cgroups(&mut seen, Path::new(MOUNT_POINT));
        for path in EMPTY.iter().chain(&VOLATILE) {
            files(&mut seen, &mounted, Path::new(path));
        }
        for path in COVERED {
            let aside = Path::new(ASIDE).join(path.trim_start_matches('/')).join("changes");
            files(&mut seen, &mounted, &aside);
        }
        Ok(Self { seen })
    }
}

/// What is there now and was not there before, after a grace for what is going away; without lines that are `nobodys`.
pub(super) fn wait_for_none(before: &Snapshot, nobodys: impl Fn(&str) -> bool) -> Result<Vec<String>> {
    let deadline = Instant::now() + PATIENCE;
    loop {
        // PID 1 inherits orphans, and they count as processes until they are reaped.
        while let Ok(Some(_)) = rustix::process::wait(rustix::process::WaitOptions::NOHANG) {}
        let now = Snapshot::take()?;
        let fresh = now.seen.difference(&before.seen).map(String::as_str);
        let left = without_contents(fresh.filter(|line| !nobodys(line)));
        if left.is_empty() || Instant::now() > deadline {
            return Ok(left);
        }
        std::thread::sleep(Duration::from_millis(50));
    }
}

/// Leaves out what lies in a directory that is listed itself.
fn without_contents<'a>(sorted: impl Iterator<Item = &'a str>) -> Vec<String> {
    let mut kept: Vec<String> = Vec::new();
    for line in sorted {
        // In sorted order a directory comes before what is in it, but not always directly before.
        if !kept
            .iter()
            .any(|above| line.strip_prefix(above.as_str()).is_some_and(|rest| rest.starts_with('/')))
        {
            kept.push(line.to_owned());
        }
    }
    kept
}

fn processes(seen: &mut BTreeSet<String>) -> Result<()> {
    for entry in fs::read_dir("/proc").context("listing the processes")? {
        let name = entry?.file_name();
        let Some(pid) = name.to_str().and_then(|name| name.parse::<u32>().ok()).filter(|pid| *pid != 1)
        else {
            continue;
        };
        // The kernel's own threads come and go; outside of a sandbox they are seen too.
        if is_kernel_thread(pid) {
            continue;
        }
        // One that is gone by now is no leftover.
        let Ok(command) = fs::read(format!("/proc/{pid}/cmdline")) else { continue };
        let command = String::from_utf8_lossy(&command).replace('\0', " ");
        let name = fs::read_to_string(format!("/proc/{pid}/comm")).unwrap_or_default();
        seen.insert(format!("process {pid} ({}) {}", name.trim_end(), command.trim_end()));
    }
    Ok(())
}

/// By the flag that the kernel gives them.
fn is_kernel_thread(pid: u32) -> bool {
    let stat = fs::read_to_string(format!("/proc/{pid}/stat")).unwrap_or_default();
    let fields = stat.rsplit_once(')').map(|(_, rest)| rest).unwrap_or_default();
    // proc_pid_stat(5): field 9 is the kernel's flags of the process, 0x200000 is PF_KTHREAD.
    fields.split_whitespace().nth(6).and_then(|flags| flags.parse::<u64>().ok()).unwrap_or(0) & 0x0020_0000
        != 0
}

fn packet_filter(seen: &mut BTreeSet<String>) {
    // Without nft on the machine nothing can have made a table with it.
    let Ok(output) = Command::new("nft").args(["list", "tables"]).output() else { return };
    for table in String::from_utf8_lossy(&output.stdout).lines() {
        seen.insert(format!("packet filter {table}"));
    }
}

fn cgroups(seen: &mut BTreeSet<String>, path: &Path) {
    // A cgroup may disappear between being listed and being read.
    let Ok(entries) = fs::read_dir(path) else { return };
    for entry in entries {
        let Ok(entry) = entry else { continue };
        if entry.file_type().is_ok_and(|kind| kind.is_dir()) {
            seen.insert(format!("cgroup {}", entry.path().display()));
            cgroups(seen, &entry.path());
        }
    }
}

/// Files below `path`, on the same mount: what is mounted there is looked at by itself or not at all.
fn files(seen: &mut BTreeSet<String>, mounted: &[String], path: &Path) {
    let Ok(entries) = fs::read_dir(path) else { return };
    for entry in entries {
        let Ok(entry) = entry else { continue };
        let path = entry.path();
        if path == Path::new(ASIDE) || mounted.iter().any(|point| path == Path::new(point)) {
            continue;
        }
        seen.insert(format!("file {}", path.display()));
        if entry.file_type().is_ok_and(|kind| kind.is_dir()) {
            files(seen, mounted, &path);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_directory_stands_for_what_is_in_it() {
        let lines =
            ["cgroup /a", "cgroup /a/b", "file /a", "file /a.b", "file /a/b", "file /ab", "mount /a/b"];
        assert_eq!(
            without_contents(lines.into_iter()),
            ["cgroup /a", "file /a", "file /a.b", "file /ab", "mount /a/b"]
        );
    }
}
