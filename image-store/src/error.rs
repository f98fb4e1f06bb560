//! What can go wrong with images, in kinds.

use std::path::PathBuf;
use std::sync::Arc;

use podvisor_registry::RegistryError;
use podvisor_unpack::UnpackErrorKind;

/// What kind of failure it is: decides the answer's code and whether to try again.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[allow(missing_docs)]
pub enum ErrorKind {
    NotFound,
    Invalid,
    Unauthorized,
    Refused,
    Unavailable,
    /// The disk is full.
    Full,
    /// What came does not have the digest or size it should have, or is no archive.
    Corrupt,
    Internal,
}

/// Why something about an image failed.
#[derive(Debug, thiserror::Error)]
#[allow(missing_docs)]
pub enum ImageError {
    #[error(
        "image store {root} is in use by another process: is another podvisor running on the same directories?"
    )]
    Locked { root: PathBuf },
    #[error("cannot {operation} {path}")]
    Io { operation: &'static str, path: PathBuf, source: std::io::Error },
    #[error(
        "cannot use the image database {path}: restore it, or remove the directory to start with no images"
    )]
    Database { path: PathBuf, source: Box<redb::Error> },
    #[error("image database {path} has version {version}, this podvisor knows up to {known}")]
    Newer { path: PathBuf, version: u64, known: u64 },
    #[error("cannot pull {name:?}")]
    Registry { name: String, source: Box<RegistryError> },
    #[error("layer {digest}")]
    Unpack { digest: String, source: podvisor_unpack::UnpackError },
    #[error("layer {digest} has the content {found}")]
    WrongDigest { digest: String, found: String },
    #[error("layer {digest} holds the archive {found}, its image says {expected}")]
    WrongDiffId { digest: String, expected: String, found: String },
    #[error("layer {digest} is named by a digest other than sha256, which podvisor does not keep layers by")]
    UnsupportedDigest { digest: String },
    #[error("the configuration of image {name:?} cannot be read")]
    BadConfig { name: String, source: oci_spec::OciSpecError },
    #[error("image {0:?} not found")]
    NotFound(String),
    #[error("{key:?} cannot be the name of a snapshot")]
    SnapshotKey { key: String },
    #[error("snapshot {key} exists already, of another image or kind")]
    SnapshotTaken { key: String },
    #[error("cannot pull {name:?}: none of {} possible meanings: {}", errors.len(), joined(errors))]
    Candidates { name: String, errors: Vec<RegistryError> },
    #[error("the kernel cannot mount the root file system at {path}")]
    Mount { path: PathBuf, source: std::io::Error },
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
            ImageError::UnsupportedDigest { .. } => ErrorKind::Refused,
            ImageError::SnapshotKey { .. } | ImageError::SnapshotTaken { .. } => ErrorKind::Invalid,
            ImageError::NotFound(_) => ErrorKind::NotFound,
            ImageError::Cancelled => ErrorKind::Unavailable,
            ImageError::Io { source, .. } if is_full(source) => ErrorKind::Full,
            ImageError::Database { source, .. } if matches!(&**source, redb::Error::Io(source) if is_full(source)) => {
                ErrorKind::Full
            }
            ImageError::Io { .. }
            | ImageError::Locked { .. }
            | ImageError::Database { .. }
            | ImageError::Newer { .. }
            | ImageError::Mount { .. } => ErrorKind::Internal,
            ImageError::Shared(error) => error.kind(),
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
