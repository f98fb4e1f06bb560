//! What can go wrong with a request, and the one place where that becomes a gRPC code.

use std::io::ErrorKind;
use std::path::PathBuf;
use std::sync::Arc;

use podvisor_checkpoint::ArchiveError;
use tonic::{Code, Status};

use crate::cdi::InjectError;
use crate::monitor::MonitorError;
use crate::pod::acquired::ReleaseError;
use crate::pod::image_volumes::ImageVolumeError;
use crate::pod::record::RecordError;
use crate::pod::state::Denied;
use crate::selinux::LabelError;

/// Shared by everybody who waits for the same piece of work.
pub(crate) type Failure = Arc<PodError>;

/// Why a request about a pod or container failed.
#[derive(Debug, thiserror::Error)]
pub(crate) enum PodError {
    #[error("pod sandbox {0:?} not found")]
    NoSuchPod(String),
    #[error("container {0:?} not found")]
    NoSuchContainer(String),
    #[error("{what} {id:?} is ambiguous: give more digits")]
    Ambiguous { what: &'static str, id: String },
    #[error("image {0:?} not found: pull it first")]
    NoSuchImage(String),
    #[error("{field}: {why}")]
    Invalid { field: String, why: String },
    #[error("{0}")]
    Unsupported(String),
    #[error("{what} {name:?} exists already as {id}, with another configuration")]
    NameTaken { what: &'static str, name: String, id: String },
    #[error("sandbox {id} is not ready: {why}")]
    NotReady { id: String, why: String },
    #[error("container {id} is not running: it is {state}")]
    NotRunning { id: String, state: &'static str },
    #[error("container {id}")]
    Denied { id: String, source: Denied },
    #[error(transparent)]
    Trust(#[from] podvisor_config::trust::TrustError),
    #[error("network is not ready: {0}")]
    NetworkNotReady(String),
    #[error("cannot connect the pod to its network")]
    Network(#[source] podvisor_network::NetworkError),
    #[error("cannot make namespaces")]
    Namespaces(#[source] podvisor_network::namespace::NamespaceError),
    #[error(transparent)]
    ImageVolume(#[from] ImageVolumeError),
    #[error("cannot use image")]
    Image(#[source] podvisor_image_store::ImageError),
    #[error(transparent)]
    Spec(#[from] podvisor_spec::SpecError),
    #[error(transparent)]
    Cdi(#[from] InjectError),
    #[error(transparent)]
    Record(#[from] RecordError),
    #[error(transparent)]
    Monitor(#[from] MonitorError),
    #[error(transparent)]
    Release(#[from] ReleaseError),
    #[error("cgroup operation failed")]
    Cgroup(#[from] podvisor_cgroup::CgroupError),
    #[error("cannot make a scope for the pod's init")]
    Systemd(#[from] podvisor_cgroup::systemd::SystemdError),
    #[error("cannot {operation} {path}")]
    File { operation: &'static str, path: PathBuf, source: std::io::Error },
    #[error(transparent)]
    Refused(#[from] podvisor_nri::Refused),
    #[error("cannot do what NRI plugins ask for")]
    Adjust(#[from] podvisor_nri::AdjustError),
    #[error(transparent)]
    Label(#[from] LabelError),
    #[error("cannot update container {id} as an NRI plugin asks for")]
    ByPlugin { id: String, source: Failure },
    #[error("container {id} was not changed within {seconds} s")]
    NotChanged { id: String, seconds: u64 },
    #[error("container {id} did not end within {seconds} s of SIGKILL")]
    WillNotDie { id: String, seconds: u64 },
    #[error(
        "the pod's virtual machine has {memory} MiB and {cpus} virtual CPUs, and cannot be resized as asked"
    )]
    CannotResize { memory: u64, cpus: u32, source: MonitorError },
    #[error(
        "{} is a block device, and nothing can be plugged into this pod's machine: set machine = \"q35\" for handler {handler}, or \
         build its guest anew if that is an older one, and start the pod again",
        path.display()
    )]
    CannotPlug { path: PathBuf, handler: String },
    #[error("cannot checkpoint container {id}{}{words}", if words.is_empty() { "" } else { ": CRIU says: " })]
    Checkpoint { id: String, words: String, source: MonitorError },
    #[error("the checkpoint of container {id} was not written within {seconds} s; the container runs on")]
    NotCheckpointed { id: String, seconds: u64 },
    #[error("cannot write the checkpoint's archive")]
    Archive(#[from] ArchiveError),
    #[error("the pod's task has ended")]
    TaskGone,
}

impl PodError {
    pub(crate) fn invalid(field: impl Into<String>, why: impl Into<String>) -> Self {
        Self::Invalid { field: field.into(), why: why.into() }
    }

    /// The gRPC code of each kind. Exhaustive on purpose.
    pub(crate) fn code(&self) -> Code {
        match self {
            PodError::NoSuchPod(_) | PodError::NoSuchContainer(_) | PodError::NoSuchImage(_) => {
                Code::NotFound
            }
            PodError::Ambiguous { .. } | PodError::Invalid { .. } | PodError::Trust(_) => {
                Code::InvalidArgument
            }
            PodError::Unsupported(_) => Code::Unimplemented,
            PodError::NameTaken { .. } => Code::AlreadyExists,
            PodError::NotReady { .. }
            | PodError::NotRunning { .. }
            | PodError::Denied { .. }
            | PodError::CannotResize { .. }
            | PodError::CannotPlug { .. } => Code::FailedPrecondition,
            PodError::NetworkNotReady(_) => Code::Unavailable,
            PodError::Image(error) => image_code(error),
            PodError::ImageVolume(error) => match error {
                ImageVolumeError::NoSuchImage { .. } | ImageVolumeError::NoSuchPath { .. } => Code::NotFound,
                ImageVolumeError::Mount { source, .. } => image_code(source),
                ImageVolumeError::Special { .. } => Code::InvalidArgument,
            },
            PodError::Spec(error) => match error.kind() {
                podvisor_spec::ErrorKind::Invalid => Code::InvalidArgument,
                podvisor_spec::ErrorKind::Unsupported => Code::Unimplemented,
                podvisor_spec::ErrorKind::NotFound => Code::NotFound,
            },
            PodError::Monitor(error) | PodError::Checkpoint { source: error, .. } => error.code(),
            PodError::Cdi(InjectError::Unknown { .. }) => Code::NotFound,
            PodError::Cdi(InjectError::Edits { .. }) => Code::FailedPrecondition,
            PodError::Record(error) if error.is_full() => Code::ResourceExhausted,
            PodError::Record(_) => Code::Internal,
            PodError::WillNotDie { .. } | PodError::NotChanged { .. } | PodError::NotCheckpointed { .. } => {
                Code::DeadlineExceeded
            }
            PodError::Refused(_) | PodError::Adjust(_) | PodError::ByPlugin { .. } => {
                Code::FailedPrecondition
            }
            PodError::Network(_)
            | PodError::Namespaces(_)
            | PodError::Release(_)
            | PodError::Cgroup(_)
            | PodError::Systemd(_)
            | PodError::Label(_)
            | PodError::TaskGone => Code::Internal,
            PodError::File { source, .. } | PodError::Archive(ArchiveError::Io { source, .. }) => {
                match source.kind() {
                    ErrorKind::StorageFull => Code::ResourceExhausted,
                    _ => Code::Internal,
                }
            }
            PodError::Archive(ArchiveError::Changed { .. } | ArchiveError::Cancelled) => Code::Aborted,
        }
    }
}

/// The gRPC code of an image error.
pub(crate) fn image_code(error: &podvisor_image_store::ImageError) -> Code {
    use podvisor_image_store::ErrorKind;
    match error.kind() {
        ErrorKind::NotFound => Code::NotFound,
        ErrorKind::Invalid => Code::InvalidArgument,
        ErrorKind::Unauthorized => Code::PermissionDenied,
        ErrorKind::Refused => Code::FailedPrecondition,
        ErrorKind::Unavailable => Code::Unavailable,
        ErrorKind::Full => Code::ResourceExhausted,
        ErrorKind::Corrupt => Code::DataLoss,
        ErrorKind::Internal => Code::Internal,
    }
}

impl From<PodError> for Status {
    fn from(error: PodError) -> Status {
        Status::new(error.code(), chain(&error))
    }
}

/// What the client is told about a failure that others may wait for too.
pub(crate) fn status(error: &Failure) -> Status {
    Status::new(error.code(), chain(error.as_ref()))
}

/// For requests that are fulfilled when what they are about is not there (any more).
pub(crate) fn unless_gone(outcome: Result<(), Failure>) -> Result<(), Status> {
    match outcome {
        Err(failure) if matches!(*failure, PodError::NoSuchPod(_) | PodError::NoSuchContainer(_)) => Ok(()),
        outcome => outcome.map_err(|failure| status(&failure)),
    }
}

/// The whole chain of causes on one line.
pub(crate) fn chain(error: &dyn std::error::Error) -> String {
    let mut text = error.to_string();
    let mut source = error.source();
    while let Some(cause) = source {
        let cause_text = cause.to_string();
        // A transparent error shows its cause's text as its own.
        if !text.ends_with(&cause_text) {
            text.push_str(": ");
            text.push_str(&cause_text);
        }
        source = cause.source();
    }
    text
}
