//! One version of what kubelet's atomic writer writes, read from the host: whole, or not at all.

use std::fs::{File, Metadata};
use std::io::{self, Read};
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};

use podvisor_proto::agent::entry::Kind;
use podvisor_proto::agent::{Attributes, Directory, Entry, WriteVersion};
use podvisor_proto::monitor::{FOLLOWED_BYTES, FOLLOWED_FILES};
use rustix::fs::{AtFlags, FileType, Mode, OFlags, ResolveFlags};
use rustix::io::Errno;

/// The link to the present version.
pub(crate) const DATA: &str = "..data";

/// Bytes of files in one request to the agent.
const PART: usize = 512 * 1024;
/// Directories in each other.
const DEPTH: u32 = 32;
/// How often reading begins anew because the version has gone meanwhile.
const ATTEMPTS: u32 = 16;

/// A version that was true when it had been read.
#[derive(Debug)]
pub(crate) struct Version {
    pub(crate) name: String,
    attributes: Attributes,
    entries: Vec<Entry>,
    /// Of its files.
    pub(crate) bytes: u64,
}

/// Why there is none.
#[derive(Debug, thiserror::Error)]
pub(crate) enum Unreadable {
    #[error("read {path}")]
    Io { path: PathBuf, source: io::Error },
    #[error("{0} has no ..data that leads to a version")]
    NoVersion(PathBuf),
    #[error("{0} is exchanged faster than it can be read")]
    Restless(PathBuf),
    #[error("{0} has more than {FOLLOWED_BYTES} bytes or {FOLLOWED_FILES} files")]
    TooLarge(PathBuf),
}

impl Unreadable {
    pub(crate) fn at(path: &Path) -> impl FnOnce(Errno) -> Self {
        let path = path.to_owned();
        move |error| Self::Io { path, source: error.into() }
    }
}

/// What is added to ids below a number.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub(crate) struct Shift {
    pub(crate) uid: u32,
    pub(crate) gid: u32,
    /// 0: nothing is shifted.
    pub(crate) ids: u32,
}

impl Shift {
    /// Others have no name in the user namespace (`/proc/sys/kernel/overflowuid`).
    fn apply(self, id: u32, first: u32) -> u32 {
        const NOBODY: u32 = 65534;
        match self.ids {
            0 => id,
            ids if id < ids => first.saturating_add(id),
            _ => NOBODY,
        }
    }
}

pub(crate) fn attributes(metadata: &Metadata, shift: Shift) -> Attributes {
    Attributes {
        mode: metadata.mode() & 0o7777,
        uid: shift.apply(metadata.uid(), shift.uid),
        gid: shift.apply(metadata.gid(), shift.gid),
        modified_ns: metadata.mtime().saturating_mul(1_000_000_000).saturating_add(metadata.mtime_nsec()),
    }
}

/// Name of the present version.
pub(crate) fn present(root: impl AsFd) -> Result<String, Errno> {
    let target = rustix::fs::readlinkat(root, DATA, Vec::new())?;
    let target = target.into_string().map_err(|_| Errno::INVAL)?;
    let plain = target.len() > 2 && target.starts_with("..") && !target.contains('/') && target != DATA;
    if plain { Ok(target) } else { Err(Errno::INVAL) }
}

/// The present version of the volume `root`, at `path`.
pub(crate) fn read(root: BorrowedFd<'_>, path: &Path, shift: Shift) -> Result<Version, Unreadable> {
    for _ in 0..ATTEMPTS {
        let name = present(root).map_err(|_| Unreadable::NoVersion(path.to_owned()))?;
        let read = whole(root, &name, shift);
        // The old version is only touched when the new one is true: as long as the name has not changed all of it was there.
        if present(root).is_ok_and(|present| present == name) {
            return read.map_err(|failed| failed.at(path));
        }
    }
    Err(Unreadable::Restless(path.to_owned()))
}

enum Failed {
    Io(Errno),
    TooLarge,
}

impl Failed {
    fn at(self, path: &Path) -> Unreadable {
        match self {
            Self::Io(error) => Unreadable::at(path)(error),
            Self::TooLarge => Unreadable::TooLarge(path.to_owned()),
        }
    }
}

impl From<Errno> for Failed {
    fn from(error: Errno) -> Self {
        Self::Io(error)
    }
}

impl From<io::Error> for Failed {
    fn from(error: io::Error) -> Self {
        Self::Io(Errno::from_io_error(&error).unwrap_or(Errno::IO))
    }
}

fn whole(root: BorrowedFd<'_>, name: &str, shift: Shift) -> Result<Version, Failed> {
    let flags = OFlags::RDONLY | OFlags::DIRECTORY | OFlags::CLOEXEC;
    let resolve = ResolveFlags::BENEATH | ResolveFlags::NO_SYMLINKS | ResolveFlags::NO_XDEV;
    let directory = File::from(rustix::fs::openat2(root, name, flags, Mode::empty(), resolve)?);
    let mut reading = Reading { entries: Vec::new(), bytes: 0, files: 0, shift };
    reading.directory(directory.as_fd(), "", DEPTH)?;
    let attributes = attributes(&directory.metadata()?, shift);
    Ok(Version { name: name.to_owned(), attributes, entries: reading.entries, bytes: reading.bytes })
}

struct Reading {
    entries: Vec<Entry>,
    bytes: u64,
    files: usize,
    shift: Shift,
}

impl Reading {
    fn directory(&mut self, directory: BorrowedFd<'_>, prefix: &str, depth: u32) -> Result<(), Failed> {
        for entry in rustix::fs::Dir::read_from(directory)? {
            let entry = entry?;
            let Ok(name) = entry.file_name().to_str() else { continue };
            if matches!(name, "." | "..") {
                continue;
            }
            self.files += 1;
            if self.files > FOLLOWED_FILES || depth == 0 {
                return Err(Failed::TooLarge);
            }
            let path = format!("{prefix}{name}");
            let status = rustix::fs::statat(directory, name, AtFlags::SYMLINK_NOFOLLOW)?;
            match FileType::from_raw_mode(status.st_mode) {
                FileType::Directory => {
                    let opened = File::from(open(directory, name, OFlags::DIRECTORY)?);
                    let attributes = attributes(&opened.metadata()?, self.shift);
                    self.push(&path, attributes, Kind::Directory(Directory {}));
                    self.directory(opened.as_fd(), &format!("{path}/"), depth - 1)?;
                }
                FileType::RegularFile => {
                    let opened = open(directory, name, OFlags::empty())?;
                    self.file(File::from(opened), &path)?;
                }
                FileType::Symlink => {
                    let target = rustix::fs::readlinkat(directory, name, Vec::new())?;
                    let attributes = Attributes {
                        mode: 0o777,
                        uid: self.shift.apply(status.st_uid, self.shift.uid),
                        gid: self.shift.apply(status.st_gid, self.shift.gid),
                        modified_ns: 0,
                    };
                    if let Ok(target) = target.into_string() {
                        self.push(&path, attributes, Kind::Target(target));
                    }
                }
                // kubelet writes none of the others, and nothing behind them could be copied.
                _ => {}
            }
        }
        Ok(())
    }

    fn file(&mut self, file: File, path: &str) -> Result<(), Failed> {
        let attributes = attributes(&file.metadata()?, self.shift);
        let left = FOLLOWED_BYTES - self.bytes;
        let mut content = Vec::new();
        file.take(left + 1).read_to_end(&mut content)?;
        let length = u64::try_from(content.len()).unwrap_or(u64::MAX);
        if length > left {
            return Err(Failed::TooLarge);
        }
        self.bytes += length;
        if content.is_empty() {
            self.push(path, attributes, Kind::Content(Vec::new()));
        }
        for piece in content.chunks(PART) {
            self.push(path, attributes, Kind::Content(piece.to_vec()));
        }
        Ok(())
    }

    fn push(&mut self, path: &str, attributes: Attributes, kind: Kind) {
        self.entries.push(Entry { path: path.to_owned(), attributes: Some(attributes), kind: Some(kind) });
    }
}

fn open(directory: BorrowedFd<'_>, name: &str, flags: OFlags) -> Result<OwnedFd, Errno> {
    let flags = flags | OFlags::RDONLY | OFlags::NOFOLLOW | OFlags::NONBLOCK | OFlags::CLOEXEC;
    rustix::fs::openat(directory, name, flags, Mode::empty())
}

impl Version {
    /// The requests that write it to volume `name` of a guest.
    pub(crate) fn parts(self, name: &str) -> Vec<WriteVersion> {
        let empty = || WriteVersion {
            name: name.to_owned(),
            version: self.name.clone(),
            attributes: Some(self.attributes),
            ..WriteVersion::default()
        };
        let mut parts = vec![WriteVersion { first: true, ..empty() }];
        let mut bytes = 0;
        for entry in self.entries {
            let size = match &entry.kind {
                Some(Kind::Content(content)) => content.len(),
                _ => 0,
            };
            let size = size + entry.path.len() + 64;
            if bytes > 0 && bytes + size > PART {
                parts.push(empty());
                bytes = 0;
            }
            bytes += size;
            if let Some(part) = parts.last_mut() {
                part.entries.push(entry);
            }
        }
        if let Some(part) = parts.last_mut() {
            part.last = true;
        }
        parts
    }
}

#[cfg(test)]
mod tests {
    use std::fs;
    use std::os::unix::fs::{PermissionsExt, symlink};

    use super::*;

    fn volume() -> tempfile::TempDir {
        let directory = tempfile::tempdir().unwrap();
        fs::create_dir_all(directory.path().join("..1/deep")).unwrap();
        symlink("..1", directory.path().join("..data")).unwrap();
        directory
    }

    fn version(directory: &tempfile::TempDir, shift: Shift) -> Result<Version, Unreadable> {
        let root = File::open(directory.path()).unwrap();
        read(root.as_fd(), directory.path(), shift)
    }

    #[test]
    fn all_of_a_version_is_read_and_sent_in_order() {
        let directory = volume();
        let path = |name: &str| directory.path().join("..1").join(name);
        fs::write(path("deep/value"), "value").unwrap();
        fs::write(path("empty"), "").unwrap();
        fs::set_permissions(path("empty"), fs::Permissions::from_mode(0o440)).unwrap();
        fs::write(path("large"), vec![1; PART + 1]).unwrap();
        symlink("deep/value", path("link")).unwrap();
        let parts = version(&directory, Shift::default()).unwrap().parts("v");
        assert!(parts.iter().all(|part| part.name == "v" && part.version == "..1"));
        assert_eq!(parts.iter().filter(|part| part.first).count(), 1);
        assert!(parts[0].first && parts.last().unwrap().last && parts.len() >= 2);
        let entries: Vec<&Entry> = parts.iter().flat_map(|part| &part.entries).collect();
        let content = |path: &str| -> Vec<u8> {
            let pieces = entries.iter().filter(|entry| entry.path == path);
            pieces
                .flat_map(|entry| match &entry.kind {
                    Some(Kind::Content(content)) => content.clone(),
                    other => panic!("{other:?}"),
                })
                .collect()
        };
        assert_eq!(content("deep/value"), b"value");
        assert_eq!(content("large"), vec![1; PART + 1]);
        let at = |path: &str| entries.iter().position(|entry| entry.path == path).unwrap();
        assert!(at("deep") < at("deep/value"));
        assert_eq!(entries[at("empty")].attributes.unwrap().mode, 0o440);
        assert_eq!(entries[at("link")].kind, Some(Kind::Target("deep/value".into())));
    }

    #[test]
    fn what_is_too_large_is_refused() {
        let directory = volume();
        let file = directory.path().join("..1/large");
        fs::write(&file, vec![0; usize::try_from(FOLLOWED_BYTES).unwrap()]).unwrap();
        assert!(version(&directory, Shift::default()).is_ok());
        fs::write(directory.path().join("..1/more"), "x").unwrap();
        assert!(matches!(version(&directory, Shift::default()), Err(Unreadable::TooLarge(_))));
        fs::remove_file(&file).unwrap();
        for number in 0..FOLLOWED_FILES {
            fs::write(directory.path().join("..1").join(number.to_string()), "").unwrap();
        }
        assert!(matches!(version(&directory, Shift::default()), Err(Unreadable::TooLarge(_))));
    }

    #[test]
    fn a_version_is_a_directory_beside_its_link() {
        let directory = volume();
        for target in ["../x", "/etc", "..", "plain", "..data"] {
            fs::remove_file(directory.path().join("..data")).unwrap();
            symlink(target, directory.path().join("..data")).unwrap();
            assert!(version(&directory, Shift::default()).is_err(), "{target}");
        }
    }

    #[test]
    fn ids_of_a_user_namespace_are_shifted() {
        let shift = Shift { uid: 65536, gid: 131_072, ids: 65536 };
        assert_eq!(shift.apply(0, shift.uid), 65536);
        assert_eq!(shift.apply(1000, shift.gid), 132_072);
        assert_eq!(shift.apply(65536, shift.uid), 65534);
        assert_eq!(Shift::default().apply(1000, 0), 1000);
    }
}
