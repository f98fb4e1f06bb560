//! Reading and writing the kernel's small files, with errors that name them.

use std::io;
use std::path::{Path, PathBuf};

use crate::{CgroupError, Result};

pub(crate) fn read(path: &Path) -> Result<String> {
    std::fs::read_to_string(path).map_err(|source| CgroupError::Read { path: path.into(), source })
}

/// `None` when the file, its cgroup or its controller is not there.
pub(crate) fn read_optional(path: &Path) -> Result<Option<String>> {
    match read(path) {
        Ok(text) => Ok(Some(text)),
        // EOPNOTSUPP: pressure files with `psi=0`, `cgroup.procs` of a threaded cgroup.
        Err(error) if error.is_not_found() || unsupported(&error) => Ok(None),
        Err(error) => Err(error),
    }
}

fn unsupported(error: &CgroupError) -> bool {
    matches!(error, CgroupError::Read { source, .. } if source.kind() == io::ErrorKind::Unsupported)
}

pub(crate) fn write(path: &Path, value: &str) -> Result<()> {
    // One write without O_CREAT or O_TRUNC: cgroup files take a value per write call, and a missing one must be an error.
    std::fs::OpenOptions::new()
        .write(true)
        .open(path)
        .and_then(|mut file| io::Write::write_all(&mut file, value.as_bytes()))
        .map_err(|source| CgroupError::Write { path: path.into(), value: value.into(), source })
}

/// A file that holds one number; `max` is `u64::MAX`.
pub(crate) fn read_number(path: &Path) -> Result<Option<u64>> {
    let Some(text) = read_optional(path)? else { return Ok(None) };
    let text = text.trim();
    if text == "max" {
        return Ok(Some(u64::MAX));
    }
    text.parse().map(Some).map_err(|_| CgroupError::Malformed { path: path.into(), line: text.into() })
}

/// The value of `key` in a file of lines `KEY VALUE`.
pub(crate) fn keyed(text: &str, key: &str) -> Option<u64> {
    text.lines().find_map(|line| line.strip_prefix(key)?.strip_prefix(' ')?.trim().parse().ok())
}

pub(crate) fn child_directories(path: &Path) -> Result<Vec<PathBuf>> {
    let failed = |source| CgroupError::Read { path: path.into(), source };
    let entries = match std::fs::read_dir(path) {
        Ok(entries) => entries,
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(Vec::new()),
        Err(error) => return Err(failed(error)),
    };
    let mut children = Vec::new();
    for entry in entries {
        let entry = entry.map_err(failed)?;
        if entry.file_type().is_ok_and(|kind| kind.is_dir()) {
            children.push(entry.path());
        }
    }
    Ok(children)
}
