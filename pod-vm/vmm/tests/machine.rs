//! Machines that start, speak and end; each with a real kernel, on real KVM.
#![allow(missing_docs)]

#[path = "../../hypervisor/tests/lab/mod.rs"]
mod lab;

/// The program under test.
const PROGRAM: &str = env!("CARGO_BIN_EXE_podvisor-vmm");

use std::fs;
use std::io::{Read, Write};
use std::net::Shutdown;
use std::os::unix::net::UnixStream;
use std::path::Path;

use lab::{Hypervisor, Namespace, Suite, eventually};
use podvisor_proto::hypervisor::{
    AddDisk, Check, Disk, EndReason, ErrorCode, Network, SetCpus, SetMemory, Start, Started, Stop, reply,
    request::Verb,
};

/// What the other tests start from, made where it is quick.
#[test]
fn guests_are_made() {
    for suite in [Suite::Bookworm, Suite::Backports] {
        assert!(lab::guest(suite).kernel.is_file());
    }
}

fn start(hypervisor: &Hypervisor, suite: Suite) -> Start {
    Start { emulate: false, ..hypervisor.start(suite) }
}

/// One boot, and all that a guest's ports are asked for.
#[test]
#[ignore = "runs in the lab: make test-lab"]
fn kvm_ports() {
    let mut hypervisor = Hypervisor::new(&[]);
    let start = start(&hypervisor, Suite::Bookworm);
    let started = hypervisor.begin(start.clone());
    assert!(!started.emulated && started.name == "podvisor-vmm", "{started:?}");
    assert_eq!((started.memory_limit, started.cpus_limit), (256 << 20, 1));
    assert!(!started.adds_shares && !started.adds_disks && !started.adds_networks, "{started:?}");
    for _ in 0..3 {
        hypervisor.done(Verb::Check(Check {}));
    }
    assert!(hypervisor.tell("list /dev").contains("hwrng"), "entropy");
    assert!(hypervisor.connect(9999).is_none(), "nobody listens there");

    echoes(&hypervisor);
    slow_readers(&hypervisor);
    many(&hypervisor);
    assert_eq!(hypervisor.tell("dial 1024"), "Connection reset by peer");
    confined(&started);
    refusals(&mut hypervisor, start);

    let _ = hypervisor.guest("poweroff");
    let ended = hypervisor.ended();
    assert_eq!(ended.reason(), EndReason::PowerOff, "{ended:?}");
    assert!(ended.console.contains("test: ready"), "{ended:?}");
    assert!(hypervisor.console().contains("test: ready"));
    assert!(hypervisor.finish(started.pid).success());
}

/// Bytes there and back at once, and the end of one direction while the other goes on.
fn echoes(hypervisor: &Hypervisor) {
    let mut socket = hypervisor.guest("echo");
    let sent: Vec<u8> = (0..1_000_000u32).map(|number| (number * 7 % 251) as u8).collect();
    let mut writer = socket.try_clone().unwrap();
    let bytes = sent.clone();
    let thread = std::thread::spawn(move || {
        writer.write_all(&bytes).unwrap();
        writer.shutdown(Shutdown::Write).unwrap();
    });
    let mut got = Vec::new();
    socket.read_to_end(&mut got).unwrap();
    thread.join().unwrap();
    assert!(got == sent, "{} bytes of {} came back", got.len(), sent.len());
}

/// Who does not read holds up nobody, and gets everything when it does.
fn slow_readers(hypervisor: &Hypervisor) {
    const BYTES: usize = 1_000_000;
    let mut lazy = hypervisor.guest(&format!("source {BYTES}"));
    let mut sink = hypervisor.guest("sink");
    sink.write_all(&vec![3; 300_000]).unwrap();
    sink.shutdown(Shutdown::Write).unwrap();
    let mut answer = String::new();
    sink.read_to_string(&mut answer).unwrap();
    assert_eq!(answer, "300000 900000\n");
    let mut got = vec![0; BYTES];
    lazy.read_exact(&mut got).unwrap();
    assert!(got.chunks(65_536).zip(0u8..).all(|(block, round)| block.iter().all(|byte| *byte == round)));
    assert_eq!(lazy.read(&mut [0]).unwrap(), 0);
}

fn many(hypervisor: &Hypervisor) {
    let mut sockets: Vec<UnixStream> = (0..40).map(|_| hypervisor.guest("hold")).collect();
    for socket in &mut sockets {
        let mut line = [0; 5];
        socket.read_exact(&mut line).unwrap();
        assert_eq!(&line, b"held\n");
    }
}

/// What the README says of the machine's process.
fn confined(started: &Started) {
    let directory = format!("/proc/{}", started.pid);
    let status = fs::read_to_string(format!("{directory}/status")).unwrap();
    let field = |name: &str| {
        let line = status.lines().find(|line| line.starts_with(name)).unwrap_or_else(|| panic!("no {name}"));
        line[name.len()..].split_whitespace().collect::<Vec<_>>().join(" ")
    };
    assert_eq!(field("Uid:"), "65534 65534 65534 65534");
    assert_eq!(field("Gid:"), "65534 65534 65534 65534");
    assert_eq!(field("Groups:"), "");
    for set in ["CapInh:", "CapPrm:", "CapEff:", "CapBnd:", "CapAmb:"] {
        // In a user namespace of its own the bounding set is that namespace's, and nothing is left to be bounded.
        assert!(set == "CapBnd:" || field(set) == "0000000000000000", "{set}");
    }
    assert_eq!((field("NoNewPrivs:"), field("Seccomp:")), ("1".to_owned(), "2".to_owned()));
    for kind in ["mnt", "net", "ipc", "uts", "pid", "cgroup", "user"] {
        let of = |pid: &str| fs::read_link(format!("/proc/{pid}/ns/{kind}")).unwrap();
        assert_ne!(of("self"), of(&started.pid.to_string()), "{kind}");
    }
    assert_eq!(fs::read_dir(format!("{directory}/root")).unwrap().count(), 0);
    // Every thread, with a filter of its own kind.
    let threads = fs::read_dir(format!("{directory}/task")).unwrap();
    let filters: Vec<(String, String)> = threads
        .map(|thread| {
            let path = thread.unwrap().path();
            let status = fs::read_to_string(path.join("status")).unwrap();
            let line = status.lines().find(|line| line.starts_with("Seccomp:")).unwrap().to_owned();
            (fs::read_to_string(path.join("comm")).unwrap().trim().to_owned(), line)
        })
        .collect();
    assert!(filters.iter().all(|(_, filter)| filter.ends_with('2')), "{filters:?}");
    assert!(filters.iter().any(|(name, _)| name == "cpu0"), "{filters:?}");
    // Nothing of the host's is open but what it was given.
    for entry in fs::read_dir(format!("{directory}/fd")).unwrap() {
        let target = fs::read_link(entry.unwrap().path()).unwrap();
        let name = target.to_string_lossy();
        let harmless = ["socket:", "pipe:", "anon_inode:", "/memfd:", "/dev/null", "/dev/kvm"];
        assert!(harmless.iter().any(|start| name.starts_with(start)), "{name}");
    }
}

/// What it says it cannot do, it does not do.
fn refusals(hypervisor: &mut Hypervisor, start: Start) {
    assert_eq!(hypervisor.refused(Verb::Start(start)).0, ErrorCode::WrongState);
    assert_eq!(hypervisor.refused(Verb::SetCpus(SetCpus { count: 2 })).0, ErrorCode::Invalid);
    let bytes = 512 << 20;
    assert_eq!(hypervisor.refused(Verb::SetMemory(SetMemory { bytes })).0, ErrorCode::Unsupported);
    let disk = Disk { serial: "more".into(), path: "/more".into(), read_only: true };
    let add = Verb::AddDisk(AddDisk { disk: Some(disk) });
    assert_eq!(hypervisor.refused(add).0, ErrorCode::Unsupported);
}

/// The other kernel; several processors, of which the guest uses one until it is told to use more.
#[test]
#[ignore = "runs in the lab: make test-lab"]
fn kvm_processors() {
    let mut hypervisor = Hypervisor::new(&[]);
    let start = Start { cpus_limit: 3, ..start(&hypervisor, Suite::Backports) };
    let started = hypervisor.begin(start);
    assert_eq!(started.cpus_limit, 3);
    assert_eq!(hypervisor.tell("read /sys/devices/system/cpu/present"), "0-2");
    assert_eq!(hypervisor.tell("read /sys/devices/system/cpu/online"), "0");
    hypervisor.done(Verb::SetCpus(SetCpus { count: 2 }));
    assert_eq!(hypervisor.tell("write /sys/devices/system/cpu/cpu1/online 1"), "ok");
    assert_eq!(hypervisor.tell("read /sys/devices/system/cpu/online"), "0-1");
    assert_eq!(
        hypervisor.tell("read /sys/devices/system/clocksource/clocksource0/current_clocksource"),
        "kvm-clock"
    );
    hypervisor.done(Verb::Stop(Stop {}));
    assert!(!Path::new(&format!("/proc/{}", started.pid)).exists(), "it is gone when that is answered");
    assert!(hypervisor.finish(started.pid).success());
}

fn total_memory(hypervisor: &Hypervisor) -> u64 {
    let text = hypervisor.tell("read /proc/meminfo");
    let line = text.lines().find(|line| line.starts_with("MemTotal:")).unwrap();
    line.split_whitespace().nth(1).unwrap().parse::<u64>().unwrap() * 1024
}

/// A disk's content in the guest's memory, its length and sum, and the connection until whose end it stays there.
fn kept(hypervisor: &Hypervisor, device: &str) -> (UnixStream, String) {
    let mut guest = hypervisor.guest(&format!("keep /dev/{device}"));
    let (mut answer, mut byte) = (String::new(), [0]);
    while guest.read(&mut byte).unwrap() == 1 && byte != *b"\n" {
        answer.push(byte[0].into());
    }
    (guest, answer)
}

/// Both kernels, up and down and up again; a disk that is read into memory that was added.
#[test]
#[ignore = "runs in the lab: make test-lab"]
fn kvm_memory_grows_and_shrinks() {
    const MIB: u64 = 1 << 20;
    for suite in [Suite::Bookworm, Suite::Backports] {
        let mut hypervisor = Hypervisor::new(&[]);
        let mut start = Start { memory_limit: 1024 * MIB, ..start(&hypervisor, suite) };
        fs::write(hypervisor.path("image"), vec![7; 300 << 20]).unwrap();
        let sum = format!("{} {}", 300 << 20, 7u64 * (300 << 20));
        let path = hypervisor.path("image").to_str().unwrap().to_owned();
        start.disks.push(Disk { serial: "image".into(), path, read_only: true });
        let started = hypervisor.begin(start);
        assert_eq!(started.memory_limit, 1024 * MIB);
        let set = |hypervisor: &mut Hypervisor, mib: u64| match hypervisor
            .ask(Verb::SetMemory(SetMemory { bytes: mib * MIB }))
        {
            Ok(reply::Result::Resized(is)) => is.memory / MIB,
            other => panic!("expected Resized, got {other:?}"),
        };
        let before = total_memory(&hypervisor);
        assert_eq!(hypervisor.tell("load virtio_mem"), "ok");
        assert_eq!(set(&mut hypervisor, 700), 700);
        // It has been taken; the guest's kernel uses it from a moment later on.
        eventually("the guest uses what it has taken", || total_memory(&hypervisor) > before + 430 * MIB);
        let grown = total_memory(&hypervisor);
        let device = hypervisor.tell("disk image");
        assert_eq!(kept(&hypervisor, &device).1, sum);
        let left = set(&mut hypervisor, 256);
        assert!((256..700).contains(&left), "{left}");
        assert_eq!(set(&mut hypervisor, 1024), 1024);
        eventually("the guest uses all of it", || total_memory(&hypervisor) > grown);
        for bytes in [128 * MIB, 1026 * MIB, 512 * MIB + 4096] {
            let refused = hypervisor.refused(Verb::SetMemory(SetMemory { bytes }));
            assert_eq!(refused.0, ErrorCode::Invalid);
        }
        // What the guest does not use any more is the host's again.
        let resident = || {
            let status = fs::read_to_string(format!("/proc/{}/status", started.pid)).unwrap();
            let line = status.lines().find(|line| line.starts_with("RssAnon:")).unwrap();
            line.split_whitespace().nth(1).unwrap().parse::<u64>().unwrap() / 1024
        };
        assert_eq!(hypervisor.tell("load virtio_balloon"), "ok");
        let keeper = kept(&hypervisor, &device);
        let used = resident();
        assert!(keeper.1 == sum && used > 300, "{} {used} MiB", keeper.1);
        drop(keeper);
        eventually("the guest gives memory back", || resident() + 200 < used);
        hypervisor.done(Verb::Stop(Stop {}));
        hypervisor.finish(started.pid);
    }
}

#[test]
#[ignore = "runs in the lab: make test-lab"]
fn kvm_ends_are_told() {
    let mut hypervisor = Hypervisor::new(&[]);
    let request = start(&hypervisor, Suite::Backports);
    let started = hypervisor.begin(request);
    let _ = hypervisor.guest("panic");
    let ended = hypervisor.ended();
    assert_eq!(ended.reason(), EndReason::Panic, "{ended:?}");
    assert!(ended.detail.starts_with("Kernel panic - not syncing"), "{ended:?}");
    hypervisor.finish(started.pid);

    // A kernel that stands still when it panics, and does not say why: its driver for pvpanic does.
    let mut hypervisor = Hypervisor::new(&[]);
    let request = Start { command_line: "panic=0 loglevel=0".into(), ..start(&hypervisor, Suite::Bookworm) };
    let started = hypervisor.begin(request);
    assert_eq!(hypervisor.tell("load pvpanic_mmio"), "ok");
    let _ = hypervisor.guest("panic");
    assert_eq!(hypervisor.ended().reason(), EndReason::Panic);
    hypervisor.finish(started.pid);

    let mut hypervisor = Hypervisor::new(&[]);
    let request = start(&hypervisor, Suite::Bookworm);
    let started = hypervisor.begin(request);
    let _ = hypervisor.guest("reboot");
    assert_eq!(hypervisor.ended().reason(), EndReason::Reset);
    hypervisor.finish(started.pid);

    // Killed, and with the monitor gone.
    let mut hypervisor = Hypervisor::new(&[]);
    let request = start(&hypervisor, Suite::Bookworm);
    let started = hypervisor.begin(request);
    let pid = rustix::process::Pid::from_raw(started.pid).unwrap();
    rustix::process::kill_process(pid, rustix::process::Signal::KILL).unwrap();
    assert_eq!(hypervisor.ended().reason(), EndReason::Killed);
    hypervisor.finish(started.pid);
    let mut hypervisor = Hypervisor::new(&[]);
    let request = start(&hypervisor, Suite::Bookworm);
    let started = hypervisor.begin(request);
    hypervisor.control = None;
    assert!(hypervisor.finish(started.pid).success());
}

/// A disk that is read, one that is written, and a tap.
#[test]
#[ignore = "runs in the lab: make test-lab"]
fn kvm_devices() {
    let namespace = Namespace::new("vmm");
    let mut hypervisor = Hypervisor::new(&[]);
    let mut start = start(&hypervisor, Suite::Bookworm);
    for (name, read_only) in [("image", true), ("layer", false)] {
        let mut content = format!("content of {name}").into_bytes();
        content.resize(1 << 20, 0);
        fs::write(hypervisor.path(name), content).unwrap();
        let path = hypervisor.path(name).to_str().unwrap().to_owned();
        start.disks.push(Disk { serial: format!("serial-{name}"), path, read_only });
    }
    start.networks.push(Network {
        namespace: namespace.path(),
        tap: "tap0".into(),
        hardware_address: "02:00:00:00:00:2a".into(),
        mtu: 1400,
    });
    let cgroup = hypervisor.path("cgroup.procs");
    fs::write(&cgroup, "").unwrap();
    start.cgroup_procs.push(cgroup.to_str().unwrap().into());
    let started = hypervisor.begin(start);
    assert_eq!(fs::read_to_string(&cgroup).unwrap(), "0");

    for (name, read_only) in [("image", "1"), ("layer", "0")] {
        let device = hypervisor.tell(&format!("disk serial-{name}"));
        assert!(device.starts_with("vd"), "{device}");
        assert!(hypervisor.tell(&format!("read /dev/{device}")).starts_with(&format!("content of {name}")));
        assert_eq!(hypervisor.tell(&format!("read /sys/block/{device}/ro")), read_only);
    }
    let device = hypervisor.tell("disk serial-layer");
    assert_ne!(hypervisor.tell(&format!("read /sys/block/{device}/queue/discard_max_bytes")), "0");
    assert_eq!(hypervisor.tell(&format!("write /dev/{device} changed")), "ok");
    assert_eq!(hypervisor.tell("sync -"), "ok");
    assert!(fs::read(hypervisor.path("layer")).unwrap().starts_with(b"changed of layer"));

    let interface = hypervisor.tell("address 02:00:00:00:00:2a");
    assert_eq!(hypervisor.tell(&format!("read /sys/class/net/{interface}/mtu")), "1400");
    // Up, and then whatever the namespace's own stack says to its neighbours arrives.
    assert_eq!(hypervisor.tell(&format!("write /sys/class/net/{interface}/flags 0x1003")), "ok");
    namespace.run("ip link set tap0 up");
    eventually("a packet reaches the guest", || {
        namespace.run("ip neigh flush dev tap0");
        namespace.run("ping -c 1 -W 0.1 -q 10.77.0.2 >/dev/null || true");
        hypervisor.tell(&format!("read /sys/class/net/{interface}/statistics/rx_packets")) != "0"
    });
    hypervisor.done(Verb::Stop(Stop {}));
    hypervisor.finish(started.pid);
}
