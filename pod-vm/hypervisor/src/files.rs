//! Descriptors that the machine's process is handed, opened with the rights of this one.

use std::fs::{File, OpenOptions};
use std::io;
use std::os::fd::{AsRawFd, OwnedFd};
use std::os::unix::fs::{FileTypeExt, MetadataExt, OpenOptionsExt};
use std::os::unix::net::UnixStream;

use podvisor_proto::hypervisor::{Disk, Share};

use crate::failure::Failure;

/// A disk's file as it was opened.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct DiskFile {
    /// Of its descriptor.
    pub number: i32,
    /// It is no regular file.
    pub block_device: bool,
}

/// What the machine's process gets.
#[derive(Debug, Default)]
pub struct Handed(Vec<OwnedFd>);

impl Handed {
    /// Takes one over; gives its number, which is the same in that process.
    pub fn add(&mut self, descriptor: impl Into<OwnedFd>) -> i32 {
        let descriptor = descriptor.into();
        let number = descriptor.as_raw_fd();
        self.0.push(descriptor);
        number
    }

    /// Of all of them.
    pub fn numbers(&self) -> Vec<i32> {
        self.0.iter().map(AsRawFd::as_raw_fd).collect()
    }
}

/// A regular file that can be opened once more, as `user`, by its number: in whatever directory it is, but with the rights of the file itself.
pub fn open_for_reading(what: &str, path: &str, user: u32) -> Result<File, Failure> {
    let failed = |cause: String| Failure::failed(format!("open the {what} {path}"), cause);
    let file = File::open(path).map_err(|error| failed(error.to_string()))?;
    let metadata = file.metadata().map_err(|error| failed(error.to_string()))?;
    if !metadata.is_file() {
        return Err(failed("it is no regular file".to_owned()));
    }
    let mode = metadata.mode();
    let readable = match user {
        0 => true,
        user if metadata.uid() == user => mode & 0o400 != 0,
        user if metadata.gid() == user => mode & 0o040 != 0,
        _ => mode & 0o004 != 0,
    };
    readable.then_some(file).ok_or_else(|| failed(format!("user {user} may not read it (chmod o+r lets it)")))
}

/// The connection to a share's server.
pub fn connect_share(share: &Share) -> Result<UnixStream, Failure> {
    UnixStream::connect(&share.socket_path).map_err(|error| {
        let attempt = format!("connect to the file server of share {} at {}", share.tag, share.socket_path);
        Failure::failed(attempt, error)
    })
}

/// A disk's file; the number in the result is that of the descriptor.
pub fn open_disk(disk: &Disk) -> Result<(File, DiskFile), Failure> {
    let open = || -> io::Result<(File, bool)> {
        let mut options = OpenOptions::new();
        // Nothing that would make opening wait.
        options.read(true).write(!disk.read_only).custom_flags(libc::O_NONBLOCK | libc::O_CLOEXEC);
        let file = options.open(&disk.path)?;
        let kind = file.metadata()?.file_type();
        if !kind.is_file() && !kind.is_block_device() {
            return Err(io::Error::other("it is neither a regular file nor a block device"));
        }
        Ok((file, kind.is_block_device()))
    };
    let (file, block_device) = open()
        .map_err(|error| Failure::failed(format!("open disk {} at {}", disk.serial, disk.path), error))?;
    let number = file.as_raw_fd();
    Ok((file, DiskFile { number, block_device }))
}
