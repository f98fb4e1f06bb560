//! The spec's resources as files of cgroup version 2 (Documentation/admin-guide/cgroup-v2.rst): pure.

use oci_spec::runtime::{LinuxBlockIo, LinuxMemory, LinuxResources, LinuxThrottleDevice};

use crate::error::Refused;

/// File and content, in the order in which they are to be written.
pub(crate) type Files = Vec<(String, String)>;

/// Everything that `resources` says, but for devices.
pub(crate) fn files(resources: &LinuxResources) -> Result<Files, Refused> {
    let mut files = Files::new();
    let mut put = |file: &str, value: String| files.push((file.to_owned(), value));
    if let Some(cpu) = resources.cpu() {
        if cpu.realtime_runtime().is_some_and(|value| value != 0) {
            return Err(Refused::new("linux.resources.cpu.realtimeRuntime", "cgroup version 2 has none"));
        }
        if let Some(shares) = cpu.shares().filter(|shares| *shares != 0) {
            put("cpu.weight", weight_of(shares).to_string());
        }
        if let Some(idle) = cpu.idle() {
            put("cpu.idle", idle.to_string());
        }
        if cpu.quota().is_some() || cpu.period().is_some_and(|period| period != 0) {
            let period = cpu.period().filter(|period| *period != 0).unwrap_or(100_000);
            let quota = cpu.quota().filter(|quota| *quota > 0);
            put("cpu.max", format!("{} {period}", quota.map_or("max".to_owned(), |quota| quota.to_string())));
        }
        if let Some(burst) = cpu.burst() {
            put("cpu.max.burst", burst.to_string());
        }
        for (file, value) in [("cpuset.cpus", cpu.cpus()), ("cpuset.mems", cpu.mems())] {
            if let Some(value) = value.as_ref().filter(|value| !value.is_empty()) {
                put(file, value.clone());
            }
        }
    }
    if let Some(memory) = resources.memory() {
        files.extend(memory_files(memory)?);
    }
    let mut put = |file: &str, value: String| files.push((file.to_owned(), value));
    if let Some(pids) = resources.pids() {
        put("pids.max", bound(pids.limit()));
    }
    for limit in resources.hugepage_limits().iter().flatten() {
        put(&format!("hugetlb.{}.max", limit.page_size()), limit.limit().to_string());
    }
    if let Some(io) = resources.block_io() {
        files.extend(io_files(io)?);
    }
    for (field, is_set) in [
        ("network", resources.network().as_ref().is_some_and(|network| network.class_id().is_some())),
        ("rdma", resources.rdma().as_ref().is_some_and(|rdma| !rdma.is_empty())),
    ] {
        if is_set {
            return Err(Refused::new(format!("linux.resources.{field}"), "is not applied here"));
        }
    }
    let mut unified: Vec<_> = resources.unified().iter().flatten().collect();
    unified.sort();
    for (file, value) in unified {
        if file.contains('/') || !file.contains('.') || file.starts_with('.') || file.starts_with("cgroup.") {
            let why = "is no file of a controller";
            return Err(Refused::new(format!("linux.resources.unified[{file:?}]"), why));
        }
        files.retain(|(known, _)| known != file);
        files.push((file.clone(), value.clone()));
    }
    Ok(files)
}

fn memory_files(memory: &LinuxMemory) -> Result<Files, Refused> {
    let mut files = Files::new();
    let limit = memory.limit();
    if let Some(swap) = memory.swap() {
        // In the spec it is memory and swap together, as in version 1.
        let value = match (swap, limit) {
            (-1, _) => "max".to_owned(),
            (0, _) => "0".to_owned(),
            (swap, Some(limit)) if limit > 0 && swap >= limit => (swap - limit).to_string(),
            _ => {
                let why = "has to be at least the memory limit, which it includes";
                return Err(Refused::new("linux.resources.memory.swap", why));
            }
        };
        files.push(("memory.swap.max".into(), value));
    }
    if let Some(limit) = limit.filter(|limit| *limit != 0) {
        files.push(("memory.max".into(), bound(limit)));
    }
    if let Some(reservation) = memory.reservation().filter(|value| *value != 0) {
        files.push(("memory.low".into(), bound(reservation)));
    }
    Ok(files)
}

fn io_files(io: &LinuxBlockIo) -> Result<Files, Refused> {
    let mut files = Files::new();
    if io.leaf_weight().is_some_and(|weight| weight != 0) {
        return Err(Refused::new("linux.resources.blockIO.leafWeight", "cgroup version 2 has none"));
    }
    if let Some(weight) = io.weight().filter(|weight| *weight != 0) {
        // 10–1000 to 1–10000 (cgroup-v2.rst, io.weight).
        let weight = 1 + (u64::from(weight).saturating_sub(10)) * 9999 / 990;
        files.push(("io.weight".into(), weight.to_string()));
    }
    let throttles: [(&str, &Option<Vec<LinuxThrottleDevice>>); 4] = [
        ("rbps", io.throttle_read_bps_device()),
        ("wbps", io.throttle_write_bps_device()),
        ("riops", io.throttle_read_iops_device()),
        ("wiops", io.throttle_write_iops_device()),
    ];
    for (key, devices) in throttles {
        for device in devices.iter().flatten() {
            files.push((
                "io.max".into(),
                format!("{}:{} {key}={}", device.major(), device.minor(), device.rate()),
            ));
        }
    }
    Ok(files)
}

fn bound(limit: i64) -> String {
    if limit < 0 { "max".to_owned() } else { limit.to_string() }
}

/// Shares of version 1 (2–262144, 1024 the default) as a weight of version 2 (1–10000, 100 the default), so that the defaults meet: the
/// curve that OCI runtimes agreed on, 10^((l² + 125·l) / 612 − 7/34) with l = log2(shares).
fn weight_of(shares: u64) -> u32 {
    #[allow(clippy::cast_precision_loss)] // at most 262144
    let l = (shares.clamp(2, 262_144) as f64).log2();
    let weight = 10_f64.powf((l * l + 125.0 * l) / 612.0 - 7.0 / 34.0).ceil();
    #[allow(clippy::cast_possible_truncation, clippy::cast_sign_loss)] // 1 to 10000 by the curve
    let weight = weight as u32;
    weight.clamp(1, 10_000)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn of(text: serde_json::Value) -> Result<Vec<String>, String> {
        let resources: LinuxResources = serde_json::from_value(text).unwrap();
        let files = files(&resources).map_err(|refused| refused.field)?;
        Ok(files.into_iter().map(|(file, value)| format!("{file}={value}")).collect())
    }

    #[test]
    fn limits_become_files() {
        assert_eq!(
            of(serde_json::json!({"cpu": {"shares": 1024, "quota": 50_000, "period": 100_000, "cpus": "0-1"}})).unwrap(),
            ["cpu.weight=100", "cpu.max=50000 100000", "cpuset.cpus=0-1"]
        );
        assert_eq!(of(serde_json::json!({"cpu": {"quota": -1}})).unwrap(), ["cpu.max=max 100000"]);
        assert_eq!(
            of(serde_json::json!({"memory": {"limit": 1000, "swap": 1500, "reservation": 10}})).unwrap(),
            ["memory.swap.max=500", "memory.max=1000", "memory.low=10"]
        );
        assert_eq!(
            of(serde_json::json!({"pids": {"limit": -1}, "hugepageLimits": [{"pageSize": "2MB", "limit": 4}]})).unwrap(),
            ["pids.max=max", "hugetlb.2MB.max=4"]
        );
    }

    #[test]
    fn unified_replaces_what_was_derived() {
        let files = of(serde_json::json!({
            "memory": {"limit": 1000}, "unified": {"memory.max": "max", "memory.high": "900"},
        }));
        assert_eq!(files.unwrap(), ["memory.high=900", "memory.max=max"]);
        for bad in ["../x.y", "cgroup.procs", "plain"] {
            assert!(of(serde_json::json!({"unified": {bad: "1"}})).is_err(), "{bad}");
        }
    }

    #[test]
    fn what_version_2_does_not_have_is_refused() {
        assert_eq!(
            of(serde_json::json!({"memory": {"limit": 1000, "swap": 10}})),
            Err("linux.resources.memory.swap".into())
        );
        assert_eq!(of(serde_json::json!({"network": {"classID": 5}})), Err("linux.resources.network".into()));
    }

    #[test]
    fn weights_at_the_ends_and_in_the_middle() {
        assert_eq!((weight_of(2), weight_of(1024), weight_of(262_144)), (1, 100, 10_000));
    }
}
