//! What the monitor can rely on whatever happens, before the guest has come up.
#![allow(missing_docs)]

#[path = "../../hypervisor/tests/lab/mod.rs"]
mod lab;

/// The program under test.
const PROGRAM: &str = env!("CARGO_BIN_EXE_podvisor-qemu");

use std::fs;
use std::io::Read;
use std::os::unix::fs::PermissionsExt;
use std::path::Path;

use lab::{Hypervisor, Suite, eventually};
use podvisor_proto::hypervisor::{
    Check, Disk, EndReason, ErrorCode, Network, SetCpus, SetMemory, Share, Start, Stop, request::Verb,
};
use rustix::process::{Pid, Signal, kill_process};

fn kill(pid: i32, signal: Signal) {
    kill_process(Pid::from_raw(pid).unwrap(), signal).unwrap();
}

fn is_there(pid: i32) -> bool {
    Path::new(&format!("/proc/{pid}")).exists()
}

#[test]
fn a_machine_that_is_killed_is_told() {
    for signal in [Signal::KILL, Signal::TERM] {
        let mut hypervisor = Hypervisor::new(&[]);
        let start = hypervisor.start(Suite::Bookworm);
        let started = hypervisor.begin(start);
        kill(started.pid, signal);
        let ended = hypervisor.ended();
        assert_eq!(ended.reason(), EndReason::Killed, "{ended:?}");
        assert!(ended.detail.contains("signal") || ended.detail.contains("SIGKILL"), "{ended:?}");
        assert!(hypervisor.finish(started.pid).success());
    }
    let mut hypervisor = Hypervisor::new(&[]);
    let start = hypervisor.start(Suite::Bookworm);
    let started = hypervisor.begin(start);
    kill(started.pid, Signal::ABORT);
    assert_eq!(hypervisor.ended().reason(), EndReason::Failure);
    hypervisor.finish(started.pid);
}

#[test]
fn the_machine_goes_with_the_monitor() {
    let mut hypervisor = Hypervisor::new(&[]);
    let start = hypervisor.start(Suite::Bookworm);
    let started = hypervisor.begin(start);
    hypervisor.control = None;
    assert!(hypervisor.finish(started.pid).success());

    // Before there is one, too.
    let mut hypervisor = Hypervisor::new(&[]);
    hypervisor.control = None;
    assert!(hypervisor.wait().success());

    // And while it is made.
    let mut hypervisor = Hypervisor::new(&[]);
    let start = hypervisor.start(Suite::Bookworm);
    hypervisor.send(Verb::Start(start));
    hypervisor.control = None;
    assert!(hypervisor.wait().success());
    assert_eq!(fs::read_dir(hypervisor.path("run")).unwrap().count(), 0);
    assert!(!hypervisor.path("vsock").exists());
}

#[test]
fn the_machine_goes_with_the_hypervisor() {
    let mut hypervisor = Hypervisor::new(&[]);
    let start = hypervisor.start(Suite::Bookworm);
    let started = hypervisor.begin(start);
    hypervisor.process.kill().unwrap();
    hypervisor.wait();
    eventually("QEMU ends", || !is_there(started.pid));
    // What it has left is in nobody's way.
    let mut next = Hypervisor::new(&[]);
    let start = Start {
        vsock_path: hypervisor.path("vsock").to_str().unwrap().into(),
        ..next.start(Suite::Bookworm)
    };
    next.begin(start);
    next.done(Verb::Stop(Stop {}));
}

#[test]
fn garbage_ends_the_machine() {
    let garbage: [&[u8]; 4] = [
        // A length beyond the limit, no message, a message with id 0, and another protocol.
        &[0xff, 0xff, 0xff, 0x7f],
        &[3, 0, 0, 0, 0xff, 0xff, 0xff],
        &[0, 0, 0, 0],
        b"GET / HTTP/1.1\r\nHost: localhost\r\n\r\n",
    ];
    for bytes in garbage {
        let mut hypervisor = Hypervisor::new(&[]);
        let start = hypervisor.start(Suite::Bookworm);
        let started = hypervisor.begin(start);
        hypervisor.write(bytes);
        hypervisor.finish(started.pid);
    }
}

#[test]
fn requests_have_their_time() {
    let mut hypervisor = Hypervisor::new(&[]);
    assert_eq!(hypervisor.refused(Verb::SetCpus(SetCpus { count: 2 })).0, ErrorCode::WrongState);
    assert_eq!(hypervisor.refused(Verb::Check(Check {})).0, ErrorCode::WrongState);
    let start = hypervisor.start(Suite::Bookworm);
    let started = hypervisor.begin(start.clone());
    assert_eq!(hypervisor.refused(Verb::Start(start)).0, ErrorCode::WrongState);
    hypervisor.done(Verb::Check(Check {}));
    assert_eq!(hypervisor.refused(Verb::SetCpus(SetCpus { count: 2 })).0, ErrorCode::Invalid);
    let bytes = 512 << 20;
    assert_eq!(hypervisor.refused(Verb::SetMemory(SetMemory { bytes })).0, ErrorCode::Unsupported);
    hypervisor.done(Verb::Stop(Stop {}));
    hypervisor.finish(started.pid);

    let mut hypervisor = Hypervisor::new(&[]);
    hypervisor.done(Verb::Stop(Stop {}));
    assert!(hypervisor.wait().success());

    // Stopped while it starts: both are answered.
    let mut hypervisor = Hypervisor::new(&[]);
    let start = hypervisor.start(Suite::Bookworm);
    let starting = hypervisor.send(Verb::Start(start));
    let stopping = hypervisor.send(Verb::Stop(Stop {}));
    hypervisor.answer(stopping).unwrap();
    if let Err(error) = hypervisor.answer(starting) {
        assert_eq!(error.code(), ErrorCode::WrongState);
    }
    assert!(hypervisor.wait().success());
}

/// Makes a request wrong; gets the path of a file that is none of what is asked for.
type Change = Box<dyn Fn(Start, &str) -> Start>;

/// Errors name what is wrong, and nothing is left of the attempt.
#[test]
fn a_machine_that_cannot_be_made_is_an_error() {
    let fresh = || {
        let hypervisor = Hypervisor::new(&[]);
        let start = hypervisor.start(Suite::Bookworm);
        fs::write(hypervisor.path("text"), "no kernel\n").unwrap();
        let text = hypervisor.path("text").to_str().unwrap().to_owned();
        (hypervisor, start, text)
    };
    let network = Network {
        namespace: "/proc/self/ns/net".into(),
        tap: "no-such-tap".into(),
        hardware_address: "02:00:00:00:00:01".into(),
        mtu: 0,
    };
    let cases: Vec<(&str, Change)> = vec![
        (
            "open the kernel /nowhere: No such file",
            Box::new(|start, _| Start { kernel: "/nowhere".into(), ..start }),
        ),
        (
            "open the initramfs /tmp: it is no regular",
            Box::new(|start, _| Start { initramfs: "/tmp".into(), ..start }),
        ),
        ("start QEMU: ", Box::new(|start, text| Start { kernel: text.into(), ..start })),
        ("as run_dir: it is no directory", Box::new(|start, text| Start { run_dir: text.into(), ..start })),
        (
            "/nowhere/vsock: No such file",
            Box::new(|start, _| Start { vsock_path: "/nowhere/vsock".into(), ..start }),
        ),
        ("start /nowhere: No such file", Box::new(|start, _| Start { program: "/nowhere".into(), ..start })),
        (
            "start QEMU: QEMU ended with exit code",
            Box::new(|start, _| Start { program: "/bin/false".into(), ..start }),
        ),
        (
            "join the cgroup: No such file",
            Box::new(|start, _| Start { cgroup_procs: vec!["/nowhere/cgroup.procs".into()], ..start }),
        ),
        (
            "file server of share pod at /nowhere",
            Box::new(|start, _| {
                let share = Share { tag: "pod".into(), socket_path: "/nowhere".into() };
                Start { shares: vec![share], ..start }
            }),
        ),
        (
            "open disk one at /dev/null: it is neither",
            Box::new(|start, _| {
                let disk = Disk { serial: "one".into(), path: "/dev/null".into(), read_only: true };
                Start { disks: vec![disk], ..start }
            }),
        ),
        (
            "open tap no-such-tap in network namespace /proc/self/ns/net: No such device",
            Box::new(move |start, _| Start { networks: vec![network.clone()], ..start }),
        ),
        (
            "write the console to /nowhere/log",
            Box::new(|start, _| Start { console_path: "/nowhere/log".into(), ..start }),
        ),
    ];
    for (expected, change) in cases {
        let (mut hypervisor, start, text) = fresh();
        let (code, detail) = hypervisor.refused(Verb::Start(change(start, &text)));
        assert_eq!(code, ErrorCode::Failed, "{detail}");
        assert!(detail.contains(expected), "{expected} is not in: {detail}");
        assert!(!hypervisor.path("vsock").exists(), "{expected}");
        assert_eq!(fs::read_dir(hypervisor.path("run")).unwrap().count(), 0);
    }
    let (mut hypervisor, start, text) = fresh();
    assert_eq!(
        hypervisor.refused(Verb::Start(Start { memory: 1000, ..start.clone() })).0,
        ErrorCode::Invalid
    );
    fs::set_permissions(hypervisor.path("text"), fs::Permissions::from_mode(0o600)).unwrap();
    let (_, detail) = hypervisor.refused(Verb::Start(Start { initramfs: text, ..start }));
    assert!(detail.contains("may not read it"), "{detail}");
}

/// What QEMU could still do if the guest had taken it over, tried by a program in its place.
#[test]
fn what_takes_qemus_place_can_do_little() {
    let mut hypervisor = Hypervisor::new(&[]);
    let start = hypervisor.start(Suite::Bookworm);
    let listener = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
    // Where its user can get at it.
    let directory = tempfile::tempdir().unwrap();
    fs::set_permissions(directory.path(), fs::Permissions::from_mode(0o777)).unwrap();
    let program = directory.path().join("prisoner");
    let source = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/prisoner.c");
    let mut compiler = std::process::Command::new("cc");
    let port = format!("-DPORT={}", listener.local_addr().unwrap().port());
    compiler.args(["-static", "-Os", "-Wall", "-Werror", &port, "-o"]).arg(&program).arg(source);
    assert!(compiler.status().unwrap().success());
    fs::set_permissions(&program, fs::Permissions::from_mode(0o755)).unwrap();

    let program = program.to_str().unwrap().to_owned();
    let (_, detail) = hypervisor.refused(Verb::Start(Start { program, ..start }));
    for expected in [
        "read /etc/passwd: Permission denied",
        "list /: Permission denied",
        "list /proc: Permission denied",
        "write /tmp/prisoner: Permission denied",
        "read /usr/bin/env: possible",
        "connect to the host: Permission denied",
        "become root: Operation not permitted",
        "mount: Operation not permitted",
        "trace the parent: Operation not permitted",
    ] {
        assert!(detail.contains(expected), "{expected} is not in: {detail}");
    }
}

/// Its user may use KVM, whoever the device belongs to. Whether a kernel runs on it is another matter.
#[test]
fn kvm_is_not_refused() {
    let mut hypervisor = Hypervisor::new(&[]);
    let start = Start { emulate: false, ..hypervisor.start(Suite::Bookworm) };
    if let Err(error) = hypervisor.ask(Verb::Start(start)) {
        assert!(!error.detail.contains("Permission denied"), "{error:?}");
    }
}

/// A client that comes before the guest has a driver waits, and is let go with the machine.
#[test]
fn a_client_goes_with_the_machine() {
    let mut hypervisor = Hypervisor::new(&[]);
    let start = hypervisor.start(Suite::Bookworm);
    let started = hypervisor.begin(start);
    let mut early = std::os::unix::net::UnixStream::connect(hypervisor.path("vsock")).unwrap();
    std::io::Write::write_all(&mut early, b"CONNECT 1024\n").unwrap();
    hypervisor.done(Verb::Stop(Stop {}));
    let mut rest = Vec::new();
    let _ = early.read_to_end(&mut rest);
    assert!(rest.is_empty());
    hypervisor.finish(started.pid);
}
