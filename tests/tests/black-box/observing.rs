//! Events and statistics.

use std::collections::BTreeSet;

use anyhow::{Context, Result, ensure};
use podvisor_proto::cri::ContainerEventType::{
    ContainerCreatedEvent as Created, ContainerDeletedEvent as Deleted, ContainerStartedEvent as Started,
    ContainerStoppedEvent as Stopped,
};
use podvisor_proto::cri::{
    ContainerEventResponse, ContainerState, ContainerStatsFilter, ContainerStatsRequest, GetEventsRequest,
    ListContainerStatsRequest, ListPodSandboxStatsRequest, PodSandboxState, PodSandboxStatsRequest,
};
use podvisor_tests::images::BUSYBOX;
use podvisor_tests::{Fixture, ask, eventually};
use tonic::Streaming;

use super::Tests;

pub(crate) fn add(tests: &mut Tests) {
    tests.add("events::tell_the_life_of_pods_and_containers", events);
    tests.add("events::reach_every_listener", events_reach_every_listener);
    tests.add("stats::of_containers", stats_of_containers);
    tests.add("stats::of_pods", stats_of_pods);
}

async fn next(stream: &mut Streaming<ContainerEventResponse>) -> Result<ContainerEventResponse> {
    let event =
        tokio::time::timeout(eventually::PATIENCE, stream.message()).await.context("no event came")?;
    event?.context("the stream of events ended")
}

/// What kubelet's evented PLEG needs: each with the state of the whole pod.
async fn events(f: &mut Fixture) -> Result<()> {
    let mut stream = f.cri.runtime.get_container_events(GetEventsRequest {}).await?.into_inner();
    let (pod, id) = f.running("events", &ask::script("c", "exit 4")).await?;
    let mut seen = Vec::new();
    let mut exit = None;
    while exit.is_none() {
        let event = next(&mut stream).await?;
        ensure!(event.created_at > 0, "{event:?}");
        let status = event.pod_sandbox_status.clone().context("no pod in an event")?;
        ensure!(status.id == pod.id && status.state() == PodSandboxState::SandboxReady, "{event:?}");
        seen.push((event.container_id.clone(), event.container_event_type()));
        if event.container_id == id && event.container_event_type() == Stopped {
            exit = event.containers_statuses.into_iter().find(|status| status.id == id);
            ensure!(exit.is_some(), "the container's status is not in its last event");
        }
    }
    let exit = exit.context("no status")?;
    ensure!(exit.state() == ContainerState::ContainerExited && exit.exit_code == 4, "{exit:?}");
    let of =
        |wanted: &str| seen.iter().filter(|(id, _)| id == wanted).map(|(_, kind)| *kind).collect::<Vec<_>>();
    ensure!(of(&id) == [Created, Started, Stopped], "{:?}", of(&id));
    ensure!(of(&pod.id) == [Created, Started], "{:?}", of(&pod.id));
    f.cri.remove(&id).await?;
    f.cri.stop_pod(&pod.id).await?;
    f.cri.remove_pod(&pod.id).await?;
    let mut last = Vec::new();
    while last.last() != Some(&(pod.id.clone(), Deleted)) {
        let event = next(&mut stream).await?;
        last.push((event.container_id.clone(), event.container_event_type()));
    }
    let expected = [(id, Deleted), (pod.id.clone(), Stopped), (pod.id, Deleted)];
    ensure!(last == expected, "{last:?}");
    Ok(())
}

async fn events_reach_every_listener(f: &mut Fixture) -> Result<()> {
    let mut streams = Vec::new();
    for _ in 0..3 {
        streams.push(f.cri.runtime.get_container_events(GetEventsRequest {}).await?.into_inner());
    }
    // One that does not read must not hold up the others, nor the pods.
    let idle = f.cri.runtime.get_container_events(GetEventsRequest {}).await?;
    let pod = f.pod("listened").await?;
    for stream in &mut streams {
        let event = next(stream).await?;
        ensure!(event.container_id == pod.id, "{event:?}");
    }
    drop(idle);
    Ok(())
}

async fn stats_of_containers(f: &mut Fixture) -> Result<()> {
    f.cri.pull(BUSYBOX).await?;
    let pod = f.pod("stats").await?;
    let busy = ask::script(
        "busy",
        "dd if=/dev/zero of=/written bs=1M count=3 2>/dev/null; trap 'exit 0' TERM; while :; do :; done",
    );
    let busy = pod.start(&busy).await?;
    let calm = pod.start(&ask::waiting("calm")).await?;
    let stats = eventually("the container has used something", || async {
        let request = ContainerStatsRequest { container_id: busy.clone() };
        let stats =
            f.cri.runtime.clone().container_stats(request).await?.into_inner().stats.context("no stats")?;
        let cpu =
            stats.cpu.as_ref().and_then(|cpu| cpu.usage_core_nano_seconds.as_ref()).map_or(0, |v| v.value);
        ensure!(cpu > 50_000_000, "{cpu} ns");
        let written =
            stats.writable_layer.as_ref().and_then(|l| l.used_bytes.as_ref()).map_or(0, |v| v.value);
        ensure!(written >= 3 << 20, "{written} bytes written");
        Ok(stats)
    })
    .await?;
    let memory = stats.memory.as_ref().context("no memory")?;
    ensure!(memory.working_set_bytes.as_ref().is_some_and(|bytes| bytes.value > 0), "{memory:?}");
    ensure!(memory.timestamp > 0, "{memory:?}");
    let attributes = stats.attributes.as_ref().context("no attributes")?;
    ensure!(attributes.id == busy && attributes.labels["container"] == "busy", "{attributes:?}");
    let layer = stats.writable_layer.as_ref().and_then(|layer| layer.fs_id.as_ref()).context("no fs_id")?;
    ensure!(std::path::Path::new(&layer.mountpoint).is_dir(), "{layer:?}");

    let filter = |filter| ListContainerStatsRequest { filter };
    let all = f.cri.runtime.list_container_stats(filter(None)).await?.into_inner().stats;
    let ids: BTreeSet<String> = all.into_iter().filter_map(|stats| Some(stats.attributes?.id)).collect();
    ensure!(ids == BTreeSet::from([busy.clone(), calm.clone()]), "{ids:?}");
    let one = ContainerStatsFilter {
        label_selector: [("container".to_owned(), "calm".to_owned())].into(),
        ..ContainerStatsFilter::default()
    };
    let found = f.cri.runtime.list_container_stats(filter(Some(one))).await?.into_inner().stats;
    ensure!(found.len() == 1 && found[0].attributes.as_ref().is_some_and(|a| a.id == calm), "{found:?}");
    Ok(())
}

async fn stats_of_pods(f: &mut Fixture) -> Result<()> {
    let (pod, id) = f.running("stats", &ask::waiting("c")).await?;
    let request = PodSandboxStatsRequest { pod_sandbox_id: pod.id.clone() };
    let stats = f.cri.runtime.pod_sandbox_stats(request).await?.into_inner().stats.context("no stats")?;
    let attributes = stats.attributes.context("no attributes")?;
    ensure!(attributes.id == pod.id && attributes.metadata == pod.config.metadata, "{attributes:?}");
    let linux = stats.linux.context("nothing about Linux")?;
    ensure!(linux.containers.len() == 1, "{linux:?}");
    ensure!(
        linux.containers[0].attributes.as_ref().is_some_and(|attributes| attributes.id == id),
        "{linux:?}"
    );
    let network = linux.network.and_then(|network| network.default_interface).context("no network")?;
    ensure!(network.name == "eth0", "{network:?}");
    ensure!(linux.cpu.is_some() && linux.memory.is_some(), "no cpu or memory");
    ensure!(linux.process.and_then(|process| process.process_count).is_some_and(|count| count.value >= 1));
    let all =
        f.cri.runtime.list_pod_sandbox_stats(ListPodSandboxStatsRequest::default()).await?.into_inner().stats;
    ensure!(all.len() == 1, "{all:?}");
    f.cri.stop_pod(&pod.id).await?;
    Ok(())
}
