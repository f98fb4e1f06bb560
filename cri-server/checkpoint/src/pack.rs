//! A directory becomes an archive under its name all at once: before that there is nothing, and nothing is left of one that fails.

use std::fs::File;
use std::io::{BufWriter, Write};
use std::os::fd::AsRawFd;
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::{MetadataExt, OpenOptionsExt};
use std::path::{Path, PathBuf};

use rustix::fs::{AtFlags, CWD, Mode, OFlags, linkat, open};
use rustix::io::Errno;

use crate::tar::{Entry, Kind, Writer};
use crate::{ArchiveError, Cancel};

/// Every page of the container's memory is in it.
const MODE: u32 = 0o600;

/// Packs all that is in `directory` (files and directories) into a tar at `location`, which only root may read. One that is there is
/// replaced. Blocking.
pub fn pack(directory: &Path, location: &Path, cancel: &Cancel) -> Result<(), ArchiveError> {
    let mut unfinished = Unfinished::make(location)?;
    let failed = |error| ArchiveError::io("write", location, error);
    let mut tar = Writer::new(BufWriter::with_capacity(1 << 20, &mut unfinished.file));
    add(&mut tar, directory, Path::new(""), cancel)?;
    tar.finish().and_then(|mut output| output.flush()).map_err(failed)?;
    unfinished.file.sync_all().map_err(failed)?;
    unfinished.publish()
}

fn add(tar: &mut Writer<impl Write>, top: &Path, below: &Path, cancel: &Cancel) -> Result<(), ArchiveError> {
    let directory = top.join(below);
    let listed = std::fs::read_dir(&directory).and_then(Iterator::collect::<Result<Vec<_>, _>>);
    let mut listed = listed.map_err(|error| ArchiveError::io("list", &directory, error))?;
    listed.sort_by_key(std::fs::DirEntry::file_name);
    for entry in listed {
        cancel.check()?;
        let path = entry.path();
        let failed = |error| ArchiveError::io("read", &path, error);
        let found = entry.metadata().map_err(failed)?;
        let name = below.join(entry.file_name());
        let kind = if found.is_dir() { Kind::Directory } else { Kind::File(found.len()) };
        let header = Entry {
            path: name.as_os_str().as_bytes(),
            kind,
            mode: found.mode(),
            uid: 0,
            gid: 0,
            modified: found.mtime(),
            attributes: Vec::new(),
        };
        if found.is_dir() {
            tar.entry(&header, std::io::empty()).map_err(failed)?;
            add(tar, top, &name, cancel)?;
        } else if found.is_file() {
            tar.entry(&header, File::open(&path).map_err(failed)?).map_err(failed)?;
        }
    }
    Ok(())
}

/// A file that has no name yet; where the file system cannot do that (O_TMPFILE, open(2)) one that is removed again.
struct Unfinished {
    file: File,
    named: Option<PathBuf>,
    location: PathBuf,
}

impl Unfinished {
    fn make(location: &Path) -> Result<Self, ArchiveError> {
        let failed = |error: std::io::Error| ArchiveError::io("make", location, error);
        let directory = location.parent().unwrap_or(Path::new("/"));
        let flags = OFlags::TMPFILE | OFlags::RDWR | OFlags::CLOEXEC;
        match open(directory, flags, Mode::from_raw_mode(MODE)) {
            Ok(file) => Ok(Self { file: file.into(), named: None, location: location.to_owned() }),
            Err(Errno::OPNOTSUPP | Errno::ISDIR | Errno::INVAL) => {
                let named = aside(location);
                let mut options = File::options();
                let opened = options.write(true).read(true).create_new(true).mode(MODE).open(&named);
                let file = opened.map_err(failed)?;
                Ok(Self { file, named: Some(named), location: location.to_owned() })
            }
            Err(errno) => Err(failed(errno.into())),
        }
    }

    fn publish(mut self) -> Result<(), ArchiveError> {
        let failed = |error: std::io::Error| ArchiveError::io("make", &self.location, error);
        if self.named.is_none() {
            let own = format!("/proc/self/fd/{}", self.file.as_raw_fd());
            match linkat(CWD, &own, CWD, &self.location, AtFlags::SYMLINK_FOLLOW) {
                Ok(()) => return self.sync(),
                Err(Errno::EXIST) => {
                    let named = aside(&self.location);
                    linkat(CWD, &own, CWD, &named, AtFlags::SYMLINK_FOLLOW)
                        .map_err(|errno| failed(errno.into()))?;
                    self.named = Some(named);
                }
                Err(errno) => return Err(failed(errno.into())),
            }
        }
        if let Some(named) = &self.named {
            std::fs::rename(named, &self.location).map_err(failed)?;
            self.named = None;
        }
        self.sync()
    }

    /// So that a name that was told is there after a power cut, too.
    fn sync(&self) -> Result<(), ArchiveError> {
        let directory = self.location.parent().unwrap_or(Path::new("/"));
        File::open(directory)
            .and_then(|directory| directory.sync_all())
            .map_err(|error| ArchiveError::io("write", directory, error))
    }
}

impl Drop for Unfinished {
    fn drop(&mut self) {
        if let Some(named) = &self.named {
            let _ = std::fs::remove_file(named);
        }
    }
}

/// A name beside another one.
fn aside(location: &Path) -> PathBuf {
    let mut random = [0; 8];
    let _ = rustix::rand::getrandom(&mut random[..], rustix::rand::GetRandomFlags::empty());
    let name = location.file_name().unwrap_or_default().to_string_lossy().into_owned();
    location.with_file_name(format!(".{name}.{:016x}", u64::from_ne_bytes(random)))
}
