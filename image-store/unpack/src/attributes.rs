//! Owner, mode, extended attributes and times, set in the order in which the kernel does not undo them.

use std::os::fd::{AsRawFd, BorrowedFd};

use rustix::fs::{
    AtFlags, Gid, Mode, OFlags, Timespec, Timestamps, Uid, XattrFlags, chmodat, chownat, fchmod, fchown,
    fsetxattr, futimens, openat, setxattr, utimensat,
};
use rustix::io::Errno;

use crate::error::UnpackError;
use crate::tar::{Entry, Time};

/// What an inode gets besides its content.
#[derive(Debug, Default)]
pub(crate) struct Attributes {
    /// `None`: as it is.
    owner: Option<(u32, u32)>,
    mode: Option<u32>,
    mtime: Option<Time>,
    xattrs: Vec<(Vec<u8>, Vec<u8>)>,
}

impl Attributes {
    /// What the tar says, without the attributes that are ours alone.
    pub(crate) fn of(entry: &mut Entry) -> Self {
        let mut xattrs = std::mem::take(&mut entry.xattrs);
        xattrs.retain(|(name, _)| is_wanted(name));
        Self { owner: Some((entry.uid, entry.gid)), mode: Some(entry.mode), mtime: Some(entry.mtime), xattrs }
    }

    /// A directory that the layer uses but does not have. Always the same, so that a layer is the same everywhere.
    pub(crate) fn of_missing_parent() -> Self {
        Self { owner: Some((0, 0)), mode: Some(0o755), mtime: Some(Time::default()), xattrs: Vec::new() }
    }

    /// Leaves everything.
    pub(crate) fn unchanged() -> Self {
        Self::default()
    }

    /// Memory that extended attributes take, bytes.
    pub(crate) fn xattrs_size(&self) -> usize {
        self.xattrs.iter().map(|(name, value)| 64 + name.len() + value.len()).sum()
    }

    /// Sets everything on a file or directory. `name` is for errors.
    pub(crate) fn set_on(&self, file: BorrowedFd<'_>, name: &[u8]) -> Result<(), UnpackError> {
        // chown(2) takes set-user-id bits and capabilities away, so it comes first. Writing does too: content is
        // there already. Times come last.
        if let Some((uid, gid)) = self.owner {
            fchown(file, Some(Uid::from_raw(uid)), Some(Gid::from_raw(gid)))
                .map_err(UnpackError::write("set owner of", name))?;
        }
        if let Some(mode) = self.mode {
            fchmod(file, Mode::from_raw_mode(mode)).map_err(UnpackError::write("set mode of", name))?;
        }
        for (key, value) in &self.xattrs {
            match fsetxattr(file, key.as_slice(), value, XattrFlags::empty()) {
                // A file system without extended attributes: image-spec leaves that to us, and containerd goes on.
                Ok(()) | Err(Errno::OPNOTSUPP) => {}
                Err(errno) => return Err(xattr_failed(key, name)(errno)),
            }
        }
        if let Some(times) = self.times() {
            futimens(file, &times).map_err(UnpackError::write("set times of", name))?;
        }
        Ok(())
    }

    /// Sets everything on a link, device or fifo that was just made: `base` in `directory`.
    pub(crate) fn set_at(
        &self,
        directory: BorrowedFd<'_>,
        base: &[u8],
        is_link: bool,
        name: &[u8],
    ) -> Result<(), UnpackError> {
        if let Some((uid, gid)) = self.owner {
            let (uid, gid) = (Some(Uid::from_raw(uid)), Some(Gid::from_raw(gid)));
            chownat(directory, base, uid, gid, AtFlags::SYMLINK_NOFOLLOW)
                .map_err(UnpackError::write("set owner of", name))?;
        }
        if let Some(mode) = self.mode
            && !is_link
        {
            chmodat(directory, base, Mode::from_raw_mode(mode), AtFlags::empty())
                .map_err(UnpackError::write("set mode of", name))?;
        }
        if !self.xattrs.is_empty() {
            let flags = OFlags::PATH | OFlags::NOFOLLOW | OFlags::CLOEXEC;
            let inode =
                openat(directory, base, flags, Mode::empty()).map_err(UnpackError::write("open", name))?;
            // fsetxattr(2) wants an open file, and opening a device or fifo has effects. The path names our descriptor.
            let path = format!("/proc/self/fd/{}", inode.as_raw_fd());
            for (key, value) in &self.xattrs {
                match setxattr(path.as_str(), key.as_slice(), value, XattrFlags::empty()) {
                    // user.* exists for files and directories only (xattr(7)): EPERM.
                    Ok(()) | Err(Errno::OPNOTSUPP | Errno::PERM) => {}
                    Err(errno) => return Err(xattr_failed(key, name)(errno)),
                }
            }
        }
        if let Some(times) = self.times() {
            utimensat(directory, base, &times, AtFlags::SYMLINK_NOFOLLOW)
                .map_err(UnpackError::write("set times of", name))?;
        }
        Ok(())
    }

    fn times(&self) -> Option<Timestamps> {
        let time = self.mtime?;
        let time = Timespec { tv_sec: time.seconds, tv_nsec: time.nanoseconds.into() };
        Some(Timestamps { last_access: time, last_modification: time })
    }
}

/// An image has no say about what overlayfs does (`trusted.overlay.*`, and `user.overlay.*` in user namespaces), nor
/// about this machine's SELinux labels.
fn is_wanted(name: &[u8]) -> bool {
    !(name.starts_with(b"trusted.") || name.starts_with(b"user.overlay.") || name == b"security.selinux")
}

fn xattr_failed(key: &[u8], name: &[u8]) -> impl FnOnce(Errno) -> UnpackError + use<> {
    let subject = [key, b" of ", name].concat();
    move |errno| UnpackError::write("set extended attribute", &subject)(errno)
}
