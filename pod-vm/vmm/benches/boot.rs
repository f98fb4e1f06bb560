//! How long a machine of podvisor-vmm's takes to its guest's first process and to a vsock connection that is accepted, what it leaves the guest for
//! (KVM's exits), and how much memory it has of its own; beside QEMU's microvm and q35 on KVM, which podvisor-qemu starts. Rounds are interleaved.
//!
//! Without an argument it makes the guests alone: that is quick outside of the lab. With one it measures so many rounds; it has to run where KVM
//! works, and nothing else may use KVM.
#![allow(missing_docs)]

#[path = "../../hypervisor/tests/lab/mod.rs"]
mod lab;

/// The program under test.
const PROGRAM: &str = env!("CARGO_BIN_EXE_podvisor-vmm");

use std::fs;
use std::io::{BufRead, BufReader};
use std::path::Path;
use std::process::Command;
use std::time::{Duration, Instant};

use lab::{Hypervisor, Suite, built, guest, target};
use podvisor_proto::agent::CONTROL_PORT;
use podvisor_proto::hypervisor::{Disk, Start, Stop, request::Verb};

/// What makes machines, and how it is asked for them.
const MAKERS: [(&str, &str, &[&str]); 3] = [
    ("podvisor-vmm", "podvisor-vmm", &[]),
    ("QEMU microvm", "podvisor-qemu", &["--machine", "microvm"]),
    ("QEMU q35", "podvisor-qemu", &["--machine", "q35"]),
];
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

/// Private memory in KiB, without mappings as large as the guest's.
fn private(pid: i32) -> f64 {
    let maps = fs::read_to_string(format!("/proc/{pid}/smaps")).unwrap();
    let (mut guests, mut sum) = (false, 0);
    for line in maps.lines() {
        let mut words = line.split_ascii_whitespace();
        let first = words.next().unwrap_or_default();
        if let Some((begin, end)) = first.split_once('-').filter(|_| !first.ends_with(':')) {
            let number = |text: &str| u64::from_str_radix(text, 16).unwrap();
            guests = number(end) - number(begin) >= MEMORY;
        } else if first.starts_with("Private_") && !guests {
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
fn small(maker: usize, image: &Path, figures: &mut Figures) {
    let (_, program, arguments) = MAKERS[maker];
    let program = built(program);
    let made = guest(Suite::Bookworm);
    warm([&made.kernel, &made.initramfs]);
    let began = Instant::now();
    let mut hypervisor = Hypervisor::of(&program, arguments);
    let disk = Disk { serial: "disk".into(), path: image.to_str().unwrap().into(), read_only: true };
    let start =
        Start { emulate: false, memory: MEMORY, disks: vec![disk], ..hypervisor.start(Suite::Bookworm) };
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
    let (exits, asked) = (counted("exits"), requests(&hypervisor, &found));
    let mut reader = BufReader::new(hypervisor.guest(&format!("keep /dev/{found}")));
    let mut line = String::new();
    reader.read_line(&mut line).unwrap();
    assert!(line.starts_with(&format!("{DISK} ")), "{line:?}");
    drop(reader);
    let requests = requests(&hypervisor, &found) - asked;
    add(figures, "exits for each disk request", (counted("exits") - exits) / requests);
    add(figures, "private memory (KiB)", private(started.pid));
    hypervisor.done(Verb::Stop(Stop {}));
    hypervisor.finish(started.pid);
}

/// With podvisor-agent, as pods have it.
fn agent(maker: usize, figures: &mut Figures) {
    let (_, program, arguments) = MAKERS[maker];
    let program = built(program);
    let guest = target().join("guest/guests/current");
    let path =
        |name: &str| -> String { fs::canonicalize(guest.join(name)).unwrap().to_str().unwrap().into() };
    let (kernel, initramfs) = (path("kernel"), path("initramfs"));
    warm([Path::new(&kernel), Path::new(&initramfs)]);
    let began = Instant::now();
    let mut hypervisor = Hypervisor::of(&program, arguments);
    let start =
        Start { emulate: false, memory: MEMORY, kernel, initramfs, ..hypervisor.start(Suite::Bookworm) };
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

fn main() {
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
    let mut figures: [Figures; 3] = Default::default();
    // The first round only warms up.
    for round in 0..=rounds {
        for turn in 0..MAKERS.len() {
            let maker = (round + turn) % MAKERS.len();
            let mut found = Figures::new();
            agent(maker, &mut found);
            small(maker, &image, &mut found);
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
    print!("{:36}", "");
    for (name, _, _) in MAKERS {
        print!(" {name:>14}");
    }
    println!();
    for (index, (name, _)) in figures[0].clone().into_iter().enumerate() {
        print!("{name:36}");
        for figures in &figures {
            print!(" {:14.1}", median(figures[index].1.clone()));
        }
        println!();
    }
}
