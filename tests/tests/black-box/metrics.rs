//! Metrics over the CRI, as kubelet turns them into `/metrics/cadvisor`, and lists as streams.

use std::collections::{BTreeMap, BTreeSet};
use std::path::Path;

use anyhow::{Context, Result, ensure};
use podvisor_critest::node::{Options, VM};
use podvisor_proto::cri::{
    ListMetricDescriptorsRequest, ListPodSandboxMetricsRequest, ListPodSandboxStatsRequest, Metric,
    MetricType, PodSandboxMetrics, StreamContainersRequest, StreamPodSandboxMetricsRequest,
    StreamPodSandboxesRequest,
};
use podvisor_tests::images::BUSYBOX;
use podvisor_tests::{Fixture, ask, eventually};

use super::Tests;

pub(crate) fn add(tests: &mut Tests) {
    tests.add("metrics::of_a_pod_and_its_containers", of_a_pod_and_its_containers);
    let options = Options { handler: VM.to_owned(), ..Options::default() };
    tests.add_with("metrics::tell_what_a_machine_costs", options, tell_what_a_machine_costs);
    tests.add("metrics::fit_their_descriptors", fit_their_descriptors);
    tests.add("metrics::count_what_happens", count_what_happens);
    tests.add("stats::have_rates_and_pressure", rates_and_pressure);
    tests.add("streams::come_in_pieces", streams_come_in_pieces);
    tests.add("streams::of_nothing_have_no_piece", streams_of_nothing);
}

/// Label keys by name.
async fn descriptors(f: &Fixture) -> Result<BTreeMap<String, Vec<String>>> {
    let request = ListMetricDescriptorsRequest {};
    let answer = f.cri.runtime.clone().list_metric_descriptors(request).await?.into_inner();
    let mut keys = BTreeMap::new();
    for descriptor in answer.descriptors {
        ensure!(!descriptor.help.is_empty(), "no help: {descriptor:?}");
        let twice = keys.insert(descriptor.name.clone(), descriptor.label_keys);
        ensure!(twice.is_none(), "{} stands twice", descriptor.name);
    }
    Ok(keys)
}

async fn metrics(f: &Fixture) -> Result<Vec<PodSandboxMetrics>> {
    let request = ListPodSandboxMetricsRequest {};
    Ok(f.cri.runtime.clone().list_pod_sandbox_metrics(request).await?.into_inner().pod_metrics)
}

/// A sample with its labels by name.
#[derive(Debug)]
struct Sample {
    labels: BTreeMap<String, String>,
    value: u64,
}

fn samples(name: &str, all: &[Metric], keys: &BTreeMap<String, Vec<String>>) -> Vec<Sample> {
    all.iter()
        .filter(|metric| metric.name == name)
        .map(|metric| Sample {
            labels: keys[name].iter().cloned().zip(metric.label_values.iter().cloned()).collect(),
            value: metric.value.as_ref().map_or(u64::MAX, |value| value.value),
        })
        .collect()
}

fn one(name: &str, all: &[Metric], keys: &BTreeMap<String, Vec<String>>) -> Result<Sample> {
    let mut found = samples(name, all, keys);
    ensure!(found.len() == 1, "{} samples of {name}: {found:?}", found.len());
    found.pop().context("none")
}

async fn tell_what_a_machine_costs(f: &mut Fixture) -> Result<()> {
    f.running("pod", &ask::waiting("c")).await?;
    let keys = descriptors(f).await?;
    let told = metrics(f).await?.pop().context("no pod")?.metrics;
    let machine = |name: &str| -> Result<u64> {
        let mut found = samples(name, &told, &keys);
        found.retain(|sample| sample.labels["container"] == "POD" && sample.labels["image"].is_empty());
        ensure!(found.len() == 1, "{name}: {found:?}");
        Ok(found[0].value)
    };
    let pod = |name: &str| -> Result<u64> {
        let mut found = samples(name, &told, &keys);
        found.retain(|sample| sample.labels["name"].is_empty());
        ensure!(found.len() == 1, "{name}: {found:?}");
        Ok(found[0].value)
    };
    // A booted guest has touched so much; a shell in it takes a small part of that.
    let (whole, inside) = (machine("container_memory_usage_bytes")?, pod("container_memory_usage_bytes")?);
    ensure!(whole > 64 << 20 && inside > 0 && inside < whole / 2, "{whole} {inside}");
    ensure!(machine("container_cpu_usage_seconds_total")? > 0);
    Ok(())
}

async fn of_a_pod_and_its_containers(f: &mut Fixture) -> Result<()> {
    let mut config = ask::waiting("main");
    ask::resources(&mut config).memory_limit_in_bytes = 64 << 20;
    ask::resources(&mut config).cpu_quota = 50_000;
    ask::resources(&mut config).cpu_period = 100_000;
    let (pod, id) = f.running("measured", &config).await?;
    let over = pod.start(&ask::script("over", "exit 0")).await?;
    f.cri.wait_exited(&over).await?;
    let keys = descriptors(f).await?;
    let all = metrics(f).await?;
    ensure!(all.len() == 1 && all[0].pod_sandbox_id == pod.id, "{all:?}");
    // What has ended is not measured.
    let [container] = &all[0].container_metrics[..] else { anyhow::bail!("{:?}", all[0].container_metrics) };
    ensure!(container.container_id == id, "{container:?}");

    let memory = one("container_memory_working_set_bytes", &container.metrics, &keys)?;
    ensure!((4096..64 << 20).contains(&memory.value), "{memory:?}");
    let cgroup = config_cgroup(&pod.config);
    for (key, expected) in [
        ("id", format!("{cgroup}/{id}").as_str()),
        ("name", id.as_str()),
        ("image", BUSYBOX),
        ("namespace", "tests"),
        ("pod", "measured"),
        ("container", "main"),
    ] {
        ensure!(memory.labels[key] == expected, "{key} is {:?}, not {expected:?}", memory.labels[key]);
    }
    for (name, expected) in [
        ("container_spec_memory_limit_bytes", 64 << 20),
        ("container_spec_cpu_quota", 50_000),
        ("container_spec_cpu_period", 100_000),
        ("container_processes", 2),
        ("container_threads", 2),
        ("container_oom_events_total", 0),
        ("container_memory_failcnt", 0),
    ] {
        let sample = one(name, &container.metrics, &keys)?;
        ensure!(sample.value == expected, "{name}: {sample:?}, not {expected}");
    }
    ensure!(one("container_cpu_usage_seconds_total", &container.metrics, &keys)?.labels["cpu"] == "total");
    ensure!(one("container_file_descriptors", &container.metrics, &keys)?.value >= 3);
    ensure!(one("container_fs_limit_bytes", &container.metrics, &keys)?.value > 1 << 20);
    let started = f.cri.status(&id).await?.started_at.unsigned_abs() / 1_000_000_000;
    ensure!(one("container_start_time_seconds", &container.metrics, &keys)?.value == started);
    let faults = samples("container_memory_failures_total", &container.metrics, &keys);
    ensure!(faults.len() == 4 && faults.iter().any(|sample| sample.value > 0), "{faults:?}");

    // The pod as a whole: sums of containers ask for `container` or `image` not to be empty.
    let pod_memory = one("container_memory_working_set_bytes", &all[0].metrics, &keys)?;
    ensure!(pod_memory.labels["id"] == cgroup && pod_memory.labels["pod"] == "measured", "{pod_memory:?}");
    ensure!(
        ["name", "image", "container"].iter().all(|key| pod_memory.labels[*key].is_empty()),
        "{pod_memory:?}"
    );
    let received = one("container_network_receive_bytes_total", &all[0].metrics, &keys)?;
    ensure!(received.labels["interface"] == "eth0" && received.labels["name"] == pod.id, "{received:?}");

    f.cri.stop_pod(&pod.id).await?;
    ensure!(metrics(f).await?.is_empty(), "a stopped pod is measured");
    Ok(())
}

fn config_cgroup(config: &podvisor_proto::cri::PodSandboxConfig) -> String {
    config.linux.as_ref().map(|linux| linux.cgroup_parent.clone()).unwrap_or_default()
}

/// What the Prometheus registry in kubelet checks before it shows anything.
async fn fit_their_descriptors(f: &mut Fixture) -> Result<()> {
    let keys = descriptors(f).await?;
    let (pod, _) = f.running("fits", &ask::waiting("a")).await?;
    pod.start(&ask::waiting("b")).await?;
    f.pod("bare").await?;
    let mut streamed = Vec::new();
    let request = StreamPodSandboxMetricsRequest {};
    let mut stream = f.cri.runtime.clone().stream_pod_sandbox_metrics(request).await?.into_inner();
    while let Some(piece) = stream.message().await? {
        ensure!(!piece.pod_sandbox_metrics.is_empty(), "an empty piece");
        streamed.extend(piece.pod_sandbox_metrics);
    }
    ensure!(streamed.len() == 2, "{} pods", streamed.len());
    let mut seen = BTreeSet::new();
    for metric in streamed
        .iter()
        .flat_map(|pod| pod.metrics.iter().chain(pod.container_metrics.iter().flat_map(|c| &c.metrics)))
    {
        let keys = keys.get(&metric.name).with_context(|| format!("{} has no descriptor", metric.name))?;
        ensure!(keys.len() == metric.label_values.len(), "{metric:?} has labels for {keys:?}");
        ensure!(metric.value.is_some() && metric.timestamp == 0, "{metric:?}");
        ensure!(seen.insert((&metric.name, &metric.label_values)), "twice: {metric:?}");
        if metric.name.ends_with("_seconds_total") || metric.name.ends_with("_bytes_total") {
            ensure!(metric.metric_type() == MetricType::Counter, "{metric:?}");
        }
    }
    // What kubelet's own tests of the endpoint ask for of any container.
    let names: BTreeSet<&str> = streamed
        .iter()
        .flat_map(|pod| &pod.container_metrics)
        .flat_map(|container| &container.metrics)
        .map(|metric| metric.name.as_str())
        .collect();
    for name in "container_cpu_system_seconds_total container_cpu_usage_seconds_total container_cpu_user_seconds_total \
                 container_file_descriptors container_fs_limit_bytes container_fs_inodes_free container_fs_inodes_total \
                 container_last_seen container_memory_cache container_memory_failcnt container_memory_failures_total \
                 container_memory_mapped_file container_memory_max_usage_bytes container_memory_rss \
                 container_memory_swap container_memory_usage_bytes container_memory_working_set_bytes \
                 container_oom_events_total container_processes container_sockets container_spec_cpu_period \
                 container_spec_cpu_shares container_spec_memory_limit_bytes \
                 container_spec_memory_reservation_limit_bytes container_spec_memory_swap_limit_bytes \
                 container_start_time_seconds container_threads container_threads_max container_ulimits_soft"
        .split_whitespace()
    {
        ensure!(names.contains(name), "no {name}");
    }
    Ok(())
}

async fn count_what_happens(f: &mut Fixture) -> Result<()> {
    let config = ask::script(
        "busy",
        "dd if=/dev/zero of=/written bs=1M count=3 2>/dev/null; trap 'exit 0' TERM; while :; do :; done",
    );
    let (pod, _) = f.running("busy", &config).await?;
    let keys = descriptors(f).await?;
    eventually("the metrics grow", || async {
        let all = metrics(f).await?;
        let of = &all[0].container_metrics[0].metrics;
        ensure!(one("container_cpu_usage_seconds_total", of, &keys)?.value >= 1);
        ensure!(one("container_fs_usage_bytes", of, &keys)?.value >= 3 << 20);
        ensure!(one("container_cpu_usage_seconds_total", &all[0].metrics, &keys)?.value >= 1);
        Ok(())
    })
    .await?;
    f.cri.stop_pod(&pod.id).await?;
    Ok(())
}

async fn rates_and_pressure(f: &mut Fixture) -> Result<()> {
    let config = ask::script("busy", "trap 'exit 0' TERM; while :; do :; done");
    let (pod, _) = f.running("rates", &config).await?;
    let linux = eventually("two readings make a rate", || async {
        let request = ListPodSandboxStatsRequest::default();
        let stats = f.cri.runtime.clone().list_pod_sandbox_stats(request).await?.into_inner().stats;
        let linux = stats.into_iter().next().and_then(|stats| stats.linux).context("no stats")?;
        let rate = linux.cpu.as_ref().and_then(|cpu| cpu.usage_nano_cores.as_ref()).context("no rate")?;
        ensure!(rate.value > 0, "{rate:?}");
        Ok(linux)
    })
    .await?;
    let container = linux.containers.first().context("no container")?;
    let cpu = container.cpu.as_ref().context("no cpu")?;
    ensure!(cpu.usage_nano_cores.as_ref().is_some_and(|rate| rate.value > 0), "{cpu:?}");
    // In the cgroups' version 2, also the one beside version 1 where the runtime puts containers into it, too.
    let of_pod = config_cgroup(&pod.config);
    let counted = ["/sys/fs/cgroup", "/sys/fs/cgroup/unified"]
        .iter()
        .any(|root| Path::new(&format!("{root}{of_pod}/cpu.pressure")).exists());
    ensure!(cpu.psi.is_some() == counted, "{cpu:?}, and the kernel counts it: {counted}");
    if counted {
        let pressure = cpu.psi.as_ref().and_then(|psi| psi.some.as_ref()).context("no line")?;
        ensure!((0.0..=100.0).contains(&pressure.avg10), "{pressure:?}");
        ensure!(container.io.as_ref().is_some_and(|io| io.psi.is_some()), "{container:?}");
        ensure!(container.memory.as_ref().is_some_and(|memory| memory.psi.is_some()), "{container:?}");
    }
    f.cri.stop_pod(&pod.id).await?;
    Ok(())
}

async fn streams_come_in_pieces(f: &mut Fixture) -> Result<()> {
    f.cri.pull(BUSYBOX).await?;
    let pod = f.pod("large").await?;
    let mut made = BTreeSet::new();
    for number in 0..5 {
        let mut config = ask::waiting(&format!("c{number}"));
        config.annotations.insert("example.invalid/large".to_owned(), "x".repeat(600 << 10));
        made.insert(pod.create(&config).await?);
    }
    let request = StreamContainersRequest::default();
    let mut stream = f.cri.runtime.clone().stream_containers(request.clone()).await?.into_inner();
    let (mut pieces, mut ids) = (0, Vec::new());
    while let Some(piece) = stream.message().await? {
        ensure!(!piece.containers.is_empty(), "an empty piece");
        pieces += 1;
        ids.extend(piece.containers.into_iter().map(|container| container.id));
    }
    ensure!(pieces > 1, "{pieces} pieces of three megabytes");
    ensure!(ids.len() == made.len() && ids.into_iter().collect::<BTreeSet<_>>() == made);
    // Clients that go away after the first piece; the daemon goes on.
    for _ in 0..20 {
        let mut stream = f.cri.runtime.clone().stream_containers(request.clone()).await?.into_inner();
        ensure!(stream.message().await?.is_some());
        drop(stream);
    }
    ensure!(f.cri.containers().await?.len() == made.len());
    Ok(())
}

async fn streams_of_nothing(f: &mut Fixture) -> Result<()> {
    let request = StreamPodSandboxesRequest::default();
    let mut stream = f.cri.runtime.clone().stream_pod_sandboxes(request).await?.into_inner();
    ensure!(stream.message().await?.is_none(), "a piece of an empty list");
    let request = StreamPodSandboxMetricsRequest {};
    let mut stream = f.cri.runtime.clone().stream_pod_sandbox_metrics(request).await?.into_inner();
    ensure!(stream.message().await?.is_none(), "a piece of an empty list");
    Ok(())
}
