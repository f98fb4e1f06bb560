//! A node that fills up, and what everything costs when so many pods are on it.

use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use anyhow::{Result, ensure};
use futures_util::future::try_join_all;
use podvisor_proto::cri::{
    ContainerState, ListContainerStatsRequest, ListImagesRequest, ListPodSandboxStatsRequest,
    PodSandboxState, StatusRequest,
};
use podvisor_tests::ask;

use super::{pod, remove, running};
use crate::process;
use crate::subject::Subject;
use crate::wire::Sample;

/// How many pods there are, with one container each; how many more come and go then, one after the other.
const STEPS: [(u32, u32); 7] = [(0, 4), (1, 4), (10, 4), (20, 4), (50, 4), (100, 4), (200, 12)];
/// With so many the daemon is left alone before, to see what it holds.
const QUIET: [u32; 4] = [0, 20, 100, 200];
/// With so many also what it does.
const WATCHED: [u32; 2] = [0, 100];
/// How many are started at the same time.
const AT_ONCE: usize = 4;
/// How often statistics are asked for.
const STATISTICS: u32 = 10;
const RESTARTS: u32 = 2;
const PAUSE: Duration = Duration::from_millis(10);
/// After this long without work a daemon has done what it does later,
const SETTLE: Duration = Duration::from_secs(12);
/// and after this long more the threads that did it have ended.
const END: Duration = Duration::from_secs(4);
const IDLE: Duration = Duration::from_secs(10);
const PATIENCE: Duration = Duration::from_secs(120);

const PODS: &str = "pods";

/// Pods and their containers.
type Ids = Vec<(String, String)>;

pub(super) async fn run(subject: &mut Subject) -> Result<Vec<Sample>> {
    let mut samples = Vec::new();
    let mut pods = Ids::new();
    // What earlier work has left in the daemon is no pod's, nor is what is there from the first pod on.
    restart(subject, &pods).await?;
    pod::run(subject, 0).await?;
    let mut empty = None;
    for (count, passing) in STEPS {
        let mut here = Vec::new();
        fill(subject, &mut pods, count as usize).await?;
        if QUIET.contains(&count) {
            tokio::time::sleep(SETTLE).await;
            let daemon = process::memory(&[subject.daemon()?])?;
            let (private, proportional) = *empty.get_or_insert(daemon);
            let helpers = process::memory(&subject.helpers()?)?;
            here.push(Sample::new("the daemon, private", "MiB", daemon.0 / 1024.0));
            here.push(Sample::new("the daemon, PSS", "MiB", daemon.1 / 1024.0));
            if count > 0 {
                let (ours, shared) = (helpers.0 + daemon.0 - private, helpers.1 + daemon.1 - proportional);
                here.push(Sample::new(
                    "a pod's processes and the daemon for it, private",
                    "KiB",
                    ours / f64::from(count),
                ));
                here.push(Sample::new(
                    "a pod's processes and the daemon for it, PSS",
                    "KiB",
                    shared / f64::from(count),
                ));
            }
        }
        if WATCHED.contains(&count) {
            tokio::time::sleep(END).await;
            here.extend(idle(subject).await?);
        }
        here.extend(statistics(subject).await?);
        here.extend(churn(subject, pods.first().map(|(pod, _)| pod.as_str()), passing).await?);
        for _ in 0..RESTARTS {
            let time = restart(subject, &pods).await?;
            here.push(Sample::milliseconds("restart until every answer is right", time));
        }
        samples.extend(here.into_iter().map(|sample| sample.among(count, PODS)));
    }
    for some in pods.chunks(AT_ONCE) {
        try_join_all(some.iter().map(|(pod, _)| remove(subject, pod))).await?;
    }
    Ok(samples)
}

async fn fill(subject: &Subject, pods: &mut Ids, count: usize) -> Result<()> {
    let container = ask::waiting("c");
    while pods.len() < count {
        let some = (0..AT_ONCE.min(count - pods.len())).map(|number| {
            let name = format!("stays{}", pods.len() + number);
            let container = &container;
            async move { running(subject, &name, container).await }
        });
        pods.extend(try_join_all(some).await?);
    }
    Ok(())
}

/// What the daemon and its helpers do while nobody asks for anything.
async fn idle(subject: &Subject) -> Result<Vec<Sample>> {
    let mut pids = subject.helpers()?;
    pids.push(subject.daemon()?);
    let before = process::activity(&pids)?;
    tokio::time::sleep(IDLE).await;
    let after = process::activity(&pids)?;
    let ran = (after.ran.saturating_sub(before.ran)).as_secs_f64();
    #[allow(clippy::cast_precision_loss)] // some thousands
    let woken = after.slept.saturating_sub(before.slept) as f64;
    Ok(vec![
        Sample::new("idle, processor", "% of one", 100.0 * ran / IDLE.as_secs_f64()),
        Sample::new("idle, woken up", "per s", woken / IDLE.as_secs_f64()),
    ])
}

/// While no pod comes or goes: CRI-O 1.36.3 ends in a nil pointer of its `StatsForSandboxes` when one goes meanwhile.
async fn statistics(subject: &Subject) -> Result<Vec<Sample>> {
    let mut samples = Vec::new();
    for _ in 0..STATISTICS {
        let began = Instant::now();
        subject.cri.runtime.clone().list_pod_sandbox_stats(ListPodSandboxStatsRequest::default()).await?;
        samples.push(Sample::milliseconds("ListPodSandboxStats", began.elapsed()));
        tokio::time::sleep(PAUSE).await;
    }
    Ok(samples)
}

/// Pods that come and go, and what kubelet asks meanwhile.
async fn churn(subject: &Subject, pod: Option<&str>, passing: u32) -> Result<Vec<Sample>> {
    let over = AtomicBool::new(false);
    let asking = async {
        let mut samples = Vec::new();
        while !over.load(Ordering::Relaxed) {
            samples.extend(ask(subject, pod).await?);
            tokio::time::sleep(PAUSE).await;
        }
        anyhow::Ok(samples)
    };
    let passing = async {
        let mut samples = Vec::new();
        for number in 0..passing {
            let of = pod::run(subject, number).await;
            over.store(of.is_err(), Ordering::Relaxed);
            samples.extend(of?);
        }
        over.store(true, Ordering::Relaxed);
        anyhow::Ok(samples)
    };
    let (asked, passed) = tokio::join!(asking, passing);
    let mut samples = asked?;
    let sums = ["start", "ExecSync", "stop", "remove"];
    samples.extend(passed?.into_iter().filter(|sample| sums.contains(&sample.series.name.as_str())));
    Ok(samples)
}

async fn ask(subject: &Subject, pod: Option<&str>) -> Result<Vec<Sample>> {
    let cri = &subject.cri;
    let mut samples = Vec::new();
    let mut last = Instant::now();
    let mut lap = |series: &str| {
        samples.push(Sample::milliseconds(series, last.elapsed()));
        last = Instant::now();
    };
    cri.pods().await?;
    lap("ListPodSandbox");
    cri.containers().await?;
    lap("ListContainers");
    if let Some(pod) = pod {
        cri.pod_status(pod).await?;
        lap("PodSandboxStatus");
    }
    Ok(samples)
}

/// The time from the daemon's exec until it answers every question as before.
async fn restart(subject: &mut Subject, pods: &Ids) -> Result<Duration> {
    subject.stop()?;
    let began = Instant::now();
    subject.resume()?;
    while let Err(error) = right(subject, pods).await {
        ensure!(began.elapsed() < PATIENCE, "{PATIENCE:?} after its start: {error:#}");
        tokio::time::sleep(Duration::from_millis(2)).await;
    }
    Ok(began.elapsed())
}

/// Whether everything that kubelet asks of a node is answered, and right.
async fn right(subject: &Subject, pods: &Ids) -> Result<()> {
    let cri = &subject.cri;
    let mut runtime = cri.runtime.clone();
    runtime.status(StatusRequest::default()).await?;
    cri.images.clone().list_images(ListImagesRequest::default()).await?;
    let ready = cri.pods().await?.iter().filter(|pod| pod.state() == PodSandboxState::SandboxReady).count();
    ensure!(ready == pods.len(), "{ready} of {} pods are ready", pods.len());
    let running = cri.containers().await?;
    let running = running.iter().filter(|one| one.state() == ContainerState::ContainerRunning).count();
    ensure!(running == pods.len(), "{running} of {} containers run", pods.len());
    let stats = runtime.list_pod_sandbox_stats(ListPodSandboxStatsRequest::default()).await?.into_inner();
    ensure!(stats.stats.len() == pods.len(), "statistics of {} pods", stats.stats.len());
    let stats = runtime.list_container_stats(ListContainerStatsRequest::default()).await?.into_inner();
    ensure!(stats.stats.len() == pods.len(), "statistics of {} containers", stats.stats.len());
    try_join_all(pods.iter().map(|(pod, container)| async move {
        ensure!(cri.pod_status(pod).await?.state() == PodSandboxState::SandboxReady, "{pod} is not ready");
        let state = cri.status(container).await?.state();
        ensure!(state == ContainerState::ContainerRunning, "{container} is {state:?}");
        Ok(())
    }))
    .await?;
    if let Some((_, container)) = pods.last() {
        cri.exec(container, &["true"], 10).await?;
    }
    Ok(())
}
