//! What a process holds of the machine's memory.

use std::fs;

use anyhow::{Context, Result};

/// A process's memory at one moment, in KiB, by /proc/PID/smaps_rollup: it walks the pages, where the counters of /proc/PID/status are
/// kept per CPU and lag behind by some.
#[derive(Debug, Clone, Copy)]
pub struct Memory {
    /// All that is resident (`VmRSS` in /proc/PID/status).
    pub resident: u32,
    /// Of that, what no file stands behind: heap, stacks, data that the loader has relocated (`RssAnon`).
    pub anonymous: u32,
    /// Of that, pages of its program and libraries (`RssFile`): they are in the page cache, which drops them when memory is short.
    pub file: u32,
    /// What is resident, each page divided by the number of processes that have it mapped (PSS).
    pub proportional: u32,
    /// What no other process has mapped.
    pub private: u32,
}

impl Memory {
    /// Of a process, now.
    pub fn of(pid: i32) -> Result<Self> {
        let path = format!("/proc/{pid}/smaps_rollup");
        let rollup = fs::read_to_string(&path).with_context(|| format!("reading {path}"))?;
        let field = |name: &str| -> Result<u32> {
            let line = rollup.lines().find_map(|line| line.strip_prefix(name)?.strip_prefix(':'));
            let value = line.and_then(|line| line.split_whitespace().next());
            Ok(value.with_context(|| format!("{path} has no {name}"))?.parse()?)
        };
        let (resident, anonymous) = (field("Rss")?, field("Anonymous")?);
        Ok(Self {
            resident,
            anonymous,
            file: resident.saturating_sub(anonymous),
            proportional: field("Pss")?,
            private: field("Private_Clean")? + field("Private_Dirty")?,
        })
    }
}
