//! From the configuration of CRI-O or containerd to one of podvisor's: what was set there and has an equivalent here, and a report of
//! everything else.
//!
//! Read is what the other daemon reads: CRI-O's `crio.conf` with `crio.conf.d/*` (crio.conf(5)), containerd's `config.toml` of version 1 to
//! 3 with its `imports` (containerd's docs/cri/config.md). Keys that are not set there keep podvisor's defaults.

mod containerd;
mod crio;
mod draft;
mod registries;
mod runtimes;
mod source;

use std::fmt;
use std::path::{Path, PathBuf};

use crate::Config;
use crate::error::ConfigError;

/// Whose configuration is read.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum From {
    /// CRI-O's.
    Crio,
    /// containerd's.
    Containerd,
}

impl From {
    /// Where it is unless told otherwise.
    pub fn default_file(self) -> &'static Path {
        Path::new(match self {
            Self::Crio => "/etc/crio/crio.conf",
            Self::Containerd => "/etc/containerd/config.toml",
        })
    }
}

/// Why nothing could be made of it.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum ImportError {
    /// A file could not be read.
    #[error(transparent)]
    Read(#[from] ConfigError),
    /// There is neither the file nor a drop-in.
    #[error("there is no {} and no file that would be read beside it: name the file to import", path.display())]
    Nothing {
        /// The file that was named, or the default one.
        path: PathBuf,
    },
    /// A file is no TOML.
    #[error("{}:{line}: {message}", path.display())]
    Syntax {
        /// Which.
        path: PathBuf,
        /// Counted from 1.
        line: usize,
        /// What the parser says.
        message: String,
    },
    /// Files import each other without end.
    #[error("{} imports more than {limit} files", path.display())]
    TooMany {
        /// The first file.
        path: PathBuf,
        /// The most that are read.
        limit: usize,
    },
}

/// A configuration of podvisor's that was made from another's.
#[derive(Debug)]
pub struct Imported {
    /// The configuration file: valid, and only with what differs from the default.
    pub toml: String,
    /// What became of every key that was set.
    pub notes: Vec<Note>,
}

/// What became of one key.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Note {
    /// Dotted, as it stands in the file.
    pub key: String,
    /// The file that has set it last; empty for what stands nowhere.
    pub file: PathBuf,
    /// What became of it.
    pub fate: Fate,
}

/// What becomes of a key.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Fate {
    /// It is a key of podvisor's now: this one.
    Taken(String),
    /// podvisor behaves so without it.
    Needless(String),
    /// Somebody has to do this.
    ToDo(String),
    /// podvisor has nothing like it; the text says what it does instead, where that is known.
    Lost(String),
}

/// Reads `file` and what belongs to it.
pub fn import(from: From, file: &Path) -> Result<Imported, ImportError> {
    let mut source = match from {
        From::Crio => crio::read(file)?,
        From::Containerd => containerd::read(file)?,
    };
    let mut draft = draft::Draft::default();
    match from {
        From::Crio => crio::translate(&mut source, &mut draft),
        From::Containerd => containerd::translate(&mut source, &mut draft),
    }
    let needless = match from {
        From::Crio => crio::NEEDLESS,
        From::Containerd => containerd::NEEDLESS,
    };
    draft.rest(source, needless);
    Ok(draft.finish())
}

impl Imported {
    /// The configuration that the file makes.
    pub fn config(&self) -> Result<Config, ConfigError> {
        Config::parse(Path::new("config.toml"), &self.toml)
    }

    /// The report, one paragraph per fate.
    pub fn report(&self) -> String {
        let mut paragraphs = Vec::new();
        for title in [Fate::TAKEN, Fate::TO_DO, Fate::LOST, Fate::NEEDLESS] {
            let notes = self.notes.iter().filter(|note| note.fate.parts().0 == title);
            let lines: Vec<_> = notes.map(|note| format!("  {note}\n")).collect();
            if !lines.is_empty() {
                paragraphs.push(format!("{title}:\n{}", lines.concat()));
            }
        }
        paragraphs.join("\n")
    }
}

impl Fate {
    const TAKEN: &str = "Taken over";
    const TO_DO: &str = "To be done by hand";
    const LOST: &str = "Without equivalent";
    const NEEDLESS: &str = "Not needed";

    /// The paragraph of the report that it stands in, and what is said there.
    fn parts(&self) -> (&'static str, &str) {
        match self {
            Self::Taken(text) => (Self::TAKEN, text),
            Self::ToDo(text) => (Self::TO_DO, text),
            Self::Lost(text) => (Self::LOST, text),
            Self::Needless(text) => (Self::NEEDLESS, text),
        }
    }
}

impl fmt::Display for Note {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.key)?;
        if let Some(name) = self.file.file_name() {
            write!(f, " ({})", name.to_string_lossy())?;
        }
        match &self.fate {
            Fate::Taken(key) => write!(f, " -> {key}"),
            fate if fate.parts().1.is_empty() => Ok(()),
            fate => write!(f, ": {}", fate.parts().1.replace('\n', "\n      ")),
        }
    }
}
