//! Resources: claimed field by field, and laid over what is there.

use podvisor_proto::nri::{Field, LinuxCpu, LinuxMemory, LinuxResources};

use crate::owners::{Conflict, Owners};

/// `plugin` sets every field of `asked` that is there.
pub(super) fn claim(
    owners: &mut Owners,
    container: &str,
    plugin: &str,
    asked: &LinuxResources,
) -> Result<(), Conflict> {
    let LinuxResources { memory, cpu, hugepage_limits, blockio_class, rdt_class, unified, devices: _, pids } =
        asked;
    let mut set = Vec::new();
    if let Some(memory) = memory {
        let LinuxMemory {
            limit,
            reservation,
            swap,
            kernel,
            kernel_tcp,
            swappiness,
            disable_oom_killer,
            use_hierarchy,
        } = memory;
        set.extend([
            (Field::MemLimit, limit.is_some()),
            (Field::MemReservation, reservation.is_some()),
            (Field::MemSwapLimit, swap.is_some()),
            (Field::MemKernelLimit, kernel.is_some()),
            (Field::MemTcpLimit, kernel_tcp.is_some()),
            (Field::MemSwappiness, swappiness.is_some()),
            (Field::MemDisableOomKiller, disable_oom_killer.is_some()),
            (Field::MemUseHierarchy, use_hierarchy.is_some()),
        ]);
    }
    if let Some(cpu) = cpu {
        let LinuxCpu { shares, quota, period, realtime_runtime, realtime_period, cpus, mems } = cpu;
        set.extend([
            (Field::CpuShares, shares.is_some()),
            (Field::CpuQuota, quota.is_some()),
            (Field::CpuPeriod, period.is_some()),
            (Field::CpuRealtimeRuntime, realtime_runtime.is_some()),
            (Field::CpuRealtimePeriod, realtime_period.is_some()),
            (Field::CpuSetCpUs, !cpus.is_empty()),
            (Field::CpuSetMems, !mems.is_empty()),
        ]);
    }
    set.extend([
        (Field::BlockioClass, blockio_class.is_some()),
        (Field::RdtClass, rdt_class.is_some()),
        (Field::PidsLimit, pids.is_some()),
    ]);
    for (field, _) in set.into_iter().filter(|(_, is_set)| *is_set) {
        owners.claim(container, field, plugin)?;
    }
    for limit in hugepage_limits {
        owners.claim_entry(container, Field::HugepageLimits, &limit.page_size, plugin)?;
    }
    for name in unified.keys() {
        owners.claim_entry(container, Field::CgroupsUnified, name, plugin)?;
    }
    Ok(())
}

/// Lays what `over` sets over `under`.
pub fn overlay(under: &mut LinuxResources, over: LinuxResources) {
    fn set<T>(under: &mut Option<T>, over: Option<T>) {
        if over.is_some() {
            *under = over;
        }
    }
    let LinuxResources { memory, cpu, hugepage_limits, blockio_class, rdt_class, unified, devices, pids } =
        over;
    if let Some(memory) = memory {
        let under = under.memory.get_or_insert_default();
        set(&mut under.limit, memory.limit);
        set(&mut under.reservation, memory.reservation);
        set(&mut under.swap, memory.swap);
        set(&mut under.kernel, memory.kernel);
        set(&mut under.kernel_tcp, memory.kernel_tcp);
        set(&mut under.swappiness, memory.swappiness);
        set(&mut under.disable_oom_killer, memory.disable_oom_killer);
        set(&mut under.use_hierarchy, memory.use_hierarchy);
    }
    if let Some(cpu) = cpu {
        let under = under.cpu.get_or_insert_default();
        set(&mut under.shares, cpu.shares);
        set(&mut under.quota, cpu.quota);
        set(&mut under.period, cpu.period);
        set(&mut under.realtime_runtime, cpu.realtime_runtime);
        set(&mut under.realtime_period, cpu.realtime_period);
        if !cpu.cpus.is_empty() {
            under.cpus = cpu.cpus;
        }
        if !cpu.mems.is_empty() {
            under.mems = cpu.mems;
        }
    }
    for limit in hugepage_limits {
        under.hugepage_limits.retain(|present| present.page_size != limit.page_size);
        under.hugepage_limits.push(limit);
    }
    set(&mut under.blockio_class, blockio_class);
    set(&mut under.rdt_class, rdt_class);
    under.unified.extend(unified);
    under.devices.extend(devices);
    set(&mut under.pids, pids);
}
