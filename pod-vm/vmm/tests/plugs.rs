//! Devices that come and go while a machine runs, on real KVM.
#![allow(missing_docs)]

#[path = "../../hypervisor/tests/lab/mod.rs"]
mod lab;

/// The program under test.
const PROGRAM: &str = env!("CARGO_BIN_EXE_podvisor-vmm");

use std::fs;
use std::io::{Read, Write};
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU32, Ordering};

use lab::{FileServer, Hypervisor, Namespace, Suite, eventually};
use podvisor_proto::hypervisor::{
    AddDisk, AddNetwork, AddShare, Check, Disk, ErrorCode, Network, RemoveDisk, RemoveNetwork, RemoveShare,
    Share, Start, Stop, reply, request::Verb,
};

/// How often each kind of device comes and goes.
const ROUNDS: u32 = 100;
const ADDRESS: &str = "02:00:00:00:00:2b";

/// What the other tests start from, made where it is quick.
#[test]
fn guests_are_made() {
    assert!(lab::guest(Suite::Bookworm).kernel.is_file());
}

fn disk(hypervisor: &Hypervisor, serial: &str) -> Disk {
    let path = hypervisor.path(serial);
    let mut content = format!("content of {serial}").into_bytes();
    content.resize(1 << 20, 0);
    fs::write(&path, content).unwrap();
    Disk { serial: serial.into(), path: path.to_str().unwrap().into(), read_only: false }
}

fn add_disk(disk: &Disk) -> Verb {
    Verb::AddDisk(AddDisk { disk: Some(disk.clone()) })
}

fn remove_disk(serial: &str) -> Verb {
    Verb::RemoveDisk(RemoveDisk { serial: serial.into() })
}

/// A machine that can be plugged into, with a disk from the start.
fn machine() -> (Hypervisor, i32) {
    let mut hypervisor = Hypervisor::new(&[]);
    let first = disk(&hypervisor, "first");
    let start = hypervisor.start(Suite::Bookworm);
    let start = Start { emulate: false, plugs: true, disks: vec![first], ..start };
    let started = hypervisor.begin(start);
    assert!(started.adds_disks && started.adds_networks && started.adds_shares, "{started:?}");
    (hypervisor, started.pid)
}

/// The guest looks at its places; gives what it calls the device then.
fn appears(hypervisor: &Hypervisor, question: &str) -> String {
    eventually(question, || {
        hypervisor.tell("bind -");
        hypervisor.tell(question) != "none"
    });
    hypervisor.tell(question)
}

/// Asks for a removal, lets the guest let go of the device, and waits for the answer. The guest does either first.
fn leaves(hypervisor: &mut Hypervisor, verb: Verb, device: &str, guest_first: bool) {
    let unbind = format!("unbind {device}");
    if guest_first {
        assert_eq!(hypervisor.tell(&unbind), "ok");
        return hypervisor.done(verb);
    }
    let request = hypervisor.send(verb);
    assert_eq!(hypervisor.tell(&unbind), "ok");
    assert!(matches!(hypervisor.answer(request), Ok(reply::Result::Done(_))));
}

/// Reads what the guest sends as fast as it can, until it is told to end. Gives how often.
fn load(socket: &Path, ends: &AtomicBool, rounds: &AtomicU32) {
    const BYTES: usize = 1_000_000;
    while !ends.load(Ordering::SeqCst) {
        let mut stream = UnixStream::connect(socket).unwrap();
        stream.set_read_timeout(Some(lab::PATIENCE)).unwrap();
        writeln!(stream, "CONNECT 1024").unwrap();
        let mut line = Vec::new();
        let mut byte = [0];
        while line.last() != Some(&b'\n') {
            stream.read_exact(&mut byte).unwrap();
            line.push(byte[0]);
        }
        writeln!(stream, "source {BYTES}").unwrap();
        let mut got = Vec::new();
        stream.read_to_end(&mut got).unwrap();
        assert_eq!(got.len(), BYTES);
        rounds.fetch_add(1, Ordering::SeqCst);
    }
}

/// Each kind a hundred times, while the guest sends all the time.
#[test]
#[ignore = "runs in the lab: make test-lab"]
fn kvm_plugged_a_hundred_times() {
    let namespace = Namespace::new("plugs");
    let (mut hypervisor, machine) = machine();
    assert_eq!(appears(&hypervisor, "disk first"), "vda");
    let (ends, rounds) = (Arc::new(AtomicBool::new(false)), Arc::new(AtomicU32::new(0)));
    let (their_end, their_rounds, socket) =
        (Arc::clone(&ends), Arc::clone(&rounds), hypervisor.path("vsock"));
    let loaded = std::thread::spawn(move || load(&socket, &their_end, &their_rounds));

    let second = disk(&hypervisor, "second");
    let network = Network {
        namespace: namespace.path(),
        tap: "tap0".into(),
        hardware_address: ADDRESS.into(),
        mtu: 1400,
    };
    for round in 0..ROUNDS {
        let guest_first = round % 2 == 1;
        hypervisor.done(add_disk(&second));
        let device = appears(&hypervisor, "disk second");
        assert!(hypervisor.tell(&format!("read /dev/{device}")).starts_with("content of second"));
        leaves(&mut hypervisor, remove_disk("second"), &format!("/sys/block/{device}/device"), guest_first);
        assert_eq!(hypervisor.tell("disk second"), "none");

        hypervisor.done(Verb::AddNetwork(AddNetwork { network: Some(network.clone()) }));
        let interface = appears(&hypervisor, &format!("address {ADDRESS}"));
        assert_eq!(hypervisor.tell(&format!("read /sys/class/net/{interface}/mtu")), "1400");
        let remove = Verb::RemoveNetwork(RemoveNetwork { hardware_address: ADDRESS.into() });
        leaves(&mut hypervisor, remove, &format!("/sys/class/net/{interface}/device"), guest_first);

        let content = format!("round {round}");
        let server = FileServer::new(&content);
        hypervisor.done(Verb::AddShare(AddShare { share: Some(server.share("more")) }));
        eventually("the guest has the share", || {
            hypervisor.tell("bind -");
            hypervisor.tell("mount virtiofs more /more") == "ok"
        });
        assert_eq!(hypervisor.tell("read /more/file"), content);
        // Whoever has read the file may not have closed it yet.
        eventually("the share is unmounted", || hypervisor.tell("unmount /more") == "ok");
        let drivers = hypervisor.tell("list /sys/bus/virtio/drivers/virtiofs");
        let device = drivers.lines().find(|name| name.starts_with("virtio")).unwrap();
        let remove = Verb::RemoveShare(RemoveShare { tag: "more".into() });
        leaves(&mut hypervisor, remove, &format!("/sys/bus/virtio/devices/{device}"), guest_first);
        hypervisor.done(Verb::Check(Check {}));
    }
    ends.store(true, Ordering::SeqCst);
    loaded.join().unwrap();
    assert!(rounds.load(Ordering::SeqCst) > 0);
    assert!(hypervisor.tell("read /dev/vda").starts_with("content of first"));
    // The guest's kernel has noticed nothing odd.
    let said = hypervisor.console();
    assert!(!said.contains("WARNING") && !said.contains("BUG"), "{said}");
    hypervisor.done(Verb::Stop(Stop {}));
    hypervisor.finish(machine);
}

/// What cannot be done leaves nothing behind.
#[test]
#[ignore = "runs in the lab: make test-lab"]
fn kvm_plugs_that_are_refused() {
    let (mut hypervisor, machine) = machine();
    assert_eq!(hypervisor.refused(remove_disk("second")).0, ErrorCode::NotFound);
    assert_eq!(hypervisor.refused(Verb::AddDisk(AddDisk { disk: None })).0, ErrorCode::Invalid);
    let first = disk(&hypervisor, "first");
    assert_eq!(hypervisor.refused(add_disk(&first)).0, ErrorCode::Invalid);
    let nowhere = Disk { path: "/nowhere/at/all".into(), serial: "nowhere".into(), read_only: true };
    assert_eq!(hypervisor.refused(add_disk(&nowhere)).0, ErrorCode::Failed);
    // Something that is no file server.
    let (path, tag) = (hypervisor.path("deaf"), "deaf");
    let listener = std::os::unix::net::UnixListener::bind(&path).unwrap();
    let closes = std::thread::spawn(move || drop(listener.accept().unwrap()));
    let share = Share { tag: tag.into(), socket_path: path.to_str().unwrap().into() };
    let (code, detail) = hypervisor.refused(Verb::AddShare(AddShare { share: Some(share) }));
    assert!(code == ErrorCode::Failed && detail.contains("plug deaf"), "{detail}");
    closes.join().unwrap();
    // One that says nothing.
    fs::remove_file(&path).unwrap();
    let _listener = std::os::unix::net::UnixListener::bind(&path).unwrap();
    let share = Share { tag: tag.into(), socket_path: path.to_str().unwrap().into() };
    assert_eq!(hypervisor.refused(Verb::AddShare(AddShare { share: Some(share) })).0, ErrorCode::Failed);
    hypervisor.done(Verb::Check(Check {}));

    // All places, and one more.
    let mut disks = Vec::new();
    let refused = loop {
        let disk = disk(&hypervisor, &format!("disk{}", disks.len()));
        match hypervisor.ask(add_disk(&disk)) {
            Ok(_) => disks.push(disk.serial),
            Err(error) => break error,
        }
    };
    assert_eq!((disks.len(), refused.code()), (15, ErrorCode::Unsupported), "{refused:?}");
    let last = appears(&hypervisor, "disk disk14");
    assert!(hypervisor.tell(&format!("read /dev/{last}")).starts_with("content of disk14"));

    // Those that the guest does not let go of stay, and work; it can be tried again.
    let requests: Vec<u64> = ["first", "disk14"].map(|serial| hypervisor.send(remove_disk(serial))).into();
    assert_eq!(hypervisor.refused(remove_disk("first")).0, ErrorCode::Invalid);
    hypervisor.done(Verb::Check(Check {}));
    for request in requests {
        let error = hypervisor.answer(request).unwrap_err();
        assert!(error.code() == ErrorCode::Failed && error.detail.contains("let go"), "{error:?}");
    }
    assert!(hypervisor.tell(&format!("read /dev/{last}")).starts_with("content of disk14"));
    leaves(&mut hypervisor, remove_disk("disk14"), &format!("/sys/block/{last}/device"), false);
    hypervisor.done(Verb::Stop(Stop {}));
    hypervisor.finish(machine);
}
