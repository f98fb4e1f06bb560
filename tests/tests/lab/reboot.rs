//! A loss of power while pods run. Two runs of the lab on one disk: `before` ends with the power cut, `after` looks at what the next start
//! makes of it. Once per kind of network, because each has state of its own on the disk.

use std::collections::BTreeSet;
use std::fs::{self, File};
use std::path::{Path, PathBuf};

use anyhow::{Context, Result, ensure};
use podvisor_critest::node::{Daemon, Node, Options};
use podvisor_proto::cri::{
    ContainerState, NamespaceMode, PodSandboxConfig, PodSandboxState, PortMapping, Protocol,
};
use podvisor_tests::cri::Cri;
use podvisor_tests::fixture::Pod;
use podvisor_tests::images::{BUSYBOX, HOST, TestImages};
use podvisor_tests::world::World;
use podvisor_tests::{ask, eventually};
use serde_json::{Value, json};

/// Where the script that starts the lab mounts the disk.
const DISK: &str = "/mnt";

#[test]
#[ignore = "runs in the lab: make test-lab"]
fn builtin_before() {
    crate::run(before("builtin"));
}

#[test]
#[ignore = "runs in the lab: make test-lab"]
fn builtin_after() {
    crate::run(after("builtin"));
}

#[test]
#[ignore = "runs in the lab: make test-lab"]
fn cni_before() {
    crate::run(before("cni"));
}

#[test]
#[ignore = "runs in the lab: make test-lab"]
fn cni_after() {
    crate::run(after("cni"));
}

fn directory(network: &str) -> PathBuf {
    Path::new(DISK).join(network)
}

fn node(network: &str, images: Option<&TestImages>) -> Result<Node> {
    let node = Node::kept(
        &directory(network),
        Path::new("/run/podvisor"),
        &Options {
            mirrored: vec![HOST.to_owned()],
            mirror: images.map(|images| images.registry().address()),
            network: network.to_owned(),
            ..Options::default()
        },
    )?;
    let configurations = node.path("cni/net.d");
    fs::create_dir_all(&configurations)?;
    let addresses = json!({"type": "host-local", "dataDir": node.path("addresses"),
        "ranges": [[{"subnet": "10.77.0.0/24"}]], "routes": [{"dst": "0.0.0.0/0"}]});
    let list = json!({"cniVersion": "1.0.0", "name": "pods", "plugins": [
        {"type": "bridge", "bridge": "pods0", "isGateway": true, "ipMasq": true, "ipam": addresses},
        {"type": "portmap", "capabilities": {"portMappings": true}},
    ]});
    fs::write(configurations.join("10-pods.conflist"), list.to_string())?;
    Ok(node)
}

/// Files that stand for addresses in use.
fn addresses(node: &Node) -> BTreeSet<String> {
    let directories = ["root/network/leases", "addresses/pods"].map(|name| node.path(name));
    let files = directories.iter().flat_map(|path| fs::read_dir(path).into_iter().flatten().flatten());
    let names = files.map(|file| file.file_name().display().to_string());
    names.filter(|name| name.parse::<std::net::IpAddr>().is_ok()).collect()
}

async fn run_pod(cri: &Cri, config: PodSandboxConfig) -> Result<Pod> {
    fs::create_dir_all(&config.log_directory)?;
    let id = cri.run_pod(&config).await.context("RunPodSandbox")?;
    Ok(Pod::known(&id, &config, cri))
}

async fn before(network: &str) -> Result<()> {
    let images = TestImages::serve()?;
    let node = node(network, Some(&images))?;
    let daemon = node.start()?;
    let cri = Cri::new(&node.socket())?;
    cri.pull(BUSYBOX).await.context("PullImage")?;
    let logs = node.path("logs");

    let mut with_ports = ask::pod("plain", &logs);
    with_ports.port_mappings = vec![PortMapping {
        protocol: Protocol::Tcp.into(),
        container_port: 80,
        host_port: 8080,
        host_ip: String::new(),
    }];
    let plain = run_pod(&cri, with_ports).await?;
    let running = plain.start(&ask::waiting("running")).await?;
    let created = plain.create(&ask::waiting("created")).await?;
    let exited = plain.start(&ask::script("exited", "exit 3")).await?;
    cri.wait_exited(&exited).await?;

    let mut config = ask::pod("shared", &logs);
    ask::pod_namespaces(&mut config).pid = NamespaceMode::Pod.into();
    let shared = run_pod(&cri, config).await?;
    let sharing = shared.start(&ask::waiting("sharing")).await?;

    let mut config = ask::pod("host", &logs);
    ask::pod_namespaces(&mut config).network = NamespaceMode::Node.into();
    let host = run_pod(&cri, config).await?;

    let stopped = run_pod(&cri, ask::pod("stopped", &logs)).await?;
    cri.stop_pod(&stopped.id).await.context("StopPodSandbox")?;

    ensure!(
        addresses(&node).len() >= 2,
        "two pods have addresses, and these are in use: {:?}",
        addresses(&node)
    );
    // host-local does not sync what it writes, and a lease that the cut has emptied is lost to it. This is about leases that are there.
    for lease in fs::read_dir(node.path("addresses/pods")).into_iter().flatten().flatten() {
        File::open(lease.path())?.sync_all()?;
    }
    let told = json!({
        "boot": fs::read_to_string("/proc/sys/kernel/random/boot_id")?,
        "pods": [plain.id, shared.id, host.id, stopped.id],
        "lost": [running, created, sharing],
        "exited": exited,
        "plain": {"uid": plain.config.metadata.as_ref().map(|metadata| &metadata.uid)},
    });
    // Only what this test itself has to remember is synced: what the daemon has answered has to be there by its own doing.
    let file = File::create(node.path("told.json")).context("making a file")?;
    serde_json::to_writer(&file, &told)?;
    file.sync_all()?;
    File::open(directory(network))?.sync_all()?;
    // Their end would tidy up. The next thing that happens is the power cut.
    std::mem::forget((daemon, node, images));
    Ok(())
}

async fn after(network: &str) -> Result<()> {
    // No registry any more: what was pulled is there.
    let node = node(network, None)?;
    let told: Value = serde_json::from_slice(&fs::read(node.path("told.json"))?)?;
    ensure!(
        told["boot"] != fs::read_to_string("/proc/sys/kernel/random/boot_id")?,
        "the machine was not started again"
    );
    let before = World::now();
    let daemon = node.start()?;
    let outcome = look(&node, &told, &before).await;
    let outcome = match outcome {
        Ok(()) => end(daemon, &node, &before).await,
        Err(error) => Err(error),
    };
    outcome.with_context(|| format!("the daemon's log ends with\n{}\n", node.log_tail(60)))
}

fn ids(value: &Value) -> Vec<String> {
    value.as_array().into_iter().flatten().filter_map(|id| id.as_str().map(str::to_owned)).collect()
}

async fn look(node: &Node, told: &Value, before: &World) -> Result<()> {
    let cri = Cri::new(&node.socket())?;
    // What kubelet sees with its first list: everything, and nothing that runs.
    let pods = cri.pods().await.context("ListPodSandbox")?;
    let known: BTreeSet<String> = pods.iter().map(|pod| pod.id.clone()).collect();
    ensure!(known == ids(&told["pods"]).into_iter().collect(), "other pods than before: {known:?}");
    for pod in &pods {
        ensure!(pod.state() == PodSandboxState::SandboxNotready, "ready after a restart: {pod:?}");
    }
    for container in ids(&told["lost"]) {
        let status = cri.status(&container).await.context("ContainerStatus")?;
        ensure!(
            status.state() == ContainerState::ContainerExited && status.exit_code != 0,
            "not ended by the restart: {status:?}"
        );
        ensure!(
            !status.reason.is_empty() && !status.message.is_empty(),
            "ended without a reason: {status:?}"
        );
        ensure!(status.finished_at > 0, "ended at no time: {status:?}");
    }
    let exited = cri.status(told["exited"].as_str().unwrap_or_default()).await.context("ContainerStatus")?;
    ensure!(exited.exit_code == 3, "the exit code of before is lost: {exited:?}");

    // Given back without being asked: addresses are few, and kubelet makes new pods before it removes old ones.
    eventually("addresses are given back", || async {
        let left = addresses(node);
        ensure!(left.is_empty(), "in use: {left:?}");
        Ok(())
    })
    .await?;
    for pod in ids(&told["pods"]) {
        let status = cri.pod_status(&pod).await.context("PodSandboxStatus")?;
        let address = status.network.map(|network| network.ip).unwrap_or_default();
        ensure!(address.is_empty(), "a pod of before still shows {address}");
    }
    eventually("namespaces, mounts and cgroups are gone", || async { World::now().things_since(before) })
        .await?;

    // kubelet's next attempt at the same pod, with the same host port, while the old one is still there.
    let logs = node.path("logs");
    let mut config = ask::pod("plain", &logs);
    if let Some(metadata) = &mut config.metadata {
        metadata.uid = told["plain"]["uid"].as_str().unwrap_or_default().to_owned();
        metadata.attempt = 1;
    }
    config.port_mappings = vec![PortMapping {
        protocol: Protocol::Tcp.into(),
        container_port: 80,
        host_port: 8080,
        host_ip: String::new(),
    }];
    let again = run_pod(&cri, config).await?;
    let container = again.start(&ask::waiting("running")).await?;
    ensure!(cri.output(&container, &["echo", "it runs"]).await? == "it runs\n");

    for pod in cri.pods().await? {
        cri.stop_pod(&pod.id).await.context("StopPodSandbox")?;
        cri.remove_pod(&pod.id).await.context("RemovePodSandbox")?;
    }
    let containers = cri.containers().await?;
    ensure!(containers.is_empty(), "containers outlived their pods: {containers:?}");
    Ok(())
}

/// Nothing of the pods is left, on the machine or on the disk.
async fn end(daemon: Daemon, node: &Node, before: &World) -> Result<()> {
    eventually("what the pods had is gone", || async { World::now().things_since(before) }).await?;
    let status = daemon.stop()?;
    ensure!(status.success(), "after SIGTERM the daemon ended with {status}");
    eventually("the processes go", || async { World::now().processes_since(before) }).await?;
    ensure!(addresses(node).is_empty(), "addresses are still in use: {:?}", addresses(node));
    for place in ["root/pods", "root/images/snapshots"] {
        let left: Vec<_> = fs::read_dir(node.path(place))
            .with_context(|| format!("reading {place}"))?
            .flatten()
            .map(|entry| entry.file_name())
            .collect();
        ensure!(left.is_empty(), "left in {place}: {left:?}");
    }
    for place in ["/run/podvisor/pods", "/run/podvisor/containers"] {
        let left = fs::read_dir(place).with_context(|| format!("reading {place}"))?.count();
        ensure!(left == 0, "left in {place}: {left}");
    }
    Ok(())
}
