//! What an image says about a file.

use crate::inode;

/// In a map of chunks: nothing but zeros there.
pub const HOLE: u32 = u32::MAX;

/// A file of any kind.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Node {
    /// Permissions with setuid, setgid and sticky bits; not the type.
    pub mode: u16,
    /// Owner.
    pub uid: u32,
    /// Group.
    pub gid: u32,
    /// Last modification.
    pub mtime: Time,
    /// In the order in which they are listed.
    pub xattrs: Vec<Xattr>,
    /// The same for all names of one file in one layer; `None`: it has one name.
    pub link: Option<u32>,
    /// What it is.
    pub kind: Kind,
}

/// Since the epoch.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Time {
    /// May be negative.
    pub seconds: i64,
    /// Below 10⁹, counted from `seconds` on.
    pub nanoseconds: u32,
}

/// An extended attribute.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Xattr {
    /// With its prefix, like `user.name`.
    pub name: Vec<u8>,
    /// As getxattr(2) gives it.
    pub value: Vec<u8>,
}

/// Type of a file, with what only that type has.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Kind {
    /// Regular.
    File {
        /// Bytes, holes included.
        size: u64,
        /// Where they are in the data blob of the layer.
        content: Content,
    },
    /// Directory.
    Directory {
        /// Hides what the layers below have in it.
        opaque: bool,
    },
    /// Symbolic link.
    Symlink {
        /// Where it leads.
        to: Vec<u8>,
    },
    /// Character device.
    CharDevice {
        /// Below 2¹².
        major: u32,
        /// Below 2²⁰.
        minor: u32,
    },
    /// Block device.
    BlockDevice {
        /// Below 2¹².
        major: u32,
        /// Below 2²⁰.
        minor: u32,
    },
    /// Named pipe.
    Fifo,
    /// Socket.
    Socket,
    /// Hides what the layers below have under this name; has no owner, mode or time.
    Whiteout,
}

/// The content of a regular file.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Content {
    /// All of it, from this block of the data blob on; without meaning for an empty file.
    Plain {
        /// Counted from the beginning of the blob.
        block: u32,
    },
    /// In pieces of 2^`bits` blocks, the last one maybe shorter.
    Chunks {
        /// 0–31.
        bits: u8,
        /// First block of each in the data blob, or [`HOLE`].
        blocks: Vec<u32>,
    },
}

impl Default for Node {
    /// The root directory of an image without layers.
    fn default() -> Self {
        Self {
            mode: 0o755,
            uid: 0,
            gid: 0,
            mtime: Time::default(),
            xattrs: Vec::new(),
            link: None,
            kind: Kind::Directory { opaque: false },
        }
    }
}

impl Node {
    pub(crate) fn is_directory(&self) -> bool {
        matches!(self.kind, Kind::Directory { .. })
    }

    /// Whether an attribute of that name has a place in EROFS, and is an image's to set: labels and signatures are the node's.
    pub fn is_wanted(name: &[u8]) -> bool {
        inode::attribute(name).is_some_and(|(_, rest)| {
            name.starts_with(b"system.posix_acl_")
                || name == b"security.capability"
                || (name.starts_with(b"user.") && !rest.starts_with(b"overlay."))
        })
    }
}
