//! All that can be seen of a tree, to be compared.

use std::collections::{BTreeMap, HashMap};
use std::fs::{self, File};
use std::hash::{DefaultHasher, Hasher};
use std::io::{ErrorKind, Read};
use std::os::fd::{AsRawFd, OwnedFd};
use std::os::unix::ffi::{OsStrExt, OsStringExt};
use std::os::unix::fs::{FileTypeExt, MetadataExt};
use std::path::{Path, PathBuf};

/// What is seen of a file.
#[derive(Debug, PartialEq, Eq)]
pub(crate) struct Seen {
    pub(crate) mode: u32,
    pub(crate) owner: (u32, u32),
    pub(crate) mtime: (i64, i64),
    /// Of files and symlinks.
    pub(crate) size: u64,
    pub(crate) device: u64,
    pub(crate) xattrs: BTreeMap<Vec<u8>, Vec<u8>>,
    /// A hash of what is in it, or where it leads.
    pub(crate) content: u64,
    /// The first name of the same file.
    pub(crate) first_name: PathBuf,
}

/// Everything below a mounted file system's root.
pub(crate) fn see(mount: &OwnedFd) -> BTreeMap<PathBuf, Seen> {
    let root = PathBuf::from(format!("/proc/self/fd/{}/.", mount.as_raw_fd()));
    let mut tree = BTreeMap::new();
    let mut names = HashMap::new();
    let mut pending = vec![PathBuf::new()];
    while let Some(path) = pending.pop() {
        let full = root.join(&path);
        let stat = match fs::symlink_metadata(&full) {
            // overlayfs lists a whiteout with nothing below it, and then knows nothing of it.
            Err(error) if error.kind() == ErrorKind::NotFound => continue,
            stat => stat.unwrap_or_else(|error| panic!("{}: {error}", path.display())),
        };
        let kind = stat.file_type();
        if kind.is_dir() {
            let mut below: Vec<_> = fs::read_dir(&full)
                .expect("read")
                .map(|entry| entry.expect("an entry").file_name())
                .collect();
            // The first name comes first.
            below.sort_by(|a, b| b.cmp(a));
            let listed = below.len();
            below.dedup();
            assert_eq!(listed, below.len(), "{} has a name twice", path.display());
            pending.extend(below.iter().map(|name| path.join(name)));
        }
        let first_name = if kind.is_dir() {
            path.clone()
        } else {
            names.entry((stat.dev(), stat.ino())).or_insert_with(|| path.clone()).clone()
        };
        let seen = Seen {
            mode: stat.mode(),
            owner: (stat.uid(), stat.gid()),
            mtime: (stat.mtime(), stat.mtime_nsec()),
            size: if kind.is_file() || kind.is_symlink() { stat.len() } else { 0 },
            device: if kind.is_char_device() || kind.is_block_device() { stat.rdev() } else { 0 },
            xattrs: if kind.is_file() || kind.is_dir() { xattrs(&full) } else { BTreeMap::new() },
            content: if kind.is_file() {
                content(&full)
            } else if kind.is_symlink() {
                hash(fs::read_link(&full).expect("read").as_os_str().as_bytes())
            } else {
                0
            },
            first_name,
        };
        tree.insert(path, seen);
    }
    tree
}

/// The two must be the same; says where they differ.
pub(crate) fn assert_same(wanted: &BTreeMap<PathBuf, Seen>, found: &BTreeMap<PathBuf, Seen>) {
    for (path, seen) in wanted {
        assert_eq!(Some(seen), found.get(path), "{}", path.display());
    }
    for path in found.keys() {
        assert!(wanted.contains_key(path), "{} should not be there", path.display());
    }
}

fn hash(bytes: &[u8]) -> u64 {
    let mut hasher = DefaultHasher::new();
    hasher.write(bytes);
    hasher.finish()
}

/// Holes are passed over where both have them; the length is compared elsewhere.
fn content(path: &Path) -> u64 {
    let mut file = File::open(path).unwrap_or_else(|error| panic!("{}: {error}", path.display()));
    let mut hasher = DefaultHasher::new();
    let mut buffer = vec![0; 4096];
    let mut at = 0_u64;
    let mut left = file.metadata().expect("stat").len().min(64 << 20);
    while left > 0 {
        let length = buffer.len().min(usize::try_from(left).expect("a length"));
        file.read_exact(&mut buffer[..length]).expect("read");
        if buffer[..length].iter().any(|&byte| byte != 0) {
            hasher.write_u64(at);
            hasher.write(&buffer[..length]);
        }
        at += length as u64;
        left -= length as u64;
    }
    hasher.finish()
}

fn xattrs(path: &Path) -> BTreeMap<Vec<u8>, Vec<u8>> {
    let mut buffer = vec![0; 1 << 16];
    let length = rustix::fs::listxattr(path, &mut buffer[..]).expect("list attributes");
    let names = buffer[..length].split(|&byte| byte == 0).filter(|name| !name.is_empty());
    names
        .map(|name| {
            let mut value = vec![0; 1 << 16];
            let length = rustix::fs::getxattr(path, name, &mut value[..]).expect("read an attribute");
            (name.to_vec(), value[..length].to_vec())
        })
        .collect()
}

/// How many names are listed, of what is there and what is not.
pub(crate) fn listed(mount: &OwnedFd) -> usize {
    let mut count = 1;
    let mut pending = vec![PathBuf::from(format!("/proc/self/fd/{}/.", mount.as_raw_fd()))];
    while let Some(path) = pending.pop() {
        for entry in fs::read_dir(&path).expect("read") {
            let entry = entry.expect("an entry");
            count += 1;
            if entry.file_type().expect("a type").is_dir() {
                pending.push(entry.path());
            }
        }
    }
    count
}

/// A byte to fill a file with, another one for each of some.
pub(crate) fn filler(number: usize) -> u8 {
    u8::try_from(number % 251).expect("a byte")
}

/// A path of bytes.
pub(crate) fn path(bytes: &[u8]) -> PathBuf {
    std::ffi::OsString::from_vec(bytes.to_vec()).into()
}
