//! Namespaces that live without a process: made in a thread, pinned by a bind mount, released by unmounting.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

/// What to make.
#[derive(Debug, Clone, Default)]
pub struct Request {
    /// Name of the pin in each directory.
    pub name: String,
    /// A network namespace, pinned in `/run/netns` (loopback is brought up).
    pub net: bool,
    /// An IPC namespace, pinned in `/run/ipcns`.
    pub ipc: bool,
    /// A UTS namespace with this host name, pinned in `/run/utsns`.
    pub uts: Option<String>,
    /// Written inside the new namespaces: `net.*`, `kernel.shm*`, `kernel.msg*`, `kernel.sem`, `fs.mqueue.*`.
    pub sysctls: BTreeMap<String, String>,
}

/// Where the pins are.
#[derive(Debug, Clone, Default, PartialEq, Eq, serde::Serialize, serde::Deserialize)]
pub struct Namespaces {
    /// Network.
    pub net: Option<PathBuf>,
    /// IPC.
    pub ipc: Option<PathBuf>,
    /// UTS.
    pub uts: Option<PathBuf>,
}

impl Namespaces {
    /// Where the pins of `request` will be: recorded before [`create`] so that a crash loses none.
    pub fn planned(_request: &Request) -> Self {
        todo!()
    }
}

/// Why no namespace was made.
#[derive(Debug, thiserror::Error)]
#[error("placeholder")]
pub struct NamespaceError;

/// Makes and pins what `request` names; on error nothing is left. Blocking, about 2 ms.
pub fn create(_request: &Request) -> Result<Namespaces, NamespaceError> {
    todo!()
}

/// Unpins. Idempotent; blocking.
pub fn release(_namespaces: &Namespaces) -> Result<(), NamespaceError> {
    todo!()
}

/// Runs `f` in a thread that is in the namespace at `path`.
pub fn enter<T: Send>(_path: &Path, _f: impl FnOnce() -> T + Send) -> Result<T, NamespaceError> {
    todo!()
}
