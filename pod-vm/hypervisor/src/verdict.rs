//! Why a machine is gone, from what was seen of it.

use std::os::unix::process::ExitStatusExt;
use std::process::ExitStatus;

use podvisor_proto::hypervisor::EndReason;

use crate::failure::one_line;

/// What Linux writes on the console when it gives up.
const PANIC: &str = "Kernel panic - not syncing";

/// The line in which the guest's kernel says that it gives up, and why.
pub fn panic_in(console: &str) -> Option<String> {
    console.lines().rev().find_map(|line| line.find(PANIC).map(|at| line[at..].to_owned()))
}

/// The reason and its words for a machine that has not said why it ends: from the end of its process, and from what that wrote to stderr.
/// `name`: what the process is.
pub fn of_process(name: &str, status: ExitStatus, words: &str) -> (EndReason, String) {
    let with_words = |text: String| match one_line(words) {
        words if words.is_empty() => text,
        words => format!("{text}: {words}"),
    };
    match (status.signal(), status.code()) {
        (Some(libc::SIGKILL), _) => (
            EndReason::Killed,
            format!("{name} was killed by SIGKILL, by the kernel for want of memory perhaps"),
        ),
        (Some(libc::SIGTERM | libc::SIGINT | libc::SIGHUP), _) => {
            (EndReason::Killed, with_words(format!("{name} was ended by a signal")))
        }
        (Some(libc::SIGSYS), _) => (
            EndReason::Failure,
            with_words(format!("{name} was killed for a system call that its sandbox forbids")),
        ),
        (Some(signal), _) => {
            (EndReason::Failure, with_words(format!("{name} was killed by signal {signal}")))
        }
        (None, code) => {
            let code = code.unwrap_or_default();
            (EndReason::Failure, with_words(format!("{name} ended with exit code {code}")))
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_end_has_its_reason() {
        let judge = |raw: i32| of_process("it", ExitStatus::from_raw(raw), "words\n");
        assert_eq!(judge(libc::SIGKILL).0, EndReason::Killed);
        assert_eq!(judge(libc::SIGTERM), (EndReason::Killed, "it was ended by a signal: words".to_owned()));
        let (reason, detail) = judge(libc::SIGSYS);
        assert!(reason == EndReason::Failure && detail.contains("forbids: words"), "{detail}");
        assert_eq!(judge(libc::SIGSEGV).1, "it was killed by signal 11: words");
        assert_eq!(judge(1 << 8).1, "it ended with exit code 1: words");
        let text = "[    1.5] Kernel panic - not syncing: sysrq triggered crash\n[    1.6] CPU: 0\n";
        assert_eq!(panic_in(text).unwrap(), "Kernel panic - not syncing: sysrq triggered crash");
        assert_eq!(panic_in("fine\n"), None);
    }
}
