//! Checkpoint archives: what a container was when CRIU wrote it down, in one file, as CRI-O, containerd and checkpointctl read them
//! (KEP-2008). There is no other text about the format than those programs; checkpointctl's `lib/metadata.go` has the names.
//!
//! | entry | what |
//! |---|---|
//! | `checkpoint/` | CRIU's images |
//! | `dump.log`, `stats-dump` | CRIU's log and figures |
//! | `config.dump` | the container: [`Config`] |
//! | `spec.dump` | its OCI spec |
//! | `status.dump` | its status as the CRI has it, for containerd |
//! | `bind.mounts` | which of its mounts are files: [`BindMount`], for CRI-O |
//! | `rootfs-diff.tar` | what it has changed in its root file system: [`changes`] |
//! | `deleted.files` | what it has deleted there, paths in a JSON list |
//! | `container.log` | its log |
//!
//! | file | idea |
//! |---|---|
//! | `changes.rs` | what a writable layer says about a root file system |
//! | `tar.rs` | writing tar |
//! | `pack.rs` | a directory becomes an archive, all at once |
//! | `documents.rs` | the JSON in it |
//!
//! A root file system is the container's: nothing in it is believed to stay what it was, and no link in it is followed.

mod changes;
mod documents;
mod pack;
mod tar;

use std::io;
use std::path::PathBuf;
use std::sync::atomic::{AtomicBool, Ordering};

pub use changes::{Ids, RootFs, changes};
pub use documents::{BindMount, Config, bind_mounts};
pub use pack::pack;

/// Names in an archive.
#[allow(missing_docs)]
pub mod name {
    pub const IMAGES: &str = "checkpoint";
    pub const LOG_OF_CRIU: &str = "dump.log";
    pub const CONFIG: &str = "config.dump";
    pub const SPEC: &str = "spec.dump";
    pub const STATUS: &str = "status.dump";
    pub const BIND_MOUNTS: &str = "bind.mounts";
    pub const ROOTFS: &str = "rootfs-diff.tar";
    pub const DELETED: &str = "deleted.files";
    pub const LOG: &str = "container.log";
}

/// Why there is no archive.
#[derive(Debug, thiserror::Error)]
#[allow(missing_docs)] // the messages say it
pub enum ArchiveError {
    #[error("cannot {operation} {}", path.display())]
    Io { operation: &'static str, path: PathBuf, source: io::Error },
    #[error("{} changed while it was read", path.display())]
    Changed { path: PathBuf },
    #[error("it is not wanted any more")]
    Cancelled,
}

impl ArchiveError {
    fn io(operation: &'static str, path: impl Into<PathBuf>, source: impl Into<io::Error>) -> Self {
        Self::Io { operation, path: path.into(), source: source.into() }
    }
}

/// Ends work that takes its time.
#[derive(Debug, Default)]
pub struct Cancel(AtomicBool);

impl Cancel {
    /// Whoever works ends soon.
    pub fn cancel(&self) {
        self.0.store(true, Ordering::Relaxed);
    }

    fn check(&self) -> Result<(), ArchiveError> {
        if self.0.load(Ordering::Relaxed) { Err(ArchiveError::Cancelled) } else { Ok(()) }
    }
}
