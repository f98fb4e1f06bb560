//! A change of ids, of a thread or of a process that shares this one's memory, marks the memory as not to be dumped or traced
//! (`PR_SET_DUMPABLE`, prctl(2)): for the whole daemon, and for good.

use std::io;
use std::sync::{Mutex, PoisonError};

/// Does `work`, after which the daemon can be dumped if it could before.
pub(super) fn kept<T>(work: impl FnOnce() -> io::Result<T>) -> io::Result<T> {
    /// Held while it cannot, which nobody else may take for what it was before.
    static ALONE: Mutex<()> = Mutex::new(());
    let _alone = ALONE.lock().unwrap_or_else(PoisonError::into_inner);
    let dumpable = rustix::process::dumpable_behavior()?;
    let outcome = work();
    rustix::process::set_dumpable_behavior(dumpable)?;
    outcome
}
