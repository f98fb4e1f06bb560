//! From root's process to one that has the shared tree and nothing else. In this order, each step while its means are still there:
//!
//! 1. a child that stays outside for a moment, to write the id maps of 3
//! 2. new mount, network, IPC, UTS and cgroup namespaces; the shared tree becomes the root, following what is mounted on the host later
//! 3. a user namespace: from here on no capability counts for anything but files and this process
//! 4. no group, no capability but those of [`capabilities::KEPT`], and no way to get one
//! 5. the system calls of [`syscalls`] and no other
//!
//! There is no pid namespace: it would take a second process, which would stay as the first one's parent and stand between it and the
//! monitor. None of the remaining system calls names another process.

mod capabilities;
mod identities;
mod syscalls;
mod tree;

use std::fs::File;
use std::path::Path;

pub(crate) use capabilities::CapabilityError;
pub(crate) use identities::IdentityError;
pub(crate) use syscalls::SyscallError;
pub(crate) use tree::TreeError;

use identities::MapWriter;

/// Why this process could not be confined.
#[derive(Debug, thiserror::Error)]
pub(crate) enum ConfineError {
    #[error("make the shared tree the root")]
    Tree(#[from] TreeError),
    #[error("enter a user namespace")]
    Identities(#[from] IdentityError),
    #[error("drop capabilities")]
    Capabilities(#[from] CapabilityError),
    #[error("restrict system calls")]
    Syscalls(#[from] SyscallError),
}

/// Confines this process, which must have no other thread, to `directory`. Gives what is left of /proc: the directory of its own
/// descriptors.
pub(crate) fn enter(directory: &Path) -> Result<File, ConfineError> {
    let writer = MapWriter::start()?;
    let descriptors = tree::enter(directory)?;
    writer.enter()?;
    capabilities::reduce()?;
    syscalls::restrict()?;
    Ok(descriptors)
}
