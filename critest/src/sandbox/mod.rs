//! A private environment to run a container runtime in: namespaces and cgroups of one's own, and at the end a list of
//! what was left behind.
//!
//! A sandboxed command sees the machine's files, but its own processes, network (loopback only), host name, IPC and
//! cgroup tree; `/run`, `/tmp` and `/dev/shm` are empty, `/etc` and `/var` are the machine's with changes kept aside.
//! The working directory and the Rust and Go caches stay as they are. Nothing that the command does outlives it.
//!
//! Four processes of one program, each for a reason:
//!
//! | stage | lives in | does |
//! |---|---|---|
//! | front | the caller's world and process group | holds a pipe; passes the exit status on |
//! | [`Stage::Keep`] | the caller's world, a process group of its own | makes and removes the cgroups, also when the front is killed |
//! | [`Stage::Enter`] | the new namespaces, the old pid namespace | joins the cgroups *before* it unshares: a cgroup namespace takes the cgroup of that moment as its root |
//! | [`Stage::Init`] | everything new, as PID 1 | mounts, runs the command, reaps, looks for leftovers |

mod cgroups;
mod leftovers;
pub mod machine;
mod mounts;
mod namespaces;

use std::ffi::OsString;
use std::io::{Read, pipe};
use std::os::unix::process::{CommandExt, ExitStatusExt};
use std::process::{Child, Command, ExitStatus, Stdio};

use anyhow::{Context, Result, bail};
use rustix::io::Errno;
use rustix::process::{Pid, Signal, WaitOptions, set_parent_process_death_signal, wait};

use cgroups::Subtree;
use leftovers::Snapshot;

/// Set for commands inside, so that tests which change the machine can refuse to run outside.
pub const MARK: &str = "PODVISOR_SANDBOX";

/// Exit status when the command succeeded and left something behind.
pub const LEFTOVERS: i32 = 97;

/// Which part of the work a process does.
#[derive(Debug, Clone, Copy, PartialEq, Eq, clap::ValueEnum)]
pub enum Stage {
    /// Makes and removes the cgroups.
    Keep,
    /// Makes the namespaces.
    Enter,
    /// PID 1.
    Init,
}

impl Stage {
    fn name(self) -> &'static str {
        match self {
            Self::Keep => "keep",
            Self::Enter => "enter",
            Self::Init => "init",
        }
    }
}

/// Runs `command` in a sandbox and returns its exit status; `program_arguments` lead this program back to
/// [`stage`], with the stage's name to follow and then the command.
pub fn run(program_arguments: &[&str], command: &[OsString]) -> Result<i32> {
    if !rustix::process::geteuid().is_root() {
        bail!("the sandbox needs root: it makes namespaces and cgroups");
    }
    // The keeper sees the end of this pipe when the front ends, whatever ended it.
    let (held, kept) = pipe().context("making a pipe")?;
    let status = next(program_arguments, Stage::Keep, command)?
        .process_group(0)
        .env(HOLDER, "stdin")
        .stdin(held)
        .status()
        .context("starting the sandbox's keeper")?;
    drop(kept);
    Ok(code(status))
}

/// Tells the keeper that its standard input is the front's pipe.
const HOLDER: &str = "PODVISOR_SANDBOX_HOLDER";

/// Does the work of one stage; returns the exit status to end with.
pub fn stage(stage: Stage, program_arguments: &[&str], command: &[OsString]) -> Result<i32> {
    match stage {
        Stage::Keep => keep(program_arguments, command),
        Stage::Enter => enter(program_arguments, command),
        Stage::Init => init(command),
    }
}

fn next(program_arguments: &[&str], stage: Stage, command: &[OsString]) -> Result<Command> {
    let program = std::env::current_exe().context("finding this program's file")?;
    let mut next = Command::new(program);
    next.args(program_arguments).arg(stage.name()).arg("--").args(command);
    Ok(next)
}

fn code(status: ExitStatus) -> i32 {
    status.code().or_else(|| status.signal().map(|signal| 128 + signal)).unwrap_or(1)
}

fn keep(program_arguments: &[&str], command: &[OsString]) -> Result<i32> {
    if std::env::var_os(HOLDER).is_none() {
        bail!("this stage is for the sandbox's own use");
    }
    let subtree = Subtree::create()?;
    let mut inside = next(program_arguments, Stage::Enter, command)?
        .env_remove(HOLDER)
        .env(cgroups::VARIABLE, subtree.as_variable())
        .stdin(Stdio::null())
        .spawn()
        .context("starting the sandbox")?;
    end_with_the_front(&inside)?;
    let status = inside.wait().context("waiting for the sandbox")?;
    subtree.remove()?;
    Ok(code(status))
}

/// Kills `inside` when standard input ends.
fn end_with_the_front(inside: &Child) -> Result<()> {
    let inside = Pid::from_child(inside);
    std::thread::Builder::new()
        .spawn(move || {
            // Nothing is ever written to the pipe: this returns at its end.
            let _ = std::io::stdin().read(&mut [0]);
            // The only error is that it has ended already; it is not reaped before `wait` returns.
            let _ = rustix::process::kill_process(inside, Signal::KILL);
        })
        .context("starting a thread")?;
    Ok(())
}

fn enter(program_arguments: &[&str], command: &[OsString]) -> Result<i32> {
    set_parent_process_death_signal(Some(Signal::KILL)).context("tying the sandbox to its keeper")?;
    let subtree = Subtree::from_variable()?;
    subtree.join()?;
    namespaces::unshare_all()?;
    subtree.step_aside()?;
    let status =
        next(program_arguments, Stage::Init, command)?.status().context("starting the sandbox's PID 1")?;
    Ok(code(status))
}

fn init(command: &[OsString]) -> Result<i32> {
    if std::process::id() != 1 {
        bail!("this stage is for the sandbox's own use");
    }
    set_parent_process_death_signal(Some(Signal::KILL)).context("tying PID 1 to the sandbox")?;
    let subtree = Subtree::from_variable()?;
    mounts::prepare(&subtree)?;
    subtree.delegate()?;
    bring_up_loopback()?;
    let before = Snapshot::take()?;
    let (program, arguments) = command.split_first().context("the sandbox has no command to run")?;
    let child = Command::new(program)
        .args(arguments)
        .env_remove(cgroups::VARIABLE)
        .env_remove("TMPDIR")
        .env(MARK, "1")
        .spawn()
        .with_context(|| format!("starting {}", program.display()))?;
    let status = reap_until(Pid::from_child(&child))?;
    let left = leftovers::wait_for_none(&before, |_| false)?;
    for line in &left {
        eprintln!("left behind: {line}");
    }
    Ok(if status == 0 && !left.is_empty() { LEFTOVERS } else { status })
}

fn bring_up_loopback() -> Result<()> {
    let status = Command::new("ip").args(["link", "set", "lo", "up"]).status().context("running ip")?;
    if !status.success() {
        bail!("ip link set lo up: {status}");
    }
    Ok(())
}

/// Reaps every child, as PID 1 has to, until `main` has ended.
fn reap_until(main: Pid) -> Result<i32> {
    loop {
        match wait(WaitOptions::empty()) {
            Ok(Some((pid, status))) if pid == main => {
                return Ok(code(ExitStatus::from_raw(status.as_raw())));
            }
            Ok(_) | Err(Errno::INTR) => {}
            Err(error) => return Err(error).context("waiting for the sandboxed command"),
        }
    }
}
