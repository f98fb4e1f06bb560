//! The one system call here that has no safe wrapper.
#![allow(unsafe_code)]

use anyhow::{Context, Result};
use rustix::thread::{UnshareFlags, unshare_unsafe};

/// Moves this process into new namespaces of every kind but user and time; its children become the pid namespace's.
pub(super) fn unshare_all() -> Result<()> {
    let flags = UnshareFlags::NEWNS
        | UnshareFlags::NEWNET
        | UnshareFlags::NEWIPC
        | UnshareFlags::NEWUTS
        | UnshareFlags::NEWPID
        | UnshareFlags::NEWCGROUP;
    // SAFETY: without CLONE_FILES the table of descriptors is not unshared, so no descriptor that another thread holds
    // changes its meaning; this program has one thread at this point.
    unsafe { unshare_unsafe(flags) }.context("unsharing the sandbox's namespaces")
}
