//! What callers see when nothing could be pulled, in kinds that a service maps to its status codes.

use std::fmt;
use std::path::PathBuf;

use crate::credentials::CredentialsError;
use crate::digest::DigestError;
use crate::failure::Failure;
use crate::reference::ReferenceProblem;

/// Names from outside are repeated in errors up to this many characters.
const EXCERPT_MAX: usize = 300;

/// What an error means for the caller.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum ErrorKind {
    /// No endpoint has the image, or not for this platform.
    NotFound,
    /// Credentials are missing or were refused.
    Unauthorized,
    /// No endpoint could be reached or finished its answer; trying again later may help.
    Unavailable,
    /// The name is no valid reference, or the credentials given with it cannot be read.
    Invalid,
    /// Configuration forbids the pull (`blocked`).
    Refused,
    /// What came does not fit its digest or size, or is no manifest at all.
    Corrupt,
    /// Intact, but of a kind that cannot be run from (artifacts, schema 1, foreign layers, unknown compression).
    Unsupported,
    /// registries.conf or hosts.toml cannot be used.
    Configuration,
}

/// Why nothing was pulled; names each endpoint that was tried and what it answered. Holds no secrets.
#[derive(Debug, thiserror::Error)]
pub enum RegistryError {
    /// The name is no reference.
    #[error("image name {name:?} {problem}")]
    Reference {
        /// As it was given (cut if it is very long).
        name: String,
        /// What is wrong with it.
        problem: ReferenceProblem,
    },
    /// A text is no digest.
    #[error(transparent)]
    Digest(#[from] DigestError),
    /// `blocked = true`.
    #[error("pull {reference}: registries.conf blocks {prefix}")]
    Blocked {
        /// What was to be pulled.
        reference: String,
        /// The prefix of the `[[registry]]` that blocks it.
        prefix: String,
    },
    /// The configuration leaves nobody to ask.
    #[error("pull {reference}: no configured endpoint may be asked for it")]
    NoEndpoint {
        /// What was to be pulled.
        reference: String,
    },
    /// Credentials in the request cannot be read.
    #[error(transparent)]
    Credentials(#[from] CredentialsError),
    /// [`crate::Options::user_agent`] cannot be sent.
    #[error("user agent {0:?} cannot stand in a header")]
    UserAgent(String),
    /// The runtime shuts down.
    #[error("read the registry configuration: the daemon is shutting down")]
    ShuttingDown,
    /// A configuration file cannot be used.
    #[error(transparent)]
    Configuration(#[from] ConfigurationError),
    /// Every endpoint was tried.
    #[error("{action} {subject}: {attempts}")]
    Endpoints {
        /// `pull` or `fetch layer`.
        action: &'static str,
        /// A reference or a digest.
        subject: String,
        /// What each answered.
        attempts: Attempts,
    },
    /// Found and intact, but not an image that can be run from here.
    #[error("pull {reference}: {source_url}: {failure}")]
    Unusable {
        /// What was to be pulled.
        reference: String,
        /// Where the offending document came from.
        source_url: String,
        /// What is wrong with it.
        failure: Failure,
    },
}

/// A configuration file that cannot be used. The text never repeats values: they may be secrets.
#[derive(Debug, Clone, thiserror::Error)]
#[error("{path}: {problem}", path = path.display())]
pub struct ConfigurationError {
    /// Which file.
    pub path: PathBuf,
    /// What is wrong, with line or key.
    pub problem: String,
}

/// Endpoints in the order they were tried, each with its answer.
#[derive(Debug, Default)]
pub struct Attempts(Vec<(String, Failure)>);

impl RegistryError {
    /// What the error means for the caller. Of several endpoints the last one decides: it is the primary, mirrors
    /// come before it.
    pub fn kind(&self) -> ErrorKind {
        match self {
            Self::Reference { .. } | Self::Digest(_) | Self::Credentials(_) => ErrorKind::Invalid,
            Self::Blocked { .. } => ErrorKind::Refused,
            Self::NoEndpoint { .. } | Self::UserAgent(_) | Self::Configuration(_) => ErrorKind::Configuration,
            Self::ShuttingDown => ErrorKind::Unavailable,
            Self::Endpoints { attempts, .. } => attempts.kind(),
            Self::Unusable { failure, .. } => failure.kind(),
        }
    }

    pub(crate) fn reference(name: &str, problem: ReferenceProblem) -> Self {
        Self::Reference { name: name.chars().take(EXCERPT_MAX).collect(), problem }
    }
}

impl Attempts {
    /// How many endpoints' answers there are.
    pub fn len(&self) -> usize {
        self.0.len()
    }

    /// Whether nobody was asked.
    pub fn is_empty(&self) -> bool {
        self.0.is_empty()
    }

    pub(crate) fn add(&mut self, endpoint: String, failure: Failure) {
        self.0.push((endpoint, failure));
    }

    fn kind(&self) -> ErrorKind {
        self.0.last().map_or(ErrorKind::Unavailable, |(_, failure)| failure.kind())
    }
}

impl fmt::Display for Attempts {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        if self.0.is_empty() {
            return f.write_str("no endpoint was tried");
        }
        for (at, (endpoint, failure)) in self.0.iter().enumerate() {
            if at > 0 {
                f.write_str("; ")?;
            }
            write!(f, "{endpoint}: {failure}")?;
        }
        Ok(())
    }
}
