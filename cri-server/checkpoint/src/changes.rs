//! What a container has changed in its root file system, by its writable layer (kernel, overlayfs.rst): the layer's files as they are
//! seen through the mount, and the paths that it hides.
//!
//! Not whiteouts in the tar, as an image's layer has them: CRI-O and Podman unpack it as it is and then delete what is in the list.

use std::collections::{BTreeSet, HashMap};
use std::ffi::OsStr;
use std::fs::File;
use std::io::Write;
use std::os::fd::{AsRawFd, OwnedFd};
use std::os::unix::ffi::OsStrExt;
use std::path::{Path, PathBuf};

use rustix::fs::{
    AtFlags, Dir, FileType, Mode, OFlags, ResolveFlags, Stat, getxattr, listxattr, major, minor, open,
    openat2, readlinkat, statat,
};
use rustix::io::Errno;

use crate::tar::{Entry, Kind, Writer};
use crate::{ArchiveError, Cancel};

type Result<T> = std::result::Result<T, ArchiveError>;

/// A container's root file system and what it is made of.
#[derive(Debug, Clone)]
pub struct RootFs {
    /// Where it is mounted.
    pub mounted: PathBuf,
    /// The writable layer.
    pub upper: PathBuf,
    /// The image's layers.
    pub lower: Vec<PathBuf>,
    /// Paths from the root at which something else is mounted in the container.
    pub covered: BTreeSet<PathBuf>,
    /// Of its user namespace; `None`: the node's.
    pub ids: Option<Ids>,
}

/// Which ids of the node are a container's, from 0 on.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[allow(missing_docs)]
pub struct Ids {
    pub uids: (u32, u32),
    pub gids: (u32, u32),
}

impl Ids {
    /// `(first on the node, how many)`; others are nobody's.
    fn inside(id: u32, (first, length): (u32, u32)) -> u32 {
        const NOBODY: u32 = 65_534;
        id.checked_sub(first).filter(|id| *id < length).unwrap_or(NOBODY)
    }
}

/// Writes what the container has made or changed as a tar, and gives the paths of what it has deleted. Blocking.
pub fn changes(rootfs: &RootFs, output: impl Write, cancel: &Cancel) -> Result<Vec<PathBuf>> {
    let mut walk = Walk {
        rootfs,
        mounted: root(&rootfs.mounted)?,
        upper: root(&rootfs.upper)?,
        tar: Writer::new(output),
        linked: HashMap::new(),
        deleted: Vec::new(),
        cancel,
    };
    walk.upper(Path::new(""))?;
    let Walk { tar, mut deleted, .. } = walk;
    tar.finish().map_err(|error| ArchiveError::io("write changes of", &rootfs.mounted, error))?;
    deleted.sort();
    deleted.dedup();
    Ok(deleted)
}

fn root(path: &Path) -> Result<OwnedFd> {
    open(path, OFlags::PATH | OFlags::DIRECTORY | OFlags::CLOEXEC, Mode::empty())
        .map_err(|errno| ArchiveError::io("open", path, errno))
}

struct Walk<'a, W> {
    rootfs: &'a RootFs,
    mounted: OwnedFd,
    upper: OwnedFd,
    tar: Writer<W>,
    /// First path of files with several names, by their numbers.
    linked: HashMap<(u64, u64), PathBuf>,
    deleted: Vec<PathBuf>,
    cancel: &'a Cancel,
}

impl<W: Write> Walk<'_, W> {
    /// A directory of the writable layer.
    fn upper(&mut self, directory: &Path) -> Result<()> {
        for name in names(&self.upper, directory)? {
            self.cancel.check()?;
            let path = directory.join(&name);
            if self.is_covered(&path) {
                continue;
            }
            let Some((file, found)) = at(&self.upper, &path)? else { continue };
            let kind = FileType::from_raw_mode(found.st_mode);
            if is_whiteout(&file, kind, &found) {
                self.deleted.push(Path::new("/").join(path));
                continue;
            }
            if kind != FileType::Directory {
                self.add(&path)?;
                continue;
            }
            self.add(&path)?;
            // It has been moved here: its content is that of another directory of the image.
            let moved = mark(&file, "trusted.overlay.redirect").is_some();
            if moved || mark(&file, "trusted.overlay.opaque").as_deref() == Some(b"y") {
                self.hidden(&path)?;
            }
            if moved {
                self.everything(&path)?;
            } else {
                self.upper(&path)?;
            }
        }
        Ok(())
    }

    /// All of a directory as it is seen.
    fn everything(&mut self, directory: &Path) -> Result<()> {
        for name in names(&self.mounted, directory)? {
            self.cancel.check()?;
            let path = directory.join(&name);
            if !self.is_covered(&path) && self.add(&path)? == Some(FileType::Directory) {
                self.everything(&path)?;
            }
        }
        Ok(())
    }

    /// What the image has in a directory that hides all of it, and is not seen any more.
    fn hidden(&mut self, directory: &Path) -> Result<()> {
        let mut all = BTreeSet::new();
        for layer in &self.rootfs.lower {
            let layer = root(layer)?;
            if matches!(at(&layer, directory)?, Some((_, found)) if is_directory(&found)) {
                all.extend(names(&layer, directory)?);
            }
        }
        for name in all {
            let path = directory.join(name);
            match at(&self.mounted, &path)? {
                None => self.deleted.push(Path::new("/").join(path)),
                Some((_, found)) if is_directory(&found) => self.hidden(&path)?,
                Some(_) => {}
            }
        }
        Ok(())
    }

    fn is_covered(&self, path: &Path) -> bool {
        self.rootfs.covered.contains(&Path::new("/").join(path))
    }

    /// One entry, as it is seen; what it is, unless it is gone or nothing that a tar can hold.
    fn add(&mut self, path: &Path) -> Result<Option<FileType>> {
        let failed =
            |operation, error: std::io::Error| ArchiveError::io(operation, Path::new("/").join(path), error);
        let Some((file, found)) = at(&self.mounted, path)? else { return Ok(None) };
        let kind = FileType::from_raw_mode(found.st_mode);
        let device = (major(found.st_rdev), minor(found.st_rdev));
        let mut target = Vec::new();
        let names =
            (kind != FileType::Directory && found.st_nlink > 1).then_some((found.st_dev, found.st_ino));
        let first = names.and_then(|file| self.linked.get(&file).cloned());
        let kind_in_tar = match (kind, &first) {
            (_, Some(first)) => {
                target.extend_from_slice(first.as_os_str().as_bytes());
                Kind::Hardlink(&target)
            }
            (FileType::Directory, _) => Kind::Directory,
            (FileType::RegularFile, _) => Kind::File(u64::try_from(found.st_size).unwrap_or_default()),
            (FileType::Symlink, _) => {
                let read = readlinkat(&file, "", Vec::new());
                target.extend_from_slice(read.map_err(|errno| failed("read link", errno.into()))?.to_bytes());
                Kind::Symlink(&target)
            }
            (FileType::CharacterDevice, _) => Kind::Character(device.0, device.1),
            (FileType::BlockDevice, _) => Kind::Block(device.0, device.1),
            (FileType::Fifo, _) => Kind::Fifo,
            // The program that listens makes it anew.
            (FileType::Socket | FileType::Unknown, _) => return Ok(None),
        };
        let ids = self.rootfs.ids;
        let entry = Entry {
            path: path.as_os_str().as_bytes(),
            kind: kind_in_tar,
            mode: found.st_mode,
            uid: ids.map_or(found.st_uid, |ids| Ids::inside(found.st_uid, ids.uids)),
            gid: ids.map_or(found.st_gid, |ids| Ids::inside(found.st_gid, ids.gids)),
            modified: found.st_mtime,
            attributes: if first.is_none() { attributes(&file) } else { Vec::new() },
        };
        let written = if matches!(entry.kind, Kind::File(_)) {
            // The same file, whatever its name leads to by now.
            let content = File::open(name_of(&file)).map_err(|error| failed("open", error))?;
            self.tar.entry(&entry, content)
        } else {
            self.tar.entry(&entry, std::io::empty())
        };
        match written {
            Err(error) if error.kind() == std::io::ErrorKind::UnexpectedEof => {
                Err(ArchiveError::Changed { path: Path::new("/").join(path) })
            }
            Err(error) => Err(failed("write", error)),
            Ok(()) => {
                if let Some(file) = names {
                    self.linked.entry(file).or_insert_with(|| path.to_owned());
                }
                Ok(Some(kind))
            }
        }
    }
}

/// A mark of overlayfs' own.
fn mark(file: &OwnedFd, name: &str) -> Option<Vec<u8>> {
    let mut value = vec![0; 4096];
    let length = getxattr(name_of(file), name, &mut value[..]).ok()?;
    value.truncate(length);
    Some(value)
}

fn is_directory(found: &Stat) -> bool {
    FileType::from_raw_mode(found.st_mode) == FileType::Directory
}

/// In either of its forms.
fn is_whiteout(file: &OwnedFd, kind: FileType, found: &Stat) -> bool {
    match kind {
        FileType::CharacterDevice => found.st_rdev == 0,
        FileType::RegularFile => {
            found.st_size == 0
                && getxattr(name_of(file), "trusted.overlay.whiteout", &mut [0_u8; 1][..]).is_ok()
        }
        _ => false,
    }
}

/// What is at a path below `root`, a link itself; `None`: nothing, or not by directories alone.
fn at(root: &OwnedFd, path: &Path) -> Result<Option<(OwnedFd, Stat)>> {
    let resolve = ResolveFlags::BENEATH | ResolveFlags::NO_SYMLINKS | ResolveFlags::NO_MAGICLINKS;
    let flags = OFlags::PATH | OFlags::NOFOLLOW | OFlags::CLOEXEC;
    let failed = |errno| ArchiveError::io("look at", Path::new("/").join(path), errno);
    let path_or_root = if path.as_os_str().is_empty() { Path::new(".") } else { path };
    // EAGAIN: a rename or mount somewhere in the system came in between (openat2(2)).
    let opened = loop {
        match openat2(root, path_or_root, flags, Mode::empty(), resolve) {
            Err(Errno::AGAIN) => {}
            Err(Errno::NOENT | Errno::NOTDIR | Errno::LOOP) => return Ok(None),
            opened => break opened.map_err(failed)?,
        }
    };
    let found = statat(&opened, "", AtFlags::EMPTY_PATH).map_err(failed)?;
    Ok(Some((opened, found)))
}

/// Names in a directory below `root`, sorted; none where it is gone.
fn names(root: &OwnedFd, directory: &Path) -> Result<BTreeSet<PathBuf>> {
    let Some((opened, found)) = at(root, directory)? else { return Ok(BTreeSet::new()) };
    if !is_directory(&found) {
        return Ok(BTreeSet::new());
    }
    let failed = |errno| ArchiveError::io("list", Path::new("/").join(directory), errno);
    let flags = OFlags::RDONLY | OFlags::DIRECTORY | OFlags::CLOEXEC;
    let listed = rustix::fs::openat(&opened, ".", flags, Mode::empty()).and_then(Dir::new).map_err(failed)?;
    let mut names = BTreeSet::new();
    for entry in listed {
        let entry = entry.map_err(failed)?;
        let name = entry.file_name().to_bytes();
        if !matches!(name, b"." | b"..") {
            names.insert(PathBuf::from(OsStr::from_bytes(name)));
        }
    }
    Ok(names)
}

/// What a restored file needs: neither overlayfs' own, nor labels and signatures, which belong to this node.
fn attributes(file: &OwnedFd) -> Vec<(Vec<u8>, Vec<u8>)> {
    let mut list = vec![0; 64 << 10];
    let Ok(length) = listxattr(name_of(file), &mut list[..]) else { return Vec::new() };
    let names = list[..length].split(|byte| *byte == 0).filter(|name| {
        let kept = name.starts_with(b"user.") || *name == b"security.capability";
        kept && !name.starts_with(b"user.overlay.")
    });
    names
        .filter_map(|name| {
            let mut value = vec![0; 64 << 10];
            let length = getxattr(name_of(file), name, &mut value[..]).ok()?;
            value.truncate(length);
            Some((name.to_vec(), value))
        })
        .collect()
}

/// A name that leads to what is open, and no further.
fn name_of(file: &OwnedFd) -> String {
    format!("/proc/self/fd/{}", file.as_raw_fd())
}
