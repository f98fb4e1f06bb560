use std::collections::{BTreeMap, BTreeSet};
use std::time::SystemTime;

use podvisor_cgroup::{CpuStats, DeviceIo, HugePages, IoStats, MemoryStats, PressureLine, SwapStats};
use podvisor_proto::cri::MetricType;

use super::super::super::interfaces::Direction;
use super::*;

fn base() -> [String; 6] {
    ["/pod/c1", "c1", "busybox", "ns", "web", "main"].map(str::to_owned)
}

fn pressure() -> Pressure {
    let line = |total_us| PressureLine { total_us, ..PressureLine::default() };
    Pressure { some: line(7_900_000), full: line(2_000_001) }
}

/// Everything that can be measured.
fn full() -> Vec<Metric> {
    let mut samples = Samples::new(base());
    samples.times(1_700_000_003_999_999_999, 1_700_000_000_000_000_001, 1_700_000_001_500_000_000);
    samples.usage(
        &Stats {
            timestamp: SystemTime::UNIX_EPOCH,
            cpu: Some(CpuStats {
                usage_ns: 3_999_999_999,
                user_ns: Some(2_000_000_000),
                system_ns: Some(999_999_999),
                periods: Some(10),
                throttled_periods: Some(4),
                throttled_ns: Some(1_200_000_000),
                burst_periods: Some(1),
                burst_ns: Some(0),
                pressure: Some(pressure()),
            }),
            memory: Some(MemoryStats {
                usage: 100,
                working_set: 80,
                page_faults: 5,
                major_page_faults: 1,
                peak: Some(120),
                kernel: Some(3),
                scanned: Some(1),
                reclaimed: Some(1),
                refaults_file: Some(1),
                refaults_anon: Some(1),
                pressure: Some(pressure()),
                ..MemoryStats::default()
            }),
            swap: Some(SwapStats { usage: 4096, available: None }),
            pids: Some(6),
            io: Some(IoStats {
                devices: vec![
                    DeviceIo {
                        major: 8,
                        minor: 0,
                        read_bytes: 10,
                        write_bytes: 20,
                        read_operations: 1,
                        write_operations: 2,
                    },
                    DeviceIo { major: 8, minor: 16, ..DeviceIo::default() },
                ],
                pressure: Some(pressure()),
            }),
        },
        |major, minor| format!("/dev/d{major}.{minor}"),
    );
    samples.details(&Details {
        memory_limit_hits: Some(5),
        memory_high_hits: Some(4),
        oom_kills: Some(2),
        pids_limit: Some(u64::MAX),
        huge_pages: vec![HugePages { page_size: "2MB".into(), usage: 1, peak: Some(2), limit_hits: 3 }],
    });
    samples.processes(&Processes {
        count: Some(2),
        descriptors: Some(9),
        sockets: Some(1),
        open_files: Some(1024),
    });
    samples.filesystem(&Filesystem {
        device: "/dev/vda1".into(),
        usage: Some(7),
        limit: 1000,
        inodes: 50,
        inodes_free: 40,
    });
    let direction = Direction { bytes: 1, packets: 2, errors: 3, dropped: 4 };
    samples.network(&[Interface { name: "eth0".into(), received: direction, sent: direction }]);
    samples.spec(&LinuxContainerResources {
        cpu_period: 50_000,
        cpu_quota: 20_000,
        cpu_shares: 2,
        memory_limit_in_bytes: 1 << 20,
        memory_swap_limit_in_bytes: -1,
        unified: [("memory.high".to_owned(), "900".to_owned())].into(),
        ..LinuxContainerResources::default()
    });
    samples.done()
}

fn value(metrics: &[Metric], family: &Family) -> Option<u64> {
    metrics.iter().find(|metric| metric.name == family.name)?.value.as_ref().map(|value| value.value)
}

#[test]
fn descriptors_and_samples_are_the_same_families() {
    let described: BTreeSet<&str> = f::ALL.iter().map(|family| family.name).collect();
    assert_eq!(described.len(), f::ALL.len(), "a name stands twice");
    let metrics = full();
    let sampled: BTreeSet<&str> = metrics.iter().map(|metric| metric.name.as_str()).collect();
    assert_eq!(described, sampled);
}

/// What Prometheus' registry in kubelet refuses: a sample with another number of labels, one that stands twice, a counter without `_total`
/// is only bad style.
#[test]
fn samples_fit_their_descriptors() {
    let descriptors: BTreeMap<&str, usize> =
        f::ALL.iter().map(|family| (family.name, family.descriptor().label_keys.len())).collect();
    let mut seen = BTreeSet::new();
    for metric in full() {
        assert_eq!(metric.label_values.len(), descriptors[metric.name.as_str()], "{metric:?}");
        assert_eq!(metric.label_values[..6], base());
        assert_eq!(metric.timestamp, 0);
        assert!(seen.insert((metric.name.clone(), metric.label_values.clone())), "twice: {metric:?}");
        let counter = metric.name.ends_with("_total") || metric.name.ends_with("_failcnt");
        let limit = metric.name == "container_fs_inodes_total";
        assert_eq!(metric.metric_type() == MetricType::Counter, counter && !limit, "{}", metric.name);
    }
    for family in f::ALL {
        assert!(!family.help.is_empty() && !family.help.contains('\n'), "{}", family.name);
        assert!(family.name.bytes().all(|byte| byte.is_ascii_lowercase() || byte == b'_'), "{}", family.name);
    }
}

#[test]
fn values() {
    let metrics = full();
    for (family, expected) in [
        (&f::CPU_USAGE, 3),
        (&f::CPU_SYSTEM, 0),
        (&f::CFS_THROTTLED, 1),
        (&f::MEMORY_WORKING_SET, 80),
        (&f::MEMORY_SWAP, 4096),
        (&f::MEMORY_FAILCNT, 5),
        (&f::MEMORY_EVENTS_HIGH, 4),
        (&f::OOM_EVENTS, 2),
        (&f::THREADS, 6),
        (&f::THREADS_MAX, 0),
        (&f::PROCESSES, 2),
        (&f::PRESSURE_CPU_STALLED, 2),
        (&f::PRESSURE_IO_WAITING, 7),
        (&f::LAST_SEEN, 1_700_000_003),
        (&f::START_TIME, 1_700_000_001),
        (&f::SPEC_CPU_PERIOD, 50_000),
        (&f::SPEC_MEMORY_LIMIT, 1 << 20),
        (&f::SPEC_MEMORY_SWAP, 0),
        (&f::SPEC_MEMORY_RESERVATION, 900),
    ] {
        assert_eq!(value(&metrics, family), Some(expected), "{}", family.name);
    }
}

#[test]
fn what_is_not_known_has_no_sample() {
    let mut samples = Samples::new(base());
    samples.times(1_000_000_000, 1_000_000_000, 0);
    samples.usage(
        &Stats {
            timestamp: SystemTime::UNIX_EPOCH,
            cpu: None,
            memory: None,
            swap: None,
            pids: None,
            io: None,
        },
        |_, _| String::new(),
    );
    samples.details(&Details { memory_limit_hits: Some(1), ..Details::default() });
    samples.processes(&Processes::default());
    samples.spec(&LinuxContainerResources::default());
    let metrics = samples.done();
    let names: BTreeSet<&str> = metrics.iter().map(|metric| metric.name.as_str()).collect();
    let expected = [
        &f::LAST_SEEN,
        &f::CREATION_TIME,
        &f::MEMORY_FAILCNT,
        &f::SPEC_CPU_PERIOD,
        &f::SPEC_CPU_SHARES,
        &f::SPEC_MEMORY_LIMIT,
        &f::SPEC_MEMORY_SWAP,
        &f::SPEC_MEMORY_RESERVATION,
    ];
    assert_eq!(names, expected.iter().map(|family| family.name).collect());
    assert_eq!(value(&metrics, &f::SPEC_CPU_PERIOD), Some(100_000));
}
