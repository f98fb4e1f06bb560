//! One container's log file, on the disk thread.
//!
//! A full disk loses lines instead of stopping the container: what cannot be written is counted, and when
//! writing works again a line of the log says how much is missing. A line is written whole or not at all.

use std::fs::{File, OpenOptions};
use std::io::{self, Write};
use std::os::unix::fs::{DirBuilderExt, OpenOptionsExt};
use std::path::{Path, PathBuf};

use super::timestamp;

/// Why a log cannot be opened.
#[derive(Debug, thiserror::Error)]
pub(crate) enum OpenLogError {
    #[error("make the directory of the log {path}")]
    Directory { path: PathBuf, source: io::Error },
    #[error("open the log {path}")]
    File { path: PathBuf, source: io::Error },
}

/// An open log.
#[derive(Debug)]
pub(crate) struct LogFile {
    path: PathBuf,
    file: File,
    lost: Lost,
}

#[derive(Debug, Default)]
struct Lost {
    lines: u64,
    bytes: u64,
    why: String,
}

impl LogFile {
    pub(crate) fn open(path: &Path) -> Result<Self, OpenLogError> {
        let file = Self::open_file(path)?;
        Ok(Self { path: path.to_owned(), file, lost: Lost::default() })
    }

    fn open_file(path: &Path) -> Result<File, OpenLogError> {
        if let Some(directory) = path.parent() {
            let made = std::fs::DirBuilder::new().recursive(true).mode(0o755).create(directory);
            made.map_err(|source| OpenLogError::Directory { path: path.to_owned(), source })?;
        }
        let mut options = OpenOptions::new();
        // No symbolic link: a container that has the log directory mounted could let the monitor, which is root,
        // write anywhere on the node. 0640 as containerd and CRI-O have it: the log may hold secrets.
        options.create(true).append(true).read(true).mode(0o640).custom_flags(libc::O_NOFOLLOW);
        options.open(path).map_err(|source| OpenLogError::File { path: path.to_owned(), source })
    }

    /// Goes on in a new file of the same name: the old one was renamed. When that fails, the old file stays in use.
    pub(crate) fn reopen(&mut self) -> Result<(), OpenLogError> {
        self.file = Self::open_file(&self.path)?;
        Ok(())
    }

    /// Appends whole lines.
    pub(crate) fn append(&mut self, lines: &[u8]) {
        if self.lost.lines > 0 {
            let note = format!(
                "{} stderr F [podvisor: {} lines ({} bytes) of output could not be written here: {}]\n",
                timestamp::now(),
                self.lost.lines,
                self.lost.bytes,
                self.lost.why
            );
            if self.write(note.as_bytes()).is_err() {
                return self.lose(lines, None);
            }
            self.lost = Lost::default();
        }
        if let Err((written, error)) = self.write(lines) {
            self.lose(&lines[written..], Some(&error));
        }
    }

    fn lose(&mut self, lines: &[u8], why: Option<&io::Error>) {
        self.lost.lines += lines.split_inclusive(|&byte| byte == b'\n').count() as u64;
        self.lost.bytes += lines.len() as u64;
        if let Some(why) = why {
            self.lost.why = why.to_string();
        }
    }

    /// Writes everything, or tells how many bytes of whole lines are in the file.
    fn write(&mut self, lines: &[u8]) -> Result<(), (usize, io::Error)> {
        let mut written = 0;
        while written < lines.len() {
            match self.file.write(&lines[written..]) {
                Ok(0) => return Err((self.drop_torn_line(lines, written), io::ErrorKind::WriteZero.into())),
                Ok(count) => written += count,
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                Err(error) => return Err((self.drop_torn_line(lines, written), error)),
            }
        }
        Ok(())
    }

    /// Cuts off the line that only the beginning of was written. Nobody else appends to this file.
    fn drop_torn_line(&mut self, lines: &[u8], written: usize) -> usize {
        let whole = lines[..written].iter().rposition(|&byte| byte == b'\n').map_or(0, |newline| newline + 1);
        if let Ok(metadata) = self.file.metadata()
            && whole < written
        {
            let _ = self.file.set_len(metadata.len().saturating_sub((written - whole) as u64));
        }
        whole
    }
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::PermissionsExt;

    use super::*;

    #[test]
    fn makes_the_directory_and_appends_across_a_rotation() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("pod/container/0.log");
        let mut log = LogFile::open(&path).unwrap();
        log.append(b"one\n");
        let rotated = path.with_extension("log.1");
        std::fs::rename(&path, &rotated).unwrap();
        log.append(b"two\n");
        log.reopen().unwrap();
        log.append(b"three\n");
        assert_eq!(std::fs::read(&rotated).unwrap(), b"one\ntwo\n");
        assert_eq!(std::fs::read(&path).unwrap(), b"three\n");
        assert_eq!(std::fs::metadata(&path).unwrap().permissions().mode() & 0o777, 0o640);
    }

    #[test]
    fn a_symbolic_link_is_not_followed() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("0.log");
        std::os::unix::fs::symlink(directory.path().join("elsewhere"), &path).unwrap();
        assert!(matches!(LogFile::open(&path), Err(OpenLogError::File { .. })));
        assert!(!directory.path().join("elsewhere").exists());
    }

    #[test]
    fn a_file_that_may_not_grow_loses_lines_and_says_so_later() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("0.log");
        let mut log = LogFile::open(&path).unwrap();
        log.append(b"kept\n");
        // A read-only descriptor refuses every write, as a full disk does.
        let writable = std::mem::replace(&mut log.file, File::open(&path).unwrap());
        log.append(b"lost\nlost\n");
        log.append(b"lost\n");
        log.file = writable;
        log.append(b"back\n");
        let text = std::fs::read_to_string(&path).unwrap();
        let lines: Vec<&str> = text.lines().collect();
        assert_eq!((lines[0], lines[2], lines.len()), ("kept", "back", 3));
        assert!(
            lines[1].contains("3 lines (15 bytes)") && lines[1].contains("Bad file descriptor"),
            "{text}"
        );
    }
}
