//! The process that is the machine: started, waited for, killed with what knows of it.

use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::unix::process::ExitStatusExt;
use std::process::{Child, Command, ExitStatus, Stdio};

use rustix::process::{PidfdFlags, Signal, pidfd_open, pidfd_send_signal};

use crate::failure::one_line;
use crate::sys;

/// The process, and what it says on stderr.
#[derive(Debug)]
pub struct Process {
    child: Child,
    /// Readable when it has ended.
    pidfd: OwnedFd,
    /// Until its end.
    pub stderr: Option<OwnedFd>,
}

impl Process {
    /// Starts `command`. `prepare` runs in it before it becomes another program, by system calls alone; on which step it fails it says on
    /// stderr. The error is one for people.
    pub fn spawn(
        mut command: Command,
        prepare: impl FnMut() -> io::Result<()> + Send + Sync + 'static,
    ) -> Result<Self, String> {
        command.env_clear().stdin(Stdio::null()).stdout(Stdio::null());
        // Through it the child says which step has failed, before the program has one of its own.
        let (reader, writer) = io::pipe().map_err(|error| error.to_string())?;
        command.stderr(writer);
        sys::before_exec(&mut command, prepare);
        let spawned = command.spawn();
        // Its copies of the pipe's end and of what `prepare` holds go.
        drop(command);
        let mut child = spawned.map_err(|error| {
            let step = one_line(&io::read_to_string(&reader).unwrap_or_default());
            if step.is_empty() { error.to_string() } else { format!("{step}: {error}") }
        })?;
        // From here on it is read beside other things.
        let nonblocking = rustix::io::ioctl_fionbio(&reader, true);
        let pid = rustix::process::Pid::from_child(&child);
        match nonblocking.and_then(|()| pidfd_open(pid, PidfdFlags::empty())) {
            Ok(pidfd) => Ok(Self { child, pidfd, stderr: Some(reader.into()) }),
            Err(error) => {
                let _ = child.kill();
                let _ = child.wait();
                Err(format!("watch the process: {error}"))
            }
        }
    }

    /// Its number.
    pub fn pid(&self) -> i32 {
        // A pid is a positive i32 in the kernel.
        i32::try_from(self.child.id()).unwrap_or_default()
    }

    /// Readable when it has ended.
    pub fn descriptor(&self) -> BorrowedFd<'_> {
        self.pidfd.as_fd()
    }

    /// Kills it, if it is still there.
    pub fn kill(&self) {
        let _ = pidfd_send_signal(&self.pidfd, Signal::KILL);
    }

    /// Waits for its end, which must be near.
    pub fn wait(&mut self) -> ExitStatus {
        // Nobody else waits for it, so there is something to wait for.
        self.child.wait().unwrap_or_else(|_| ExitStatus::from_raw(libc::SIGKILL))
    }
}

impl Drop for Process {
    /// A machine never outlives what knows of it.
    fn drop(&mut self) {
        self.kill();
        self.wait();
    }
}
