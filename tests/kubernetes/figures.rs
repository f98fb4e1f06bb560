//! What kubelet tells of pods (`/stats/summary`, `/metrics/resource`, `/metrics/cadvisor`), beside what their containers see themselves.

use std::io::Write;
use std::net::TcpStream;

use anyhow::{Context, Result, ensure};
use serde_json::{Value, json};

use crate::cluster::{Cluster, Settings};
use crate::images::BUSYBOX;
use crate::pods::{machine, pod};
use crate::{Tests, until};

const MIB: f64 = 1_048_576.0;

/// What the pod receives, writes and keeps in memory.
const RECEIVED: f64 = 4.0 * MIB;
const WRITTEN: f64 = 6.0 * MIB;
const IN_VOLUME: f64 = 8.0 * MIB;
const IN_MEMORY: f64 = 32.0 * MIB;

pub(crate) fn add(tests: &mut Tests) {
    tests
        .add("figures::of_a_trusted_pod", &Settings::default(), |cluster| are_right(cluster, pod("trusted")));
    tests
        .add("figures::of_a_machine", &Settings::default(), |cluster| are_right(cluster, machine("machine")));
}

/// Those that need a cluster of their own.
pub(crate) fn add_without_cri(tests: &mut Tests) {
    let off = Settings { stats_from_cri: false, ..Settings::default() };
    tests.add("figures::without_the_feature_gate", &off, without_the_feature_gate);
}

/// Gives a pod something to count: time, memory, files, traffic.
fn busy(mut pod: Value) -> Value {
    let script = "dd if=/dev/zero of=/memory/full bs=1M count=32
dd if=/dev/zero of=/volume/file bs=1M count=8
dd if=/dev/zero of=/written bs=1M count=6
nc -l -p 9000 >/dev/null
end=$(($(date +%s) + 6)); while [ $(date +%s) -lt $end ]; do :; done
touch /done
while :; do sleep 3600; done";
    pod["spec"]["volumes"] = json!([
        {"name": "memory", "emptyDir": {"medium": "Memory"}},
        {"name": "volume", "emptyDir": {}},
    ]);
    pod["spec"]["containers"][0] = json!({
        "name": "c", "image": BUSYBOX, "command": ["sh", "-c", script],
        "volumeMounts": [{"name": "memory", "mountPath": "/memory"}, {"name": "volume", "mountPath": "/volume"}],
    });
    pod
}

/// Runs one of these pods until it has done everything.
fn run(cluster: &Cluster, pod: Value) -> Result<String> {
    let pod = busy(pod);
    let name = crate::cluster::name(&pod).to_owned();
    cluster.run(&[pod])?;
    let address = cluster.get(&["pod", &name])?["status"]["podIP"].as_str().context("no address")?.to_owned();
    until("the pod takes what it is sent", || {
        let mut stream = TcpStream::connect((address.as_str(), 9000))?;
        Ok((0..4).try_for_each(|_| stream.write_all(&vec![b'x'; 1 << 20]))?)
    })?;
    until("the pod has done everything", || cluster.exec(&name, &["test", "-e", "/done"]).map(drop))?;
    Ok(name)
}

/// What a container sees of itself.
#[derive(Debug)]
struct Inside {
    /// Seconds of processor time.
    time: f64,
    /// Bytes, without what could be dropped at once: what Kubernetes calls the working set.
    memory: f64,
    /// Bytes that have come in through `eth0`.
    received: f64,
}

impl Inside {
    /// Looks, whichever version of cgroups is in there.
    fn of(cluster: &Cluster, pod: &str) -> Result<Self> {
        let script = "cd /sys/fs/cgroup
if [ -e memory.current ]; then
    cat memory.current; sed -n 's/^inactive_file //p' memory.stat; sed -n 's/^usage_usec //p' cpu.stat; echo 1000000
else
    cat memory/memory.usage_in_bytes; sed -n 's/^total_inactive_file //p' memory/memory.stat
    cat cpuacct/cpuacct.usage 2>/dev/null || cat cpu,cpuacct/cpuacct.usage; echo 1000000000
fi
cat /sys/class/net/eth0/statistics/rx_bytes";
        let said = cluster.exec(pod, &["sh", "-c", script])?;
        let numbers: Vec<f64> = said.split_whitespace().map(str::parse).collect::<Result<_, _>>()?;
        let [usage, inactive, time, unit, received] = numbers[..] else { anyhow::bail!("{said:?}") };
        Ok(Self { time: time / unit, memory: usage - inactive, received })
    }
}

/// The value of the only sample of that name with these labels.
fn sample(page: &str, name: &str, labels: &[(&str, &str)]) -> Result<f64> {
    let found = samples(page, name, labels);
    ensure!(found.len() == 1, "{} samples of {name} with {labels:?}: {found:?}", found.len());
    Ok(found[0])
}

fn samples(page: &str, name: &str, labels: &[(&str, &str)]) -> Vec<f64> {
    let lines =
        page.lines().filter_map(|line| line.strip_prefix(name)?.strip_prefix('{')?.rsplit_once("\"} "));
    let fits = |own: &str| {
        labels.iter().all(|(key, value)| {
            let wanted = format!("{key}=\"{value}");
            own.split("\",").any(|part| part == wanted)
        })
    };
    // After the value there may be a time.
    lines.filter(|(own, _)| fits(own)).filter_map(|(_, rest)| rest.split(' ').next()?.parse().ok()).collect()
}

fn near(what: &str, told: f64, wanted: f64, tolerance: f64) -> Result<()> {
    ensure!((told - wanted).abs() <= tolerance, "{what}: {told} is not within {tolerance} of {wanted}");
    Ok(())
}

/// What `/stats/summary` has of a pod.
fn summary(cluster: &Cluster, pod: &str) -> Result<Value> {
    let summary: Value = serde_json::from_str(&cluster.kubelet_page("stats/summary")?)?;
    let pods = summary["pods"].as_array().context("no pods")?;
    let found = pods.iter().find(|one| one["podRef"]["name"] == pod);
    Ok(found.with_context(|| format!("{pod} is not in {summary}"))?.clone())
}

fn number(value: &Value, path: &str) -> Result<f64> {
    value.pointer(path).and_then(Value::as_f64).with_context(|| format!("no {path} in {value}"))
}

fn are_right(cluster: &mut Cluster, pod: Value) -> Result<()> {
    let name = run(cluster, pod)?;
    // kubelet may have looked a while ago.
    until("the summary is right", || summary_is_right(cluster, &name))?;
    until("the resource metrics are right", || resources_are_right(cluster, &name))?;
    until("cAdvisor's metrics are right", || cadvisors_are_right(cluster, &name))?;
    cluster.delete(&[&name])
}

fn summary_is_right(cluster: &Cluster, name: &str) -> Result<()> {
    let before = Inside::of(cluster, name)?;
    let pod = summary(cluster, name)?;
    let after = Inside::of(cluster, name)?;
    let container = &pod["containers"][0];
    ensure!(container["name"] == "c", "{container}");
    near("working set", number(container, "/memory/workingSetBytes")?, after.memory, 2.0 * MIB)?;
    ensure!(number(container, "/memory/usageBytes")? >= IN_MEMORY, "{container}");
    let time = number(container, "/cpu/usageCoreNanoSeconds")? / 1e9;
    ensure!((before.time..=after.time).contains(&time), "{time} s is not between {before:?} and {after:?}");
    ensure!(container["cpu"]["usageNanoCores"].is_number(), "{container}");
    near("written", number(container, "/rootfs/usedBytes")?, WRITTEN, MIB)?;
    ensure!(container["logs"]["usedBytes"].is_number(), "{container}");
    let volumes = pod["volume"].as_array().context("no volumes")?;
    let volume = volumes.iter().find(|one| one["name"] == "volume").context("no such volume")?;
    near("volume", number(volume, "/usedBytes")?, IN_VOLUME, MIB)?;
    near("received", number(&pod, "/network/rxBytes")?, after.received, 0.1 * MIB)?;
    ensure!(number(&pod, "/network/rxBytes")? >= RECEIVED, "{}", pod["network"]);
    ensure!(pod["network"]["name"] == "eth0" && pod["network"]["txBytes"].is_number(), "{}", pod["network"]);
    // The pod as a whole is its containers and what else it takes: a pause, or a machine.
    ensure!(number(&pod, "/memory/workingSetBytes")? >= IN_MEMORY, "{}", pod["memory"]);
    ensure!(number(&pod, "/cpu/usageCoreNanoSeconds")? > 0.0, "{}", pod["cpu"]);
    ensure!(number(&pod, "/process_stats/process_count")? >= 1.0, "{}", pod["process_stats"]);
    Ok(())
}

fn resources_are_right(cluster: &Cluster, name: &str) -> Result<()> {
    let before = Inside::of(cluster, name)?;
    let page = cluster.kubelet_page("metrics/resource")?;
    let after = Inside::of(cluster, name)?;
    let labels = [("namespace", "default"), ("pod", name)];
    let of_container = [labels.as_slice(), &[("container", "c")]].concat();
    let memory = sample(&page, "container_memory_working_set_bytes", &of_container)?;
    near("working set", memory, after.memory, 2.0 * MIB)?;
    let time = sample(&page, "container_cpu_usage_seconds_total", &of_container)?;
    ensure!((before.time..=after.time).contains(&time), "{time} s is not between {before:?} and {after:?}");
    ensure!(sample(&page, "container_start_time_seconds", &of_container)? > 0.0);
    ensure!(sample(&page, "pod_memory_working_set_bytes", &labels)? >= IN_MEMORY);
    ensure!(sample(&page, "pod_cpu_usage_seconds_total", &labels)? > 0.0);
    let failed = page.lines().find(|line| line.starts_with("resource_scrape_error "));
    ensure!(failed == Some("resource_scrape_error 0"), "{failed:?}");
    Ok(())
}

fn cadvisors_are_right(cluster: &Cluster, name: &str) -> Result<()> {
    let before = Inside::of(cluster, name)?;
    let page = cluster.kubelet_page("metrics/cadvisor")?;
    let after = Inside::of(cluster, name)?;
    let labels = [("namespace", "default"), ("pod", name)];
    let of_container = [labels.as_slice(), &[("container", "c"), ("image", BUSYBOX)]].concat();
    let memory = sample(&page, "container_memory_working_set_bytes", &of_container)?;
    near("working set", memory, after.memory, 2.0 * MIB)?;
    // The CRI's metrics are whole numbers, and this one is in seconds.
    let time = sample(&page, "container_cpu_usage_seconds_total", &of_container)?;
    let fits = (before.time.floor()..=after.time).contains(&time) && time >= 1.0;
    ensure!(fits, "{time} s is not between {before:?} and {after:?}");
    let of_interface = [labels.as_slice(), &[("interface", "eth0")]].concat();
    let received = sample(&page, "container_network_receive_bytes_total", &of_interface)?;
    near("received", received, after.received, 0.1 * MIB)
}

/// kubelet's own cAdvisor counts for kubelet then, and knows cgroups only: those of pods kubelet can name itself, those of containers have
/// no labels, because cAdvisor has no code for this runtime. What dashboards are made from is missing, and the summary has the containers'
/// figures all the same, because those come over the CRI anyway.
fn without_the_feature_gate(cluster: &mut Cluster) -> Result<()> {
    // A machine is below the pod's cgroup only where the pod's class declares an overhead.
    let in_cgroup = [(pod("trusted"), IN_MEMORY..=2.0 * IN_MEMORY), (machine("machine"), 0.0..=0.0)];
    for (pod, wanted) in in_cgroup {
        let name = run(cluster, pod)?;
        until("the summary has the containers", || {
            let inside = Inside::of(cluster, &name)?;
            let pod = summary(cluster, &name)?;
            let memory = number(&pod["containers"][0], "/memory/workingSetBytes")?;
            near("working set", memory, inside.memory, 2.0 * MIB)
        })?;
        let labels = [("namespace", "default"), ("pod", name.as_str())];
        until("cAdvisor has the pod as a whole", || {
            let page = cluster.kubelet_page("metrics/cadvisor")?;
            let whole = [labels.as_slice(), &[("container", ""), ("image", ""), ("name", "")]].concat();
            let memory = sample(&page, "container_memory_working_set_bytes", &whole)?;
            ensure!(wanted.contains(&memory), "{memory} is not in {wanted:?}");
            // It is the only one with the pod's name.
            sample(&page, "container_memory_working_set_bytes", &labels)
        })?;
        cluster.delete(&[&name])?;
    }
    Ok(())
}
