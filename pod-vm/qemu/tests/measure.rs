//! Prints figures: a machine's start beside a bare boot of the same kernel by QEMU, and what the hypervisor itself takes.
//!
//!     cargo test --release -p podvisor-qemu --test measure -- --ignored --nocapture

#[path = "../../hypervisor/tests/lab/mod.rs"]
mod lab;

/// The program under test.
const PROGRAM: &str = env!("CARGO_BIN_EXE_podvisor-qemu");

use std::fs;
use std::io::{BufRead, BufReader, Read, Write};
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
#[ignore = "measures"]
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
#[ignore = "measures"]
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
    rest(&hypervisor, "idle");
    // Nobody reads: it must not try again and again.
    let stalled = hypervisor.guest("source 100000000");
    std::thread::sleep(Duration::from_secs(1));
    rest(&hypervisor, "with a reader that does not read");
    drop(stalled);
    hypervisor.done(Verb::Stop(Stop {}));
}

/// How often any of its threads ran.
fn rest(hypervisor: &Hypervisor, when: &str) {
    let switches = || -> u64 {
        let tasks = fs::read_dir(format!("/proc/{}/task", hypervisor.process.id())).unwrap();
        let count = |task: fs::DirEntry| {
            let text = fs::read_to_string(task.path().join("status")).unwrap();
            let line =
                text.lines().find(|line| line.starts_with("voluntary_ctxt_switches:")).unwrap().to_owned();
            line.split_whitespace().nth(1).unwrap().parse::<u64>().unwrap()
        };
        tasks.map(|task| count(task.unwrap())).sum()
    };
    let before = switches();
    std::thread::sleep(Duration::from_secs(5));
    println!("podvisor-qemu, {when}: woke {} times in 5 s", switches() - before);
}

#[test]
#[ignore = "measures"]
fn throughput() {
    const MEBIBYTES: u16 = 64;
    let size = usize::from(MEBIBYTES) << 20;
    let hypervisor = Hypervisor::started(Suite::Backports);
    let megabytes = |begin: Instant| f64::from(MEBIBYTES) * 1.048_576 / begin.elapsed().as_secs_f64();
    let mut socket = hypervisor.guest(&format!("source {size}"));
    let begin = Instant::now();
    let mut bytes = Vec::new();
    socket.read_to_end(&mut bytes).unwrap();
    assert_eq!(bytes.len(), size);
    println!("from the guest: {:.0} MB/s", megabytes(begin));
    let mut socket = hypervisor.guest("sink");
    let begin = Instant::now();
    socket.write_all(&bytes).unwrap();
    socket.shutdown(std::net::Shutdown::Write).unwrap();
    socket.read_to_end(&mut Vec::new()).unwrap();
    println!("to the guest, added up there: {:.0} MB/s", megabytes(begin));
    let mut socket = hypervisor.guest("echo");
    let begin = Instant::now();
    for _ in 0..200 {
        socket.write_all(b"x").unwrap();
        socket.read_exact(&mut [0]).unwrap();
    }
    println!("there and back: {:.2} ms", begin.elapsed().as_secs_f64() * 1000.0 / 200.0);
}
