//! Tables: an adjustment, and where in the spec's JSON form it is found.

use podvisor_proto::nri::{
    HugepageLimit, LinuxCpu, LinuxDeviceCgroup, LinuxIoPriority, LinuxMemory, LinuxPids, LinuxSyscall,
    OptionalBool, OptionalFileMode, OptionalInt, OptionalInt64, OptionalRepeatedString, OptionalString,
    OptionalUInt32, OptionalUInt64,
};

use super::*;
use crate::describe::describe;

const HOST: Host = Host { oom_score_adj_floor: Some(-500), swap: true };

fn spec() -> Spec {
    let json = json!({
        "ociVersion": "1.0.2",
        "root": { "path": "rootfs" },
        "process": {
            "args": ["sh"], "cwd": "/", "env": ["PATH=/bin", "A=1", "B=2"],
            "user": { "uid": 7, "gid": 8, "additionalGids": [9] },
            "rlimits": [{ "type": "RLIMIT_CORE", "hard": 1, "soft": 1 }],
            "oomScoreAdj": 3
        },
        "annotations": { "one": "1", "two": "2" },
        "mounts": [
            { "destination": "/proc", "type": "proc", "source": "proc", "options": [] },
            { "destination": "/data", "type": "bind", "source": "/old", "options": ["rbind"] }
        ],
        "linux": {
            "namespaces": [{ "type": "pid" }, { "type": "network", "path": "/run/netns/x" }],
            "resources": {
                "devices": [{ "allow": false, "access": "rwm" }],
                "memory": { "limit": 1000 },
                "pids": { "limit": 5 }
            },
            "devices": [{ "path": "/dev/old", "type": "c", "major": 1, "minor": 2 }],
            "cgroupsPath": "/kubepods/x",
            "sysctl": { "kernel.msgmax": "1" }
        }
    });
    serde_json::from_value(json).unwrap()
}

fn linux(linux: LinuxContainerAdjustment) -> ContainerAdjustment {
    ContainerAdjustment { linux: Some(linux), ..ContainerAdjustment::default() }
}

fn with(resources: LinuxResources) -> ContainerAdjustment {
    linux(LinuxContainerAdjustment { resources: Some(resources), ..Default::default() })
}

fn device(path: &str) -> LinuxDevice {
    LinuxDevice { path: path.into(), r#type: "c".into(), major: 1, minor: 3, ..Default::default() }
}

fn mount(destination: &str, options: &[&str]) -> Mount {
    Mount {
        destination: destination.into(),
        r#type: "bind".into(),
        source: "/src".into(),
        options: options.iter().map(ToString::to_string).collect(),
    }
}

fn variable(key: &str, value: &str) -> KeyValue {
    KeyValue { key: key.into(), value: value.into() }
}

/// Adjustment, JSON pointer, what is there afterwards.
fn table() -> Vec<(ContainerAdjustment, &'static str, Value)> {
    let int = |value| Some(OptionalInt64 { value });
    let uint = |value| Some(OptionalUInt64 { value });
    vec![
        (
            ContainerAdjustment {
                env: vec![variable("-A", ""), variable("B", "3"), variable("-C", ""), variable("C", "4")],
                ..Default::default()
            },
            "/process/env",
            json!(["PATH=/bin", "B=3", "C=4"]),
        ),
        (
            ContainerAdjustment { args: vec!["sleep".into(), "1".into()], ..Default::default() },
            "/process/args",
            json!(["sleep", "1"]),
        ),
        (
            ContainerAdjustment {
                annotations: [
                    ("-one".into(), String::new()),
                    ("two".into(), "3".into()),
                    ("x".into(), "y".into()),
                ]
                .into(),
                ..Default::default()
            },
            "/annotations",
            json!({ "two": "3", "x": "y" }),
        ),
        (
            ContainerAdjustment {
                mounts: vec![mount("/data/deep", &[]), mount("-/proc", &[]), mount("/data", &["ro"])],
                ..Default::default()
            },
            "/mounts",
            json!([
                { "destination": "/data", "type": "bind", "source": "/src", "options": ["ro"] },
                { "destination": "/data/deep", "type": "bind", "source": "/src", "options": [] }
            ]),
        ),
        (
            ContainerAdjustment { mounts: vec![mount("/x", &["rbind", "rslave"])], ..Default::default() },
            "/linux/rootfsPropagation",
            json!("rslave"),
        ),
        (
            ContainerAdjustment {
                hooks: Some(Hooks {
                    create_runtime: vec![Hook {
                        path: "/hook".into(),
                        args: vec!["hook".into()],
                        timeout: Some(OptionalInt { value: 3 }),
                        ..Default::default()
                    }],
                    ..Default::default()
                }),
                ..Default::default()
            },
            "/hooks/createRuntime/0",
            json!({ "path": "/hook", "args": ["hook"], "timeout": 3 }),
        ),
        (
            ContainerAdjustment {
                rlimits: vec![
                    PosixRlimit { r#type: "RLIMIT_CORE".into(), hard: 9, soft: 8 },
                    PosixRlimit { r#type: "RLIMIT_NOFILE".into(), hard: 2, soft: 1 },
                ],
                ..Default::default()
            },
            "/process/rlimits",
            json!([
                { "type": "RLIMIT_CORE", "hard": 9, "soft": 8 },
                { "type": "RLIMIT_NOFILE", "hard": 2, "soft": 1 }
            ]),
        ),
        (
            linux(LinuxContainerAdjustment {
                devices: vec![
                    device("-/dev/old"),
                    LinuxDevice { file_mode: Some(OptionalFileMode { value: 0o600 }), ..device("/dev/new") },
                ],
                ..Default::default()
            }),
            "/linux/devices",
            json!([{ "path": "/dev/new", "type": "c", "major": 1, "minor": 3, "fileMode": 0o600 }]),
        ),
        (
            linux(LinuxContainerAdjustment { devices: vec![device("/dev/new")], ..Default::default() }),
            "/linux/resources/devices/1",
            json!({ "allow": true, "type": "c", "major": 1, "minor": 3, "access": "rw" }),
        ),
        (
            linux(LinuxContainerAdjustment { cgroups_path: "/other/x".into(), ..Default::default() }),
            "/linux/cgroupsPath",
            json!("/other/x"),
        ),
        (
            linux(LinuxContainerAdjustment {
                oom_score_adj: Some(OptionalInt { value: -900 }),
                ..Default::default()
            }),
            "/process/oomScoreAdj",
            json!(-500),
        ),
        (
            linux(LinuxContainerAdjustment {
                io_priority: Some(LinuxIoPriority {
                    class: IoPrioClass::IoprioClassIdle.into(),
                    priority: 2,
                }),
                ..Default::default()
            }),
            "/process/ioPriority",
            json!({ "class": "IOPRIO_CLASS_IDLE", "priority": 2 }),
        ),
        (
            linux(LinuxContainerAdjustment {
                scheduler: Some(LinuxScheduler {
                    policy: LinuxSchedulerPolicy::SchedBatch.into(),
                    nice: 5,
                    flags: vec![LinuxSchedulerFlag::SchedFlagResetOnFork.into()],
                    ..Default::default()
                }),
                ..Default::default()
            }),
            "/process/scheduler",
            json!({ "policy": "SCHED_BATCH", "nice": 5, "flags": ["SCHED_FLAG_RESET_ON_FORK"] }),
        ),
        (
            linux(LinuxContainerAdjustment {
                seccomp_policy: Some(LinuxSeccomp {
                    default_action: "SCMP_ACT_ALLOW".into(),
                    syscalls: vec![LinuxSyscall {
                        names: vec!["mkdir".into()],
                        action: "SCMP_ACT_ERRNO".into(),
                        errno_ret: Some(OptionalUInt32 { value: 13 }),
                        args: vec![],
                    }],
                    ..Default::default()
                }),
                ..Default::default()
            }),
            "/linux/seccomp",
            json!({
                "defaultAction": "SCMP_ACT_ALLOW",
                "syscalls": [{ "names": ["mkdir"], "action": "SCMP_ACT_ERRNO", "errnoRet": 13 }]
            }),
        ),
        (
            linux(LinuxContainerAdjustment {
                namespaces: vec![
                    LinuxNamespace { r#type: "-pid".into(), path: String::new() },
                    LinuxNamespace { r#type: "network".into(), path: "/run/netns/y".into() },
                    LinuxNamespace { r#type: "cgroup".into(), path: String::new() },
                ],
                ..Default::default()
            }),
            "/linux/namespaces",
            json!([{ "type": "network", "path": "/run/netns/y" }, { "type": "cgroup" }]),
        ),
        (
            linux(LinuxContainerAdjustment {
                sysctl: [("-kernel.msgmax".into(), String::new()), ("net.x".into(), "2".into())].into(),
                ..Default::default()
            }),
            "/linux/sysctl",
            json!({ "net.x": "2" }),
        ),
        (
            linux(LinuxContainerAdjustment {
                net_devices: [("eth9".into(), LinuxNetDevice { name: "in0".into() })].into(),
                ..Default::default()
            }),
            "/linux/netDevices",
            json!({ "eth9": { "name": "in0" } }),
        ),
        (
            linux(LinuxContainerAdjustment {
                rdt: Some(LinuxRdt {
                    clos_id: Some(OptionalString { value: "gold".into() }),
                    schemata: Some(OptionalRepeatedString { value: vec!["L3:0=f".into()] }),
                    enable_monitoring: Some(OptionalBool { value: true }),
                    remove: true,
                }),
                ..Default::default()
            }),
            "/linux/intelRdt",
            json!({ "closID": "gold", "schemata": ["L3:0=f"], "enableMonitoring": true }),
        ),
        (
            linux(LinuxContainerAdjustment {
                memory_policy: Some(LinuxMemoryPolicy {
                    mode: MpolMode::MpolBind.into(),
                    nodes: "0".into(),
                    flags: vec![MpolFlag::MpolFStaticNodes.into()],
                }),
                ..Default::default()
            }),
            "/linux/memoryPolicy",
            json!({ "mode": "MPOL_BIND", "nodes": "0", "flags": ["MPOL_F_STATIC_NODES"] }),
        ),
        (
            with(LinuxResources {
                memory: Some(LinuxMemory { limit: int(5000), reservation: int(4000), ..Default::default() }),
                ..Default::default()
            }),
            "/linux/resources/memory",
            json!({ "limit": 5000, "reservation": 4000, "swap": 5000 }),
        ),
        (
            with(LinuxResources {
                cpu: Some(LinuxCpu {
                    shares: uint(9),
                    quota: int(-1),
                    cpus: "0-1".into(),
                    ..Default::default()
                }),
                ..Default::default()
            }),
            "/linux/resources/cpu",
            json!({ "shares": 9, "quota": -1, "cpus": "0-1" }),
        ),
        (
            with(LinuxResources { pids: Some(LinuxPids { limit: -1 }), ..Default::default() }),
            "/linux/resources/pids",
            json!({ "limit": -1 }),
        ),
        (
            with(LinuxResources {
                hugepage_limits: vec![HugepageLimit { page_size: "2MB".into(), limit: 1 }],
                ..Default::default()
            }),
            "/linux/resources/hugepageLimits",
            json!([{ "pageSize": "2MB", "limit": 1 }]),
        ),
        (
            with(LinuxResources {
                unified: [("memory.high".into(), "1".into())].into(),
                ..Default::default()
            }),
            "/linux/resources/unified",
            json!({ "memory.high": "1" }),
        ),
        (
            with(LinuxResources {
                devices: vec![LinuxDeviceCgroup {
                    allow: true,
                    r#type: "c".into(),
                    major: int(10),
                    access: "r".into(),
                    ..Default::default()
                }],
                ..Default::default()
            }),
            "/linux/resources/devices/1",
            json!({ "allow": true, "type": "c", "major": 10, "access": "r" }),
        ),
        (
            with(LinuxResources {
                rdt_class: Some(OptionalString { value: "gold".into() }),
                ..Default::default()
            }),
            "/linux/intelRdt",
            json!({ "closID": "gold" }),
        ),
    ]
}

#[test]
fn each_field_arrives_in_the_spec() {
    for (adjustment, place, wanted) in table() {
        let adjusted = adjust(&spec(), &adjustment, HOST).unwrap_or_else(|error| panic!("{place}: {error}"));
        let found = adjusted.pointer(place).unwrap_or_else(|| panic!("{place} is missing in {adjusted:#}"));
        assert_eq!(*found, wanted, "{place}");
    }
}

#[test]
fn nothing_asked_changes_nothing() {
    let adjusted = adjust(&spec(), &linux(LinuxContainerAdjustment::default()), HOST).unwrap();
    assert_eq!(serde_json::from_value::<Spec>(adjusted).unwrap(), spec());
}

#[test]
fn what_makes_no_spec_is_refused() {
    let wrong: [(&str, ContainerAdjustment); 5] = [
        (
            "namespace",
            linux(LinuxContainerAdjustment {
                namespaces: vec![LinuxNamespace { r#type: "nonsense".into(), path: String::new() }],
                ..Default::default()
            }),
        ),
        (
            "rlimit",
            ContainerAdjustment {
                rlimits: vec![PosixRlimit { r#type: "RLIMIT_NONSENSE".into(), hard: 1, soft: 1 }],
                ..Default::default()
            },
        ),
        (
            "seccomp",
            linux(LinuxContainerAdjustment {
                seccomp_policy: Some(LinuxSeccomp {
                    default_action: "NONSENSE".into(),
                    ..Default::default()
                }),
                ..Default::default()
            }),
        ),
        (
            "I/O priority",
            linux(LinuxContainerAdjustment {
                io_priority: Some(LinuxIoPriority { class: 99, priority: 0 }),
                ..Default::default()
            }),
        ),
        (
            "block I/O",
            with(LinuxResources {
                blockio_class: Some(OptionalString { value: "fast".into() }),
                ..Default::default()
            }),
        ),
    ];
    for (what, adjustment) in wrong {
        adjust(&spec(), &adjustment, HOST).expect_err(what);
    }
}

/// What a plugin is shown after an adjustment is what it asked for.
#[test]
fn what_is_adjusted_is_described() {
    let asked = LinuxContainerAdjustment {
        devices: vec![device("/dev/new")],
        io_priority: Some(LinuxIoPriority { class: IoPrioClass::IoprioClassBe.into(), priority: 4 }),
        oom_score_adj: Some(OptionalInt { value: 7 }),
        cgroups_path: "/a/b".into(),
        sysctl: [("a.b".into(), "1".into())].into(),
        net_devices: [("eth9".into(), LinuxNetDevice { name: "x".into() })].into(),
        scheduler: Some(LinuxScheduler {
            policy: LinuxSchedulerPolicy::SchedIdle.into(),
            ..Default::default()
        }),
        resources: Some(LinuxResources {
            memory: Some(LinuxMemory { limit: Some(OptionalInt64 { value: 77 }), ..Default::default() }),
            pids: Some(LinuxPids { limit: 4 }),
            ..Default::default()
        }),
        ..Default::default()
    };
    let adjusted = adjust(&spec(), &linux(asked.clone()), HOST).unwrap();
    let seen = describe(&adjusted);
    assert_eq!(seen.args, ["sh"]);
    assert_eq!(seen.user.unwrap().additional_gids, [9]);
    let seen = seen.linux.unwrap();
    assert!(seen.devices.contains(&device("/dev/new")));
    assert_eq!(seen.io_priority, asked.io_priority);
    assert_eq!(seen.oom_score_adj, asked.oom_score_adj);
    assert_eq!(seen.cgroups_path, asked.cgroups_path);
    assert_eq!(seen.net_devices, asked.net_devices);
    assert_eq!(seen.scheduler, asked.scheduler);
    let resources = seen.resources.unwrap();
    assert_eq!(resources.memory.unwrap().limit.unwrap().value, 77);
    assert_eq!(resources.pids.unwrap().limit, 4);
}
