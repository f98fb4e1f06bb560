//! Machines that are changed while they run.
#![allow(missing_docs)]

#[path = "../../hypervisor/tests/lab/mod.rs"]
mod lab;

/// The program under test.
const PROGRAM: &str = env!("CARGO_BIN_EXE_podvisor-qemu");

use std::fs;

use lab::{Hypervisor, Namespace, Suite, eventually};
use podvisor_proto::hypervisor::{
    AddDisk, AddImage, AddNetwork, AddShare, Disk, ErrorCode, Image, Network, RemoveDisk, RemoveImage,
    RemoveNetwork, SetCpus, SetMemory, Share, Start, Stop, reply, request::Verb,
};

const MIB: u64 = 1 << 20;

fn add_disk(hypervisor: &Hypervisor, serial: &str, read_only: bool) -> Verb {
    let path = hypervisor.path(serial).to_str().unwrap().to_owned();
    Verb::AddDisk(AddDisk { disk: Some(Disk { serial: serial.into(), path, read_only }) })
}

fn remove_disk(serial: &str) -> Verb {
    Verb::RemoveDisk(RemoveDisk { serial: serial.into() })
}

/// With disk images `first` and `second` that can be plugged.
fn growing(suite: Suite) -> (Hypervisor, i32) {
    let mut hypervisor = Hypervisor::new(&[]);
    for name in ["first", "second"] {
        let mut content = format!("content of {name}").into_bytes();
        content.resize(1 << 20, 0);
        fs::write(hypervisor.path(name), content).unwrap();
    }
    let mut start = Start { memory_limit: 512 * MIB, cpus_limit: 3, ..hypervisor.start(suite) };
    let path = hypervisor.path("first").to_str().unwrap().to_owned();
    start.disks.push(Disk { serial: "first".into(), path, read_only: true });
    let started = hypervisor.begin(start);
    assert!(started.adds_disks && started.adds_networks && started.adds_shares, "{started:?}");
    assert_eq!((started.memory_limit, started.cpus_limit), (512 * MIB, 3));
    (hypervisor, started.pid)
}

fn appears(hypervisor: &Hypervisor, question: &str) -> String {
    eventually(question, || hypervisor.tell(question) != "none");
    hypervisor.tell(question)
}

#[test]
fn devices_come_and_go() {
    let namespace = Namespace::new("changes");
    let (mut hypervisor, machine) = growing(Suite::Bookworm);
    assert_eq!(appears(&hypervisor, "disk first"), "vda");

    // Twice, as the second is another device in the same place.
    for _ in 0..2 {
        hypervisor.done(add_disk(&hypervisor, "second", false));
        let device = appears(&hypervisor, "disk second");
        assert!(hypervisor.tell(&format!("read /dev/{device}")).starts_with("content of second"));
        hypervisor.done(remove_disk("second"));
        assert_eq!(hypervisor.tell("disk second"), "none");
    }
    // What the machine was started with goes, too.
    hypervisor.done(remove_disk("first"));
    assert_eq!(hypervisor.tell("disk first"), "none");
    assert_eq!(hypervisor.refused(remove_disk("first")).0, ErrorCode::NotFound);

    let hardware_address = "02:00:00:00:00:2b";
    let network = Network {
        namespace: namespace.path(),
        tap: "tap0".into(),
        hardware_address: hardware_address.into(),
        mtu: 1400,
    };
    hypervisor.done(Verb::AddNetwork(AddNetwork { network: Some(network.clone()) }));
    let interface = appears(&hypervisor, &format!("address {hardware_address}"));
    assert_eq!(hypervisor.tell(&format!("read /sys/class/net/{interface}/mtu")), "1400");
    assert_eq!(
        hypervisor.refused(Verb::AddNetwork(AddNetwork { network: Some(network.clone()) })).0,
        ErrorCode::Invalid
    );
    let remove = RemoveNetwork { hardware_address: hardware_address.into() };
    hypervisor.done(Verb::RemoveNetwork(remove));
    // The tap is free again.
    hypervisor.done(Verb::AddNetwork(AddNetwork { network: Some(network) }));

    // What QEMU refuses leaves nothing: two that write to one file.
    hypervisor.done(add_disk(&hypervisor, "second", false));
    let (mut again, name) = (add_disk(&hypervisor, "second", false), "again");
    if let Verb::AddDisk(AddDisk { disk: Some(disk) }) = &mut again {
        disk.serial = name.into();
    }
    let (code, detail) = hypervisor.refused(again);
    assert_eq!(code, ErrorCode::Failed);
    assert!(detail.contains("plug disk again") && detail.contains("lock"), "{detail}");
    let missing = Share { tag: "pod".into(), socket_path: "/nowhere".into() };
    assert_eq!(hypervisor.refused(Verb::AddShare(AddShare { share: Some(missing) })).0, ErrorCode::Failed);
    hypervisor.done(remove_disk("second"));
    hypervisor.done(add_disk(&hypervisor, "second", true));
    appears(&hypervisor, "disk second");

    hypervisor.done(Verb::Stop(Stop {}));
    hypervisor.finish(machine);
}

fn total_memory(hypervisor: &Hypervisor) -> u64 {
    let text = hypervisor.tell("read /proc/meminfo");
    let line = text.lines().find(|line| line.starts_with("MemTotal:")).unwrap();
    line.split_whitespace().nth(1).unwrap().parse::<u64>().unwrap() * 1024
}

fn set_memory(hypervisor: &mut Hypervisor, mib: u64) {
    match hypervisor.ask(Verb::SetMemory(SetMemory { bytes: mib * MIB })) {
        Ok(reply::Result::Resized(is)) => assert_eq!(is.memory, mib * MIB),
        other => panic!("expected Resized, got {other:?}"),
    }
}

#[test]
fn memory_and_processors_grow_and_shrink() {
    let (mut hypervisor, machine) = growing(Suite::Backports);
    let before = total_memory(&hypervisor);
    assert_eq!(hypervisor.tell("load virtio_mem"), "ok");
    set_memory(&mut hypervisor, 512);
    let grown = total_memory(&hypervisor);
    assert!(grown > before + 240 * MIB, "{before} {grown}");
    set_memory(&mut hypervisor, 256);
    assert_eq!(total_memory(&hypervisor), before);
    assert_eq!(hypervisor.refused(Verb::SetMemory(SetMemory { bytes: 128 * MIB })).0, ErrorCode::Invalid);

    hypervisor.done(Verb::SetCpus(SetCpus { count: 3 }));
    // That many may be used; that they are is the agent's doing.
    assert_eq!(hypervisor.tell("read /sys/devices/system/cpu/online"), "0");
    for number in [1, 2] {
        let online = format!("/sys/devices/system/cpu/cpu{number}/online");
        assert_eq!(hypervisor.tell(&format!("write {online} 1")), "ok");
    }
    assert_eq!(hypervisor.tell("read /sys/devices/system/cpu/online"), "0-2");
    assert_eq!(hypervisor.tell("write /sys/devices/system/cpu/cpu2/online 0"), "ok");
    hypervisor.done(Verb::SetCpus(SetCpus { count: 2 }));
    assert_eq!(hypervisor.refused(Verb::SetCpus(SetCpus { count: 4 })).0, ErrorCode::Invalid);
    hypervisor.done(Verb::Stop(Stop {}));
    hypervisor.finish(machine);
}

/// A change that waits for the guest is answered when the machine ends.
#[test]
fn nobody_waits_for_a_machine_that_is_gone() {
    let (mut hypervisor, machine) = growing(Suite::Bookworm);
    // The guest has no driver for it yet.
    let memory = hypervisor.send(Verb::SetMemory(SetMemory { bytes: 512 * MIB }));
    let disk = hypervisor.send(remove_disk("first"));
    hypervisor.done(Verb::Stop(Stop {}));
    for request in [memory, disk] {
        assert_eq!(hypervisor.answer(request).unwrap_err().code(), ErrorCode::WrongState);
    }
    hypervisor.finish(machine);
}

/// Files one after the other, which the guest reads as one disk; what they hold is nobody's description.
#[test]
fn images_are_joined() {
    let (mut hypervisor, _machine) = growing(Suite::Bookworm);
    let text =
        "# Disk DescriptorFile\nversion=1\ncreateType=\"monolithicFlat\"\nRW 8 FLAT \"/etc/passwd\" 0\n";
    let file = |name: &str, content: &str, length: usize| {
        let path = hypervisor.path(name);
        let mut bytes = content.as_bytes().to_vec();
        bytes.resize(length, 0);
        fs::write(&path, bytes).unwrap();
        path.to_str().unwrap().to_owned()
    };
    let paths = vec![file("metadata", "QFI\u{fb}", 8192), file("nothing", "", 0), file("blob", text, 4096)];
    let image = |disk| Image { serial: "image-1".into(), paths: paths.clone(), disk };
    let add = |disk| Verb::AddImage(AddImage { image: Some(image(disk)) });
    assert_eq!(hypervisor.refused(add(false)).0, ErrorCode::Unsupported);
    for _ in 0..2 {
        hypervisor.done(add(true));
        let device = appears(&hypervisor, "disk image-1");
        assert_eq!(hypervisor.tell(&format!("read /sys/block/{device}/size")), "24");
        assert_eq!(hypervisor.tell(&format!("read /sys/block/{device}/ro")), "1");
        assert!(hypervisor.tell(&format!("read /dev/{device}")).starts_with("QFI"));
        hypervisor.done(Verb::RemoveImage(RemoveImage { serial: "image-1".into() }));
        assert_eq!(hypervisor.tell("disk image-1"), "none");
    }
    hypervisor.done(Verb::Stop(Stop {}));
}
