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
use std::process::Command;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU32, Ordering};

use lab::{FileServer, Hypervisor, Namespace, Suite, eventually};
use podvisor_proto::hypervisor::{
    AddDisk, AddImage, AddNetwork, AddShare, Check, Disk, ErrorCode, Image, Network, RemoveDisk, RemoveImage,
    RemoveNetwork, RemoveShare, Share, Start, Stop, reply, request::Verb,
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

/// A file system with one file of that content, of whole pages, and another file behind it.
fn image(hypervisor: &Hypervisor, serial: &str, content: &[u8]) -> Image {
    let directory = hypervisor.path(&format!("{serial}.tree"));
    fs::create_dir(&directory).unwrap();
    fs::write(directory.join("file"), content).unwrap();
    let paths = [hypervisor.path(&format!("{serial}.erofs")), hypervisor.path(&format!("{serial}.more"))];
    let made = Command::new("mkfs.erofs").arg("--quiet").arg(&paths[0]).arg(&directory).output().unwrap();
    assert!(made.status.success(), "{made:?}");
    fs::write(&paths[1], format!("more of {serial}")).unwrap();
    let paths = paths.map(|path| path.to_str().unwrap().to_owned());
    Image { serial: serial.into(), paths: paths.into(), disk: false }
}

fn add_image(image: &Image) -> Verb {
    Verb::AddImage(AddImage { image: Some(image.clone()) })
}

fn remove_image(serial: &str) -> Verb {
    Verb::RemoveImage(RemoveImage { serial: serial.into() })
}

/// A machine that can be plugged into, with a disk from the start.
fn machine() -> (Hypervisor, i32) {
    let mut hypervisor = Hypervisor::new(&[]);
    let first = disk(&hypervisor, "first");
    let start = hypervisor.start(Suite::Bookworm);
    let start = Start { emulate: false, plugs: true, disks: vec![first], ..start };
    let started = hypervisor.begin(start);
    assert!(started.adds_disks && started.adds_networks && started.adds_shares, "{started:?}");
    assert!(started.adds_images && started.adds_image_disks, "{started:?}");
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
    for module in ["virtio_pmem", "nd_pmem", "erofs"] {
        assert_eq!(hypervisor.tell(&format!("load {module}")), "ok");
    }
    let content = "x".repeat(8192);
    let third = image(&hypervisor, "third", content.as_bytes());
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

        hypervisor.done(add_image(&third));
        let device = appears(&hypervisor, "image third");
        assert_eq!(hypervisor.tell(&format!("dax /dev/{device} /image")), "ok");
        assert_eq!(hypervisor.tell("read /image/file"), content);
        eventually("the image is unmounted", || hypervisor.tell("unmount /image") == "ok");
        leaves(&mut hypervisor, remove_image("third"), &format!("/sys/block/{device}/device"), guest_first);
        assert_eq!(hypervisor.tell("image third"), "none");

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

/// Files of the host's in the guest's memory: what the guest reads is there, what it writes is not, and other devices read it too.
#[test]
#[ignore = "runs in the lab: make test-lab"]
fn kvm_images_are_read_where_they_are() {
    const PAGES: usize = 64;
    let (mut hypervisor, machine) = machine();
    for module in ["virtio_pmem", "nd_pmem", "erofs"] {
        assert_eq!(hypervisor.tell(&format!("load {module}")), "ok");
    }
    let content: Vec<u8> = (0..=250u8).cycle().take(PAGES * 4096).collect();
    let one = image(&hypervisor, "one", &content);
    let other = image(&hypervisor, "other", &vec![b'y'; 4096]);
    for image in [&one, &other] {
        hypervisor.done(add_image(image));
    }
    let devices = ["one", "other"].map(|name| appears(&hypervisor, &format!("image {name}")));
    assert_ne!(devices[0], devices[1]);
    assert_eq!(hypervisor.tell(&format!("dax /dev/{} /one", devices[0])), "ok");
    assert_eq!(hypervisor.tell(&format!("dax /dev/{} /other", devices[1])), "ok");
    let sum: u64 = content.iter().map(|byte| u64::from(*byte)).sum();
    assert_eq!(hypervisor.tell("sum /one/file"), format!("{} {sum}", content.len()));
    assert_eq!(hypervisor.tell("sum /other/file"), format!("4096 {}", 4096 * u64::from(b'y')));

    // A disk gets what is in the image without a copy in the guest.
    let disk = appears(&hypervisor, "disk first");
    assert_eq!(hypervisor.tell(&format!("direct /one/file /dev/{disk}")), "ok");
    assert!(fs::read(hypervisor.path("first")).unwrap().starts_with(&content));
    // The other way round is refused, if the guest's kernel tries: nothing of the file changes.
    let before = fs::read(&one.paths[0]).unwrap();
    hypervisor.tell(&format!("direct /dev/{disk} /dev/{}", devices[0]));
    hypervisor.tell(&format!("write /dev/{} nonsense", devices[0]));
    hypervisor.tell("sync -");
    assert_eq!(fs::read(&one.paths[0]).unwrap(), before);
    hypervisor.done(Verb::Check(Check {}));

    // Both are the host's pages, of which the machine has no copy.
    let maps = fs::read_to_string(format!("/proc/{machine}/maps")).unwrap();
    let mapped: Vec<&str> = maps.lines().filter(|line| line.contains(".erofs")).collect();
    assert!(mapped.len() == 2 && mapped.iter().all(|line| line.contains("r--s")), "{maps}");

    // Files as one disk.
    let paths = ["head", "tail"].map(|name| {
        fs::write(hypervisor.path(name), name.repeat(1024)).unwrap();
        hypervisor.path(name).to_str().unwrap().to_owned()
    });
    let joined = Image { serial: "joined".into(), paths: paths.into(), disk: true };
    hypervisor.done(add_image(&joined));
    let disk = appears(&hypervisor, "disk joined");
    assert_eq!(hypervisor.tell(&format!("read /sys/block/{disk}/size")), "16");
    let bytes: u64 = "headtail".bytes().map(|byte| u64::from(byte) * 1024).sum();
    assert_eq!(hypervisor.tell(&format!("sum /dev/{disk}")), format!("8192 {bytes}"));
    leaves(&mut hypervisor, remove_image("joined"), &format!("/sys/block/{disk}/device"), false);
    let odd = Image { paths: vec![hypervisor.path("odd").to_str().unwrap().into()], ..joined };
    fs::write(&odd.paths[0], "odd").unwrap();
    assert_eq!(hypervisor.refused(add_image(&odd)).0, ErrorCode::Failed);

    assert_eq!(hypervisor.refused(add_image(&one)).0, ErrorCode::Invalid);
    assert_eq!(hypervisor.refused(remove_image("third")).0, ErrorCode::NotFound);
    let none = Image { serial: "none".into(), paths: Vec::new(), disk: false };
    assert_eq!(hypervisor.refused(add_image(&none)).0, ErrorCode::Invalid);
    let nowhere = Image { serial: "nowhere".into(), paths: vec!["/nowhere/at/all".into()], disk: false };
    assert_eq!(hypervisor.refused(add_image(&nowhere)).0, ErrorCode::Failed);
    // One that no address is left for.
    let path = hypervisor.path("endless");
    fs::File::create(&path).unwrap().set_len(1 << 42).unwrap();
    let endless = Image { serial: "endless".into(), paths: vec![path.to_str().unwrap().into()], disk: false };
    let (code, detail) = hypervisor.refused(add_image(&endless));
    assert!(code != ErrorCode::Unspecified, "{detail}");
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
