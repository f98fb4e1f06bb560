//! The error that goes over the wire: a code and one line of detail.

use podvisor_proto::hypervisor::{self as proto, ErrorCode};

/// Why a request failed, as the monitor is told.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Failure {
    /// What kind of failure.
    pub code: ErrorCode,
    /// What was attempted and what happened, in one line.
    pub detail: String,
}

impl Failure {
    fn new(code: ErrorCode, detail: impl Into<String>) -> Self {
        Self { code, detail: one_line(&detail.into()) }
    }

    /// This hypervisor, or the machine that it has started, cannot do it.
    pub fn unsupported(detail: impl Into<String>) -> Self {
        Self::new(ErrorCode::Unsupported, detail)
    }

    /// The request contradicts itself.
    pub fn invalid(detail: impl Into<String>) -> Self {
        Self::new(ErrorCode::Invalid, detail)
    }

    /// There is no such device.
    pub fn not_found(detail: impl Into<String>) -> Self {
        Self::new(ErrorCode::NotFound, detail)
    }

    /// Not started yet, started already, or ended.
    pub fn wrong_state(detail: impl Into<String>) -> Self {
        Self::new(ErrorCode::WrongState, detail)
    }

    /// Something could not be done: what was attempted, and the cause.
    pub fn failed(attempt: impl std::fmt::Display, cause: impl std::fmt::Display) -> Self {
        Self::new(ErrorCode::Failed, format!("{attempt}: {cause}"))
    }
}

impl From<Failure> for proto::Error {
    fn from(failure: Failure) -> Self {
        Self { code: failure.code.into(), detail: failure.detail }
    }
}

/// Text of several lines, QEMU's perhaps, as one without control characters.
pub fn one_line(text: &str) -> String {
    let lines: Vec<String> = text
        .lines()
        .map(|line| line.chars().filter(|character| !character.is_control()).collect::<String>())
        .map(|line| line.trim().to_owned())
        .filter(|line| !line.is_empty())
        .collect();
    lines.join("; ")
}

/// An error with its causes.
pub fn chain(error: &dyn std::error::Error) -> String {
    let mut text = error.to_string();
    let mut cause = error.source();
    while let Some(error) = cause {
        text = format!("{text}: {error}");
        cause = error.source();
    }
    text
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn details_are_one_line() {
        assert_eq!(
            Failure::failed("start", "qemu: no\r\n\n  such\x1b[0m file\n").detail,
            "start: qemu: no; such[0m file"
        );
    }
}
