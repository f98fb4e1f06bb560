//! A layer's directory, in the form that overlayfs takes, read once: its files into an index, their contents into a data blob. Nobody changes it
//! meanwhile. It is walked by descriptors and no link is followed, however deep it is.

use std::collections::HashMap;
use std::ffi::CString;
use std::fs::File;
use std::io::{self, Write};
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};

use rustix::fs::{AtFlags, Dir, FileType, Mode, OFlags, Stat, fstat, openat, readlinkat, statat};
use rustix::io::Errno;

use crate::ErofsError;
use crate::blob::{Blob, Place, content};
use crate::index::{IndexWriter, Summary};
use crate::node::{Kind, Node, Time, Xattr};

const OPAQUE: &str = "trusted.overlay.opaque";
/// The longest list of names and the longest value that Linux has.
const XATTR_MAX: usize = 64 << 10;
const OPEN: OFlags = OFlags::RDONLY.union(OFlags::NOFOLLOW).union(OFlags::CLOEXEC);
const DIRECTORY: OFlags = OPEN.union(OFlags::DIRECTORY);

/// Writes the index and the data blob of the layer in `tree`. `shares`: the blob's file system shares blocks between files. Nothing is synced.
///
/// Whiteouts and opaque directories are those of overlayfs; of the attributes only those are taken that an image may set. `data` is empty.
pub fn write_layer<W: Write>(
    tree: BorrowedFd<'_>,
    data: &File,
    index: W,
    shares: bool,
) -> Result<(W, Summary), ErofsError> {
    let mut walk = Walk {
        blob: Blob::new(data, shares),
        index: IndexWriter::new(index)?,
        links: HashMap::new(),
        buffer: vec![0; XATTR_MAX],
    };
    let mut current = openat(tree, c".", DIRECTORY, Mode::empty()).map_err(io::Error::from)?;
    let mut levels = vec![walk.enter(b"", &current)?];
    while let Some(level) = levels.last_mut() {
        if let Some(name) = level.pop() {
            let stat = statat(&current, &name, AtFlags::SYMLINK_NOFOLLOW).map_err(io::Error::from)?;
            if FileType::from_raw_mode(stat.st_mode) == FileType::Directory {
                current = openat(&current, &name, DIRECTORY, Mode::empty()).map_err(io::Error::from)?;
                levels.push(walk.enter(name.as_bytes(), &current)?);
            } else {
                walk.file(&current, &name, &stat)?;
            }
            continue;
        }
        walk.index.leave()?;
        levels.pop();
        if !levels.is_empty() {
            current = openat(&current, c"..", DIRECTORY, Mode::empty()).map_err(io::Error::from)?;
        }
    }
    let (blocks, digest) = walk.blob.finish()?;
    walk.index.finish(blocks, digest)
}

struct Walk<'a, W> {
    blob: Blob<'a>,
    index: IndexWriter<W>,
    /// Files with several names, by inode: their number here, and where their content is, if they have any.
    links: HashMap<u64, (u32, Option<Place>)>,
    buffer: Vec<u8>,
}

impl<W: Write> Walk<'_, W> {
    /// Adds a directory and says what is in it, the first name last.
    fn enter(&mut self, name: &[u8], directory: &OwnedFd) -> Result<Vec<CString>, ErofsError> {
        let stat = fstat(directory).map_err(io::Error::from)?;
        let mut node = Node { kind: Kind::Directory { opaque: Self::is_opaque(directory)? }, ..node(&stat) };
        node.xattrs = self.xattrs(directory)?;
        self.index.file(name, &node)?;
        let mut names = Vec::new();
        for entry in Dir::read_from(directory).map_err(io::Error::from)? {
            let name = entry.map_err(io::Error::from)?.file_name().to_owned();
            if !matches!(name.as_bytes(), b"." | b"..") {
                names.push(name);
            }
        }
        names.sort_unstable_by(|a, b| b.cmp(a));
        Ok(names)
    }

    /// Adds anything else.
    fn file(&mut self, directory: &OwnedFd, name: &CString, stat: &Stat) -> Result<(), ErofsError> {
        let mut node = node(stat);
        let known = (stat.st_nlink > 1).then(|| self.links.get(&stat.st_ino).copied()).flatten();
        let mut place = None;
        node.kind = match FileType::from_raw_mode(stat.st_mode) {
            FileType::RegularFile => {
                let file: File =
                    openat(directory, name, OPEN, Mode::empty()).map_err(io::Error::from)?.into();
                node.xattrs = self.xattrs(&file)?;
                let size = stat.st_size.cast_unsigned();
                let found = match known {
                    Some((_, Some(place))) => place,
                    _ => self.blob.append(&file, size)?,
                };
                place = Some(found);
                Kind::File { size, content: content(found, &file, size)? }
            }
            FileType::Symlink => Kind::Symlink {
                to: readlinkat(directory, name, Vec::new()).map_err(io::Error::from)?.into_bytes(),
            },
            FileType::CharacterDevice if stat.st_rdev == 0 => Kind::Whiteout,
            FileType::CharacterDevice => Kind::CharDevice {
                major: rustix::fs::major(stat.st_rdev),
                minor: rustix::fs::minor(stat.st_rdev),
            },
            FileType::BlockDevice => Kind::BlockDevice {
                major: rustix::fs::major(stat.st_rdev),
                minor: rustix::fs::minor(stat.st_rdev),
            },
            FileType::Fifo => Kind::Fifo,
            FileType::Socket => Kind::Socket,
            FileType::Directory | FileType::Unknown => {
                return Err(ErofsError::Damaged("a file of the layer has changed while it was read"));
            }
        };
        if stat.st_nlink > 1 && node.kind != Kind::Whiteout {
            let next = u32::try_from(self.links.len()).unwrap_or(u32::MAX);
            node.link = Some(self.links.entry(stat.st_ino).or_insert((next, place)).0);
        }
        self.index.file(name.as_bytes(), &node)
    }

    fn is_opaque(directory: &OwnedFd) -> io::Result<bool> {
        let mut value = [0; 2];
        match rustix::fs::fgetxattr(directory, OPAQUE, &mut value[..]) {
            Ok(length) => Ok(value.get(..length) == Some(b"y")),
            // A longer value is none that overlayfs knows.
            Err(Errno::NODATA | Errno::NOTSUP | Errno::RANGE) => Ok(false),
            Err(error) => Err(error.into()),
        }
    }

    fn xattrs(&mut self, file: impl AsFd) -> io::Result<Vec<Xattr>> {
        let length = match rustix::fs::flistxattr(&file, &mut self.buffer[..]) {
            Ok(0) | Err(Errno::NOTSUP) => return Ok(Vec::new()),
            result => result?,
        };
        let mut names: Vec<Vec<u8>> = self.buffer[..length]
            .split(|&byte| byte == 0)
            .filter(|name| Node::is_wanted(name))
            .map(<[u8]>::to_vec)
            .collect();
        names.sort_unstable();
        let mut xattrs = Vec::new();
        for name in names {
            let length = rustix::fs::fgetxattr(&file, name.as_slice(), &mut self.buffer[..])?;
            xattrs.push(Xattr { name, value: self.buffer[..length].to_vec() });
        }
        Ok(xattrs)
    }
}

/// Owner, mode and times.
fn node(stat: &Stat) -> Node {
    Node {
        mode: (stat.st_mode & 0o7777) as u16,
        uid: stat.st_uid,
        gid: stat.st_gid,
        mtime: Time {
            seconds: stat.st_mtime,
            nanoseconds: u32::try_from(stat.st_mtime_nsec).unwrap_or_default(),
        },
        ..Node::default()
    }
}
