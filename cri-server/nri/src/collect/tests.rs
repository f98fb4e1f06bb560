//! Tables: what each of two plugins asks for, and what comes of it.

use podvisor_proto::nri::{
    CdiDevice, Hook, LinuxContainerUpdate, LinuxCpu, LinuxDevice, LinuxMemory, LinuxNetDevice, LinuxPids,
    LinuxRdt, OptionalBool, OptionalInt, OptionalInt64, OptionalString, OptionalUInt64, PosixRlimit,
};

use podvisor_proto::nri::Mount;

use super::*;

fn container() -> Container {
    Container {
        id: "new".into(),
        annotations: [("kept".to_owned(), "1".to_owned()), ("gone".to_owned(), "1".to_owned())].into(),
        args: vec!["sh".into()],
        env: vec!["A=1".into(), "B=2".into()],
        mounts: vec![mount("/data", "/old")],
        ..Container::default()
    }
}

fn mount(destination: &str, source: &str) -> Mount {
    Mount { destination: destination.into(), source: source.into(), ..Mount::default() }
}

fn variable(key: &str, value: &str) -> KeyValue {
    KeyValue { key: key.into(), value: value.into() }
}

fn linux(linux: LinuxContainerAdjustment) -> ContainerAdjustment {
    ContainerAdjustment { linux: Some(linux), ..ContainerAdjustment::default() }
}

fn with(resources: LinuxResources) -> ContainerAdjustment {
    linux(LinuxContainerAdjustment { resources: Some(resources), ..Default::default() })
}

fn limit(bytes: i64) -> LinuxResources {
    let limit = Some(OptionalInt64 { value: bytes });
    LinuxResources { memory: Some(LinuxMemory { limit, ..Default::default() }), ..Default::default() }
}

fn both(
    first: ContainerAdjustment,
    second: ContainerAdjustment,
) -> Result<(ContainerAdjustment, Container), Conflict> {
    let mut creation = Creation::of(container());
    creation.adjust("first", first)?;
    creation.adjust("second", second)?;
    Ok((creation.adjustment, creation.container))
}

#[test]
fn what_two_plugins_set_is_an_error() {
    let env = |value: &str| ContainerAdjustment { env: vec![variable("X", value)], ..Default::default() };
    let device = |path: &str| LinuxDevice { path: path.into(), ..Default::default() };
    let conflicts: [(ContainerAdjustment, &str); 13] = [
        (env("1"), "Env \"X\""),
        (ContainerAdjustment { args: vec!["x".into()], ..Default::default() }, "Args"),
        (ContainerAdjustment { mounts: vec![mount("/m", "/s")], ..Default::default() }, "Mounts \"/m\""),
        (
            ContainerAdjustment { annotations: [("k".into(), "v".into())].into(), ..Default::default() },
            "Annotations \"k\"",
        ),
        (
            ContainerAdjustment {
                rlimits: vec![PosixRlimit { r#type: "RLIMIT_CORE".into(), hard: 1, soft: 1 }],
                ..Default::default()
            },
            "Rlimits \"RLIMIT_CORE\"",
        ),
        (
            ContainerAdjustment {
                cdi_devices: vec![CdiDevice { name: "v.com/c=d".into() }],
                ..Default::default()
            },
            "CdiDevices \"v.com/c=d\"",
        ),
        (
            linux(LinuxContainerAdjustment { devices: vec![device("/dev/x")], ..Default::default() }),
            "Devices \"/dev/x\"",
        ),
        (
            linux(LinuxContainerAdjustment {
                oom_score_adj: Some(OptionalInt { value: 5 }),
                ..Default::default()
            }),
            "OomScoreAdj",
        ),
        (linux(LinuxContainerAdjustment { cgroups_path: "/x".into(), ..Default::default() }), "CgroupsPath"),
        (
            linux(LinuxContainerAdjustment {
                net_devices: [("eth9".into(), LinuxNetDevice { name: "n".into() })].into(),
                ..Default::default()
            }),
            "LinuxNetDevices \"eth9\"",
        ),
        (with(limit(1)), "MemLimit"),
        (with(LinuxResources { pids: Some(LinuxPids { limit: 9 }), ..Default::default() }), "PidsLimit"),
        (
            with(LinuxResources {
                cpu: Some(LinuxCpu { cpus: "0".into(), ..Default::default() }),
                ..Default::default()
            }),
            "CPUSetCPUs",
        ),
    ];
    for (adjustment, what) in conflicts {
        both(adjustment.clone(), ContainerAdjustment::default()).expect(what);
        let conflict = both(adjustment.clone(), adjustment).expect_err(what);
        assert_eq!((conflict.plugin.as_str(), conflict.other.as_str()), ("second", "first"));
        assert_eq!(conflict.what, what);
    }
}

#[test]
fn the_next_plugin_sees_what_the_last_has_left() {
    let first = ContainerAdjustment {
        env: vec![variable("-A", ""), variable("B", "3"), variable("C", "4")],
        annotations: [("-gone".into(), String::new()), ("new".into(), "2".into())].into(),
        mounts: vec![mount("/data", "/other"), mount("/more", "/src")],
        args: vec!["sleep".into()],
        hooks: Some(Hooks {
            poststop: vec![Hook { path: "/h".into(), ..Default::default() }],
            ..Default::default()
        }),
        ..Default::default()
    };
    let (adjustment, seen) = both(first, ContainerAdjustment::default()).unwrap();
    assert_eq!(seen.env, ["B=3", "C=4"]);
    assert_eq!(seen.args, ["sleep"]);
    assert_eq!(seen.annotations.keys().collect::<Vec<_>>(), ["kept", "new"]);
    assert_eq!(seen.mounts, [mount("/data", "/other"), mount("/more", "/src")]);
    assert_eq!(seen.hooks.unwrap().poststop.len(), 1);
    assert_eq!(adjustment.env, [variable("-A", ""), variable("B", "3"), variable("C", "4")]);
    assert_eq!(adjustment.annotations.keys().collect::<Vec<_>>(), ["-gone", "new"]);
}

#[test]
fn who_removes_first_may_replace() {
    let set = |marks: &[&str], value: &str| ContainerAdjustment {
        env: marks.iter().map(|key| variable(key, value)).collect(),
        mounts: marks.iter().map(|key| mount(&key.replace('X', "/x"), value)).collect(),
        annotations: marks.iter().map(|key| ((*key).to_owned(), value.to_owned())).collect(),
        args: if marks.len() > 1 { vec![String::new(), value.into()] } else { vec![value.into()] },
        ..Default::default()
    };
    let (adjustment, seen) = both(set(&["X"], "1"), set(&["-X", "X"], "2")).unwrap();
    assert_eq!(seen.env, ["A=1", "B=2", "X=2"]);
    assert_eq!(adjustment.env, [variable("-X", "2"), variable("X", "2")]);
    assert_eq!(adjustment.args, ["2"]);
    assert_eq!(adjustment.annotations["X"], "2");
    assert_eq!(adjustment.mounts.last(), Some(&mount("/x", "2")));

    // Taken away for good.
    let only_removed = ContainerAdjustment { env: vec![variable("-X", "")], ..Default::default() };
    let (adjustment, seen) = both(set(&["X"], "1"), only_removed).unwrap();
    assert_eq!(adjustment.env, [variable("-X", "")]);
    assert_eq!(seen.env, ["A=1", "B=2"]);
}

#[test]
fn rdt_is_replaced_after_a_removal() {
    let class = |name: &str, remove| {
        linux(LinuxContainerAdjustment {
            rdt: Some(LinuxRdt {
                clos_id: Some(OptionalString { value: name.into() }),
                enable_monitoring: Some(OptionalBool { value: true }),
                remove,
                ..Default::default()
            }),
            ..Default::default()
        })
    };
    both(class("a", false), class("b", false)).unwrap_err();
    let (adjustment, _) = both(class("a", false), class("b", true)).unwrap();
    let rdt = adjustment.linux.unwrap().rdt.unwrap();
    assert!(rdt.remove);
    assert_eq!(rdt.clos_id.unwrap().value, "b");
}

fn update(id: &str, resources: LinuxResources, ignore_failure: bool) -> ContainerUpdate {
    let linux = Some(LinuxContainerUpdate { resources: Some(resources) });
    ContainerUpdate { container_id: id.into(), linux, ignore_failure }
}

#[test]
fn updates_of_several_plugins_add_up() {
    let shares = LinuxResources {
        cpu: Some(LinuxCpu { shares: Some(OptionalUInt64 { value: 7 }), ..Default::default() }),
        ..Default::default()
    };
    let mut changes = Changes::default();
    changes.add("a", vec![update("x", limit(1), true), update("y", limit(2), false)], vec![]).unwrap();
    changes.add("b", vec![update("x", shares, false)], vec![]).unwrap();
    // May fail, and does: nothing of it stays.
    changes.add("b", vec![update("x", limit(9), true)], vec![]).unwrap();
    let x = changes.updates["x"].clone();
    assert!(!x.ignore_failure, "one of them must not fail");
    let resources = x.linux.unwrap().resources.unwrap();
    assert_eq!(resources.memory.unwrap().limit.unwrap().value, 1);
    assert_eq!(resources.cpu.unwrap().shares.unwrap().value, 7);
    assert!(matches!(
        changes.add("b", vec![update("y", limit(3), false)], vec![]),
        Err(CollectError::Conflict(_))
    ));
    assert_eq!(changes.take("y"), Some(limit(2)));
    assert_eq!(changes.take("y"), None);
}

#[test]
fn what_is_being_created_is_adjusted_not_updated() {
    let mut creation = Creation::of(container());
    let error = creation.changes.add("a", vec![update("new", limit(1), true)], vec![]).unwrap_err();
    assert_eq!(error, CollectError::UpdateOfNew { plugin: "a".into() });
}
