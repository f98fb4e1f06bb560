//! Why a configuration cannot become a container.

/// A configuration that cannot become a container; names the CRI field.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum SpecError {
    /// The field is missing, too large, malformed or contradicts another one.
    #[error("{field}: {why}")]
    Invalid {
        /// Path of the CRI field, e.g. `config.mounts[2].container_path`.
        field: String,
        /// What is wrong with it.
        why: String,
    },
    /// The request is well-formed, but this node or this version cannot do it.
    #[error("{field}: {why}")]
    Unsupported {
        /// Path of the CRI field.
        field: String,
        /// What cannot be done.
        why: String,
    },
    /// A user or group name that the image does not know.
    #[error("{field}: the image has no {what}")]
    NotFound {
        /// Path of the CRI field, or `image user`.
        field: String,
        /// E.g. `user "app" in /etc/passwd`.
        what: String,
    },
    /// A seccomp profile that is no JSON of the right shape.
    #[error("seccomp profile is malformed")]
    SeccompSyntax(#[source] serde_json::Error),
}

/// What a caller can do about a [`SpecError`].
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum ErrorKind {
    /// Correct the request.
    Invalid,
    /// Ask another node or a newer version.
    Unsupported,
    /// Use a name that the image has.
    NotFound,
}

impl SpecError {
    /// What a caller can do about it.
    pub fn kind(&self) -> ErrorKind {
        match self {
            Self::Invalid { .. } | Self::SeccompSyntax(_) => ErrorKind::Invalid,
            Self::Unsupported { .. } => ErrorKind::Unsupported,
            Self::NotFound { .. } => ErrorKind::NotFound,
        }
    }

    pub(crate) fn invalid(field: impl Into<String>, why: impl Into<String>) -> Self {
        Self::Invalid { field: field.into(), why: why.into() }
    }

    pub(crate) fn unsupported(field: impl Into<String>, why: impl Into<String>) -> Self {
        Self::Unsupported { field: field.into(), why: why.into() }
    }
}

pub(crate) type Result<T> = std::result::Result<T, SpecError>;

/// Longest single argument or environment string that execve(2) takes (`MAX_ARG_STRLEN`), with its final NUL.
const MAX_STRING: usize = 128 << 10;

/// A string that goes to a C interface: no NUL, not longer than execve(2) takes.
pub(crate) fn c_string(field: impl FnOnce() -> String, text: &str) -> Result<()> {
    if text.contains('\0') {
        return Err(SpecError::invalid(field(), "contains a NUL byte"));
    }
    if text.len() >= MAX_STRING {
        return Err(SpecError::invalid(field(), format!("has {} bytes, more than 128 KiB", text.len())));
    }
    Ok(())
}

/// Longest path the kernel takes, with its final NUL.
const PATH_MAX: usize = 4096;

/// An absolute path, cleaned by text: no empty parts, `.` or `..`.
pub(crate) fn absolute_path(field: impl Fn() -> String, path: &str) -> Result<String> {
    if path.is_empty() {
        return Err(SpecError::invalid(field(), "is empty"));
    }
    if path.contains('\0') {
        return Err(SpecError::invalid(field(), "contains a NUL byte"));
    }
    if path.len() >= PATH_MAX {
        return Err(SpecError::invalid(field(), format!("has {} bytes, more than 4095", path.len())));
    }
    if !path.starts_with('/') {
        return Err(SpecError::invalid(field(), format!("{path:?} is not an absolute path")));
    }
    Ok(clean(path))
}

/// Cleaned by text, as an absolute path.
pub(crate) fn clean(path: &str) -> String {
    let mut parts: Vec<&str> = Vec::new();
    for part in path.split('/') {
        match part {
            "" | "." => {}
            ".." => {
                parts.pop();
            }
            part => parts.push(part),
        }
    }
    format!("/{}", parts.join("/"))
}
