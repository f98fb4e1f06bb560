//! What a cgroup uses, from either version's files.
//!
//! A controller that is not there gives `None`, not zeros: kubelet treats "unknown" and "nothing" differently (a working set of 0 would
//! make a pod look free to keep under memory pressure).

mod memory;

use std::path::Path;
use std::time::SystemTime;

use crate::cgroup::Hierarchy;
use crate::files::{keyed, read_number, read_optional};
use crate::{Cgroup, CgroupError, Result};
use memory::{memory_v1, memory_v2, swap_v1, swap_v2};

/// Use of one cgroup and everything below it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Stats {
    /// When it was read.
    pub timestamp: SystemTime,
    /// CPU time.
    pub cpu: Option<CpuStats>,
    /// Memory without swap.
    pub memory: Option<MemoryStats>,
    /// Swap; `None` also where the kernel does not count it.
    pub swap: Option<SwapStats>,
    /// Tasks (processes and threads) that count against `pids.max`.
    pub pids: Option<u64>,
    /// Block devices.
    pub io: Option<IoStats>,
}

/// CPU use.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct CpuStats {
    /// CPU time used since the cgroup was made, nanoseconds over all CPUs.
    pub usage_ns: u64,
    /// Part of it in user mode, nanoseconds.
    pub user_ns: Option<u64>,
    /// Part of it in the kernel, nanoseconds.
    pub system_ns: Option<u64>,
    /// Enforcement periods that had something to run.
    pub periods: Option<u64>,
    /// Of these, how many used up the quota.
    pub throttled_periods: Option<u64>,
    /// Time throttled, nanoseconds.
    pub throttled_ns: Option<u64>,
    /// Enforcement periods that used time saved from earlier ones.
    pub burst_periods: Option<u64>,
    /// That time, nanoseconds.
    pub burst_ns: Option<u64>,
    /// Time spent waiting for a CPU (version 2 and hybrid).
    pub pressure: Option<Pressure>,
}

/// Memory use, bytes where nothing else is said.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct MemoryStats {
    /// All that is charged, page cache included.
    pub usage: u64,
    /// Usage without inactive file pages: what reclaim cannot easily take. kubelet evicts by this.
    pub working_set: u64,
    /// Limit minus working set; `None`: no limit.
    pub available: Option<u64>,
    /// The limit; `None`: none.
    pub limit: Option<u64>,
    /// Anonymous memory.
    pub rss: u64,
    /// Number of page faults.
    pub page_faults: u64,
    /// Number of those that had to read from a device.
    pub major_page_faults: u64,
    /// Highest usage so far; version 2 knows it from Linux 5.19 on.
    pub peak: Option<u64>,
    /// Page cache.
    pub cache: u64,
    /// Of the page cache, what is mapped into a process.
    pub mapped_file: u64,
    /// The kernel's own memory for it (version 2: from Linux 5.18 on).
    pub kernel: Option<u64>,
    /// Page cache that was used lately.
    pub active_file: u64,
    /// Page cache that was not.
    pub inactive_file: u64,
    /// Page cache that is to be written to a device.
    pub dirty: u64,
    /// Page cache that is being written.
    pub writeback: u64,
    /// Number of pages that reclaim looked at (version 2).
    pub scanned: Option<u64>,
    /// Number of pages that reclaim took (version 2).
    pub reclaimed: Option<u64>,
    /// Number of file pages that were needed again soon after they had been taken.
    pub refaults_file: Option<u64>,
    /// The same of anonymous pages.
    pub refaults_anon: Option<u64>,
    /// Time spent waiting for memory (version 2 and hybrid).
    pub pressure: Option<Pressure>,
}

/// Swap use, bytes.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct SwapStats {
    /// Swapped out.
    pub usage: u64,
    /// Swap limit minus usage; `None`: no limit.
    pub available: Option<u64>,
}

/// Block device use.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct IoStats {
    /// By device.
    pub devices: Vec<DeviceIo>,
    /// Time spent waiting for devices (version 2 and hybrid).
    pub pressure: Option<Pressure>,
}

/// One block device. Operations count requests to the device.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
#[allow(missing_docs)]
pub struct DeviceIo {
    pub major: u32,
    pub minor: u32,
    pub read_bytes: u64,
    pub write_bytes: u64,
    pub read_operations: u64,
    pub write_operations: u64,
}

/// Pressure stall information (`Documentation/accounting/psi.rst`).
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Pressure {
    /// At least one task waited.
    pub some: PressureLine,
    /// All tasks waited.
    pub full: PressureLine,
}

/// Share of time, in hundredths of a percent (`avg10=1.05` is 105), and the sum in microseconds.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
#[allow(missing_docs)]
pub struct PressureLine {
    pub avg10: u32,
    pub avg60: u32,
    pub avg300: u32,
    pub total_us: u64,
}

impl Cgroup {
    /// Reads everything. Fails when the cgroup does not exist (see [`CgroupError::is_not_found`]); a controller that is missing only
    /// leaves its part out.
    pub fn stats(&self) -> Result<Stats> {
        let (mut cpu, mut memory, mut io);
        let (swap, pids);
        match &self.hierarchy {
            Hierarchy::V2 { directory, .. } => {
                cpu = cpu_v2(directory)?;
                memory = memory_v2(directory)?;
                swap = swap_v2(directory)?;
                pids = read_number(&directory.join("pids.current"))?;
                io = io_v2(directory)?;
            }
            Hierarchy::V1 { .. } => {
                let at = |name: &str| self.directory(name);
                cpu = at("cpuacct").map(|directory| cpu_v1(directory, at("cpu"))).transpose()?.flatten();
                memory = at("memory").map(memory_v1).transpose()?.flatten();
                swap = at("memory").map(swap_v1).transpose()?.flatten();
                pids = match at("pids") {
                    Some(directory) => read_number(&directory.join("pids.current"))?,
                    None => None,
                };
                io = at("blkio").map(io_v1).transpose()?.flatten();
                // runc puts containers into the hybrid layout's version 2 hierarchy, too, which counts pressure without controllers.
                if let Some(unified) = self.in_unified() {
                    let waited = |name: &str| pressure(&unified.join(name));
                    if let Some(cpu) = &mut cpu {
                        cpu.pressure = waited("cpu.pressure")?;
                    }
                    if let Some(memory) = &mut memory {
                        memory.pressure = waited("memory.pressure")?;
                    }
                    if let Some(io) = &mut io {
                        io.pressure = waited("io.pressure")?;
                    }
                }
            }
        }
        if cpu.is_none() && memory.is_none() && !self.exists() {
            let path =
                self.directories().first().map(|directory| directory.to_path_buf()).unwrap_or_default();
            return Err(CgroupError::Read { path, source: std::io::ErrorKind::NotFound.into() });
        }
        Ok(Stats { timestamp: SystemTime::now(), cpu, memory, swap, pids, io })
    }

    /// How many of its processes the kernel killed for lack of memory (version 2: also those below it). 0 where no memory controller
    /// counts. Fails when the cgroup does not exist.
    pub fn oom_kills(&self) -> Result<u64> {
        let file = match &self.hierarchy {
            Hierarchy::V2 { directory, .. } => directory.join("memory.events"),
            Hierarchy::V1 { .. } => match self.directory("memory") {
                Some(directory) => directory.join("memory.oom_control"),
                None => return Ok(0),
            },
        };
        match read_optional(&file)? {
            // Both files use the same word. Linux before 4.13 does not count them in version 1.
            Some(text) => Ok(keyed(&text, "oom_kill").unwrap_or(0)),
            None if self.exists() => Ok(0),
            None => Err(CgroupError::Read { path: file, source: std::io::ErrorKind::NotFound.into() }),
        }
    }
}

fn cpu_v2(directory: &Path) -> Result<Option<CpuStats>> {
    let Some(text) = read_optional(&directory.join("cpu.stat"))? else { return Ok(None) };
    let micro = |key| keyed(&text, key).map(|value| value.saturating_mul(1000));
    let Some(usage_ns) = micro("usage_usec") else { return Ok(None) };
    Ok(Some(CpuStats {
        usage_ns,
        user_ns: micro("user_usec"),
        system_ns: micro("system_usec"),
        periods: keyed(&text, "nr_periods"),
        throttled_periods: keyed(&text, "nr_throttled"),
        throttled_ns: micro("throttled_usec"),
        burst_periods: keyed(&text, "nr_bursts"),
        burst_ns: micro("burst_usec"),
        pressure: pressure(&directory.join("cpu.pressure"))?,
    }))
}

fn cpu_v1(cpuacct: &Path, cpu: Option<&Path>) -> Result<Option<CpuStats>> {
    let Some(usage_ns) = read_number(&cpuacct.join("cpuacct.usage"))? else { return Ok(None) };
    let throttling = match cpu {
        Some(directory) => read_optional(&directory.join("cpu.stat"))?.unwrap_or_default(),
        None => String::new(),
    };
    Ok(Some(CpuStats {
        usage_ns,
        user_ns: read_number(&cpuacct.join("cpuacct.usage_user"))?,
        system_ns: read_number(&cpuacct.join("cpuacct.usage_sys"))?,
        periods: keyed(&throttling, "nr_periods"),
        throttled_periods: keyed(&throttling, "nr_throttled"),
        throttled_ns: keyed(&throttling, "throttled_time"),
        burst_periods: keyed(&throttling, "nr_bursts"),
        burst_ns: keyed(&throttling, "burst_time"),
        pressure: None,
    }))
}

fn io_v2(directory: &Path) -> Result<Option<IoStats>> {
    let Some(text) = read_optional(&directory.join("io.stat"))? else { return Ok(None) };
    Ok(Some(IoStats {
        devices: text.lines().filter_map(device_v2).collect(),
        pressure: pressure(&directory.join("io.pressure"))?,
    }))
}

/// `8:16 rbytes=1459200 wbytes=314773504 rios=192 wios=353 dbytes=0 dios=0`
fn device_v2(line: &str) -> Option<DeviceIo> {
    let mut fields = line.split_whitespace();
    let (major, minor) = device_number(fields.next()?)?;
    let mut device = DeviceIo { major, minor, ..DeviceIo::default() };
    for field in fields {
        let Some((key, value)) = field.split_once('=') else { continue };
        let Ok(value) = value.parse() else { continue };
        match key {
            "rbytes" => device.read_bytes = value,
            "wbytes" => device.write_bytes = value,
            "rios" => device.read_operations = value,
            "wios" => device.write_operations = value,
            _ => {}
        }
    }
    Some(device)
}

fn io_v1(directory: &Path) -> Result<Option<IoStats>> {
    let Some(bytes) = read_optional(&directory.join("blkio.throttle.io_service_bytes_recursive"))? else {
        return Ok(None);
    };
    let operations =
        read_optional(&directory.join("blkio.throttle.io_serviced_recursive"))?.unwrap_or_default();
    let mut devices: Vec<DeviceIo> = Vec::new();
    for (text, is_bytes) in [(bytes, true), (operations, false)] {
        for (major, minor, operation, value) in text.lines().filter_map(service_line) {
            let known = devices.iter().position(|device| (device.major, device.minor) == (major, minor));
            let at = known.unwrap_or_else(|| {
                devices.push(DeviceIo { major, minor, ..DeviceIo::default() });
                devices.len() - 1
            });
            let device = &mut devices[at];
            match (operation, is_bytes) {
                ("Read", true) => device.read_bytes = value,
                ("Write", true) => device.write_bytes = value,
                ("Read", false) => device.read_operations = value,
                ("Write", false) => device.write_operations = value,
                _ => {}
            }
        }
    }
    Ok(Some(IoStats { devices, pressure: None }))
}

/// `254:0 Read 602112`
fn service_line(line: &str) -> Option<(u32, u32, &str, u64)> {
    let mut fields = line.split_whitespace();
    let (major, minor) = device_number(fields.next()?)?;
    let operation = fields.next()?;
    Some((major, minor, operation, fields.next()?.parse().ok()?))
}

fn device_number(text: &str) -> Option<(u32, u32)> {
    let (major, minor) = text.split_once(':')?;
    Some((major.parse().ok()?, minor.parse().ok()?))
}

fn pressure(file: &Path) -> Result<Option<Pressure>> {
    Ok(read_optional(file)?.as_deref().and_then(parse_pressure))
}

/// `some avg10=0.00 avg60=0.10 avg300=0.22 total=7593573`, then the same with `full` (absent for CPU before Linux 5.13).
fn parse_pressure(text: &str) -> Option<Pressure> {
    let line = |kind: &str| -> Option<PressureLine> {
        let fields = text.lines().find_map(|line| line.strip_prefix(kind)?.strip_prefix(' '))?;
        let mut parsed = PressureLine::default();
        for (key, value) in fields.split_whitespace().filter_map(|field| field.split_once('=')) {
            match key {
                "avg10" => parsed.avg10 = hundredths(value)?,
                "avg60" => parsed.avg60 = hundredths(value)?,
                "avg300" => parsed.avg300 = hundredths(value)?,
                "total" => parsed.total_us = value.parse().ok()?,
                _ => {}
            }
        }
        Some(parsed)
    };
    Some(Pressure { some: line("some")?, full: line("full").unwrap_or_default() })
}

/// The kernel prints exactly two decimals.
fn hundredths(value: &str) -> Option<u32> {
    let (whole, part) = value.split_once('.')?;
    if part.len() != 2 {
        return None;
    }
    whole.parse::<u32>().ok()?.checked_mul(100)?.checked_add(part.parse().ok()?)
}

#[cfg(test)]
mod tests;
