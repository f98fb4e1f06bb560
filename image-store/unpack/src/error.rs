//! What can go wrong, sorted by who is to blame: the layer, the disk, the system, the sender.

use std::ffi::OsStr;
use std::io;
use std::os::unix::ffi::OsStrExt;
use std::path::PathBuf;

use rustix::io::Errno;

use crate::stream::SourceFailed;

/// Who is to blame, for callers that decide whether to retry, collect garbage or refuse the image.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum UnpackErrorKind {
    /// The layer is damaged or hostile; unpacking it again gives the same error.
    Corrupt,
    /// No blocks, inodes or quota are left on the file system of the target.
    Full,
    /// A system call failed for a reason that the layer did not give.
    System,
    /// The reader that was passed in failed; the bytes themselves were not at fault.
    Source,
}

/// Why a layer was refused or could not be written.
#[derive(Debug, thiserror::Error)]
pub enum UnpackError {
    /// The tar is damaged, hostile, or asks for more than the limits allow.
    #[error("refuse tar entry '{name}' near byte {offset} of the layer", name = .path.as_os_str().as_bytes().escape_ascii())]
    Corrupt {
        /// Name of the entry as the tar gives it; empty if it was not known yet.
        path: PathBuf,
        /// Position in the uncompressed tar, in bytes, up to which it was read.
        offset: u64,
        /// What is wrong.
        #[source]
        fault: Fault,
    },
    /// The compressed stream is damaged or ends early.
    #[error("decompress the layer")]
    Decompress {
        /// What the decompressor found.
        #[source]
        source: io::Error,
    },
    /// No room on the target's file system.
    #[error("{action} '{name}': no room", name = .path.as_os_str().as_bytes().escape_ascii())]
    Full {
        /// What was attempted.
        action: &'static str,
        /// Name of the entry, relative to the target.
        path: PathBuf,
        /// ENOSPC or EDQUOT.
        #[source]
        source: io::Error,
    },
    /// A system call failed.
    #[error("{action} '{name}'", name = .path.as_os_str().as_bytes().escape_ascii())]
    System {
        /// What was attempted.
        action: &'static str,
        /// Name of the entry, relative to the target.
        path: PathBuf,
        /// What the kernel answered.
        #[source]
        source: io::Error,
    },
    /// The reader that delivers the layer failed.
    #[error("read the layer")]
    Source {
        /// What the reader answered, unchanged.
        #[source]
        source: io::Error,
    },
}

/// What is wrong with a tar.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum Fault {
    /// The stream ends inside a header or inside content.
    #[error("the stream ends early")]
    Truncated,
    /// The header's checksum does not match.
    #[error("header checksum mismatch")]
    Checksum,
    /// A numeric field is not a number, or does not fit.
    #[error("{0} is not a valid number")]
    Number(&'static str),
    /// A zero block is followed by something that is neither zero nor the end.
    #[error("lone zero block")]
    LoneZeroBlock,
    /// A type flag that no container layer has a use for.
    #[error("entry type {0:#04x} is not supported")]
    EntryType(u8),
    /// An extended header or long name with no entry after it.
    #[error("extended header without an entry")]
    Dangling,
    /// A malformed pax record.
    #[error("malformed pax record")]
    Pax,
    /// A name, header, list or value is longer than what is accepted.
    #[error("{what} is larger than {limit}")]
    TooLarge {
        /// What is too large.
        what: &'static str,
        /// The bound, in bytes or pieces.
        limit: u64,
    },
    /// A name that cannot be placed below the target.
    #[error("name has a '..', a NUL, or nothing in it")]
    Name,
    /// A reserved `.wh.` name that is no whiteout.
    #[error("malformed whiteout name")]
    Whiteout,
    /// The target's root, or a directory, where something else is needed.
    #[error("{0}")]
    Misplaced(&'static str),
    /// A sparse map with holes out of order, overlapping, or not matching the stored data.
    #[error("invalid sparse map")]
    Sparse,
    /// The kernel refuses the name or the way to it.
    #[error("{action} is impossible")]
    Unplaceable {
        /// What was attempted.
        action: &'static str,
        /// What the kernel answered: ELOOP, ENAMETOOLONG, ENOTDIR or ENOENT.
        #[source]
        source: Errno,
    },
    /// An extended attribute with a value or size the file system refuses.
    #[error("extended attribute does not fit or has an invalid value")]
    Xattr,
}

impl UnpackError {
    /// Who is to blame.
    pub fn kind(&self) -> UnpackErrorKind {
        match self {
            Self::Corrupt { .. } | Self::Decompress { .. } => UnpackErrorKind::Corrupt,
            Self::Full { .. } => UnpackErrorKind::Full,
            Self::System { .. } => UnpackErrorKind::System,
            Self::Source { .. } => UnpackErrorKind::Source,
        }
    }

    /// Whether the disk (or a quota) was full, so that the same layer may succeed after making room.
    pub fn is_full(&self) -> bool {
        self.kind() == UnpackErrorKind::Full
    }
}

/// A failure on its way up, before the entry's name and the offset are known.
#[derive(Debug)]
pub(crate) enum Failure {
    Fault(Fault),
    Stream(io::Error),
    System(&'static str, Errno),
}

pub(crate) type Result<T> = std::result::Result<T, Failure>;

impl From<Fault> for Failure {
    fn from(fault: Fault) -> Self {
        Self::Fault(fault)
    }
}

impl Failure {
    /// Sorts a system call's answer. What only the layer's own names and links can cause is the layer's fault.
    pub(crate) fn call(action: &'static str) -> impl FnOnce(Errno) -> Self + use<> {
        move |source| match source {
            Errno::LOOP | Errno::NAMETOOLONG | Errno::NOTDIR | Errno::NOENT => {
                Self::Fault(Fault::Unplaceable { action, source })
            }
            _ => Self::System(action, source),
        }
    }

    pub(crate) fn at(self, path: &[u8], offset: u64) -> UnpackError {
        let path = PathBuf::from(OsStr::from_bytes(path));
        match self {
            Self::Fault(fault) => UnpackError::Corrupt { path, offset, fault },
            Self::System(action, errno @ (Errno::NOSPC | Errno::DQUOT)) => {
                UnpackError::Full { action, path, source: errno.into() }
            }
            Self::System(action, errno) => UnpackError::System { action, path, source: errno.into() },
            Self::Stream(error) => match error.downcast::<SourceFailed>() {
                Ok(SourceFailed(source)) => UnpackError::Source { source },
                Err(source) => match source.downcast::<Fault>() {
                    Ok(fault) => UnpackError::Corrupt { path, offset, fault },
                    Err(source) => UnpackError::Decompress { source },
                },
            },
        }
    }
}
