//! QEMU's process: found, started within its confinement, waited for.

use std::ffi::CString;
use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::unix::process::ExitStatusExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, ExitStatus, Stdio};

use podvisor_proto::hypervisor::Start;
use rustix::process::{PidfdFlags, Signal, pidfd_open, pidfd_send_signal};

use crate::confine::Confinement;
use crate::failure::{Failure, one_line};
use crate::files::Handed;
use crate::kvm::{self, Access};
use crate::{landlock, sys};

const PROGRAM: &str = "qemu-system-x86_64";

/// The process, and what it says on stderr.
#[derive(Debug)]
pub(crate) struct Process {
    child: Child,
    /// Readable when it has ended.
    pidfd: OwnedFd,
    pub(crate) stderr: Option<OwnedFd>,
}

impl Process {
    pub(crate) fn pid(&self) -> i32 {
        // A pid is a positive i32 in the kernel.
        i32::try_from(self.child.id()).unwrap_or_default()
    }

    pub(crate) fn descriptor(&self) -> BorrowedFd<'_> {
        self.pidfd.as_fd()
    }

    /// Kills it, if it is still there.
    pub(crate) fn kill(&self) {
        let _ = pidfd_send_signal(&self.pidfd, Signal::KILL);
    }

    /// Waits for its end, which must be near.
    pub(crate) fn wait(&mut self) -> ExitStatus {
        // Nobody else waits for it, so there is something to wait for.
        self.child.wait().unwrap_or_else(|_| ExitStatus::from_raw(libc::SIGKILL))
    }
}

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
    command.args(arguments).env_clear().stdin(Stdio::null()).stdout(Stdio::null());
    // Through it the child says which step has failed, before QEMU has one of its own.
    let (reader, writer) = io::pipe().map_err(|error| failed(error.to_string()))?;
    command.stderr(writer);
    sys::before_exec(&mut command, move || confinement.apply());
    let spawned = command.spawn();
    // Its copies of the pipe's end and of the confinement go.
    drop(command);
    let mut child = spawned.map_err(|error| {
        let step = io::read_to_string(&reader).unwrap_or_default();
        let step = one_line(&step);
        failed(if step.is_empty() { error.to_string() } else { format!("{step}: {error}") })
    })?;
    // From here on it is read beside other things.
    let nonblocking = rustix::io::ioctl_fionbio(&reader, true);
    match nonblocking.and_then(|()| pidfd_open(rustix::process::Pid::from_child(&child), PidfdFlags::empty()))
    {
        Ok(pidfd) => Ok(Process { child, pidfd, stderr: Some(reader.into()) }),
        Err(error) => {
            let _ = child.kill();
            let _ = child.wait();
            Err(failed(format!("watch the process: {error}")))
        }
    }
}

impl Drop for Process {
    /// A machine never outlives what knows of it.
    fn drop(&mut self) {
        self.kill();
        self.wait();
    }
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
