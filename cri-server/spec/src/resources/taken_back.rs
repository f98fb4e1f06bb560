//! What takes back an update that an OCI runtime has refused: it writes one cgroup file after the other, and those before the refused
//! one stay as they are.

use oci_spec::runtime::{LinuxCpu, LinuxHugepageLimit, LinuxMemory, LinuxResources};

/// The kernel's own for a group that nobody has limited: `cpu.shares` and, in µs, `cpu.cfs_period_us` (sched/core.c), pages of any size.
const CPU_SHARES: u64 = 1024;
const CPU_PERIOD: u64 = 100_000;
const NO_LIMIT: i64 = i64::MAX;

/// Resources for another update after `refused`: what the container had, `current`, and no limit where only `refused` names one. A list of
/// CPUs or memory nodes that the container did not have cannot be taken back (the parent's is its widest), nor can files in
/// `unified` whose first content nobody knows.
pub fn taken_back(current: &LinuxResources, refused: &LinuxResources) -> LinuxResources {
    let mut back = current.clone();
    if let Some(refused) = refused.cpu() {
        back.set_cpu(Some(cpu(current.cpu().clone().unwrap_or_default(), refused)));
    }
    if let Some(refused) = refused.memory() {
        back.set_memory(Some(memory(current.memory().unwrap_or_default(), refused)));
    }
    if let Some(refused) = refused.hugepage_limits() {
        back.set_hugepage_limits(Some(hugepages(current.hugepage_limits().clone(), refused)));
    }
    let mut unified = current.unified().clone().unwrap_or_default();
    for key in refused.unified().iter().flat_map(|unified| unified.keys()) {
        if !unified.contains_key(key)
            && let Some(value) = unlimited(key, current)
        {
            unified.insert(key.clone(), value.to_owned());
        }
    }
    back.set_unified(Some(unified).filter(|unified| !unified.is_empty()));
    back
}

fn cpu(mut back: LinuxCpu, refused: &LinuxCpu) -> LinuxCpu {
    back.set_period(back.period().or(refused.period().map(|_| CPU_PERIOD)));
    back.set_quota(back.quota().or(refused.quota().map(|_| -1)));
    back.set_shares(back.shares().or(refused.shares().map(|_| CPU_SHARES)));
    back
}

fn memory(mut back: LinuxMemory, refused: &LinuxMemory) -> LinuxMemory {
    back.set_limit(back.limit().or(refused.limit().map(|_| -1)));
    back.set_swap(back.swap().or(refused.swap().map(|_| -1)));
    back
}

fn hugepages(
    back: Option<Vec<LinuxHugepageLimit>>,
    refused: &[LinuxHugepageLimit],
) -> Vec<LinuxHugepageLimit> {
    let mut back = back.unwrap_or_default();
    for limit in refused {
        if !back.iter().any(|known| known.page_size() == limit.page_size()) {
            let mut limit = limit.clone();
            limit.set_limit(NO_LIMIT);
            back.push(limit);
        }
    }
    back
}

/// The content of a version 2 file in a group that nobody has limited, unless another field of `current` says it.
fn unlimited(key: &str, current: &LinuxResources) -> Option<&'static str> {
    let (cpu, memory) = (current.cpu().clone().unwrap_or_default(), current.memory().unwrap_or_default());
    let said = match key {
        "cpu.max" => cpu.quota().is_some() || cpu.period().is_some(),
        "memory.max" => memory.limit().is_some(),
        "memory.swap.max" => memory.swap().is_some(),
        "pids.max" => current.pids().is_some(),
        _ => false,
    };
    let (controller, _) = key.split_once('.')?;
    // Those of other controllers have a line per device.
    if said || !["cpu", "memory", "pids", "hugetlb"].contains(&controller) {
        return None;
    }
    match key.rsplit('.').next()? {
        "max" | "high" => Some("max"),
        "low" | "min" => Some("0"),
        _ => None,
    }
}
