//! The error that goes over the wire: a code, one line of detail, and the OCI runtime's own words.

use podvisor_proto::monitor::{self as proto, ErrorCode};

/// Why a request failed, as the daemon is told.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Failure {
    pub(crate) code: ErrorCode,
    pub(crate) detail: String,
    pub(crate) runtime_log: String,
}

impl Failure {
    fn new(code: ErrorCode, detail: impl Into<String>) -> Self {
        Self { code, detail: detail.into(), runtime_log: String::new() }
    }

    pub(crate) fn unsupported(detail: impl Into<String>) -> Self {
        Self::new(ErrorCode::Unsupported, detail)
    }

    pub(crate) fn invalid(detail: impl Into<String>) -> Self {
        Self::new(ErrorCode::Invalid, detail)
    }

    pub(crate) fn no_container(id: &str) -> Self {
        Self::new(ErrorCode::NotFound, format!("no container {id} in this pod"))
    }

    pub(crate) fn exists(detail: impl Into<String>) -> Self {
        Self::new(ErrorCode::AlreadyExists, detail)
    }

    pub(crate) fn wrong_state(detail: impl Into<String>) -> Self {
        Self::new(ErrorCode::WrongState, detail)
    }

    pub(crate) fn runtime(detail: impl Into<String>, runtime_log: String) -> Self {
        Self { code: ErrorCode::RuntimeFailed, detail: detail.into(), runtime_log }
    }

    pub(crate) fn runtime_missing(detail: impl Into<String>) -> Self {
        Self::new(ErrorCode::RuntimeMissing, detail)
    }

    pub(crate) fn timeout(detail: impl Into<String>, runtime_log: String) -> Self {
        Self { code: ErrorCode::Timeout, detail: detail.into(), runtime_log }
    }

    /// The pod's virtual machine could not be started or is gone; the console's last lines.
    pub(crate) fn vm(detail: impl Into<String>, console: String) -> Self {
        Self { code: ErrorCode::VmFailed, detail: detail.into(), runtime_log: console }
    }

    pub(crate) fn not_found(detail: impl Into<String>, runtime_log: String) -> Self {
        Self { code: ErrorCode::NotFound, detail: detail.into(), runtime_log }
    }

    /// A system call failed: what was attempted, and the cause.
    pub(crate) fn system(attempt: impl std::fmt::Display, cause: impl std::fmt::Display) -> Self {
        Self::new(ErrorCode::System, format!("{attempt}: {cause}"))
    }
}

impl From<Failure> for proto::Error {
    fn from(failure: Failure) -> Self {
        Self { code: failure.code.into(), detail: failure.detail, runtime_log: failure.runtime_log }
    }
}

/// Ids become file names in the run and state directories, so they are held to what is harmless there.
pub(crate) fn check_id(field: &str, id: &str) -> Result<(), Failure> {
    let harmless = |byte: u8| byte.is_ascii_alphanumeric() || matches!(byte, b'-' | b'_' | b'.');
    if id.is_empty() || id.len() > 128 || id.starts_with('.') || !id.bytes().all(harmless) {
        return Err(Failure::invalid(format!(
            "{field} must be 1 to 128 of A-Z a-z 0-9 - _ . and not start with a dot"
        )));
    }
    Ok(())
}

/// A path that is used by another process too, whose working directory is another one.
pub(crate) fn check_absolute(field: &str, path: &str) -> Result<(), Failure> {
    if !path.starts_with('/') || path.contains('\0') {
        return Err(Failure::invalid(format!("{field} must be an absolute path")));
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ids_that_could_leave_the_directory_are_refused() {
        for id in ["", ".", "..", ".hidden", "a/b", "../x", "a b", "a\0b", &"x".repeat(129)] {
            assert!(check_id("container_id", id).is_err(), "{id:?}");
        }
        for id in ["a", "c0ffee", "a.b-c_d", &"f".repeat(64)] {
            assert!(check_id("container_id", id).is_ok(), "{id:?}");
        }
    }
}
