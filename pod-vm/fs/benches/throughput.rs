//! How fast a guest reads and writes through podvisor-fs: in a volume, in a container's root file system (private to the guest), and beside
//! them through the distribution's virtiofsd with the same options. All serve the same machine; rounds are interleaved.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};

#[path = "../tests/machine/mod.rs"]
mod machine;
#[path = "../tests/server/mod.rs"]
mod server;

use rustix::mount::mount_bind;

use machine::Machine;
use server::{Server, Tree};

const MEBIBYTES: u32 = 200;
const FILES: u32 = 1000;

/// What is measured: a command of the guest, and what its time is divided into.
const WORK: &[(&str, &str, u32)] = &[
    ("write 200 MiB, 128 KiB at a time (MiB/s)", "fill @/large 200 131072", MEBIBYTES),
    ("read it, 128 KiB at a time (MiB/s)", "check @/large 131072", MEBIBYTES),
    ("read it, 4 KiB at a time (MiB/s)", "check @/large 4096", MEBIBYTES),
    ("walk over 1000 files (files/s)", "walk @/many", FILES),
];

/// A volume and a root file system of ours, and theirs.
const PLACES: [&str; 3] = ["/ours/container/volume", "/ours/container/rootfs", "/theirs/container/volume"];

/// The distribution's server: Debian 12 has the one that was part of QEMU, later ones the crate's own program.
struct Theirs {
    process: Child,
    socket: PathBuf,
}

impl Theirs {
    fn start(tree: &Tree) -> Self {
        let socket = tree.beside("socket");
        let old = Path::new("/usr/lib/qemu/virtiofsd");
        let new = Path::new("/usr/libexec/virtiofsd");
        let mut command = Command::new("setpriv");
        command.args(["--pdeathsig", "KILL"]);
        if old.exists() {
            let source =
                format!("source={},cache=auto,timeout=0,no_writeback,no_readdirplus", tree.path().display());
            command.arg(old).args(["-f", "-o", &source]);
            command.args(["-o", "xattr,posix_acl,announce_submounts,killpriv_v2,sandbox=namespace"]);
            command.arg("--rlimit-nofile=0");
        } else {
            // It has no option for timeouts but by policy: one second.
            command.arg(new).arg("--shared-dir").arg(tree.path()).args([
                "--cache",
                "auto",
                "--no-readdirplus",
            ]);
            command.args(["--xattr", "--posix-acl", "--announce-submounts", "--killpriv-v2"]);
        }
        command
            // With a pool the old one's own filter of system calls kills it (sched_getaffinity).
            .arg("--thread-pool-size=0")
            .arg(format!("--socket-path={}", socket.display()));
        let process = command
            .stdin(Stdio::null())
            .spawn()
            .expect("Debian 12 has it in qemu-system-common, later ones in virtiofsd");
        while !socket.exists() {
            std::thread::yield_now();
        }
        Self { process, socket }
    }
}

/// Milliseconds of processor time that a process and its children have used: the old server works in a child.
fn processor(id: u32) -> f64 {
    let stat = fs::read_to_string(format!("/proc/{id}/stat")).unwrap();
    // After the name, which may hold anything: utime and stime are fields 14 and 15 of proc(5), in hundredths of a second.
    let fields: Vec<&str> = stat.rsplit_once(')').unwrap().1.split_whitespace().collect();
    let own: f64 = fields[11..13].iter().map(|ticks| ticks.parse::<f64>().unwrap() * 10.0).sum();
    let children = fs::read_to_string(format!("/proc/{id}/task/{id}/children")).unwrap();
    own + children.split_whitespace().map(|child| processor(child.parse().unwrap())).sum::<f64>()
}

impl Drop for Theirs {
    fn drop(&mut self) {
        let _ = self.process.kill();
        let _ = self.process.wait();
        // Where it keeps the numbers of its processes; this is a sandbox's.
        let _ = fs::remove_dir_all("/run/virtiofsd");
    }
}

fn median(values: impl Iterator<Item = f64>) -> f64 {
    let mut values: Vec<f64> = values.collect();
    values.sort_by(f64::total_cmp);
    values[values.len() / 2]
}

fn main() {
    // ROUNDS, WORKERS, KERNEL; cargo adds an option of its own.
    let numbers: Vec<String> = std::env::args().skip(1).filter(|word| !word.starts_with("--")).collect();
    let rounds: usize = numbers.first().map_or(5, |word| word.parse().expect("a number of rounds"));
    let threads = numbers.get(1).map_or("4", String::as_str);
    let only = numbers.get(2);
    let kernels = [("bookworm", "6.1"), ("bookworm-backports", "6.12")];

    for (suite, kernel) in kernels.into_iter().filter(|(_, kernel)| only.is_none_or(|only| only == kernel)) {
        let trees = [Tree::new(), Tree::new()];
        // As they are for containers: mounts.
        for (tree, name) in [(0, "volume"), (0, "rootfs"), (1, "volume")] {
            let at = trees[tree].path().join("container").join(name);
            fs::create_dir_all(&at).unwrap();
            mount_bind(&at, &at).unwrap();
        }
        let ours = Server::start(&trees[0], &["--threads", threads]);
        let theirs = Theirs::start(&trees[1]);
        let shares = [("ours", ours.socket()), ("theirs", theirs.socket.as_path())];
        let mut machine = Machine::start(suite, 1024, &shares);
        for (name, _) in shares {
            machine.done(&format!("mkdir /{name}"));
            machine.done(&format!("mount {name} /{name}"));
        }
        for place in PLACES {
            machine.done(&format!("mkdir {place}/many"));
            machine.done(&format!("populate {place}/many {FILES}"));
        }
        let servers = [ours.id(), ours.id(), theirs.process.id()];
        let mut used = vec![[Vec::new(), Vec::new(), Vec::new()]; WORK.len()];
        let mut rates = vec![[Vec::new(), Vec::new(), Vec::new()]; WORK.len()];
        for round in 0..rounds {
            for (work, (_, command, amount)) in WORK.iter().enumerate() {
                for turn in 0..PLACES.len() {
                    // Each is first as often as the others.
                    let which = (round + turn) % PLACES.len();
                    let before = processor(servers[which]);
                    let said = machine.done(&command.replace('@', PLACES[which]));
                    used[work][which].push(processor(servers[which]) - before);
                    let words: Vec<f64> = said.split(' ').map(|word| word.parse().unwrap()).collect();
                    // A walk says how many files before its time.
                    let microseconds = if command.starts_with("walk") { words[1] } else { words[0] };
                    rates[work][which].push(f64::from(*amount) * 1e6 / microseconds);
                }
            }
        }
        println!("kernel {kernel}, {threads} workers, medians of {rounds} rounds");
        println!(
            "{:45} {:>8} {:>8} {:>8} {:>12} {:>12}",
            "", "volume", "rootfs", "theirs", "volume/theirs", "rootfs/theirs"
        );
        for (((what, _, _), rates), used) in WORK.iter().zip(rates).zip(used) {
            // Of each round, so that what the machine does besides counts for both.
            let ratio =
                |of: usize| median(rates[of].iter().zip(&rates[2]).map(|(ours, theirs)| ours / theirs));
            let [volume, rootfs, theirs] = [0, 1, 2].map(|which| median(rates[which].iter().copied()));
            let [first, second, third] = [0, 1, 2].map(|which| median(used[which].iter().copied()));
            print!(
                "{what:45} {volume:7.0} {rootfs:7.0} {theirs:7.0}     {:5.2}  {:5.2} ",
                ratio(0),
                ratio(1)
            );
            println!("     {first:5.0} {second:5.0} {third:5.0}");
        }
    }
}
