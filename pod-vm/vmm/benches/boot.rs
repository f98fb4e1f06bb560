//! How long a machine of podvisor-vmm's takes to its guest's first process and to a vsock connection that is accepted, what it leaves the guest for
//! (KVM's exits), and how much memory it has of its own; beside QEMU's microvm and q35 on KVM, which podvisor-qemu starts. Rounds are interleaved.
//!
//! QEMU's microvm is there twice, with virtio-mmio and with virtio-pci (MSI-X): what tells these two apart is the transport alone.
//!
//! Without an argument it makes the guests alone: that is quick outside of the lab. With one it measures so many rounds, and then once what images and
//! what is written cost; it has to run where KVM works, and nothing else may use KVM.
#![allow(missing_docs)]

#[path = "../../hypervisor/tests/lab/mod.rs"]
mod lab;
#[path = "boot/network.rs"]
mod network;
#[path = "boot/pages.rs"]
mod pages;
#[path = "boot/writes.rs"]
mod writes;

/// The program under test.
const PROGRAM: &str = env!("CARGO_BIN_EXE_podvisor-vmm");

use std::fs;
use std::io::{BufRead, BufReader};
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::{Duration, Instant};

use lab::{Hypervisor, Namespace, Suite, built, guest, target};
use podvisor_proto::agent::CONTROL_PORT;
use podvisor_proto::hypervisor::{Disk, Start, Stop, request::Verb};

/// What makes machines, and how it is asked for them.
const MAKERS: [Maker; 4] = [
    Maker { name: "podvisor-vmm", program: "podvisor-vmm", arguments: &[], pci: false },
    Maker {
        name: "QEMU microvm",
        program: "podvisor-qemu",
        arguments: &["--machine", "microvm"],
        pci: false,
    },
    Maker { name: "microvm, PCI", program: "podvisor-qemu", arguments: &["--machine", "microvm"], pci: true },
    Maker { name: "QEMU q35", program: "podvisor-qemu", arguments: &["--machine", "q35"], pci: false },
];
/// Starts QEMU's microvm with the same devices on PCI. Without a program for its firmware to boot from the network with.
const ON_PCI: &str = r#"#!/bin/bash
words=()
for word; do
    word=${word/pcie=off/pcie=on}
    word=${word/\"virtio-net-device\"/\"virtio-net-pci\",\"romfile\":\"\"}
    words+=("${word//-device\"/-pci\"}")
done
exec qemu-system-x86_64 "${words[@]}"
"#;

struct Maker {
    name: &'static str,
    program: &'static str,
    arguments: &'static [&'static str],
    /// With [`ON_PCI`] in the place of QEMU.
    pci: bool,
}

impl Maker {
    fn begin(&self, on_pci: &Path) -> (Hypervisor, String) {
        let program = if self.pci { on_pci.to_str().unwrap().to_owned() } else { String::new() };
        (Hypervisor::of(&built(self.program), self.arguments), program)
    }
}
const MEMORY: u64 = 256 << 20;
/// Of the disk that is read past the guest's page cache, bytes.
const DISK: usize = 32 << 20;
const KVM: &str = "/sys/kernel/debug/kvm";

/// Figures of one maker, each with a value for each round.
type Figures = Vec<(&'static str, Vec<f64>)>;

fn add(figures: &mut Figures, name: &'static str, value: f64) {
    match figures.iter_mut().find(|(known, _)| *known == name) {
        Some((_, values)) => values.push(value),
        None => figures.push((name, vec![value])),
    }
}

fn milliseconds(time: Duration) -> f64 {
    time.as_secs_f64() * 1000.0
}

/// What KVM has counted of the machines that there are.
fn counted(name: &str) -> f64 {
    fs::read_to_string(format!("{KVM}/{name}")).map_or(0.0, |text| text.trim().parse().unwrap())
}

/// Exits and interrupts so far, or in a time.
#[derive(Clone, Copy)]
struct Count {
    exits: f64,
    interrupts: f64,
}

impl Count {
    fn now() -> Self {
        Self { exits: counted("exits"), interrupts: counted("irq_injections") }
    }

    fn since(self) -> Self {
        let now = Self::now();
        Self { exits: now.exits - self.exits, interrupts: now.interrupts - self.interrupts }
    }
}

/// Private memory in KiB: of mappings as large as the guest's, or of all others.
fn memory_of(pid: i32, of_guest: bool) -> f64 {
    let maps = fs::read_to_string(format!("/proc/{pid}/smaps")).unwrap();
    let (mut guests, mut sum) = (false, 0);
    for line in maps.lines() {
        let mut words = line.split_ascii_whitespace();
        let first = words.next().unwrap_or_default();
        if let Some((begin, end)) = first.split_once('-').filter(|_| !first.ends_with(':')) {
            let number = |text: &str| u64::from_str_radix(text, 16).unwrap();
            guests = number(end) - number(begin) >= MEMORY;
        } else if first.starts_with("Private_") && guests == of_guest {
            sum += words.next().unwrap().parse::<u32>().unwrap();
        }
    }
    f64::from(sum)
}

/// Asks until something is so. The pause is short beside what is measured, and long beside what a look costs.
fn wait(mut holds: impl FnMut() -> bool) {
    let deadline = Instant::now() + lab::PATIENCE;
    while !holds() {
        assert!(Instant::now() < deadline, "it takes too long");
        std::thread::sleep(Duration::from_millis(2));
    }
}

/// Has the host keep a guest's files in its page cache, as on a node that has started a machine with them before: in the lab they come by a file
/// server, and to read them anew has taken up to 2 s.
fn warm(files: [&Path; 2]) {
    for file in files {
        std::io::copy(&mut fs::File::open(file).unwrap(), &mut std::io::sink()).unwrap();
    }
}

/// Requests that a guest's disk has completed.
fn requests(hypervisor: &Hypervisor, disk: &str) -> f64 {
    let text = hypervisor.tell(&format!("read /sys/block/{disk}/stat"));
    text.split_whitespace().next().unwrap().parse().unwrap()
}

/// With the tests' first process, which says when it begins, and a disk.
fn small(maker: &Maker, image: &Path, on_pci: &Path, figures: &mut Figures) {
    let namespace = Namespace::new("bench");
    let made = guest(Suite::Bookworm);
    warm([&made.kernel, &made.initramfs]);
    let began = Instant::now();
    let (mut hypervisor, program) = maker.begin(on_pci);
    let disk = Disk { serial: "disk".into(), path: image.to_str().unwrap().into(), read_only: true };
    let start =
        Start { emulate: false, memory: MEMORY, disks: vec![disk], ..hypervisor.start(Suite::Bookworm) };
    let start = Start { networks: vec![network::network(&namespace)], program, ..start };
    let started = hypervisor.begin(start);
    add(figures, "exec to the processors run (ms)", milliseconds(began.elapsed()));
    wait(|| hypervisor.console().contains("test: begins"));
    add(figures, "exec to the first process (ms)", milliseconds(began.elapsed()));
    add(figures, "exits to there", counted("exits"));
    wait(|| hypervisor.connect(1024).is_some());
    add(figures, "exec to when that listens (ms)", milliseconds(began.elapsed()));
    for (name, file) in [
        ("exits to there, all", "exits"),
        ("  for registers in memory", "mmio_exits"),
        ("  for ports", "io_exits"),
        ("  for want of work", "halt_exits"),
        ("  interrupts injected", "irq_injections"),
    ] {
        add(figures, name, counted(file));
    }
    let found = hypervisor.tell("disk disk");
    let (had, asked) = (Count::now(), requests(&hypervisor, &found));
    let mut reader = BufReader::new(hypervisor.guest(&format!("keep /dev/{found}")));
    let mut line = String::new();
    reader.read_line(&mut line).unwrap();
    assert!(line.starts_with(&format!("{DISK} ")), "{line:?}");
    drop(reader);
    let used = had.since();
    let requests = requests(&hypervisor, &found) - asked;
    add(figures, "exits for each disk request", used.exits / requests);
    add(figures, "interrupts for each disk request", used.interrupts / requests);
    add(figures, "exits for each interrupt of the disk", used.exits / used.interrupts);
    network::measure(&hypervisor, started.pid, &namespace, figures);
    add(figures, "private memory (KiB)", memory_of(started.pid, false));
    hypervisor.done(Verb::Stop(Stop {}));
    hypervisor.finish(started.pid);
}

/// With podvisor-agent, as pods have it.
fn agent(maker: &Maker, on_pci: &Path, figures: &mut Figures) {
    let guest = target().join("guest/guests/current");
    let path =
        |name: &str| -> String { fs::canonicalize(guest.join(name)).unwrap().to_str().unwrap().into() };
    let (kernel, initramfs) = (path("kernel"), path("initramfs"));
    warm([Path::new(&kernel), Path::new(&initramfs)]);
    let began = Instant::now();
    let (mut hypervisor, program) = maker.begin(on_pci);
    let start = Start {
        emulate: false,
        memory: MEMORY,
        kernel,
        initramfs,
        program,
        ..hypervisor.start(Suite::Bookworm)
    };
    let started = hypervisor.begin(start);
    add(figures, "with the agent: to the processors run", milliseconds(began.elapsed()));
    wait(|| hypervisor.connect(CONTROL_PORT).is_some());
    add(figures, "exec to the agent listens (ms)", milliseconds(began.elapsed()));
    add(figures, "exits until the agent listens", counted("exits"));
    hypervisor.done(Verb::Stop(Stop {}));
    hypervisor.finish(started.pid);
}

fn median(mut values: Vec<f64>) -> f64 {
    values.sort_by(f64::total_cmp);
    values[values.len() / 2]
}

/// The program that [`ON_PCI`] is, where a user without rights may run it.
fn on_pci(directory: &Path) -> PathBuf {
    let path = directory.join("programs/qemu");
    fs::create_dir(directory.join("programs")).unwrap();
    fs::write(&path, ON_PCI).unwrap();
    for path in [directory, &directory.join("programs"), &path] {
        fs::set_permissions(path, fs::Permissions::from_mode(0o755)).unwrap();
    }
    path
}

fn main() {
    if std::env::args().nth(1).is_some_and(|word| network::peer(&word)) {
        return;
    }
    guest(Suite::Bookworm);
    let Some(rounds) = std::env::args().skip(1).find_map(|word| word.parse::<usize>().ok()) else { return };
    if !Path::new(KVM).exists() {
        assert!(
            Command::new("mount")
                .args(["-t", "debugfs", "debugfs", "/sys/kernel/debug"])
                .status()
                .unwrap()
                .success()
        );
    }
    let directory = tempfile::tempdir().unwrap();
    let image = directory.path().join("image");
    fs::write(&image, vec![7; DISK]).unwrap();
    let on_pci = on_pci(directory.path());
    if rounds > 0 {
        compare(rounds, &image, &on_pci);
    }
    pages::print(directory.path());
    writes::print(directory.path());
}

/// Measures all makers and prints medians.
fn compare(rounds: usize, image: &Path, on_pci: &Path) {
    let mut figures: [Figures; MAKERS.len()] = Default::default();
    // The first round only warms up.
    for round in 0..=rounds {
        for turn in 0..MAKERS.len() {
            let maker = (round + turn) % MAKERS.len();
            let mut found = Figures::new();
            agent(&MAKERS[maker], on_pci, &mut found);
            small(&MAKERS[maker], image, on_pci, &mut found);
            if round > 0 {
                for (name, values) in found {
                    for value in values {
                        add(&mut figures[maker], name, value);
                    }
                }
            }
        }
    }
    println!("medians of {rounds} rounds, a guest of {} MiB", MEMORY >> 20);
    print!("{:58}", "");
    for Maker { name, .. } in MAKERS {
        print!(" {name:>14}");
    }
    println!();
    for (index, (name, _)) in figures[0].clone().into_iter().enumerate() {
        print!("{name:58}");
        for figures in &figures {
            print!(" {:14.2}", median(figures[index].1.clone()));
        }
        println!();
    }
}
