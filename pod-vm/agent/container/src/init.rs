//! The pod's init: the first process of a pid namespace that containers share. It reaps and waits.
//!
//! Containers can see it, so it holds nothing worth having: no capabilities, no descriptors, an empty root directory of its own (/proc/1/root
//! would otherwise be the caller's), and it cannot be traced. It is the caller's own program, not executed again: its memory is the caller's
//! until one of them writes.

use std::os::fd::BorrowedFd;
use std::path::Path;

use rustix::fs::{Mode, OFlags};
use rustix::process::{DumpableBehavior, set_dumpable_behavior};
use rustix::thread::{self, CapabilitySet, CapabilitySets};

use crate::cgroup::Cgroup;
use crate::credentials::drop_bounding;
use crate::error::{ContainerError, During, Step};
use crate::filesystem::{attach, new_filesystem, pivot, set_propagation};
use crate::launch::{self, Running};
use crate::namespaces;
use crate::options::{Propagation, attribute};
use crate::plan::Namespaces;
use crate::report::{self, Report};
use crate::sys;

/// Starts the init in `cgroup`, in the user namespace at `user` if there is one, and waits until it is ready: a few system calls. The caller
/// reaps it.
pub fn start_init(cgroup: &Cgroup, user: Option<&Path>) -> Result<Running, ContainerError> {
    let new = libc::CLONE_NEWPID | libc::CLONE_NEWNS;
    let joined = user.map(|path| (libc::CLONE_NEWUSER, path.to_owned())).into_iter().collect();
    let opened = namespaces::open(&Namespaces { new, joined })?;
    let mut pending = launch::start(cgroup, &opened, first)?;
    pending.wait_until_ready()?;
    Ok(pending.into_running())
}

/// The child; never returns.
fn first(report: BorrowedFd<'_>) {
    let prepared = prepare();
    let said = match prepared {
        Ok(()) => report::send(report, &Report::Ready),
        Err(failed) => {
            report::send(report, &Report::Failed(failed.0)).and(Err(std::io::ErrorKind::Other.into()))
        }
    };
    if said.is_err() {
        sys::exit_now(125);
    }
    sys::close_all();
    loop {
        rustix::event::pause();
    }
}

fn prepare() -> Step {
    sys::default_signals();
    // What nobody waits for leaves no zombie (wait(2), NOTES).
    sys::ignore_ends_of_children();
    thread::set_name(c"podvisor-init").during(|| "name the pod's init".into())?;
    rustix::process::setsid().during(|| "make a session".into())?;
    empty_root()?;
    drop_bounding(CapabilitySet::empty())?;
    thread::clear_ambient_capability_set().during(|| "clear ambient capabilities".into())?;
    let none = CapabilitySet::empty();
    let sets = CapabilitySets { effective: none, permitted: none, inheritable: none };
    thread::set_capabilities(None, sets).during(|| "give up capabilities".into())?;
    thread::set_no_new_privs(true).during(|| "set no_new_privs".into())?;
    set_dumpable_behavior(DumpableBehavior::NotDumpable)
        .during(|| "keep the pod's init from being traced".into())
}

/// An empty read-only directory becomes the root of its mount namespace.
fn empty_root() -> Step {
    let failed = || "make an empty root directory".to_owned();
    let open = || rustix::fs::open("/", OFlags::PATH | OFlags::DIRECTORY | OFlags::CLOEXEC, Mode::empty());
    let root = open().during(failed)?;
    set_propagation(&root, Propagation::Private, true).during(failed)?;
    let attributes = attribute::RDONLY | attribute::NOSUID | attribute::NODEV | attribute::NOEXEC;
    let options = ["size=4k", "nr_inodes=2", "mode=0555"].map(str::to_owned);
    let empty = new_filesystem("tmpfs", Path::new("tmpfs"), &options, attributes).during(failed)?;
    attach(&empty, &root).during(failed)?;
    pivot(&empty)
}
