//! `podvisor-monitor leash`: becomes another program that ends with the monitor and is in the cgroups that it belongs into.
//!
//! A step of its own, because entering a cgroup can take the kernel tens of milliseconds, and the monitor's loop does not wait.

use std::os::unix::process::CommandExt;
use std::process::{Command, ExitCode};

use rustix::process::{Pid, Signal, getppid, set_parent_process_death_signal};

use crate::init::enter_cgroup;

/// The command line argument that selects it.
pub(crate) const VERB: &str = "leash";

/// A command that becomes `program`; its arguments are to be added.
pub(super) fn command(program: &str, cgroup_procs: &[String]) -> Command {
    let mut command = Command::new("/proc/self/exe");
    command.arg0(program).arg(VERB).arg(std::process::id().to_string());
    command.args(cgroup_procs).arg("--").arg(program);
    command
}

/// `leash PARENT CGROUP_PROCS… -- PROGRAM ARGUMENT…`
pub(crate) fn main(arguments: &[&str]) -> ExitCode {
    let parts = arguments.iter().position(|argument| *argument == "--").and_then(|at| {
        let ((parent, cgroups), program) =
            (arguments[..at].split_first()?, arguments[at + 1..].split_first()?);
        Some((parent.parse().ok().and_then(Pid::from_raw)?, cgroups, program))
    });
    let Some((parent, cgroups, (program, arguments))) = parts else {
        eprintln!("usage: podvisor-monitor {VERB} PARENT CGROUP_PROCS... -- PROGRAM ARGUMENT...");
        return ExitCode::from(2);
    };
    if let Err(error) = set_parent_process_death_signal(Some(Signal::KILL)) {
        eprintln!("tie {program} to the monitor: {error}");
        return ExitCode::FAILURE;
    }
    // The monitor may have ended just before.
    if getppid() != Some(parent) {
        return ExitCode::FAILURE;
    }
    for path in cgroups {
        if let Err(error) = enter_cgroup(path) {
            eprintln!("enter the cgroup of {path}: {error}");
            return ExitCode::FAILURE;
        }
    }
    let error = Command::new(program).args(arguments).exec();
    eprintln!("execute {program}: {error}");
    ExitCode::FAILURE
}
