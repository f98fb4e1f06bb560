//! Machines that start, speak and end; each with a real kernel, by QEMU's translator.
#![allow(missing_docs)]

#[path = "../../hypervisor/tests/lab/mod.rs"]
mod lab;

/// The program under test.
const PROGRAM: &str = env!("CARGO_BIN_EXE_podvisor-qemu");

use std::fs;
use std::io::{Read, Write};
use std::net::Shutdown;
use std::os::unix::net::UnixStream;
use std::path::Path;

use lab::{Hypervisor, Namespace, Suite, eventually};
use podvisor_proto::hypervisor::{Disk, EndReason, Network, Started, Stop, request::Verb};

/// One boot, and all that a guest's ports are asked for.
#[test]
fn ports() {
    let mut hypervisor = Hypervisor::new(&[]);
    let start = hypervisor.start(Suite::Bookworm);
    // From the first moment on: it is answered when the guest listens, or ends without a line.
    let started = hypervisor.begin(start);
    assert_eq!(started.emulated, lab::kvm().is_none());
    assert!(started.name == "qemu" && started.version.contains('.'), "{started:?}");
    assert_eq!((started.memory_limit, started.cpus_limit), (256 << 20, 1));
    assert!(hypervisor.tell("list /dev").contains("console"));
    assert!(hypervisor.connect(9999).is_none(), "nobody listens there");

    echoes(&hypervisor);
    slow_readers(&hypervisor);
    many(&hypervisor);
    // The guest opens none: 104 is ECONNRESET.
    assert_eq!(hypervisor.tell("dial 1024"), "Connection reset by peer");
    confined(&started);

    let _ = hypervisor.guest("poweroff");
    let ended = hypervisor.ended();
    assert_eq!(ended.reason(), EndReason::PowerOff, "{ended:?}");
    assert!(ended.console.contains("test: ready"), "{ended:?}");
    assert!(hypervisor.console().contains("test: ready"));
    assert!(hypervisor.finish(started.pid).success());
}

/// Megabytes there and back at once, and the end of one direction while the other goes on.
fn echoes(hypervisor: &Hypervisor) {
    let mut socket = hypervisor.guest("echo");
    let sent: Vec<u8> = (0..3_000_000u32).map(|number| (number * 7 % 251) as u8).collect();
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
    const BYTES: usize = 3_000_000;
    let mut lazy = hypervisor.guest(&format!("source {BYTES}"));
    let mut sink = hypervisor.guest("sink");
    sink.write_all(&vec![3; 1_000_000]).unwrap();
    sink.shutdown(Shutdown::Write).unwrap();
    let mut answer = String::new();
    sink.read_to_string(&mut answer).unwrap();
    assert_eq!(answer, "1000000 3000000\n");
    let mut got = vec![0; BYTES];
    lazy.read_exact(&mut got).unwrap();
    assert!(got.chunks(65_536).zip(0u8..).all(|(block, round)| block.iter().all(|byte| *byte == round)));
    assert_eq!(lazy.read(&mut [0]).unwrap(), 0);
}

fn many(hypervisor: &Hypervisor) {
    for _ in 0..2 {
        let mut sockets: Vec<UnixStream> = (0..60).map(|_| hypervisor.guest("hold")).collect();
        for socket in &mut sockets {
            let mut line = [0; 5];
            socket.read_exact(&mut line).unwrap();
            assert_eq!(&line, b"held\n");
        }
    }
}

/// What the README says of QEMU's process.
fn confined(started: &Started) {
    let status = fs::read_to_string(format!("/proc/{}/status", started.pid)).unwrap();
    let field = |name: &str| {
        let line = status.lines().find(|line| line.starts_with(name)).unwrap_or_else(|| panic!("no {name}"));
        line[name.len()..].split_whitespace().collect::<Vec<_>>().join(" ")
    };
    assert_eq!(field("Uid:"), "65534 65534 65534 65534");
    assert_eq!(field("Gid:"), "65534 65534 65534 65534");
    assert_eq!(field("Groups:"), "");
    for set in ["CapInh:", "CapPrm:", "CapEff:", "CapBnd:", "CapAmb:"] {
        assert_eq!(field(set), "0000000000000000", "{set}");
    }
    assert_eq!(field("NoNewPrivs:"), "1");
    assert_eq!(field("Seccomp:"), "2");
    for kind in ["net", "ipc", "uts"] {
        let of = |pid: &str| fs::read_link(format!("/proc/{pid}/ns/{kind}")).unwrap();
        assert_ne!(of("self"), of(&started.pid.to_string()), "{kind}");
    }
    let limits = fs::read_to_string(format!("/proc/{}/limits", started.pid)).unwrap();
    let core = limits.lines().find(|line| line.starts_with("Max core file size")).unwrap();
    assert_eq!(core.split_whitespace().collect::<Vec<_>>()[4..6], ["0", "0"]);
    // Nothing of the host's is open but what it was given.
    for entry in fs::read_dir(format!("/proc/{}/fd", started.pid)).unwrap() {
        let target = fs::read_link(entry.unwrap().path()).unwrap();
        let name = target.to_string_lossy();
        let harmless = ["socket:", "pipe:", "anon_inode:", "/memfd:", "/dev/null", "/dev/kvm", "/usr/"];
        let given = ["/kernel", "/initramfs"];
        assert!(
            harmless.iter().any(|start| name.starts_with(start))
                || given.iter().any(|end| name.ends_with(end)),
            "{name}"
        );
    }
}

#[test]
fn a_panic_is_told_with_its_words() {
    let mut hypervisor = Hypervisor::new(&[]);
    let start = hypervisor.start(Suite::Backports);
    let started = hypervisor.begin(start);
    let _ = hypervisor.guest("panic");
    let ended = hypervisor.ended();
    assert_eq!(ended.reason(), EndReason::Panic, "{ended:?}");
    assert!(ended.detail.starts_with("Kernel panic - not syncing"), "{ended:?}");
    assert!(ended.console.contains("sysrq") && ended.console.len() <= 4096, "{ended:?}");
    assert!(!ended.console.contains(|character: char| character.is_control() && character != '\n'));
    assert!(hypervisor.finish(started.pid).success());
}

/// By the device that the guest's driver tells of a panic.
#[test]
fn a_panic_is_told_by_pvpanic_too() {
    let mut hypervisor = Hypervisor::new(&[]);
    let mut start = hypervisor.start(Suite::Bookworm);
    // A kernel that stands still when it panics, and does not say why.
    start.command_line = "panic=0 loglevel=0".into();
    let started = hypervisor.begin(start);
    assert_eq!(hypervisor.tell("load pvpanic_mmio"), "ok");
    let _ = hypervisor.guest("panic");
    let ended = hypervisor.ended();
    assert_eq!(ended.reason(), EndReason::Panic, "{ended:?}");
    hypervisor.finish(started.pid);
}

#[test]
fn a_guest_that_begins_anew_has_ended() {
    let mut hypervisor = Hypervisor::new(&[]);
    let start = hypervisor.start(Suite::Bookworm);
    let started = hypervisor.begin(start);
    let _ = hypervisor.guest("reboot");
    assert_eq!(hypervisor.ended().reason(), EndReason::Reset);
    hypervisor.finish(started.pid);
}

#[test]
fn stopped_whatever_it_does() {
    let mut hypervisor = Hypervisor::new(&[]);
    let start = hypervisor.start(Suite::Bookworm);
    let started = hypervisor.begin(start);
    let mut open = hypervisor.guest("hold");
    open.read_exact(&mut [0; 5]).unwrap();
    hypervisor.done(Verb::Stop(Stop {}));
    assert!(!Path::new(&format!("/proc/{}", started.pid)).exists(), "it is gone when that is answered");
    let mut rest = Vec::new();
    let _ = open.read_to_end(&mut rest);
    assert!(rest.is_empty());
    assert!(hypervisor.finish(started.pid).success());
}

/// A disk that is read, one that is written, and a tap, on either machine.
fn devices(machine: &str) {
    let namespace = Namespace::new(machine);
    let mut hypervisor = Hypervisor::new(&["--machine", machine]);
    let mut start = hypervisor.start(Suite::Bookworm);
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
    // A file that is none of the kernel's keeps what was written.
    assert_eq!(fs::read_to_string(&cgroup).unwrap(), "0");

    for (name, read_only) in [("image", "1"), ("layer", "0")] {
        let device = hypervisor.tell(&format!("disk serial-{name}"));
        assert!(device.starts_with("vd"), "{device}");
        assert!(hypervisor.tell(&format!("read /dev/{device}")).starts_with(&format!("content of {name}")));
        assert_eq!(hypervisor.tell(&format!("read /sys/block/{device}/ro")), read_only);
    }
    let device = hypervisor.tell("disk serial-layer");
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

#[test]
fn devices_of_a_microvm() {
    devices("microvm");
}

#[test]
fn devices_of_a_q35() {
    devices("q35");
}
