//! What can go wrong with images, in kinds.

use std::path::PathBuf;
use std::sync::Arc;

use podvisor_erofs::ErofsError;
use podvisor_registry::RegistryError;
use podvisor_unpack::UnpackErrorKind;

/// What kind of failure it is: decides the answer's code and whether to try again.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum ErrorKind {
    /// No such image, here or in any registry that was asked.
    NotFound,
    /// A name that cannot be one.
    Invalid,
    /// Credentials are missing or were refused.
    Unauthorized,
    /// Configuration forbids it, or it is of a kind that podvisor does not run.
    Refused,
    /// Trying again later may help.
    Unavailable,
    /// The disk is full.
    Full,
    /// What came does not have the digest or size it should have, or is no archive.
    Corrupt,
    /// This machine's fault.
    Internal,
}

/// Why something about an image failed.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum ImageError {
    /// Two daemons on the same directories.
    #[error(
        "image store {root} is in use by another process: is another podvisor running on the same directories?"
    )]
    Locked {
        /// [`crate::Options::root`].
        root: PathBuf,
    },
    /// A file or directory of the store could not be used.
    #[error("cannot {operation} {path}")]
    Io {
        /// `make`, `rename to`, ...
        operation: &'static str,
        /// Which one.
        path: PathBuf,
        /// What the kernel said.
        source: std::io::Error,
    },
    /// The database cannot be read or written.
    #[error(
        "cannot use the image database {path}: restore it, or remove the directory to start with no images"
    )]
    Database {
        /// Its file.
        path: PathBuf,
        /// What redb said.
        source: Box<redb::Error>,
    },
    /// The database was written by a later version.
    #[error("image database {path} has version {version}, this podvisor knows up to {known}")]
    Newer {
        /// Its file.
        path: PathBuf,
        /// What it says.
        version: u64,
        /// What can be read.
        known: u64,
    },
    /// The registries did not give what was asked for.
    #[error("cannot pull {name:?}")]
    Registry {
        /// Name of an image or digest of a layer.
        name: String,
        /// Names each endpoint and its answer.
        source: Box<RegistryError>,
    },
    /// A layer could not be unpacked.
    #[error("cannot unpack layer {digest}")]
    Unpack {
        /// Of the blob.
        digest: String,
        /// Whose fault it is.
        source: podvisor_unpack::UnpackError,
    },
    /// Every endpoint sent something else.
    #[error("layer {digest} has the content {found}")]
    WrongDigest {
        /// What was asked for.
        digest: String,
        /// What came.
        found: String,
    },
    /// Manifest and configuration contradict each other.
    #[error("layer {digest} holds the archive {found}, its image says {expected}")]
    WrongDiffId {
        /// Of the blob.
        digest: String,
        /// What the configuration says.
        expected: String,
        /// What is in it.
        found: String,
    },
    /// A layer that is not named by sha256.
    #[error("layer {digest} is named by a digest other than sha256, which podvisor does not keep layers by")]
    UnsupportedDigest {
        /// Of the blob.
        digest: String,
    },
    /// The configuration breaks image-spec.
    #[error("the configuration of image {name:?} cannot be read")]
    BadConfig {
        /// As it was asked for, or the id.
        name: String,
        /// What is wrong with it.
        source: oci_spec::OciSpecError,
    },
    /// No such image here.
    #[error("image {0:?} not found")]
    NotFound(String),
    /// A snapshot's name becomes the name of a directory.
    #[error("{key:?} cannot be the name of a snapshot")]
    SnapshotKey {
        /// As given, cut.
        key: String,
    },
    /// There is one of that name, and it is another one.
    #[error("snapshot {key} exists already, of another image or kind")]
    SnapshotTaken {
        /// Its name.
        key: String,
    },
    /// There is none of that name.
    #[error("there is no snapshot {key:?}")]
    NoSnapshot {
        /// As given, cut.
        key: String,
    },
    /// A short name may mean several images, and none of them could be had.
    #[error("cannot pull {name:?}: none of {} possible meanings: {}", errors.len(), joined(errors))]
    Candidates {
        /// As it was asked for.
        name: String,
        /// One for each meaning.
        errors: Vec<RegistryError>,
    },
    /// The kernel refused to mount.
    #[error("cannot mount the root file system at {path}")]
    Mount {
        /// Where.
        path: PathBuf,
        /// What the kernel said.
        source: std::io::Error,
    },
    /// The kernel, or the file system that the layers are on, has no id-mapped mounts.
    #[error(
        "cannot show the layers in {path} with the ids of a user namespace: that takes Linux 5.19 and a file system with id-mapped mounts"
    )]
    IdMap {
        /// The directory of the layers.
        path: PathBuf,
        /// What the kernel said.
        source: std::io::Error,
    },
    /// A layer, or an image, cannot be had in the form for virtual machines.
    #[error("cannot make an image for virtual machines of {path}")]
    MachineImage {
        /// What was read, or what was to be made.
        path: PathBuf,
        /// Why.
        source: ErofsError,
    },
    /// The daemon is shutting down.
    #[error("the work was cancelled")]
    Cancelled,
    /// Told to everybody who waited for the same work.
    #[error(transparent)]
    Shared(Arc<ImageError>),
}

impl ImageError {
    /// The kind.
    pub fn kind(&self) -> ErrorKind {
        match self {
            ImageError::Registry { source, .. } => of_registry(source.kind()),
            // The one that means most: a registry that was down may have it.
            ImageError::Candidates { errors, .. } => errors
                .iter()
                .map(RegistryError::kind)
                .find(|kind| *kind != podvisor_registry::ErrorKind::NotFound)
                .map_or(ErrorKind::NotFound, of_registry),
            ImageError::Unpack { source, .. } => match source.kind() {
                UnpackErrorKind::Full => ErrorKind::Full,
                UnpackErrorKind::Corrupt => ErrorKind::Corrupt,
                UnpackErrorKind::Source => ErrorKind::Unavailable,
                UnpackErrorKind::System => ErrorKind::Internal,
            },
            ImageError::WrongDigest { .. }
            | ImageError::WrongDiffId { .. }
            | ImageError::BadConfig { .. } => ErrorKind::Corrupt,
            ImageError::UnsupportedDigest { .. } | ImageError::IdMap { .. } => ErrorKind::Refused,
            ImageError::SnapshotKey { .. } | ImageError::SnapshotTaken { .. } => ErrorKind::Invalid,
            ImageError::NotFound(_) | ImageError::NoSnapshot { .. } => ErrorKind::NotFound,
            ImageError::Cancelled => ErrorKind::Unavailable,
            ImageError::Io { source, .. }
            | ImageError::MachineImage { source: ErofsError::Io(source), .. }
                if is_full(source) =>
            {
                ErrorKind::Full
            }
            ImageError::MachineImage { source: ErofsError::TooLarge { .. }, .. } => ErrorKind::Refused,
            ImageError::Database { source, .. } if matches!(&**source, redb::Error::Io(source) if is_full(source)) => {
                ErrorKind::Full
            }
            ImageError::Io { .. }
            | ImageError::Locked { .. }
            | ImageError::Database { .. }
            | ImageError::Newer { .. }
            | ImageError::MachineImage { .. }
            | ImageError::Mount { .. } => ErrorKind::Internal,
            ImageError::Shared(error) => error.kind(),
        }
    }

    /// Something made before is not what it was.
    pub(crate) fn is_damage(&self) -> bool {
        match self {
            ImageError::MachineImage { source: ErofsError::Damaged(_), .. } => true,
            ImageError::Shared(error) => error.is_damage(),
            _ => false,
        }
    }

    pub(crate) fn registry(name: impl Into<String>) -> impl FnOnce(RegistryError) -> Self {
        let name = name.into();
        move |source| ImageError::Registry { name, source: Box::new(source) }
    }

    pub(crate) fn io(
        operation: &'static str,
        path: impl Into<PathBuf>,
    ) -> impl FnOnce(std::io::Error) -> Self {
        let path = path.into();
        move |source| ImageError::Io { operation, path, source }
    }
}

fn of_registry(kind: podvisor_registry::ErrorKind) -> ErrorKind {
    use podvisor_registry::ErrorKind as R;
    match kind {
        R::NotFound => ErrorKind::NotFound,
        R::Unauthorized => ErrorKind::Unauthorized,
        R::Unavailable => ErrorKind::Unavailable,
        R::Invalid => ErrorKind::Invalid,
        R::Corrupt => ErrorKind::Corrupt,
        R::Refused | R::Unsupported | R::Configuration => ErrorKind::Refused,
    }
}

fn is_full(error: &std::io::Error) -> bool {
    matches!(error.kind(), std::io::ErrorKind::StorageFull | std::io::ErrorKind::QuotaExceeded)
}

fn joined(errors: &[RegistryError]) -> String {
    errors.iter().map(ToString::to_string).collect::<Vec<_>>().join("; ")
}
