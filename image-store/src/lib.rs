//! Images: pulled through mirrors, verified before they can be seen, kept as layers, given to containers as root file systems.

use std::path::{Path, PathBuf};
use std::sync::Arc;

pub use podvisor_registry::{Credentials, Reference};

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
}

/// An image as the CRI shows it.
#[derive(Debug, Clone)]
pub struct Image {
    /// `sha256:…` of the configuration: the one identity used in every RPC.
    pub id: String,
    /// `registry/repository:tag`, sorted.
    pub repo_tags: Vec<String>,
    /// `registry/repository@sha256:…`, sorted.
    pub repo_digests: Vec<String>,
    /// Compressed layers, manifest and configuration, bytes.
    pub size: u64,
    /// The image configuration, parsed.
    pub config: Arc<oci_spec::image::ImageConfiguration>,
    /// The image configuration as it was pulled (JSON).
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

/// What went wrong, in kinds that the service maps to gRPC codes.
#[derive(Debug, thiserror::Error)]
#[error("placeholder")]
pub struct ImageError;

/// The store. Cheap to clone.
#[derive(Debug, Clone)]
pub struct ImageStore {}

impl ImageStore {
    /// Opens or creates the store and removes what a crash left half done.
    pub async fn open(_options: Options) -> Result<Self, ImageError> {
        todo!()
    }

    /// Pulls `name` and returns the image. The same image or layer wanted twice at once is fetched once. Dropping the future
    /// cancels the pull (unless another caller waits for it) and leaves nothing.
    pub async fn pull(&self, _name: &str, _credentials: Option<Credentials>) -> Result<Image, ImageError> {
        todo!()
    }

    /// All images, sorted by id. Never waits for a pull.
    pub fn list(&self) -> Vec<Image> {
        todo!()
    }

    /// The image that `name` (reference, id, or unambiguous id prefix) means.
    pub fn get(&self, _name: &str) -> Option<Image> {
        todo!()
    }

    /// Removes the image with all its names. Used by a container: names go at once, layers with the last container. Idempotent.
    pub async fn remove(&self, _name: &str) -> Result<(), ImageError> {
        todo!()
    }

    /// Images whose normalised reference is in `names` are pinned, all others are not.
    pub async fn pin(&self, _names: &[String]) -> Result<(), ImageError> {
        todo!()
    }

    /// Makes a snapshot of `image` (an id) for container `key`; from now on the image's layers are in use. Idempotent.
    pub async fn prepare(&self, _key: &str, _image: &str, _read_only: bool) -> Result<Rootfs, ImageError> {
        todo!()
    }

    /// Mounts a snapshot at `target`, an existing directory.
    pub fn mount(&self, _rootfs: &Rootfs, _target: &Path) -> Result<(), ImageError> {
        todo!()
    }

    /// Drops a snapshot (already unmounted) and, if it was the last user of a removed image, its layers. Idempotent.
    pub async fn release(&self, _key: &str) -> Result<(), ImageError> {
        todo!()
    }

    /// Names of all snapshots: recovery releases those without a container.
    pub fn snapshots(&self) -> Vec<String> {
        todo!()
    }

    /// Bytes and inodes in a container's writable layer (measured in the background, at most some seconds old).
    pub fn writable_usage(&self, _key: &str) -> Option<FsUsage> {
        todo!()
    }

    /// Use by images and by writable layers: CRI's two lists.
    pub fn fs_info(&self) -> (FsUsage, FsUsage) {
        todo!()
    }
}
