//! The monitor's own log: `monitor.log` in the pod's run directory, which is also its stderr.
//!
//! No tracing here: its subscriber would be a third of the memory that a monitor may use, and a monitor says something
//! a few times in its life. Bounded, because the run directory is memory: at 64 KiB the file becomes
//! `monitor.log.1` and a new one begins.

use std::fmt::Display;
use std::io;
use std::path::Path;

use rustix::fs::{Mode, OFlags};

use crate::output::timestamp;

const LIMIT: u64 = 64 * 1024;

/// Where notes go. Before adoption that is the stderr which the daemon gave.
#[derive(Debug, Default)]
pub(crate) struct Journal {
    file: Option<std::path::PathBuf>,
}

impl Journal {
    /// From now on stderr is `monitor.log` in `directory`.
    pub(crate) fn open(&mut self, directory: &Path) -> io::Result<()> {
        let path = directory.join("monitor.log");
        Self::redirect(&path)?;
        self.file = Some(path);
        Ok(())
    }

    fn redirect(path: &Path) -> io::Result<()> {
        let flags = OFlags::WRONLY | OFlags::CREATE | OFlags::APPEND | OFlags::CLOEXEC | OFlags::NOFOLLOW;
        let file = rustix::fs::open(path, flags, Mode::from_raw_mode(0o600))?;
        rustix::stdio::dup2_stderr(file)?;
        Ok(())
    }

    /// Writes one line: a constant message, what it is about, and the cause.
    pub(crate) fn note(&self, message: &str, about: &str, cause: &dyn Display) {
        if let Some(path) = &self.file
            && rustix::fs::fstat(rustix::stdio::stderr())
                .is_ok_and(|stat| stat.st_size.unsigned_abs() > LIMIT)
        {
            let _ = std::fs::rename(path, path.with_extension("log.1"));
            let _ = Self::redirect(path);
        }
        // One write for the line; nobody is left to be told when stderr does not work.
        let line = format!("{} {message} about={about:?} cause={:?}\n", timestamp::now(), cause.to_string());
        let _ = rustix::io::write(rustix::stdio::stderr(), line.as_bytes());
    }
}
