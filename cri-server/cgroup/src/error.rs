//! Why a cgroup operation failed.

use std::io;
use std::path::PathBuf;

/// Why a cgroup operation failed.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum CgroupError {
    /// Neither version is mounted where this process can see it.
    #[error("no cgroup hierarchy is mounted")]
    NotMounted,
    /// A file of the kernel could not be read.
    #[error("cannot read {}", path.display())]
    Read {
        /// The file.
        path: PathBuf,
        /// What the kernel said.
        #[source]
        source: io::Error,
    },
    /// A cgroup file could not be written.
    #[error("cannot write {value:?} to {}", path.display())]
    Write {
        /// The file.
        path: PathBuf,
        /// What was to be written.
        value: String,
        /// What the kernel said.
        #[source]
        source: io::Error,
    },
    /// A cgroup directory could not be made.
    #[error("cannot make cgroup {}", path.display())]
    Create {
        /// Its directory.
        path: PathBuf,
        /// What the kernel said.
        #[source]
        source: io::Error,
    },
    /// A cgroup directory could not be removed; `EBUSY` after the whole waiting time means that processes are still in it.
    #[error("cannot remove cgroup {}", path.display())]
    Remove {
        /// Its directory.
        path: PathBuf,
        /// What the kernel said.
        #[source]
        source: io::Error,
    },
    /// A kernel file does not have the form that its documentation says.
    #[error("{} does not have the expected form: {line:?}", path.display())]
    Malformed {
        /// The file.
        path: PathBuf,
        /// The line that could not be understood.
        line: String,
    },
    /// The process is in a cgroup that none of the visible mounts shows.
    #[error("cgroup {cgroup:?} of process {pid} is not below any visible mount")]
    NotVisible {
        /// The process.
        pid: i32,
        /// Its cgroup as `/proc/PID/cgroup` gives it.
        cgroup: String,
    },
    /// Killing or removing the root would hit the whole machine.
    #[error("refused to {action} the root cgroup")]
    Root {
        /// What was to be done to it.
        action: &'static str,
    },
    /// New processes appeared faster than they could be killed.
    #[error("processes in {} keep appearing after {rounds} rounds of killing", path.display())]
    StillForking {
        /// The cgroup.
        path: PathBuf,
        /// How often its processes were killed.
        rounds: u32,
    },
    /// kubelet and podvisor do not use the same cgroup driver.
    #[error(
        "cgroup parent {parent:?} is {is}, but podvisor uses the {driver} cgroup driver: give kubelet and podvisor the same cgroup driver"
    )]
    DriverMismatch {
        /// What the CRI request said.
        parent: String,
        /// What that is.
        is: &'static str,
        /// The driver in use.
        driver: &'static str,
    },
    /// A cgroup parent that cannot be one in any syntax.
    #[error("cgroup parent {parent:?} is not valid: {why}")]
    Parent {
        /// What the CRI request said.
        parent: String,
        /// What is wrong with it.
        why: &'static str,
    },
}

impl CgroupError {
    /// The cgroup (or one of its files) is not there: it was removed, or its controller is not enabled.
    pub fn is_not_found(&self) -> bool {
        match self {
            Self::Read { source, .. }
            | Self::Write { source, .. }
            | Self::Create { source, .. }
            | Self::Remove { source, .. } => {
                // ENODEV: reading a file that was opened before its cgroup was removed.
                source.kind() == io::ErrorKind::NotFound
                    || source.raw_os_error() == Some(rustix::io::Errno::NODEV.raw_os_error())
            }
            _ => false,
        }
    }
}

/// Shorthand of this crate.
pub type Result<T> = std::result::Result<T, CgroupError>;
