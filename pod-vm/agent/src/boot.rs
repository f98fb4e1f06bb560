//! From the kernel's start to a usable guest: kernel file systems, modules, cgroups. Only as PID 1 of a guest.

use std::fs::{self, File};
use std::io;
use std::os::fd::AsFd;
use std::path::{Path, PathBuf};

use rustix::mount::{MountFlags, mount};
use rustix::system::{RebootCommand, reboot};

use crate::sys;

/// Where cgroup version 2 is mounted.
pub(crate) const CGROUPS: &str = "/sys/fs/cgroup";

/// Which modules are loaded when, as the guest's builder writes it: a line `start` names one with all that must be loaded before it, and the
/// lines stand in load order.
const MODULES: &str = "/modules";

/// What every container mounts below (see `storage.rs`).
pub(crate) const RUN: &str = "/run/podvisor";

/// Why a guest cannot be prepared.
#[derive(Debug, thiserror::Error)]
pub(crate) enum BootError {
    #[error("mount {kind} at {place}")]
    Mount { kind: &'static str, place: &'static str, source: io::Error },
    #[error("make {path}")]
    Make { path: PathBuf, source: io::Error },
    #[error("load {path}")]
    Module { path: PathBuf, source: io::Error },
}

/// Makes a guest of what the kernel has started.
pub(crate) fn prepare() -> Result<(), BootError> {
    let mounts: [(&str, &str, MountFlags, &std::ffi::CStr); 6] = [
        ("proc", "/proc", MountFlags::NOSUID | MountFlags::NODEV | MountFlags::NOEXEC, c""),
        ("sysfs", "/sys", MountFlags::NOSUID | MountFlags::NODEV | MountFlags::NOEXEC, c""),
        ("devtmpfs", "/dev", MountFlags::NOSUID, c"mode=0755"),
        ("tmpfs", "/run", MountFlags::NOSUID | MountFlags::NODEV, c"mode=0755"),
        ("tmpfs", "/tmp", MountFlags::NOSUID | MountFlags::NODEV, c"mode=1777"),
        ("cgroup2", CGROUPS, MountFlags::NOSUID | MountFlags::NODEV | MountFlags::NOEXEC, c"nsdelegate"),
    ];
    for (kind, place, flags, data) in mounts {
        make(Path::new(place))?;
        match mount(kind, place, kind, flags, data) {
            // The kernel mounts devtmpfs by itself where it is built to.
            Ok(()) | Err(rustix::io::Errno::BUSY) => {}
            Err(error) => return Err(BootError::Mount { kind, place, source: error.into() }),
        }
    }
    for directory in ["/dev/pts", "/dev/shm", RUN] {
        make(Path::new(directory))?;
    }
    load_modules()?;
    // Who forks in a loop is stopped by its container's limit, not by the guest's.
    let _ = fs::write("/proc/sys/kernel/pid_max", "4194304");
    Ok(())
}

fn make(path: &Path) -> Result<(), BootError> {
    fs::create_dir_all(path).map_err(|source| BootError::Make { path: path.to_owned(), source })
}

fn load_modules() -> Result<(), BootError> {
    let Ok(list) = fs::read_to_string(MODULES) else { return Ok(()) };
    for name in at_start(&list) {
        let path = Path::new("/lib/modules").join(format!("{name}.ko"));
        match File::open(&path).and_then(|file| sys::load_module(file.as_fd())) {
            Ok(()) => {}
            // It is there already; a driver without its device; one that needs a hypervisor's help that is not given.
            Err(error)
                if matches!(error.raw_os_error(), Some(libc::EEXIST | libc::ENODEV | libc::EOPNOTSUPP)) => {}
            Err(source) => return Err(BootError::Module { path, source }),
        }
    }
    Ok(())
}

fn at_start(list: &str) -> impl Iterator<Item = &str> {
    list.lines().filter_map(|line| line.strip_prefix("start ")?.split_whitespace().next())
}

/// Ends the guest. Returns only when the kernel refuses.
pub(crate) fn power_off() {
    rustix::fs::sync();
    let _ = reboot(RebootCommand::PowerOff);
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_what_a_start_needs_is_loaded_at_the_start() {
        let list = "podvisor-modules 1\nstart virtio\nstart virtio_blk virtio\ndemand virtio_balloon virtio\nalias a b\nstart\n";
        assert_eq!(at_start(list).collect::<Vec<_>>(), ["virtio", "virtio_blk"]);
    }
}
