//! Errors as they go over the wire: a code that the monitor acts on, and a line for people.

use podvisor_container::ContainerError;
use podvisor_proto::agent::{Error, ErrorCode};

/// Why a request was not done.
#[derive(Debug, Clone)]
pub(crate) struct Failure {
    code: ErrorCode,
    detail: String,
}

impl Failure {
    fn new(code: ErrorCode, detail: impl Into<String>) -> Self {
        Self { code, detail: detail.into() }
    }

    pub(crate) fn invalid(detail: impl Into<String>) -> Self {
        Self::new(ErrorCode::Invalid, detail)
    }

    pub(crate) fn not_found(detail: impl Into<String>) -> Self {
        Self::new(ErrorCode::NotFound, detail)
    }

    pub(crate) fn exists(detail: impl Into<String>) -> Self {
        Self::new(ErrorCode::AlreadyExists, detail)
    }

    pub(crate) fn state(detail: impl Into<String>) -> Self {
        Self::new(ErrorCode::WrongState, detail)
    }

    pub(crate) fn unsupported(detail: impl Into<String>) -> Self {
        Self::new(ErrorCode::Unsupported, detail)
    }

    pub(crate) fn timeout(detail: impl Into<String>) -> Self {
        Self::new(ErrorCode::Timeout, detail)
    }

    /// A system call failed while `what`.
    pub(crate) fn system(what: &str, error: impl std::error::Error) -> Self {
        Self::new(ErrorCode::System, format!("cannot {what}: {}", chain(&error)))
    }

    pub(crate) fn into_message(self) -> Error {
        Error { code: self.code.into(), detail: self.detail.replace('\n', " ") }
    }
}

impl From<ContainerError> for Failure {
    fn from(error: ContainerError) -> Self {
        let code = match &error {
            ContainerError::Refused(_) => ErrorCode::Invalid,
            ContainerError::Child(_) | ContainerError::Vanished => ErrorCode::Refused,
            ContainerError::System { .. } => ErrorCode::System,
        };
        // What the child says is the whole story; what it is wrapped in would only hide it.
        match error {
            ContainerError::Child(text) => Self::new(code, text),
            error => Self::new(code, chain(&error)),
        }
    }
}

/// An error with its causes in one line.
pub(crate) fn chain(error: &dyn std::error::Error) -> String {
    let mut text = error.to_string();
    let mut cause = error.source();
    while let Some(error) = cause {
        text.push_str(": ");
        text.push_str(&error.to_string());
        cause = error.source();
    }
    text
}
