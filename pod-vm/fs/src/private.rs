//! Which files only the guest changes: those of containers' root file systems, mounts named `rootfs` in directories of the shared tree's top.
//! The host shows them to nobody else and leaves them alone, so what the guest knows of them stays true.
//!
//! What is known of a file stands in the number that the guest gets for it, in two bits that the file system behind never sees: a guest that
//! changes them only fools itself. They follow from the path that a file is found by, and are the same for every path to it, because a mount
//! is left by none of its files.

use std::time::Duration;

use virtiofsd::filesystem::{Entry, OpenOptions};
use virtiofsd::fuse::{ATTR_SUBMOUNT, ROOT_ID};

/// The name of private mounts.
const NAME: &[u8] = b"rootfs";

/// Only the guest changes it.
const PRIVATE: u64 = 1 << 63;
/// A directory of the tree's top.
const TOP: u64 = 1 << 62;

/// How long attributes of private files are true. Names are never given a time, also not here: with one the guest's kernel would keep files
/// that nobody uses, and this process with it.
const ALWAYS: Duration = Duration::from_secs(24 * 60 * 60);

/// The file's number for the file system behind.
pub(crate) fn plain(inode: u64) -> u64 {
    inode & !(PRIVATE | TOP)
}

/// The entry as the guest gets it that asked for `name` in `parent`.
pub(crate) fn entry(parent: u64, name: &[u8], mut entry: Entry) -> Entry {
    let mark = mark(parent, name, entry.attr.flags & ATTR_SUBMOUNT != 0);
    entry.inode |= mark;
    if mark & PRIVATE != 0 {
        entry.attr_timeout = ALWAYS;
    }
    entry
}

/// How long attributes of a file are true.
pub(crate) fn attributes_last(inode: u64) -> Duration {
    if inode & PRIVATE != 0 { ALWAYS } else { Duration::ZERO }
}

/// What opening a file comes to: data of a private one that the guest has cached stays.
pub(crate) fn open(inode: u64, options: OpenOptions) -> OpenOptions {
    if inode & PRIVATE != 0 { options | OpenOptions::KEEP_CACHE } else { options }
}

fn mark(parent: u64, name: &[u8], is_mount: bool) -> u64 {
    match (parent, is_mount) {
        (ROOT_ID, _) => TOP,
        (_, false) => parent & PRIVATE,
        (_, true) if parent & TOP != 0 && name == NAME => PRIVATE,
        (_, true) => 0,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// The number of what is at a path from the root; `*` stands before the names of mounts.
    fn number(path: &str) -> u64 {
        path.split('/').fold(ROOT_ID, |parent, name| {
            let (name, is_mount) = name.strip_prefix('*').map_or((name, false), |name| (name, true));
            7 | mark(parent, name.as_bytes(), is_mount)
        })
    }

    #[test]
    fn roots_of_containers_are_private() {
        for path in ["c/*rootfs", "*c/*rootfs", "*c/*rootfs/etc", "*c/*rootfs/etc/rootfs/x"] {
            assert!(number(path) & PRIVATE != 0, "{path}");
            assert_eq!(attributes_last(number(path)), ALWAYS);
            assert_eq!(open(number(path), OpenOptions::empty()), OpenOptions::KEEP_CACHE);
        }
    }

    #[test]
    fn everything_else_is_the_hosts_too() {
        for path in [
            "*rootfs",
            "c",
            "c/rootfs",
            "*c/mounts",
            "*c/mounts/*0",
            "*c/mounts/*rootfs",
            "*c/mounts/*0/*rootfs",
            "*c/*rootfs/*volume",
            "*c/*rootfs/*rootfs",
        ] {
            assert!(number(path) & PRIVATE == 0, "{path}");
            assert_eq!(attributes_last(number(path)), Duration::ZERO);
            assert_eq!(open(number(path), OpenOptions::empty()), OpenOptions::empty());
        }
    }

    #[test]
    fn the_file_system_behind_sees_its_own_numbers() {
        for path in ["*c/*rootfs", "*c", "*c/mounts"] {
            assert_eq!(plain(number(path)), 7);
        }
        assert_eq!(plain(ROOT_ID), ROOT_ID);
    }
}
