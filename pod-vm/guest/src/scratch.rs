//! A directory for what is fetched: on the disk of the guests, because `/tmp` is often memory, and one at a time.

use std::fs::{self, File, OpenOptions};
use std::io;
use std::path::{Path, PathBuf};

use rustix::fs::{FlockOperation, flock};

/// An empty directory that is removed at the end. If the program is ended before, the next one removes it.
#[derive(Debug)]
pub struct Scratch {
    path: PathBuf,
    /// Held until the directory is gone.
    _lock: File,
}

impl Scratch {
    /// Waits for another one in `directory` to end.
    pub(crate) fn new(directory: &Path) -> io::Result<Self> {
        let lock = OpenOptions::new()
            .create(true)
            .truncate(false)
            .write(true)
            .open(directory.join(".scratch.lock"))?;
        flock(&lock, FlockOperation::LockExclusive)?;
        let path = directory.join(".scratch");
        match fs::remove_dir_all(&path) {
            Err(error) if error.kind() != io::ErrorKind::NotFound => return Err(error),
            _ => fs::create_dir(&path)?,
        }
        Ok(Self { path, _lock: lock })
    }

    /// The directory.
    pub fn path(&self) -> &Path {
        &self.path
    }
}

impl Drop for Scratch {
    fn drop(&mut self) {
        // What stays is removed by the next one.
        let _ = fs::remove_dir_all(&self.path);
    }
}
