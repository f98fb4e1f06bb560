//! What an idle pod in a virtual machine costs, and how its clock goes.

use std::collections::BTreeMap;
use std::fs;
use std::path::Path;
use std::sync::Arc;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use podvisor_critest::node::{Options, VM};
use podvisor_proto::cri::Mount;
use podvisor_tests::images::{BUSYBOX, TestImages};
use podvisor_tests::memory::Memory;
use podvisor_tests::{Fixture, ask};
use rustix::process::{Pid, Signal, kill_process};

/// Files of the host that a guest holds.
const FILES: usize = 10_000;
const IDLE: Duration = Duration::from_secs(10);

pub(crate) async fn measure(images: &Arc<TestImages>) -> Result<()> {
    let options = Options { handler: VM.to_owned(), log: "info".to_owned(), ..Options::default() };
    let f = Fixture::with(images, options)?;
    f.cri.pull(BUSYBOX).await?;
    Box::pin(costs(&f)).await?;
    f.finish().await
}

/// Private memory in KiB, without what descriptors of memory (memfd_create(2)) stand behind: that is the guest's.
fn private(pid: i32) -> Result<u64> {
    let maps = fs::read_to_string(format!("/proc/{pid}/smaps"))?;
    let (mut guests, mut sum) = (false, 0);
    for line in maps.lines() {
        let mut words = line.split_ascii_whitespace();
        let first = words.next().unwrap_or_default();
        if !first.ends_with(':') {
            guests = line.contains("/memfd:");
        } else if first.starts_with("Private_") && !guests {
            sum += words.next().context("no number")?.parse::<u64>()?;
        }
    }
    Ok(sum)
}

/// By thread: how often it has gone to sleep, and ns that it has run.
fn threads(pid: i32) -> Result<BTreeMap<String, (u64, u64)>> {
    let mut found = BTreeMap::new();
    for thread in fs::read_dir(format!("/proc/{pid}/task"))?.flatten() {
        let read = |name: &str| fs::read_to_string(thread.path().join(name));
        let status = read("status")?;
        let slept = status.lines().find_map(|line| line.strip_prefix("voluntary_ctxt_switches:"));
        let slept = slept.context("no switches")?.trim().parse()?;
        let ran = read("schedstat")?.split(' ').next().unwrap_or_default().parse()?;
        let name = format!("{} {}", read("comm")?.trim(), thread.file_name().to_string_lossy());
        found.insert(name, (slept, ran));
    }
    Ok(found)
}

async fn costs(f: &Fixture) -> Result<()> {
    let volume = f.node.path("files");
    fs::create_dir_all(&volume)?;
    for number in 0..FILES {
        fs::write(volume.join(number.to_string()), "")?;
    }
    let mut container = ask::waiting("c");
    container.mounts = vec![Mount {
        host_path: volume.display().to_string(),
        container_path: "/files".into(),
        ..Mount::default()
    }];
    let (pod, container) = Box::pin(f.running("idle", &container)).await?;
    let info: serde_json::Value = serde_json::from_str(&f.cri.pod_info(&pod.id).await?)?;
    let mut pids = Vec::new();
    for (what, pid) in [
        ("QEMU", &info["pid"]),
        ("podvisor-qemu", &info["virtualMachine"]["hypervisorPid"]),
        ("podvisor-fs", &info["virtualMachine"]["fileServerPid"]),
        ("podvisor-monitor", &info["monitorPid"]),
    ] {
        let pid = pid.as_i64().and_then(|pid| i32::try_from(pid).ok());
        pids.push((what, pid.with_context(|| format!("no {what} in {info}"))?));
    }
    println!(
        "an idle pod of {} MiB with one container",
        &info["virtualMachine"]["memoryBytes"].as_u64().unwrap_or(0) >> 20
    );
    println!("  KiB                            private  anonymous (without the guest's memory)");
    let mut sum = 0;
    for (what, pid) in &pids {
        let own = private(*pid)?;
        sum += own;
        println!("  {what:<28} {own:9} {:10}", anonymous(*pid)?);
    }
    println!("  {:<28} {sum:9}", "sum");
    // What it had to do at its start is over.
    tokio::time::sleep(IDLE).await;
    let before: Vec<_> = pids.iter().map(|(_, pid)| threads(*pid)).collect::<Result<_>>()?;
    tokio::time::sleep(IDLE).await;
    let clock = "/sys/devices/system/clocksource/clocksource0/current_clocksource";
    let clock = f.cri.output(&container, &["cat", clock]).await?;
    println!("  each second (the guest's clock is {})", clock.trim());
    println!("                                   woken   µs run");
    for ((what, pid), before) in pids.iter().zip(before) {
        for (thread, (slept, ran)) in threads(*pid)? {
            let (slept_before, ran_before) = before.get(&thread).copied().unwrap_or_default();
            let seconds = IDLE.as_secs();
            let (woken, ran) = ((slept - slept_before) / seconds, (ran - ran_before) / seconds / 1000);
            if woken + ran > 0 {
                println!("  {:<28} {woken:9} {ran:8}", format!("{what}: {thread}"));
            }
        }
    }
    let files = pids[2].1;
    f.cri
        .exec(
            &container,
            &["sh", "-c", "ulimit -n $(ulimit -Hn); cd /files; tail -f * >/dev/null 2>&1 </dev/null &"],
            600,
        )
        .await?;
    // A translated guest opens some hundred each second, and fewer on a busy machine.
    let began = Instant::now();
    loop {
        let open = fs::read_dir(format!("/proc/{files}/fd"))?.count();
        if open >= FILES {
            break;
        }
        ensure!(began.elapsed() < Duration::from_secs(600), "the guest holds {open} of {FILES} files");
        tokio::time::sleep(Duration::from_millis(500)).await;
    }
    println!(
        "podvisor-fs with {FILES} files that the guest holds: {} KiB private, {} KiB resident",
        private(files)?,
        Memory::of(files)?.resident
    );
    Ok(())
}

/// Memory of its own, in KiB, whether it is shared with a child or not.
fn anonymous(pid: i32) -> Result<u32> {
    ensure!(Path::new(&format!("/proc/{pid}")).exists(), "process {pid} is gone");
    Ok(Memory::of(pid)?.anonymous)
}

/// How far the guest's clock is from the host's: a sample's middle, and what it may be wrong by (its exec took twice that, and times of files
/// are those of the last tick).
async fn offset(f: &Fixture, container: &str) -> Result<(f64, f64)> {
    let host = || -> Result<f64> {
        Ok(std::time::SystemTime::now().duration_since(std::time::UNIX_EPOCH)?.as_secs_f64() * 1000.0)
    };
    let before = host()?;
    let script = "touch /dev/shm/now; stat -c '%Y %y' /dev/shm/now";
    let said = f.cri.output(container, &["sh", "-c", script]).await?;
    let after = host()?;
    // 1700000000 2023-11-14 22:13:20.123456789 +0000
    let seconds: f64 = said.split(' ').next().context("no seconds")?.parse()?;
    let fraction = said.split('.').nth(1).and_then(|rest| rest.split(' ').next()).context("no fraction")?;
    let guest = seconds * 1000.0 + fraction.parse::<f64>()? / 1e6;
    Ok((guest - f64::midpoint(before, after), (after - before) / 2.0 + 4.0))
}

/// The guest's clock for ten minutes, and after its machine has stood still.
pub(crate) async fn clock(images: &Arc<TestImages>) -> Result<()> {
    const RUN: Duration = Duration::from_secs(600);
    const EACH: Duration = Duration::from_secs(5);
    const PAUSE: Duration = Duration::from_secs(20);
    let options = Options { handler: VM.to_owned(), log: "info".to_owned(), ..Options::default() };
    let f = Fixture::with(images, options)?;
    let (pod, container) = Box::pin(f.running("clock", &ask::waiting("c"))).await?;
    let began = Instant::now();
    let (mut largest, mut sure, mut samples) = (0.0_f64, 0.0_f64, 0);
    while began.elapsed() < RUN {
        let (middle, error) = offset(&f, &container).await?;
        largest = largest.max(middle.abs());
        sure = sure.max(middle.abs() - error);
        samples += 1;
        tokio::time::sleep(EACH).await;
    }
    println!(
        "clock of a guest, {samples} samples in {} s: off by {largest:.1} ms at most, {sure:.1} for sure",
        RUN.as_secs()
    );
    let info: serde_json::Value = serde_json::from_str(&f.cri.pod_info(&pod.id).await?)?;
    let pid = info["pid"].as_i64().and_then(|pid| i32::try_from(pid).ok()).and_then(Pid::from_raw);
    let pid = pid.context("no machine")?;
    kill_process(pid, Signal::STOP)?;
    tokio::time::sleep(PAUSE).await;
    kill_process(pid, Signal::CONT)?;
    let began = Instant::now();
    println!("after {} s in which the machine was stopped:", PAUSE.as_secs());
    while began.elapsed() < Duration::from_secs(10) {
        let (middle, error) = offset(&f, &container).await?;
        println!("  {:5.1} s: off by {middle:9.1} ms (± {error:.1})", began.elapsed().as_secs_f64());
        tokio::time::sleep(Duration::from_millis(500)).await;
    }
    f.finish().await
}
