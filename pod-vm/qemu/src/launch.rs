//! QEMU's process: found, and started within its confinement.

use std::ffi::CString;
use std::io;
use std::os::fd::BorrowedFd;
use std::path::{Path, PathBuf};
use std::process::Command;

use podvisor_hypervisor::failure::Failure;
use podvisor_hypervisor::files::Handed;
use podvisor_hypervisor::process::Process;
use podvisor_proto::hypervisor::Start;

use crate::confine::Confinement;
use crate::kvm::{self, Access};
use crate::landlock;

const PROGRAM: &str = "qemu-system-x86_64";

/// Where QEMU is.
pub(crate) fn find(start: &Start) -> Result<PathBuf, Failure> {
    if !start.program.is_empty() {
        return Ok(PathBuf::from(&start.program));
    }
    let path = std::env::var_os("PATH").unwrap_or_default();
    std::env::split_paths(&path)
        .map(|directory| directory.join(PROGRAM))
        .find(|program| program.is_file())
        .ok_or_else(|| {
            Failure::failed(format!("find {PROGRAM}"), "it is not in PATH (Debian: qemu-system-x86)")
        })
}

/// Starts QEMU; `readable` are the files among `handed` that it opens once more by their number.
pub(crate) fn launch(
    start: &Start,
    arguments: &[String],
    handed: &Handed,
    readable: &[BorrowedFd<'_>],
) -> Result<Process, Failure> {
    let program = find(start)?;
    let failed = |cause: String| Failure::failed(format!("start {}", program.display()), cause);
    let confinement =
        confinement(start, &program, handed, readable).map_err(|error| failed(error.to_string()))?;
    let mut command = Command::new(&program);
    command.args(arguments);
    Process::spawn(command, move || confinement.apply()).map_err(failed)
}

fn confinement(
    start: &Start,
    program: &Path,
    handed: &Handed,
    readable: &[BorrowedFd<'_>],
) -> io::Result<Confinement> {
    let access = if start.emulate { None } else { Some(kvm::access(start.user, &start.run_dir)?) };
    let canonical = program.canonicalize()?;
    let cgroups = start.cgroup_procs.iter().map(|path| CString::new(path.as_str()));
    let rules = landlock::rules(&canonical, readable, access.as_ref())?;
    let (groups, kvm) = match access {
        Some(Access::Group(group)) => (vec![group], None),
        Some(Access::Own(node)) => (Vec::new(), Some(node)),
        Some(Access::Plain) | None => (Vec::new(), None),
    };
    Ok(Confinement {
        cgroups: cgroups.collect::<Result<_, _>>()?,
        user: start.user,
        groups,
        kvm,
        privileged: rustix::process::geteuid().is_root(),
        rules,
        parent: rustix::process::getpid().as_raw_nonzero().get(),
        inherited: handed.numbers(),
    })
}
