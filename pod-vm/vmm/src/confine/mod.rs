//! What the machine's process is left with. In this order, each step while its means are still there:
//!
//! 1. Before it is this program (`spawn`): its cgroups, a pid namespace in which it is alone, no protection from the kernel's OOM killer.
//! 2. When it has got what the machine is made of (`enter`): new and empty mount, network, IPC, UTS and cgroup namespaces; its own user and group;
//!    a user namespace; no capability and no way to get one; no file, no address and no other process by Landlock; limits.
//! 3. When everything is made: for each kind of thread the system calls that it needs and no other (`filters`).
//!
//! Nothing that a guest wrote has been looked at before the last step: no processor has run.

mod namespaces;
mod syscalls;

use std::ffi::CString;
use std::io;
use std::os::fd::{AsFd, AsRawFd, OwnedFd};
use std::process::Command;

use podvisor_hypervisor::process::Process;
use podvisor_hypervisor::sys::{self, RulesetAttributes};
use podvisor_proto::hypervisor::Start;
use rustix::process::{Resource, Rlimit, setrlimit};
use rustix::thread::{LinkNameSpaceType, move_into_link_name_space};

pub(crate) use syscalls::{Role, SyscallError, filters};

/// Descriptors that a machine may have open: clients of the guest's ports, and what each device has.
const DESCRIPTORS: u64 = 1024;

/// Why the machine could not be confined.
#[derive(Debug, thiserror::Error)]
pub(crate) enum ConfineError {
    #[error("{0}")]
    Step(&'static str, #[source] io::Error),
    #[error("restrict system calls")]
    Syscalls(#[from] SyscallError),
}

/// Starts this program once more, as the machine's process with its end of the link. The error is one for people.
pub(crate) fn spawn(link: &OwnedFd, cgroups: Vec<CString>) -> Result<Process, String> {
    let number = link.as_raw_fd();
    let mut command = Command::new("/proc/self/exe");
    command.args(["--machine-fd", &number.to_string()]);
    let start = || {
        Process::spawn(command, move || {
            let step = |name: &'static str, result: io::Result<()>| {
                result.inspect_err(|_| {
                    let _ = rustix::io::write(rustix::stdio::stderr(), name.as_bytes());
                })
            };
            for cgroup in &cgroups {
                step("join the cgroup", sys::write_file(cgroup, b"0"))?;
            }
            // Who started the monitor may have protected it from the kernel's OOM killer; a machine is not.
            step(
                "leave the protection from the OOM killer",
                sys::write_file(c"/proc/self/oom_score_adj", b"0"),
            )?;
            step("inherit the link", sys::leave_open(number))
        })
    };
    if rustix::process::geteuid().is_root() { alone(start) } else { start() }
}

/// Has `start` start a process in a pid namespace of its own.
fn alone(start: impl FnOnce() -> Result<Process, String>) -> Result<Process, String> {
    let words = |error: io::Error| format!("make a pid namespace: {error}");
    let here = std::fs::File::open("/proc/self/ns/pid").map_err(words)?;
    // For processes that are made from now on, not this one.
    sys::unshare(libc::CLONE_NEWPID).map_err(words)?;
    let started = start();
    move_into_link_name_space(here.as_fd(), Some(LinkNameSpaceType::ProcessID))
        .map_err(|error| words(error.into()))?;
    started
}

/// Confines this process, which has no other thread.
pub(crate) fn enter(start: &Start) -> Result<(), ConfineError> {
    let step =
        |name: &'static str, result: io::Result<()>| result.map_err(|error| ConfineError::Step(name, error));
    if rustix::process::geteuid().is_root() {
        step("empty the namespaces", namespaces::empty(&start.run_dir))?;
        step("give up capabilities for good", sys::empty_bounding_set())?;
        if start.user != 0 {
            step("become the machine's user", sys::become_user(start.user, &[]))?;
        }
    }
    // A kernel that lets no user have one is no reason to run without the rest.
    let _ = sys::unshare(libc::CLONE_NEWUSER);
    step("give up capabilities", sys::drop_capabilities())?;
    step("give up new privileges", sys::no_new_privileges())?;
    step("give up core files", sys::no_core_file())?;
    step("bound what can be opened and written", limits(start))?;
    step("give up all files", give_up_files())?;
    // After the user has changed, which clears it. In a pid namespace of its own a process sees no parent; one that has gone meanwhile has closed
    // the link.
    step("end with who started it", die_with_parent())
}

fn limits(start: &Start) -> io::Result<()> {
    let limit = |value: u64| Rlimit { current: Some(value), maximum: Some(value) };
    setrlimit(Resource::Nofile, limit(DESCRIPTORS))?;
    // No file grows but in itself: disks have the size that they have.
    if !start.plugs && start.disks.iter().all(|disk| disk.read_only) {
        setrlimit(Resource::Fsize, limit(podvisor_virtio::fs::MEMORY))?;
    }
    Ok(())
}

/// By Landlock, where the kernel has it: nothing is allowed.
fn give_up_files() -> io::Result<()> {
    let Some(version) = sys::landlock_version() else { return Ok(()) };
    let ruleset = sys::landlock_ruleset(&RulesetAttributes::all(version))?;
    sys::landlock_restrict(ruleset.as_raw_fd())
}

fn die_with_parent() -> io::Result<()> {
    Ok(rustix::process::set_parent_process_death_signal(Some(rustix::process::Signal::KILL))?)
}
