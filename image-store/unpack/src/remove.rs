//! Removes a tree of any depth without following links and without a path string.

use std::ffi::{CString, OsStr, OsString};
use std::io;
use std::os::fd::{BorrowedFd, OwnedFd};
use std::os::unix::ffi::OsStrExt;

use rustix::fs::{AtFlags, Dir, FileType, IFlags, Mode, OFlags, ResolveFlags};
use rustix::io::Errno;

/// Why a tree, or the rest of it, is still there.
#[derive(Debug, thiserror::Error)]
#[error("{action} '{name}' to remove the tree", name = .name.as_bytes().escape_ascii())]
pub struct RemoveError {
    action: &'static str,
    name: OsString,
    #[source]
    source: Errno,
}

impl RemoveError {
    /// What the kernel answered.
    pub fn errno(&self) -> Errno {
        self.source
    }
}

impl From<RemoveError> for io::Error {
    fn from(error: RemoveError) -> Self {
        Self::new(error.source.kind(), error)
    }
}

/// A directory on the way down: its own name in the one above, who it is, and those below it that are left to do.
struct Level {
    name: CString,
    identity: (u64, u64),
    directories: Vec<CString>,
    /// How often it was read again because something new had appeared in it.
    rereads: u32,
}

/// Removes `name`, one component, in `parent`, whatever it is, with everything below it. Missing is success. Links are
/// removed, not followed; a mount point below makes it fail with `EXDEV` or `EBUSY` and is left alone. No
/// more than four descriptors are open at a time, whatever the depth.
pub fn remove_tree(parent: BorrowedFd<'_>, name: &OsStr) -> Result<(), RemoveError> {
    let fail = |action: &'static str, name: &[u8]| {
        let name = OsStr::from_bytes(name).to_owned();
        move |source| RemoveError { action, name, source }
    };
    let bytes = name.as_bytes();
    if matches!(bytes, b"" | b"." | b"..") || bytes.contains(&b'/') {
        return Err(fail("accept the name", bytes)(Errno::INVAL));
    }
    let name = CString::new(bytes).map_err(|_| fail("accept the name", bytes)(Errno::INVAL))?;
    match unlink(parent, &name, AtFlags::empty()) {
        Ok(()) | Err(Errno::NOENT) => return Ok(()),
        Err(Errno::ISDIR) => {}
        Err(error) => return Err(fail("unlink", bytes)(error)),
    }
    let Some(mut current) = enter(parent, &name).map_err(fail("open directory", bytes))? else {
        return Ok(());
    };
    let identity = identity(&current).map_err(fail("look at directory", bytes))?;
    let directories = empty_of_files(&current).map_err(fail("empty directory", bytes))?;
    let mut levels = vec![Level { name, identity, directories, rereads: 0 }];
    while let Some(level) = levels.last_mut() {
        if let Some(name) = level.directories.pop() {
            match unlink(&current, &name, AtFlags::REMOVEDIR) {
                Ok(()) | Err(Errno::NOENT) => continue,
                Err(Errno::NOTEMPTY | Errno::EXIST) => {}
                Err(error) => return Err(fail("remove directory", name.as_bytes())(error)),
            }
            let entered = enter(&current, &name).map_err(fail("open directory", name.as_bytes()))?;
            let Some(below) = entered else { continue };
            let identity = self::identity(&below).map_err(fail("look at directory", name.as_bytes()))?;
            let directories = empty_of_files(&below).map_err(fail("empty directory", name.as_bytes()))?;
            current = below;
            levels.push(Level { name, identity, directories, rereads: 0 });
            continue;
        }
        let above = match levels.len().checked_sub(2).and_then(|index| levels.get(index)) {
            None => None,
            Some(above) => {
                let directory = open_directory(&current, c"..").map_err(fail("leave directory", b".."))?;
                // Somebody who moves directories about must not lead us out of the tree.
                if self::identity(&directory).map_err(fail("leave directory", b".."))? != above.identity {
                    return Err(fail("leave directory", above.name.as_bytes())(Errno::XDEV));
                }
                Some(directory)
            }
        };
        let Some(mut level) = levels.pop() else { break };
        let holder = above.as_ref().map_or(parent, std::os::fd::AsFd::as_fd);
        match unlink(holder, &level.name, AtFlags::REMOVEDIR) {
            Ok(()) | Err(Errno::NOENT) => {}
            // A file system may leave names out of a listing while names are being removed.
            Err(Errno::NOTEMPTY | Errno::EXIST) if level.rereads < 16 => {
                level.directories =
                    empty_of_files(&current).map_err(fail("empty directory", level.name.as_bytes()))?;
                level.rereads += 1;
                levels.push(level);
                continue;
            }
            Err(error) => return Err(fail("remove directory", level.name.as_bytes())(error)),
        }
        if let Some(above) = above {
            current = above;
        }
    }
    Ok(())
}

/// unlinkat(2), once more where `chattr +i` or `+a` forbade it: what a privileged container may have set must not keep its
/// files for ever.
fn unlink(parent: impl std::os::fd::AsFd, name: &std::ffi::CStr, flags: AtFlags) -> rustix::io::Result<()> {
    match rustix::fs::unlinkat(&parent, name, flags) {
        Err(Errno::PERM) if clear_flags(&parent, name) => rustix::fs::unlinkat(&parent, name, flags),
        result => result,
    }
}

/// Takes away what forbids to remove an entry, from it and from its directory. Says whether there was anything.
fn clear_flags(parent: impl std::os::fd::AsFd, name: &std::ffi::CStr) -> bool {
    let entry = rustix::fs::statat(&parent, name, AtFlags::SYMLINK_NOFOLLOW).ok().and_then(|stat| {
        // Only these have flags, and opening anything else may have effects.
        let kind = FileType::from_raw_mode(stat.st_mode);
        let flags = OFlags::RDONLY | OFlags::NOFOLLOW | OFlags::NONBLOCK | OFlags::CLOEXEC;
        matches!(kind, FileType::RegularFile | FileType::Directory)
            .then(|| rustix::fs::openat(&parent, name, flags, Mode::empty()).ok())
            .flatten()
    });
    let directory = open_directory(&parent, c".").ok();
    let mut changed = false;
    for file in entry.iter().chain(&directory) {
        let Ok(flags) = rustix::fs::ioctl_getflags(file) else { continue };
        let allowed = flags - IFlags::IMMUTABLE - IFlags::APPEND;
        changed |= allowed != flags && rustix::fs::ioctl_setflags(file, allowed).is_ok();
    }
    changed
}

fn open_directory(parent: impl std::os::fd::AsFd, name: &std::ffi::CStr) -> rustix::io::Result<OwnedFd> {
    let flags = OFlags::RDONLY | OFlags::DIRECTORY | OFlags::NOFOLLOW | OFlags::CLOEXEC;
    rustix::fs::openat(parent, name, flags, Mode::empty())
}

/// Opens a directory below; `None` if it is gone. A mount in its place is an error: it is somebody else's.
fn enter(parent: impl std::os::fd::AsFd, name: &std::ffi::CStr) -> rustix::io::Result<Option<OwnedFd>> {
    let flags = OFlags::RDONLY | OFlags::DIRECTORY | OFlags::NOFOLLOW | OFlags::CLOEXEC;
    let resolve = ResolveFlags::BENEATH | ResolveFlags::NO_SYMLINKS | ResolveFlags::NO_XDEV;
    loop {
        match rustix::fs::openat2(&parent, name, flags, Mode::empty(), resolve) {
            Ok(directory) => return Ok(Some(directory)),
            Err(Errno::NOENT) => return Ok(None),
            Err(Errno::AGAIN | Errno::INTR) => {}
            Err(error) => return Err(error),
        }
    }
}

fn identity(directory: &OwnedFd) -> rustix::io::Result<(u64, u64)> {
    rustix::fs::fstat(directory).map(|stat| (stat.st_dev, stat.st_ino))
}

/// Unlinks everything that is no directory; gives the directories.
fn empty_of_files(directory: &OwnedFd) -> rustix::io::Result<Vec<CString>> {
    let mut directories = Vec::new();
    for entry in Dir::read_from(directory)? {
        let entry = entry?;
        let name = entry.file_name();
        if matches!(name.to_bytes(), b"." | b"..") {
            continue;
        }
        if entry.file_type() != FileType::Directory {
            match unlink(directory, name, AtFlags::empty()) {
                Ok(()) | Err(Errno::NOENT) => continue,
                Err(Errno::ISDIR) => {}
                Err(error) => return Err(error),
            }
        }
        directories.push(name.to_owned());
    }
    Ok(directories)
}
