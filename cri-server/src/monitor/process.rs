//! Processes by identity: a number alone may have been given to another process meanwhile.

use crate::pod::record::ProcessIdentity;

/// The identity of a living process; `None` when there is none.
pub(crate) fn identify(pid: i32) -> Option<ProcessIdentity> {
    let stat = std::fs::read_to_string(format!("/proc/{pid}/stat")).ok()?;
    // Field 2 is the command in parentheses and may contain anything, proc_pid_stat(5).
    let rest = stat.get(stat.rfind(')')? + 2..)?;
    let mut fields = rest.split(' ');
    if matches!(fields.next()?, "Z" | "X") {
        return None;
    }
    let start_time = fields.nth(18)?.parse().ok()?;
    Some(ProcessIdentity { pid, start_time })
}

/// Whether this very process lives.
pub(crate) fn lives(process: ProcessIdentity) -> bool {
    identify(process.pid) == Some(process)
}

/// SIGKILL for this very process, if it lives.
pub(crate) fn kill(process: ProcessIdentity) {
    use rustix::process::{Pid, PidfdFlags, Signal, pidfd_open, pidfd_send_signal};
    let Some(pid) = Pid::from_raw(process.pid) else { return };
    // The descriptor first, then the comparison: from then on the number cannot change hands.
    let Ok(descriptor) = pidfd_open(pid, PidfdFlags::empty()) else { return };
    if lives(process) {
        let _ = pidfd_send_signal(&descriptor, Signal::KILL);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_process_is_known_by_number_and_start() {
        let own = identify(std::process::id().cast_signed()).unwrap();
        assert!(lives(own));
        assert!(!lives(ProcessIdentity { start_time: own.start_time + 1, ..own }));
        assert!(identify(i32::MAX).is_none());
    }
}
