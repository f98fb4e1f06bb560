//! The metrics there are: cAdvisor's names, labels and types (KEP-2371), as kubelet's `/metrics/cadvisor` has had them.
//!
//! Left out, because a value is a whole number here or nothing measures it: `container_health_state` (-1 for "no check"),
//! `container_tasks_state` and load (a netlink socket of the kernel per cgroup), what cAdvisor took from disk statistics of the whole
//! machine (`container_fs_io_*`, `container_fs_*_merged_total`, …).

use podvisor_proto::cri::{MetricDescriptor, MetricType};

/// What all samples of a name have in common.
#[derive(Debug, PartialEq, Eq)]
pub(super) struct Family {
    pub(super) name: &'static str,
    pub(super) help: &'static str,
    pub(super) kind: MetricType,
    /// Beside [`BASE_LABELS`].
    pub(super) labels: &'static [&'static str],
}

/// Labels of every metric, in this order.
pub(super) const BASE_LABELS: [&str; 6] = ["id", "name", "image", "namespace", "pod", "container"];

impl Family {
    pub(super) fn descriptor(&self) -> MetricDescriptor {
        MetricDescriptor {
            name: self.name.to_owned(),
            help: self.help.to_owned(),
            label_keys: BASE_LABELS.iter().chain(self.labels).map(|&label| label.to_owned()).collect(),
        }
    }
}

macro_rules! families {
    ($($family:ident: $kind:ident $name:literal [$($label:literal),*] $help:literal;)*) => {
        $(pub(super) static $family: Family =
            Family { name: $name, help: $help, kind: MetricType::$kind, labels: &[$($label),*] };)*
        /// All of them.
        pub(super) static ALL: &[&Family] = &[$(&$family),*];
    };
}

families! {
    LAST_SEEN: Gauge "container_last_seen" [] "Unix time at which the container was last seen.";
    START_TIME: Gauge "container_start_time_seconds" [] "Unix time at which the container was started.";
    CREATION_TIME: Gauge "container_creation_time_seconds" [] "Unix time at which the container was created.";

    CPU_USAGE: Counter "container_cpu_usage_seconds_total" ["cpu"] "CPU time used, whole seconds.";
    CPU_USER: Counter "container_cpu_user_seconds_total" [] "CPU time used in user mode, whole seconds.";
    CPU_SYSTEM: Counter "container_cpu_system_seconds_total" [] "CPU time used in the kernel, whole seconds.";
    CFS_PERIODS: Counter "container_cpu_cfs_periods_total" [] "Enforcement periods of the CPU quota.";
    CFS_THROTTLED_PERIODS: Counter "container_cpu_cfs_throttled_periods_total" [] "Periods in which the quota was used up.";
    CFS_THROTTLED: Counter "container_cpu_cfs_throttled_seconds_total" [] "Time spent throttled, whole seconds.";
    CFS_BURST_PERIODS: Counter "container_cpu_cfs_burst_periods_total" [] "Periods that used saved quota.";
    CFS_BURST: Counter "container_cpu_cfs_burst_seconds_total" [] "Saved CPU time that was used, whole seconds.";

    MEMORY_USAGE: Gauge "container_memory_usage_bytes" [] "Memory in use, page cache included.";
    MEMORY_WORKING_SET: Gauge "container_memory_working_set_bytes" [] "Memory in use without inactive file pages.";
    MEMORY_RSS: Gauge "container_memory_rss" [] "Anonymous memory, bytes.";
    MEMORY_CACHE: Gauge "container_memory_cache" [] "Page cache, bytes.";
    MEMORY_MAPPED_FILE: Gauge "container_memory_mapped_file" [] "Page cache that is mapped, bytes.";
    MEMORY_KERNEL: Gauge "container_memory_kernel_usage" [] "The kernel's memory for the container, bytes.";
    MEMORY_SWAP: Gauge "container_memory_swap" [] "Swap in use, bytes.";
    MEMORY_MAX_USAGE: Gauge "container_memory_max_usage_bytes" [] "Highest memory use so far.";
    MEMORY_FAILCNT: Counter "container_memory_failcnt" [] "How often the memory limit was hit.";
    MEMORY_FAILURES: Counter "container_memory_failures_total" ["failure_type", "scope"] "Page faults.";
    MEMORY_ACTIVE_FILE: Gauge "container_memory_total_active_file_bytes" [] "Page cache that was used lately.";
    MEMORY_INACTIVE_FILE: Gauge "container_memory_total_inactive_file_bytes" [] "Page cache that was not used lately.";
    MEMORY_EVENTS_HIGH: Counter "container_memory_events_high_total" [] "How often it was throttled for exceeding memory.high.";
    MEMORY_EVENTS_MAX: Counter "container_memory_events_max_total" [] "How often memory.max was hit.";
    MEMORY_DIRTY: Gauge "container_memory_file_dirty_bytes" [] "Page cache that is still to be written.";
    MEMORY_WRITEBACK: Gauge "container_memory_file_writeback_bytes" [] "Page cache that is being written.";
    MEMORY_SCANNED: Counter "container_memory_pgscan_total" [] "Pages that reclaim looked at.";
    MEMORY_RECLAIMED: Counter "container_memory_pgsteal_total" [] "Pages that reclaim took.";
    MEMORY_REFAULT_FILE: Counter "container_memory_workingset_refault_file_total" [] "File pages needed again after reclaim.";
    MEMORY_REFAULT_ANON: Counter "container_memory_workingset_refault_anon_total" [] "Anonymous pages needed again after reclaim.";
    OOM_EVENTS: Counter "container_oom_events_total" [] "Processes killed for lack of memory.";

    HUGETLB_USAGE: Gauge "container_hugetlb_usage_bytes" ["pagesize"] "Huge pages in use.";
    HUGETLB_MAX_USAGE: Gauge "container_hugetlb_max_usage_bytes" ["pagesize"] "Highest use of huge pages so far.";
    HUGETLB_FAILCNT: Counter "container_hugetlb_failcnt" ["pagesize"] "How often the limit of huge pages was hit.";

    FS_USAGE: Gauge "container_fs_usage_bytes" ["device"] "Bytes in the container's writable layer.";
    FS_LIMIT: Gauge "container_fs_limit_bytes" ["device"] "Size of the file system that the layer is on, bytes.";
    FS_INODES: Gauge "container_fs_inodes_total" ["device"] "Inodes of that file system.";
    FS_INODES_FREE: Gauge "container_fs_inodes_free" ["device"] "Free inodes of that file system.";
    FS_READS_BYTES: Counter "container_fs_reads_bytes_total" ["device"] "Bytes read from a device.";
    FS_READS: Counter "container_fs_reads_total" ["device"] "Reads from a device.";
    FS_WRITES_BYTES: Counter "container_fs_writes_bytes_total" ["device"] "Bytes written to a device.";
    FS_WRITES: Counter "container_fs_writes_total" ["device"] "Writes to a device.";
    BLKIO_USAGE: Counter "container_blkio_device_usage_total" ["device", "major", "minor", "operation"] "Bytes moved by a device.";

    NETWORK_RECEIVED_BYTES: Counter "container_network_receive_bytes_total" ["interface"] "Bytes received.";
    NETWORK_RECEIVED_PACKETS: Counter "container_network_receive_packets_total" ["interface"] "Packets received.";
    NETWORK_RECEIVED_DROPPED: Counter "container_network_receive_packets_dropped_total" ["interface"] "Incoming packets dropped.";
    NETWORK_RECEIVED_ERRORS: Counter "container_network_receive_errors_total" ["interface"] "Errors while receiving.";
    NETWORK_SENT_BYTES: Counter "container_network_transmit_bytes_total" ["interface"] "Bytes sent.";
    NETWORK_SENT_PACKETS: Counter "container_network_transmit_packets_total" ["interface"] "Packets sent.";
    NETWORK_SENT_DROPPED: Counter "container_network_transmit_packets_dropped_total" ["interface"] "Outgoing packets dropped.";
    NETWORK_SENT_ERRORS: Counter "container_network_transmit_errors_total" ["interface"] "Errors while sending.";

    PROCESSES: Gauge "container_processes" [] "Processes in the container.";
    THREADS: Gauge "container_threads" [] "Threads in the container.";
    THREADS_MAX: Gauge "container_threads_max" [] "Most threads it may have; 0: no limit.";
    FILE_DESCRIPTORS: Gauge "container_file_descriptors" [] "Open file descriptors.";
    SOCKETS: Gauge "container_sockets" [] "Open sockets.";
    ULIMITS_SOFT: Gauge "container_ulimits_soft" ["ulimit"] "Soft limits of the first process.";

    SPEC_CPU_PERIOD: Gauge "container_spec_cpu_period" [] "Enforcement period of the CPU quota, microseconds.";
    SPEC_CPU_QUOTA: Gauge "container_spec_cpu_quota" [] "CPU time allowed in a period, microseconds.";
    SPEC_CPU_SHARES: Gauge "container_spec_cpu_shares" [] "Weight among other containers.";
    SPEC_MEMORY_LIMIT: Gauge "container_spec_memory_limit_bytes" [] "Memory limit; 0: none.";
    SPEC_MEMORY_RESERVATION: Gauge "container_spec_memory_reservation_limit_bytes" [] "Memory above which it is throttled; 0: none.";
    SPEC_MEMORY_SWAP: Gauge "container_spec_memory_swap_limit_bytes" [] "Swap limit as the cgroup version counts it; 0: none.";

    PRESSURE_CPU_STALLED: Counter "container_pressure_cpu_stalled_seconds_total" [] "Time in which all tasks waited for a CPU, whole seconds.";
    PRESSURE_CPU_WAITING: Counter "container_pressure_cpu_waiting_seconds_total" [] "Time in which a task waited for a CPU, whole seconds.";
    PRESSURE_MEMORY_STALLED: Counter "container_pressure_memory_stalled_seconds_total" [] "Time in which all tasks waited for memory, whole seconds.";
    PRESSURE_MEMORY_WAITING: Counter "container_pressure_memory_waiting_seconds_total" [] "Time in which a task waited for memory, whole seconds.";
    PRESSURE_IO_STALLED: Counter "container_pressure_io_stalled_seconds_total" [] "Time in which all tasks waited for input or output, whole seconds.";
    PRESSURE_IO_WAITING: Counter "container_pressure_io_waiting_seconds_total" [] "Time in which a task waited for input or output, whole seconds.";
}
