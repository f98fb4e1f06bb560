//! Mounts, made detached and put where a descriptor says (fsopen(2), open_tree(2), move_mount(2)), so that no path of the container is looked
//! up twice or outside its root.

use std::ffi::{OsStr, OsString};
use std::fs::File;
use std::io::Write as _;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::unix::ffi::OsStrExt;
use std::path::{Path, PathBuf};

use rustix::fs::{AtFlags, CWD, FileType, Mode, OFlags, ResolveFlags, StatVfsMountFlags};
use rustix::io::Errno;
use rustix::mount::{FsMountFlags, FsOpenFlags, MountAttrFlags, MoveMountFlags, OpenTreeFlags, UnmountFlags};

use crate::error::{During, Step};
use crate::options::{Propagation, attribute};
use crate::plan::MountPlan;
use crate::sys::{self, MountAttributes};

/// Opens a path of the container's tree, without ever leaving it.
pub(crate) fn open_inside(root: impl AsFd, path: &Path, flags: OFlags) -> Result<OwnedFd, Errno> {
    let path = path.strip_prefix("/").unwrap_or(path);
    let path = if path.as_os_str().is_empty() { Path::new(".") } else { path };
    let resolve = ResolveFlags::IN_ROOT | ResolveFlags::NO_MAGICLINKS;
    rustix::fs::openat2(root, path, flags | OFlags::CLOEXEC, Mode::empty(), resolve)
}

/// The directory at `path`, made with everything above it where it is missing. Links are followed as the container would follow them, also
/// to where nothing is yet.
pub(crate) fn directory_inside(root: impl AsFd, path: &Path) -> Result<OwnedFd, Errno> {
    /// As many links as the kernel follows (path_resolution(7)).
    const LINKS: usize = 40;
    let mut links = 0;
    let mut reached = PathBuf::from("/");
    let mut current = open_inside(&root, &reached, OFlags::PATH | OFlags::DIRECTORY)?;
    let mut ahead: Vec<OsString> = path.iter().rev().map(OsString::from).collect();
    while let Some(part) = ahead.pop() {
        match part.as_encoded_bytes() {
            b"." => continue,
            b"/" => reached = PathBuf::from("/"),
            b".." => drop(reached.pop()),
            _ => match rustix::fs::readlinkat(&current, &part, Vec::new()) {
                Ok(_) if links == LINKS => return Err(Errno::LOOP),
                Ok(target) => {
                    links += 1;
                    ahead.extend(
                        Path::new(OsStr::from_bytes(target.to_bytes())).iter().rev().map(OsString::from),
                    );
                    continue;
                }
                Err(Errno::NOENT) => match rustix::fs::mkdirat(&current, &part, Mode::from_raw_mode(0o755)) {
                    Ok(()) | Err(Errno::EXIST) => reached.push(&part),
                    Err(error) => return Err(error),
                },
                // There, and no link.
                Err(Errno::INVAL) => reached.push(&part),
                Err(error) => return Err(error),
            },
        }
        current = open_inside(&root, &reached, OFlags::PATH | OFlags::DIRECTORY | OFlags::NOFOLLOW)?;
    }
    Ok(current)
}

/// What a mount is put on: a directory, or a file for a source that is none.
fn target(root: impl AsFd, path: &Path, directory: bool) -> Result<OwnedFd, Errno> {
    match open_inside(&root, path, OFlags::PATH) {
        Err(Errno::NOENT) if directory => directory_inside(&root, path),
        Err(Errno::NOENT) => {
            let parent = directory_inside(&root, path.parent().unwrap_or(Path::new("/")))?;
            let name = path.file_name().ok_or(Errno::ISDIR)?;
            let flags = OFlags::CREATE | OFlags::EXCL | OFlags::NOFOLLOW | OFlags::WRONLY | OFlags::CLOEXEC;
            rustix::fs::openat(&parent, name, flags, Mode::from_raw_mode(0o644))?;
            open_inside(&root, path, OFlags::PATH)
        }
        opened => opened,
    }
}

/// A copy of what is mounted at `source`.
fn copy_of(source: &Path, recursive: bool) -> Result<OwnedFd, Errno> {
    let mut flags = OpenTreeFlags::OPEN_TREE_CLONE | OpenTreeFlags::OPEN_TREE_CLOEXEC;
    flags.set(OpenTreeFlags::AT_RECURSIVE, recursive);
    rustix::mount::open_tree(CWD, source, flags)
}

/// The same of an open file or directory.
pub(crate) fn copy_of_open(source: impl AsFd, recursive: bool) -> Result<OwnedFd, Errno> {
    let mut flags =
        OpenTreeFlags::OPEN_TREE_CLONE | OpenTreeFlags::OPEN_TREE_CLOEXEC | OpenTreeFlags::AT_EMPTY_PATH;
    flags.set(OpenTreeFlags::AT_RECURSIVE, recursive);
    rustix::mount::open_tree(source, "", flags)
}

/// Puts a detached mount on an open file or directory.
pub(crate) fn attach(mount: impl AsFd, target: impl AsFd) -> Result<(), Errno> {
    let flags = MoveMountFlags::MOVE_MOUNT_F_EMPTY_PATH | MoveMountFlags::MOVE_MOUNT_T_EMPTY_PATH;
    rustix::mount::move_mount(mount.as_fd(), "", target.as_fd(), "", flags)
}

/// A new file system, not mounted anywhere yet.
pub(crate) fn new_filesystem(
    kind: &str,
    source: &Path,
    data: &[String],
    attributes: u64,
) -> Result<OwnedFd, std::io::Error> {
    use rustix::mount::{fsconfig_create, fsconfig_set_flag, fsconfig_set_string, fsmount, fsopen};
    let context = fsopen(kind, FsOpenFlags::FSOPEN_CLOEXEC)?;
    let made = (|| {
        if !source.as_os_str().is_empty() {
            fsconfig_set_string(context.as_fd(), "source", source)?;
        }
        for option in data {
            match option.split_once('=') {
                Some((key, value)) => fsconfig_set_string(context.as_fd(), key, value)?,
                None => fsconfig_set_flag(context.as_fd(), option.as_str())?,
            }
        }
        fsconfig_create(context.as_fd())?;
        let attributes = MountAttrFlags::from_bits_retain(u32::try_from(attributes).unwrap_or_default());
        fsmount(context.as_fd(), FsMountFlags::FSMOUNT_CLOEXEC, attributes)
    })();
    made.map_err(|error: Errno| said_by(&context).map_or_else(|| error.into(), std::io::Error::other))
}

/// The kernel's own words about a refused file system (fsopen(2): messages are read from the context).
fn said_by(context: &OwnedFd) -> Option<String> {
    let mut text = [0; 256];
    let length = rustix::io::read(context, &mut text).ok()?;
    let text = String::from_utf8_lossy(&text[..length]);
    // "e " for errors, "w " for warnings.
    Some(text.trim().trim_start_matches("e ").to_owned()).filter(|text| !text.is_empty())
}

/// A copy of what a bind shows.
pub(crate) fn source(plan: &MountPlan) -> Step<Option<OwnedFd>> {
    let failed = || format!("mount {} at {}", what(plan), plan.destination.display());
    let copied = || {
        if !plan.linkless {
            return copy_of(&plan.source, plan.options.recursive);
        }
        let flags = OFlags::PATH | OFlags::CLOEXEC;
        let found = rustix::fs::openat2(CWD, &plan.source, flags, Mode::empty(), ResolveFlags::NO_SYMLINKS)?;
        copy_of_open(found, plan.options.recursive)
    };
    plan.options.bind.then(|| copied().during(failed)).transpose()
}

/// Makes one mount of a container below `root`; of a bind that is the `source`.
pub(crate) fn mount(root: BorrowedFd<'_>, plan: &MountPlan, source: Option<OwnedFd>) -> Step {
    let place = || plan.destination.display();
    let failed = || format!("mount {} at {}", what(plan), place());
    let options = &plan.options;
    let (detached, directory) = if let Some(copy) = source {
        let kind = FileType::from_raw_mode(rustix::fs::fstat(&copy).during(failed)?.st_mode);
        let attributes =
            MountAttributes { set: options.set, clear: clearable(&copy, options), ..Default::default() };
        change(&copy, false, attributes).during(failed)?;
        (copy, kind == FileType::Directory)
    } else {
        let kind = if plan.kind == "cgroup" { "cgroup2" } else { plan.kind.as_str() };
        let made = new_filesystem(kind, &plan.source, &options.data, options.set).during(failed)?;
        (made, true)
    };
    let all = MountAttributes { set: options.set_all, clear: options.clear_all, ..Default::default() };
    change(&detached, true, all).during(failed)?;
    let target =
        target(root, &plan.destination, directory).during(|| format!("make the mount point {}", place()))?;
    attach(&detached, &target).during(failed)?;
    if let Some((propagation, recursive)) = options.propagation {
        set_propagation(&detached, propagation, recursive).during(failed)?;
    }
    Ok(())
}

fn what(plan: &MountPlan) -> String {
    if plan.options.bind { plan.source.display().to_string() } else { plan.kind.clone() }
}

/// Of what a bind's options would take away, what it has: a flag that is locked by a user namespace above (mount_namespaces(7)) cannot be
/// cleared, and asking for it to be clear where it is clear is no wish.
fn clearable(mount: &OwnedFd, options: &crate::options::Options) -> u64 {
    let times = options.clear & attribute::ATIME_MASK;
    let Ok(state) = rustix::fs::fstatvfs(mount) else { return options.clear };
    let has = [
        (StatVfsMountFlags::RDONLY, attribute::RDONLY),
        (StatVfsMountFlags::NOSUID, attribute::NOSUID),
        (StatVfsMountFlags::NODEV, attribute::NODEV),
        (StatVfsMountFlags::NOEXEC, attribute::NOEXEC),
    ];
    let present =
        has.iter().filter(|(flag, _)| state.f_flag.contains(*flag)).fold(0, |all, (_, bit)| all | bit);
    options.clear & present | times
}

fn change(mount: &OwnedFd, recursive: bool, attributes: MountAttributes) -> std::io::Result<()> {
    if attributes.set == 0 && attributes.clear == 0 {
        return Ok(());
    }
    sys::mount_setattr(mount.as_fd(), recursive, attributes)
}

/// Sets how a mount passes on events.
pub(crate) fn set_propagation(
    mount: impl AsFd,
    propagation: Propagation,
    recursive: bool,
) -> std::io::Result<()> {
    let propagation = match propagation {
        Propagation::Private => libc::MS_PRIVATE,
        Propagation::Shared => libc::MS_SHARED,
        Propagation::Slave => libc::MS_SLAVE,
        Propagation::Unbindable => libc::MS_UNBINDABLE,
    };
    sys::mount_setattr(mount.as_fd(), recursive, MountAttributes { propagation, ..Default::default() })
}

/// Makes a mount read-only, alone.
pub(crate) fn make_read_only(mount: impl AsFd) -> std::io::Result<()> {
    sys::mount_setattr(mount.as_fd(), false, MountAttributes { set: attribute::RDONLY, ..Default::default() })
}

/// Makes `root` the root of this mount namespace and lets everything else go.
pub(crate) fn pivot(root: impl AsFd) -> Step {
    let failed = || "make the container's file system the root".to_owned();
    let old = rustix::fs::open("/", OFlags::PATH | OFlags::DIRECTORY | OFlags::CLOEXEC, Mode::empty())
        .during(failed)?;
    rustix::process::fchdir(&root).during(failed)?;
    // The old root ends up on top of the new one, where it can be let go (pivot_root(2), "pivot_root(".", ".")").
    rustix::process::pivot_root(".", ".").during(failed)?;
    rustix::process::fchdir(&old).during(failed)?;
    // What is unmounted here must not be unmounted for the caller too.
    set_propagation(&old, Propagation::Slave, true).during(failed)?;
    rustix::mount::unmount(".", UnmountFlags::DETACH).during(failed)?;
    rustix::process::chdir("/").during(failed)
}

/// Writes a sysctl of the container's namespaces.
pub(crate) fn write_sysctl(name: &str, value: &str) -> Step {
    let path = Path::new("/proc/sys").join(name);
    let failed = || format!("set sysctl {name} to {value:?}");
    let mut file = File::options().write(true).open(&path).during(failed)?;
    file.write_all(value.as_bytes()).during(failed)
}

/// Whether something is there, and what.
pub(crate) fn kind_of(root: impl AsFd, path: &Path) -> Option<(OwnedFd, FileType)> {
    let opened = open_inside(root, path, OFlags::PATH).ok()?;
    let status = rustix::fs::statat(&opened, "", AtFlags::EMPTY_PATH).ok()?;
    Some((opened, FileType::from_raw_mode(status.st_mode)))
}
