//! Why a configuration was refused: every problem of every file at once, each with its place.

use std::fmt;
use std::io;
use std::path::PathBuf;

/// Why no configuration could be made of the files.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum ConfigError {
    /// A file could not be read.
    #[error("cannot read the configuration file {}", path.display())]
    Read {
        /// Which.
        path: PathBuf,
        /// The system's answer.
        #[source]
        source: io::Error,
    },
    /// The directory of drop-ins exists and could not be listed.
    #[error("cannot list the configuration directory {}", path.display())]
    List {
        /// Which.
        path: PathBuf,
        /// The system's answer.
        #[source]
        source: io::Error,
    },
    /// A file is larger than any configuration is, so it is something else.
    #[error("the configuration file {} is larger than {limit} bytes", path.display())]
    TooLarge {
        /// Which.
        path: PathBuf,
        /// The most that is read, bytes.
        limit: u64,
    },
    /// The files were read and contain mistakes. The text has one line per problem.
    #[error("{}", lines(problems))]
    Invalid {
        /// At least one; in the order of the files and of their lines.
        problems: Vec<Problem>,
    },
}

/// One mistake in a configuration file.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Problem {
    /// The file that has to be edited.
    pub file: PathBuf,
    /// Counted from 1; `None` when the mistake is that something is nowhere said.
    pub line: Option<usize>,
    /// Dotted name, e.g. `runtime.handlers.runc.path`; empty for a syntax error.
    pub key: String,
    /// What is wrong.
    pub kind: ProblemKind,
}

/// What is wrong with a key.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum ProblemKind {
    /// The file is not TOML here.
    Syntax {
        /// The parser's words.
        message: String,
    },
    /// There is no such key.
    UnknownKey {
        /// The known key that looks most like it.
        nearest: String,
    },
    /// The value has the wrong type or is out of range.
    BadValue {
        /// The value as it was written, shortened.
        found: String,
        /// What may stand there.
        allowed: String,
    },
    /// The value is fine by itself and contradicts another key.
    Contradiction {
        /// What contradicts, and what would not.
        detail: String,
    },
}

impl fmt::Display for Problem {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}:", self.file.display())?;
        if let Some(line) = self.line {
            write!(f, "{line}:")?;
        }
        let key = &self.key;
        match &self.kind {
            ProblemKind::Syntax { message } => write!(f, " not valid TOML: {message}"),
            ProblemKind::UnknownKey { nearest } => {
                write!(f, " unknown key {key}; the nearest known key is {nearest}")
            }
            ProblemKind::BadValue { found, allowed } => write!(f, " {key} = {found}: allowed is {allowed}"),
            ProblemKind::Contradiction { detail } => write!(f, " {key}: {detail}"),
        }
    }
}

fn lines(problems: &[Problem]) -> String {
    let lines: Vec<String> = problems.iter().map(ToString::to_string).collect();
    lines.join("\n")
}
