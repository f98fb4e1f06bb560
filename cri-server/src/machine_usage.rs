//! What a pod's virtual machine costs this host, process by process. What containers use in it is the guest's to tell.

use std::fs;
use std::time::Duration;

use crate::monitor::process::lives;
use crate::pod::record::ProcessIdentity;
use crate::pod::view::PodView;

/// A process of a pod's machine.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Process {
    /// `machine` (QEMU or podvisor-vmm), `hypervisor`, `file_server`, `monitor`.
    pub(crate) role: &'static str,
    pub(crate) pid: i32,
    /// In user mode, in the kernel, and in the guest.
    pub(crate) cpu: Duration,
    pub(crate) memory: Memory,
}

/// Resident memory in bytes (proc_pid_status(5)).
#[derive(Debug, Default, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Memory {
    /// Of its own; the guest's with podvisor-vmm.
    pub(crate) anonymous: u64,
    /// Pages of files, its program above all.
    pub(crate) file: u64,
    /// What others can map too; the guest's with QEMU.
    pub(crate) shared: u64,
}

/// The processes of a pod's machine that run; none of a pod without one.
pub(crate) fn of(view: &PodView) -> Vec<Process> {
    let record = &view.record;
    let (Some(machine), Some(init)) = (&record.machine, record.init.filter(|init| lives(*init))) else {
        return Vec::new();
    };
    let known = |process: ProcessIdentity| lives(process).then_some(process.pid);
    [
        ("machine", Some(init.pid)),
        // It is the machine's parent, which does not outlive it: so it is that process still.
        ("hypervisor", Some(machine.hypervisor_pid)),
        ("file_server", known(machine.file_server)),
        ("monitor", record.monitor.and_then(known)),
    ]
    .into_iter()
    .filter_map(|(role, pid)| read(role, pid?))
    .collect()
}

fn read(role: &'static str, pid: i32) -> Option<Process> {
    // Neither takes the lock of the process's address space, so a process that hangs in the kernel holds nobody up.
    let stat = fs::read_to_string(format!("/proc/{pid}/stat")).ok()?;
    let status = fs::read_to_string(format!("/proc/{pid}/status")).ok()?;
    Some(Process { role, pid, cpu: cpu(&stat)?, memory: memory(&status) })
}

/// proc_pid_stat(5). The name in parentheses may contain anything.
fn cpu(stat: &str) -> Option<Duration> {
    // The first here is the third there.
    let mut fields = stat.rsplit_once(')')?.1.split_ascii_whitespace().skip(14 - 3);
    let mut ticks = || fields.next()?.parse::<u64>().ok();
    let ticks = ticks()? + ticks()?;
    Some(Duration::from_millis(ticks * 1000 / rustix::param::clock_ticks_per_second()))
}

fn memory(status: &str) -> Memory {
    let bytes = |name: &str| {
        let line = status.lines().find_map(|line| line.strip_prefix(name)?.strip_prefix(':'));
        line.and_then(|line| line.split_ascii_whitespace().next()?.parse::<u64>().ok()).unwrap_or(0) * 1024
    };
    Memory { anonymous: bytes("RssAnon"), file: bytes("RssFile"), shared: bytes("RssShmem") }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_the_kernel_writes() {
        let stat = "7 (a) b) S 1 7 7 0 -1 4194560 1 2 3 4 150 25 8 9 20 0 12 0 777 4096000 300";
        let ticks = rustix::param::clock_ticks_per_second();
        assert_eq!(cpu(stat), Some(Duration::from_millis(175 * 1000 / ticks)));
        assert_eq!(cpu("garbage"), None);
        let status = "Name:\tx\nVmRSS:\t  60 kB\nRssAnon:\t      10 kB\nRssFile:\t      20 kB\nRssShmem:\t      30 kB\n";
        assert_eq!(memory(status), Memory { anonymous: 10 << 10, file: 20 << 10, shared: 30 << 10 });
    }

    #[test]
    fn of_a_process_that_is_there() {
        let own = read("machine", i32::try_from(std::process::id()).unwrap()).unwrap();
        assert!(own.memory.anonymous > 0 && own.memory.file > 0, "{own:?}");
        assert_eq!(read("machine", i32::MAX), None);
    }
}
