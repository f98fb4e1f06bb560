//! A shell of the guest itself, for the node's operator: only where the guest was built with one.

use std::fs::File;
use std::io;
use std::os::fd::OwnedFd;
use std::path::Path;
use std::process::{Command, Stdio};

use rustix::io::Errno;
use rustix::mount::{MountFlags, mount};
use rustix::pty::{OpenptFlags, grantpt, openpt, ptsname, unlockpt};

use crate::failure::Failure;
use crate::streams::Pump;
use crate::sys;

const SHELL: &str = "/bin/sh";

/// Starts one on a terminal of its own, which ends with the connection.
pub(crate) fn open() -> Result<Pump, Failure> {
    if !Path::new(SHELL).exists() {
        return Err(Failure::unsupported(
            "this guest was built without a shell: podvisor guest build --shell FILE",
        ));
    }
    start().map(Pump::terminal).map_err(|error| Failure::system("start a shell", error))
}

fn start() -> io::Result<OwnedFd> {
    // Containers have terminals of their own, so nobody has needed one of the guest's before.
    let flags = MountFlags::NOSUID | MountFlags::NOEXEC;
    match mount("devpts", "/dev/pts", "devpts", flags, c"newinstance,ptmxmode=0600,mode=0600") {
        Ok(()) | Err(Errno::BUSY) => {}
        Err(error) => return Err(error.into()),
    }
    let master = openpt(OpenptFlags::RDWR | OpenptFlags::NOCTTY | OpenptFlags::CLOEXEC)?;
    grantpt(&master)?;
    unlockpt(&master)?;
    let name = ptsname(&master, Vec::new())?;
    let terminal = File::options()
        .read(true)
        .write(true)
        .open(Path::new(name.to_str().map_err(|_| io::Error::from(io::ErrorKind::InvalidData))?))?;
    let mut command = Command::new(SHELL);
    command
        .current_dir("/")
        .env_clear()
        .envs([("PATH", "/bin:/sbin:/usr/bin:/usr/sbin"), ("HOME", "/"), ("TERM", "linux")])
        .stdin(Stdio::from(terminal.try_clone()?))
        .stdout(Stdio::from(terminal.try_clone()?))
        .stderr(Stdio::from(terminal));
    sys::on_own_terminal(&mut command);
    // Reaped like every child.
    command.spawn()?;
    rustix::io::ioctl_fionbio(&master, true)?;
    Ok(master)
}
