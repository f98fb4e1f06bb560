//! Latency and memory of the daemon through its socket, and of the bare OCI runtime for comparison.
//!
//! To be run in a sandbox (`make bench`). All times are medians in milliseconds.

use std::collections::BTreeMap;
use std::fs;
use std::path::Path;
use std::process::{Command, Stdio};
use std::sync::Arc;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use podvisor_critest::node::Options;
use podvisor_critest::tools_dir;
use podvisor_tests::images::{BUSYBOX, TestImages};
use podvisor_tests::{Fixture, ask};

const ROUNDS: usize = 30;
const AT_ONCE: usize = 10;

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
    for handler in ["runc", "crun"] {
        runtime.block_on(measure(&images, handler)).with_context(|| format!("measuring with {handler}"))?;
        bare(handler)?.print(&format!("{handler} alone"));
    }
    Ok(())
}

async fn measure(images: &Arc<TestImages>, handler: &str) -> Result<()> {
    let options = Options { handler: handler.to_owned(), log: "info".to_owned(), ..Options::default() };
    let mut f = Fixture::with(images, options)?;
    let idle = resident(f.daemon()?.pid().as_raw_nonzero().get(), "Rss")?;
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
    times.print(&format!("podvisor with {handler}, daemon idle at {:.1} MiB resident", idle / 1024.0));
    f.finish().await
}

/// A line of smaps_rollup in KiB.
#[allow(clippy::cast_precision_loss)] // a few thousand KiB
fn resident(pid: i32, line: &str) -> Result<f64> {
    let rollup = fs::read_to_string(format!("/proc/{pid}/smaps_rollup"))?;
    let value =
        rollup.lines().find_map(|have| have.strip_prefix(line)?.strip_prefix(':')).context("no such line")?;
    Ok(value.split_whitespace().next().context("no value")?.parse::<u32>().map(f64::from)?)
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
            private.push(resident(pid, "Private_Dirty")? + resident(pid, "Private_Clean")?);
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
