//! Limits and figures of cgroup v2 with the kernel that applies them. Run in a sandbox in the lab.

use std::fs;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use anyhow::{Context, Result, ensure};
use podvisor_proto::cri::{
    ContainerStats, ContainerStatsRequest, LinuxContainerResources, UpdateContainerResourcesRequest,
};
use podvisor_tests::fixture::Pod;
use podvisor_tests::images::TestImages;
use podvisor_tests::{Fixture, ask, eventually};

const MIB: i64 = 1 << 20;

/// One test, because the images take longest to make.
#[test]
#[ignore = "runs in the lab: make test-lab"]
fn limits_and_figures() {
    crate::run(async {
        let images = Arc::new(TestImages::serve()?);
        on_a_node(&images, async |fixture| set_and_merged(fixture).await).await.context("limits")?;
        on_a_node(&images, async |fixture| swap(fixture).await).await.context("swap")?;
        on_a_node(&images, async |fixture| stats(fixture).await).await.context("stats")
    });
}

async fn on_a_node(
    images: &Arc<TestImages>,
    test: impl AsyncFnOnce(&mut Fixture) -> Result<()>,
) -> Result<()> {
    ensure!(Path::new("/sys/fs/cgroup/cgroup.controllers").exists(), "this is not cgroup v2 alone");
    let mut fixture = Fixture::new(images)?;
    if let Err(error) = test(&mut fixture).await {
        return Err(error.context(format!("the daemon's log ends with\n{}\n", fixture.node.log_tail(60))));
    }
    fixture.finish().await
}

fn cgroup(pod: &Pod, container: &str) -> PathBuf {
    let parent = pod.config.linux.as_ref().map(|linux| linux.cgroup_parent.trim_start_matches('/'));
    Path::new("/sys/fs/cgroup").join(parent.unwrap_or_default()).join(container)
}

/// Compares files of a cgroup with what is expected in them.
fn shows(cgroup: &Path, expected: &[(&str, &str)]) -> Result<()> {
    for (file, value) in expected {
        let path = cgroup.join(file);
        let read = fs::read_to_string(&path).with_context(|| format!("reading {}", path.display()))?;
        ensure!(read.trim() == *value, "{file} is {:?}, not {value:?}", read.trim());
    }
    Ok(())
}

async fn update(fixture: &Fixture, container: &str, resources: LinuxContainerResources) -> Result<()> {
    let request = UpdateContainerResourcesRequest {
        container_id: container.to_owned(),
        linux: Some(resources),
        ..UpdateContainerResourcesRequest::default()
    };
    fixture
        .cri
        .runtime
        .clone()
        .update_container_resources(request)
        .await
        .context("UpdateContainerResources")?;
    Ok(())
}

async fn set_and_merged(fixture: &mut Fixture) -> Result<()> {
    let mut config = ask::waiting("limited");
    *ask::resources(&mut config) = LinuxContainerResources {
        cpu_period: 100_000,
        cpu_quota: 50_000,
        memory_limit_in_bytes: 64 * MIB,
        unified: [("memory.high", "50331648"), ("pids.max", "77")].map(|(k, v)| (k.into(), v.into())).into(),
        ..LinuxContainerResources::default()
    };
    let (pod, id) = fixture.running("limits", &config).await?;
    let cgroup = cgroup(&pod, &id);
    shows(
        &cgroup,
        &[
            ("cpu.max", "50000 100000"),
            ("memory.max", "67108864"),
            ("memory.high", "50331648"),
            ("pids.max", "77"),
        ],
    )?;

    // What an update does not name stays, one by one also within `unified`.
    let more = LinuxContainerResources {
        memory_limit_in_bytes: 128 * MIB,
        unified: [("memory.low".into(), "4194304".into())].into(),
        ..LinuxContainerResources::default()
    };
    update(fixture, &id, more).await?;
    shows(
        &cgroup,
        &[
            ("cpu.max", "50000 100000"),
            ("memory.max", "134217728"),
            ("memory.high", "50331648"),
            ("memory.low", "4194304"),
            ("pids.max", "77"),
        ],
    )?;
    let told = fixture.cri.status(&id).await?.resources.and_then(|resources| resources.linux);
    let told = told.context("the status has no resources")?;
    ensure!(told.memory_limit_in_bytes == 128 * MIB && told.unified.len() == 3, "the status says {told:?}");
    Ok(())
}

/// KEP-2400: kubelet names `memory.swap.max`; others the sum of memory and swap; without either there is none.
async fn swap(fixture: &mut Fixture) -> Result<()> {
    fixture.cri.pull(podvisor_tests::images::BUSYBOX).await.context("PullImage")?;
    let pod = fixture.pod("swap").await?;
    for (name, sum, unified, expected) in [
        ("none", 0, None, "0"),
        ("sum", 96 * MIB, None, "33554432"),
        ("equal", 64 * MIB, None, "0"),
        ("unified", 0, Some("16777216"), "16777216"),
        ("unlimited", -1, None, "max"),
    ] {
        let mut config = ask::waiting(name);
        let resources = ask::resources(&mut config);
        resources.memory_limit_in_bytes = 64 * MIB;
        resources.memory_swap_limit_in_bytes = sum;
        resources.unified =
            unified.iter().map(|value| ("memory.swap.max".to_owned(), (*value).to_owned())).collect();
        let id = pod.start(&config).await.with_context(|| format!("case {name}"))?;
        shows(&cgroup(&pod, &id), &[("memory.swap.max", expected)])
            .with_context(|| format!("case {name}"))?;
    }
    Ok(())
}

async fn read_stats(fixture: &Fixture, id: &str) -> Result<ContainerStats> {
    let request = ContainerStatsRequest { container_id: id.to_owned() };
    let answer = fixture.cri.runtime.clone().container_stats(request).await.context("ContainerStats")?;
    answer.into_inner().stats.context("the answer has no stats")
}

async fn stats(fixture: &mut Fixture) -> Result<()> {
    // Four that want one half of a processor wait for it most of the time.
    let mut config = ask::script("busy", "for i in 1 2 3 4; do while :; do :; done & done; wait");
    ask::resources(&mut config).cpu_period = 100_000;
    ask::resources(&mut config).cpu_quota = 50_000;
    ask::resources(&mut config).memory_limit_in_bytes = 64 * MIB;
    let (_, id) = fixture.running("stats", &config).await?;
    eventually("the processors' pressure is told", || async {
        let stats = read_stats(fixture, &id).await?;
        let cpu = stats.cpu.context("no cpu")?;
        let some = cpu.psi.and_then(|psi| psi.some).context("no pressure of the processors")?;
        ensure!(some.total > 0, "nobody has waited yet: {some:?}");
        ensure!(cpu.usage_core_nano_seconds.is_some_and(|used| used.value > 0), "no time was used");
        let memory = stats.memory.context("no memory")?;
        ensure!(
            memory.psi.is_some() && stats.io.is_some_and(|io| io.psi.is_some()),
            "no pressure of memory or io"
        );
        ensure!(memory.working_set_bytes.is_some_and(|set| set.value > 0), "no working set");
        let available = memory.available_bytes.context("no limit is known")?.value;
        ensure!(available > 0 && available < 64 << 20, "{available} bytes are available");
        let swap = stats.swap.context("no swap")?;
        ensure!(swap.swap_usage_bytes.is_some_and(|used| used.value == 0), "swap in use: {swap:?}");
        Ok(())
    })
    .await
}
