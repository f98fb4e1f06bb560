//! The container's own root: devices and links in /dev, hidden and read-only paths.

use std::ffi::OsStr;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::path::Path;

use rustix::fs::{AtFlags, FileType, Gid, Mode, OFlags, Uid};
use rustix::io::Errno;

use crate::error::{During, Step};
use crate::filesystem::{
    attach, copy_of_open, directory_inside, kind_of, make_read_only, new_filesystem, open_inside,
};
use crate::options::attribute;
use crate::plan::{Device, Plan};

/// Devices that every container has (OCI runtime-spec, config-linux.md "Default Devices").
const DEFAULT: [(&str, u32, u32); 6] = [
    ("/dev/null", 1, 3),
    ("/dev/zero", 1, 5),
    ("/dev/full", 1, 7),
    ("/dev/random", 1, 8),
    ("/dev/urandom", 1, 9),
    ("/dev/tty", 5, 0),
];

/// Links that every container has (the same document, "Default Devices" and "/dev symbolic links").
const LINKS: [(&str, &str); 5] = [
    ("/dev/fd", "/proc/self/fd"),
    ("/dev/stdin", "/proc/self/fd/0"),
    ("/dev/stdout", "/proc/self/fd/1"),
    ("/dev/stderr", "/proc/self/fd/2"),
    ("/dev/ptmx", "pts/ptmx"),
];

/// Makes devices and links. In a user namespace, where no node can be made, the caller's own are bound.
pub(crate) fn devices(root: BorrowedFd<'_>, plan: &Plan) -> Step {
    // Mounts that replace /dev bring their own.
    let own_dev =
        plan.mounts.iter().any(|mount| mount.destination == Path::new("/dev") && mount.options.bind);
    if own_dev {
        return Ok(());
    }
    let bound =
        plan.namespaces.makes(libc::CLONE_NEWUSER) || plan.namespaces.joins(libc::CLONE_NEWUSER).is_some();
    let defaults =
        DEFAULT.iter().filter(|(path, ..)| plan.devices.iter().all(|device| device.path != Path::new(path)));
    for (path, major, minor) in defaults {
        let device = Device {
            path: path.into(),
            kind: FileType::CharacterDevice,
            major: *major,
            minor: *minor,
            mode: 0o666,
            uid: 0,
            gid: 0,
        };
        node(root, &device, bound)?;
    }
    for device in &plan.devices {
        node(root, device, bound)?;
    }
    for (path, leads_to) in LINKS {
        let path = Path::new(path);
        let parent = directory_inside(root, Path::new("/dev")).during(|| "make /dev".into())?;
        let name = path.file_name().unwrap_or_default();
        if path.ends_with("ptmx") {
            // An image's own node would lead to the guest's terminals.
            let _ = rustix::fs::unlinkat(&parent, name, AtFlags::empty());
        }
        match rustix::fs::symlinkat(leads_to, &parent, name) {
            Ok(()) | Err(Errno::EXIST) => {}
            Err(error) => return Err(error).during(|| format!("make the link {}", path.display())),
        }
    }
    Ok(())
}

fn node(root: BorrowedFd<'_>, device: &Device, bound: bool) -> Step {
    let failed = || format!("make the device {}", device.path.display());
    let parent = directory_inside(root, device.path.parent().unwrap_or(Path::new("/"))).during(failed)?;
    let name = device.path.file_name().ok_or(Errno::ISDIR).during(failed)?;
    if bound {
        return bind(&device.path, &parent, name).during(failed);
    }
    match rustix::fs::unlinkat(&parent, name, AtFlags::empty()) {
        Ok(()) | Err(Errno::NOENT) => {}
        Err(error) => return Err(error).during(failed),
    }
    match make_node(&parent, name, device) {
        // In a file system that takes none, as a guest's share.
        Err(Errno::PERM) => bind_new(device, &parent, name).during(failed),
        made => made.during(failed),
    }
}

fn make_node(parent: &OwnedFd, name: &OsStr, device: &Device) -> Result<(), Errno> {
    let number = rustix::fs::makedev(device.major, device.minor);
    let mode = Mode::from_raw_mode(device.mode);
    rustix::fs::mknodat(parent, name, device.kind, mode, number)?;
    // The umask took its part.
    rustix::fs::chmodat(parent, name, mode, AtFlags::empty())?;
    let (uid, gid) = (Uid::from_raw(device.uid), Gid::from_raw(device.gid));
    rustix::fs::chownat(parent, name, Some(uid), Some(gid), AtFlags::SYMLINK_NOFOLLOW)
}

/// Puts a node of the caller's into the container.
fn bind(own: &Path, parent: &OwnedFd, name: &OsStr) -> Result<(), Errno> {
    let flags = OFlags::CREATE | OFlags::NOFOLLOW | OFlags::WRONLY | OFlags::CLOEXEC | OFlags::NONBLOCK;
    let target = rustix::fs::openat(parent, name, flags, Mode::from_raw_mode(0o644))?;
    let own = rustix::fs::open(own, OFlags::PATH | OFlags::CLOEXEC, Mode::empty())?;
    copy_of_open(&own, false).and_then(|copy| attach(&copy, &target))
}

/// The same with one that is made among the caller's for it, and has no name there afterwards.
fn bind_new(device: &Device, parent: &OwnedFd, name: &OsStr) -> Result<(), Errno> {
    let nodes = rustix::fs::open("/dev", OFlags::PATH | OFlags::DIRECTORY | OFlags::CLOEXEC, Mode::empty())?;
    // Others may be doing the same.
    for number in 0.. {
        let made = format!(".podvisor-{number}");
        match make_node(&nodes, OsStr::new(&made), device) {
            Err(Errno::EXIST) => {}
            Err(error) => return Err(error),
            Ok(()) => {
                let bound = bind(&Path::new("/dev").join(&made), parent, name);
                rustix::fs::unlinkat(&nodes, &made, AtFlags::empty())?;
                return bound;
            }
        }
    }
    Err(Errno::EXIST)
}

/// After the pivot: hides and protects paths, and the root itself.
pub(crate) fn protect(plan: &Plan) -> Step {
    let root = rustix::fs::open("/", OFlags::PATH | OFlags::DIRECTORY | OFlags::CLOEXEC, Mode::empty())
        .during(|| "open the container's root".into())?;
    for path in &plan.read_only_paths {
        let failed = || format!("make {} read-only", path.display());
        // Missing ones are no error (config-linux.md, "Readonly Paths", as every runtime reads it).
        let Some((opened, _)) = kind_of(&root, path) else { continue };
        let copy = copy_of_open(&opened, true).during(failed)?;
        make_read_only(&copy).during(failed)?;
        attach(&copy, &opened).during(failed)?;
    }
    for path in &plan.masked {
        let failed = || format!("mask {}", path.display());
        let Some((opened, kind)) = kind_of(&root, path) else { continue };
        let cover = if kind == FileType::Directory {
            let attributes = attribute::RDONLY | attribute::NOSUID | attribute::NODEV | attribute::NOEXEC;
            new_filesystem("tmpfs", Path::new("tmpfs"), &["size=0k".to_owned()], attributes).during(failed)?
        } else {
            let null = open_inside(&root, Path::new("/dev/null"), OFlags::PATH).during(failed)?;
            copy_of_open(&null, false).during(failed)?
        };
        attach(&cover, &opened).during(failed)?;
    }
    if plan.read_only {
        make_read_only(&root).during(|| "make the root file system read-only".into())?;
    }
    // The root alone: what is mounted below has what its own options say.
    crate::filesystem::set_propagation(root.as_fd(), plan.propagation, false)
        .during(|| "set the root's propagation".into())
}
