//! Changing what a container or a pod may use while it runs.

use anyhow::{Context, Result, ensure};
use podvisor_proto::cri::{
    HugepageLimit, LinuxContainerResources, PodSandboxStatusRequest, UpdateContainerResourcesRequest,
    UpdatePodSandboxResourcesRequest,
};
use podvisor_tests::images::BUSYBOX;
use podvisor_tests::{Fixture, ask};
use tonic::{Code, Status};

use super::Tests;

pub(crate) fn add(tests: &mut Tests) {
    tests.add("resize::merges_and_survives", merges_and_survives);
    tests.add("resize::names_what_is_wrong", names_what_is_wrong);
    tests.add("resize::refused_half_way_is_taken_back", refused_half_way);
    tests.add("resize::of_what_does_not_run", of_what_does_not_run);
    tests.add("resize::at_the_same_time_loses_nothing", at_the_same_time);
    tests.add("resize::of_cgroup_files", of_cgroup_files);
    tests.add("resize::of_pods_is_recorded", of_pods);
}

async fn update(f: &Fixture, id: &str, linux: LinuxContainerResources) -> Result<(), Status> {
    let request = UpdateContainerResourcesRequest {
        container_id: id.to_owned(),
        linux: Some(linux),
        ..UpdateContainerResourcesRequest::default()
    };
    f.cri.runtime.clone().update_container_resources(request).await.map(|_| ())
}

async fn reported(f: &Fixture, id: &str) -> Result<LinuxContainerResources> {
    f.cri.status(id).await?.resources.and_then(|resources| resources.linux).context("no resources")
}

fn some() -> LinuxContainerResources {
    LinuxContainerResources::default()
}

/// Quota, period, memory limit and CPUs as the kernel has them.
async fn in_force(f: &Fixture, id: &str) -> Result<String> {
    let text = "cd /sys/fs/cgroup; cat cpu.max 2>/dev/null || echo $(cat cpu/cpu.cfs_quota_us cpu/cpu.cfs_period_us); \
                cat memory.max 2>/dev/null || cat memory/memory.limit_in_bytes; \
                cat cpuset.cpus 2>/dev/null || cat cpuset/cpuset.cpus";
    f.cri.output(id, &["sh", "-c", text]).await
}

async fn merges_and_survives(f: &mut Fixture) -> Result<()> {
    let mut config = ask::waiting("c");
    ask::resources(&mut config).memory_limit_in_bytes = 64 << 20;
    ask::resources(&mut config).cpuset_cpus = "0".to_owned();
    let (_, id) = f.running("merges", &config).await?;
    update(f, &id, LinuxContainerResources { cpu_period: 100_000, cpu_quota: 70_000, ..some() }).await?;
    // kubelet sends all that it knows, others what they want changed: what is not said stays.
    ensure!(
        in_force(f, &id).await? == format!("70000 100000\n{}\n0\n", 64 << 20),
        "{}",
        in_force(f, &id).await?
    );
    update(f, &id, LinuxContainerResources { memory_limit_in_bytes: 96 << 20, ..some() }).await?;
    let changed = format!("70000 100000\n{}\n0\n", 96 << 20);
    ensure!(in_force(f, &id).await? == changed, "{}", in_force(f, &id).await?);
    let told = reported(f, &id).await?;
    ensure!(
        (told.cpu_quota, told.cpu_period, told.memory_limit_in_bytes) == (70_000, 100_000, 96 << 20),
        "{told:?}"
    );
    f.kill()?;
    f.start()?;
    ensure!(reported(f, &id).await? == told, "after a start: {:?}", reported(f, &id).await?);
    // And the next change is made over the last.
    update(f, &id, LinuxContainerResources { cpu_quota: -1, ..some() }).await?;
    let now = reported(f, &id).await?;
    ensure!((now.cpu_quota, now.memory_limit_in_bytes) == (-1, 96 << 20), "{now:?}");
    Ok(())
}

async fn names_what_is_wrong(f: &mut Fixture) -> Result<()> {
    let (_, id) = f.running("wrong", &ask::waiting("c")).await?;
    let before = (in_force(f, &id).await?, reported(f, &id).await?);
    let page = |size: &str| vec![HugepageLimit { page_size: size.to_owned(), limit: 0 }];
    for (field, linux) in [
        ("linux.cpu_period", LinuxContainerResources { cpu_period: 1, ..some() }),
        ("linux.cpu_quota", LinuxContainerResources { cpu_quota: -2, ..some() }),
        ("linux.cpu_shares", LinuxContainerResources { cpu_shares: -1, ..some() }),
        ("linux.memory_limit_in_bytes", LinuxContainerResources { memory_limit_in_bytes: -5, ..some() }),
        ("linux.oom_score_adj", LinuxContainerResources { oom_score_adj: 2000, ..some() }),
        ("linux.cpuset_cpus", LinuxContainerResources { cpuset_cpus: "x".to_owned(), ..some() }),
        (
            "linux.hugepage_limits[0].page_size",
            LinuxContainerResources { hugepage_limits: page("2M"), ..some() },
        ),
    ] {
        let status = update(f, &id, linux).await.err().with_context(|| format!("{field} was taken"))?;
        ensure!(status.code() == Code::InvalidArgument, "{field}: {status:?}");
        ensure!(status.message().starts_with(field), "{field}: {}", status.message());
    }
    // Good and bad together change nothing.
    let mixed = LinuxContainerResources {
        cpu_quota: 50_000,
        cpu_period: 100_000,
        cpuset_cpus: "0-9999".into(),
        ..some()
    };
    ensure!(update(f, &id, mixed).await.is_err(), "CPUs that there are not were taken");
    ensure!((in_force(f, &id).await?, reported(f, &id).await?) == before, "something was changed");
    let missing =
        UpdateContainerResourcesRequest { container_id: id, ..UpdateContainerResourcesRequest::default() };
    let status =
        f.cri.runtime.update_container_resources(missing).await.err().context("nothing was taken")?;
    ensure!(status.code() == Code::InvalidArgument && status.message().starts_with("linux"), "{status:?}");
    Ok(())
}

/// The OCI runtime writes one file of the cgroup after the other, and the kernel refuses one that is not the first.
async fn refused_half_way(f: &mut Fixture) -> Result<()> {
    let (pod, id) = f.running("half", &ask::waiting("c")).await?;
    let before = (in_force(f, &id).await?, reported(f, &id).await?);
    let cpu = LinuxContainerResources { cpu_quota: 80_000, cpu_period: 100_000, ..some() };
    let refused = if std::path::Path::new("/sys/fs/cgroup/cgroup.controllers").exists() {
        LinuxContainerResources { unified: [("memory.high".into(), "much".into())].into(), ..cpu }
    } else {
        // On version 1 no group's quota is more than that of the one it is in; memory comes before it.
        let parent = pod.config.linux.as_ref().map(|linux| linux.cgroup_parent.trim_start_matches('/'));
        let directory = std::path::Path::new("/sys/fs/cgroup/cpu").join(parent.context("no cgroup")?);
        std::fs::write(directory.join("cpu.cfs_quota_us"), "50000").context("limiting the pod")?;
        LinuxContainerResources { memory_limit_in_bytes: 64 << 20, ..cpu }
    };
    let status = update(f, &id, refused).await.err().context("the kernel took what it cannot have")?;
    ensure!(status.code() == Code::Internal, "{status:?}");
    let after = (in_force(f, &id).await?, reported(f, &id).await?);
    ensure!(after == before, "{before:?} has become {after:?}");
    // And what is in force can still be changed.
    update(f, &id, LinuxContainerResources { cpu_quota: 40_000, cpu_period: 100_000, ..some() }).await?;
    ensure!(in_force(f, &id).await?.starts_with("40000 100000\n"), "{}", in_force(f, &id).await?);
    Ok(())
}

async fn of_what_does_not_run(f: &mut Fixture) -> Result<()> {
    f.cri.pull(BUSYBOX).await?;
    let pod = f.pod("still").await?;
    let id = pod.create(&ask::waiting("c")).await?;
    let limit = |bytes| LinuxContainerResources { memory_limit_in_bytes: bytes, ..some() };
    update(f, &id, limit(80 << 20)).await?;
    f.cri.start(&id).await?;
    ensure!(in_force(f, &id).await?.contains(&(80 << 20).to_string()), "{}", in_force(f, &id).await?);
    f.cri.stop(&id, 0).await?;
    // It may end while kubelet resizes; that is no failure of the resize.
    update(f, &id, limit(90 << 20)).await?;
    ensure!(reported(f, &id).await?.memory_limit_in_bytes == 90 << 20);
    f.cri.remove(&id).await?;
    let status = update(f, &id, limit(1 << 20)).await.err().context("it is gone")?;
    ensure!(status.code() == Code::NotFound, "{status:?}");
    Ok(())
}

async fn at_the_same_time(f: &mut Fixture) -> Result<()> {
    let (_, id) = f.running("many", &ask::waiting("c")).await?;
    let here = &*f;
    let (memory, quota, shares) = tokio::join!(
        update(here, &id, LinuxContainerResources { memory_limit_in_bytes: 70 << 20, ..some() }),
        update(here, &id, LinuxContainerResources { cpu_quota: 60_000, cpu_period: 100_000, ..some() }),
        update(here, &id, LinuxContainerResources { cpu_shares: 300, ..some() }),
    );
    memory.and(quota).and(shares)?;
    let told = reported(f, &id).await?;
    ensure!(
        (told.memory_limit_in_bytes, told.cpu_quota, told.cpu_shares) == (70 << 20, 60_000, 300),
        "one update undid another: {told:?}"
    );
    ensure!(in_force(f, &id).await?.starts_with(&format!("60000 100000\n{}\n", 70 << 20)));
    Ok(())
}

async fn of_cgroup_files(f: &mut Fixture) -> Result<()> {
    let (_, id) = f.running("files", &ask::waiting("c")).await?;
    let file = LinuxContainerResources {
        unified: [("memory.high".to_owned(), (50 << 20).to_string())].into(),
        ..some()
    };
    let updated = update(f, &id, file.clone()).await;
    if std::path::Path::new("/sys/fs/cgroup/cgroup.controllers").exists() {
        updated?;
        let high = f.cri.output(&id, &["cat", "/sys/fs/cgroup/memory.high"]).await?;
        ensure!(high == format!("{}\n", 50 << 20), "{high}");
        ensure!(reported(f, &id).await?.unified == file.unified);
    } else {
        // There are no such files: kubelet goes on after this code only.
        let status = updated.err().context("files of version 2 were taken on version 1")?;
        ensure!(
            status.code() == Code::Unimplemented && status.message().starts_with("linux.unified"),
            "{status:?}"
        );
    }
    Ok(())
}

async fn shown(f: &Fixture, pod: &str) -> Result<serde_json::Value> {
    let request = PodSandboxStatusRequest { pod_sandbox_id: pod.to_owned(), verbose: true };
    let answer = f.cri.runtime.clone().pod_sandbox_status(request).await?.into_inner();
    Ok(serde_json::from_str(answer.info.get("info").context("no info")?)?)
}

async fn of_pods(f: &mut Fixture) -> Result<()> {
    let mut config = f.ask_pod("sized");
    config.linux.get_or_insert_default().resources =
        Some(LinuxContainerResources { cpu_shares: 512, memory_limit_in_bytes: 64 << 20, ..some() });
    let pod = f.run(config).await?;
    ensure!(shown(f, &pod.id).await?["resources"]["memoryLimitInBytes"] == 64 << 20);
    let ask = |resources, overhead| UpdatePodSandboxResourcesRequest {
        pod_sandbox_id: pod.id.clone(),
        resources,
        overhead,
    };
    let larger = LinuxContainerResources {
        cpu_shares: 1024,
        cpu_period: 100_000,
        // What kubelet computes for "no quota, less the overhead".
        cpu_quota: -50_001,
        memory_limit_in_bytes: 128 << 20,
        ..some()
    };
    let overhead = LinuxContainerResources { memory_limit_in_bytes: 8 << 20, ..some() };
    f.cri.runtime.update_pod_sandbox_resources(ask(Some(larger), Some(overhead))).await?;
    f.kill()?;
    f.start()?;
    let info = shown(f, &pod.id).await?;
    ensure!(
        info["resources"]["memoryLimitInBytes"] == 128 << 20 && info["resources"]["cpuShares"] == 1024,
        "{info}"
    );
    ensure!(info["overhead"]["memoryLimitInBytes"] == 8 << 20, "{info}");
    // Taken back, as kubelet does when it could not write the cgroup.
    let former = LinuxContainerResources { cpu_shares: 512, memory_limit_in_bytes: 64 << 20, ..some() };
    f.cri.runtime.update_pod_sandbox_resources(ask(Some(former), None)).await?;
    let info = shown(f, &pod.id).await?;
    ensure!(
        info["resources"]["memoryLimitInBytes"] == 64 << 20
            && info["overhead"]["memoryLimitInBytes"] == 8 << 20,
        "{info}"
    );
    for (request, code, field) in [
        (ask(None, None), Code::InvalidArgument, "resources"),
        (
            ask(Some(LinuxContainerResources { cpu_period: 5, ..some() }), None),
            Code::InvalidArgument,
            "resources.cpu_period",
        ),
        (
            ask(None, Some(LinuxContainerResources { memory_limit_in_bytes: -9, ..some() })),
            Code::InvalidArgument,
            "overhead.memory_limit_in_bytes",
        ),
        (
            UpdatePodSandboxResourcesRequest { pod_sandbox_id: "0".repeat(64), ..ask(Some(some()), None) },
            Code::NotFound,
            "pod sandbox",
        ),
    ] {
        let status =
            f.cri.runtime.update_pod_sandbox_resources(request).await.err().context("it was taken")?;
        ensure!(status.code() == code && status.message().starts_with(field), "{field}: {status:?}");
    }
    f.cri.stop_pod(&pod.id).await?;
    let status = f
        .cri
        .runtime
        .update_pod_sandbox_resources(ask(Some(some()), None))
        .await
        .err()
        .context("it is stopped")?;
    ensure!(status.code() == Code::FailedPrecondition, "{status:?}");
    Ok(())
}
