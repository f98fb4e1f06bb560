//! What processes of this sandbox have used, by /proc (proc(5)).

use std::fs;
use std::time::Duration;

use anyhow::{Context, Result};

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
