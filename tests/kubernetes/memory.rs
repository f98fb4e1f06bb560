//! What kubelet asks of a container's cgroup beside limits, where that is one of version 2: swap (KEP-2400) and protection of memory
//! (KEP-2570). Only in the lab, which has both.

use std::fs;

use anyhow::{Context, Result, ensure};
use serde_json::{Value, json};

use crate::cluster::{Cluster, Settings, name};
use crate::workloads::{Kind, each_kind, idle, runs};
use crate::{Tests, unit, until};

const MIB: u64 = 1 << 20;

/// The kernel counts in pages, kubelet too.
const PAGE: u64 = 4096;

pub(crate) fn add(tests: &mut Tests) {
    tests.add_in_lab("memory::is_swapped_and_protected", &Settings::default(), |cluster| {
        each_kind(cluster, is_swapped_and_protected)
    });
}

/// What a cgroup is to show: `memory.max`, `.swap.max`, `.high`, `.low` and `.min`.
type Wanted = [String; 5];

fn is_swapped_and_protected(cluster: &Cluster, kind: Kind) -> Result<()> {
    let sized = |request: u64, limit: u64| {
        let memory = |mib: u64| json!({"memory": format!("{mib}Mi"), "cpu": "50m"});
        json!({"resources": {"requests": memory(request), "limits": memory(limit)}})
    };
    // More than its limit. A guest has no swap.
    let large = "dd if=/dev/zero bs=170M count=1 | sleep 1000000";
    let swaps = match kind {
        Kind::Trusted => runs("swaps", large, &sized(128, 160)),
        Kind::Machine => idle("swaps", &sized(128, 160)),
    };
    let burstable = kind.pod(
        "burstable",
        &json!({"containers": [swaps, idle("fixed", &sized(64, 64)), idle("free", &json!({}))]}),
    );
    let guaranteed = kind.pod("guaranteed", &json!({"containers": [idle("fixed", &sized(64, 64))]}));
    cluster.run(&[burstable.clone(), guaranteed.clone()])?;

    // kubelet's memoryThrottlingFactor is 0.9 here.
    let high = |request: u64, limit: u64| (request + (limit - request) * 9 / 10) / PAGE * PAGE;
    // What kubelet does not keep back for the system, and eviction's thresholds are not among that.
    let all = meminfo("MemTotal")?;
    let wanted = |max: u64, swap: u64, high: Option<u64>, low: u64, min: u64| -> Wanted {
        let or_max = |value: Option<u64>| value.map_or_else(|| "max".to_owned(), |value| value.to_string());
        [
            or_max(Some(max).filter(|max| *max > 0)),
            swap.to_string(),
            or_max(high),
            low.to_string(),
            min.to_string(),
        ]
    };
    let swap = 128 * MIB * meminfo("SwapTotal")? / all / PAGE * PAGE;
    ensure!(swap > 20 * MIB, "only {swap} bytes of swap for the container");
    let (of_swaps, of_fixed) = (128 * MIB, 64 * MIB);
    for (pod, container, wanted) in [
        (&burstable, "swaps", wanted(160 * MIB, swap, Some(high(of_swaps, 160 * MIB)), of_swaps, 0)),
        // What is as large as it may be has no need of any of it.
        (&burstable, "fixed", wanted(of_fixed, 0, None, of_fixed, 0)),
        (&burstable, "free", wanted(0, 0, Some(high(0, all)), 0, 0)),
        (&guaranteed, "fixed", wanted(of_fixed, 0, None, 0, of_fixed)),
    ] {
        let shown = shown(cluster, pod, container)?;
        ensure!(shown == wanted, "{}/{container}: {shown:?} instead of {wanted:?}", name(pod));
    }
    if kind == Kind::Machine {
        // A guest's memory is the node's: it may be swapped there, as far as all containers may. systemd, whose scope it is, leaves that alone.
        unit::systemctl(&["daemon-reload"])?;
        for (pod, wanted) in [(&burstable, swap), (&guaranteed, 0)] {
            let sandbox = cluster.sandbox(name(pod))?;
            let id = sandbox["status"]["id"].as_str().context("no id")?;
            let file = format!("/sys/fs/cgroup/podvisor.slice/podvisor-{id}.scope/memory.swap.max");
            let shown = fs::read_to_string(&file).with_context(|| format!("reading {file}"))?;
            ensure!(shown.trim() == wanted.to_string(), "{}: {shown} instead of {wanted}", name(pod));
        }
    } else {
        until("what is over the limit is swapped", || {
            let script = "cat /sys/fs/cgroup/memory.swap.current";
            let swapped: u64 = inside(cluster, &burstable, "swaps", script)?.trim().parse()?;
            ensure!(swapped >= 10 * MIB, "{swapped} bytes are swapped");
            Ok(())
        })?;
        let statuses = cluster.get(&["pod", "burstable"])?["status"]["containerStatuses"].clone();
        let restarted =
            statuses.as_array().context("no containers")?.iter().any(|one| one["restartCount"] != 0);
        ensure!(!restarted, "{statuses}");
    }
    cluster.delete(&["burstable", "guaranteed"])
}

fn shown(cluster: &Cluster, pod: &Value, container: &str) -> Result<Wanted> {
    let script = "cd /sys/fs/cgroup; cat memory.max memory.swap.max memory.high memory.low memory.min";
    let said = inside(cluster, pod, container, script)?;
    let lines: Vec<String> = said.lines().map(str::to_owned).collect();
    lines.try_into().map_err(|lines| anyhow::anyhow!("{lines:?}"))
}

fn inside(cluster: &Cluster, pod: &Value, container: &str, script: &str) -> Result<String> {
    cluster.kubectl(&["exec", name(pod), "--container", container, "--", "sh", "-c", script])
}

/// A line of `/proc/meminfo`, in bytes.
fn meminfo(name: &str) -> Result<u64> {
    let text = fs::read_to_string("/proc/meminfo")?;
    let line = text.lines().find(|line| line.split(':').next() == Some(name));
    let number =
        line.and_then(|line| line.split_whitespace().nth(1)).with_context(|| format!("no {name}"))?;
    Ok(number.parse::<u64>()? * 1024)
}
