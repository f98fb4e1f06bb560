//! Volumes that are not shared with the guest of a virtual machine but kept in its memory.
//!
//! - *emptyDir in memory.* kubelet has mounted a tmpfs at `…/volumes/kubernetes.io~empty-dir/NAME`, or a hugetlbfs. The guest gets one of its own,
//!   of the same size, with the owner and mode of the host's, for all containers of the pod and until its machine ends; what is in it is the guest's
//!   memory, charged to the container that wrote it, as on the host. A subPath of one is a directory of it. Where the host's has files
//!   already it stays shared: whoever put them there is to find them.
//! - *Volumes that kubelet changes* (configMap, secret, projected, downward API). inotify does not cross virtio-fs, so the guest gets a copy that
//!   the pod's monitor keeps in step. Told by what kubelet's atomic writer makes of them, not by their path: `..data` is a link to a
//!   directory beside it. A subPath of one is one file of one version, which kubelet never updates: it stays shared, as does what is too large.

use std::fs;
use std::os::unix::fs::MetadataExt;
use std::path::{Component, Path, PathBuf};

use podvisor_proto::agent::{AddVolume, Attributes, Directory, Entry, entry};
use podvisor_proto::cri;
use podvisor_proto::monitor::guest_volume::Kind;
use podvisor_proto::monitor::{FOLLOWED_BYTES, FOLLOWED_FILES, FollowedVolume, GuestVolume};
use podvisor_spec::UserNamespace;
use rustix::fs::{AtFlags, CWD, StatxFlags};

use super::record::PodRecord;
use super::shared_volumes;
use crate::error::PodError;
use crate::mount_table::{self, Mounted};
use crate::node::Node;

/// Where the agent has them (agent.proto, `AddVolume`).
const IN_GUEST: &str = "/run/podvisor/volumes";

/// Directories of an emptyDir that are looked through for files.
const DIRECTORIES: usize = 4096;

/// A volume for the guest, and where the guest finds the source of the mount.
#[derive(Debug)]
pub(super) struct Found {
    pub(super) volume: GuestVolume,
    pub(super) source: PathBuf,
}

/// What becomes of a mount's source; `None`: it is shared. `ids`: the mount shows its files with these of the pod's. Blocking.
pub(super) fn find(
    node: &Node,
    pod: &PodRecord,
    mount: &cri::Mount,
    source: &Path,
    ids: Option<UserNamespace>,
) -> Result<Option<Found>, PodError> {
    if !pod.machine.as_ref().is_some_and(|machine| machine.keeps_volumes) || mount.image.is_some() {
        return Ok(None);
    }
    if let Some(found) = memory(node, pod, source, ids)? {
        return Ok(Some(found));
    }
    Ok(if mount.readonly { followed(source, ids) } else { None })
}

fn followed(source: &Path, ids: Option<UserNamespace>) -> Option<Found> {
    let target = fs::read_link(source.join("..data")).ok()?;
    let name = target.to_str().filter(|name| name.starts_with("..") && name.len() > 2)?;
    let mut parts = target.components();
    if !matches!((parts.next(), parts.next()), (Some(Component::Normal(_)), None)) {
        return None;
    }
    if !fits(&source.join(name)) {
        tracing::warn!(
            volume = %source.display(),
            "a volume has more than {FOLLOWED_BYTES} bytes or {FOLLOWED_FILES} files: programs in the virtual machine see its changes, but inotify does not tell them"
        );
        return None;
    }
    let metadata = fs::metadata(source).ok()?;
    let suffix = if ids.is_some() { "-mapped" } else { "" };
    let name = format!("followed-{:x}-{:x}{suffix}", metadata.dev(), metadata.ino());
    let volume = FollowedVolume {
        host_path: source.display().to_string(),
        uid: ids.map_or(0, |ids| ids.uids.first),
        gid: ids.map_or(0, |ids| ids.gids.first),
        ids: ids.map_or(0, |ids| ids.uids.length),
        name: name.clone(),
    };
    Some(Found {
        volume: GuestVolume { kind: Some(Kind::Followed(volume)) },
        source: Path::new(IN_GUEST).join(name),
    })
}

/// Whether a version can be copied. It may go meanwhile; then the monitor finds the next one.
fn fits(version: &Path) -> bool {
    let (mut bytes, mut files) = (0, 0);
    let mut pending = vec![version.to_owned()];
    while let Some(directory) = pending.pop() {
        for entry in fs::read_dir(directory).into_iter().flatten().flatten() {
            let Ok(metadata) = entry.metadata() else { continue };
            files += 1;
            if metadata.is_dir() {
                pending.push(entry.path());
            } else {
                bytes += metadata.len();
            }
            if bytes > FOLLOWED_BYTES || files > FOLLOWED_FILES {
                return false;
            }
        }
    }
    true
}

fn memory(
    node: &Node,
    pod: &PodRecord,
    source: &Path,
    ids: Option<UserNamespace>,
) -> Result<Option<Found>, PodError> {
    let Some(EmptyDir { volume, inside, huge }) = empty_dir_in_memory(&mount_table::read(), source) else {
        return Ok(None);
    };
    // The guest is of an earlier podvisor.
    if huge && !pod.machine.as_ref().is_some_and(|machine| machine.has_huge_pages) {
        return Ok(None);
    }
    let failed = |source| PodError::File { operation: "look at", path: volume.clone(), source };
    let metadata = fs::metadata(&volume).map_err(failed)?;
    let size = rustix::fs::statvfs(&volume).map_err(|error| failed(error.into()))?;
    // Decided once for a pod: its containers are to find the same files.
    let marks = node.pod_directory(&pod.id).join("memory-volumes");
    let mark = marks.join(format!("{:x}", metadata.dev()));
    if !mark.exists() {
        if shared_volumes::uses_device(node, &pod.id, metadata.dev()) || holds_files(&volume) {
            return Ok(None);
        }
        fs::create_dir_all(&marks).and_then(|()| fs::write(&mark, "")).map_err(|source| PodError::File {
            operation: "write",
            path: mark.clone(),
            source,
        })?;
    }
    let mut directories = Vec::new();
    let mut path = PathBuf::new();
    for part in inside.components() {
        path.push(part);
        let metadata = fs::metadata(volume.join(&path)).map_err(failed)?;
        directories.push(Entry {
            path: path.display().to_string(),
            attributes: Some(attributes(&metadata, ids)),
            kind: Some(entry::Kind::Directory(Directory {})),
        });
    }
    let name = format!("memory-{:x}", metadata.dev());
    let place = Path::new(IN_GUEST).join(&name).join(inside);
    let volume = AddVolume {
        name,
        size: size.f_blocks.saturating_mul(size.f_frsize),
        files: 0,
        attributes: Some(attributes(&metadata, ids)),
        directories,
        // A block of hugetlbfs is a page (`fs/hugetlbfs/inode.c`, `hugetlbfs_statfs`).
        page_size: if huge { size.f_bsize } else { 0 },
    };
    Ok(Some(Found { volume: GuestVolume { kind: Some(Kind::Memory(volume)) }, source: place }))
}

/// An emptyDir in memory, and what of it is meant.
#[derive(Debug, PartialEq)]
struct EmptyDir {
    volume: PathBuf,
    inside: PathBuf,
    /// It is on huge pages.
    huge: bool,
}

/// The emptyDir in memory that a path is in, if it is in one. A subPath is a mount of kubelet's own, somewhere else.
fn empty_dir_in_memory(table: &[Mounted], source: &Path) -> Option<EmptyDir> {
    let mount = rustix::fs::statx(CWD, source, AtFlags::empty(), StatxFlags::MNT_ID).ok()?.stx_mnt_id;
    let mounted = table.iter().find(|mounted| mounted.id == mount)?;
    let huge = mounted.kind == "hugetlbfs";
    if !huge && mounted.kind != "tmpfs" {
        return None;
    }
    let below = source.strip_prefix(&mounted.point).ok()?;
    let inside = mounted.root.strip_prefix("/").ok()?.join(below);
    let is_volume = |point: &Path| {
        let parent = point.parent()?;
        let named = parent.file_name()? == "kubernetes.io~empty-dir";
        (named && parent.parent()?.file_name()? == "volumes").then_some(())
    };
    let volume = table.iter().find(|other| {
        other.device == mounted.device && other.root == Path::new("/") && is_volume(&other.point).is_some()
    })?;
    Some(EmptyDir { volume: volume.point.clone(), inside, huge })
}

/// Directories alone are kubelet's, for subPaths.
fn holds_files(volume: &Path) -> bool {
    let mut pending = vec![volume.to_owned()];
    let mut seen = 0;
    while let Some(directory) = pending.pop() {
        for entry in fs::read_dir(directory).into_iter().flatten().flatten() {
            seen += 1;
            if seen > DIRECTORIES || !entry.file_type().is_ok_and(|kind| kind.is_dir()) {
                return true;
            }
            pending.push(entry.path());
        }
    }
    false
}

fn attributes(metadata: &fs::Metadata, ids: Option<UserNamespace>) -> Attributes {
    /// Ids that the pod has no name for (`/proc/sys/kernel/overflowuid`).
    const NOBODY: u32 = 65534;
    let shifted = |id: u32, ids: Option<podvisor_spec::Ids>| match ids {
        None => id,
        Some(ids) if id < ids.length => ids.first.saturating_add(id),
        Some(_) => NOBODY,
    };
    Attributes {
        mode: metadata.mode() & 0o7777,
        uid: shifted(metadata.uid(), ids.map(|ids| ids.uids)),
        gid: shifted(metadata.gid(), ids.map(|ids| ids.gids)),
        modified_ns: metadata.mtime().saturating_mul(1_000_000_000).saturating_add(metadata.mtime_nsec()),
    }
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::symlink;

    use super::*;

    #[test]
    fn what_kubelet_exchanges_is_told_by_its_link() {
        let directory = tempfile::tempdir().unwrap();
        let volume = directory.path();
        assert!(followed(volume, None).is_none());
        fs::create_dir(volume.join("..1")).unwrap();
        for (target, is) in
            [("..1", true), ("plain", false), ("../..1", false), ("/..1", false), ("..", false)]
        {
            symlink(target, volume.join("..data")).unwrap();
            assert_eq!(followed(volume, None).is_some(), is, "{target}");
            fs::remove_file(volume.join("..data")).unwrap();
        }
        symlink("..1", volume.join("..data")).unwrap();
        let large = fs::File::create(volume.join("..1/large")).unwrap();
        large.set_len(FOLLOWED_BYTES + 1).unwrap();
        assert!(followed(volume, None).is_none());
    }

    #[test]
    fn an_empty_dir_in_memory_is_told_by_its_mount() {
        let directory = tempfile::tempdir().unwrap();
        let source = directory.path().join("a");
        fs::create_dir(&source).unwrap();
        let id = rustix::fs::statx(CWD, &source, AtFlags::empty(), StatxFlags::MNT_ID).unwrap().stx_mnt_id;
        let mounted = |id: u64, root: &str, point: &Path, kind: &str| Mounted {
            id,
            device: "0:99".into(),
            root: root.into(),
            point: point.to_owned(),
            kind: kind.into(),
        };
        let volume = Path::new("/pods/uid/volumes/kubernetes.io~empty-dir/scratch");
        let sub = mounted(id, "/sub", directory.path(), "tmpfs");
        let whole = mounted(u64::MAX, "/", volume, "tmpfs");
        let found = |huge| Some(EmptyDir { volume: volume.to_owned(), inside: PathBuf::from("sub/a"), huge });
        assert_eq!(empty_dir_in_memory(&[whole.clone(), sub.clone()], &source), found(false));
        let on_huge_pages = Mounted { kind: "hugetlbfs".into(), ..sub.clone() };
        assert_eq!(empty_dir_in_memory(&[whole.clone(), on_huge_pages], &source), found(true));
        // Secrets are tmpfs too, and kubelet changes them.
        let secret = mounted(u64::MAX, "/", Path::new("/pods/uid/volumes/kubernetes.io~secret/s"), "tmpfs");
        assert_eq!(empty_dir_in_memory(&[secret, sub], &source), None);
        let disk = mounted(id, "/", directory.path(), "ext4");
        assert_eq!(empty_dir_in_memory(&[whole, disk], &source), None);
    }

    #[test]
    fn directories_alone_are_no_files() {
        let directory = tempfile::tempdir().unwrap();
        fs::create_dir_all(directory.path().join("sub/path")).unwrap();
        assert!(!holds_files(directory.path()));
        symlink("x", directory.path().join("sub/path/link")).unwrap();
        assert!(holds_files(directory.path()));
    }
}
