//! Monitors that wait for a pod: started ahead of time, each in a cgroup leaf of its own, so that RunPodSandbox starts
//! no process. One that is never adopted ends with the daemon, because its control connection does.
//!
//! With the systemd driver the leaf is a scope: systemd lets nobody else make cgroups in a slice, and takes away what it does not know.

use std::collections::HashSet;
use std::os::fd::OwnedFd;
use std::path::{Path, PathBuf};
use std::process::Stdio;
use std::sync::{Arc, Mutex};
use std::time::Duration;

use podvisor_cgroup::systemd::{Scope, Systemd};
use podvisor_cgroup::{Cgroup, CgroupError};
use tokio::net::UnixStream;
use tokio::process::Command;
use tokio::sync::mpsc;

use super::connection::{Connection, MonitorError, Notice};
use super::process::identify;
use crate::id::random_hex;
use crate::pod::record::ProcessIdentity;

/// A monitor without a pod.
#[derive(Debug)]
pub(crate) struct Idle {
    pub(crate) connection: Connection,
    pub(crate) notices: mpsc::UnboundedReceiver<Notice>,
    pub(crate) process: ProcessIdentity,
    /// Its own leaf, by path below the mount point.
    pub(crate) cgroup: String,
}

/// Where monitors come from.
#[derive(Debug)]
pub(crate) struct Pool {
    ready: tokio::sync::Mutex<mpsc::Receiver<Result<Idle, MonitorError>>>,
    place: Place,
    /// The leaves that were there at the start.
    found: Mutex<Vec<PathBuf>>,
}

/// How monitors are started.
#[derive(Debug)]
pub(crate) struct Template {
    pub(crate) program: PathBuf,
    pub(crate) place: Place,
    /// See [`super::connection::runtime_limit`].
    pub(crate) runtime_limit: Duration,
}

/// Where they get their leaves.
#[derive(Debug, Clone)]
pub(crate) enum Place {
    /// Directories below a cgroup of ours.
    Below(Cgroup),
    /// Scopes in a slice.
    Slice { systemd: Arc<Systemd>, name: String, cgroup: Cgroup },
}

impl Pool {
    /// Keeps `size` (at least one) monitors ready from now on.
    pub(crate) fn start(template: Template, size: u32) -> Self {
        let found = match &template.place {
            Place::Below(parent) => leaves(parent),
            Place::Slice { .. } => Vec::new(),
        };
        // The channel holds all but the one that its feeder holds in its hands.
        let (sender, ready) = mpsc::channel(size.max(1) as usize);
        let place = template.place.clone();
        let template = Arc::new(template);
        tokio::spawn(async move {
            loop {
                // A place first: a failing start is tried again only when somebody asks for a monitor.
                let Ok(place) = sender.reserve().await else { return };
                let starting = template.clone();
                let started = match tokio::task::spawn_blocking(move || starting.start()).await {
                    Ok(Ok(started)) => started.connect(&template).await,
                    Ok(Err(error)) => Err(error),
                    Err(_) => return,
                };
                place.send(started);
            }
        });
        Self { ready: tokio::sync::Mutex::new(ready), place, found: Mutex::new(found) }
    }

    /// Takes away the leaves of an earlier daemon but those that pods hold, which are `held` by path below the mount point.
    pub(crate) fn sweep_found(&self, held: &HashSet<&str>) {
        let held: HashSet<_> = held.iter().filter_map(|path| Path::new(path).file_name()).collect();
        let mut found = std::mem::take(&mut *self.found.lock().expect("no panic under this lock"));
        found.retain(|leaf| leaf.file_name().is_none_or(|name| !held.contains(name)));
        tokio::spawn(sweep_again(sweep(found)));
    }

    /// The next monitor; starts none itself, at worst waits for one that is being started.
    pub(crate) async fn take(&self) -> Result<Idle, MonitorError> {
        /// Besides those that wait: whoever kills them may hit one at its very start too. Where they cannot run at all, a few more
        /// tries cost little.
        const DEATHS: usize = 3;
        let mut deaths = 0;
        loop {
            let mut ready = self.ready.lock().await;
            let more = deaths < ready.max_capacity() + DEATHS;
            let next = ready.recv().await.ok_or(MonitorError::Gone)?;
            drop(ready);
            match next {
                // Asked, not looked for: one that has just been killed still looks alive. A turn takes some tens of microseconds.
                Ok(idle) if more && idle.connection.hello().await.is_err() => self.place.forget(idle.cgroup),
                Err(MonitorError::Spawn { .. } | MonitorError::Gone) if more => {}
                next => return next,
            }
            deaths += 1;
        }
    }
}

fn leaves(parent: &Cgroup) -> Vec<PathBuf> {
    let entries = parent.directories().into_iter().filter_map(|directory| std::fs::read_dir(directory).ok());
    entries.flatten().flatten().map(|entry| entry.path()).filter(|path| path.is_dir()).collect()
}

/// Takes away the leaves of monitors that have gone; returns the others. A cgroup that still has a process cannot be removed, which is
/// what protects them.
fn sweep(mut leaves: Vec<PathBuf>) -> Vec<PathBuf> {
    leaves.retain(|leaf| {
        matches!(std::fs::remove_dir(leaf), Err(error) if error.kind() == std::io::ErrorKind::ResourceBusy)
    });
    leaves
}

/// The leaves of an earlier daemon: its idle monitors may be about to end, and recovery ends those of pods that were not yet recorded.
async fn sweep_again(mut leaves: Vec<PathBuf>) {
    const TRIES: u32 = 10;
    let mut pause = Duration::from_millis(100);
    for _ in 0..TRIES {
        if leaves.is_empty() {
            return;
        }
        tokio::time::sleep(pause).await;
        pause *= 2;
        leaves = sweep(leaves);
    }
}

impl Pool {
    /// Ends the monitors that wait, and takes their cgroups away; the common one too when no pod's monitor is in it.
    pub(crate) async fn close(&self) {
        let mut ready = self.ready.lock().await;
        ready.close();
        while let Some(next) = ready.recv().await {
            let Ok(Idle { connection, notices, process, cgroup }) = next else { continue };
            drop((connection, notices));
            super::process::kill(process);
            self.place.remove(&cgroup).await;
        }
        if let Place::Below(parent) = &self.place {
            sweep(leaves(parent));
            for directory in parent.directories() {
                // Not empty: pods go on.
                let _ = std::fs::remove_dir(directory);
            }
        }
    }
}

struct Started {
    ours: std::os::unix::net::UnixStream,
    process: ProcessIdentity,
}

impl Template {
    fn start(&self) -> Result<Started, MonitorError> {
        let failed = |source| MonitorError::Spawn { path: self.program.display().to_string(), source };
        let (ours, theirs) = std::os::unix::net::UnixStream::pair().map_err(failed)?;
        ours.set_nonblocking(true).map_err(failed)?;
        // Its own session comes from the monitor itself, which detaches when it is adopted.
        let mut child = Command::new(&self.program)
            .args(["--control-fd", "0"])
            .stdin(OwnedFd::from(theirs))
            .stdout(Stdio::null())
            .stderr(Stdio::null())
            .current_dir("/")
            // What the service manager told the daemon is not for containers: with NOTIFY_SOCKET the runtime would
            // wait for their readiness.
            .env_clear()
            .env("PATH", std::env::var_os("PATH").unwrap_or_else(|| "/usr/sbin:/usr/bin:/sbin:/bin".into()))
            .kill_on_drop(false)
            .spawn()
            .map_err(failed)?;
        let pid = child.id().unwrap_or_default().cast_signed();
        let process = identify(pid).ok_or_else(|| failed(std::io::Error::other("it ended at once")))?;
        // Reaped here for as long as this daemon lives; after that by init.
        tokio::spawn(async move { child.wait().await });

        Ok(Started { ours, process })
    }
}

impl Place {
    /// Takes a leaf away when the process in it has gone.
    async fn remove(&self, cgroup: &str) {
        let name = cgroup.rsplit('/').next().unwrap_or_default();
        // Both wait for the process to be gone.
        let removed: Result<(), Box<dyn std::error::Error + Send + Sync>> = match self {
            Self::Slice { systemd, .. } => systemd.stop_unit(name).await.map_err(Into::into),
            Self::Below(parent) => {
                let leaf = parent.child(name);
                let removing = tokio::task::spawn_blocking(move || leaf.remove());
                removing.await.map_or(Ok(()), |removed| removed.map_err(Into::into))
            }
        };
        if let Err(error) = removed {
            tracing::debug!(
                error = crate::error::chain(error.as_ref()),
                "a monitor's cgroup stays until the next start"
            );
        }
    }

    /// The same beside what goes on: its monitor has died before it had a pod.
    fn forget(&self, cgroup: String) {
        let place = self.clone();
        tokio::spawn(async move { place.remove(&cgroup).await });
    }

    /// Moves a process into a leaf of its own; returns the leaf's path, which it has not reached when that fails.
    async fn put(&self, pid: i32) -> String {
        let (path, outcome): (_, Result<(), Box<dyn std::error::Error + Send + Sync>>) = match self {
            Self::Below(parent) => {
                let leaf = parent.child(&random_hex(8));
                let path = leaf.path();
                let moving = tokio::task::spawn_blocking(move || leaf.create().and_then(|()| leaf.add(pid)));
                let moved = moving.await.map_or(Ok(()), |moved: Result<(), CgroupError>| moved);
                (path, moved.map_err(Into::into))
            }
            Self::Slice { systemd, name, cgroup } => {
                let scope = Scope {
                    name: format!("podvisor-monitor-{}.scope", random_hex(8)),
                    slice: name.clone(),
                    description: "podvisor's monitor of a pod".into(),
                    pids: vec![pid.unsigned_abs()],
                };
                let moved = systemd.start_scope(&scope).await;
                (cgroup.child(&scope.name).path(), moved.map_err(Into::into))
            }
        };
        if let Err(error) = outcome {
            tracing::warn!(
                error = crate::error::chain(error.as_ref()),
                "a monitor stays in the daemon's cgroup: it will not survive a service manager that kills the group"
            );
        }
        path
    }
}

impl Started {
    async fn connect(self, template: &Template) -> Result<Idle, MonitorError> {
        let cgroup = template.place.put(self.process.pid).await;
        let socket = UnixStream::from_std(self.ours)
            .map_err(|source| MonitorError::Connect { path: "its control connection".into(), source })?;
        let (sender, notices) = mpsc::unbounded_channel();
        let connection = Connection::over(socket, template.runtime_limit, move |notice| {
            let _ = sender.send(notice);
        });
        if let Err(error) = connection.hello().await {
            template.place.forget(cgroup);
            return Err(error);
        }
        Ok(Idle { connection, notices, process: self.process, cgroup })
    }
}
