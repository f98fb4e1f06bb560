//! The daemon dies at every recorded stage of every request, and the request is asked again, as kubelet does.

use std::collections::{BTreeMap, VecDeque};
use std::time::Instant;

use anyhow::{Context, Result, bail, ensure};
use podvisor_critest::node::{Options, debug_daemon_program};
use podvisor_fault::POINTS;
use podvisor_proto::cri::{ContainerState, LinuxContainerResources, NamespaceMode, PodSandboxState};
use podvisor_tests::cri::{Cri, spec};
use podvisor_tests::eventually::PATIENCE;
use podvisor_tests::fixture::{Pod, numbered};
use podvisor_tests::images::{BUSYBOX, TAGGED};
use podvisor_tests::world::World;
use podvisor_tests::wrapper::{Fault, Wrapper};
use podvisor_tests::{Fixture, Tests, ask, eventually};
use tonic::{Code, Status};

use crate::is_full;

pub(crate) fn add(tests: &mut Tests) {
    let options = Options { program: debug_daemon_program(), ..Options::default() };
    tests.add_with("points::every_stage_is_survived", options, every_stage_is_survived);
}

async fn every_stage_is_survived(f: &mut Fixture) -> Result<()> {
    let wrapper = f.faulty_runtime()?;
    f.cri.pull(BUSYBOX).await?;
    let counting =
        ask::script("c", "trap 'exit 0' TERM; i=0; while :; do echo $i; i=$((i+1)); sleep 0.05; done");
    let steady = f.pod("steady").await?;
    let container = steady.start(&counting).await?;
    let address = f.cri.pod_status(&steady.id).await?.network.context("no network")?.ip;
    let mut node = Node {
        f,
        wrapper,
        pods: [(steady.id.clone(), address)].into(),
        containers: [(container.clone(), vec![ContainerState::ContainerRunning])].into(),
        armed: None,
        next: VecDeque::new(),
        reached: 0,
    };
    // In the short form one life goes past many points, one after the other; in the whole each has a life of its own.
    let mut points: VecDeque<String> = POINTS.iter().map(ToString::to_string).collect();
    if is_full() {
        // Other records of the same life.
        points.extend(
            ["record.written:3", "record.replaced:3", "record.written:6", "record.replaced:6"]
                .map(String::from),
        );
        points.extend(["release.mount:2", "release.directory:2", "release.cgroup:2"].map(String::from));
    }
    while let Some(point) = points.pop_front() {
        node.next = if is_full() { VecDeque::new() } else { std::mem::take(&mut points) };
        node.f.kill()?;
        node.arm(Some(point.clone()))?;
        let before = World::now();
        node.live().await.with_context(|| format!("a daemon that dies at {point} and those after it"))?;
        eventually("nothing is left of the life", || async { World::now().things_since(&before) })
            .await
            .with_context(|| format!("after {point}"))?;
        ensure!(node.armed.as_ref() != Some(&point), "no life ever reaches {point}");
        points.extend(node.armed.take());
        points.extend(node.next.drain(..));
    }
    println!("points: the daemon died {} times", node.reached);
    let Node { f, .. } = node;
    let running = f.cri.status(&container).await?;
    ensure!(running.state() == ContainerState::ContainerRunning, "{running:?}");
    f.cri.stop(&container, 10).await?;
    let all = steady.log("c.log")?.stdout();
    ensure!(all == numbered("", 0..all.lines().count()), "the steady log has gaps or repetitions");
    Ok(())
}

/// The node, and what has to be on it whenever the daemon answers.
struct Node<'a> {
    f: &'a mut Fixture,
    wrapper: Wrapper,
    /// Ready pods with their addresses.
    pods: BTreeMap<String, String>,
    /// Containers with the states that they may be shown in.
    containers: BTreeMap<String, Vec<ContainerState>>,
    armed: Option<String>,
    next: VecDeque<String>,
    reached: usize,
}

impl Node<'_> {
    /// Starts the daemon with that point, or those after it where it dies before it serves: what it takes up again by itself
    /// has points too.
    fn arm(&mut self, mut point: Option<String>) -> Result<()> {
        while let Some(name) = point {
            match self.f.start_armed(&name) {
                Ok(()) => {
                    self.armed = Some(name);
                    return Ok(());
                }
                Err(error) if format!("{error:#}").contains("signal: 9") => self.reached += 1,
                Err(error) => return Err(error),
            }
            point = self.next.pop_front();
        }
        self.armed = None;
        self.f.start()
    }

    /// Asks until there is an answer from a daemon that lives on.
    async fn ask<T>(&mut self, call: impl AsyncFn(&Cri) -> Result<T, Status>) -> Result<Result<T, Status>> {
        loop {
            let cri = self.f.cri.clone();
            let error = match call(&cri).await {
                Ok(answer) => return Ok(Ok(answer)),
                Err(error) => error,
            };
            let cut = matches!(error.code(), Code::Unavailable | Code::Unknown | Code::Cancelled);
            if !self.f.has_died(if cut { 5000 } else { 100 })? {
                return Ok(Err(error));
            }
            self.revive().await?;
        }
    }

    async fn must<T>(&mut self, what: &str, call: impl AsyncFn(&Cri) -> Result<T, Status>) -> Result<T> {
        let at = self.armed.clone();
        self.ask(call).await?.with_context(|| format!("{what} (armed: {at:?}, now {:?})", self.armed))
    }

    /// Starts the daemon again and looks whether it knows everything, from its first answer on.
    async fn revive(&mut self) -> Result<()> {
        self.reached += 1;
        let died_at = self.armed.take();
        let point = self.next.pop_front();
        self.arm(point)?;
        self.look().await.with_context(|| format!("after it died at {died_at:?}"))
    }

    async fn look(&mut self) -> Result<()> {
        let listed = self.f.cri.pods().await;
        let containers = self.f.cri.containers().await;
        let (Ok(listed), Ok(containers)) = (listed, containers) else {
            // It may have come by its point in the work that it takes up again by itself.
            ensure!(self.f.has_died(5000)?, "a running daemon gives no list");
            return Box::pin(self.revive()).await;
        };
        for (id, address) in &self.pods {
            let pod =
                listed.iter().find(|pod| pod.id == *id).with_context(|| format!("pod {id} is missing"))?;
            ensure!(pod.state() == PodSandboxState::SandboxReady, "{pod:?}");
            if let Ok(status) = self.f.cri.pod_status(id).await {
                let ip = status.network.map(|network| network.ip).unwrap_or_default();
                ensure!(ip == *address, "the address of {id} was {address} and is {ip:?}");
            }
        }
        for (id, states) in &self.containers {
            let found = containers.iter().find(|container| container.id == *id);
            let found = found.with_context(|| format!("container {id} is missing"))?;
            ensure!(states.contains(&found.state()), "container {id} is {:?}, not {states:?}", found.state());
        }
        Ok(())
    }

    async fn status(&mut self, id: &str) -> Result<podvisor_proto::cri::ContainerStatus> {
        self.must("ContainerStatus", async |cri| cri.status(id).await).await
    }

    /// Starts a container; the answer may have been lost with the daemon.
    async fn start(&mut self, id: &str) -> Result<()> {
        self.containers
            .insert(id.to_owned(), vec![ContainerState::ContainerCreated, ContainerState::ContainerRunning]);
        if let Err(error) = self.ask(async |cri| cri.start(id).await).await? {
            let status = self.status(id).await?;
            ensure!(
                status.state() == ContainerState::ContainerRunning,
                "StartContainer: {error}; {status:?}"
            );
        }
        self.containers.insert(id.to_owned(), vec![ContainerState::ContainerRunning]);
        Ok(())
    }

    /// Everything that can happen to a pod and an image, once.
    async fn live(&mut self) -> Result<()> {
        self.must("PullImage", async |cri| cri.pull(TAGGED[0]).await).await?;

        let mut refused = self.f.ask_pod("refused");
        refused.linux.get_or_insert_default().sysctls.insert("kernel.shmmax".into(), "nonsense".into());
        let outcome = self.ask(async |cri| cri.run_pod(&refused).await).await?;
        ensure!(outcome.is_err(), "a sandbox with a sysctl that cannot be set");

        let mut config = self.f.ask_pod("life");
        ask::pod_namespaces(&mut config).pid = NamespaceMode::Pod.into();
        std::fs::create_dir_all(&config.log_directory)?;
        let id = self.must("RunPodSandbox", async |cri| cri.run_pod_by(&config, "faulty").await).await?;
        let status = self.must("PodSandboxStatus", async |cri| cri.pod_status(&id).await).await?;
        let address = status.network.context("no network")?.ip;
        ensure!(!address.is_empty(), "no address");
        self.pods.insert(id.clone(), address);
        let pod = Pod::known(&id, &config, &self.f.cri);

        self.containers_that_fail(&id, &config).await?;
        self.container_that_works(&pod, &config).await?;

        let mut stubborn = of_the_pod(ask::script("stubborn", "trap '' TERM; echo set; sleep 1000"));
        stubborn.image = Some(spec(TAGGED[0]));
        let last =
            self.must("CreateContainer", async |cri| cri.create(&id, &stubborn, &config).await).await?;
        self.start(&last).await?;
        eventually("the trap is set", || async {
            ensure!(pod.log("stubborn.log")?.stdout() == "set\n");
            Ok(())
        })
        .await?;
        self.containers
            .insert(last.clone(), vec![ContainerState::ContainerRunning, ContainerState::ContainerExited]);
        self.must("StopContainer", async |cri| cri.stop(&last, 1).await).await?;
        let status = self.status(&last).await?;
        ensure!(status.exit_code == 137, "{status:?}");

        self.pods.remove(&id);
        self.must("StopPodSandbox", async |cri| cri.stop_pod(&id).await).await?;
        let status = self.must("PodSandboxStatus", async |cri| cri.pod_status(&id).await).await?;
        ensure!(status.state() == PodSandboxState::SandboxNotready, "{status:?}");
        self.containers.remove(&last);
        self.must("RemovePodSandbox", async |cri| cri.remove_pod(&id).await).await?;
        let listed = self.must("ListPodSandbox", async |cri| cri.pods().await).await?;
        ensure!(listed.len() == self.pods.len(), "{listed:?}");
        self.must("RemoveImage", async |cri| cri.remove_image(TAGGED[0]).await).await?;
        Ok(())
    }

    async fn containers_that_fail(
        &mut self,
        id: &str,
        config: &podvisor_proto::cri::PodSandboxConfig,
    ) -> Result<()> {
        let mut bad = of_the_pod(ask::container("bad", &["/no/such/program"]));
        bad.image = Some(spec(TAGGED[0]));
        let outcome = self.ask(async |cri| cri.create(id, &bad, config).await).await?;
        ensure!(outcome.is_err(), "a container without a program");

        let unlucky = of_the_pod(ask::waiting("unlucky"));
        let made = self.must("CreateContainer", async |cri| cri.create(id, &unlucky, config).await).await?;
        self.wrapper.plan("start", 0, Fault::Fail)?;
        let outcome = self.ask(async |cri| cri.start(&made).await).await?;
        ensure!(outcome.is_err(), "the runtime's start failed");
        let status = self.status(&made).await?;
        ensure!(
            status.state() == ContainerState::ContainerExited && status.reason == "StartError",
            "{status:?}"
        );
        self.wrapper.behave()?;
        self.must("RemoveContainer", async |cri| cri.remove(&made).await).await?;
        let listed = self.must("ListContainers", async |cri| cri.containers().await).await?;
        ensure!(listed.len() == self.containers.len(), "{listed:?}");
        Ok(())
    }

    async fn container_that_works(
        &mut self,
        pod: &Pod,
        config: &podvisor_proto::cri::PodSandboxConfig,
    ) -> Result<()> {
        let id = &pod.id;
        let mut main = of_the_pod(ask::script(
            "main",
            "trap 'echo bye; exit 7' TERM; i=0; while :; do echo $i; i=$((i+1)); sleep 0.02; done",
        ));
        main.image = Some(spec(TAGGED[0]));
        let made = self.must("CreateContainer", async |cri| cri.create(id, &main, config).await).await?;
        self.start(&made).await?;
        let shares = LinuxContainerResources { cpu_shares: 512, ..LinuxContainerResources::default() };
        self.must("UpdateContainerResources", async |cri| cri.update(&made, shares.clone()).await).await?;
        let status = self.status(&made).await?;
        let now = status.resources.and_then(|resources| resources.linux).context("no resources")?;
        ensure!(now.cpu_shares == 512, "{now:?}");
        let answer = self.must("ExecSync", async |cri| cri.exec(&made, &["echo", "there"], 30).await).await?;
        ensure!(answer.stdout == b"there\n" && answer.exit_code == 0, "{answer:?}");
        eventually("it writes", || async {
            ensure!(pod.log("main.log")?.stdout().lines().count() > 2);
            Ok(())
        })
        .await?;
        // Between its fork and its exec each `sleep` of the shell has the shell's command line: a look may see one too many, a program that
        // runs twice is seen twice at every look.
        let deadline = Instant::now() + PATIENCE;
        loop {
            let found = self
                .must("ExecSync", async |cri| cri.exec(&made, &["pgrep", "-f", "trap 'echo bye"], 30).await)
                .await?;
            let count = String::from_utf8_lossy(&found.stdout).lines().count();
            if count == 1 {
                break;
            }
            ensure!(Instant::now() < deadline, "its program runs {count} times");
        }
        self.containers
            .insert(made.clone(), vec![ContainerState::ContainerRunning, ContainerState::ContainerExited]);
        self.must("StopContainer", async |cri| cri.stop(&made, 10).await).await?;
        let status = self.status(&made).await?;
        if status.state() != ContainerState::ContainerExited || status.exit_code != 7 {
            bail!("{status:?}");
        }
        let all = pod.log("main.log")?.stdout();
        let count = all.lines().count() - 1;
        ensure!(all == numbered("", 0..count) + "bye\n", "its log has gaps or repetitions:\n{all}");
        self.containers.remove(&made);
        self.must("RemoveContainer", async |cri| cri.remove(&made).await).await?;
        Ok(())
    }
}

/// A container in its pod's pid namespace.
fn of_the_pod(mut config: podvisor_proto::cri::ContainerConfig) -> podvisor_proto::cri::ContainerConfig {
    ask::container_namespaces(&mut config).pid = NamespaceMode::Pod.into();
    config
}
