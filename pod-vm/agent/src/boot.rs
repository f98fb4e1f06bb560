//! From the kernel's start to a usable guest: kernel file systems, modules, cgroups. Only as PID 1 of a guest.

use std::fs;
use std::io;
use std::path::{Path, PathBuf};

use rustix::mount::{MountFlags, mount, mount_bind, mount_move};
use rustix::system::{RebootCommand, reboot};

use crate::modules::{self, LoadError, Waiting};
use crate::uevents::Uevents;

/// Where cgroup version 2 is mounted.
pub(crate) const CGROUPS: &str = "/sys/fs/cgroup";

/// What every container mounts below (see `storage.rs`).
pub(crate) const RUN: &str = "/run/podvisor";

/// Why a guest cannot be prepared.
#[derive(Debug, thiserror::Error)]
pub(crate) enum BootError {
    #[error("mount {kind} at {place}")]
    Mount { kind: &'static str, place: &'static str, source: io::Error },
    #[error("make {path}")]
    Make { path: PathBuf, source: io::Error },
    #[error(transparent)]
    Module(#[from] LoadError),
    #[error("take a root that can be left")]
    Root(#[source] io::Error),
    #[error("listen for devices")]
    Devices(#[source] io::Error),
}

/// What the first process of a guest has to see to.
#[derive(Debug)]
pub(crate) struct Duties {
    pub(crate) modules: Waiting,
    pub(crate) devices: Uevents,
}

impl Duties {
    /// Loads the next module of those that wait, if any does.
    pub(crate) fn load_next(&mut self) {
        if self.modules.is_empty() {
            return;
        }
        self.modules.next();
        if self.modules.is_empty() {
            // Those whose transport is part of the kernel were there before anybody listened for them.
            modules::demand_by_devices();
        }
    }

    /// Loads all of them: somebody needs one.
    pub(crate) fn load_all(&mut self) {
        while !self.modules.is_empty() {
            self.load_next();
        }
    }
}

/// Makes a guest of what the kernel has started.
pub(crate) fn prepare() -> Result<Duties, BootError> {
    leave_rootfs().map_err(BootError::Root)?;
    let mounts: [(&str, &str, MountFlags, &std::ffi::CStr); 7] = [
        ("proc", "/proc", MountFlags::NOSUID | MountFlags::NODEV | MountFlags::NOEXEC, c""),
        ("sysfs", "/sys", MountFlags::NOSUID | MountFlags::NODEV | MountFlags::NOEXEC, c""),
        ("devtmpfs", "/dev", MountFlags::NOSUID, c"mode=0755"),
        // The pod's: every container that shares IPC gets it, as large as every runtime makes it.
        (
            "tmpfs",
            "/dev/shm",
            MountFlags::NOSUID | MountFlags::NODEV | MountFlags::NOEXEC,
            c"mode=1777,size=64m",
        ),
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
    for directory in ["/dev/pts", RUN] {
        make(Path::new(directory))?;
    }
    // From now on what the kernel asks for is loaded, by this program (see `main.rs`).
    let _ = fs::write("/proc/sys/kernel/modprobe", "/init");
    let devices = Uevents::open().map_err(BootError::Devices)?;
    let modules = Waiting::begin()?;
    // Programs in real time leave the same share of the processors to all else (the kernel's own work, and this program), in shorter turns, so
    // that nobody takes the guest for one that hangs. Kernel 6.12 and later keep time for others in a way of their own.
    let _ = fs::write("/proc/sys/kernel/sched_rt_runtime_us", "190000");
    let _ = fs::write("/proc/sys/kernel/sched_rt_period_us", "200000");
    // Who forks in a loop is stopped by its container's limit, not by the guest's.
    let _ = fs::write("/proc/sys/kernel/pid_max", "4194304");
    Ok(Duties { modules, devices })
}

/// The kernel's rootfs has no parent, and so nobody whose root it is can make another one the root (pivot_root(2)), which every container
/// does. A mount of the same files over it has one (`switch_root` does the same with other files).
fn leave_rootfs() -> io::Result<()> {
    const PLACE: &str = "/tmp";
    mount_bind("/", PLACE)?;
    rustix::process::chdir(PLACE)?;
    mount_move(".", "/")?;
    rustix::process::chroot(".")?;
    Ok(rustix::process::chdir("/")?)
}

fn make(path: &Path) -> Result<(), BootError> {
    fs::create_dir_all(path).map_err(|source| BootError::Make { path: path.to_owned(), source })
}

/// Ends the guest. Returns only when the kernel refuses.
pub(crate) fn power_off() {
    rustix::fs::sync();
    let _ = reboot(RebootCommand::PowerOff);
}
