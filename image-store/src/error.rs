//! What can go wrong with images, in kinds.

use std::path::PathBuf;
use std::sync::Arc;

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
    Registry { name: String, source: podvisor_registry::RegistryError },
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
        use podvisor_registry::ErrorKind as R;
        match self {
            ImageError::Registry { source, .. } => match source.kind() {
                R::NotFound => ErrorKind::NotFound,
                R::Unauthorized => ErrorKind::Unauthorized,
                R::Unavailable => ErrorKind::Unavailable,
                R::Invalid => ErrorKind::Invalid,
                R::Refused => ErrorKind::Refused,
                R::Corrupt => ErrorKind::Corrupt,
                R::Unsupported => ErrorKind::Refused,
                R::Configuration => ErrorKind::Refused,
            },
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
            ImageError::NotFound(_) => ErrorKind::NotFound,
            ImageError::Cancelled => ErrorKind::Unavailable,
            ImageError::Io { source, .. } if source.kind() == std::io::ErrorKind::StorageFull => {
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

    pub(crate) fn io(
        operation: &'static str,
        path: impl Into<PathBuf>,
    ) -> impl FnOnce(std::io::Error) -> Self {
        let path = path.into();
        move |source| ImageError::Io { operation, path, source }
    }
}
