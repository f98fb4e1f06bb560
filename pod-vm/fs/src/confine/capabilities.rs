//! Which capabilities remain, and why. They are those of the process's own user namespace: they count for files, because every id is
//! mapped there, and for nothing of the host's.

use rustix::io::Errno;
use rustix::thread::{
    CapabilitySet, CapabilitySets, clear_ambient_capability_set, remove_capability_from_bounding_set,
    set_capabilities, set_no_new_privs, set_thread_groups,
};

/// What remains. The guest's kernel has decided what its programs may do before it asks; the server does it for any of their ids.
pub(crate) const KEPT: &[CapabilitySet] = &[
    CapabilitySet::CHOWN,        // chown, to any id
    CapabilitySet::DAC_OVERRIDE, // open what another id may read or write only
    CapabilitySet::FOWNER,       // chmod, utimes, ACLs, xattrs, sticky directories of any owner
    CapabilitySet::FSETID,       // chmod g+s, and files with it, for a group that the server is not in
    CapabilitySet::SETUID, // create files as the one who asked (per thread, back to root after each request)
    CapabilitySet::SETGID, // and as their groups
    CapabilitySet::SETFCAP, // security.capability of programs: a package manager in a container sets it
];

/// Why capabilities could not be dropped.
#[derive(Debug, thiserror::Error)]
pub(crate) enum CapabilityError {
    #[error("leave supplementary groups")]
    Groups(#[source] Errno),
    #[error("drop capability {0} for good")]
    Bounding(u32, #[source] Errno),
    #[error("drop ambient capabilities")]
    Ambient(#[source] Errno),
    #[error("set capabilities")]
    Set(#[source] Errno),
    #[error("give up new privileges")]
    NoNewPrivileges(#[source] Errno),
}

pub(crate) fn reduce() -> Result<(), CapabilityError> {
    set_thread_groups(&[]).map_err(CapabilityError::Groups)?;
    let kept = KEPT.iter().copied().fold(CapabilitySet::empty(), CapabilitySet::union);
    for number in 0..u64::BITS {
        let capability = CapabilitySet::from_bits_retain(1 << number);
        if kept.contains(capability) {
            continue;
        }
        match remove_capability_from_bounding_set(capability) {
            Ok(()) => {}
            // The kernel's last one was before it.
            Err(Errno::INVAL) => break,
            Err(error) => return Err(CapabilityError::Bounding(number, error)),
        }
    }
    clear_ambient_capability_set().map_err(CapabilityError::Ambient)?;
    let sets = CapabilitySets { effective: kept, permitted: kept, inheritable: CapabilitySet::empty() };
    set_capabilities(None, sets).map_err(CapabilityError::Set)?;
    set_no_new_privs(true).map_err(CapabilityError::NoNewPrivileges)
}
