//! Directories that are not finished or not needed any more: they live in `ingest/`, which every start empties, so that a crash
//! leaves nothing.

use std::fs::File;
use std::os::fd::AsFd;
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};

use crate::error::ImageError;

/// A directory in `ingest/`, removed unless it is renamed away.
#[derive(Debug)]
pub(crate) struct Scratch {
    path: Option<PathBuf>,
}

impl Scratch {
    /// An empty one.
    pub(crate) fn new(ingest: &Path) -> Result<Self, ImageError> {
        let path = ingest.join(fresh_name());
        std::fs::create_dir(&path).map_err(ImageError::io("make", &path))?;
        let scratch = Self { path: Some(path) };
        // Whatever the umask: it becomes a layer's root directory, where the layer does not say otherwise.
        let path = scratch.path();
        std::fs::set_permissions(path, std::fs::Permissions::from_mode(0o755))
            .map_err(ImageError::io("set the mode of", path))?;
        Ok(scratch)
    }

    /// One that an earlier run left in `ingest/`.
    pub(crate) fn left(path: PathBuf) -> Self {
        Self { path: Some(path) }
    }

    /// A directory of the store that nobody needs any more.
    pub(crate) fn of(ingest: &Path, directory: &Path) -> Result<Self, ImageError> {
        let path = ingest.join(fresh_name());
        std::fs::rename(directory, &path).map_err(ImageError::io("take away", directory))?;
        Ok(Self { path: Some(path) })
    }

    fn path(&self) -> &Path {
        self.path.as_deref().expect("present until it is renamed or discarded")
    }

    /// A name inside it.
    pub(crate) fn file(&self, name: &str) -> PathBuf {
        self.path().join(name)
    }

    pub(crate) fn open(&self) -> Result<File, ImageError> {
        File::open(self.path()).map_err(ImageError::io("open", self.path()))
    }

    /// Gives it its final name.
    pub(crate) fn rename(mut self, to: &Path) -> Result<(), ImageError> {
        std::fs::rename(self.path(), to).map_err(ImageError::io("rename to", to))?;
        self.path = None;
        Ok(())
    }

    /// Removes it on a thread of its own; on this one if there is none to be had.
    pub(crate) fn discard(self) {
        // What cannot start drops what it was given, and dropping removes.
        let _ = std::thread::Builder::new().name("discard".into()).spawn(move || drop(self));
    }
}

impl Drop for Scratch {
    fn drop(&mut self) {
        if let Some(path) = self.path.take()
            && let Err(error) = remove(&path)
        {
            tracing::warn!(path = %path.display(), error = %error, "cannot remove a directory, the next start tries again");
        }
    }
}

fn fresh_name() -> String {
    let mut bytes = [0_u8; 8];
    // Fails only where the kernel has no random source (before 3.17); then a name that is taken is an error.
    let _ = rustix::rand::getrandom(&mut bytes, rustix::rand::GetRandomFlags::empty());
    format!("{:016x}", u64::from_ne_bytes(bytes))
}

/// Removes a tree that an image has made: deep, with odd modes, never followed.
pub(crate) fn remove(path: &Path) -> Result<(), ImageError> {
    let (Some(parent), Some(name)) = (path.parent(), path.file_name()) else { return Ok(()) };
    let directory = File::open(parent).map_err(ImageError::io("open", parent))?;
    podvisor_unpack::remove_tree(directory.as_fd(), name)
        .map_err(|error| ImageError::io("remove", path)(error.into()))
}
