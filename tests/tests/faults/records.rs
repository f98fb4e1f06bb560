//! A record that was cut: at no length is it fatal or the pod dropped, and what is there can be stopped and removed. (That every
//! single length is told from a whole record is a unit test of `pod/record.rs`.)

use std::fs;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result, ensure};
use podvisor_proto::cri::{ContainerState, NamespaceMode, PodSandboxState};
use podvisor_tests::images::BUSYBOX;
use podvisor_tests::{Fixture, Tests, ask};

use crate::scale;

pub(crate) fn add(tests: &mut Tests) {
    tests.add("records::of_a_pod_that_are_cut", of_a_pod);
    tests.add("records::of_a_container_that_are_cut", of_a_container);
    tests.add("records::that_are_cut_after_the_monitor_died", without_monitor);
}

/// Some lengths of a file, its ends among them.
fn lengths(whole: usize) -> Vec<usize> {
    let steps = scale(3, 24) as usize;
    let mut lengths: Vec<usize> = (0..steps).map(|step| whole * step / steps).collect();
    lengths.extend([1, whole - 1]);
    lengths
}

fn pod_record(f: &Fixture, pod: &str) -> PathBuf {
    f.node.path("root/pods").join(pod).join("pod.json")
}

fn container_record(f: &Fixture, pod: &str, container: &str) -> PathBuf {
    f.node.path("root/pods").join(pod).join(format!("containers/{container}.json"))
}

fn cut(path: &Path, length: usize) -> Result<()> {
    let file = fs::File::options().write(true).open(path).with_context(|| path.display().to_string())?;
    Ok(file.set_len(length as u64)?)
}

async fn of_a_pod(f: &mut Fixture) -> Result<()> {
    f.cri.pull(BUSYBOX).await?;
    let whole = {
        let pod = f.pod("measured").await?;
        let length = fs::metadata(pod_record(f, &pod.id))?.len();
        f.cri.remove_pod(&pod.id).await?;
        usize::try_from(length)?
    };
    let untouched = f.pod("untouched").await?;
    for (number, length) in lengths(whole).into_iter().enumerate() {
        let mut config = f.ask_pod("cut");
        if number % 2 == 0 {
            ask::pod_namespaces(&mut config).pid = NamespaceMode::Pod.into();
        }
        let pod = f.run(config).await?;
        let id = pod.start(&ask::waiting("c")).await?;
        f.kill()?;
        cut(&pod_record(f, &pod.id), length)?;
        f.start()?;
        let listed = f.cri.pods().await?;
        let found = listed.iter().find(|listed| listed.id == pod.id);
        let found = found.with_context(|| format!("cut at {length} the pod is dropped"))?;
        // Not ready is what the CRI has for it: kubelet stops it and makes another.
        ensure!(found.state() == PodSandboxState::SandboxNotready, "cut at {length}: {found:?}");
        let status = f.cri.status(&id).await?;
        ensure!(status.state() == ContainerState::ContainerRunning, "cut at {length}: {status:?}");
        ensure!(f.cri.pod_status(&untouched.id).await?.state() == PodSandboxState::SandboxReady);
        f.cri.stop_pod(&pod.id).await.with_context(|| format!("cut at {length}"))?;
        ensure!(f.cri.status(&id).await?.state() == ContainerState::ContainerExited);
        f.cri.remove_pod(&pod.id).await.with_context(|| format!("cut at {length}"))?;
        podvisor_tests::world::remove_pod_cgroups();
    }
    Ok(())
}

async fn of_a_container(f: &mut Fixture) -> Result<()> {
    f.cri.pull(BUSYBOX).await?;
    let pod = f.pod("whole").await?;
    let whole = {
        let id = pod.start(&ask::waiting("measured")).await?;
        let length = fs::metadata(container_record(f, &pod.id, &id))?.len();
        f.cri.remove(&id).await?;
        usize::try_from(length)?
    };
    for (number, length) in lengths(whole).into_iter().enumerate() {
        let id = pod.start(&ask::waiting(&format!("cut{number}"))).await?;
        f.kill()?;
        cut(&container_record(f, &pod.id, &id), length)?;
        f.start()?;
        let listed = f.cri.containers().await?;
        let found = listed.iter().find(|listed| listed.id == id);
        let found = found.with_context(|| format!("cut at {length} the container is dropped"))?;
        // Unknown until the monitor has said what it knows.
        ensure!(
            matches!(found.state(), ContainerState::ContainerUnknown | ContainerState::ContainerRunning),
            "cut at {length}: {found:?}"
        );
        ensure!(f.cri.pod_status(&pod.id).await?.state() == PodSandboxState::SandboxReady);
        f.cri.stop(&id, 10).await.with_context(|| format!("cut at {length}"))?;
        let status = f.cri.status(&id).await?;
        ensure!(status.state() == ContainerState::ContainerExited, "cut at {length}: {status:?}");
        f.cri.remove(&id).await.with_context(|| format!("cut at {length}"))?;
        ensure!(f.cri.containers().await?.is_empty());
    }
    Ok(())
}

/// Both at once: nobody is left to ask, and what runs is found by its cgroup.
async fn without_monitor(f: &mut Fixture) -> Result<()> {
    let (pod, id) = f.running("alone", &ask::waiting("c")).await?;
    f.kill()?;
    cut(&container_record(f, &pod.id, &id), 40)?;
    crate::monitors::kill_monitor(&pod.id)?;
    f.start()?;
    ensure!(f.cri.pods().await?.len() == 1 && f.cri.containers().await?.len() == 1, "something is dropped");
    f.cri.stop_pod(&pod.id).await?;
    ensure!(f.cri.status(&id).await?.state() == ContainerState::ContainerExited);
    f.cri.remove_pod(&pod.id).await?;
    Ok(())
}
