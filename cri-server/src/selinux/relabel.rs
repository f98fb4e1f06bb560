//! Labels of files, in the attribute `security.selinux`: of one, or of everything in a volume.

use std::ffi::{CStr, CString};
use std::os::fd::{AsFd, AsRawFd, OwnedFd};
use std::path::{Path, PathBuf};

use rustix::fs::{AtFlags, CWD, Dir, FileType, Mode, OFlags, XattrFlags, getxattr, openat, setxattr, statat};
use rustix::io::Errno;

const ATTRIBUTE: &str = "security.selinux";

/// Directories of the machine that programs outside of containers need as they are labelled: with a pod's label on them it would not
/// come up again.
const OF_THE_MACHINE: [&str; 24] = [
    "/", "/bin", "/boot", "/dev", "/etc", "/home", "/lib", "/lib32", "/lib64", "/media", "/mnt", "/opt",
    "/proc", "/root", "/run", "/sbin", "/srv", "/sys", "/tmp", "/usr", "/var", "/var/lib", "/var/log",
    "/var/run",
];

/// Why a file has not the label that it needs.
#[derive(Debug, thiserror::Error)]
pub(crate) enum LabelError {
    #[error("{} is a directory of the machine, which does not get a pod's SELinux label", .0.display())]
    OfTheMachine(PathBuf),
    #[error("cannot give {} the SELinux label {label}", path.display())]
    Set { path: PathBuf, label: String, source: std::io::Error },
}

/// Labels one file, where its file system has labels.
pub(crate) fn label_file(path: &Path, label: &str) -> Result<(), LabelError> {
    match set(CWD, path, label) {
        Ok(_) | Err(Errno::NOTSUP) => Ok(()),
        Err(errno) => {
            Err(LabelError::Set { path: path.to_owned(), label: label.to_owned(), source: errno.into() })
        }
    }
}

/// Labels a file or directory with all that is in it. A file system that has no labels is left as it is: it has one for all its files,
/// by how it was mounted. Whoever changes the volume meanwhile leads nowhere else: links are labelled themselves.
pub(crate) fn relabel(path: &Path, label: &str) -> Result<(), LabelError> {
    if OF_THE_MACHINE.iter().any(|machine| path == Path::new(machine)) {
        return Err(LabelError::OfTheMachine(path.to_owned()));
    }
    let failed = |(name, errno): (PathBuf, Errno)| LabelError::Set {
        path: if name.as_os_str().is_empty() { path.to_owned() } else { path.join(name) },
        label: label.to_owned(),
        source: errno.into(),
    };
    let at_top = |errno| failed((PathBuf::new(), errno));
    let (top, kind) = open(CWD, path).map_err(at_top)?;
    if get(&top) == Err(Errno::NOTSUP) {
        return Ok(());
    }
    if kind == FileType::Directory {
        below(&top, label).map_err(failed)?;
    }
    // Last: it tells that the rest is done.
    set_open(&top, label).map_err(at_top)
}

/// Everything in a directory, one open directory for each level of depth.
fn below(top: &OwnedFd, label: &str) -> Result<(), (PathBuf, Errno)> {
    let mut path = PathBuf::new();
    let read = |directory: &OwnedFd| names(directory).map_err(|errno| (PathBuf::new(), errno));
    let mut pending = vec![(read(top)?, None::<OwnedFd>)];
    while let Some((names, directory)) = pending.last_mut() {
        let Some(name) = names.pop() else {
            pending.pop();
            path.pop();
            continue;
        };
        let directory = directory.as_ref().unwrap_or(top);
        let entry = path.join(name.to_string_lossy().as_ref());
        let (opened, kind) = match set(directory.as_fd(), name.as_c_str(), label) {
            Ok(opened) => opened,
            // Removed meanwhile, or on a file system of its own that has no labels.
            Err(Errno::NOENT | Errno::NOTSUP) => continue,
            Err(errno) => return Err((entry, errno)),
        };
        if kind == FileType::Directory {
            let inside = self::names(&opened).map_err(|errno| (entry.clone(), errno))?;
            pending.push((inside, Some(opened)));
            path = entry;
        }
    }
    Ok(())
}

fn names(directory: &OwnedFd) -> Result<Vec<CString>, Errno> {
    let opened = openat(directory, ".", OFlags::RDONLY | OFlags::DIRECTORY | OFlags::CLOEXEC, Mode::empty())?;
    let mut names = Vec::new();
    for entry in Dir::new(opened)? {
        let name = entry?.file_name().to_owned();
        if !matches!(name.to_bytes(), b"." | b"..") {
            names.push(name);
        }
    }
    Ok(names)
}

fn set(
    directory: std::os::fd::BorrowedFd<'_>,
    name: impl rustix::path::Arg,
    label: &str,
) -> Result<(OwnedFd, FileType), Errno> {
    let (opened, kind) = open(directory, name)?;
    set_open(&opened, label)?;
    Ok((opened, kind))
}

/// What is behind a name, a link itself, without reading it.
fn open(
    directory: std::os::fd::BorrowedFd<'_>,
    name: impl rustix::path::Arg,
) -> Result<(OwnedFd, FileType), Errno> {
    let opened = openat(directory, name, OFlags::PATH | OFlags::NOFOLLOW | OFlags::CLOEXEC, Mode::empty())?;
    let found = statat(&opened, "", AtFlags::EMPTY_PATH)?;
    Ok((opened, FileType::from_raw_mode(found.st_mode)))
}

/// A name that leads to what is open, and no further.
fn name_of(file: &OwnedFd) -> String {
    format!("/proc/self/fd/{}", file.as_raw_fd())
}

fn get(file: &OwnedFd) -> Result<Vec<u8>, Errno> {
    let mut value = vec![0; 4096];
    let length = getxattr(name_of(file), ATTRIBUTE, &mut value[..])?;
    value.truncate(length);
    Ok(value)
}

/// Writes nothing where it is as it should be, which spares a volume that comes again most of the work.
fn set_open(file: &OwnedFd, label: &str) -> Result<(), Errno> {
    let present = get(file);
    let text =
        present.as_deref().map(|value| CStr::from_bytes_until_nul(value).map_or(value, CStr::to_bytes));
    if text == Ok(label.as_bytes()) {
        return Ok(());
    }
    // With a NUL at its end, as every program of SELinux writes it.
    setxattr(name_of(file), ATTRIBUTE, format!("{label}\0").as_bytes(), XattrFlags::empty())
}
