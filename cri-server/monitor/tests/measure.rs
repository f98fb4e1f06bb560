//! Figures, not judgements: memory of the monitor and what it adds to the bare OCI runtime. Run by hand:
//!
//! `PODVISOR_MONITOR=target/release/podvisor-monitor cargo test -p podvisor-monitor --test measure -- --ignored --nocapture`
#![allow(missing_docs)]

mod lab;

use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

use lab::client::sync;
use lab::{Pod, Spec, private_memory, run, until};
use podvisor_proto::monitor::{StartInit, reply, request::Verb};

const ROUNDS: usize = 40;

fn median(mut times: Vec<Duration>) -> f64 {
    times.sort();
    times[times.len() / 2].as_secs_f64() * 1000.0
}

fn time(action: impl FnOnce()) -> Duration {
    let started = Instant::now();
    action();
    started.elapsed()
}

fn runc(arguments: &[&str]) {
    let status = Command::new("/usr/sbin/runc")
        .args(["--root", "/run/lab/bare"])
        .args(arguments)
        .stdin(Stdio::null())
        .stdout(Stdio::null())
        .stderr(Stdio::null())
        .status();
    assert!(status.unwrap().success(), "{arguments:?}");
}

#[test]
#[ignore = "measures"]
fn memory() {
    run(|lab| {
        let (child, _daemon) = lab::unadopted();
        until("it waits", || private_memory(child.id()) > 0);
        println!("private, in the pool: {} KiB", private_memory(child.id()) / 1024);
        let mut pod = lab.pod();
        pod.run("c1", &Spec::waiting());
        until("the container is ready", || !pod.log_lines("c1").is_empty());
        println!("private, one container: {} KiB", private_memory(pod.child.id()) / 1024);
        for n in 0..50 {
            pod.daemon.exec_sync(sync("c1", &format!("e{n}"), "seq 100000")).unwrap();
        }
        println!("private, after 50 execs: {} KiB", private_memory(pod.child.id()) / 1024);
        pod.run_to_end("c2", &Spec::shell("seq 1000000"));
        println!("private, after a log of 7 MB: {} KiB", private_memory(pod.child.id()) / 1024);
        let Ok(reply::Result::Started(init)) = pod.daemon.ask(Verb::StartInit(StartInit::default())) else {
            panic!()
        };
        println!("private, init: {} KiB", private_memory(u32::try_from(init.pid).unwrap()) / 1024);
    });
}

/// The hypervisor of the machine below.
#[test]
fn plays_a_program() {
    lab::fake::play();
}

#[test]
#[ignore = "measures"]
fn memory_with_a_machine() {
    run(|lab| {
        let mut pod = lab.machine();
        println!("private, machine: {} KiB", private_memory(pod.child.id()) / 1024);
        pod.run("c1", &Spec::waiting());
        until("the container is ready", || !pod.log_lines("c1").is_empty());
        println!("private, one container: {} KiB", private_memory(pod.child.id()) / 1024);
        for n in 0..50 {
            pod.daemon.exec_sync(sync("c1", &format!("e{n}"), "seq 100000")).unwrap();
        }
        println!("private, after 50 execs: {} KiB", private_memory(pod.child.id()) / 1024);
        pod.run_to_end("c2", &Spec::shell("seq 1000000"));
        println!("private, after a log of 7 MB: {} KiB", private_memory(pod.child.id()) / 1024);
    });
}

/// How often a process's threads were woken up, and ns that they ran.
fn woken(pid: i32) -> (u64, u64) {
    let threads = std::fs::read_dir(format!("/proc/{pid}/task")).unwrap().flatten();
    threads.fold((0, 0), |(woken, ran), thread| {
        let read = |name: &str| std::fs::read_to_string(thread.path().join(name)).unwrap();
        let status = read("status");
        let line = status.lines().find_map(|line| line.strip_prefix("voluntary_ctxt_switches:")).unwrap();
        let time: u64 = read("schedstat").split(' ').next().unwrap().parse().unwrap();
        (woken + line.trim().parse::<u64>().unwrap(), ran + time)
    })
}

/// What the sign of life costs: with a real guest (`PODVISOR_GUEST`, `PODVISOR_PROGRAMS`).
#[test]
#[ignore = "measures"]
fn idle_machine() {
    const SECONDS: u64 = 30;
    run(|lab| {
        let mut pod = lab.machine_pod();
        let machine = lab.start(&mut pod, "");
        pod.run("c1", &Spec::waiting());
        std::thread::sleep(Duration::from_secs(5));
        let pids = [
            ("monitor", i32::try_from(pod.child.id()).unwrap()),
            ("hypervisor", machine.hypervisor_pid),
            ("machine", machine.pid),
        ];
        let before = pids.map(|(_, pid)| woken(pid));
        std::thread::sleep(Duration::from_secs(SECONDS));
        for ((name, pid), (woken_before, ran_before)) in pids.into_iter().zip(before) {
            let (woken, ran) = woken(pid);
            let tenths = (woken - woken_before) * 10 / SECONDS;
            let micros = (ran - ran_before) / SECONDS / 1000;
            println!("{name}: woken {}.{} times a second, {micros} µs a second", tenths / 10, tenths % 10);
        }
    });
}

#[test]
#[ignore = "measures"]
fn latency() {
    run(|lab| {
        let mut pod = lab.pod();
        let (mut bare, mut ours) = (Figures::default(), Figures::default());
        for round in 0..ROUNDS {
            // In turns, also in who is first: what one leaves to the kernel's background work slows the next.
            if round % 2 == 0 {
                bare_round(&mut pod, round, &mut bare);
                monitor_round(&mut pod, round, &mut ours);
            } else {
                monitor_round(&mut pod, round, &mut ours);
                bare_round(&mut pod, round, &mut bare);
            }
        }
        println!("bare runc:  {bare}");
        println!("by monitor: {ours}");
    });
}

#[test]
#[ignore = "measures"]
fn latency_with_a_machine() {
    run(|lab| {
        let mut pod = lab.machine_pod();
        let request = lab.start_vm(&pod, "");
        println!("machine: {:.1} ms", time(|| drop(pod.start_vm(request).unwrap())).as_secs_f64() * 1000.0);
        let mut figures = Figures::default();
        for round in 0..ROUNDS {
            monitor_round(&mut pod, round, &mut figures);
        }
        println!("in a guest: {figures}");
    });
}

#[derive(Default)]
struct Figures {
    create: Vec<Duration>,
    start: Vec<Duration>,
    exec: Vec<Duration>,
    delete: Vec<Duration>,
}

impl std::fmt::Display for Figures {
    fn fmt(&self, formatter: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(
            formatter,
            "create {:.1} ms, start {:.1} ms, exec {:.1} ms, kill and delete {:.1} ms (medians of {ROUNDS})",
            median(self.create.clone()),
            median(self.start.clone()),
            median(self.exec.clone()),
            median(self.delete.clone())
        )
    }
}

fn bare_round(pod: &mut Pod, round: usize, figures: &mut Figures) {
    let id = format!("bare{round}");
    let bundle = pod.container(&id, &Spec::new(&["sleep", "1000"])).bundle;
    figures.create.push(time(|| runc(&["create", "--bundle", &bundle, &id])));
    figures.start.push(time(|| runc(&["start", &id])));
    figures.exec.push(time(|| runc(&["exec", &id, "true"])));
    figures.delete.push(time(|| runc(&["delete", "--force", &id])));
}

fn monitor_round(pod: &mut Pod, round: usize, figures: &mut Figures) {
    let id = format!("ours{round}");
    let request = pod.container(&id, &Spec::new(&["sleep", "1000"]));
    figures.create.push(time(|| drop(pod.daemon.ask(Verb::CreateContainer(request)).unwrap())));
    figures.start.push(time(|| pod.start(&id)));
    figures.exec.push(time(|| {
        let mut request = sync(&id, &format!("e{round}"), "");
        request.exec = Some(lab::client::exec_process(&id, &format!("e{round}"), &["true"], false));
        assert_eq!(pod.daemon.exec_sync(request).unwrap().exit_code, 0);
    }));
    figures.delete.push(time(|| pod.delete(&id)));
}
