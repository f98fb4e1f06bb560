//! What a sandboxed command sees under `/`.

use std::ffi::CString;
use std::fs;
use std::os::fd::OwnedFd;
use std::os::unix::ffi::OsStrExt;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result};
use rustix::fs::CWD;
use rustix::io::Errno;
use rustix::mount::{
    MountFlags, MountPropagationFlags, MoveMountFlags, OpenTreeFlags, UnmountFlags, mount, mount_change,
    move_mount, open_tree, unmount,
};

use super::cgroups::{MOUNT_POINT, Subtree};

/// Empty and volatile inside.
pub(super) const EMPTY: [&str; 3] = ["/run", "/tmp", "/dev/shm"];

/// The machine's, with changes kept aside.
pub(super) const COVERED: [&str; 2] = ["/etc", "/var"];

/// Where the changes to [`COVERED`] go, one folder each with `changes` and overlayfs's `work`.
pub(super) const ASIDE: &str = "/run/sandbox";

/// Directories on tmpfs of their own, because an overlay file system cannot be an overlay's upper layer.
pub(super) const VOLATILE: [&str; 4] =
    ["/var/lib/podvisor", "/var/lib/kubelet", "/var/log/pods", "/var/log/containers"];

/// Where apparmor_parser keeps what it has compiled, which is nobody's business.
const COMPILED_PROFILES: &str = "/var/cache/apparmor";

/// Directories that other tools make in passing and that therefore are no leftovers: `crun --version` its default state
/// directory, libmount its own.
pub(super) const OF_OTHER_TOOLS: [&str; 2] = ["/run/crun", "/run/mount"];

/// Arranges the file systems. To be called by PID 1 of the new namespaces.
pub(super) fn prepare(subtree: &Subtree) -> Result<()> {
    // Nothing that happens here may reach the machine's mount table.
    mount_change("/", MountPropagationFlags::PRIVATE | MountPropagationFlags::REC)
        .context("making the mount tree private")?;
    let kept = kept_directories();
    for path in EMPTY {
        mount_fs("tmpfs", "tmpfs", path, if path == "/run" { "mode=755" } else { "mode=1777" })?;
    }
    for path in OF_OTHER_TOOLS {
        fs::create_dir(path).with_context(|| format!("making {path}"))?;
    }
    for path in COVERED {
        cover(path)?;
    }
    for (path, tree) in kept {
        put_back(&path, &tree)?;
    }
    for path in VOLATILE {
        fs::create_dir_all(path).with_context(|| format!("making {path}"))?;
        mount_fs("tmpfs", "tmpfs", path, "mode=755")?;
    }
    fs::create_dir_all(COMPILED_PROFILES).with_context(|| format!("making {COMPILED_PROFILES}"))?;
    mount_fs("tmpfs", "tmpfs", COMPILED_PROFILES, "mode=755")?;
    take_off("/proc")?;
    mount_fs("proc", "proc", "/proc", "")?;
    let security =
        Path::new("/sys/kernel/security").read_dir().is_ok_and(|mut entries| entries.next().is_some());
    let selinux = Path::new("/sys/fs/selinux/enforce").exists();
    // With everything below it: runtimes find cgroup mounts in the mount table, also those that are covered.
    take_off("/sys")?;
    mount_fs("sysfs", "sysfs", "/sys", "")?;
    if security {
        mount_fs("securityfs", "securityfs", "/sys/kernel/security", "")?;
    }
    if selinux {
        mount_fs("selinuxfs", "selinuxfs", "/sys/fs/selinux", "")?;
    }
    mount_cgroups(subtree)?;
    // As on a node: what is mounted in a shared volume shows up in the containers that share it.
    mount_change("/", MountPropagationFlags::SHARED | MountPropagationFlags::REC)
        .context("making the mount tree shared")
}

/// With cgroup v1 controllers the unified hierarchy is left out: crun refuses the hybrid layout.
fn mount_cgroups(subtree: &Subtree) -> Result<()> {
    if subtree.hierarchies.iter().all(super::cgroups::Hierarchy::is_v2) {
        return mount_fs("cgroup2", "cgroup2", MOUNT_POINT, "");
    }
    mount_fs("tmpfs", "tmpfs", MOUNT_POINT, "mode=755")?;
    for hierarchy in subtree.hierarchies.iter().filter(|hierarchy| !hierarchy.is_v2()) {
        fs::create_dir_all(&hierarchy.mounted)
            .with_context(|| format!("making {}", hierarchy.mounted.display()))?;
        mount_fs("cgroup", "cgroup", &hierarchy.mounted, &hierarchy.options)?;
    }
    Ok(())
}

fn mount_fs(kind: &str, source: &str, target: impl AsRef<Path>, options: &str) -> Result<()> {
    let target = target.as_ref();
    let data = CString::new(options).context("a mount option holds a zero byte")?;
    let flags = if kind == "overlay" || kind == "tmpfs" {
        MountFlags::empty()
    } else {
        MountFlags::NOSUID | MountFlags::NODEV | MountFlags::NOEXEC
    };
    mount(source, target, kind, flags, data.as_c_str())
        .with_context(|| format!("mounting {kind} on {}", target.display()))
}

/// Takes off what is mounted at `path`; on a machine where nothing is, there is nothing to do.
fn take_off(path: &str) -> Result<()> {
    match unmount(path, UnmountFlags::DETACH) {
        Ok(()) | Err(Errno::INVAL) => Ok(()),
        Err(error) => Err(error).with_context(|| format!("unmounting {path}")),
    }
}

fn cover(path: &str) -> Result<()> {
    let aside = Path::new(ASIDE).join(path.trim_start_matches('/'));
    for folder in ["changes", "work"] {
        fs::create_dir_all(aside.join(folder)).with_context(|| format!("making {}", aside.display()))?;
    }
    let options = format!("lowerdir={path},upperdir={0}/changes,workdir={0}/work", aside.display());
    mount_fs("overlay", "overlay", path, &options)
}

/// Directories that a build works in and that would disappear under what is mounted: detached copies of their mounts.
fn kept_directories() -> Vec<(PathBuf, OwnedFd)> {
    let mut wanted = vec![crate::project_dir(), crate::target_dir()];
    wanted.extend(std::env::current_dir());
    wanted.extend(
        ["CARGO_HOME", "RUSTUP_HOME", "GOPATH", "GOCACHE", "HOME"]
            .map(std::env::var_os)
            .into_iter()
            .flatten()
            .map(PathBuf::from),
    );
    let mut kept: Vec<(PathBuf, OwnedFd)> = Vec::new();
    for path in wanted {
        let hidden =
            EMPTY.iter().chain(&COVERED).any(|over| path.starts_with(over) && path != Path::new(over));
        if !hidden || kept.iter().any(|(have, _)| path.starts_with(have)) {
            continue;
        }
        let flags =
            OpenTreeFlags::OPEN_TREE_CLONE | OpenTreeFlags::OPEN_TREE_CLOEXEC | OpenTreeFlags::AT_RECURSIVE;
        // A directory that is not there hides nothing.
        if let Ok(tree) = open_tree(CWD, &path, flags) {
            kept.push((path, tree));
        }
    }
    kept
}

fn put_back(path: &Path, tree: &OwnedFd) -> Result<()> {
    fs::create_dir_all(path).with_context(|| format!("making {}", path.display()))?;
    move_mount(tree, "", CWD, path, MoveMountFlags::MOVE_MOUNT_F_EMPTY_PATH)
        .with_context(|| format!("keeping {}", path.display()))
}

/// The mount table's mount points, in order.
pub(super) fn mount_points() -> Result<Vec<String>> {
    let table = fs::read("/proc/self/mountinfo").context("reading the mount table")?;
    Ok(table
        .split(|byte| *byte == b'\n')
        .filter_map(|line| line.split(|byte| *byte == b' ').nth(4))
        .map(|point| std::ffi::OsStr::from_bytes(point).to_string_lossy().into_owned())
        .collect())
}
