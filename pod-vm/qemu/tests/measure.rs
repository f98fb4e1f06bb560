//! Prints figures: a machine's start beside a bare boot of the same kernel by QEMU, and what the hypervisor itself takes.
//!
//!     cargo test --release -p podvisor-qemu --test measure -- --ignored --nocapture

mod lab;

use std::fs;
use std::io::{BufRead, BufReader, Read};
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

use lab::{Hypervisor, Suite, guest};
use podvisor_proto::hypervisor::{Stop, request::Verb};

const ROUNDS: usize = 7;

fn median(mut values: Vec<Duration>) -> String {
    values.sort();
    format!("{:.2} s (best {:.2})", values[values.len() / 2].as_secs_f64(), values[0].as_secs_f64())
}

/// The time until the first process speaks, of QEMU as anybody starts it.
fn bare(suite: Suite, memory: &str) -> Duration {
    let guest = guest(suite);
    let processor = fs::read_to_string("/proc/cpuinfo").unwrap();
    let megahertz =
        processor.lines().find_map(|line| line.strip_prefix("cpu MHz")?.split_once(": ")).unwrap().1;
    let words = "console=ttyS0 quiet reboot=t panic=-1 random.trust_cpu=on no5lvl cryptomgr.notests=1";
    let begin = Instant::now();
    let mut qemu = Command::new("qemu-system-x86_64")
        .args(["-nodefaults", "-no-user-config", "-no-reboot", "-display", "none", "-serial", "stdio"])
        .args([
            "-M",
            "microvm,acpi=on,pit=off,pic=off,rtc=on",
            "-accel",
            "tcg,thread=multi",
            "-cpu",
            "max,-cx16",
        ])
        .args(["-m", memory])
        .arg("-kernel")
        .arg(&guest.kernel)
        .arg("-initrd")
        .arg(&guest.initramfs)
        .args(["-append", &format!("{words} tsc_early_khz={}", megahertz.replace('.', ""))])
        .stdin(Stdio::null())
        .stdout(Stdio::piped())
        .spawn()
        .unwrap();
    let mut lines = BufReader::new(qemu.stdout.take().unwrap()).lines();
    lines.find(|line| line.as_ref().unwrap().contains("test: ready")).unwrap().unwrap();
    let taken = begin.elapsed();
    qemu.kill().unwrap();
    qemu.wait().unwrap();
    taken
}

/// The time from the program's start until the guest answers a connection.
fn ours(suite: Suite, machine: &str) -> Duration {
    let begin = Instant::now();
    let mut hypervisor = Hypervisor::new(&["--machine", machine]);
    let start = hypervisor.start(suite);
    let started = hypervisor.begin(start);
    let mut socket = hypervisor.guest("hold");
    socket.read_exact(&mut [0; 5]).unwrap();
    let taken = begin.elapsed();
    hypervisor.done(Verb::Stop(Stop {}));
    hypervisor.finish(started.pid);
    taken
}

#[test]
#[ignore = "prints figures; run it alone"]
fn start() {
    for suite in [Suite::Bookworm, Suite::Backports] {
        guest(suite);
        let (mut quick, mut plain, mut plugs) = (Vec::new(), Vec::new(), Vec::new());
        for _ in 0..ROUNDS {
            plain.push(bare(suite, "256"));
            quick.push(ours(suite, "microvm"));
            plugs.push(ours(suite, "q35"));
        }
        println!("{suite:?}: QEMU alone {}", median(plain));
        println!("{suite:?}: microvm {}", median(quick));
        println!("{suite:?}: q35 {}", median(plugs));
    }
}

fn field(pid: u32, file: &str, name: &str) -> u64 {
    let text = fs::read_to_string(format!("/proc/{pid}/{file}")).unwrap();
    let line = text.lines().find(|line| line.starts_with(name)).unwrap();
    line.split_whitespace().nth(1).unwrap().parse().unwrap()
}

#[test]
#[ignore = "prints figures; run it alone"]
fn memory() {
    let mut hypervisor = Hypervisor::new(&[]);
    let start = hypervisor.start(Suite::Bookworm);
    let started = hypervisor.begin(start);
    hypervisor.guest("hold").read_exact(&mut [0; 5]).unwrap();
    let pid = hypervisor.process.id();
    let qemu = u32::try_from(started.pid).unwrap();
    for (name, pid) in [("podvisor-qemu", pid), ("QEMU", qemu)] {
        let private =
            field(pid, "smaps_rollup", "Private_Dirty:") + field(pid, "smaps_rollup", "Private_Clean:");
        println!("{name}: {private} KiB private, {} KiB resident", field(pid, "smaps_rollup", "Rss:"));
    }
    let switches = || field(pid, "status", "voluntary_ctxt_switches:");
    let before = switches();
    std::thread::sleep(Duration::from_secs(5));
    println!("podvisor-qemu woke {} times in 5 s", switches() - before);
    hypervisor.done(Verb::Stop(Stop {}));
}
