//! Volumes in the guest's memory: emptyDirs, on huge pages too, and copies of what kubelet changes on the host, written here as kubelet writes it, so that
//! programs see the same events (kubelet, `pkg/volume/util/atomic_writer.go`).
//!
//! Containers may have written to a volume: no link in one is ever followed here.

use std::collections::BTreeSet;
use std::fs::{self, File};
use std::io::Write as _;
use std::os::fd::{AsFd, OwnedFd};
use std::path::{Component, Path, PathBuf};

use podvisor_proto::agent::entry::Kind;
use podvisor_proto::agent::{AddVolume, Attributes, Entry, WriteVersion};
use rustix::fs::{AtFlags, FileType, Gid, Mode, OFlags, ResolveFlags, Timespec, Timestamps, UTIME_OMIT, Uid};
use rustix::io::Errno;
use rustix::mount::MountFlags;

use crate::boot::RUN;
use crate::container::check_id;
use crate::failure::Failure;
use crate::storage::{make, mounted, release};

const DATA: &str = "..data";
const NEW_DATA: &str = "..data_tmp";

/// Those that there are.
#[derive(Debug, Default)]
pub(crate) struct Volumes {
    names: BTreeSet<String>,
}

/// Where they are.
pub(crate) fn directory() -> PathBuf {
    Path::new(RUN).join("volumes")
}

fn place(name: &str) -> PathBuf {
    directory().join(name)
}

impl Volumes {
    pub(crate) fn add(&mut self, wanted: &AddVolume) -> Result<(), Failure> {
        let name = &wanted.name;
        check_id(name)?;
        let place = place(name);
        if !self.names.contains(name) {
            make(&place)?;
            let bounds = [("size", wanted.size), ("nr_inodes", wanted.files), ("pagesize", wanted.page_size)];
            let bounds = bounds.into_iter().filter(|(_, bound)| *bound > 0);
            let data =
                bounds.fold("mode=0755".to_owned(), |data, (key, bound)| format!("{data},{key}={bound}"));
            let kind = if wanted.page_size > 0 { "hugetlbfs" } else { "tmpfs" };
            mounted(kind, Path::new("volume"), &place, MountFlags::empty(), &data)?;
            self.names.insert(name.clone());
            let root = self.root(name)?;
            set_attributes(&root, wanted.attributes.unwrap_or_default(), name)?;
        }
        let root = self.root(name)?;
        for entry in &wanted.directories {
            let (parent, last) = parent_of(&root, entry)?;
            match rustix::fs::mkdirat(&parent, last, Mode::from_raw_mode(0o700)) {
                Ok(()) => {
                    let made = inside(&parent, Path::new(last), OFlags::RDONLY | OFlags::DIRECTORY);
                    set_attributes(&made.map_err(failed("open", entry))?, attributes(entry), &entry.path)?;
                }
                // What a container has made of it is for who mounts it to find.
                Err(Errno::EXIST) => {}
                Err(error) => return Err(failed("make", entry)(error)),
            }
        }
        Ok(())
    }

    fn root(&self, name: &str) -> Result<OwnedFd, Failure> {
        if !self.names.contains(name) {
            return Err(Failure::not_found(format!("no volume {name:?}")));
        }
        open_directory(&place(name))
    }

    /// Containers go on with what they have mounted.
    pub(crate) fn remove(&mut self, name: &str) -> Result<(), Failure> {
        if self.names.contains(name) {
            release(&place(name))?;
            self.names.remove(name);
        }
        Ok(())
    }

    pub(crate) fn write(&self, part: &WriteVersion) -> Result<(), Failure> {
        let version = part.version.as_str();
        let plain = version.len() > 2 && version.starts_with("..") && !version.contains(['/', '\0']);
        if !plain || [DATA, NEW_DATA].contains(&version) {
            return Err(Failure::invalid(format!("{version:?} is no name of a version")));
        }
        let root = self.root(&part.name)?;
        let present = present_version(&root);
        if present.as_deref() == Some(version) {
            return Ok(());
        }
        let directory = place(&part.name).join(version);
        if part.first {
            clear(&directory)?;
            fs::create_dir(&directory)
                .map_err(|error| Failure::system(&format!("make {}", directory.display()), error))?;
        }
        let written = open_directory(&directory)?;
        for entry in &part.entries {
            write(&written, entry)?;
        }
        if !part.last {
            return Ok(());
        }
        set_attributes(&written, part.attributes.unwrap_or_default(), version)?;
        exchange(&root, version)?;
        show(&root, &written)?;
        match present {
            Some(old) => clear(&place(&part.name).join(old)),
            None => Ok(()),
        }
    }
}

fn failed(what: &'static str, entry: &Entry) -> impl FnOnce(Errno) -> Failure {
    let path = entry.path.clone();
    move |error| Failure::system(&format!("{what} {path} of a volume"), error)
}

fn open_directory(path: &Path) -> Result<OwnedFd, Failure> {
    let flags = OFlags::RDONLY | OFlags::DIRECTORY | OFlags::NOFOLLOW | OFlags::CLOEXEC;
    rustix::fs::open(path, flags, Mode::empty())
        .map_err(|error| Failure::system(&format!("open {}", path.display()), error))
}

/// Opens what is below a directory, never by way of a link.
fn inside(directory: impl AsFd, path: &Path, flags: OFlags) -> Result<OwnedFd, Errno> {
    let path = if path.as_os_str().is_empty() { Path::new(".") } else { path };
    let resolve = ResolveFlags::BENEATH | ResolveFlags::NO_SYMLINKS;
    rustix::fs::openat2(directory, path, flags | OFlags::CLOEXEC, Mode::empty(), resolve)
}

fn attributes(entry: &Entry) -> Attributes {
    entry.attributes.unwrap_or_default()
}

/// Where an entry is to be: the directory above it, and its last part.
fn parent_of(root: impl AsFd, entry: &Entry) -> Result<(OwnedFd, &str), Failure> {
    let path = Path::new(&entry.path);
    let plain = path.components().all(|part| matches!(part, Component::Normal(_)));
    let last = path.file_name().and_then(|last| last.to_str()).filter(|_| plain);
    let last = last.ok_or_else(|| Failure::invalid(format!("{:?} is no path in a volume", entry.path)))?;
    let above = path.parent().unwrap_or(Path::new(""));
    let parent = inside(root, above, OFlags::RDONLY | OFlags::DIRECTORY).map_err(failed("find", entry))?;
    Ok((parent, last))
}

fn write(version: &OwnedFd, entry: &Entry) -> Result<(), Failure> {
    let (parent, last) = parent_of(version, entry)?;
    let attributes = attributes(entry);
    match &entry.kind {
        Some(Kind::Directory(_)) => {
            rustix::fs::mkdirat(&parent, last, Mode::from_raw_mode(0o700)).map_err(failed("make", entry))?;
            let made = inside(&parent, Path::new(last), OFlags::RDONLY | OFlags::DIRECTORY);
            set_attributes(&made.map_err(failed("open", entry))?, attributes, &entry.path)
        }
        Some(Kind::Content(content)) => {
            let flags = OFlags::WRONLY | OFlags::CREATE | OFlags::APPEND | OFlags::NOFOLLOW | OFlags::CLOEXEC;
            let file = rustix::fs::openat(&parent, last, flags, Mode::from_raw_mode(0o600));
            let mut file = File::from(file.map_err(failed("make", entry))?);
            file.write_all(content)
                .map_err(|error| Failure::system(&format!("write {} of a volume", entry.path), error))?;
            set_attributes(&file, attributes, &entry.path)
        }
        Some(Kind::Target(target)) => {
            rustix::fs::symlinkat(target, &parent, last).map_err(failed("make", entry))?;
            let (uid, gid) = owners(attributes);
            rustix::fs::chownat(&parent, last, uid, gid, AtFlags::SYMLINK_NOFOLLOW)
                .map_err(failed("give away", entry))
        }
        None => Err(Failure::invalid(format!("{:?} is of no kind", entry.path))),
    }
}

fn owners(attributes: Attributes) -> (Option<Uid>, Option<Gid>) {
    (Some(Uid::from_raw(attributes.uid)), Some(Gid::from_raw(attributes.gid)))
}

/// The owner first: a change of it takes set-ID bits away.
fn set_attributes(file: impl AsFd, attributes: Attributes, path: &str) -> Result<(), Failure> {
    let (uid, gid) = owners(attributes);
    let modified = Timespec {
        tv_sec: attributes.modified_ns.div_euclid(1_000_000_000),
        tv_nsec: attributes.modified_ns.rem_euclid(1_000_000_000),
    };
    let unchanged = Timespec { tv_sec: 0, tv_nsec: UTIME_OMIT };
    let times = Timestamps { last_access: unchanged, last_modification: modified };
    rustix::fs::fchown(&file, uid, gid)
        .and_then(|()| rustix::fs::fchmod(&file, Mode::from_raw_mode(attributes.mode & 0o7777)))
        .and_then(|()| rustix::fs::futimens(&file, &times))
        .map_err(|error| Failure::system(&format!("set the attributes of {path} in a volume"), error))
}

fn present_version(root: &OwnedFd) -> Option<String> {
    rustix::fs::readlinkat(root, DATA, Vec::new()).ok()?.into_string().ok()
}

/// Lets `..data` point to a version, in one step.
fn exchange(root: &OwnedFd, version: &str) -> Result<(), Failure> {
    let _ = rustix::fs::unlinkat(root, NEW_DATA, AtFlags::empty());
    rustix::fs::symlinkat(version, root, NEW_DATA)
        .and_then(|()| rustix::fs::renameat(root, NEW_DATA, root, DATA))
        .map_err(|error| Failure::system("exchange a volume's version", error))
}

/// Links to what a version has at its top, and none to what it has no more.
fn show(root: &OwnedFd, version: &OwnedFd) -> Result<(), Failure> {
    let failed = |error: Errno| Failure::system("link to a volume's version", error);
    let names = |directory: &OwnedFd| -> Result<Vec<(String, FileType)>, Errno> {
        let entries = rustix::fs::Dir::read_from(directory)?;
        let entries = entries.flatten().filter_map(|entry| {
            let name = entry.file_name().to_str().ok()?;
            (!name.starts_with("..") && name != ".").then(|| (name.to_owned(), entry.file_type()))
        });
        Ok(entries.collect())
    };
    let (shown, wanted) = (names(root).map_err(failed)?, names(version).map_err(failed)?);
    for (name, _) in &wanted {
        match rustix::fs::symlinkat(format!("{DATA}/{name}"), root, name.as_str()) {
            Ok(()) | Err(Errno::EXIST) => {}
            Err(error) => return Err(failed(error)),
        }
    }
    let stale = shown
        .iter()
        .filter(|(name, kind)| *kind == FileType::Symlink && wanted.iter().all(|(wanted, _)| wanted != name));
    for (name, _) in stale {
        rustix::fs::unlinkat(root, name.as_str(), AtFlags::empty()).map_err(failed)?;
    }
    Ok(())
}

/// Removes a version.
fn clear(directory: &Path) -> Result<(), Failure> {
    match fs::remove_dir_all(directory) {
        Err(error) if error.kind() != std::io::ErrorKind::NotFound => {
            Err(Failure::system(&format!("remove {}", directory.display()), error))
        }
        _ => Ok(()),
    }
}
