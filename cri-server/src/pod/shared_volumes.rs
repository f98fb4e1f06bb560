//! Volumes in a pod's share: a source is mounted there once, whatever number of the pod's containers use it. To a guest each mount is a file
//! system of its own, and locks and shared memory hold within one.
//!
//! Which containers use a mount is written in files of the pod's run directory, where no guest reaches them:
//!
//! ```text
//! <run>/pods/<pod>/volumes/       locked (flock(2)) by who adds or releases
//!     <name>/<container>          how it uses the mount: "rw" or "ro"
//! ```
//!
//! The mount is `volumes/<name>` in the file server's mount namespace. Its name is what makes two sources the same: file and file system,
//! and what about the mount cannot be changed for one user alone. It is read-only as long as all its users are.

use std::fs::{self, File};
use std::io::ErrorKind;
use std::os::fd::AsFd;
use std::os::unix::fs::{MetadataExt, OpenOptionsExt};
use std::path::{Path, PathBuf};

use rustix::fs::{AtFlags, CWD, FlockOperation, StatVfsMountFlags, StatxFlags};
use rustix::io::Errno;
use rustix::mount::{MountFlags, OpenTreeFlags, UnmountFlags, mount, open_tree, unmount};

use super::record::{PodRecord, ProcessIdentity};
use super::share::{Access, SIZE, copy, failed, in_guest, in_living_server, in_server, make_directory};
use crate::error::PodError;
use crate::id::{ContainerId, PodId};
use crate::mount_attr;
use crate::node::Node;

/// In the share.
const PLACE: &str = "volumes";

/// Who uses what, of one pod; nobody else changes it meanwhile.
#[derive(Debug)]
struct Users {
    directory: PathBuf,
    _lock: File,
}

/// Where it is written.
pub(super) fn directory(node: &Node, pod: &PodId) -> PathBuf {
    node.pod_directory(pod).join("volumes")
}

/// Whether containers of a pod have something of a file system in the share.
pub(super) fn uses_device(node: &Node, pod: &PodId, device: u64) -> bool {
    let names = fs::read_dir(directory(node, pod)).into_iter().flatten().flatten();
    let prefix = format!("{device:x}-");
    names.map(|name| name.file_name()).any(|name| name.to_string_lossy().starts_with(&prefix))
}

/// What a container writes down about its use of a volume.
const WRITES: &str = "rw";
const READS: &str = "ro";

impl Users {
    /// `None`: the pod has, or had, no volumes.
    fn existing(directory: PathBuf) -> Result<Option<Self>, PodError> {
        let lock = match File::open(&directory) {
            Ok(lock) => lock,
            Err(error) if error.kind() == ErrorKind::NotFound => return Ok(None),
            Err(source) => return Err(PodError::File { operation: "open", path: directory, source }),
        };
        rustix::fs::flock(&lock, FlockOperation::LockExclusive).map_err(failed("lock", &directory))?;
        Ok(Some(Self { directory, _lock: lock }))
    }

    fn of(node: &Node, pod: &PodId) -> Result<Self, PodError> {
        let directory = directory(node, pod);
        make_directory(&directory)?;
        let gone = || PodError::NotReady { id: pod.to_string(), why: "it is being stopped".to_owned() };
        Self::existing(directory)?.ok_or_else(gone)
    }

    /// Writes down that a container uses a volume; one that writes it at another place too stays one that writes.
    fn add(&self, name: &str, container: &str, read_only: bool) -> Result<(), PodError> {
        let directory = self.directory.join(name);
        make_directory(&directory)?;
        let path = directory.join(container);
        if fs::read_to_string(&path).is_ok_and(|present| present == WRITES) {
            return Ok(());
        }
        fs::write(&path, if read_only { READS } else { WRITES }).map_err(|source| PodError::File {
            operation: "write",
            path,
            source,
        })
    }

    /// The other users of a volume, and whether all of them only read.
    fn others(&self, name: &str, container: &str) -> (usize, bool) {
        let users = fs::read_dir(self.directory.join(name)).into_iter().flatten().flatten();
        let others = users.filter(|user| user.file_name() != container);
        let reads = |user: fs::DirEntry| fs::read_to_string(user.path()).is_ok_and(|use_| use_ == READS);
        others.map(reads).fold((0, true), |(count, all), reads| (count + 1, all && reads))
    }

    /// Names of the volumes that a container uses.
    fn used_by(&self, container: &str) -> Vec<String> {
        let names = fs::read_dir(&self.directory).into_iter().flatten().flatten();
        let used = names.filter(|name| name.path().join(container).exists());
        used.filter_map(|name| name.file_name().into_string().ok()).collect()
    }

    fn remove(&self, name: &str, container: &str) -> Result<(), PodError> {
        let path = self.directory.join(name).join(container);
        match fs::remove_file(&path) {
            Err(source) if source.kind() != ErrorKind::NotFound => {
                return Err(PodError::File { operation: "remove", path, source });
            }
            _ => {}
        }
        // Not empty as long as there are others.
        let _ = fs::remove_dir(self.directory.join(name));
        Ok(())
    }
}

/// What a source is called, and whether its mount on the host is read-only already.
fn identify(source: &Path, access: &Access<'_>, has_mounts_below: bool) -> Result<(String, bool), PodError> {
    let status = rustix::fs::stat(source).map_err(failed("look at", source))?;
    let flags = rustix::fs::statvfs(source).map_err(failed("look at", source))?.f_flag;
    let mut name = format!("{:x}-{:x}-{:x}", status.st_dev, status.st_ino, flags.bits());
    if access.follows {
        name.push_str("-follows");
    }
    if access.attributes.user.is_some() {
        name.push_str("-mapped");
    }
    if has_mounts_below {
        // Which mounts these are, and whether they can be written, belongs to it.
        let mount = rustix::fs::statx(CWD, source, AtFlags::empty(), StatxFlags::MNT_ID)
            .map_err(failed("look at", source))?;
        let kind = match (access.attributes.read_only, access.attributes.recursive) {
            (false, _) => WRITES,
            (true, false) => READS,
            (true, true) => "rro",
        };
        name = format!("{name}-{:x}-{kind}", mount.stx_mnt_id);
    }
    Ok((name, flags.contains(StatVfsMountFlags::RDONLY)))
}

/// Shows `source` to the guest for a container; gives the path that the guest sees it at. Blocking.
pub(super) fn add(
    node: &Node,
    pod: &PodRecord,
    container: &ContainerId,
    source: &Path,
    access: Access<'_>,
    has_mounts_below: bool,
) -> Result<PathBuf, PodError> {
    let (name, on_host) = identify(source, &access, has_mounts_below)?;
    let users = Users::of(node, &pod.id)?;
    users.add(&name, container.as_str(), access.attributes.read_only)?;
    let (_, others_read) = users.others(&name, container.as_str());
    let writes = fs::read_to_string(users.directory.join(&name).join(container.as_str()));
    let read_only = others_read && writes.is_ok_and(|own| own == READS);
    let tree = copy(source, access.attributes, access.follows)?;
    let target = Path::new("/").join(PLACE).join(&name);
    in_living_server(pod, || {
        place()?;
        if is_mounted(&target) {
            // What the host has read-only itself stays so.
            if on_host { Ok(()) } else { set_read_only(&target, read_only) }
        } else {
            tree.attach(&target)
        }
    })?;
    Ok(in_guest(Path::new(PLACE).join(name)))
}

/// Takes a container's volumes away where it was the last to use them. Idempotent. Blocking.
pub(super) fn release(directory: PathBuf, server: ProcessIdentity, container: &str) -> Result<(), PodError> {
    let Some(users) = Users::existing(directory)? else { return Ok(()) };
    for name in users.used_by(container) {
        let target = Path::new("/").join(PLACE).join(&name);
        let (others, others_read) = users.others(&name, container);
        in_server(server, || {
            if others == 0 {
                return take_down(&target);
            }
            // Somebody may have it open for writing still: then it stays as it is until the next one leaves.
            if others_read && let Err(error) = set_read_only(&target, true) {
                tracing::debug!(container, error = crate::error::chain(&error), "a volume stays writable");
            }
            Ok(())
        })?;
        users.remove(&name, container)?;
    }
    Ok(())
}

/// The directory of mount points, in the file server's mount namespace: a mount of its own, so that nothing in it can be moved.
fn place() -> Result<(), PodError> {
    let place = Path::new("/").join(PLACE);
    if is_mounted(&place) {
        return Ok(());
    }
    make_directory(&place)?;
    let flags = MountFlags::NOSUID | MountFlags::NODEV | MountFlags::NOEXEC;
    mount("podvisor-share", &place, "tmpfs", flags, SIZE).map_err(failed("mount a tmpfs at", &place))
}

/// Whether something is mounted at a path of the share; never by way of a link, which a guest may have put there.
fn is_mounted(path: &Path) -> bool {
    let parent = path.parent().and_then(|parent| fs::symlink_metadata(parent).ok());
    let here = fs::symlink_metadata(path).ok();
    matches!((parent, here), (Some(parent), Some(here)) if parent.dev() != here.dev())
}

fn set_read_only(target: &Path, read_only: bool) -> Result<(), PodError> {
    let flags = OpenTreeFlags::OPEN_TREE_CLOEXEC | OpenTreeFlags::AT_SYMLINK_NOFOLLOW;
    let mount = open_tree(CWD, target, flags).map_err(failed("open", target))?;
    mount_attr::set_read_only(mount.as_fd(), read_only).map_err(|source| PodError::File {
        operation: "set the attributes of",
        path: target.to_owned(),
        source,
    })
}

fn take_down(target: &Path) -> Result<(), PodError> {
    match unmount(target, UnmountFlags::DETACH | UnmountFlags::NOFOLLOW) {
        Ok(()) | Err(Errno::INVAL | Errno::NOENT | Errno::NOTDIR | Errno::LOOP) => {}
        Err(error) => return Err(failed("unmount", target)(error)),
    }
    // Mount points are the guest's to leave something in: they go with the machine at the latest.
    let _ = fs::remove_dir(target).or_else(|_| fs::remove_file(target));
    Ok(())
}

/// A mount point that is a file.
pub(super) fn make_file(path: &Path) -> Result<(), PodError> {
    let mut options = File::options();
    options.write(true).create(true).custom_flags(libc::O_NOFOLLOW);
    let made = options.open(path);
    made.map(drop).map_err(|source| PodError::File { operation: "make", path: path.to_owned(), source })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn users(directory: &Path) -> Users {
        Users::existing(directory.to_owned()).unwrap().unwrap()
    }

    #[test]
    fn a_volume_is_read_only_as_long_as_all_its_users_are() {
        let directory = tempfile::tempdir().unwrap();
        let users = users(directory.path());
        users.add("v", "reads", true).unwrap();
        users.add("v", "both", false).unwrap();
        // At a second place.
        users.add("v", "both", true).unwrap();
        assert_eq!(users.others("v", "reads"), (1, false));
        assert_eq!(users.others("v", "both"), (1, true));
        assert_eq!(users.others("v", "new"), (2, false));
    }

    #[test]
    fn who_has_gone_is_forgotten_with_what_only_it_used() {
        let directory = tempfile::tempdir().unwrap();
        let users = users(directory.path());
        users.add("shared", "a", true).unwrap();
        users.add("shared", "b", true).unwrap();
        users.add("own", "a", true).unwrap();
        let mut used = users.used_by("a");
        used.sort();
        assert_eq!(used, ["own", "shared"]);
        for _ in 0..2 {
            for name in ["own", "shared"] {
                users.remove(name, "a").unwrap();
            }
        }
        assert!(users.used_by("a").is_empty());
        assert!(!directory.path().join("own").exists());
        assert_eq!(users.used_by("b"), ["shared"]);
        assert!(Users::existing(directory.path().join("none")).unwrap().is_none());
    }

    #[test]
    fn the_same_file_has_one_name_whatever_it_is_called() {
        let directory = tempfile::tempdir().unwrap();
        let (file, link) = (directory.path().join("file"), directory.path().join("link"));
        fs::write(&file, "").unwrap();
        fs::hard_link(&file, &link).unwrap();
        let access = Access::default();
        let named = |path: &Path, access: &Access<'_>, below| identify(path, access, below).unwrap().0;
        assert_eq!(named(&file, &access, false), named(&link, &access, false));
        let follows = Access { follows: true, ..access };
        assert_ne!(named(&file, &access, false), named(&file, &follows, false));
        assert_ne!(named(&file, &access, false), named(directory.path(), &access, false));
        let reads = Access {
            attributes: crate::mount_attr::Attributes { read_only: true, ..access.attributes },
            ..access
        };
        // What is mounted below cannot be changed for one user alone.
        assert_eq!(named(&file, &access, false), named(&file, &reads, false));
        assert_ne!(named(&file, &access, true), named(&file, &reads, true));
    }
}
