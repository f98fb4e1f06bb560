//! Why a machine is gone, from what was seen of it.

use std::os::unix::process::ExitStatusExt;
use std::process::ExitStatus;

use podvisor_hypervisor::failure::one_line;
use podvisor_proto::hypervisor::EndReason;

/// What Linux writes on the console when it gives up.
const PANIC: &str = "Kernel panic - not syncing";

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
    let panic = console.lines().rev().find_map(|line| line.find(PANIC).map(|at| line[at..].to_owned()));
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
    let with_words = |text: String| match one_line(words) {
        words if words.is_empty() => text,
        words => format!("{text}: {words}"),
    };
    match (shutdown, status.signal(), status.code()) {
        (Some("host-signal"), _, _) => {
            (EndReason::Killed, with_words("QEMU was ended by a signal".to_owned()))
        }
        (_, Some(libc::SIGKILL), _) => (
            EndReason::Killed,
            "QEMU was killed by SIGKILL, by the kernel for want of memory perhaps".to_owned(),
        ),
        (_, Some(libc::SIGTERM | libc::SIGINT | libc::SIGHUP), _) => {
            (EndReason::Killed, with_words("QEMU was ended by a signal".to_owned()))
        }
        (_, Some(libc::SIGSYS), _) => (
            EndReason::Failure,
            with_words("QEMU was killed for a system call that its sandbox forbids".to_owned()),
        ),
        (_, Some(signal), _) => {
            (EndReason::Failure, with_words(format!("QEMU was killed by signal {signal}")))
        }
        (_, None, code) => {
            let code = code.unwrap_or_default();
            (EndReason::Failure, with_words(format!("QEMU ended with exit code {code}")))
        }
    }
}

#[cfg(test)]
mod tests {
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
