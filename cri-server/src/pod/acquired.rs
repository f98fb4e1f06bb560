//! What a pod or container holds on the host, as data: recorded before it is acquired, so that it can be given back
//! after a crash too. Giving back is idempotent, in reverse order, every step tried; what fails stays recorded.

use std::fmt::Display;
use std::path::{Path, PathBuf};
use std::time::Duration;

use podvisor_cgroup::Driver;
use podvisor_network::namespace::Namespaces;
use serde::{Deserialize, Serialize};

use super::record::{PinnedRuntime, ProcessIdentity};
use super::{runtime_state, share, shared_volumes};
use crate::id::PodId;
use crate::node::Node;
use crate::timeline::timed;

/// One thing held.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub(crate) enum Acquisition {
    /// A directory of ours with everything below it (never followed across a mount: mounts are recorded after it).
    Directory(PathBuf),
    /// A mount point of ours.
    Mount(PathBuf),
    /// Pinned namespaces.
    Namespaces(Namespaces),
    /// A connection to the pod network.
    Network { kind: podvisor_network::Kind, sandbox: Box<podvisor_network::Sandbox> },
    /// The sandbox container, in an OCI runtime that keeps a pod's containers in one process.
    SandboxContainer { runtime: Box<PinnedRuntime>, id: String },
    /// A cgroup of ours, by its path below the mount point; with the systemd driver a scope.
    Cgroup(String),
    /// What the guest of a virtual machine sees of a container, in its file server. Records of podvisor 0.1.0 have no pod, and their
    /// containers no volumes that others use too.
    Share {
        server: ProcessIdentity,
        #[serde(default)]
        pod: Option<PodId>,
        container: String,
    },
    /// A writable layer in the image store.
    Snapshot(String),
}

/// Why something could not be given back.
#[derive(Debug, thiserror::Error)]
pub(crate) enum ReleaseError {
    #[error("cannot remove {path}")]
    Directory { path: PathBuf, source: std::io::Error },
    #[error("cannot unmount {path}")]
    Mount { path: PathBuf, source: std::io::Error },
    #[error("cannot release namespaces")]
    Namespaces(#[source] podvisor_network::namespace::NamespaceError),
    #[error("cannot disconnect the pod from its network")]
    Network(#[source] Box<podvisor_network::NetworkError>),
    #[error("cannot remove cgroup {path}")]
    Cgroup { path: String, source: podvisor_cgroup::CgroupError },
    #[error("cannot end the unit of cgroup {path}")]
    Unit { path: String, source: podvisor_cgroup::systemd::SystemdError },
    #[error("cannot take a container out of its pod's file server")]
    Share(#[source] Box<crate::error::PodError>),
    #[error("cannot release snapshot {key}")]
    Snapshot { key: String, source: Box<podvisor_image_store::ImageError> },
    #[error("releasing took longer than {0:?}")]
    TimedOut(Duration),
}

impl Acquisition {
    /// The failure point after its release.
    fn fault(&self) -> Option<&'static str> {
        Some(match self {
            Self::Directory(_) => "release.directory",
            Self::Mount(_) => "release.mount",
            Self::Namespaces(_) => "release.namespaces",
            Self::Network { .. } => "release.network",
            Self::Cgroup(_) => "release.cgroup",
            Self::Snapshot(_) => "release.snapshot",
            // The failure tests run on runc, which has none.
            Self::SandboxContainer { .. } | Self::Share { .. } => return None,
        })
    }

    /// Gives it back. Idempotent.
    pub(crate) async fn release(&self, node: &Node) -> Result<(), ReleaseError> {
        match self {
            Acquisition::Directory(path) => {
                let path = path.clone();
                blocking(move || remove_directory(&path)).await
            }
            Acquisition::Mount(path) => {
                let path = path.clone();
                blocking(move || unmount(&path)).await
            }
            Acquisition::Namespaces(namespaces) => {
                let namespaces = namespaces.clone();
                blocking(move || {
                    podvisor_network::namespace::release(&namespaces).map_err(ReleaseError::Namespaces)
                })
                .await
            }
            Acquisition::Network { kind, sandbox } => node
                .network
                .teardown(*kind, sandbox)
                .await
                .map_err(|source| ReleaseError::Network(Box::new(source))),
            Acquisition::SandboxContainer { runtime, id } => {
                // Its monitor has deleted it, unless there is none.
                runtime_state::forget(runtime, id).await;
                Ok(())
            }
            Acquisition::Cgroup(path) => {
                let cgroup = node.cgroups.cgroup(path);
                // Through systemd, so that it does not go on believing in the unit. Gone by itself, or by the runtime, in most cases.
                if let Some(unit) = unit(node.driver, path)
                    && cgroup.exists()
                {
                    let stopped = node.systemd.stop_unit(unit).await;
                    stopped.map_err(|source| ReleaseError::Unit { path: path.clone(), source })?;
                }
                let path = path.clone();
                blocking(move || cgroup.remove().map_err(|source| ReleaseError::Cgroup { path, source }))
                    .await
            }
            Acquisition::Share { server, pod, container } => {
                let (server, container) = (*server, container.clone());
                let volumes = pod.as_ref().map(|pod| shared_volumes::directory(node, pod));
                let release = move || {
                    share::remove_container(server, &container)?;
                    volumes.map_or(Ok(()), |volumes| shared_volumes::release(volumes, server, &container))
                };
                blocking(move || release().map_err(|error| ReleaseError::Share(Box::new(error)))).await
            }
            Acquisition::Snapshot(key) => node
                .images
                .release(key)
                .await
                .map_err(|source| ReleaseError::Snapshot { key: key.clone(), source: Box::new(source) }),
        }
    }
}

/// Gives everything of a pod or container back in reverse order. What could not be given back stays in `acquired`; the first failure is
/// returned.
pub(crate) async fn release_all(
    node: &Node,
    of: &impl Display,
    acquired: &mut Vec<Acquisition>,
) -> Result<(), ReleaseError> {
    const LIMIT: Duration = Duration::from_secs(60);
    let mut failures = Vec::new();
    let mut kept = Vec::new();
    while let Some(acquisition) = acquired.pop() {
        let release = tokio::time::timeout(LIMIT, acquisition.release(node));
        let released = timed(acquisition.fault().unwrap_or("release"), of, release).await;
        if let Err(error) = released.unwrap_or(Err(ReleaseError::TimedOut(LIMIT))) {
            failures.push(error);
            kept.push(acquisition);
        } else if let Some(name) = acquisition.fault() {
            podvisor_fault::point(name);
        }
    }
    kept.reverse();
    *acquired = kept;
    let mut failures = failures.into_iter();
    let Some(first) = failures.next() else { return Ok(()) };
    for further in failures {
        tracing::warn!(error = crate::error::chain(&further), "a further step of a release failed");
    }
    Err(first)
}

/// The unit that systemd has made a cgroup for.
fn unit(driver: Driver, path: &str) -> Option<&str> {
    let name = path.rsplit('/').next().unwrap_or(path);
    (driver == Driver::Systemd && name.strip_suffix(".scope").is_some()).then_some(name)
}

async fn blocking<F>(work: F) -> Result<(), ReleaseError>
where
    F: FnOnce() -> Result<(), ReleaseError> + Send + 'static,
{
    match tokio::task::spawn_blocking(work).await {
        Ok(done) => done,
        Err(panic) => std::panic::resume_unwind(panic.into_panic()),
    }
}

fn remove_directory(path: &Path) -> Result<(), ReleaseError> {
    match std::fs::remove_dir_all(path) {
        Ok(()) => Ok(()),
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => Ok(()),
        Err(source) => Err(ReleaseError::Directory { path: path.to_owned(), source }),
    }
}

/// Unmounts whatever is mounted at `path`, also several times over.
fn unmount(path: &Path) -> Result<(), ReleaseError> {
    use rustix::io::Errno;
    use rustix::mount::UnmountFlags;
    loop {
        // MNT_DETACH: a process that still has a file open there must not hold up the release; the kernel drops the
        // file system with the last user.
        match rustix::mount::unmount(path, UnmountFlags::DETACH | UnmountFlags::NOFOLLOW) {
            Ok(()) => {}
            // EINVAL: no mount point (any more).
            Err(Errno::INVAL | Errno::NOENT) => return Ok(()),
            Err(error) => return Err(ReleaseError::Mount { path: path.to_owned(), source: error.into() }),
        }
    }
}
