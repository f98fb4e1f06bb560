//! A command on a machine that is there for it alone, like the lab: no namespaces, but the same search for what it leaves behind.
//!
//! For what a sandbox cannot give: systemd as PID 1 knows processes by the machine's numbers and cgroups by the machine's paths.

use std::ffi::OsString;
use std::process::Command;

use anyhow::{Context, Result, bail};

use super::leftovers::{Snapshot, wait_for_none};
use super::mounts::OF_OTHER_TOOLS;
use super::{LEFTOVERS, MARK, code};

/// Tells that this machine may be changed. The lab sets it; nobody else should.
const CONSENT: &str = "PODVISOR_LAB";

/// Runs `command` and returns its exit status.
pub fn run(command: &[OsString]) -> Result<i32> {
    if std::env::var_os(CONSENT).is_none() {
        bail!("this changes the machine it runs on: use `sandbox`, or tests/lab/run");
    }
    let before = Snapshot::take()?;
    let (program, arguments) = command.split_first().context("there is no command to run")?;
    let status = Command::new(program)
        .args(arguments)
        .env(MARK, "1")
        .status()
        .with_context(|| format!("starting {}", program.display()))?;
    let left = wait_for_none(&before, of_the_system)?;
    for line in &left {
        eprintln!("left behind: {line}");
    }
    let status = code(status);
    Ok(if status == 0 && !left.is_empty() { LEFTOVERS } else { status })
}

/// What a system with systemd makes in passing: its own files, and slices, which stay active once something was in them.
fn of_the_system(line: &str) -> bool {
    let Some((kind, path)) = line.split_once(' ') else { return false };
    match kind {
        "file" => {
            OF_OTHER_TOOLS.iter().chain(&["/run/systemd", "/run/log"]).any(|tool| path.starts_with(tool))
        }
        "cgroup" => path.strip_suffix(".slice").is_some(),
        _ => false,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_scope_is_a_leftover_and_its_slice_is_not() {
        assert!(of_the_system("cgroup /sys/fs/cgroup/kubepods.slice/kubepods-pod1.slice"));
        assert!(!of_the_system("cgroup /sys/fs/cgroup/kubepods.slice/podvisor-1.scope"));
        assert!(of_the_system("file /run/systemd/transient"));
        assert!(!of_the_system("file /run/podvisor"));
    }
}
