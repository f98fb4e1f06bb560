//! A pod's user namespace with the network, IPC and UTS namespaces that belong to it, without a process: pinned by bind mounts.

use std::fs::{self, File};
use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::path::{Path, PathBuf};

use rustix::mount::mount_bind;
use rustix::process::{Pid, Signal, WaitOptions, kill_process, waitpid};

use crate::error::{ContainerError, During, Step};
use crate::namespaces::{self, map};
use crate::plan::Mapping;
use crate::report::{self, Report};
use crate::sys::{self, Cloned};

/// Kinds, and the names of their files in /proc/PID/ns and among the pins.
const KINDS: [(libc::c_int, &str); 3] =
    [(libc::CLONE_NEWNET, "net"), (libc::CLONE_NEWIPC, "ipc"), (libc::CLONE_NEWUTS, "uts")];

/// Ids of a user namespace: from 0 inside.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct IdRange {
    /// The first one outside.
    pub outside: u32,
    /// How many.
    pub length: u32,
}

/// Namespaces that are there as long as this, or their pins.
#[derive(Debug)]
pub struct PodNamespaces {
    user: File,
    /// In the order of [`KINDS`].
    others: [File; 3],
    directory: PathBuf,
}

impl PodNamespaces {
    /// Makes them, and pins them as `user`, `net`, `ipc` and `uts` in a directory.
    pub fn make(uids: IdRange, gids: IdRange, directory: &Path) -> Result<Self, ContainerError> {
        let holder = Holder::start()?;
        let mapping = |range: IdRange| [Mapping { inside: 0, outside: range.outside, length: range.length }];
        map(holder.pid, &mapping(uids), &mapping(gids))?;
        fs::create_dir_all(directory)
            .map_err(ContainerError::system(format!("make {}", directory.display())))?;
        let pin = |name: &str| -> Result<File, ContainerError> {
            let (namespace, place) = (holder.namespace(name), directory.join(name));
            let pinned = File::create(&place)
                .and_then(|_| Ok(mount_bind(&namespace, &place)?))
                .and_then(|()| File::open(&place));
            pinned.map_err(ContainerError::system(format!("pin a namespace at {}", place.display())))
        };
        let user = pin("user")?;
        let [net, ipc, uts] = KINDS.map(|(_, name)| pin(name));
        Ok(Self { user, others: [net?, ipc?, uts?], directory: directory.to_owned() })
    }

    /// Where the user namespace is pinned.
    pub fn user(&self) -> PathBuf {
        self.directory.join("user")
    }

    /// The network namespace.
    pub fn net(&self) -> BorrowedFd<'_> {
        self.others[0].as_fd()
    }

    /// Calls `f` in the network, IPC and UTS namespace, with the caller's own rights. The caller has one thread.
    pub fn inside<T>(&self, f: impl FnOnce() -> T) -> io::Result<T> {
        let own: Vec<(libc::c_int, File)> = KINDS
            .iter()
            .map(|(kind, name)| Ok((*kind, File::open(format!("/proc/self/ns/{name}"))?)))
            .collect::<io::Result<_>>()?;
        let entered =
            KINDS.iter().zip(&self.others).try_for_each(|((kind, _), file)| sys::setns(file.as_fd(), *kind));
        let result = entered.map(|()| f());
        for (kind, file) in &own {
            if sys::setns(file.as_fd(), *kind).is_err() {
                // It came from there, so this cannot be; going on elsewhere would be worse than to end.
                sys::exit_now(125);
            }
        }
        result
    }

    /// Calls `f` in a process of its own that is root of the user namespace, and in the others. For what only that root may do.
    pub fn as_root(&self, f: impl FnOnce() -> io::Result<()>) -> Result<(), ContainerError> {
        let (ours, theirs) = report::channel().map_err(ContainerError::system("make a socket"))?;
        match sys::clone(0, None).map_err(ContainerError::system("start a process"))? {
            Cloned::Child => {
                let outcome =
                    self.become_root().and_then(|()| f().during(|| "act as root of the pod".into()));
                let said = match outcome {
                    Ok(()) => Report::Ready,
                    Err(failed) => Report::Failed(failed.0),
                };
                let _ = report::send(&theirs, &said);
                sys::exit_now(0)
            }
            Cloned::Parent { pid, .. } => {
                drop(theirs);
                let said = report::wait(&ours).map_err(ContainerError::system("hear from a process"));
                let _ = waitpid(Some(pid), WaitOptions::empty());
                match said? {
                    Report::Ready => Ok(()),
                    Report::Failed(text) => Err(ContainerError::Child(text)),
                    Report::Terminal(_) | Report::Process(..) | Report::Closed => {
                        Err(ContainerError::Vanished)
                    }
                }
            }
        }
    }

    fn become_root(&self) -> Step {
        namespaces::join_user(Some(&self.user))?;
        for ((kind, name), file) in KINDS.iter().zip(&self.others) {
            sys::setns(file.as_fd(), *kind).during(|| format!("join the {name} namespace"))?;
        }
        Ok(())
    }
}

/// A process that is in the namespaces while they are pinned.
struct Holder {
    pid: Pid,
    /// Its life: it ends when this does.
    _life: OwnedFd,
}

impl Holder {
    fn start() -> Result<Self, ContainerError> {
        let (life, theirs) = report::channel().map_err(ContainerError::system("make a socket"))?;
        let kinds = KINDS.iter().fold(libc::CLONE_NEWUSER, |all, (kind, _)| all | kind);
        let cloned = sys::clone(u64::from(kinds.cast_unsigned()), None);
        match cloned.map_err(ContainerError::system("make the pod's user namespace"))? {
            Cloned::Child => {
                drop(life);
                // The end of the socket, or a signal.
                let _ = rustix::io::read(&theirs, &mut [0; 1]);
                sys::exit_now(0)
            }
            Cloned::Parent { pid, .. } => Ok(Self { pid, _life: life }),
        }
    }

    fn namespace(&self, name: &str) -> PathBuf {
        format!("/proc/{}/ns/{name}", self.pid.as_raw_pid()).into()
    }
}

impl Drop for Holder {
    fn drop(&mut self) {
        let _ = kill_process(self.pid, Signal::KILL);
        let _ = waitpid(Some(self.pid), WaitOptions::empty());
    }
}
