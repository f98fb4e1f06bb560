//! Images: pulled through mirrors, verified before they can be seen, kept as layers, given to containers as root file systems.
//!
//! | file | idea |
//! |---|---|
//! | `store.rs` | what callers do; opening after whatever happened |
//! | `catalog.rs` | the images there are and their names; changes and published copies |
//! | `pull.rs` | from a name to an image |
//! | `layers.rs` | layers on disk: how one comes in, when one goes |
//! | `artifact.rs` | what is no image: files under their titles |
//! | `snapshots.rs` | writable layers of containers |
//! | `machine.rs` | images for virtual machines |
//! | `usage.rs` | how much they hold |
//! | `mount.rs` | overlayfs |
//! | `idmap.rs` | overlayfs with the ids of a user namespace |
//! | `database.rs` | what is remembered, in redb |
//! | `flight.rs` | work that several want is done once |
//! | `tree.rs` | directories that a crash must not leave |
//!
//! Invariants: a layer has its name only after its digests were verified; an image is in the database only after its layers are on the
//! disk; whatever is neither is in `ingest/`, which every start empties; reading never waits for a pull or an fsync.

mod artifact;
mod catalog;
mod database;
mod error;
mod flight;
mod idmap;
mod layers;
mod machine;
mod mount;
mod pull;
mod snapshots;
mod store;
mod sys;
mod tree;
mod usage;

use std::path::PathBuf;
use std::sync::Arc;

pub use error::{ErrorKind, ImageError};
pub use machine::MachineImage;
pub use podvisor_registry::{Credentials, Reference};
pub use store::ImageStore;

/// Where the store lives and what it pulls through.
#[derive(Debug, Clone)]
pub struct Options {
    /// Persistent directory of the store (`<root>/images`).
    pub root: PathBuf,
    /// Volatile directory (`<run>/images`) for short names in mount options.
    pub run: PathBuf,
    /// Registry access.
    pub registry: podvisor_registry::Options,
    /// Layers fetched at once per image.
    pub parallel_layers: usize,
    /// Whether a pull makes the image for virtual machines too, instead of the first one that wants it.
    pub machine_images: bool,
}

/// An image as the CRI shows it.
#[derive(Debug, Clone)]
pub struct Image {
    /// `sha256:…` of the configuration, of an artifact's manifest: the one identity used in every RPC.
    pub id: String,
    /// Its type, where it is an OCI artifact: it can be mounted, and no container can be made from it.
    pub artifact: Option<String>,
    /// `registry/repository:tag`, sorted.
    pub repo_tags: Vec<String>,
    /// `registry/repository@sha256:…`, sorted.
    pub repo_digests: Vec<String>,
    /// Compressed layers, manifest and configuration, bytes.
    pub size: u64,
    /// The image configuration, parsed; an artifact's is empty.
    pub config: Arc<oci_spec::image::ImageConfiguration>,
    /// The image configuration as it was pulled (JSON); an artifact's is empty.
    pub raw_config: Arc<str>,
    /// The garbage collector must leave it alone (the pause image).
    pub pinned: bool,
    /// When it was pulled first, ns since the epoch.
    pub pulled_at: i64,
}

/// A container's root file system.
#[derive(Debug, Clone, PartialEq, Eq, serde::Serialize, serde::Deserialize)]
pub struct Rootfs {
    /// Name of the snapshot (the container's id).
    pub key: String,
    /// Layer directories, topmost first, as overlayfs wants them.
    pub lower: Vec<PathBuf>,
    /// Writable directory; `None` for a read-only view of the image.
    pub upper: Option<PathBuf>,
    /// overlayfs' work directory.
    pub work: Option<PathBuf>,
}

impl Rootfs {
    /// The image alone.
    #[must_use]
    pub fn without_changes(&self) -> Self {
        Self { upper: None, work: None, ..self.clone() }
    }

    /// The directory that has nothing in it but the directories `upper` and `work`, for overlayfs somewhere else. `None`: there is none.
    pub fn changes(&self) -> Option<&std::path::Path> {
        self.upper.as_deref().filter(|upper| upper.ends_with("upper"))?.parent()
    }
}

/// Use of a file system, for ImageFsInfo and stats.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct FsUsage {
    /// The one stable mount point (a directory of the store).
    pub mountpoint: PathBuf,
    /// Bytes.
    pub used_bytes: u64,
    /// Inodes.
    pub inodes_used: u64,
}
