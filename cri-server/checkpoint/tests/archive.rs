//! On real overlay file systems: what is written down, put over the same image again, gives the same tree.
#![allow(unsafe_code, missing_docs)]

use std::collections::{BTreeMap, BTreeSet};
use std::fs::{self, File};
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::{FileTypeExt, MetadataExt, PermissionsExt, symlink};
use std::path::{Path, PathBuf};
use std::process::Command;

use podvisor_checkpoint::{ArchiveError, Cancel, Ids, RootFs, changes, pack};
use rustix::fs::{CWD, FileType, Mode, XattrFlags, lgetxattr, makedev, mknodat, setxattr};
use rustix::mount::{MountFlags, MountPropagationFlags, mount, mount_change};
use rustix::thread::{UnshareFlags, unshare_unsafe};

/// Runs `test` in a thread with mounts of its own; they go with the thread.
fn privately(test: impl FnOnce() + Send + 'static) {
    std::thread::spawn(|| {
        // SAFETY: only UnshareFlags::FILES has a condition, and it is not among the flags.
        unsafe { unshare_unsafe(UnshareFlags::NEWNS) }.expect("these tests need root");
        mount_change("/", MountPropagationFlags::PRIVATE | MountPropagationFlags::REC).unwrap();
        test();
    })
    .join()
    .unwrap_or_else(|panic| std::panic::resume_unwind(panic));
}

struct Place {
    directory: tempfile::TempDir,
    root: RootFs,
}

impl Place {
    /// An image of two layers.
    fn new(options: &str) -> Self {
        let directory = tempfile::tempdir().unwrap();
        mount("tmpfs", directory.path(), "tmpfs", MountFlags::empty(), None).unwrap();
        let path = |name: &str| {
            let path = directory.path().join(name);
            fs::create_dir_all(&path).unwrap();
            path
        };
        let (top, base) = (path("top"), path("base"));
        for name in
            ["etc", "etc/many", "usr/lib/deep", "gone/below", "replaced", "moved/inside", "opaque/sub/deep"]
        {
            fs::create_dir_all(base.join(name)).unwrap();
        }
        for name in [
            "etc/passwd",
            "etc/many/1",
            "usr/lib/deep/file",
            "gone/below/file",
            "gone/file",
            "plain",
            "untouched",
            "moved/inside/file",
            "moved/file",
            "opaque/old",
            "opaque/sub/deep/old",
            "becomes-directory",
        ] {
            fs::write(base.join(name), name).unwrap();
        }
        fs::create_dir_all(top.join("opaque")).unwrap();
        fs::write(top.join("opaque/of-the-top"), "").unwrap();
        fs::write(top.join("plain"), "from the top").unwrap();
        let root = RootFs {
            mounted: path("mounted"),
            upper: path("upper"),
            lower: vec![top, base],
            covered: BTreeSet::new(),
            ids: None,
        };
        let place = Self { directory, root };
        place.mount(&place.root.mounted, &place.root.upper, options);
        place
    }

    fn mount(&self, at: &Path, upper: &Path, options: &str) {
        let work = self.path(&format!("work-{}", at.file_name().unwrap().to_string_lossy()));
        fs::create_dir_all(&work).unwrap();
        let lower: Vec<String> = self.root.lower.iter().map(|layer| layer.display().to_string()).collect();
        let data = format!(
            "lowerdir={},upperdir={},workdir={},index=off,metacopy=off{options}",
            lower.join(":"),
            upper.display(),
            work.display()
        );
        let data = std::ffi::CString::new(data).unwrap();
        mount("overlay", at, "overlay", MountFlags::empty(), data.as_c_str()).unwrap();
    }

    fn path(&self, name: &str) -> PathBuf {
        self.directory.path().join(name)
    }

    fn seen(&self, name: &str) -> PathBuf {
        self.root.mounted.join(name)
    }

    /// The tar and what was deleted.
    fn changes(&self) -> (PathBuf, Vec<PathBuf>) {
        let tar = self.path("rootfs-diff.tar");
        let deleted = changes(&self.root, File::create(&tar).unwrap(), &Cancel::default()).unwrap();
        (tar, deleted)
    }

    /// What Podman and CRI-O do with it, over a fresh container of the same image.
    fn restored(&self) -> PathBuf {
        let (tar, deleted) = self.changes();
        let (fresh, upper) = (self.path("fresh"), self.path("fresh-upper"));
        for directory in [&fresh, &upper] {
            fs::create_dir_all(directory).unwrap();
        }
        self.mount(&fresh, &upper, "");
        let unpacked = Command::new("tar")
            .args(["--xattrs", "--xattrs-include=*", "--numeric-owner", "-xpf"])
            .arg(tar)
            .arg("-C")
            .arg(&fresh)
            .output()
            .unwrap();
        assert!(unpacked.status.success(), "{unpacked:?}");
        for path in deleted {
            let path = fresh.join(path.strip_prefix("/").unwrap());
            if path.is_dir() { fs::remove_dir_all(path) } else { fs::remove_file(path) }.unwrap();
        }
        fresh
    }
}

impl Drop for Place {
    fn drop(&mut self) {
        // With all that is mounted in it, so that the directory can go.
        let _ = rustix::mount::unmount(self.directory.path(), rustix::mount::UnmountFlags::DETACH);
    }
}

/// A tree, with all that a container sees of it.
fn tree(root: &Path) -> BTreeMap<PathBuf, String> {
    let mut seen = BTreeMap::new();
    let mut links: BTreeMap<u64, PathBuf> = BTreeMap::new();
    let mut pending = vec![PathBuf::new()];
    while let Some(below) = pending.pop() {
        let mut entries: Vec<_> = fs::read_dir(root.join(&below)).unwrap().flatten().collect();
        entries.sort_by_key(fs::DirEntry::file_name);
        for entry in entries {
            let (path, found) = (entry.path(), entry.metadata().unwrap());
            let name = below.join(entry.file_name());
            let kind = found.file_type();
            let content = if kind.is_dir() {
                pending.push(name.clone());
                "directory".to_owned()
            } else if kind.is_symlink() {
                format!("link to {}", fs::read_link(&path).unwrap().display())
            } else if kind.is_file() {
                format!("{:?}", fs::read(&path).unwrap())
            } else if kind.is_fifo() {
                "fifo".to_owned()
            } else {
                format!("device {}", found.rdev())
            };
            let first = if found.nlink() > 1 && !kind.is_dir() {
                links.entry(found.ino()).or_insert_with(|| name.clone()).clone()
            } else {
                name.clone()
            };
            let mut value = [0; 64];
            let attribute = lgetxattr(&path, "user.kept", &mut value).map(|length| value[..length].to_vec());
            let text = format!(
                "{content} {:o} {}:{} {} {attribute:?}",
                found.mode(),
                found.uid(),
                found.gid(),
                first.display()
            );
            seen.insert(name, text);
        }
    }
    seen
}

#[test]
fn a_changed_root_comes_back() {
    privately(|| {
        let place = Place::new("");
        let seen = |name: &str| place.seen(name);
        fs::write(seen("new"), "n".repeat(3000)).unwrap();
        fs::write(seen("empty"), "").unwrap();
        fs::write(seen("etc/passwd"), "changed").unwrap();
        fs::set_permissions(seen("plain"), fs::Permissions::from_mode(0o4711)).unwrap();
        std::os::unix::fs::chown(seen("usr/lib/deep/file"), Some(70_000), Some(3_000_000)).unwrap();
        symlink("/etc/passwd", seen("absolute")).unwrap();
        symlink("x".repeat(300), seen("long-link")).unwrap();
        fs::write(seen("original"), "two names").unwrap();
        fs::hard_link(seen("original"), seen("usr/second-name")).unwrap();
        mknodat(CWD, seen("fifo"), FileType::Fifo, Mode::RUSR, 0).unwrap();
        mknodat(CWD, seen("device"), FileType::CharacterDevice, Mode::RUSR, makedev(1, 3)).unwrap();
        setxattr(seen("new"), "user.kept", b"value\nwith a line end", XattrFlags::empty()).unwrap();
        setxattr(seen("etc"), "user.kept", b"of a directory", XattrFlags::empty()).unwrap();
        let long = format!("long/{}/{}", "d".repeat(200), "f".repeat(200));
        fs::create_dir_all(seen(&long).parent().unwrap()).unwrap();
        fs::write(seen(&long), "long").unwrap();
        fs::write(place.root.mounted.join(std::ffi::OsStr::from_bytes(b"not \xff text")), "bytes").unwrap();
        fs::remove_file(seen("etc/many/1")).unwrap();
        fs::remove_dir_all(seen("gone")).unwrap();
        fs::remove_dir_all(seen("opaque")).unwrap();
        fs::create_dir_all(seen("opaque/sub")).unwrap();
        fs::write(seen("opaque/new"), "").unwrap();
        fs::remove_file(seen("becomes-directory")).unwrap();
        fs::create_dir(seen("becomes-directory")).unwrap();

        let (tar, deleted) = place.changes();
        let shown: Vec<_> = deleted.iter().map(|path| path.to_str().unwrap()).collect();
        assert_eq!(shown, ["/etc/many/1", "/gone", "/opaque/of-the-top", "/opaque/old", "/opaque/sub/deep"]);
        let listed = Command::new("tar").arg("-tf").arg(tar).output().unwrap();
        let listed = String::from_utf8_lossy(&listed.stdout).into_owned();
        assert!(!listed.contains("untouched") && !listed.contains("etc/many/1"), "{listed}");
        assert_eq!(tree(&place.restored()), tree(&place.root.mounted));
    });
}

#[test]
fn directories_that_were_moved() {
    privately(|| {
        // A container's root has not got the option, unless the kernel was built with it.
        let place = Place::new(",redirect_dir=on");
        fs::rename(place.seen("moved"), place.seen("there")).unwrap();
        fs::rename(place.seen("opaque"), place.seen("etc/opaque")).unwrap();
        fs::write(place.seen("there/inside/more"), "more").unwrap();
        fs::remove_file(place.seen("there/file")).unwrap();
        let (_, deleted) = place.changes();
        let shown: Vec<_> = deleted.iter().map(|path| path.to_str().unwrap()).collect();
        assert_eq!(shown, ["/moved", "/opaque"]);
        assert_eq!(tree(&place.restored()), tree(&place.root.mounted));
    });
}

#[test]
fn what_is_mounted_there_is_not_the_roots() {
    privately(|| {
        let mut place = Place::new("");
        fs::write(place.seen("etc/hosts"), "").unwrap();
        fs::create_dir_all(place.seen("data/volume")).unwrap();
        fs::write(place.seen("data/beside"), "").unwrap();
        std::os::unix::fs::chown(place.seen("data/beside"), Some(1_000_005), Some(7)).unwrap();
        place.root.covered = ["/etc/hosts", "/data/volume"].map(PathBuf::from).into();
        place.root.ids = Some(Ids { uids: (1_000_000, 65_536), gids: (2_000_000, 65_536) });
        let (tar, deleted) = place.changes();
        let listed = Command::new("tar").args(["--numeric-owner", "-tvf"]).arg(tar).output().unwrap();
        let listed = String::from_utf8_lossy(&listed.stdout).into_owned();
        let names: Vec<_> = listed.lines().filter_map(|line| line.split_whitespace().last()).collect();
        assert_eq!((names, deleted), (vec!["data/", "data/beside", "etc/"], Vec::new()));
        assert!(listed.contains("5/65534"), "{listed}");
    });
}

#[test]
fn links_lead_nowhere() {
    privately(|| {
        let place = Place::new("");
        let outside = place.path("outside");
        fs::create_dir_all(&outside).unwrap();
        fs::write(outside.join("secret"), "secret").unwrap();
        // As if it had been a directory when it was listed.
        fs::create_dir_all(place.root.upper.join("swapped")).unwrap();
        fs::write(place.root.upper.join("swapped/secret"), "").unwrap();
        let mut hostile = place.root.clone();
        hostile.mounted = place.path("other");
        fs::create_dir_all(&hostile.mounted).unwrap();
        symlink(&outside, hostile.mounted.join("swapped")).unwrap();
        let tar = place.path("tar");
        changes(&hostile, File::create(&tar).unwrap(), &Cancel::default()).unwrap();
        assert!(!fs::read(&tar).unwrap().windows(6).any(|text| text == b"secret"));
    });
}

#[test]
fn work_that_is_not_wanted_any_more_ends() {
    privately(|| {
        let place = Place::new("");
        fs::write(place.seen("new"), "").unwrap();
        let cancel = Cancel::default();
        cancel.cancel();
        let ended = changes(&place.root, std::io::sink(), &cancel);
        assert!(matches!(ended, Err(ArchiveError::Cancelled)), "{ended:?}");
        let location = place.path("archive.tar");
        let ended = pack(&place.root.lower[0], &location, &cancel);
        assert!(matches!(ended, Err(ArchiveError::Cancelled)), "{ended:?}");
        assert!(!location.exists());
    });
}

#[test]
fn an_archive_appears_whole_or_not_at_all() {
    let place = tempfile::tempdir().unwrap();
    let content = place.path().join("content");
    fs::create_dir_all(content.join("checkpoint")).unwrap();
    fs::write(content.join("checkpoint/pages-1.img"), vec![7; 100_000]).unwrap();
    fs::write(content.join("config.dump"), "{}").unwrap();
    let target = place.path().join("target");
    fs::create_dir(&target).unwrap();
    let location = target.join("archive.tar");
    // A second one replaces the first.
    for _ in 0..2 {
        pack(&content, &location, &Cancel::default()).unwrap();
        assert_eq!(fs::metadata(&location).unwrap().permissions().mode() & 0o7777, 0o600);
        assert_eq!(fs::read_dir(&target).unwrap().count(), 1);
    }
    let listed = Command::new("tar").arg("-tf").arg(&location).output().unwrap();
    assert_eq!(String::from_utf8_lossy(&listed.stdout), "checkpoint/\ncheckpoint/pages-1.img\nconfig.dump\n");
    let missing = pack(&content, &place.path().join("no/such/archive.tar"), &Cancel::default()).unwrap_err();
    assert!(missing.to_string().contains("/no/such/archive.tar"), "{missing}");
    let gone = pack(&content.join("gone"), &target.join("other.tar"), &Cancel::default());
    assert!(gone.is_err());
    assert_eq!(fs::read_dir(&target).unwrap().count(), 1, "nothing is left of one that fails");
    // Where files without a name cannot be made.
    fs::create_dir(place.path().join("taken.tar")).unwrap();
    assert!(pack(&content, &place.path().join("taken.tar"), &Cancel::default()).is_err());
    let names: Vec<_> =
        fs::read_dir(place.path()).unwrap().flatten().map(|entry| entry.file_name()).collect();
    assert_eq!(names.len(), 3, "{names:?}");
}
