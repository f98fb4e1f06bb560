//! The daemon is killed at random points while pods come and go, and started again each time.
//!
//! Whoever asks it must never see a pod missing or not ready that is known to be ready: kubelet would replace it.

use std::collections::BTreeMap;
use std::future::Future;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex};
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use anyhow::{Context, Result, bail, ensure};
use podvisor_proto::cri::{ContainerState, PodSandboxState};
use podvisor_tests::cri::Cri;
use podvisor_tests::fixture::{Pod, numbered};
use podvisor_tests::images::BUSYBOX;
use podvisor_tests::{Fixture, ask};
use tonic::Status;

use super::Tests;

const KILLS: u32 = 50;
const STEADY: usize = 3;
const WORKERS: usize = 7;

pub(crate) fn add(tests: &mut Tests) {
    tests.add("kills::fifty_at_random_points_lose_nothing", fifty_at_random_points);
}

/// What all tasks of the test share.
#[derive(Debug, Default)]
struct Shared {
    /// Even while a daemon runs, odd from before a kill until the next daemon serves.
    generation: AtomicU64,
    /// Pods that are ready as far as anybody was told, with their address.
    ready: Mutex<BTreeMap<String, String>>,
    done: AtomicBool,
}

impl Shared {
    /// Repeats a call as kubelet does while the daemon is away. An error from a daemon that was neither killed nor
    /// away during the call is one.
    async fn call<T, Fut: Future<Output = Result<T, Status>>>(
        &self,
        what: &str,
        call: impl Fn() -> Fut,
    ) -> Result<T> {
        loop {
            let before = self.generation.load(Ordering::SeqCst);
            match call().await {
                Ok(value) => return Ok(value),
                Err(error) => {
                    let after = self.generation.load(Ordering::SeqCst);
                    if before == after && before.is_multiple_of(2) {
                        return Err(error).with_context(|| what.to_owned());
                    }
                    tokio::time::sleep(Duration::from_millis(20)).await;
                }
            }
        }
    }

    fn ready(&self) -> BTreeMap<String, String> {
        self.ready.lock().expect("no task panics with it").clone()
    }
}

/// Small and good enough to pick moments; the seed is printed, so that a run can be repeated as far as time allows.
struct Random(u64);

impl Random {
    fn seeded() -> Self {
        let asked = std::env::var("PODVISOR_SEED").ok().and_then(|seed| seed.parse().ok());
        let seed = asked.unwrap_or_else(|| {
            SystemTime::now()
                .duration_since(UNIX_EPOCH)
                .map_or(1, |since| u64::from(since.subsec_nanos()) | 1)
        });
        println!("kills: PODVISOR_SEED={seed}");
        Self(seed)
    }

    /// Below `limit` (xorshift64).
    fn below(&mut self, limit: u64) -> u64 {
        self.0 ^= self.0 << 13;
        self.0 ^= self.0 >> 7;
        self.0 ^= self.0 << 17;
        self.0 % limit
    }
}

async fn fifty_at_random_points(f: &mut Fixture) -> Result<()> {
    let mut random = Random::seeded();
    let shared = Arc::new(Shared::default());
    f.cri.pull(BUSYBOX).await?;
    let counting =
        ask::script("c", "trap 'exit 0' TERM; i=0; while :; do echo $i; i=$((i+1)); sleep 0.01; done");
    let mut steady = Vec::new();
    for number in 0..STEADY {
        let pod = f.pod(&format!("steady{number}")).await?;
        let container = pod.start(&counting).await?;
        let address = f.cri.pod_status(&pod.id).await?.network.context("no network")?.ip;
        shared.ready.lock().expect("no task panics with it").insert(pod.id.clone(), address);
        let started = f.cri.output(&container, &["cut", "-d ", "-f22", "/proc/1/stat"]).await?;
        steady.push((pod, container, started));
    }
    let mut tasks = tokio::task::JoinSet::new();
    let containers: Vec<String> = steady.iter().map(|(_, container, _)| container.clone()).collect();
    tasks.spawn(observe(f.cri.clone(), Arc::clone(&shared), containers));
    for worker in 0..WORKERS {
        let logs = f.logs();
        tasks.spawn(come_and_go(
            f.cri.clone(),
            Arc::clone(&shared),
            worker,
            logs,
            random.below(u64::MAX) | 1,
        ));
    }
    for _ in 0..KILLS {
        tokio::time::sleep(Duration::from_millis(random.below(250))).await;
        shared.generation.fetch_add(1, Ordering::SeqCst);
        f.kill()?;
        f.start()?;
        shared.generation.fetch_add(1, Ordering::SeqCst);
        // A task ends early only with an error.
        if let Some(ended) = tasks.try_join_next() {
            ended??;
            bail!("a task ended by itself");
        }
    }
    shared.done.store(true, Ordering::SeqCst);
    while let Some(ended) = tasks.join_next().await {
        ended??;
    }
    for (pod, container, started) in &steady {
        let now = f.cri.output(container, &["cut", "-d ", "-f22", "/proc/1/stat"]).await?;
        ensure!(now == *started, "the container was started again");
        f.cri.stop(container, 10).await?;
        let all = pod.log("c.log")?.stdout();
        let expected = numbered("", 0..all.lines().count());
        ensure!(all == expected, "the log of {container} has gaps or repetitions");
    }
    Ok(())
}

/// Asks all the time, as kubelet's relist does, and compares with what is known.
async fn observe(cri: Cri, shared: Arc<Shared>, steady: Vec<String>) -> Result<()> {
    let mut answers = 0_u64;
    while !shared.done.load(Ordering::SeqCst) {
        let before = shared.ready();
        let listed = shared.call("ListPodSandbox", || cri.pods()).await?;
        let containers = shared.call("ListContainers", || cri.containers()).await?;
        // Only pods that were known before the question and still are after the answer.
        let after = shared.ready();
        for (id, address) in before.iter().filter(|(id, _)| after.contains_key(*id)) {
            let pod = listed.iter().find(|pod| pod.id == *id);
            let pod = pod.with_context(|| format!("ListPodSandbox leaves out {id} (answer {answers})"))?;
            ensure!(
                pod.state() == PodSandboxState::SandboxReady,
                "ListPodSandbox says {:?} of {id}",
                pod.state()
            );
            let status = shared.call("PodSandboxStatus", || cri.pod_status(id)).await;
            // It may have been removed since.
            if shared.ready().contains_key(id) {
                let status = status?;
                ensure!(status.state() == PodSandboxState::SandboxReady, "PodSandboxStatus: {status:?}");
                let ip = status.network.map(|network| network.ip).unwrap_or_default();
                ensure!(ip == *address, "the address of {id} was {address} and is {ip:?}");
            }
        }
        for id in &steady {
            let container = containers.iter().find(|container| container.id == *id);
            let container = container.with_context(|| format!("ListContainers leaves out {id}"))?;
            let state = container.state();
            ensure!(state == ContainerState::ContainerRunning, "ListContainers says {state:?} of {id}");
        }
        answers += 1;
    }
    ensure!(answers > u64::from(KILLS), "only {answers} answers");
    Ok(())
}

/// Runs one pod after the other, each with a container, an exec and a log.
async fn come_and_go(
    cri: Cri,
    shared: Arc<Shared>,
    worker: usize,
    logs: std::path::PathBuf,
    seed: u64,
) -> Result<()> {
    let mut random = Random(seed);
    let mut round = 0;
    while !shared.done.load(Ordering::SeqCst) {
        let config = ask::pod(&format!("w{worker}-{round}"), &logs);
        std::fs::create_dir_all(&config.log_directory)?;
        let id = shared.call("RunPodSandbox", || cri.run_pod(&config)).await?;
        let status = shared.call("PodSandboxStatus", || cri.pod_status(&id)).await?;
        ensure!(status.state() == PodSandboxState::SandboxReady, "{status:?}");
        let address = status.network.context("no network")?.ip;
        shared.ready.lock().expect("no task panics with it").insert(id.clone(), address);
        let pod = Pod::known(&id, &config, &cri);
        let container =
            ask::script("c", "echo hello; trap 'exit 0' TERM; while :; do sleep 1000 & wait; done");
        let made = shared.call("CreateContainer", || cri.create(&id, &container, &config)).await?;
        let start = async || match cri.start(&made).await {
            // The answer to the first attempt may have been lost with the daemon.
            Err(error) => match cri.status(&made).await {
                Ok(status) if status.state() == ContainerState::ContainerRunning => Ok(()),
                _ => Err(error),
            },
            ok => ok,
        };
        shared.call("StartContainer", start).await?;
        let answer = shared.call("ExecSync", || cri.exec(&made, &["echo", "there"], 30)).await?;
        ensure!(answer.stdout == b"there\n" && answer.exit_code == 0, "{answer:?}");
        podvisor_tests::eventually("the container's line is in its log", || async {
            ensure!(pod.log("c.log")?.stdout() == "hello\n");
            Ok(())
        })
        .await?;
        shared.ready.lock().expect("no task panics with it").remove(&id);
        if random.below(2) == 0 {
            shared.call("StopContainer", || cri.stop(&made, 10)).await?;
            let status = shared.call("ContainerStatus", || cri.status(&made)).await?;
            ensure!(status.exit_code == 0, "{status:?}");
            shared.call("RemoveContainer", || cri.remove(&made)).await?;
        }
        if random.below(4) > 0 {
            shared.call("StopPodSandbox", || cri.stop_pod(&id)).await?;
        }
        shared.call("RemovePodSandbox", || cri.remove_pod(&id)).await?;
        round += 1;
    }
    Ok(())
}
