//! Parsing of literal files; the real ones are read in the tests of `cgroup.rs`.

use super::*;
use crate::Layout;

/// A directory with cgroup files, as a hierarchy.
fn v2(files: &[(&str, &str)]) -> (tempfile::TempDir, Cgroup) {
    let root = tempfile::tempdir().unwrap();
    let leaf = root.path().join("leaf");
    std::fs::create_dir(&leaf).unwrap();
    for (name, text) in files {
        std::fs::write(leaf.join(name), text).unwrap();
    }
    let cgroup = Layout::V2 { mount: root.path().into() }.cgroup("/leaf");
    (root, cgroup)
}

fn v1(files: &[(&str, &str)]) -> (tempfile::TempDir, Cgroup) {
    let root = tempfile::tempdir().unwrap();
    let mut controllers = std::collections::BTreeMap::new();
    for name in ["cpu", "cpuacct", "memory", "pids", "blkio"] {
        std::fs::create_dir_all(root.path().join(name).join("leaf")).unwrap();
        controllers.insert(name.to_owned(), root.path().join(name));
    }
    for (name, text) in files {
        std::fs::write(root.path().join(name), text).unwrap();
    }
    let cgroup = Layout::V1 { controllers }.cgroup("/leaf");
    (root, cgroup)
}

const PSI: &str = "some avg10=1.05 avg60=0.10 avg300=12.00 total=7593573\nfull avg10=0.00 avg60=0.00 avg300=0.22 total=42\n";

#[test]
fn version_2() {
    let (_root, cgroup) = v2(&[
        (
            "cpu.stat",
            "usage_usec 1500\nuser_usec 1000\nsystem_usec 500\nnr_periods 9\nnr_throttled 3\nthrottled_usec 77\nnr_bursts 4\nburst_usec 5\n",
        ),
        ("cpu.pressure", PSI),
        ("memory.current", "1000000\n"),
        ("memory.max", "2000000\n"),
        ("memory.peak", "1500000\n"),
        (
            "memory.stat",
            "anon 400000\nfile 500000\nkernel 70000\nkernel_stack 1\nfile_mapped 9000\nfile_dirty 12\nfile_writeback 13\ninactive_anon 7\nactive_file 100000\ninactive_file 300000\nworkingset_refault_anon 14\nworkingset_refault_file 15\npgscan 16\npgsteal 17\npgfault 11\npgmajfault 2\n",
        ),
        ("memory.swap.current", "4096\n"),
        ("memory.swap.max", "8192\n"),
        ("memory.events", "low 0\nhigh 4\nmax 5\noom 6\noom_kill 7\noom_group_kill 0\n"),
        ("pids.current", "5\n"),
        (
            "io.stat",
            "8:16 rbytes=10 wbytes=20 rios=1 wios=2 dbytes=0 dios=0\n8:0 rbytes=1\n253:0 \nnot-a-device x=1\n",
        ),
    ]);
    let stats = cgroup.stats().unwrap();
    let cpu = stats.cpu.unwrap();
    assert_eq!((cpu.usage_ns, cpu.user_ns, cpu.system_ns), (1_500_000, Some(1_000_000), Some(500_000)));
    assert_eq!((cpu.periods, cpu.throttled_periods, cpu.throttled_ns), (Some(9), Some(3), Some(77_000)));
    assert_eq!((cpu.burst_periods, cpu.burst_ns), (Some(4), Some(5000)));
    assert_eq!(
        cpu.pressure.unwrap().some,
        PressureLine { avg10: 105, avg60: 10, avg300: 1200, total_us: 7_593_573 }
    );
    assert_eq!(cpu.pressure.unwrap().full.total_us, 42);
    assert_eq!(
        stats.memory.unwrap(),
        MemoryStats {
            usage: 1_000_000,
            working_set: 700_000,
            available: Some(1_300_000),
            limit: Some(2_000_000),
            rss: 400_000,
            page_faults: 11,
            major_page_faults: 2,
            peak: Some(1_500_000),
            cache: 500_000,
            mapped_file: 9000,
            kernel: Some(70_000),
            active_file: 100_000,
            inactive_file: 300_000,
            dirty: 12,
            writeback: 13,
            scanned: Some(16),
            reclaimed: Some(17),
            refaults_file: Some(15),
            refaults_anon: Some(14),
            pressure: None,
        }
    );
    assert_eq!(stats.swap.unwrap(), SwapStats { usage: 4096, available: Some(4096) });
    assert_eq!(stats.pids, Some(5));
    let devices = stats.io.unwrap().devices;
    assert_eq!(devices.len(), 3);
    assert_eq!(
        devices[0],
        DeviceIo {
            major: 8,
            minor: 16,
            read_bytes: 10,
            write_bytes: 20,
            read_operations: 1,
            write_operations: 2
        }
    );
    assert_eq!(cgroup.oom_kills().unwrap(), 7);
}

#[test]
fn version_2_without_limits_and_controllers() {
    let (_root, cgroup) = v2(&[
        ("cpu.stat", "usage_usec 1\nuser_usec 1\nsystem_usec 0\n"),
        ("memory.current", "10\n"),
        ("memory.max", "max\n"),
        ("memory.stat", "anon 1\ninactive_file 300\n"),
        ("memory.swap.current", "0\n"),
        ("memory.swap.max", "max\n"),
    ]);
    let stats = cgroup.stats().unwrap();
    assert_eq!(stats.cpu.unwrap().periods, None);
    // The two files are not read at the same instant: more inactive than used must not wrap around.
    assert_eq!(stats.memory.unwrap().working_set, 0);
    assert_eq!((stats.memory.unwrap().limit, stats.memory.unwrap().available), (None, None));
    assert_eq!(stats.swap.unwrap().available, None);
    assert_eq!((stats.pids, stats.io), (None, None));
    assert_eq!(cgroup.oom_kills().unwrap(), 0);

    let (_root, bare) = v2(&[]);
    let stats = bare.stats().unwrap();
    assert_eq!((stats.cpu, stats.memory, stats.swap), (None, None, None));
}

#[test]
fn version_1() {
    let (_root, cgroup) = v1(&[
        ("cpuacct/leaf/cpuacct.usage", "1500000\n"),
        ("cpu/leaf/cpu.stat", "nr_periods 4\nnr_throttled 2\nthrottled_time 99\n"),
        ("memory/leaf/memory.usage_in_bytes", "1000000\n"),
        ("memory/leaf/memory.limit_in_bytes", "2000000\n"),
        ("memory/leaf/memory.memsw.limit_in_bytes", "3000000\n"),
        (
            "memory/leaf/memory.stat",
            "inactive_file 1\nswap 0\ntotal_inactive_file 300000\ntotal_rss 400000\ntotal_pgfault 11\ntotal_pgmajfault 2\ntotal_swap 4096\n",
        ),
        ("memory/leaf/memory.oom_control", "oom_kill_disable 0\nunder_oom 0\noom_kill 3\n"),
        ("pids/leaf/pids.current", "5\n"),
        (
            "blkio/leaf/blkio.throttle.io_service_bytes_recursive",
            "254:0 Read 602112\n254:0 Write 8192\n254:0 Total 610304\nTotal 610304\n",
        ),
        ("blkio/leaf/blkio.throttle.io_serviced_recursive", "254:0 Read 6\n254:0 Write 2\n254:16 Read 1\n"),
    ]);
    let stats = cgroup.stats().unwrap();
    assert_eq!(
        stats.cpu.unwrap(),
        CpuStats {
            usage_ns: 1_500_000,
            periods: Some(4),
            throttled_periods: Some(2),
            throttled_ns: Some(99),
            ..CpuStats::default()
        }
    );
    let memory = stats.memory.unwrap();
    assert_eq!((memory.working_set, memory.available, memory.rss), (700_000, Some(1_300_000), 400_000));
    assert_eq!((memory.page_faults, memory.major_page_faults), (11, 2));
    assert_eq!(stats.swap.unwrap(), SwapStats { usage: 4096, available: Some(1_000_000 - 4096) });
    assert_eq!(stats.pids, Some(5));
    let devices = stats.io.unwrap().devices;
    assert_eq!(devices.len(), 2);
    assert_eq!(
        (devices[0].read_bytes, devices[0].write_bytes, devices[0].read_operations),
        (602_112, 8192, 6)
    );
    assert_eq!(cgroup.oom_kills().unwrap(), 3);
}

#[test]
fn version_1_unlimited() {
    for unlimited in ["9223372036854771712\n", "9223372036854710272\n", "18446744073709551615\n"] {
        let (_root, cgroup) = v1(&[
            ("memory/leaf/memory.usage_in_bytes", "10\n"),
            ("memory/leaf/memory.limit_in_bytes", unlimited),
            ("memory/leaf/memory.memsw.limit_in_bytes", unlimited),
        ]);
        let stats = cgroup.stats().unwrap();
        assert_eq!(stats.memory.unwrap().limit, None);
        assert_eq!(stats.swap, None);
    }
}

#[test]
fn pressure_forms() {
    // Before Linux 5.13 there is no "full" line for the CPU.
    let some = parse_pressure("some avg10=0.00 avg60=0.00 avg300=0.00 total=1\n").unwrap();
    assert_eq!((some.some.total_us, some.full), (1, PressureLine::default()));
    for bad in [
        "",
        "full avg10=0.00 total=1",
        "some avg10=0 total=1",
        "some avg10=x.00",
        "some avg10=99999999999.00",
    ] {
        assert_eq!(parse_pressure(bad), None, "{bad:?}");
    }
}

#[test]
fn a_number_that_is_none_is_named() {
    let (_root, cgroup) = v2(&[("pids.current", "many\n"), ("cpu.stat", "usage_usec 1\n")]);
    let error = cgroup.stats().unwrap_err();
    assert!(
        matches!(&error, CgroupError::Malformed { path, line } if path.ends_with("pids.current") && line == "many")
    );
}
