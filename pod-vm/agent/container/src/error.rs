//! What can go wrong, by who has to act: the spec, the kernel, the child.

use std::io;

/// A spec that cannot become a container here.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("{field}: {why}")]
pub struct Refused {
    /// Where in the spec, e.g. `linux.namespaces[2].path`.
    pub field: String,
    /// What is wrong with it and what would be right.
    pub why: String,
}

impl Refused {
    pub(crate) fn new(field: impl Into<String>, why: impl Into<String>) -> Self {
        Self { field: field.into(), why: why.into() }
    }
}

/// Why there is no container, or no process in it.
#[derive(Debug, thiserror::Error)]
pub enum ContainerError {
    /// The spec.
    #[error("the container's spec cannot be used")]
    Refused(#[from] Refused),
    /// A system call of the caller's side.
    #[error("cannot {what}")]
    System {
        /// What was attempted.
        what: String,
        /// Why it failed.
        source: io::Error,
    },
    /// The child said what failed.
    #[error("the container's process could not be prepared: {0}")]
    Child(String),
    /// The child ended without a word.
    #[error("the container's process ended before it was ready")]
    Vanished,
}

impl ContainerError {
    pub(crate) fn system(what: impl Into<String>) -> impl FnOnce(io::Error) -> Self {
        let what = what.into();
        move |source| Self::System { what, source }
    }
}

/// A step of the child that failed: text, as it has to cross to the caller.
#[derive(Debug)]
pub(crate) struct Failed(pub(crate) String);

pub(crate) type Step<T = ()> = Result<T, Failed>;

/// Names the step that failed.
pub(crate) trait During<T> {
    fn during(self, what: impl FnOnce() -> String) -> Step<T>;
}

impl<T, E: Into<io::Error>> During<T> for Result<T, E> {
    fn during(self, what: impl FnOnce() -> String) -> Step<T> {
        self.map_err(|error| {
            let error: io::Error = error.into();
            Failed(format!("cannot {}: {error}", what()))
        })
    }
}
