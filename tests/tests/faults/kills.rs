//! The daemon is killed at random points while pods come and go, and started again each time.
//!
//! Whoever asks it must never see a pod missing or not ready that is known to be ready: kubelet would replace it.

use std::collections::BTreeMap;
use std::future::Future;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use anyhow::{Context, Result, bail, ensure};
use podvisor_critest::node::{Options, VM};
use podvisor_proto::cri::{ContainerState, PodSandboxState};
use podvisor_tests::cri::Cri;
use podvisor_tests::fixture::{Pod, numbered};
use podvisor_tests::images::BUSYBOX;
use podvisor_tests::random::Random;
use podvisor_tests::stream::Session;
use podvisor_tests::{Fixture, Tests, ask, eventually};

use tonic::Status;

use crate::scale;

/// Pods that stay, and tasks in which others come and go.
const STEADY: usize = 3;
const WORKERS: usize = 7;
/// A virtual machine takes seconds to start, so none come and go.
const MACHINES: usize = 2;

pub(crate) fn add(tests: &mut Tests) {
    tests.add("kills::at_random_moments_lose_nothing", async |f: &mut Fixture| {
        at_random_moments(f, scale(30, 300), STEADY, WORKERS).await
    });
    let options = Options { handler: VM.to_owned(), ..Options::default() };
    tests.add_with("kills::at_random_moments_lose_no_virtual_machine", options, async |f: &mut Fixture| {
        at_random_moments(f, scale(10, 100), MACHINES, 0).await
    });
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

async fn at_random_moments(f: &mut Fixture, kills: u32, pods: usize, workers: usize) -> Result<()> {
    let mut random = Random::seeded("kills");
    let shared = Arc::new(Shared::default());
    f.cri.pull(BUSYBOX).await?;
    let counting =
        ask::script("c", "trap 'exit 0' TERM; i=0; while :; do echo $i; i=$((i+1)); sleep 0.01; done");
    let mut steady = Vec::new();
    for number in 0..pods {
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
    for worker in 0..workers {
        let logs = f.logs();
        tasks.spawn(come_and_go(f.cri.clone(), Arc::clone(&shared), worker, logs, random.fork()));
    }
    for _ in 0..kills {
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
    ensure!(answers > u64::from(scale(30, 300)), "only {answers} answers");
    Ok(())
}

/// A container of a pod that comes and goes.
struct Made {
    id: String,
    name: String,
    /// What it ends with when it is told to.
    code: i32,
    running: bool,
}

/// Pods that come and go, one after the other.
struct Worker {
    cri: Cri,
    shared: Arc<Shared>,
    random: Random,
    logs: std::path::PathBuf,
    number: usize,
}

async fn come_and_go(
    cri: Cri,
    shared: Arc<Shared>,
    number: usize,
    logs: std::path::PathBuf,
    random: Random,
) -> Result<()> {
    let mut worker = Worker { cri, shared, random, logs, number };
    for round in 0.. {
        if worker.shared.done.load(Ordering::SeqCst) {
            break;
        }
        worker.one_pod(round).await?;
    }
    Ok(())
}

impl Worker {
    /// A pod's life: what is done with its containers comes in random order.
    async fn one_pod(&mut self, round: usize) -> Result<()> {
        let (cri, shared) = (self.cri.clone(), Arc::clone(&self.shared));
        let config = ask::pod(&format!("w{}-{round}", self.number), &self.logs);
        std::fs::create_dir_all(&config.log_directory)?;
        let id = shared.call("RunPodSandbox", || cri.run_pod(&config)).await?;
        let status = shared.call("PodSandboxStatus", || cri.pod_status(&id)).await?;
        ensure!(status.state() == PodSandboxState::SandboxReady, "{status:?}");
        let address = status.network.context("no network")?.ip;
        shared.ready.lock().expect("no task panics with it").insert(id.clone(), address);
        let pod = Pod::known(&id, &config, &cri);
        let mut containers: Vec<Made> = Vec::new();
        for step in 0..8 + self.random.below(8) {
            let at = usize::try_from(self.random.below(2))?.min(containers.len().saturating_sub(1));
            let room = containers.len() < 2;
            match (containers.get_mut(at), self.random.below(8)) {
                (None, _) | (Some(_), 0) if room => {
                    containers.push(self.create(&pod, step).await?);
                }
                (Some(made), _) if !made.running => {
                    self.start(made).await?;
                    written(&pod, made).await?;
                }
                (Some(made), 1 | 2) => {
                    let exec = || cri.exec(&made.id, &["echo", "there"], 30);
                    let answer = shared.call("ExecSync", exec).await?;
                    ensure!(answer.stdout == b"there\n" && answer.exit_code == 0, "{answer:?}");
                }
                (Some(made), 3) => self.exec_stream(made, step).await?,
                (Some(made), 4) => self.attach(made).await?,
                (Some(_), 5) => {
                    let made = containers.swap_remove(at);
                    self.stop(&pod, &made).await?;
                    shared.call("RemoveContainer", || cri.remove(&made.id)).await?;
                }
                (Some(made), 6) => written(&pod, made).await?,
                _ => {}
            }
        }
        shared.ready.lock().expect("no task panics with it").remove(&id);
        if let Some(made) = containers.iter().find(|made| made.running)
            && self.random.one_in(2)
        {
            self.stop(&pod, made).await?;
        }
        if !self.random.one_in(4) {
            shared.call("StopPodSandbox", || cri.stop_pod(&id)).await?;
            for made in &containers {
                whole(&pod, made)?;
            }
        }
        shared.call("RemovePodSandbox", || cri.remove_pod(&id)).await
    }

    async fn create(&mut self, pod: &Pod, step: u64) -> Result<Made> {
        let name = format!("c{step}");
        let code = i32::try_from(self.random.below(100))?;
        let text =
            format!("trap 'exit {code}' TERM; i=0; while :; do echo $i; i=$((i+1)); sleep 0.02 & wait; done");
        let config = ask::script(&name, &text);
        let create = || self.cri.create(&pod.id, &config, &pod.config);
        let id = self.shared.call("CreateContainer", create).await?;
        Ok(Made { id, name, code, running: false })
    }

    async fn start(&self, made: &mut Made) -> Result<()> {
        let start = async || match self.cri.start(&made.id).await {
            // The answer to the first attempt may have been lost with the daemon.
            Err(error) => match self.cri.status(&made.id).await {
                Ok(status) if status.state() == ContainerState::ContainerRunning => Ok(()),
                _ => Err(error),
            },
            ok => ok,
        };
        self.shared.call("StartContainer", start).await?;
        made.running = true;
        Ok(())
    }

    async fn stop(&self, pod: &Pod, made: &Made) -> Result<()> {
        self.shared.call("StopContainer", || self.cri.stop(&made.id, 10)).await?;
        let status = self.shared.call("ContainerStatus", || self.cri.status(&made.id)).await?;
        ensure!(status.state() == ContainerState::ContainerExited, "{status:?}");
        if made.running {
            ensure!(status.exit_code == made.code, "{status:?}");
        }
        whole(pod, made)
    }

    /// An exec over the streaming server: whole, or cut, and then its process goes too.
    async fn exec_stream(&self, made: &Made, step: u64) -> Result<()> {
        let marker = format!("{}-{step}", made.id);
        let text = format!(": {marker}; i=0; while [ $i -lt 15 ]; do echo $i; i=$((i+1)); sleep 0.01; done");
        let generation = self.shared.generation.load(Ordering::SeqCst);
        let session = async {
            let url = self.cri.exec_url(&made.id, &["sh", "-c", &text]).await?;
            Session::open(&url).await?.whole().await
        };
        let (stdout, outcome) = match tokio::time::timeout(eventually::PATIENCE, session).await {
            Ok(Ok(ended)) => ended,
            // No daemon for a moment.
            Ok(Err(_))
                if self.shared.generation.load(Ordering::SeqCst) != generation || generation % 2 == 1 =>
            {
                return Ok(());
            }
            Ok(Err(error)) => return Err(error.context("exec")),
            Err(_) => bail!("an exec neither ends nor is cut"),
        };
        let whole = numbered("", 0..15);
        ensure!(whole.starts_with(&stdout), "an exec's output: {stdout:?}");
        if outcome.contains("Success") {
            ensure!(stdout == whole, "an exec that ended well lacks output: {stdout:?}");
        } else {
            ensure!(
                self.shared.generation.load(Ordering::SeqCst) != generation || generation % 2 == 1,
                "an exec was cut by a daemon that lives: {outcome}"
            );
        }
        eventually("the exec's process goes", || async {
            let text = format!("pgrep -f {marker}");
            // pgrep's own shell has the marker too, so it is asked from outside.
            ensure!(!runs(&marker), "{text} finds one");
            Ok(())
        })
        .await
    }

    /// Attached for a moment: numbers in a row.
    async fn attach(&self, made: &Made) -> Result<()> {
        let session = async {
            let url = self.cri.attach_url(&made.id).await?;
            let mut session = Session::open(&url).await?;
            let mut output = String::new();
            while output.lines().count() < 5 {
                match session.next().await? {
                    Some((_, bytes)) => output.push_str(&String::from_utf8_lossy(&bytes)),
                    None => break,
                }
            }
            anyhow::Ok(output)
        };
        let attached = tokio::time::timeout(eventually::PATIENCE, session);
        // Cut it may be, but not left hanging.
        let Ok(output) = attached.await.context("an attach neither ends nor is cut")? else { return Ok(()) };
        let numbers: Vec<u64> = output
            .lines()
            .take(output.lines().count().saturating_sub(1))
            .map(|line| line.trim().parse().with_context(|| format!("{output:?}")))
            .collect::<Result<_>>()?;
        let in_a_row = numbers.windows(2).all(|pair| pair[1] == pair[0] + 1);
        ensure!(in_a_row, "an attach shows gaps or repetitions: {output:?}");
        Ok(())
    }
}

/// Whether a process with this in its command line runs on the node.
fn runs(marker: &str) -> bool {
    std::fs::read_dir("/proc").into_iter().flatten().flatten().any(|entry| {
        let arguments = std::fs::read(entry.path().join("cmdline")).unwrap_or_default();
        String::from_utf8_lossy(&arguments).contains(marker)
    })
}

/// Waits until a container has written something.
async fn written(pod: &Pod, made: &Made) -> Result<()> {
    eventually("the container writes", || async {
        ensure!(!pod.log(&format!("{}.log", made.name))?.stdout().is_empty());
        Ok(())
    })
    .await
}

/// Its log has every number once.
fn whole(pod: &Pod, made: &Made) -> Result<()> {
    if !made.running {
        return Ok(());
    }
    let all = pod.log(&format!("{}.log", made.name))?.stdout();
    ensure!(all == numbered("", 0..all.lines().count()), "the log of {} has gaps or repetitions", made.id);
    Ok(())
}
