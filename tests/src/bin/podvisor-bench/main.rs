//! Latency and memory of the daemon through its socket, and of the bare OCI runtime for comparison.
//!
//! To be run in a sandbox (`make bench`). All times are medians in milliseconds. The arguments `memory`, `times` and
//! `machines` measure only that; `clock`, which takes eleven minutes, is measured only when it is asked for.

mod machines;

use std::collections::BTreeMap;
use std::fs;
use std::path::Path;
use std::process::{Command, Stdio};
use std::sync::Arc;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use podvisor_critest::node::Options;
use podvisor_critest::tools_dir;
use podvisor_proto::cri::{
    ImageFsInfoRequest, ListContainerStatsRequest, ListImagesRequest, ListPodSandboxStatsRequest,
    StatusRequest,
};
use podvisor_tests::images::{BUSYBOX, TestImages};
use podvisor_tests::memory::Memory;
use podvisor_tests::{Fixture, ask};

const ROUNDS: usize = 30;
const AT_ONCE: usize = 10;
/// Pods that come and go between two looks at the daemon's memory.
const PODS: usize = 50;

/// Times by the name of what was measured, in the order of the first measurement.
#[derive(Debug, Default)]
struct Times {
    order: Vec<&'static str>,
    samples: BTreeMap<&'static str, Vec<Duration>>,
}

impl Times {
    fn add(&mut self, what: &'static str, time: Duration) {
        if !self.samples.contains_key(what) {
            self.order.push(what);
        }
        self.samples.entry(what).or_default().push(time);
    }

    fn median(&self, what: &str) -> f64 {
        let mut samples = self.samples.get(what).cloned().unwrap_or_default();
        samples.sort();
        samples.get(samples.len() / 2).map_or(f64::NAN, |time| time.as_secs_f64() * 1000.0)
    }

    fn print(&self, title: &str) {
        println!("{title}");
        for what in &self.order {
            println!("  {what:<28} {:8.1}", self.median(what));
        }
    }
}

fn main() -> Result<()> {
    let runtime = tokio::runtime::Builder::new_multi_thread().worker_threads(2).enable_all().build()?;
    let images = Arc::new(TestImages::serve()?);
    let only = std::env::args().nth(1);
    let wanted = |what: &str| only.as_ref().is_none_or(|only| only == what);
    if wanted("memory") {
        runtime.block_on(memory(&images)).context("measuring memory")?;
    }
    for handler in ["runc", "crun"].into_iter().filter(|_| wanted("times")) {
        runtime.block_on(measure(&images, handler)).with_context(|| format!("measuring with {handler}"))?;
        bare(handler)?.print(&format!("{handler} alone"));
    }
    if wanted("machines") {
        runtime.block_on(Box::pin(machines::measure(&images))).context("measuring virtual machines")?;
    }
    // Takes longer than all the rest, so only when it is asked for.
    if only.as_deref() == Some("clock") {
        runtime.block_on(Box::pin(machines::clock(&images))).context("measuring a guest's clock")?;
    }
    Ok(())
}

async fn measure(images: &Arc<TestImages>, handler: &str) -> Result<()> {
    let options = Options { handler: handler.to_owned(), log: "info".to_owned(), ..Options::default() };
    let f = Fixture::with(images, options)?;
    f.cri.pull(BUSYBOX).await?;
    let mut times = Times::default();
    for round in 0..ROUNDS {
        let config = f.ask_pod(&format!("bench{round}"));
        fs::create_dir_all(&config.log_directory)?;
        let began = Instant::now();
        let mut last = began;
        let mut lap = |times: &mut Times, what| {
            let now = Instant::now();
            times.add(what, now - last);
            last = now;
        };
        let pod = f.cri.run_pod(&config).await?;
        lap(&mut times, "RunPodSandbox");
        let container = f.cri.create(&pod, &ask::waiting("c"), &config).await?;
        lap(&mut times, "CreateContainer");
        f.cri.start(&container).await?;
        lap(&mut times, "StartContainer");
        times.add("sum of the three", began.elapsed());
        last = Instant::now();
        let mut lap = |times: &mut Times, what| {
            let now = Instant::now();
            times.add(what, now - last);
            last = now;
        };
        f.cri.exec(&container, &["true"], 10).await?;
        lap(&mut times, "ExecSync");
        f.cri.pods().await?;
        lap(&mut times, "ListPodSandbox");
        f.cri.stop_pod(&pod).await?;
        lap(&mut times, "StopPodSandbox");
        f.cri.remove_pod(&pod).await?;
        lap(&mut times, "RemovePodSandbox");
    }
    for round in 0..5 {
        let fixture = &f;
        let began = Instant::now();
        let pods = (0..AT_ONCE).map(|number| async move {
            let pod = fixture.pod(&format!("once{round}-{number}")).await?;
            pod.start(&ask::waiting("c")).await
        });
        futures_util::future::try_join_all(pods).await?;
        times.add("ten at once, to the last", began.elapsed());
        if round == 0 {
            let monitors = monitors()?;
            println!("monitors of ten pods: {monitors:.1} KiB private each");
        }
        for pod in f.cri.pods().await? {
            f.cri.stop_pod(&pod.id).await?;
            f.cri.remove_pod(&pod.id).await?;
        }
    }
    times.print(&format!("podvisor with {handler}"));
    f.finish().await
}

/// The daemon's memory: what it holds while there is nothing to do for it, before its first pod and after many.
async fn memory(images: &Arc<TestImages>) -> Result<()> {
    const IDLE: Duration = Duration::from_secs(60);
    let options = Options { log: "info".to_owned(), ..Options::default() };
    let mut f = Fixture::with(images, options)?;
    let mut starts = Times::default();
    for _ in 0..ROUNDS {
        f.stop()?;
        let began = Instant::now();
        f.start()?;
        starts.add("start until it serves", began.elapsed());
    }
    starts.print("the daemon");
    let pid = f.daemon()?.pid().as_raw_nonzero().get();
    println!("the daemon's memory in MiB      resident = own + of files; private, proportional");
    let look = |when: &str| {
        let memory = Memory::of(pid)?;
        let Memory { resident, anonymous, file, private, proportional } = memory;
        let [resident, anonymous, file, private, proportional] =
            [resident, anonymous, file, private, proportional].map(|kib| f64::from(kib) / 1024.0);
        println!("  {when:<29} {resident:8.1} {anonymous:5.1} {file:10.1} {private:8.1} {proportional:13.1}");
        keep_map(pid, when)
    };
    look("started")?;
    tokio::time::sleep(IDLE).await;
    look("idle")?;
    asked_by_kubelet(&f, IDLE).await?;
    look("asked by kubelet")?;
    f.cri.pull(BUSYBOX).await?;
    for batch in 0..PODS / AT_ONCE {
        let fixture = &f;
        let pods = (0..AT_ONCE).map(|number| async move {
            let pod = fixture.pod(&format!("memory{batch}-{number}")).await?;
            let container = pod.start(&ask::waiting("c")).await?;
            fixture.cri.exec(&container, &["true"], 10).await?;
            anyhow::Ok(pod.id)
        });
        for pod in futures_util::future::try_join_all(pods).await? {
            f.cri.stop_pod(&pod).await?;
            f.cri.remove_pod(&pod).await?;
        }
    }
    look("fifty pods came and went")?;
    tokio::time::sleep(IDLE).await;
    look("idle again")?;
    asked_by_kubelet(&f, IDLE).await?;
    look("asked by kubelet again")?;
    f.finish().await
}

/// What kubelet asks of a node where nothing happens, at its intervals.
async fn asked_by_kubelet(f: &Fixture, time: Duration) -> Result<()> {
    let began = Instant::now();
    let (mut runtime, mut images) = (f.cri.runtime.clone(), f.cri.images.clone());
    for second in 0.. {
        f.cri.pods().await?;
        f.cri.containers().await?;
        if second % 5 == 0 {
            runtime.status(StatusRequest::default()).await?;
        }
        if second % 10 == 0 {
            runtime.list_pod_sandbox_stats(ListPodSandboxStatsRequest::default()).await?;
            runtime.list_container_stats(ListContainerStatsRequest::default()).await?;
            images.image_fs_info(ImageFsInfoRequest {}).await?;
        }
        if second % 30 == 0 {
            images.list_images(ListImagesRequest::default()).await?;
        }
        if began.elapsed() > time {
            break;
        }
        tokio::time::sleep(Duration::from_secs(1)).await;
    }
    Ok(())
}

/// With `PODVISOR_BENCH_MAPS=DIRECTORY`: keeps what /proc says of every mapping, to see what the memory is.
fn keep_map(pid: i32, when: &str) -> Result<()> {
    let Some(directory) = std::env::var_os("PODVISOR_BENCH_MAPS") else { return Ok(()) };
    let map = fs::read(format!("/proc/{pid}/smaps"))?;
    Ok(fs::write(Path::new(&directory).join(when.replace(' ', "-")), map)?)
}

/// Mean private memory of the monitors in KiB.
fn monitors() -> Result<f64> {
    let mut private = Vec::new();
    for process in fs::read_dir("/proc")? {
        let Some(pid) = process?.file_name().to_str().and_then(|name| name.parse::<i32>().ok()) else {
            continue;
        };
        let Ok(name) = fs::read_to_string(format!("/proc/{pid}/comm")) else { continue };
        if name.starts_with("podvisor-monit") {
            private.push(f64::from(Memory::of(pid)?.private));
        }
    }
    ensure!(!private.is_empty(), "no monitor runs");
    #[allow(clippy::cast_precision_loss)] // a handful of monitors
    let count = private.len() as f64;
    Ok(private.iter().sum::<f64>() / count)
}

/// The OCI runtime's own create, start, exec, kill and delete of the same program, without podvisor.
fn bare(handler: &str) -> Result<Times> {
    let program = if handler == "runc" { tools_dir().join("runc") } else { handler.into() };
    let directory = tempfile::tempdir()?;
    let bundle = directory.path();
    let state = bundle.join("state");
    let binary = podvisor_critest::target_dir().join("critest/contents/busybox/busybox");
    fs::create_dir_all(bundle.join("rootfs/bin"))?;
    fs::copy(&binary, bundle.join("rootfs/bin/busybox"))?;
    for applet in ["sh", "sleep", "true"] {
        std::os::unix::fs::symlink("busybox", bundle.join("rootfs/bin").join(applet))?;
    }
    let run = |arguments: &[&str]| -> Result<Duration> {
        let began = Instant::now();
        let status = Command::new(&program)
            .arg("--root")
            .arg(&state)
            .args(arguments)
            .current_dir(bundle)
            .stdin(Stdio::null())
            .stdout(Stdio::null())
            .stderr(Stdio::inherit())
            .status()
            .with_context(|| format!("running {}", program.display()))?;
        ensure!(status.success(), "{} {arguments:?}: {status}", program.display());
        Ok(began.elapsed())
    };
    run(&["spec"])?;
    specification(&bundle.join("config.json"))?;
    let mut times = Times::default();
    for round in 0..ROUNDS {
        let id = format!("bare{round}");
        let create = run(&["create", &id])?;
        times.add("create", create);
        let start = run(&["start", &id])?;
        times.add("start", start);
        times.add("create and start", create + start);
        times.add("exec", run(&["exec", &id, "true"])?);
        times.add("kill", run(&["kill", &id, "KILL"])?);
        times.add("delete", run(&["delete", "--force", &id])?);
    }
    Ok(times)
}

fn specification(file: &Path) -> Result<()> {
    let mut spec: serde_json::Value = serde_json::from_slice(&fs::read(file)?)?;
    spec["process"]["terminal"] = false.into();
    spec["process"]["args"] = ["sleep", "1000"].into_iter().collect();
    // Raising a limit needs a capability that the machine may lack.
    spec["process"].as_object_mut().context("no process")?.remove("rlimits");
    fs::write(file, spec.to_string())?;
    Ok(())
}
