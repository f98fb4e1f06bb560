//! An OCI spec as plugins see it. Pure, and forgiving: what is missing is left out.

use std::collections::BTreeMap;

use podvisor_proto::nri::{
    Container, Hook, Hooks, HugepageLimit, IoPrioClass, LinuxContainer, LinuxCpu, LinuxDevice,
    LinuxDeviceCgroup, LinuxIoPriority, LinuxMemory, LinuxNamespace, LinuxNetDevice, LinuxPids, LinuxRdt,
    LinuxResources, LinuxScheduler, LinuxSchedulerFlag, LinuxSchedulerPolicy, LinuxSeccomp, LinuxSeccompArg,
    LinuxSyscall, Mount, OptionalBool, OptionalFileMode, OptionalInt, OptionalInt64, OptionalRepeatedString,
    OptionalString, OptionalUInt32, OptionalUInt64, PosixRlimit, User,
};
use serde_json::Value;

/// What `config.json` says of a container; its names, state and times are the caller's.
pub fn describe(spec: &Value) -> Container {
    let (process, linux) = (&spec["process"], &spec["linux"]);
    Container {
        annotations: map(&spec["annotations"]),
        args: texts(&process["args"]),
        env: texts(&process["env"]),
        mounts: each(&spec["mounts"], |mount| Mount {
            destination: text(&mount["destination"]),
            r#type: text(&mount["type"]),
            source: text(&mount["source"]),
            options: texts(&mount["options"]),
        }),
        hooks: spec["hooks"].is_object().then(|| hooks(&spec["hooks"])),
        rlimits: each(&process["rlimits"], |limit| PosixRlimit {
            r#type: text(&limit["type"]),
            hard: limit["hard"].as_u64().unwrap_or_default(),
            soft: limit["soft"].as_u64().unwrap_or_default(),
        }),
        user: process["user"].is_object().then(|| User {
            uid: u32_of(&process["user"]["uid"]).unwrap_or_default(),
            gid: u32_of(&process["user"]["gid"]).unwrap_or_default(),
            additional_gids: each(&process["user"]["additionalGids"], |gid| u32_of(gid).unwrap_or_default()),
        }),
        linux: Some(LinuxContainer {
            namespaces: each(&linux["namespaces"], |namespace| LinuxNamespace {
                r#type: text(&namespace["type"]),
                path: text(&namespace["path"]),
            }),
            devices: each(&linux["devices"], |device| LinuxDevice {
                path: text(&device["path"]),
                r#type: text(&device["type"]),
                major: device["major"].as_i64().unwrap_or_default(),
                minor: device["minor"].as_i64().unwrap_or_default(),
                file_mode: u32_of(&device["fileMode"]).map(|value| OptionalFileMode { value }),
                uid: u32_of(&device["uid"]).map(|value| OptionalUInt32 { value }),
                gid: u32_of(&device["gid"]).map(|value| OptionalUInt32 { value }),
            }),
            resources: Some(describe_resources(&linux["resources"])),
            oom_score_adj: process["oomScoreAdj"].as_i64().map(|value| OptionalInt { value }),
            cgroups_path: text(&linux["cgroupsPath"]),
            io_priority: process["ioPriority"].is_object().then(|| LinuxIoPriority {
                class: IoPrioClass::from_str_name(&text(&process["ioPriority"]["class"]))
                    .unwrap_or_default()
                    .into(),
                priority: i32_of(&process["ioPriority"]["priority"]),
            }),
            seccomp_policy: linux["seccomp"].is_object().then(|| seccomp(&linux["seccomp"])),
            sysctl: map(&linux["sysctl"]),
            net_devices: linux["netDevices"]
                .as_object()
                .into_iter()
                .flatten()
                .map(|(host, device)| (host.clone(), LinuxNetDevice { name: text(&device["name"]) }))
                .collect(),
            scheduler: process["scheduler"].is_object().then(|| scheduler(&process["scheduler"])),
            rdt: linux["intelRdt"].is_object().then(|| LinuxRdt {
                clos_id: some_text(&linux["intelRdt"]["closID"]),
                schemata: linux["intelRdt"]["schemata"]
                    .is_array()
                    .then(|| OptionalRepeatedString { value: texts(&linux["intelRdt"]["schemata"]) }),
                enable_monitoring: boolean(&linux["intelRdt"]["enableMonitoring"]),
                remove: false,
            }),
            ..LinuxContainer::default()
        }),
        ..Container::default()
    }
}

/// OCI `LinuxResources` in JSON.
pub fn describe_resources(resources: &Value) -> LinuxResources {
    let (memory, cpu) = (&resources["memory"], &resources["cpu"]);
    LinuxResources {
        memory: Some(LinuxMemory {
            limit: signed(&memory["limit"]),
            reservation: signed(&memory["reservation"]),
            swap: signed(&memory["swap"]),
            kernel: signed(&memory["kernel"]),
            kernel_tcp: signed(&memory["kernelTCP"]),
            swappiness: unsigned(&memory["swappiness"]),
            disable_oom_killer: boolean(&memory["disableOOMKiller"]),
            use_hierarchy: boolean(&memory["useHierarchy"]),
        }),
        cpu: Some(LinuxCpu {
            shares: unsigned(&cpu["shares"]),
            quota: signed(&cpu["quota"]),
            period: unsigned(&cpu["period"]),
            realtime_runtime: signed(&cpu["realtimeRuntime"]),
            realtime_period: unsigned(&cpu["realtimePeriod"]),
            cpus: text(&cpu["cpus"]),
            mems: text(&cpu["mems"]),
        }),
        hugepage_limits: each(&resources["hugepageLimits"], |limit| HugepageLimit {
            page_size: text(&limit["pageSize"]),
            limit: limit["limit"].as_u64().unwrap_or_default(),
        }),
        unified: map(&resources["unified"]),
        devices: each(&resources["devices"], |rule| LinuxDeviceCgroup {
            allow: rule["allow"].as_bool().unwrap_or_default(),
            r#type: text(&rule["type"]),
            major: signed(&rule["major"]),
            minor: signed(&rule["minor"]),
            access: text(&rule["access"]),
        }),
        pids: resources["pids"]["limit"].as_i64().map(|limit| LinuxPids { limit }),
        blockio_class: None,
        rdt_class: None,
    }
}

fn hooks(hooks: &Value) -> Hooks {
    let of = |name: &str| {
        each(&hooks[name], |hook| Hook {
            path: text(&hook["path"]),
            args: texts(&hook["args"]),
            env: texts(&hook["env"]),
            timeout: hook["timeout"].as_i64().map(|value| OptionalInt { value }),
        })
    };
    Hooks {
        prestart: of("prestart"),
        create_runtime: of("createRuntime"),
        create_container: of("createContainer"),
        start_container: of("startContainer"),
        poststart: of("poststart"),
        poststop: of("poststop"),
    }
}

fn scheduler(scheduler: &Value) -> LinuxScheduler {
    let flag = |flag: &Value| LinuxSchedulerFlag::from_str_name(&text(flag)).unwrap_or_default().into();
    LinuxScheduler {
        policy: LinuxSchedulerPolicy::from_str_name(&text(&scheduler["policy"])).unwrap_or_default().into(),
        nice: i32_of(&scheduler["nice"]),
        priority: i32_of(&scheduler["priority"]),
        flags: each(&scheduler["flags"], flag),
        runtime: scheduler["runtime"].as_u64().unwrap_or_default(),
        deadline: scheduler["deadline"].as_u64().unwrap_or_default(),
        period: scheduler["period"].as_u64().unwrap_or_default(),
    }
}

fn seccomp(profile: &Value) -> LinuxSeccomp {
    LinuxSeccomp {
        default_action: text(&profile["defaultAction"]),
        default_errno: u32_of(&profile["defaultErrnoRet"]).map(|value| OptionalUInt32 { value }),
        architectures: texts(&profile["architectures"]),
        flags: texts(&profile["flags"]),
        listener_path: text(&profile["listenerPath"]),
        listener_metadata: text(&profile["listenerMetadata"]),
        syscalls: each(&profile["syscalls"], |call| LinuxSyscall {
            names: texts(&call["names"]),
            action: text(&call["action"]),
            errno_ret: u32_of(&call["errnoRet"]).map(|value| OptionalUInt32 { value }),
            args: each(&call["args"], |arg| LinuxSeccompArg {
                index: u32_of(&arg["index"]).unwrap_or_default(),
                value: arg["value"].as_u64().unwrap_or_default(),
                value_two: arg["valueTwo"].as_u64().unwrap_or_default(),
                op: text(&arg["op"]),
            }),
        }),
    }
}

fn text(value: &Value) -> String {
    value.as_str().unwrap_or_default().to_owned()
}

fn some_text(value: &Value) -> Option<OptionalString> {
    value.as_str().map(|value| OptionalString { value: value.to_owned() })
}

fn texts(value: &Value) -> Vec<String> {
    each(value, text)
}

fn each<T>(value: &Value, of: impl Fn(&Value) -> T) -> Vec<T> {
    value.as_array().into_iter().flatten().map(of).collect()
}

fn map(value: &Value) -> BTreeMap<String, String> {
    value.as_object().into_iter().flatten().map(|(key, value)| (key.clone(), text(value))).collect()
}

fn signed(value: &Value) -> Option<OptionalInt64> {
    value.as_i64().map(|value| OptionalInt64 { value })
}

fn unsigned(value: &Value) -> Option<OptionalUInt64> {
    value.as_u64().map(|value| OptionalUInt64 { value })
}

fn boolean(value: &Value) -> Option<OptionalBool> {
    value.as_bool().map(|value| OptionalBool { value })
}

fn u32_of(value: &Value) -> Option<u32> {
    value.as_u64().and_then(|value| value.try_into().ok())
}

fn i32_of(value: &Value) -> i32 {
    value.as_i64().and_then(|value| value.try_into().ok()).unwrap_or_default()
}
