//! What processes of this sandbox have used, by /proc (proc(5)).

use std::fs;
use std::time::Duration;

use anyhow::{Context, Result};
use podvisor_tests::memory::Memory;

/// Processes of these names. The kernel keeps 15 bytes of a name (`TASK_COMM_LEN`).
pub(crate) fn named(names: &[&str]) -> Result<Vec<i32>> {
    let mut found = Vec::new();
    for entry in fs::read_dir("/proc").context("listing the processes")? {
        let Some(pid) = entry?.file_name().to_str().and_then(|name| name.parse().ok()) else { continue };
        let Ok(name) = fs::read_to_string(format!("/proc/{pid}/comm")) else { continue };
        if names.iter().any(|wanted| name.starts_with(wanted)) {
            found.push(pid);
        }
    }
    Ok(found)
}

/// Processor time of processes and of their children that have ended and were waited for: `utime`, `stime`, `cutime`, `cstime`.
pub(crate) fn processor_time(pids: &[i32]) -> Result<Duration> {
    let mut ticks = 0;
    for pid in pids {
        let path = format!("/proc/{pid}/stat");
        let stat = fs::read_to_string(&path).with_context(|| format!("reading {path}"))?;
        // The name may hold spaces; behind it is field 3.
        let fields = stat.rsplit_once(") ").context("no name in it")?.1;
        for field in fields.split(' ').skip(11).take(4) {
            ticks += field.parse::<u64>().with_context(|| format!("{path}: {field:?}"))?;
        }
    }
    Ok(Duration::from_millis(ticks * 1000 / rustix::param::clock_ticks_per_second()))
}

/// What threads have done so far.
#[derive(Debug, Clone, Copy, Default)]
pub(crate) struct Activity {
    /// How often they have gone to sleep, and been woken up since.
    pub(crate) slept: u64,
    /// What they have run, to the nanosecond (`schedstat`).
    pub(crate) ran: Duration,
}

/// Of all threads of these processes.
pub(crate) fn activity(pids: &[i32]) -> Result<Activity> {
    let mut sum = Activity::default();
    for pid in pids {
        for thread in fs::read_dir(format!("/proc/{pid}/task"))?.flatten() {
            let read = |name: &str| fs::read_to_string(thread.path().join(name));
            // One that has ended meanwhile does nothing any more.
            let (Ok(status), Ok(schedule)) = (read("status"), read("schedstat")) else { continue };
            let slept = status.lines().find_map(|line| line.strip_prefix("voluntary_ctxt_switches:"));
            sum.slept += slept.context("no switches")?.trim().parse::<u64>()?;
            let ran = schedule.split(' ').next().unwrap_or_default();
            sum.ran += Duration::from_nanos(ran.parse().context("no time in schedstat")?);
        }
    }
    Ok(sum)
}

/// Memory of processes together, in KiB: what no other process has mapped, and each page divided by those who have it mapped.
pub(crate) fn memory(pids: &[i32]) -> Result<(f64, f64)> {
    let (mut private, mut proportional) = (0.0, 0.0);
    for pid in pids {
        let memory = Memory::of(*pid)?;
        private += f64::from(memory.private);
        proportional += f64::from(memory.proportional);
    }
    Ok((private, proportional))
}

/// Forgets the most that a process had resident (`VmHWM`), and says what it has now, in KiB.
pub(crate) fn forget_peak(pid: i32) -> Result<f64> {
    fs::write(format!("/proc/{pid}/clear_refs"), "5").context("forgetting the peak of memory")?;
    peak(pid)
}

/// The most that a process has had resident, in KiB.
pub(crate) fn peak(pid: i32) -> Result<f64> {
    let status = fs::read_to_string(format!("/proc/{pid}/status"))?;
    let line = status.lines().find_map(|line| line.strip_prefix("VmHWM:")).context("no VmHWM")?;
    Ok(line.trim().trim_end_matches(" kB").parse()?)
}
