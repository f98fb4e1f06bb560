//! Writing entries: what each kind becomes, and what happens to what was there.

use std::ffi::OsStr;
use std::io;
use std::os::fd::{AsFd, BorrowedFd};
use std::os::unix::ffi::OsStrExt;

use rustix::fs::{
    AtFlags, FileType, Mode, OFlags, Stat, ftruncate, linkat, makedev, mkdirat, mknodat, openat, statat,
    symlinkat, unlinkat,
};
use rustix::io::Errno;

use crate::Limits;
use crate::attributes::Attributes;
use crate::chunks::{Chunks, Stop};
use crate::error::{NameProblem, UnpackError, shown};
use crate::name::{Meaning, Place, meaning, place};
use crate::remove::remove_tree;
use crate::tar::{Entry, Kind, Reader, Segment};
use crate::tree::{Tree, joined};

const DISK_BLOCK: u64 = 4096;

/// What came of a tar.
#[derive(Debug)]
pub(crate) struct Written {
    /// Of the whole tar, in hex.
    pub(crate) hash: String,
    pub(crate) size: u64,
    pub(crate) allocated: u64,
    pub(crate) inodes: u64,
}

/// Reads the whole tar and makes what it says below `target`.
pub(crate) fn extract(chunks: Chunks<'_>, target: BorrowedFd<'_>, limits: Limits) -> Result<Written, Stop> {
    let mut extraction = Extraction {
        reader: Reader::new(chunks),
        tree: Tree::new(target, limits),
        limits,
        entries: 0,
        asked: 0,
        size: 0,
        allocated: 0,
    };
    while let Some(entry) = extraction.reader.next()? {
        extraction.entry(entry)?;
    }
    let Extraction { reader, tree, size, mut allocated, .. } = extraction;
    let inodes = tree.inodes();
    allocated += tree.directories() * DISK_BLOCK;
    tree.finish()?;
    let hash = reader.finish()?;
    Ok(Written { hash, size, allocated, inodes })
}

struct Extraction<'o, 't> {
    reader: Reader<'o>,
    tree: Tree<'t>,
    limits: Limits,
    entries: u64,
    /// Sum of file sizes, with holes.
    asked: u64,
    size: u64,
    allocated: u64,
}

impl Extraction<'_, '_> {
    fn entry(&mut self, mut entry: Entry) -> Result<(), Stop> {
        self.entries += 1;
        if self.entries > self.limits.entries {
            return Err(UnpackError::Limit { what: "entries", limit: self.limits.entries }.into());
        }
        match meaning(&entry.name)? {
            Meaning::Root if entry.kind == Kind::Directory => {
                let attributes = Attributes::of(&mut entry);
                self.tree.keep(Vec::new(), attributes, false)?;
            }
            Meaning::Root => return Err(UnpackError::name(&entry.name, NameProblem::Root).into()),
            Meaning::Below(place) => self.make(&place, entry)?,
            Meaning::Whiteout(place) => self.whiteout(&place, &entry.name)?,
            Meaning::Opaque(directory) => {
                let path = self.tree.parent(&directory, &entry.name)?.path.clone();
                self.tree.keep_opaque(&path)?;
            }
            Meaning::Ignored => {}
        }
        Ok(())
    }

    fn make(&mut self, place: &Place, mut entry: Entry) -> Result<(), Stop> {
        match entry.kind {
            Kind::Directory => Ok(self.directory(place, entry)?),
            Kind::HardLink => Ok(self.hard_link(place, &entry)?),
            Kind::File => self.file(place, entry),
            Kind::Symlink | Kind::CharDevice { .. } | Kind::BlockDevice { .. } | Kind::Fifo => {
                let attributes = Attributes::of(&mut entry);
                let kind = &entry.kind;
                let name = entry.name.as_slice();
                self.create(place, name, "make", |parent, base| node(parent, base, kind, &entry.link))
                    .map_err(|error| denied(error, kind))?;
                self.tree.made()?;
                let parent = self.tree.parent(place.parent(), name)?;
                let is_link = *kind == Kind::Symlink;
                attributes.set_at(parent.descriptor.as_fd(), place.base(), is_link, name)?;
                Ok(())
            }
        }
    }

    fn directory(&mut self, place: &Place, mut entry: Entry) -> Result<(), UnpackError> {
        let attributes = Attributes::of(&mut entry);
        let name = &entry.name;
        let parent = self.tree.parent(place.parent(), name)?;
        let path = joined(&parent.path, place.base(), name)?;
        let mut opaque = false;
        match mkdirat(&parent.descriptor, place.base(), Mode::RWXU) {
            Ok(()) => self.tree.made()?,
            Err(Errno::EXIST) => {
                let there = self.there(place, name)?;
                if there.as_ref().map(kind_of) != Some(FileType::Directory) {
                    // In the place of what the layer hides, the directory must not show what is below (layer.md:
                    // whiteouts hide lower layers only, whatever the order in the tar).
                    opaque = there.as_ref().is_some_and(is_whiteout);
                    self.clear(place, name)?;
                    let parent = self.tree.parent(place.parent(), name)?;
                    mkdirat(&parent.descriptor, place.base(), Mode::RWXU)
                        .map_err(UnpackError::write("make directory", name))?;
                    self.tree.made()?;
                }
            }
            Err(errno) => return Err(UnpackError::write("make directory", name)(errno)),
        }
        self.tree.keep(path, attributes, opaque)
    }

    fn file(&mut self, place: &Place, mut entry: Entry) -> Result<(), Stop> {
        self.asked = self.asked.saturating_add(entry.size);
        if self.asked > self.limits.bytes {
            return Err(UnpackError::Limit { what: "bytes", limit: self.limits.bytes }.into());
        }
        let attributes = Attributes::of(&mut entry);
        let name = &entry.name;
        let flags = OFlags::CREATE | OFlags::EXCL | OFlags::WRONLY | OFlags::NOFOLLOW | OFlags::CLOEXEC;
        let private = Mode::RUSR | Mode::WUSR;
        let file =
            self.create(place, name, "create file", |parent, base| openat(parent, base, flags, private))?;
        self.tree.made()?;
        match &entry.sparse {
            None => self.content(file.as_fd(), Segment { offset: 0, length: entry.size }, name)?,
            Some(map) => {
                ftruncate(&file, entry.size).map_err(UnpackError::write("set size of", name))?;
                for segment in map {
                    self.content(file.as_fd(), *segment, name)?;
                }
            }
        }
        attributes.set_on(file.as_fd(), name)?;
        Ok(())
    }

    /// Writes the next bytes of the tar to one part of a file.
    fn content(&mut self, file: BorrowedFd<'_>, segment: Segment, name: &[u8]) -> Result<(), Stop> {
        let mut offset = segment.offset;
        let end = segment.offset + segment.length;
        while offset < end {
            let piece = self.reader.data(end - offset)?;
            let mut rest = piece;
            while !rest.is_empty() {
                match rustix::io::pwrite(file, rest, offset) {
                    Ok(written) => {
                        rest = &rest[written..];
                        offset += written as u64;
                    }
                    Err(Errno::INTR) => {}
                    Err(errno) => return Err(UnpackError::write("write", name)(errno).into()),
                }
            }
        }
        self.size += segment.length;
        self.allocated += segment.length.next_multiple_of(DISK_BLOCK);
        Ok(())
    }

    fn hard_link(&mut self, place: &Place, entry: &Entry) -> Result<(), UnpackError> {
        let name = &entry.name;
        let missing = || UnpackError::LinkTarget { name: shown(name), target: shown(&entry.link) };
        // Read like the name of an entry: relative to the layer, never to the link.
        let Some(target) = self::place(&entry.link)? else {
            return Err(UnpackError::name(name, NameProblem::LinkToDirectory));
        };
        let directory = self.tree.existing(target.parent(), name)?.ok_or_else(missing)?;
        let stat = match statat(&directory, target.base(), AtFlags::SYMLINK_NOFOLLOW) {
            Ok(stat) => stat,
            Err(Errno::NOENT) => return Err(missing()),
            Err(errno) => return Err(UnpackError::write("look at the target of link", name)(errno)),
        };
        if kind_of(&stat) == FileType::Directory {
            return Err(UnpackError::name(name, NameProblem::LinkToDirectory));
        }
        if is_whiteout(&stat) {
            return Err(missing());
        }
        // A link to itself would otherwise remove its own target.
        if self.there(place, name)?.is_some_and(|there| there.st_ino == stat.st_ino) {
            return Ok(());
        }
        // Not following: a link to a symbolic link is a second name of the symbolic link.
        self.create(place, name, "make link", |parent, base| {
            linkat(&directory, target.base(), parent, base, AtFlags::empty())
        })
    }

    fn whiteout(&mut self, place: &Place, name: &[u8]) -> Result<(), UnpackError> {
        let parent = self.tree.parent(place.parent(), name)?;
        let path = joined(&parent.path, place.base(), name)?;
        match node(parent.descriptor.as_fd(), place.base(), &Kind::CharDevice { major: 0, minor: 0 }, b"") {
            Ok(()) => self.tree.made(),
            // What the layer itself has stays (layer.md); but a directory does not show what is below any more.
            Err(Errno::EXIST) => {
                if self.there(place, name)?.as_ref().map(kind_of) == Some(FileType::Directory) {
                    self.tree.keep_opaque(&path)?;
                }
                Ok(())
            }
            Err(Errno::PERM) => Err(UnpackError::DeviceNode { name: shown(name), major: 0, minor: 0 }),
            Err(errno) => Err(UnpackError::write("make whiteout", name)(errno)),
        }
    }

    /// Makes something new at `place`, instead of what is there.
    fn create<T>(
        &mut self,
        place: &Place,
        name: &[u8],
        operation: &'static str,
        make: impl Fn(BorrowedFd<'_>, &[u8]) -> Result<T, Errno>,
    ) -> Result<T, UnpackError> {
        let parent = self.tree.parent(place.parent(), name)?;
        let mut made = make(parent.descriptor.as_fd(), place.base());
        if matches!(made, Err(Errno::EXIST)) {
            self.clear(place, name)?;
            let parent = self.tree.parent(place.parent(), name)?;
            made = make(parent.descriptor.as_fd(), place.base());
        }
        made.map_err(UnpackError::write(operation, name))
    }

    /// Removes what is at `place`, with everything below it.
    fn clear(&mut self, place: &Place, name: &[u8]) -> Result<(), UnpackError> {
        let Some(there) = self.there(place, name)? else { return Ok(()) };
        let kind = kind_of(&there);
        let parent = self.tree.parent(place.parent(), name)?;
        let path = joined(&parent.path, place.base(), name)?;
        if kind == FileType::Directory {
            remove_tree(parent.descriptor.as_fd(), OsStr::from_bytes(place.base())).map_err(|error| {
                UnpackError::Write { operation: "replace directory", name: shown(name), source: error.source }
            })?;
        } else {
            unlinkat(&parent.descriptor, place.base(), AtFlags::empty())
                .map_err(UnpackError::write("replace", name))?;
        }
        if matches!(kind, FileType::Directory | FileType::Symlink) {
            self.tree.forget(&path);
        }
        Ok(())
    }

    /// What is at `place` now, whose parent exists.
    fn there(&mut self, place: &Place, name: &[u8]) -> Result<Option<Stat>, UnpackError> {
        let parent = self.tree.parent(place.parent(), name)?;
        match statat(&parent.descriptor, place.base(), AtFlags::SYMLINK_NOFOLLOW) {
            Ok(stat) => Ok(Some(stat)),
            Err(Errno::NOENT) => Ok(None),
            Err(errno) => Err(UnpackError::write("look at", name)(errno)),
        }
    }
}

/// Makes what has no content.
fn node(parent: BorrowedFd<'_>, base: &[u8], kind: &Kind, link: &[u8]) -> Result<(), Errno> {
    let private = Mode::RUSR | Mode::WUSR;
    match *kind {
        Kind::Symlink => symlinkat(link, parent, base),
        Kind::CharDevice { major, minor } => {
            mknodat(parent, base, FileType::CharacterDevice, private, makedev(major, minor))
        }
        Kind::BlockDevice { major, minor } => {
            mknodat(parent, base, FileType::BlockDevice, private, makedev(major, minor))
        }
        Kind::Fifo => mknodat(parent, base, FileType::Fifo, private, 0),
        Kind::File | Kind::HardLink | Kind::Directory => Err(Errno::INVAL),
    }
}

/// Says it clearly when it is the device that is not permitted.
fn denied(error: UnpackError, kind: &Kind) -> UnpackError {
    match (error, kind) {
        (
            UnpackError::Write { name, source, .. },
            &(Kind::CharDevice { major, minor } | Kind::BlockDevice { major, minor }),
        ) if source.kind() == io::ErrorKind::PermissionDenied => {
            UnpackError::DeviceNode { name, major, minor }
        }
        (error, _) => error,
    }
}

fn kind_of(stat: &Stat) -> FileType {
    FileType::from_raw_mode(stat.st_mode)
}

/// overlayfs' way to say that a name is hidden: a character device 0/0.
fn is_whiteout(stat: &Stat) -> bool {
    kind_of(stat) == FileType::CharacterDevice && stat.st_rdev == 0
}
