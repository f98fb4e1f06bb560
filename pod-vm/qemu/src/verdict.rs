//! Why a machine is gone, from what was seen of it.

use std::process::ExitStatus;

use podvisor_hypervisor::failure::one_line;
use podvisor_hypervisor::verdict::{of_process, panic_in};
use podvisor_proto::hypervisor::EndReason;

/// What QEMU told while it ran.
#[derive(Debug, Default)]
pub(crate) struct Evidence {
    /// The guest's driver for pvpanic has spoken.
    pub(crate) panicked: bool,
    /// The reason of the event SHUTDOWN.
    pub(crate) shutdown: Option<String>,
}

/// The reason and its words, from the end of QEMU's process, its console and what it wrote to stderr.
pub(crate) fn verdict(
    evidence: &Evidence,
    status: ExitStatus,
    console: &str,
    words: &str,
) -> (EndReason, String) {
    let panic = panic_in(console);
    let shutdown = evidence.shutdown.as_deref();
    if evidence.panicked || shutdown == Some("guest-panic") {
        return (EndReason::Panic, panic.unwrap_or_else(|| "the guest's kernel panicked".to_owned()));
    }
    match (shutdown, panic) {
        (Some("guest-shutdown"), _) => {
            return (EndReason::PowerOff, "the guest switched itself off".to_owned());
        }
        // A panicking kernel resets the machine (panic=-1).
        (Some("guest-reset"), Some(panic)) => return (EndReason::Panic, panic),
        (Some("guest-reset"), None) => {
            return (EndReason::Reset, "the guest wanted to begin anew".to_owned());
        }
        _ => {}
    }
    if shutdown == Some("host-signal") {
        let words = one_line(words);
        let detail = "QEMU was ended by a signal";
        let detail = if words.is_empty() { detail.to_owned() } else { format!("{detail}: {words}") };
        return (EndReason::Killed, detail);
    }
    of_process("QEMU", status, words)
}

#[cfg(test)]
mod tests {
    use std::os::unix::process::ExitStatusExt;

    use super::*;

    const EXITED: i32 = 0;

    fn judge(shutdown: Option<&str>, raw: i32, console: &str, words: &str) -> (EndReason, String) {
        let evidence = Evidence { panicked: false, shutdown: shutdown.map(str::to_owned) };
        verdict(&evidence, ExitStatus::from_raw(raw), console, words)
    }

    #[test]
    fn every_end_has_its_reason() {
        let panic = "[    1.5] Kernel panic - not syncing: sysrq triggered crash\n[    1.6] CPU: 0\n";
        assert_eq!(judge(Some("guest-shutdown"), EXITED, panic, "").0, EndReason::PowerOff);
        assert_eq!(judge(Some("guest-reset"), EXITED, "fine\n", "").0, EndReason::Reset);
        let (reason, detail) = judge(Some("guest-reset"), EXITED, panic, "");
        assert_eq!(
            (reason, &*detail),
            (EndReason::Panic, "Kernel panic - not syncing: sysrq triggered crash")
        );
        assert_eq!(judge(Some("guest-panic"), EXITED, "", "").0, EndReason::Panic);
        assert_eq!(judge(Some("host-signal"), EXITED, "", "").0, EndReason::Killed);
        assert_eq!(judge(None, libc::SIGKILL, panic, "").0, EndReason::Killed);
        assert_eq!(judge(None, libc::SIGSEGV, "", "").0, EndReason::Failure);
        assert_eq!(judge(None, libc::SIGSYS, "", "").0, EndReason::Failure);
        let (reason, detail) = judge(None, 1 << 8, "", "qemu: no\nmemory\n");
        assert_eq!((reason, &*detail), (EndReason::Failure, "QEMU ended with exit code 1: qemu: no; memory"));
        let evidence = Evidence { panicked: true, shutdown: None };
        assert_eq!(verdict(&evidence, ExitStatus::from_raw(libc::SIGKILL), "", "").0, EndReason::Panic);
    }
}
