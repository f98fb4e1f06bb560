//! Namespaces that live without a process: made in a thread, pinned by a bind mount, released by unmounting.
//!
//! A namespace lasts as long as something refers to it. A fresh thread unshares, prepares what is inside (host name,
//! loopback, sysctls), bind-mounts its `/proc/thread-self/ns/*` onto empty files and ends: no process has to stay. Tools
//! of the node (`ip netns`, CNI plugins, `nsenter --net=`) find network namespaces in [`NET_DIRECTORY`].
//!
//! With a user namespace that one comes first and owns the others, so that the pod's root may mount a /proc, sysfs and mqueue of its
//! own and change its network. A process makes them all ([`user`]) and ends as soon as they are pinned.

mod dumpable;
mod sysctl;
mod user;

use std::collections::BTreeMap;
use std::fs::{self, File, OpenOptions};
use std::io;
use std::os::fd::AsFd;
use std::os::unix::fs::{DirBuilderExt, OpenOptionsExt};
use std::path::{Path, PathBuf};
use std::thread;

use rtnetlink::LinkUnspec;
use rtnetlink::packet_route::RouteNetlinkMessage;
use rustix::fs::FlockOperation;
use rustix::io::Errno;
use rustix::mount::{MountPropagationFlags, UnmountFlags};

use self::user::Holder;
pub use self::user::{IdRange, UserMappings};
use crate::netlink::{Batch, Client, Refusal};

/// Where network namespaces are pinned: the directory of `ip netns`.
pub const NET_DIRECTORY: &str = "/run/netns";
/// Where IPC namespaces are pinned.
pub const IPC_DIRECTORY: &str = "/run/ipcns";
/// Where UTS namespaces are pinned.
pub const UTS_DIRECTORY: &str = "/run/utsns";
/// Where user namespaces are pinned.
pub const USER_DIRECTORY: &str = "/run/userns";

/// The kernel's `__NEW_UTS_LEN`, bytes.
const HOST_NAME_LIMIT: usize = 64;

/// What to make.
#[derive(Debug, Clone, Default)]
pub struct Request {
    /// Name of the pin in each directory.
    pub name: String,
    /// A user namespace with these ids, pinned in `/run/userns`. It owns the others.
    pub user: Option<UserMappings>,
    /// A network namespace, pinned in `/run/netns` (loopback is brought up).
    pub net: bool,
    /// An IPC namespace, pinned in `/run/ipcns`.
    pub ipc: bool,
    /// A UTS namespace with this host name (at most 64 bytes; empty: the node's), pinned in `/run/utsns`.
    pub uts: Option<String>,
    /// Written inside the new namespaces: `net.*`, `kernel.shm*`, `kernel.msg*`, `kernel.sem`, `fs.mqueue.*`,
    /// `kernel.domainname`. Any other, and one whose namespace is not asked for here, is refused.
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
    /// User.
    #[serde(default)]
    pub user: Option<PathBuf>,
}

impl Namespaces {
    /// Where the pins of `request` will be: recorded before [`create`] so that a crash loses none.
    pub fn planned(request: &Request) -> Self {
        let pin = |wanted: bool, directory: &str| wanted.then(|| Path::new(directory).join(&request.name));
        Self {
            net: pin(request.net, NET_DIRECTORY),
            ipc: pin(request.ipc, IPC_DIRECTORY),
            uts: pin(request.uts.is_some(), UTS_DIRECTORY),
            user: pin(request.user.is_some(), USER_DIRECTORY),
        }
    }

    /// Each pin with the name of its file in `/proc/thread-self/ns`.
    fn pins(&self) -> impl Iterator<Item = (&'static str, &Path)> {
        [("net", &self.net), ("ipc", &self.ipc), ("uts", &self.uts), ("user", &self.user)]
            .into_iter()
            .filter_map(|(kind, pin)| Some((kind, pin.as_deref()?)))
    }
}

/// Why a namespace was not made, entered or released.
#[derive(Debug, thiserror::Error)]
#[allow(missing_docs)] // the messages say it
pub enum NamespaceError {
    #[error("namespace name {name:?} cannot be a file name")]
    Name { name: String },
    #[error("host name has {length} bytes, the kernel takes at most {HOST_NAME_LIMIT}")]
    HostNameTooLong { length: usize },
    #[error("setting host name {name:?}")]
    HostName { name: String, source: io::Error },
    #[error("sysctl {name:?} cannot be set for a pod: {reason}")]
    SysctlRefused { name: String, reason: &'static str },
    #[error("setting sysctl {name} to {value:?}")]
    Sysctl { name: String, value: String, source: io::Error },
    #[error("preparing the directory of pins {}", .path.display())]
    Directory { path: PathBuf, source: io::Error },
    #[error("starting a thread")]
    Thread { source: io::Error },
    #[error("unsharing namespaces")]
    Unshare { source: io::Error },
    #[error("making a user namespace{}", limit_hint(.source))]
    User { source: io::Error },
    #[error("mapping the ids of a user namespace")]
    Map { source: io::Error },
    #[error("{what}")]
    Loopback { what: String, source: io::Error },
    #[error("pinning a namespace at {}", .path.display())]
    Pin { path: PathBuf, source: io::Error },
    #[error("releasing the namespace at {}", .path.display())]
    Release { path: PathBuf, source: io::Error },
    #[error("entering the namespace at {}", .path.display())]
    Enter { path: PathBuf, source: io::Error },
}

/// ENOSPC means one thing here, user_namespaces(7).
fn limit_hint(error: &io::Error) -> &'static str {
    match error.kind() {
        io::ErrorKind::StorageFull => ": the limit in /proc/sys/user/max_user_namespaces is reached",
        _ => "",
    }
}

/// Makes and pins what `request` names; on error nothing is left. Blocking, about 2 ms.
pub fn create(request: &Request) -> Result<Namespaces, NamespaceError> {
    let name = &request.name;
    if name.is_empty() || name.len() > 255 || name == "." || name == ".." || name.contains(['/', '\0']) {
        return Err(NamespaceError::Name { name: name.clone() });
    }
    if let Some(length) = request.uts.as_ref().map(String::len).filter(|length| *length > HOST_NAME_LIMIT) {
        return Err(NamespaceError::HostNameTooLong { length });
    }
    sysctl::check(request)?;
    let namespaces = Namespaces::planned(request);
    for (_, pin) in namespaces.pins() {
        let directory = pin.parent().unwrap_or(Path::new("/"));
        prepare_directory(directory)
            .map_err(|source| NamespaceError::Directory { path: directory.to_owned(), source })?;
    }
    thread::scope(|scope| {
        thread::Builder::new()
            .name("namespaces".into())
            .spawn_scoped(scope, || populate(request, &namespaces))
            .map_err(|source| NamespaceError::Thread { source })?
            .join()
            .unwrap_or_else(|panic| std::panic::resume_unwind(panic))
    })?;
    Ok(namespaces)
}

/// A user namespace that lives as long as the file: for trying out what can be done with one.
pub fn user_namespace(mappings: &UserMappings) -> Result<File, NamespaceError> {
    let holder = Holder::start(false, false, false).map_err(|source| NamespaceError::User { source })?;
    holder.map(mappings).map_err(|source| NamespaceError::Map { source })?;
    File::open(holder.namespace("user")).map_err(|source| NamespaceError::User { source })
}

/// In a thread that ends afterwards.
fn populate(request: &Request, namespaces: &Namespaces) -> Result<(), NamespaceError> {
    let uts = request.uts.is_some();
    let holder = match &request.user {
        None => {
            crate::unshare::unshare(request.net, request.ipc, uts)
                .map_err(|errno| NamespaceError::Unshare { source: errno.into() })?;
            None
        }
        Some(mappings) => {
            let mut holder = Holder::start(request.net, request.ipc, uts)
                .map_err(|source| NamespaceError::User { source })?;
            holder.map(mappings).map_err(|source| NamespaceError::Map { source })?;
            holder.own().map_err(|source| NamespaceError::Unshare { source })?;
            for (kind, _) in namespaces.pins().filter(|(kind, _)| *kind != "user") {
                join(&holder.namespace(kind)).map_err(|source| NamespaceError::Unshare { source })?;
            }
            Some(holder)
        }
    };
    if let Some(name) = request.uts.as_ref().filter(|name| !name.is_empty()) {
        rustix::system::sethostname(name.as_bytes())
            .map_err(|errno| NamespaceError::HostName { name: name.clone(), source: errno.into() })?;
    }
    if request.net {
        loopback_up()
            .map_err(|refusal| NamespaceError::Loopback { what: refusal.what, source: refusal.source })?;
    }
    sysctl::write(&request.sysctls, request.user.as_ref())?;
    let mut made: Vec<&Path> = Vec::new();
    for (kind, path) in namespaces.pins() {
        let namespace = match &holder {
            Some(holder) => holder.namespace(kind),
            None => Path::new("/proc/thread-self/ns").join(kind),
        };
        if let Err(source) = pin(&namespace, path) {
            for path in made {
                let _ = unpin(path);
            }
            return Err(NamespaceError::Pin { path: path.to_owned(), source });
        }
        made.push(path);
    }
    Ok(())
}

fn loopback_up() -> Result<(), Refusal> {
    let mut batch = Batch::default();
    let message = LinkUnspec::new_with_name("lo").up().build();
    batch.route("bringing loopback up", RouteNetlinkMessage::SetLink(message), 0);
    Client::route()?.run(&batch)
}

/// A file that exists already is another's pin: it is left alone, and an error.
fn pin(namespace: &Path, path: &Path) -> io::Result<()> {
    OpenOptions::new().read(true).write(true).create_new(true).mode(0o444).open(path)?;
    rustix::mount::mount_bind(namespace, path).map_err(|errno| {
        let _ = fs::remove_file(path);
        errno.into()
    })
}

/// Makes `directory` and makes it a shared mount point, as `ip netns` does: a pin then appears in, and above all its
/// release reaches, every mount namespace that was copied from this one, instead of being kept alive by it.
fn prepare_directory(directory: &Path) -> io::Result<()> {
    fs::DirBuilder::new().recursive(true).mode(0o755).create(directory)?;
    let share =
        || rustix::mount::mount_change(directory, MountPropagationFlags::SHARED | MountPropagationFlags::REC);
    match share() {
        Ok(()) => return Ok(()),
        Err(Errno::INVAL) => {} // not a mount point yet
        Err(errno) => return Err(errno.into()),
    }
    // Two at once would mount one over the other and hide pins. `ip netns` takes the same lock.
    let lock = File::open(directory)?;
    rustix::fs::flock(lock.as_fd(), FlockOperation::LockExclusive)?;
    if share() == Err(Errno::INVAL) {
        rustix::mount::mount_bind_recursive(directory, directory)?;
        share()?;
    }
    Ok(())
}

/// Unpins. Idempotent; blocking. Every pin is tried; the first failure is reported.
pub fn release(namespaces: &Namespaces) -> Result<(), NamespaceError> {
    let mut outcome = Ok(());
    for (_, path) in namespaces.pins() {
        if let Err(source) = unpin(path) {
            outcome = outcome.and(Err(NamespaceError::Release { path: path.to_owned(), source }));
        }
    }
    outcome
}

fn unpin(path: &Path) -> io::Result<()> {
    match rustix::mount::unmount(path, UnmountFlags::DETACH | UnmountFlags::NOFOLLOW) {
        // A crash between making the file and the mount leaves a file that is no mount point (EINVAL).
        Ok(()) | Err(Errno::INVAL) => {}
        Err(Errno::NOENT) => return Ok(()),
        Err(errno) => return Err(errno.into()),
    }
    match fs::remove_file(path) {
        Err(error) if error.kind() != io::ErrorKind::NotFound => Err(error),
        _ => Ok(()),
    }
}

/// Moves this thread into the namespace at `path`.
fn join(path: &Path) -> io::Result<()> {
    Ok(rustix::thread::move_into_link_name_space(File::open(path)?.as_fd(), None)?)
}

/// Runs `f` in a thread that is in the namespace at `path` (not a user namespace: that takes a process).
pub fn enter<T: Send>(path: &Path, f: impl FnOnce() -> T + Send) -> Result<T, NamespaceError> {
    let failed = |source| NamespaceError::Enter { path: path.to_owned(), source };
    thread::scope(|scope| {
        thread::Builder::new()
            .name("in-namespace".into())
            .spawn_scoped(scope, move || {
                join(path).map_err(failed)?;
                Ok(f())
            })
            .map_err(|source| NamespaceError::Thread { source })?
            .join()
            .unwrap_or_else(|panic| std::panic::resume_unwind(panic))
    })
}
