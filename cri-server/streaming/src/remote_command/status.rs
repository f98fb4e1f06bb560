//! How a session ended, as the error stream says it.

use bytes::Bytes;
use serde::Serialize;

/// Which version of the remote command protocol was agreed on.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) enum Version {
    V1,
    V2,
    /// Adds the resize stream.
    V3,
    /// Adds the status as JSON.
    V4,
    /// Adds the half-close of stdin, which only WebSocket lacked.
    V5,
}

/// How a session ended.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) enum Outcome {
    Success,
    /// Of the process; not 0.
    ExitCode(u8),
    Failed(String),
}

/// A Kubernetes `metav1.Status`, as far as clients read it.
#[derive(Debug, Serialize)]
#[allow(clippy::struct_field_names)] // The names are Kubernetes'.
struct Status<'a> {
    metadata: Empty,
    status: &'a str,
    #[serde(skip_serializing_if = "Option::is_none")]
    message: Option<&'a str>,
    #[serde(skip_serializing_if = "Option::is_none")]
    reason: Option<&'a str>,
    #[serde(skip_serializing_if = "Option::is_none")]
    details: Option<Details<'a>>,
    #[serde(skip_serializing_if = "Option::is_none")]
    code: Option<u16>,
}

#[derive(Debug, Serialize)]
struct Empty {}

#[derive(Debug, Serialize)]
struct Details<'a> {
    causes: [Cause<'a>; 1],
}

#[derive(Debug, Serialize)]
struct Cause<'a> {
    reason: &'a str,
    message: &'a str,
}

impl Outcome {
    /// What to write to the error stream, if anything.
    pub(crate) fn encode(&self, version: Version) -> Option<Bytes> {
        let (message, exit_code) = match self {
            Self::Success => (None, None),
            Self::ExitCode(code) => {
                (Some(format!("command terminated with exit code {code}")), Some(code.to_string()))
            }
            Self::Failed(why) => (Some(format!("Internal error occurred: {why}")), None),
        };
        if version < Version::V4 {
            return message.map(Bytes::from);
        }
        let failed = matches!(self, Self::Failed(_));
        let status = Status {
            metadata: Empty {},
            status: if message.is_none() { "Success" } else { "Failure" },
            message: message.as_deref(),
            reason: match self {
                Self::Success => None,
                Self::ExitCode(_) => Some("NonZeroExitCode"),
                Self::Failed(_) => Some("InternalError"),
            },
            details: exit_code
                .as_deref()
                .map(|message| Details { causes: [Cause { reason: "ExitCode", message }] }),
            code: failed.then_some(500),
        };
        serde_json::to_vec(&status).ok().map(Bytes::from)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn json_since_v4() {
        let json =
            |outcome: Outcome| String::from_utf8(outcome.encode(Version::V4).unwrap().to_vec()).unwrap();
        assert_eq!(json(Outcome::Success), r#"{"metadata":{},"status":"Success"}"#);
        assert_eq!(
            json(Outcome::ExitCode(3)),
            r#"{"metadata":{},"status":"Failure","message":"command terminated with exit code 3","reason":"NonZeroExitCode","details":{"causes":[{"reason":"ExitCode","message":"3"}]}}"#
        );
        assert_eq!(
            json(Outcome::Failed("no \"x\"".into())),
            r#"{"metadata":{},"status":"Failure","message":"Internal error occurred: no \"x\"","reason":"InternalError","code":500}"#
        );
    }

    #[test]
    fn text_before() {
        assert_eq!(Outcome::Success.encode(Version::V3), None);
        assert_eq!(
            Outcome::ExitCode(1).encode(Version::V1).as_deref(),
            Some(&b"command terminated with exit code 1"[..])
        );
    }
}
