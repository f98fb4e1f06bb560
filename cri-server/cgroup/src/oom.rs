//! Being told when the kernel kills for lack of memory, without asking again and again.
//!
//! Counting after the container's end is not enough: systemd removes a scope's cgroup as soon as its last process is gone, and the
//! count with it.

use std::fs::File;
use std::io::{Read, Seek, SeekFrom};
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};
use std::path::{Path, PathBuf};

use rustix::event::{EventfdFlags, eventfd};

use crate::cgroup::Hierarchy;
use crate::files::write;
use crate::stats::oom_kills_in;
use crate::{Cgroup, CgroupError, Result};

/// A cgroup's out-of-memory events. Wait for [`OomWatch::interest`] on its descriptor, then call [`OomWatch::kills`].
#[derive(Debug)]
pub struct OomWatch {
    /// `memory.events` (version 2) or `memory.oom_control` (version 1).
    counter: File,
    path: PathBuf,
    /// Version 1 signals an eventfd.
    event: Option<OwnedFd>,
    seen: u64,
}

/// What to poll an [`OomWatch`]'s descriptor for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Interest {
    /// `EPOLLIN`.
    Readable,
    /// `EPOLLPRI`: the kernel's way to say that a cgroup file changed.
    Priority,
}

impl Cgroup {
    /// Starts to watch. `Ok(None)`: no memory controller there.
    pub fn watch_oom(&self) -> Result<Option<OomWatch>> {
        let failed = |path: &Path| {
            let path = path.to_path_buf();
            move |source| CgroupError::Watch { path, source }
        };
        match &self.hierarchy {
            Hierarchy::V2 { directory, .. } => {
                let path = directory.join("memory.events");
                if !path.exists() && self.exists() {
                    return Ok(None);
                }
                let counter = File::open(&path).map_err(failed(&path))?;
                OomWatch { counter, path, event: None, seen: 0 }.started().map(Some)
            }
            Hierarchy::V1 { .. } => {
                let Some(directory) = self.directory("memory") else { return Ok(None) };
                let path = directory.join("memory.oom_control");
                let counter = File::open(&path).map_err(failed(&path))?;
                let event = eventfd(0, EventfdFlags::CLOEXEC | EventfdFlags::NONBLOCK)
                    .map_err(|errno| failed(&path)(errno.into()))?;
                // Documentation/admin-guide/cgroup-v1/memory.rst, "OOM Control": EVENTFD COUNTERFILE.
                let line = format!("{} {}", event.as_raw_fd(), counter.as_raw_fd());
                write(&directory.join("cgroup.event_control"), &line)?;
                OomWatch { counter, path, event: Some(event), seen: 0 }.started().map(Some)
            }
        }
    }
}

impl OomWatch {
    /// The first read also arms `EPOLLPRI`.
    fn started(mut self) -> Result<Self> {
        self.seen = self.count()?;
        Ok(self)
    }

    /// What to poll for.
    pub fn interest(&self) -> Interest {
        if self.event.is_some() { Interest::Readable } else { Interest::Priority }
    }

    /// Kills since the watch began or since the last call. 0 is possible when woken: other counters in the file change too, and version 1
    /// signals before it kills. So ask once more after the process has ended. Once the cgroup is removed: an error with
    /// [`CgroupError::is_not_found`].
    pub fn kills(&mut self) -> Result<u64> {
        if let Some(event) = &self.event {
            // Nothing to read: called without being woken.
            let _ = rustix::io::read(event, &mut [0; 8]);
        }
        let count = self.count()?;
        let fresh = count.saturating_sub(self.seen);
        self.seen = count.max(self.seen);
        Ok(fresh)
    }

    fn count(&mut self) -> Result<u64> {
        let mut text = String::new();
        let read = self.counter.seek(SeekFrom::Start(0)).and_then(|_| self.counter.read_to_string(&mut text));
        match read {
            Ok(_) => Ok(oom_kills_in(&text)),
            Err(source) => Err(CgroupError::Watch { path: self.path.clone(), source }),
        }
    }
}

impl AsFd for OomWatch {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.event.as_ref().map_or_else(|| self.counter.as_fd(), AsFd::as_fd)
    }
}
