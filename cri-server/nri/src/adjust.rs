//! What plugins ask for, applied to an OCI spec. Pure: what it needs to know of the host is given.
//!
//! It works on the spec's JSON form and reads the result as a check, so whatever a plugin has said must make a spec.

use std::collections::BTreeMap;

use oci_spec::runtime::Spec;
use podvisor_proto::nri::{
    ContainerAdjustment, Hook, Hooks, IoPrioClass, KeyValue, LinuxContainerAdjustment, LinuxDevice,
    LinuxMemoryPolicy, LinuxNamespace, LinuxNetDevice, LinuxRdt, LinuxResources, LinuxScheduler,
    LinuxSchedulerFlag, LinuxSchedulerPolicy, LinuxSeccomp, Mount, MpolFlag, MpolMode, PosixRlimit,
};
use serde_json::{Map, Value, json};

use crate::owners::removal;

/// What of the host decides.
#[derive(Debug, Clone, Copy, Default)]
pub struct Host {
    /// The lowest OOM score adjustment that can be set; `None`: any.
    pub oom_score_adj_floor: Option<i64>,
    /// Swap can be limited: with a memory limit the swap limit goes along, as plugins expect it.
    pub swap: bool,
}

/// Why an adjustment cannot be applied.
#[derive(Debug, thiserror::Error)]
pub enum AdjustError {
    /// Something podvisor does not have.
    #[error("{what} cannot be adjusted: {why}")]
    Unsupported {
        /// The field.
        what: &'static str,
        /// Why.
        why: &'static str,
    },
    /// A value out of its enumeration.
    #[error("{what} {value} does not exist")]
    Unknown {
        /// The field.
        what: &'static str,
        /// Its number on the wire.
        value: i32,
    },
    /// What came out is no spec.
    #[error("the adjusted spec is none")]
    Spec(#[source] serde_json::Error),
}

/// The spec as the plugins want it, in JSON. CDI devices are the caller's.
pub fn adjust(spec: &Spec, asked: &ContainerAdjustment, host: Host) -> Result<Value, AdjustError> {
    let mut whole = serde_json::to_value(spec).map_err(AdjustError::Spec)?;
    // Taken apart completely: a new field has to be thought of.
    let ContainerAdjustment { annotations, mounts, env, hooks, linux, rlimits, cdi_devices: _, args } = asked;
    adjust_map(&mut whole["annotations"], annotations, |value| json!(value));
    adjust_env(&mut whole["process"]["env"], env);
    if !args.is_empty() {
        whole["process"]["args"] = json!(args);
        // Windows' form of the same.
        if let Some(process) = whole["process"].as_object_mut() {
            process.remove("commandLine");
        }
    }
    adjust_hooks(&mut whole, hooks.as_ref());
    adjust_rlimits(&mut whole["process"]["rlimits"], rlimits);
    if let Some(linux) = linux {
        adjust_linux(&mut whole, linux, host)?;
    }
    adjust_mounts(&mut whole, mounts);
    prune(&mut whole);
    check(&whole)?;
    Ok(whole)
}

/// That it is a spec.
fn check(whole: &Value) -> Result<(), AdjustError> {
    let mut checked = whole.clone();
    // Crate oci-spec spells two of these flags otherwise than the OCI spec does; they are from an enumeration anyway.
    if let Some(scheduler) = checked.pointer_mut("/process/scheduler").and_then(Value::as_object_mut) {
        scheduler.remove("flags");
    }
    serde_json::from_value::<Spec>(checked).map(drop).map_err(AdjustError::Spec)
}

/// Lays resources over those in force (OCI `LinuxResources` as JSON).
pub fn adjust_resources(whole: &mut Value, asked: &LinuxResources, host: Host) -> Result<(), AdjustError> {
    let LinuxResources { memory, cpu, hugepage_limits, blockio_class, rdt_class: _, unified, devices, pids } =
        asked;
    let mut set = |path: [&str; 2], value: Option<Value>| {
        if let Some(value) = value {
            whole[path[0]][path[1]] = value;
        }
    };
    if let Some(memory) = memory {
        let limit = memory.limit.filter(|limit| limit.value != 0);
        set(["memory", "limit"], limit.map(|v| json!(v.value)));
        set(["memory", "reservation"], memory.reservation.map(|v| json!(v.value)));
        if host.swap {
            set(["memory", "swap"], memory.swap.or(limit).map(|v| json!(v.value)));
        }
        set(["memory", "kernel"], memory.kernel.map(|v| json!(v.value)));
        set(["memory", "kernelTCP"], memory.kernel_tcp.map(|v| json!(v.value)));
        set(["memory", "swappiness"], memory.swappiness.map(|v| json!(v.value)));
        set(["memory", "disableOOMKiller"], memory.disable_oom_killer.map(|v| json!(v.value)));
        set(["memory", "useHierarchy"], memory.use_hierarchy.map(|v| json!(v.value)));
    }
    if let Some(cpu) = cpu {
        set(["cpu", "shares"], cpu.shares.map(|v| json!(v.value)));
        set(["cpu", "quota"], cpu.quota.map(|v| json!(v.value)));
        set(["cpu", "period"], cpu.period.map(|v| json!(v.value)));
        set(["cpu", "realtimeRuntime"], cpu.realtime_runtime.map(|v| json!(v.value)));
        set(["cpu", "realtimePeriod"], cpu.realtime_period.map(|v| json!(v.value)));
        set(["cpu", "cpus"], some(&cpu.cpus));
        set(["cpu", "mems"], some(&cpu.mems));
    }
    set(["pids", "limit"], pids.map(|pids| json!(pids.limit)));
    for limit in hugepage_limits {
        let limits = list(&mut whole["hugepageLimits"]);
        limits.retain(|present| present["pageSize"] != json!(limit.page_size));
        limits.push(json!({ "pageSize": limit.page_size, "limit": limit.limit }));
    }
    for (name, value) in unified {
        whole["unified"][name] = json!(value);
    }
    for rule in devices {
        let mut entry = json!({ "allow": rule.allow, "type": rule.r#type, "access": rule.access });
        if let Some(major) = rule.major {
            entry["major"] = json!(major.value);
        }
        if let Some(minor) = rule.minor {
            entry["minor"] = json!(minor.value);
        }
        list(&mut whole["devices"]).push(entry);
    }
    match blockio_class {
        Some(class) if class.value.is_empty() => whole["blockIO"] = Value::Null,
        Some(_) => {
            let why = "there are no named classes of block I/O";
            return Err(AdjustError::Unsupported { what: "blockio_class", why });
        }
        None => {}
    }
    prune(whole);
    Ok(())
}

fn adjust_linux(whole: &mut Value, asked: &LinuxContainerAdjustment, host: Host) -> Result<(), AdjustError> {
    let LinuxContainerAdjustment {
        devices,
        resources,
        cgroups_path,
        oom_score_adj,
        io_priority,
        seccomp_policy,
        namespaces,
        sysctl,
        net_devices,
        scheduler,
        rdt,
        memory_policy,
    } = asked;
    adjust_devices(&mut whole["linux"], devices);
    if let Some(resources) = resources {
        adjust_resources(&mut whole["linux"]["resources"], resources, host)?;
        if let Some(class) = &resources.rdt_class {
            whole["linux"]["intelRdt"] =
                if class.value.is_empty() { Value::Null } else { json!({ "closID": class.value }) };
        }
    }
    if !cgroups_path.is_empty() {
        whole["linux"]["cgroupsPath"] = json!(cgroups_path);
    }
    if let Some(score) = oom_score_adj {
        let floor = host.oom_score_adj_floor.unwrap_or(-1000).max(-1000);
        whole["process"]["oomScoreAdj"] = json!(score.value.clamp(floor, 1000));
    }
    if let Some(priority) = io_priority {
        let class = IoPrioClass::try_from(priority.class)
            .map_err(|_| AdjustError::Unknown { what: "class of I/O priority", value: priority.class })?;
        whole["process"]["ioPriority"] = match class {
            IoPrioClass::IoprioClassNone => Value::Null,
            class => json!({ "class": class.as_str_name(), "priority": priority.priority }),
        };
    }
    if let Some(scheduler) = scheduler {
        whole["process"]["scheduler"] = scheduling(scheduler)?;
    }
    if let Some(policy) = seccomp_policy {
        whole["linux"]["seccomp"] = seccomp(policy);
    }
    for LinuxNamespace { r#type, path } in namespaces {
        let kind = removal(r#type).unwrap_or(r#type);
        let present = list(&mut whole["linux"]["namespaces"]);
        present.retain(|namespace| namespace["type"] != json!(kind));
        if removal(r#type).is_none() {
            present.push(json!({ "type": kind, "path": some(path) }));
        }
    }
    adjust_map(&mut whole["linux"]["sysctl"], sysctl, |value| json!(value));
    let rename = |device: &LinuxNetDevice| json!({ "name": some(&device.name) });
    adjust_map(&mut whole["linux"]["netDevices"], net_devices, rename);
    if let Some(LinuxRdt { clos_id, schemata, enable_monitoring, remove }) = rdt {
        let present = &mut whole["linux"]["intelRdt"];
        if *remove {
            *present = Value::Null;
        }
        if let Some(class) = clos_id {
            present["closID"] = json!(class.value);
        }
        if let Some(lines) = schemata {
            present["schemata"] = json!(lines.value);
        }
        if let Some(enable) = enable_monitoring {
            present["enableMonitoring"] = json!(enable.value);
        }
    }
    if let Some(policy) = memory_policy {
        whole["linux"]["memoryPolicy"] = memory(policy)?;
    }
    Ok(())
}

fn adjust_map<V>(whole: &mut Value, asked: &BTreeMap<String, V>, value: impl Fn(&V) -> Value) {
    if let Some(present) = whole.as_object_mut() {
        asked.keys().filter_map(|key| removal(key)).for_each(|key| drop(present.remove(key)));
    }
    for (key, set) in asked.iter().filter(|(key, _)| removal(key).is_none()) {
        whole[key] = value(set);
    }
}

/// Variables keep their place; new ones follow.
fn adjust_env(whole: &mut Value, asked: &[KeyValue]) {
    let present = list(whole);
    let key_of =
        |entry: &Value| entry.as_str().and_then(|e| e.split('=').next()).unwrap_or_default().to_owned();
    for key in asked.iter().filter_map(|variable| removal(&variable.key)) {
        // Not one that is taken away and set again: it keeps its place.
        if !asked.iter().any(|variable| variable.key == key) {
            present.retain(|entry| key_of(entry) != key);
        }
    }
    for KeyValue { key, value } in asked.iter().filter(|variable| removal(&variable.key).is_none()) {
        let entry = json!(format!("{key}={value}"));
        match present.iter_mut().find(|present| key_of(present) == *key) {
            Some(place) => *place = entry,
            None => present.push(entry),
        }
    }
}

fn adjust_hooks(whole: &mut Value, asked: Option<&Hooks>) {
    let Some(Hooks { prestart, create_runtime, create_container, start_container, poststart, poststop }) =
        asked
    else {
        return;
    };
    for (name, hooks) in [
        ("prestart", prestart),
        ("createRuntime", create_runtime),
        ("createContainer", create_container),
        ("startContainer", start_container),
        ("poststart", poststart),
        ("poststop", poststop),
    ] {
        for Hook { path, args, env, timeout } in hooks {
            let mut hook = json!({ "path": path });
            if !args.is_empty() {
                hook["args"] = json!(args);
            }
            if !env.is_empty() {
                hook["env"] = json!(env);
            }
            if let Some(timeout) = timeout {
                hook["timeout"] = json!(timeout.value);
            }
            list(&mut whole["hooks"][name]).push(hook);
        }
    }
}

fn adjust_rlimits(whole: &mut Value, asked: &[PosixRlimit]) {
    for PosixRlimit { r#type, hard, soft } in asked {
        let present = list(whole);
        present.retain(|limit| limit["type"] != json!(r#type));
        present.push(json!({ "type": r#type, "hard": hard, "soft": soft }));
    }
}

/// The nodes, and the rules that let the container use them.
fn adjust_devices(linux: &mut Value, asked: &[LinuxDevice]) {
    for device in asked {
        let path = removal(&device.path).unwrap_or(&device.path);
        list(&mut linux["devices"]).retain(|present| present["path"] != json!(path));
    }
    for device in asked.iter().filter(|device| removal(&device.path).is_none()) {
        let LinuxDevice { path, r#type, major, minor, file_mode, uid, gid } = device;
        list(&mut linux["devices"]).push(json!({
            "path": path,
            "type": r#type,
            "major": major,
            "minor": minor,
            "fileMode": file_mode.map(|mode| mode.value),
            "uid": uid.map(|uid| uid.value),
            "gid": gid.map(|gid| gid.value),
        }));
        let access = if r#type == "b" { "rwm" } else { "rw" };
        let rule = json!({ "allow": true, "type": r#type, "major": major, "minor": minor, "access": access });
        list(&mut linux["resources"]["devices"]).push(rule);
    }
}

/// Those further up come first, or they would hide others.
fn adjust_mounts(whole: &mut Value, asked: &[Mount]) {
    if asked.is_empty() {
        return;
    }
    let present = list(&mut whole["mounts"]);
    for mount in asked {
        let destination = removal(&mount.destination).unwrap_or(&mount.destination);
        present.retain(|mount| mount["destination"] != json!(destination));
    }
    let added: Vec<&Mount> = asked.iter().filter(|mount| removal(&mount.destination).is_none()).collect();
    for Mount { destination, r#type, source, options } in &added {
        present.push(json!({
            "destination": destination, "type": some(r#type), "source": some(source), "options": options,
        }));
    }
    let depth = |mount: &Value| {
        let destination = mount["destination"].as_str().unwrap_or_default();
        destination.split('/').filter(|part| !part.is_empty()).count()
    };
    present.sort_by_key(depth);
    // The container's root has to let through what the mount is to see or show.
    let has = |option: &str| added.iter().any(|mount| mount.options.iter().any(|present| present == option));
    let root = &mut whole["linux"]["rootfsPropagation"];
    if has("rshared") {
        *root = json!("rshared");
    } else if has("rslave") && *root != json!("rshared") {
        *root = json!("rslave");
    }
}

fn scheduling(asked: &LinuxScheduler) -> Result<Value, AdjustError> {
    let policy = LinuxSchedulerPolicy::try_from(asked.policy)
        .map_err(|_| AdjustError::Unknown { what: "scheduling policy", value: asked.policy })?;
    if policy == LinuxSchedulerPolicy::SchedNone {
        return Ok(Value::Null);
    }
    let flags = asked
        .flags
        .iter()
        .map(|flag| {
            LinuxSchedulerFlag::try_from(*flag)
                .map(|flag| flag.as_str_name())
                .map_err(|_| AdjustError::Unknown { what: "scheduling flag", value: *flag })
        })
        .collect::<Result<Vec<_>, _>>()?;
    let mut scheduler = json!({ "policy": policy.as_str_name() });
    let mut set = |name: &str, value: Value, is_set: bool| {
        if is_set {
            scheduler[name] = value;
        }
    };
    set("nice", json!(asked.nice), asked.nice != 0);
    set("priority", json!(asked.priority), asked.priority != 0);
    set("flags", json!(flags), !flags.is_empty());
    set("runtime", json!(asked.runtime), asked.runtime != 0);
    set("deadline", json!(asked.deadline), asked.deadline != 0);
    set("period", json!(asked.period), asked.period != 0);
    Ok(scheduler)
}

fn memory(asked: &LinuxMemoryPolicy) -> Result<Value, AdjustError> {
    let mode = MpolMode::try_from(asked.mode)
        .map_err(|_| AdjustError::Unknown { what: "mode of a memory policy", value: asked.mode })?;
    let flags = asked
        .flags
        .iter()
        .map(|flag| {
            MpolFlag::try_from(*flag)
                .map(|flag| flag.as_str_name())
                .map_err(|_| AdjustError::Unknown { what: "flag of a memory policy", value: *flag })
        })
        .collect::<Result<Vec<_>, _>>()?;
    let flags = (!flags.is_empty()).then_some(flags);
    Ok(json!({ "mode": mode.as_str_name(), "nodes": some(&asked.nodes), "flags": flags }))
}

/// The names are those of the OCI spec, on the wire too.
fn seccomp(asked: &LinuxSeccomp) -> Value {
    let syscalls: Vec<Value> = asked
        .syscalls
        .iter()
        .map(|call| {
            let args: Vec<Value> = call
                .args
                .iter()
                .map(|a| json!({ "index": a.index, "value": a.value, "valueTwo": a.value_two, "op": a.op }))
                .collect();
            json!({
                "names": call.names,
                "action": call.action,
                "errnoRet": call.errno_ret.map(|number| number.value),
                "args": (!args.is_empty()).then_some(args),
            })
        })
        .collect();
    let list = |entries: &[String]| (!entries.is_empty()).then(|| entries.to_vec());
    json!({
        "defaultAction": asked.default_action,
        "defaultErrnoRet": asked.default_errno.map(|number| number.value),
        "architectures": list(&asked.architectures),
        "flags": list(&asked.flags),
        "listenerPath": some(&asked.listener_path),
        "listenerMetadata": some(&asked.listener_metadata),
        "syscalls": syscalls,
    })
}

fn some(text: &str) -> Option<Value> {
    (!text.is_empty()).then(|| json!(text))
}

/// The list in `place`, made if there is none.
fn list(place: &mut Value) -> &mut Vec<Value> {
    if !place.is_array() {
        *place = Value::Array(Vec::new());
    }
    place.as_array_mut().expect("just made")
}

/// Takes out what is null: in OCI's JSON a field that is not set is not there.
fn prune(value: &mut Value) {
    match value {
        Value::Object(map) => {
            let kept = std::mem::take(map).into_iter().filter(|(_, value)| !value.is_null());
            *map = kept.collect::<Map<_, _>>();
            map.values_mut().for_each(prune);
        }
        Value::Array(entries) => entries.iter_mut().for_each(prune),
        _ => {}
    }
}

#[cfg(test)]
mod tests;
