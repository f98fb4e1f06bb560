//! Turns entries into inodes, and gives them owner, mode, attributes and times.

use std::collections::HashMap;
use std::io::Read;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};

use rustix::fs::{AtFlags, FileType, Gid, Mode, OFlags, SeekFrom, Timespec, Timestamps, Uid, XattrFlags};
use rustix::io::Errno;

use crate::Limits;
use crate::archive::{Archive, Entry, Kind, MAX_NAME, Metadata};
use crate::error::{Failure, Fault, Result};
use crate::names::{Place, Wish, link_target, wish};
use crate::sparse::Extent;
use crate::tree::Tree;

/// How much memory the metadata of directories, kept until the end, may take, in bytes.
const MAX_DEFERRED: usize = 128 << 20;

pub(crate) struct Unpacker<'a> {
    tree: Tree<'a>,
    limits: Limits,
    entries: u64,
    /// Sizes promised by the entries so far, holes included, against [`Limits::bytes`].
    promised: u64,
    written: u64,
    /// Directories get their metadata last: entries made in them would change their times, and a default ACL would be
    /// inherited by them. By inode number (0: the target), as links give a directory several names, of which the last
    /// entry counts; with the name that it was given last.
    directories: HashMap<u64, (Vec<u8>, Metadata)>,
    deferred: usize,
}

impl<'a> Unpacker<'a> {
    pub(crate) fn new(target: BorrowedFd<'a>, limits: Limits) -> Self {
        Self {
            tree: Tree::new(target, limits.entries),
            limits,
            entries: 0,
            promised: 0,
            written: 0,
            directories: HashMap::new(),
            deferred: 0,
        }
    }

    /// Bytes of content written.
    pub(crate) fn written(&self) -> u64 {
        self.written
    }

    /// Inodes made.
    pub(crate) fn inodes(&self) -> u64 {
        self.tree.inodes()
    }

    /// Places one entry; its content is next in `archive`.
    pub(crate) fn place<R: Read>(&mut self, entry: Entry, archive: &mut Archive<R>) -> Result<()> {
        self.entries += 1;
        if self.entries > self.limits.entries {
            let limit = self.limits.entries;
            return Err(Fault::TooLarge { what: "the number of entries", limit }.into());
        }
        if let Kind::File { size, .. } = entry.kind {
            self.promised = self.promised.saturating_add(size);
            if self.promised > self.limits.bytes {
                let limit = self.limits.bytes;
                return Err(Fault::TooLarge { what: "the sum of all file sizes", limit }.into());
            }
        }
        match wish(&entry.path)? {
            Wish::Nothing => Ok(()),
            Wish::Opaque(path) => self.tree.opaque(&path),
            Wish::Whiteout(place) => self.tree.whiteout(&place),
            Wish::Root if matches!(entry.kind, Kind::Directory) => self.defer(0, Vec::new(), entry.metadata),
            Wish::Root => Err(Fault::Misplaced("the root is not a directory").into()),
            Wish::Make(place) => self.make(&place, entry.kind, entry.metadata, archive),
        }
    }

    fn make<R: Read>(
        &mut self,
        place: &Place,
        kind: Kind,
        metadata: Metadata,
        archive: &mut Archive<R>,
    ) -> Result<()> {
        match kind {
            Kind::Directory => {
                let inode = self.tree.directory(place)?;
                self.defer(inode, place.path(), metadata)
            }
            Kind::File { size, extents } => {
                let flags =
                    OFlags::WRONLY | OFlags::CREATE | OFlags::EXCL | OFlags::NOFOLLOW | OFlags::CLOEXEC;
                let (_, file) = self.tree.make(place, "create file", |parent, name| {
                    rustix::fs::openat(parent, name, flags, Mode::RUSR | Mode::WUSR)
                })?;
                match extents {
                    None => self.write(&file, size, archive)?,
                    Some(extents) => self.write_sparse(&file, size, &extents, archive)?,
                }
                apply(&file, &metadata)
            }
            Kind::Symlink { to } => {
                if to.is_empty() || to.contains(&0) || to.len() >= MAX_NAME {
                    return Err(Fault::Misplaced("a symlink's target is empty or too long").into());
                }
                let (parent, ()) = self
                    .tree
                    .make(place, "make symlink", |parent, name| rustix::fs::symlinkat(&to, parent, name))?;
                apply_to_name(&parent, &place.name, &metadata, false)
            }
            Kind::HardLink { to } => self.tree.hard_link(&link_target(&to)?, place),
            Kind::Fifo => self.node(place, FileType::Fifo, 0, &metadata),
            Kind::CharDevice { major, minor } => {
                self.node(place, FileType::CharacterDevice, rustix::fs::makedev(major, minor), &metadata)
            }
            Kind::BlockDevice { major, minor } => {
                self.node(place, FileType::BlockDevice, rustix::fs::makedev(major, minor), &metadata)
            }
        }
    }

    fn node(&mut self, place: &Place, kind: FileType, device: u64, metadata: &Metadata) -> Result<()> {
        let (parent, ()) = self.tree.make(place, "make device node or fifo", |parent, name| {
            rustix::fs::mknodat(parent, name, kind, Mode::empty(), device)
        })?;
        apply_to_name(&parent, &place.name, metadata, true)
    }

    fn write<R: Read>(&mut self, file: &OwnedFd, length: u64, archive: &mut Archive<R>) -> Result<()> {
        let mut left = length;
        while left > 0 {
            let content = archive.content(left)?;
            if content.is_empty() {
                return Err(Fault::Truncated.into());
            }
            let count = match rustix::io::write(file, content) {
                Err(Errno::INTR) => continue,
                Ok(0) => return Err(Failure::System("write file", Errno::IO)),
                result => result.map_err(Failure::call("write file"))?,
            };
            archive.consume(count);
            left -= count as u64;
            self.written += count as u64;
        }
        Ok(())
    }

    fn write_sparse<R: Read>(
        &mut self,
        file: &OwnedFd,
        size: u64,
        extents: &[Extent],
        archive: &mut Archive<R>,
    ) -> Result<()> {
        rustix::fs::ftruncate(file, size).map_err(Failure::call("size sparse file"))?;
        for extent in extents.iter().filter(|extent| extent.length > 0) {
            rustix::fs::seek(file, SeekFrom::Start(extent.offset))
                .map_err(Failure::call("seek in sparse file"))?;
            self.write(file, extent.length, archive)?;
        }
        Ok(())
    }

    fn defer(&mut self, inode: u64, path: Vec<u8>, metadata: Metadata) -> Result<()> {
        let xattrs = metadata.xattrs.iter().map(|(name, value)| name.len() + value.len()).sum::<usize>();
        self.deferred += path.len() + xattrs + size_of::<Metadata>();
        if self.deferred > MAX_DEFERRED {
            let limit = MAX_DEFERRED as u64;
            return Err(Fault::TooLarge { what: "the names of all directories", limit }.into());
        }
        self.directories.insert(inode, (path, metadata));
        Ok(())
    }

    /// Gives the directories their metadata; the name of the one that fails comes with the failure.
    pub(crate) fn finish(&mut self) -> std::result::Result<(), (Vec<u8>, Failure)> {
        for (inode, (path, metadata)) in std::mem::take(&mut self.directories) {
            let flags = OFlags::RDONLY | OFlags::DIRECTORY | OFlags::NOFOLLOW;
            let directory = match self.tree.open(&path, flags) {
                Ok(directory) => directory,
                // A later entry has taken its place.
                Err(Errno::NOENT | Errno::NOTDIR | Errno::LOOP) => continue,
                Err(error) => return Err((path, Failure::call("open directory")(error))),
            };
            // Or the place of a link on the way to it.
            let is_same = |stat: rustix::fs::Stat| inode == 0 || stat.st_ino == inode;
            if !rustix::fs::fstat(&directory).is_ok_and(is_same) {
                continue;
            }
            apply(&directory, &metadata).map_err(|failure| (path, failure))?;
        }
        Ok(())
    }
}

fn times(mtime: Timespec) -> Timestamps {
    Timestamps { last_access: mtime, last_modification: mtime }
}

/// Order matters: chown(2) clears setuid bits and capabilities, chmod(2) rewrites an ACL's mask, and each step but the
/// last changes times.
fn apply(file: &OwnedFd, metadata: &Metadata) -> Result<()> {
    rustix::fs::fchown(file, Some(Uid::from_raw(metadata.uid)), Some(Gid::from_raw(metadata.gid)))
        .map_err(Failure::call("change the owner of"))?;
    rustix::fs::fchmod(file, Mode::from_raw_mode(metadata.mode))
        .map_err(Failure::call("change the mode of"))?;
    for (name, value) in &metadata.xattrs {
        if is_wanted(name) {
            set_xattr(file, name, value)?;
        }
    }
    rustix::fs::futimens(file, &times(metadata.mtime)).map_err(Failure::call("set the times of"))
}

/// For what cannot be opened: `name` was just made by us, and is no directory.
fn apply_to_name(parent: &OwnedFd, name: &[u8], metadata: &Metadata, has_mode: bool) -> Result<()> {
    let (uid, gid) = (Uid::from_raw(metadata.uid), Gid::from_raw(metadata.gid));
    rustix::fs::chownat(parent, name, Some(uid), Some(gid), AtFlags::SYMLINK_NOFOLLOW)
        .map_err(Failure::call("change the owner of"))?;
    if has_mode {
        rustix::fs::chmodat(parent, name, Mode::from_raw_mode(metadata.mode), AtFlags::empty())
            .map_err(Failure::call("change the mode of"))?;
    }
    rustix::fs::utimensat(parent, name, &times(metadata.mtime), AtFlags::SYMLINK_NOFOLLOW)
        .map_err(Failure::call("set the times of"))
}

/// Which attributes an image may set. Not `trusted.overlay.` (it steers overlayfs: redirects, opaque directories),
/// `user.overlay.` (the same for mounts with `userxattr`), nor labels and signatures (`security.selinux`,
/// `security.ima` and the like), which are the node's to give.
fn is_wanted(name: &[u8]) -> bool {
    match name {
        b"security.capability" | b"system.posix_acl_access" | b"system.posix_acl_default" => true,
        _ => name.starts_with(b"user.") && !name.starts_with(b"user.overlay."),
    }
}

fn set_xattr(file: &OwnedFd, name: &[u8], value: &[u8]) -> Result<()> {
    match rustix::fs::fsetxattr(file, name, value, XattrFlags::empty()) {
        // A file system without this kind of attribute: only a capability is worth failing for.
        Err(Errno::NOTSUP) if name != b"security.capability" => Ok(()),
        // EACCES: a default ACL on something that is no directory.
        Err(Errno::INVAL | Errno::RANGE | Errno::TOOBIG | Errno::ACCESS) => Err(Fault::Xattr.into()),
        // ext4 says ENOSPC also if the attributes are larger than what one inode may have.
        Err(Errno::NOSPC) if has_room(file.as_fd()) => Err(Fault::Xattr.into()),
        result => result.map_err(Failure::call("set an extended attribute of")),
    }
}

fn has_room(file: BorrowedFd<'_>) -> bool {
    rustix::fs::fstatvfs(file).is_ok_and(|stat| stat.f_bavail > 0)
}
