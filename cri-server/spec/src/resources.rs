//! Limits of a container: from the CRI's message to the OCI runtime's, merged on update, and back for status.
//!
//! In the CRI's message 0 and "" mean "not specified". On creation that is the runtime's default, on update what the container has.

mod taken_back;

use std::collections::HashMap;

use oci_spec::runtime::{LinuxCpu, LinuxHugepageLimit, LinuxMemory, LinuxPids, LinuxResources};
use podvisor_proto::cri;

use crate::HostFacts;
use crate::error::{Result, SpecError};
pub use taken_back::taken_back;

/// What the kernel takes for `cpu.shares` (`kernel/sched/sched.h`, `MIN_SHARES` and `MAX_SHARES`). Version 2's weight is computed from it and
/// runtimes refuse what is outside.
const CPU_SHARES: std::ops::RangeInclusive<i64> = 2..=262_144;

/// µs (`kernel/sched/core.c`, `min_cfs_quota_period` and `max_cfs_quota_period`).
const CPU_PERIOD: std::ops::RangeInclusive<i64> = 1_000..=1_000_000;

/// µs; the kernel refuses less.
const MIN_CPU_QUOTA: i64 = 1_000;

/// For a container that is to be made.
pub(crate) fn of_container(
    requested: Option<&cri::LinuxContainerResources>,
    host: &HostFacts,
    default_pids: Option<i64>,
) -> Result<LinuxResources> {
    let mut resources = empty();
    if let Some(requested) = requested {
        merge("config.linux.resources", &mut resources, requested, host)?;
    }
    let own_pids = resources.unified().as_ref().is_some_and(|unified| unified.contains_key("pids.max"));
    if let (Some(limit), false) = (default_pids, own_pids) {
        let mut pids = LinuxPids::default();
        pids.set_limit(limit);
        resources.set_pids(Some(pids));
    }
    Ok(resources)
}

/// The crate's default lists an empty set of device rules.
fn empty() -> LinuxResources {
    let mut resources = LinuxResources::default();
    resources.set_devices(None);
    resources
}

/// Resources for UpdateContainerResources: `update` over what the container has now.
pub fn resources(
    current: &LinuxResources,
    update: &cri::LinuxContainerResources,
    host: &HostFacts,
) -> Result<LinuxResources> {
    let mut resources = current.clone();
    // Only of a new process can it be set; a value that cannot be is a mistake all the same.
    wanted_oom_score_adj("linux", Some(update))?;
    merge("linux", &mut resources, update, host)?;
    Ok(resources)
}

fn merge(
    field: &str,
    resources: &mut LinuxResources,
    requested: &cri::LinuxContainerResources,
    host: &HostFacts,
) -> Result<()> {
    merge_unified(field, resources, &requested.unified, host)?;
    merge_cpu(field, resources, requested, host)?;
    merge_memory(field, resources, requested, host)?;
    merge_hugepages(field, resources, requested, host)
}

fn merge_cpu(
    field: &str,
    resources: &mut LinuxResources,
    requested: &cri::LinuxContainerResources,
    host: &HostFacts,
) -> Result<()> {
    let mut cpu = resources.cpu().clone().unwrap_or_default();
    let (period, quota, shares) = (requested.cpu_period, requested.cpu_quota, requested.cpu_shares);
    if period != 0 {
        if !CPU_PERIOD.contains(&period) {
            let why = format!("{period} is not between 1000 and 1000000 microseconds");
            return Err(SpecError::invalid(format!("{field}.cpu_period"), why));
        }
        cpu.set_period(Some(period.unsigned_abs()));
    }
    if quota != 0 {
        if quota != -1 && quota < MIN_CPU_QUOTA {
            let why = format!("{quota} is neither -1 (no limit) nor at least 1000 microseconds");
            return Err(SpecError::invalid(format!("{field}.cpu_quota"), why));
        }
        cpu.set_quota(Some(quota));
    }
    if shares != 0 {
        if shares < 0 {
            return Err(SpecError::invalid(format!("{field}.cpu_shares"), format!("{shares} is negative")));
        }
        cpu.set_shares(Some(shares.clamp(*CPU_SHARES.start(), *CPU_SHARES.end()).unsigned_abs()));
    }
    for (name, list, last) in [
        ("cpuset_cpus", &requested.cpuset_cpus, host.last_cpu),
        ("cpuset_mems", &requested.cpuset_mems, host.last_memory_node),
    ] {
        if list.is_empty() {
            continue;
        }
        if !is_cpu_list(list) {
            let why = format!("{list:?} is not a list of numbers and ranges such as \"0-2,7\"");
            return Err(SpecError::invalid(format!("{field}.{name}"), why));
        }
        // An OCI runtime that changes a container notices only after it has changed other things, and need not take those back.
        if let Some(last) = last
            && numbers(list).any(|number| number > last)
        {
            let why = format!("{list:?} is more than this node can have: the last number is {last}");
            return Err(SpecError::invalid(format!("{field}.{name}"), why));
        }
        if name == "cpuset_cpus" {
            cpu.set_cpus(Some(list.clone()));
        } else {
            cpu.set_mems(Some(list.clone()));
        }
    }
    resources.set_cpu(Some(cpu).filter(|cpu| *cpu != LinuxCpu::default()));
    Ok(())
}

/// All numbers that a list names, as single ones or as ends of ranges.
fn numbers(list: &str) -> impl Iterator<Item = u32> {
    list.split([',', '-']).filter_map(|number| number.parse().ok())
}

/// cpuset(7), "List format". The length bounds what a runtime has to parse.
fn is_cpu_list(list: &str) -> bool {
    let number =
        |text: &str| text.parse::<u32>().ok().filter(|_| text.bytes().all(|byte| byte.is_ascii_digit()));
    list.len() <= 4096
        && list.split(',').all(|part| match part.split_once('-') {
            None => number(part).is_some(),
            Some((from, to)) => {
                matches!((number(from), number(to)), (Some(from), Some(to)) if from <= to)
            }
        })
}

fn merge_memory(
    field: &str,
    resources: &mut LinuxResources,
    requested: &cri::LinuxContainerResources,
    host: &HostFacts,
) -> Result<()> {
    let mut memory = resources.memory().unwrap_or_default();
    let (limit, swap) = (requested.memory_limit_in_bytes, requested.memory_swap_limit_in_bytes);
    for (name, value) in [("memory_limit_in_bytes", limit), ("memory_swap_limit_in_bytes", swap)] {
        if value < -1 {
            let why = format!("{value} is neither -1 (no limit) nor a size");
            return Err(SpecError::invalid(format!("{field}.{name}"), why));
        }
    }
    if limit != 0 {
        memory.set_limit(Some(limit));
    }
    let in_force = memory.limit().unwrap_or(0);
    if swap > 0 && in_force == 0 {
        let why = "needs memory_limit_in_bytes: it is the limit of memory and swap together";
        return Err(SpecError::invalid(format!("{field}.memory_swap_limit_in_bytes"), why));
    }
    if swap > 0 && (in_force < 0 || swap < in_force) {
        let why = format!("{swap} is less than the memory limit, which it includes");
        return Err(SpecError::invalid(format!("{field}.memory_swap_limit_in_bytes"), why));
    }
    if host.swap && swap != 0 {
        memory.set_swap(Some(swap));
    } else if host.swap && limit != 0 {
        // No swap beyond the limit unless somebody asks for it.
        memory.set_swap(Some(limit));
    }
    // kubelet asks for swap this way on version 2; a second answer beside it would be applied first and could fail.
    if swap == 0
        && resources.unified().as_ref().is_some_and(|unified| unified.contains_key("memory.swap.max"))
    {
        memory.set_swap(None);
    }
    resources.set_memory(Some(memory).filter(|memory| *memory != LinuxMemory::default()));
    Ok(())
}

fn merge_hugepages(
    field: &str,
    resources: &mut LinuxResources,
    requested: &cri::LinuxContainerResources,
    host: &HostFacts,
) -> Result<()> {
    let mut limits = resources.hugepage_limits().clone().unwrap_or_default();
    for (index, request) in requested.hugepage_limits.iter().enumerate() {
        let field = |name: &str| format!("{field}.hugepage_limits[{index}].{name}");
        if !is_page_size(&request.page_size) {
            let why = format!("{:?} is not a size such as \"2MB\"", request.page_size);
            return Err(SpecError::invalid(field("page_size"), why));
        }
        if !host.hugepage_sizes.contains(&request.page_size) {
            let known = match host.hugepage_sizes.as_slice() {
                [] => "no huge pages".to_owned(),
                sizes => sizes.join(" and "),
            };
            let why = format!("this node's kernel has {known}, not {}", request.page_size);
            return Err(SpecError::invalid(field("page_size"), why));
        }
        let Ok(limit) = i64::try_from(request.limit) else {
            return Err(SpecError::invalid(field("limit"), format!("{} bytes are too many", request.limit)));
        };
        // kubelet sends a limit for every page size that the CPU knows, also where nothing can limit them.
        if !host.hugetlb {
            continue;
        }
        if let Some(known) = limits.iter_mut().find(|known| *known.page_size() == request.page_size) {
            known.set_limit(limit);
        } else {
            let mut fresh = LinuxHugepageLimit::default();
            fresh.set_page_size(request.page_size.clone()).set_limit(limit);
            limits.push(fresh);
        }
    }
    resources.set_hugepage_limits(Some(limits).filter(|limits| !limits.is_empty()));
    Ok(())
}

/// The page size in the name of a `hugetlb.<size>.limit_in_bytes` file.
fn is_page_size(size: &str) -> bool {
    let unit = size.trim_start_matches(|letter: char| letter.is_ascii_digit());
    let digits = size.len() - unit.len();
    (1..=10).contains(&digits) && ["KB", "MB", "GB"].contains(&unit)
}

fn merge_unified(
    field: &str,
    resources: &mut LinuxResources,
    requested: &HashMap<String, String>,
    host: &HostFacts,
) -> Result<()> {
    if requested.is_empty() {
        return Ok(());
    }
    let mut unified = resources.unified().clone().unwrap_or_default();
    for (key, value) in requested {
        let field = format!("{field}.unified[{key:?}]");
        let is_file = |byte: u8| byte.is_ascii_alphanumeric() || b"._-".contains(&byte);
        let controller = key.split('.').next().unwrap_or_default();
        if key.len() > 255 || !key.contains('.') || controller.is_empty() || !key.bytes().all(is_file) {
            return Err(SpecError::invalid(
                field,
                "is not the name of a cgroup file such as \"memory.high\"",
            ));
        }
        if controller == "cgroup" {
            return Err(SpecError::invalid(field, "the cgroup's own structure is not a resource"));
        }
        if value.len() > 4096 || value.contains('\0') {
            return Err(SpecError::invalid(field, "has a value with a NUL byte or of more than 4096 bytes"));
        }
        unified.insert(key.clone(), value.clone());
    }
    if !host.cgroup_v2 {
        let why = "needs cgroup version 2, and this node has version 1";
        return Err(SpecError::unsupported(format!("{field}.unified"), why));
    }
    resources.set_unified(Some(unified));
    Ok(())
}

/// `oom_score_adj` that can be set on this node. Without CAP_SYS_RESOURCE nothing below the daemon's own can be, and runtimes fail the whole
/// container for it, kubelet's critical pods (-997) first of all: the nearest possible value is used instead, and logged.
pub fn oom_score_adj(
    field: &str,
    requested: Option<&cri::LinuxContainerResources>,
    host: &HostFacts,
) -> Result<i32> {
    let wanted = wanted_oom_score_adj(field, requested)?;
    match host.oom_score_adj_floor {
        Some(floor) if floor > wanted => {
            tracing::info!(
                wanted,
                used = floor,
                "without CAP_SYS_RESOURCE the OOM score cannot be lowered as requested"
            );
            Ok(floor)
        }
        _ => Ok(wanted),
    }
}

fn wanted_oom_score_adj(field: &str, requested: Option<&cri::LinuxContainerResources>) -> Result<i32> {
    let requested = requested.map_or(0, |resources| resources.oom_score_adj);
    i32::try_from(requested).ok().filter(|value| (-1000..=1000).contains(value)).ok_or_else(|| {
        let why = format!("{requested} is not between -1000 and 1000");
        SpecError::invalid(format!("{field}.oom_score_adj"), why)
    })
}

/// The inverse, for ContainerStatus.resources.
pub fn reported_resources(
    resources: &LinuxResources,
    oom_score_adj: Option<i32>,
) -> cri::LinuxContainerResources {
    let cpu = resources.cpu().clone().unwrap_or_default();
    let memory = resources.memory().unwrap_or_default();
    let signed = |value: Option<u64>| value.map_or(0, |value| i64::try_from(value).unwrap_or(i64::MAX));
    let limits = resources.hugepage_limits().iter().flatten();
    cri::LinuxContainerResources {
        cpu_period: signed(cpu.period()),
        cpu_quota: cpu.quota().unwrap_or(0),
        cpu_shares: signed(cpu.shares()),
        memory_limit_in_bytes: memory.limit().unwrap_or(0),
        oom_score_adj: oom_score_adj.unwrap_or(0).into(),
        cpuset_cpus: cpu.cpus().clone().unwrap_or_default(),
        cpuset_mems: cpu.mems().clone().unwrap_or_default(),
        hugepage_limits: limits
            .map(|limit| cri::HugepageLimit {
                page_size: limit.page_size().clone(),
                limit: u64::try_from(limit.limit()).unwrap_or(0),
            })
            .collect(),
        unified: resources.unified().clone().unwrap_or_default(),
        memory_swap_limit_in_bytes: memory.swap().unwrap_or(0),
    }
}

#[cfg(test)]
mod tests;
