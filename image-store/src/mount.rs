//! overlayfs over a snapshot's layers.

use std::collections::HashSet;
use std::ffi::CString;
use std::io;
use std::os::fd::OwnedFd;
use std::os::unix::ffi::OsStrExt;
use std::path::{Path, PathBuf};

use rustix::fs::CWD;
use rustix::io::Errno;
use rustix::mount::{
    FsMountFlags, FsOpenFlags, MountAttrFlags, MountFlags, MoveMountFlags, fsconfig_create,
    fsconfig_set_string, fsmount, fsopen, move_mount,
};

use crate::Rootfs;
use crate::error::ImageError;

/// `index=on` would refuse an upper directory that another mount still has while it is being detached, `metacopy=on`
/// makes files whose content lies elsewhere: neither may depend on how the kernel was configured.
const OPTIONS: [(&str, &str); 2] = [("index", "off"), ("metacopy", "off")];
/// All files have this SELinux label, whatever theirs are in the layers.
const LABEL: &str = "context";
/// fsconfig(2) takes strings of up to 255 bytes.
const STRING_MAX: usize = 255;
/// mount(2) takes a page of options, with a zero byte at its end.
const PAGE: usize = 4096;
/// Digits of a layer's name in a short link; more where two layers begin alike.
const SHORT_MIN: usize = 8;

/// Mounts `rootfs` at `target`. `links` is a directory for short names, for kernels that need them; `empty` holds two empty
/// directories.
pub(crate) fn mount(
    rootfs: &Rootfs,
    target: &Path,
    label: Option<&str>,
    links: &Path,
    empty: &Path,
) -> Result<(), ImageError> {
    overlay(rootfs, target, label, links, empty)
        .and_then(|made| made.map_or(Ok(()), |overlay| attach(&overlay, target)))
        .map_err(|source| ImageError::Mount { path: target.to_owned(), source })
}

/// A mount that is at no path yet; `None`: this kernel could only mount it at `target` at once.
pub(crate) fn overlay(
    rootfs: &Rootfs,
    target: &Path,
    label: Option<&str>,
    links: &Path,
    empty: &Path,
) -> io::Result<Option<OwnedFd>> {
    let lower = lower(rootfs, empty);
    match modern(rootfs, &lower, label) {
        Ok(overlay) => Ok(Some(overlay)),
        // Kernels before 6.5 do not know `lowerdir+`.
        Err((Errno::INVAL | Errno::NOSYS | Errno::OPNOTSUPP, said)) => {
            classic(rootfs, &lower, target, label, links)
                .map(|()| None)
                .map_err(|error| explained(error, &said))
        }
        Err((errno, said)) => Err(explained(errno.into(), &said)),
    }
}

/// Gives a mount its path.
pub(crate) fn attach(mount: &OwnedFd, target: &Path) -> io::Result<()> {
    Ok(move_mount(mount, "", CWD, target, MoveMountFlags::MOVE_MOUNT_F_EMPTY_PATH)?)
}

/// The error with what the kernel had to say about it.
fn explained(error: io::Error, said: &str) -> io::Error {
    if said.is_empty() { error } else { io::Error::new(error.kind(), format!("{error} ({said})")) }
}

/// The layers as overlayfs takes them: each once, at least one, and two where there is no upper one.
fn lower(rootfs: &Rootfs, empty: &Path) -> Vec<PathBuf> {
    let mut seen = HashSet::new();
    // An image may have a layer twice. Where it is again below itself it adds nothing, and overlayfs answers ELOOP.
    let mut lower: Vec<PathBuf> = rootfs.lower.iter().filter(|layer| seen.insert(*layer)).cloned().collect();
    let wanted = if rootfs.upper.is_some() { 1 } else { 2 };
    let missing = wanted - wanted.min(lower.len());
    lower.extend(["a", "b"].iter().take(missing).map(|name| empty.join(name)));
    lower
}

/// The mount API of 5.2 with overlayfs' parameters of 6.5: a layer per call, no limit on their number but the kernel's 500.
fn modern(rootfs: &Rootfs, lower: &[PathBuf], label: Option<&str>) -> Result<OwnedFd, (Errno, String)> {
    let context = fsopen("overlay", FsOpenFlags::FSOPEN_CLOEXEC).map_err(|errno| (errno, String::new()))?;
    configure(&context, rootfs, lower, label)
        .and_then(|()| fsmount(&context, FsMountFlags::FSMOUNT_CLOEXEC, attributes(rootfs)))
        .map_err(|errno| (errno, said(&context)))
}

/// A view of an image is read-only as a mount too, and of no use to this machine's users.
fn attributes(rootfs: &Rootfs) -> MountAttrFlags {
    if rootfs.upper.is_some() {
        return MountAttrFlags::empty();
    }
    MountAttrFlags::MOUNT_ATTR_RDONLY | MountAttrFlags::MOUNT_ATTR_NOSUID | MountAttrFlags::MOUNT_ATTR_NODEV
}

fn configure(
    context: &OwnedFd,
    rootfs: &Rootfs,
    lower: &[PathBuf],
    label: Option<&str>,
) -> Result<(), Errno> {
    let set = |key: &str, value: &Path| {
        // Longer ones answer EINVAL too, and which of them take backslashes as they are differs between kernels; the
        // string of mount(2) has room for them, if they are few.
        let text = value.as_os_str().as_bytes();
        if text.len() > STRING_MAX || text.contains(&b'\\') {
            return Err(Errno::INVAL);
        }
        fsconfig_set_string(context, key, value)
    };
    fsconfig_set_string(context, "source", "overlay")?;
    for layer in lower {
        set("lowerdir+", layer)?;
    }
    if let (Some(upper), Some(work)) = (&rootfs.upper, &rootfs.work) {
        set("upperdir", upper)?;
        set("workdir", work)?;
    }
    for (key, value) in OPTIONS {
        fsconfig_set_string(context, key, value)?;
    }
    if let Some(label) = label {
        set(LABEL, Path::new(label))?;
    }
    fsconfig_create(context)
}

/// The messages that the kernel keeps for a mount in the making (fsopen(2)): one a read, each like `e overlay: …`.
fn said(context: &OwnedFd) -> String {
    let mut messages = Vec::new();
    let mut buffer = [0; 1024];
    while let Ok(length @ 1..) = rustix::io::read(context, &mut buffer) {
        let message = String::from_utf8_lossy(&buffer[..length]);
        messages.push(message.trim_start_matches(['e', 'w', 'i', ' ']).trim_end().to_owned());
    }
    messages.join("; ")
}

/// One option string, at most a page long: long names are replaced by short links.
fn classic(
    rootfs: &Rootfs,
    lower: &[PathBuf],
    target: &Path,
    label: Option<&str>,
    links: &Path,
) -> io::Result<()> {
    std::fs::create_dir_all(links)?;
    let mut options = Vec::new();
    let mut names = Vec::new();
    for layer in lower {
        names.push(escaped(&short(layer, links)?)?);
    }
    options.push(("lowerdir", names.join(":")));
    if let (Some(upper), Some(work)) = (&rootfs.upper, &rootfs.work) {
        options.extend([("upperdir", escaped(upper)?), ("workdir", escaped(work)?)]);
    }
    options.extend(OPTIONS.map(|(key, value)| (key, value.to_owned())));
    // Quoted, because there are commas in it.
    options.extend(label.map(|label| (LABEL, format!("\"{label}\""))));
    let options = options.iter().map(|(key, value)| format!("{key}={value}")).collect::<Vec<_>>().join(",");
    if options.len() >= PAGE {
        return Err(io::Error::new(io::ErrorKind::ArgumentListTooLong, "too many layers for this kernel"));
    }
    let options = CString::new(options)?;
    let flags = if rootfs.upper.is_some() {
        MountFlags::empty()
    } else {
        MountFlags::RDONLY | MountFlags::NOSUID | MountFlags::NODEV
    };
    Ok(rustix::mount::mount("overlay", target, "overlay", flags, options.as_c_str())?)
}

/// A short link to a layer, made if it is missing.
fn short(layer: &Path, links: &Path) -> io::Result<PathBuf> {
    let name = layer.file_name().and_then(|name| name.to_str()).unwrap_or_default();
    for length in SHORT_MIN.min(name.len()).max(1)..=name.len() {
        let link = links.join(&name[..length]);
        match rustix::fs::symlink(layer, &link) {
            Ok(()) => return Ok(link),
            Err(Errno::EXIST) if std::fs::read_link(&link)? == layer => return Ok(link),
            Err(Errno::EXIST) => {}
            Err(error) => return Err(error.into()),
        }
    }
    Ok(layer.to_owned())
}

/// A path as an option of overlayfs: commas and colons divide (kernel, overlayfs.rst).
fn escaped(path: &Path) -> io::Result<String> {
    let text = path.to_str().ok_or(io::ErrorKind::InvalidFilename)?;
    let mut escaped = String::with_capacity(text.len());
    for character in text.chars() {
        if matches!(character, '\\' | ',' | ':') {
            escaped.push('\\');
        }
        escaped.push(character);
    }
    Ok(escaped)
}

#[cfg(test)]
pub(crate) mod tests;
