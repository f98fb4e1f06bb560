//! Places to unpack to: a directory with a canary beside it, and file systems that are mounted nowhere.

use std::ffi::OsStr;
use std::fs::{self, File};
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};

use podvisor_unpack::{Compression, Limits, UnpackError, Unpacked, remove_tree, unpack};
use rustix::fs::{Mode, OFlags};
use rustix::mount::{FsMountFlags, FsOpenFlags, MountAttrFlags};
use tempfile::TempDir;

pub(crate) const LIMITS: Limits = Limits { bytes: 16 << 20, entries: 1000 };

/// `target/` to unpack to and `outside/` that must never change.
pub(crate) struct Scratch {
    directory: TempDir,
    canary: Vec<String>,
}

impl Scratch {
    pub(crate) fn new() -> Self {
        let directory = TempDir::new().expect("make a scratch directory");
        let outside = directory.path().join("outside");
        fs::create_dir(directory.path().join("target")).expect("make target");
        fs::create_dir_all(outside.join("sub")).expect("make outside");
        fs::write(outside.join("canary"), "alive").expect("write canary");
        fs::write(outside.join("sub/deep"), "alive").expect("write canary");
        let mut scratch = Self { directory, canary: Vec::new() };
        scratch.canary = scratch.snapshot();
        scratch
    }

    pub(crate) fn outside(&self) -> PathBuf {
        self.directory.path().join("outside")
    }

    pub(crate) fn path(&self, name: &str) -> PathBuf {
        self.directory.path().join("target").join(name)
    }

    pub(crate) fn unpack(&self, tar: &[u8]) -> Result<Unpacked, UnpackError> {
        self.unpack_with(tar, Compression::None, LIMITS)
    }

    pub(crate) fn unpack_with(
        &self,
        layer: &[u8],
        compression: Compression,
        limits: Limits,
    ) -> Result<Unpacked, UnpackError> {
        let target = File::open(self.path("")).expect("open target");
        unpack(layer, compression, target.as_fd(), limits)
    }

    /// Everything beside the target, with what an attack could change.
    fn snapshot(&self) -> Vec<String> {
        let mut lines = Vec::new();
        let mut pending = vec![self.directory.path().to_path_buf()];
        while let Some(path) = pending.pop() {
            let stat = fs::symlink_metadata(&path).expect("stat");
            let is_target = path == self.path("").join("");
            // The target's own times and mode may change, its being there and whose it is beside may not.
            let times = if is_target || path == self.directory.path() {
                String::new()
            } else {
                format!(
                    "{:o} {} {} {}.{}",
                    stat.mode(),
                    stat.uid(),
                    stat.nlink(),
                    stat.mtime(),
                    stat.ctime_nsec()
                )
            };
            let content =
                if stat.is_file() { fs::read_to_string(&path).expect("read") } else { String::new() };
            lines.push(format!("{} {} {times} {content}", path.display(), stat.ino()));
            if stat.is_dir() && !is_target {
                pending.extend(fs::read_dir(&path).expect("list").map(|entry| entry.expect("list").path()));
            }
        }
        lines.sort();
        lines
    }

    /// Fails if anything outside the target has changed.
    pub(crate) fn assert_canary(&self, what: &str) {
        assert_eq!(self.snapshot(), self.canary, "{what}: something outside the target has changed");
    }
}

impl Drop for Scratch {
    fn drop(&mut self) {
        // Trees may be too deep for `TempDir`.
        let directory = File::open(self.directory.path()).expect("open scratch");
        remove_tree(directory.as_fd(), OsStr::new("target")).expect("remove target");
    }
}

/// A new tmpfs that is mounted nowhere and gone with its descriptor.
pub(crate) fn tmpfs(options: &[(&str, &str)]) -> OwnedFd {
    let context = rustix::mount::fsopen("tmpfs", FsOpenFlags::FSOPEN_CLOEXEC).expect("open a tmpfs");
    for (key, value) in options {
        rustix::mount::fsconfig_set_string(context.as_fd(), *key, *value).expect("set a mount option");
    }
    rustix::mount::fsconfig_create(context.as_fd()).expect("create a tmpfs");
    let mount = rustix::mount::fsmount(
        context.as_fd(),
        FsMountFlags::FSMOUNT_CLOEXEC,
        MountAttrFlags::MOUNT_ATTR_NODEV | MountAttrFlags::MOUNT_ATTR_NOSUID,
    )
    .expect("mount a tmpfs");
    let flags = OFlags::RDONLY | OFlags::DIRECTORY | OFlags::CLOEXEC;
    rustix::fs::openat(mount, ".", flags, Mode::empty()).expect("open the tmpfs")
}

/// An extended attribute of the file itself, if it is there.
pub(crate) fn xattr(path: &Path, name: &str) -> Option<Vec<u8>> {
    let mut value = vec![0; 65536];
    let length = rustix::fs::lgetxattr(path, name, &mut value).ok()?;
    value.truncate(length);
    Some(value)
}

/// One unmounted tmpfs with an empty directory for each of many cases.
pub(crate) struct Ground(OwnedFd);

impl Ground {
    pub(crate) fn new() -> Self {
        Self(tmpfs(&[("size", "16m")]))
    }

    pub(crate) fn unpack(
        &self,
        layer: &[u8],
        compression: Compression,
        limits: Limits,
    ) -> Result<Unpacked, UnpackError> {
        rustix::fs::mkdirat(&self.0, "case", Mode::RWXU).expect("make target");
        let target = rustix::fs::openat(&self.0, "case", OFlags::RDONLY | OFlags::DIRECTORY, Mode::empty())
            .expect("open");
        let result = unpack(layer, compression, target.as_fd(), limits);
        drop(target);
        remove_tree(self.0.as_fd(), OsStr::new("case")).expect("remove target");
        let names = rustix::fs::Dir::read_from(&self.0).expect("list").count();
        assert_eq!(names, 2, "something is beside the target");
        result
    }
}
