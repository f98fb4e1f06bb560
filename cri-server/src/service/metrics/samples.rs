//! What was measured, as samples of the families. Pure.
//!
//! A value is a whole number in the CRI, so seconds are cut down to whole ones, as containerd and CRI-O do. What is not known has no sample:
//! a zero would be graphed.

use podvisor_cgroup::{Details, Pressure, Stats};
use podvisor_proto::cri::{LinuxContainerResources, Metric, UInt64Value};

use super::super::interfaces::Interface;
use super::families::{self as f, BASE_LABELS, Family};
use super::processes::Processes;

/// Samples of one pod or container as they are collected.
pub(super) struct Samples {
    base: [String; BASE_LABELS.len()],
    metrics: Vec<Metric>,
}

/// The file system of a container's writable layer.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub(super) struct Filesystem {
    pub(super) device: String,
    /// Bytes in the layer; `None`: not measured yet.
    pub(super) usage: Option<u64>,
    pub(super) limit: u64,
    pub(super) inodes: u64,
    pub(super) inodes_free: u64,
}

/// cAdvisor takes more for "no limit" (`specMemoryValue`), and shows 0.
const MOST_MEMORY: i64 = 1 << 62;

/// What the kernel has where nothing is set (`kernel/sched`: `default_bw_period`, `NICE_0` in `cpu.shares`).
const DEFAULT_CPU_PERIOD: u64 = 100_000;
const DEFAULT_CPU_SHARES: u64 = 1024;

fn seconds(nanoseconds: u64) -> u64 {
    nanoseconds / 1_000_000_000
}

impl Samples {
    pub(super) fn new(base: [String; BASE_LABELS.len()]) -> Self {
        Self { base, metrics: Vec::with_capacity(80) }
    }

    pub(super) fn done(self) -> Vec<Metric> {
        self.metrics
    }

    fn add(&mut self, family: &Family, labels: &[&str], value: u64) {
        debug_assert_eq!(labels.len(), family.labels.len(), "{}", family.name);
        self.metrics.push(Metric {
            name: family.name.to_owned(),
            // Measured for this request.
            timestamp: 0,
            metric_type: family.kind.into(),
            label_values: self
                .base
                .iter()
                .cloned()
                .chain(labels.iter().map(|&label| label.to_owned()))
                .collect(),
            value: Some(UInt64Value { value }),
        });
    }

    fn one(&mut self, family: &Family, value: impl Into<Option<u64>>) {
        if let Some(value) = value.into() {
            self.add(family, &[], value);
        }
    }

    /// Times in ns since the epoch; a start of 0 is none.
    pub(super) fn times(&mut self, now: i64, created: i64, started: i64) {
        let unix = |time: i64| u64::try_from(time).ok().filter(|time| *time > 0).map(seconds);
        self.one(&f::LAST_SEEN, unix(now));
        self.one(&f::CREATION_TIME, unix(created));
        self.one(&f::START_TIME, unix(started));
    }

    pub(super) fn usage(&mut self, stats: &Stats, device_name: impl Fn(u32, u32) -> String) {
        if let Some(cpu) = &stats.cpu {
            self.add(&f::CPU_USAGE, &["total"], seconds(cpu.usage_ns));
            self.one(&f::CPU_USER, cpu.user_ns.map(seconds));
            self.one(&f::CPU_SYSTEM, cpu.system_ns.map(seconds));
            self.one(&f::CFS_PERIODS, cpu.periods);
            self.one(&f::CFS_THROTTLED_PERIODS, cpu.throttled_periods);
            self.one(&f::CFS_THROTTLED, cpu.throttled_ns.map(seconds));
            self.one(&f::CFS_BURST_PERIODS, cpu.burst_periods);
            self.one(&f::CFS_BURST, cpu.burst_ns.map(seconds));
            self.pressure(cpu.pressure, &f::PRESSURE_CPU_STALLED, &f::PRESSURE_CPU_WAITING);
        }
        if let Some(memory) = &stats.memory {
            self.one(&f::MEMORY_USAGE, memory.usage);
            self.one(&f::MEMORY_WORKING_SET, memory.working_set);
            self.one(&f::MEMORY_RSS, memory.rss);
            self.one(&f::MEMORY_CACHE, memory.cache);
            self.one(&f::MEMORY_MAPPED_FILE, memory.mapped_file);
            self.one(&f::MEMORY_KERNEL, memory.kernel);
            self.one(&f::MEMORY_MAX_USAGE, memory.peak);
            self.one(&f::MEMORY_ACTIVE_FILE, memory.active_file);
            self.one(&f::MEMORY_INACTIVE_FILE, memory.inactive_file);
            self.one(&f::MEMORY_DIRTY, memory.dirty);
            self.one(&f::MEMORY_WRITEBACK, memory.writeback);
            self.one(&f::MEMORY_SCANNED, memory.scanned);
            self.one(&f::MEMORY_RECLAIMED, memory.reclaimed);
            self.one(&f::MEMORY_REFAULT_FILE, memory.refaults_file);
            self.one(&f::MEMORY_REFAULT_ANON, memory.refaults_anon);
            // Both scopes, as cAdvisor has it: the kernel counts below it, too.
            for scope in ["container", "hierarchy"] {
                self.add(&f::MEMORY_FAILURES, &["pgfault", scope], memory.page_faults);
                self.add(&f::MEMORY_FAILURES, &["pgmajfault", scope], memory.major_page_faults);
            }
            self.pressure(memory.pressure, &f::PRESSURE_MEMORY_STALLED, &f::PRESSURE_MEMORY_WAITING);
        }
        self.one(&f::MEMORY_SWAP, stats.swap.map(|swap| swap.usage));
        self.one(&f::THREADS, stats.pids);
        if let Some(io) = &stats.io {
            for device in &io.devices {
                let name = device_name(device.major, device.minor);
                self.add(&f::FS_READS_BYTES, &[&name], device.read_bytes);
                self.add(&f::FS_WRITES_BYTES, &[&name], device.write_bytes);
                self.add(&f::FS_READS, &[&name], device.read_operations);
                self.add(&f::FS_WRITES, &[&name], device.write_operations);
                let (major, minor) = (device.major.to_string(), device.minor.to_string());
                self.add(&f::BLKIO_USAGE, &[&name, &major, &minor, "Read"], device.read_bytes);
                self.add(&f::BLKIO_USAGE, &[&name, &major, &minor, "Write"], device.write_bytes);
            }
            self.pressure(io.pressure, &f::PRESSURE_IO_STALLED, &f::PRESSURE_IO_WAITING);
        }
    }

    fn pressure(&mut self, pressure: Option<Pressure>, stalled: &Family, waiting: &Family) {
        let Some(pressure) = pressure else { return };
        self.one(stalled, pressure.full.total_us / 1_000_000);
        self.one(waiting, pressure.some.total_us / 1_000_000);
    }

    pub(super) fn details(&mut self, details: &Details) {
        self.one(&f::MEMORY_FAILCNT, details.memory_limit_hits);
        // Version 2's event; version 1 has only the count above.
        if let Some(high) = details.memory_high_hits {
            self.one(&f::MEMORY_EVENTS_HIGH, high);
            self.one(&f::MEMORY_EVENTS_MAX, details.memory_limit_hits);
        }
        self.one(&f::OOM_EVENTS, details.oom_kills);
        self.one(&f::THREADS_MAX, details.pids_limit.map(|limit| if limit == u64::MAX { 0 } else { limit }));
        for pages in &details.huge_pages {
            self.add(&f::HUGETLB_USAGE, &[&pages.page_size], pages.usage);
            if let Some(peak) = pages.peak {
                self.add(&f::HUGETLB_MAX_USAGE, &[&pages.page_size], peak);
            }
            self.add(&f::HUGETLB_FAILCNT, &[&pages.page_size], pages.limit_hits);
        }
    }

    pub(super) fn processes(&mut self, processes: &Processes) {
        self.one(&f::PROCESSES, processes.count);
        self.one(&f::FILE_DESCRIPTORS, processes.descriptors);
        self.one(&f::SOCKETS, processes.sockets);
        if let Some(limit) = processes.open_files {
            self.add(&f::ULIMITS_SOFT, &["max_open_files"], limit);
        }
    }

    pub(super) fn filesystem(&mut self, filesystem: &Filesystem) {
        let device = [filesystem.device.as_str()];
        if let Some(usage) = filesystem.usage {
            self.add(&f::FS_USAGE, &device, usage);
        }
        self.add(&f::FS_LIMIT, &device, filesystem.limit);
        self.add(&f::FS_INODES, &device, filesystem.inodes);
        self.add(&f::FS_INODES_FREE, &device, filesystem.inodes_free);
    }

    pub(super) fn network(&mut self, interfaces: &[Interface]) {
        for interface in interfaces {
            let name = [interface.name.as_str()];
            let (received, sent) = (interface.received, interface.sent);
            self.add(&f::NETWORK_RECEIVED_BYTES, &name, received.bytes);
            self.add(&f::NETWORK_RECEIVED_PACKETS, &name, received.packets);
            self.add(&f::NETWORK_RECEIVED_DROPPED, &name, received.dropped);
            self.add(&f::NETWORK_RECEIVED_ERRORS, &name, received.errors);
            self.add(&f::NETWORK_SENT_BYTES, &name, sent.bytes);
            self.add(&f::NETWORK_SENT_PACKETS, &name, sent.packets);
            self.add(&f::NETWORK_SENT_DROPPED, &name, sent.dropped);
            self.add(&f::NETWORK_SENT_ERRORS, &name, sent.errors);
        }
    }

    /// Limits that were asked for.
    pub(super) fn spec(&mut self, limits: &LinuxContainerResources) {
        let given = |value: i64| u64::try_from(value).ok().filter(|value| *value > 0);
        let unified = |name: &str| limits.unified.get(name).and_then(|value| value.trim().parse().ok());
        let memory = |value: i64| if (0..=MOST_MEMORY).contains(&value) { value.unsigned_abs() } else { 0 };
        self.one(&f::SPEC_CPU_PERIOD, given(limits.cpu_period).unwrap_or(DEFAULT_CPU_PERIOD));
        self.one(&f::SPEC_CPU_QUOTA, given(limits.cpu_quota));
        self.one(&f::SPEC_CPU_SHARES, given(limits.cpu_shares).unwrap_or(DEFAULT_CPU_SHARES));
        self.one(&f::SPEC_MEMORY_LIMIT, memory(limits.memory_limit_in_bytes));
        // "max" and what is not there are both no limit.
        let swap = unified("memory.swap.max").unwrap_or(limits.memory_swap_limit_in_bytes);
        self.one(&f::SPEC_MEMORY_SWAP, memory(swap));
        self.one(&f::SPEC_MEMORY_RESERVATION, memory(unified("memory.high").unwrap_or(0)));
    }
}

#[cfg(test)]
mod tests;
