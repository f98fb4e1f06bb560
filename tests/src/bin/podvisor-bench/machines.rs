//! Pods in virtual machines: their start beside a bare boot by QEMU of the same kernel and initramfs, and what an idle one costs.

use std::collections::BTreeMap;
use std::fs;
use std::io::{BufRead, BufReader};
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::sync::Arc;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use podvisor_critest::node::{Options, VM, guests_dir};
use podvisor_proto::cri::Mount;
use podvisor_tests::images::{BUSYBOX, TestImages};
use podvisor_tests::memory::Memory;
use podvisor_tests::{Fixture, ask};
use rustix::process::{Pid, Signal, kill_process};

use super::Times;

const ROUNDS: usize = 11;
/// Files of the host that a guest holds.
const FILES: usize = 10_000;
const IDLE: Duration = Duration::from_secs(10);

pub(crate) async fn measure(images: &Arc<TestImages>) -> Result<()> {
    let options = Options { handler: VM.to_owned(), log: "info".to_owned(), ..Options::default() };
    let f = Fixture::with(images, options)?;
    f.cri.pull(BUSYBOX).await?;
    let directory = tempfile::tempdir()?;
    let initramfs = bare_initramfs(directory.path())?;
    let mut times = Times::default();
    // In turns, so that both get the same of what else the machine does; the first round only warms up.
    for round in 0..=ROUNDS {
        let path = initramfs.clone();
        let [bare, same_words] = tokio::task::spawn_blocking(move || {
            Ok::<_, anyhow::Error>([bare_boot(&path, "")?, bare_boot(&path, WORDS)?])
        })
        .await??;
        let config = f.ask_pod(&format!("bench{round}"));
        fs::create_dir_all(&config.log_directory)?;
        let began = Instant::now();
        let pod = f.cri.run_pod(&config).await?;
        let sandbox = began.elapsed();
        let container = f.cri.create(&pod, &ask::waiting("c"), &config).await?;
        f.cri.start(&container).await?;
        let all = began.elapsed();
        let began = Instant::now();
        f.cri.exec(&container, &["true"], 60).await?;
        let exec = began.elapsed();
        let began = Instant::now();
        f.cri.stop_pod(&pod).await?;
        f.cri.remove_pod(&pod).await?;
        if round > 0 {
            times.add("QEMU alone, to user space", bare);
            times.add("the same, a pod's kernel words", same_words);
            times.add("RunPodSandbox", sandbox);
            times.add("with a container", all);
            times.add("ExecSync", exec);
            times.add("stop and remove", began.elapsed());
        }
    }
    times.print("pods in virtual machines");
    for bare in ["QEMU alone, to user space", "the same, a pod's kernel words"] {
        let ratio = times.median("RunPodSandbox") / times.median(bare);
        println!("  RunPodSandbox is {ratio:.2} times {bare}");
    }
    Box::pin(costs(&f)).await?;
    f.finish().await
}

/// The first process of a guest in which nothing but a boot is measured.
const FIRST_PROCESS: &str = r#"
static long call(long number, long a, long b, long c) {
    long result;
    __asm__ volatile("syscall" : "=a"(result) : "a"(number), "D"(a), "S"(b), "d"(c) : "rcx", "r11", "memory");
    return result;
}
void _start(void) {
    call(1, 1, (long)"bench: up\n", 10);
    for (;;) call(34, 0, 0, 0);
}
"#;

/// The guest's initramfs with that process beside the agent: the kernel unpacks archives one after the other (Documentation/filesystems/
/// ramfs-rootfs-initramfs.rst; the format is in Documentation/driver-api/early-userspace/buffer-format.rst).
fn bare_initramfs(directory: &Path) -> Result<PathBuf> {
    let (source, program) = (directory.join("first.c"), directory.join("first"));
    fs::write(&source, FIRST_PROCESS)?;
    let mut compiler = Command::new("cc");
    compiler.args(["-static", "-nostdlib", "-Os", "-s", "-o"]).arg(&program).arg(&source);
    ensure!(compiler.status().context("running cc")?.success(), "cc has failed");
    let mut archive = fs::read(guests_dir().join("current/initramfs"))?;
    archive.resize(archive.len().next_multiple_of(512), 0);
    for (name, mode, content) in [("bench", 0o100_755, fs::read(&program)?), ("TRAILER!!!", 0, Vec::new())] {
        let fields = [1, mode, 0, 0, 1, 0, content.len(), 0, 0, 0, 0, name.len() + 1, 0];
        archive.extend(b"070701");
        archive.extend(fields.map(|field| format!("{field:08X}")).concat().bytes());
        archive.extend(name.bytes().chain([0]));
        archive.resize(archive.len().next_multiple_of(4), 0);
        archive.extend(content);
        archive.resize(archive.len().next_multiple_of(4), 0);
    }
    let path = directory.join("initramfs");
    fs::write(&path, archive)?;
    Ok(path)
}

/// What the kernel of a translated machine with one processor is told more by podvisor-qemu.
const WORDS: &str = "tsc=reliable noreplace-smp";

/// The time until the first process runs, of QEMU as anybody starts it for speed: no device but a console.
fn bare_boot(initramfs: &Path, more: &str) -> Result<Duration> {
    let words = format!(
        "console=ttyS0 quiet reboot=t panic=-1 random.trust_cpu=on no5lvl cryptomgr.notests=1 rdinit=/bench tsc_early_khz={} {more}",
        kilohertz()?
    );
    let began = Instant::now();
    let mut qemu = Command::new("qemu-system-x86_64")
        .args(["-nodefaults", "-no-user-config", "-no-reboot", "-display", "none", "-serial", "stdio"])
        .args(["-M", "microvm,acpi=on,pit=off,pic=off,rtc=on"])
        .args(["-accel", "tcg,thread=multi", "-cpu", "max,-cx16", "-m", "256"])
        .arg("-kernel")
        .arg(guests_dir().join("current/kernel"))
        .arg("-initrd")
        .arg(initramfs)
        .args(["-append", &words])
        .stdin(Stdio::null())
        .stdout(Stdio::piped())
        .spawn()
        .context("starting qemu-system-x86_64")?;
    let mut lines = BufReader::new(qemu.stdout.take().context("no output")?).lines();
    let said = lines.find(|line| line.as_ref().is_ok_and(|line| line.contains("bench: up")));
    let took = began.elapsed();
    qemu.kill()?;
    qemu.wait()?;
    said.context("the first process has not said a word")??;
    Ok(took)
}

/// What the time stamp counter counts, near enough for a boot.
fn kilohertz() -> Result<String> {
    let text = fs::read_to_string("/proc/cpuinfo")?;
    let line = text.lines().find_map(|line| line.strip_prefix("cpu MHz")).context("no cpu MHz")?;
    Ok(line.trim_start_matches([' ', '\t', ':']).replace('.', ""))
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
