//! What one endpoint answered when it did not answer what was asked: one line each.

use std::error::Error;
use std::io;
use std::time::Duration;

use http::StatusCode;

use crate::digest::Digest;
use crate::error::ErrorKind;

/// One endpoint's answer. Texts from the network are cut and stripped of control characters before they get here.
#[derive(Debug, Clone, thiserror::Error)]
pub enum Failure {
    /// No connection (DNS, refused, unreachable, proxy).
    #[error("cannot connect: {0}")]
    Connect(String),
    /// TLS did not come about.
    #[error("TLS failed: {0}")]
    Tls(String),
    /// The connection broke, or what came is no HTTP.
    #[error("connection broke: {0}")]
    Broken(String),
    /// No response header in time.
    #[error("no answer within {} s", .0.as_secs_f32())]
    NoAnswer(Duration),
    /// The body stopped.
    #[error("stalled: no byte for {} s", .0.as_secs_f32())]
    Stalled(Duration),
    /// A small document trickled in too slowly.
    #[error("too slow: not finished within {} s", .0.as_secs_f32())]
    TooSlow(Duration),
    /// The body ended early.
    #[error("ended after {got} of {size} bytes")]
    CutShort {
        /// Bytes there are.
        got: u64,
        /// Bytes there should be.
        size: u64,
    },
    /// A status that is no success.
    #[error("{status}{detail}")]
    Status {
        /// What HTTP says.
        status: StatusCode,
        /// ` (CODE: message)` or nothing.
        detail: String,
    },
    /// 401 that credentials do not cure, or there are none.
    #[error("{0}")]
    Unauthorized(String),
    /// The token server did not give a token, for another reason than the credentials.
    #[error("token server {server}: {answer}")]
    TokenServer {
        /// Scheme, host and path.
        server: String,
        /// What it answered.
        answer: String,
    },
    /// A redirect that is not followed.
    #[error("redirect refused: {0}")]
    Redirect(String),
    /// Larger than documents of that kind may be.
    #[error("answer is larger than {limit} bytes")]
    TooLarge {
        /// Bytes allowed.
        limit: u64,
    },
    /// Not the size that its descriptor says.
    #[error("sent {got} bytes or more for {digest}, whose size is {size}")]
    WrongSize {
        /// Which blob.
        digest: Digest,
        /// Bytes that came or were announced.
        got: u64,
        /// Bytes according to the descriptor.
        size: u64,
    },
    /// Other content than asked for.
    #[error("content has digest {found}, expected {expected}")]
    WrongDigest {
        /// What was asked for.
        expected: Digest,
        /// What came.
        found: Digest,
    },
    /// A Range request was answered with something else.
    #[error("answered a range request wrongly: {0}")]
    Range(String),
    /// What came cannot be read as what it should be.
    #[error("{what} cannot be read: {problem}")]
    Garbage {
        /// `manifest`, `image configuration`, ...
        what: &'static str,
        /// What is wrong.
        problem: String,
    },
    /// Intact, but nothing for this platform.
    #[error("has nothing for platform {wanted} (has: {found})")]
    NoPlatform {
        /// os/architecture.
        wanted: String,
        /// What there is.
        found: String,
    },
    /// Intact, but of a kind that cannot be used.
    #[error("{0}")]
    Unsupported(String),
    /// Its TLS files or addresses cannot be used.
    #[error("configuration: {0}")]
    Configuration(String),
}

impl Failure {
    /// What the failure means for the caller.
    pub fn kind(&self) -> ErrorKind {
        match self {
            Self::Connect(_)
            | Self::Tls(_)
            | Self::Broken(_)
            | Self::NoAnswer(_)
            | Self::Stalled(_)
            | Self::TooSlow(_)
            | Self::CutShort { .. }
            | Self::TokenServer { .. }
            | Self::Redirect(_)
            | Self::Range(_) => ErrorKind::Unavailable,
            Self::Status { status, .. } => match *status {
                StatusCode::NOT_FOUND | StatusCode::GONE => ErrorKind::NotFound,
                StatusCode::UNAUTHORIZED | StatusCode::FORBIDDEN => ErrorKind::Unauthorized,
                _ => ErrorKind::Unavailable,
            },
            Self::Unauthorized(_) => ErrorKind::Unauthorized,
            Self::TooLarge { .. }
            | Self::WrongSize { .. }
            | Self::WrongDigest { .. }
            | Self::Garbage { .. } => ErrorKind::Corrupt,
            Self::NoPlatform { .. } => ErrorKind::NotFound,
            Self::Unsupported(_) => ErrorKind::Unsupported,
            Self::Configuration(_) => ErrorKind::Configuration,
        }
    }

    /// Whether the same request to the same endpoint may succeed a moment later.
    pub(crate) fn is_transient(&self) -> bool {
        match self {
            Self::Connect(_)
            | Self::Broken(_)
            | Self::NoAnswer(_)
            | Self::Stalled(_)
            | Self::CutShort { .. }
            | Self::TokenServer { .. } => true,
            Self::Status { status, .. } => {
                status.is_server_error() || *status == StatusCode::TOO_MANY_REQUESTS
            }
            _ => false,
        }
    }

    /// Whether the host does not even accept connections: another endpoint should be asked right away.
    pub(crate) fn is_dead_end(&self) -> bool {
        matches!(self, Self::Connect(_) | Self::Tls(_) | Self::NoAnswer(_))
    }

    /// Whether nothing at all got through, so that another scheme or a later try is worth it.
    pub(crate) fn is_unconnected(&self) -> bool {
        matches!(self, Self::Connect(_) | Self::Tls(_) | Self::Broken(_) | Self::NoAnswer(_))
    }

    /// Sorts an error of the HTTP client by what lies at its bottom.
    pub(crate) fn from_client(error: &hyper_util::client::legacy::Error) -> Self {
        let connecting = error.is_connect();
        classify(error, connecting)
    }

    /// An error in the middle of a body.
    pub(crate) fn from_body(error: &hyper::Error) -> Self {
        classify(error, false)
    }
}

/// A text from the network as an error may repeat it: one line, printable, short.
pub(crate) fn printable(text: &str) -> String {
    const MAX: usize = 200;
    let mut line: String = text.chars().map(|c| if c.is_control() { ' ' } else { c }).take(MAX).collect();
    if text.chars().nth(MAX).is_some() {
        line.push('…');
    }
    line.trim().to_owned()
}

fn classify(error: &(dyn Error + 'static), connecting: bool) -> Failure {
    let mut deepest: &(dyn Error + 'static) = error;
    let mut next = Some(error);
    while let Some(current) = next {
        if let Some(tls) = current.downcast_ref::<rustls::Error>() {
            return Failure::Tls(printable(&tls.to_string()));
        }
        deepest = current;
        // io::Error hides what it wraps from source(): it answers with the wrapped error's source instead.
        next = match current.downcast_ref::<io::Error>().and_then(io::Error::get_ref) {
            Some(wrapped) => Some(wrapped),
            None => current.source(),
        };
    }
    let reason = printable(&match deepest.downcast_ref::<io::Error>() {
        Some(error) if error.raw_os_error().is_some() => error.kind().to_string(),
        _ => deepest.to_string(),
    });
    if connecting { Failure::Connect(reason) } else { Failure::Broken(reason) }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn texts_from_outside_become_one_short_line() {
        assert_eq!(printable("a\nb\x1b[31mc\r"), "a b [31mc");
        assert_eq!(printable(&"x".repeat(1000)).chars().count(), 201);
    }

    #[test]
    fn the_reason_is_found_at_the_bottom() {
        let refused = io::Error::from_raw_os_error(111);
        let Failure::Connect(reason) = classify(&refused, true) else { panic!() };
        assert_eq!(reason, "connection refused");
        let tls =
            io::Error::other(rustls::Error::InvalidCertificate(rustls::CertificateError::UnknownIssuer));
        assert!(matches!(classify(&tls, true), Failure::Tls(_)));
    }
}
