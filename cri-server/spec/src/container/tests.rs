use proptest::prelude::*;

use super::*;
use crate::ErrorKind;
use crate::testing::{Case, strings};
use podvisor_proto::cri;

#[test]
fn frame() {
    let case = Case::with(|case| {
        case.security().masked_paths = strings(&["/proc/kcore"]);
        case.security().readonly_paths = strings(&["/proc/sys"]);
        case.seccomp = Some(crate::default_seccomp(&[]));
    });
    let spec = case.spec();
    let linux = spec.linux().as_ref().unwrap();
    assert_eq!(spec.version(), "1.0.2");
    assert_eq!(spec.root().as_ref().unwrap().path().to_str(), Some("/run/rootfs"));
    assert_eq!(spec.root().as_ref().unwrap().readonly(), Some(false));
    assert_eq!(linux.cgroups_path().as_deref().and_then(|path| path.to_str()), Some("/kubepods/pod/id"));
    assert_eq!(linux.masked_paths().as_ref().unwrap(), &["/proc/kcore"]);
    assert_eq!(linux.readonly_paths().as_ref().unwrap(), &["/proc/sys"]);
    assert_eq!(linux.seccomp(), &case.seccomp);
    assert_eq!(linux.sysctl(), &None);
}

#[test]
fn no_paths_asked_none_hidden() {
    let spec = Case::default().spec();
    let linux = spec.linux().as_ref().unwrap();
    assert_eq!(linux.masked_paths(), &Some(Vec::new()));
    assert_eq!(linux.readonly_paths(), &Some(Vec::new()));
}

#[test]
fn privileged() {
    let case = Case::with(|case| {
        case.privileged();
        case.security().masked_paths = strings(&["/proc/kcore"]);
        case.security().readonly_paths = strings(&["/proc/sys"]);
        case.seccomp = Some(crate::default_seccomp(&[]));
    });
    let spec = case.spec();
    let linux = spec.linux().as_ref().unwrap();
    assert_eq!(linux.masked_paths(), &Some(Vec::new()));
    assert_eq!(linux.readonly_paths(), &Some(Vec::new()));
    assert_eq!(linux.seccomp(), &None);
    assert_eq!(spec.process().as_ref().unwrap().apparmor_profile(), &None);
}

#[test]
fn annotations() {
    let spec = Case::with(|case| {
        case.annotations = [
            ("io.example".to_owned(), "kept".to_owned()),
            ("io.kubernetes.cri.sandbox-id".to_owned(), "forged".to_owned()),
        ]
        .into();
    })
    .spec();
    let annotations = spec.annotations().clone().unwrap();
    let cri = |key: &str| annotations[&format!("io.kubernetes.cri.{key}")].clone();
    assert_eq!(cri("container-type"), "container");
    assert_eq!(cri("sandbox-id"), "5".repeat(64));
    assert_eq!(cri("sandbox-name"), "pod");
    assert_eq!(cri("sandbox-namespace"), "default");
    assert_eq!(cri("sandbox-uid"), "uid-1");
    assert_eq!(cri("container-name"), "web");
    assert_eq!(cri("image-name"), "registry/app:1");
    assert_eq!(annotations["io.example"], "kept");
}

#[test]
fn refused() {
    let field = |name: &str| format!("config.linux.security_context.{name}");
    #[rustfmt::skip]
    let table = [
        (Case::with(|case| case.config.metadata = None), "config.metadata.name".to_owned()),
        (Case::with(|case| case.config.metadata.as_mut().unwrap().name.clear()), "config.metadata.name".to_owned()),
        (Case::with(|case| case.sandbox.metadata = None), "sandbox_config.metadata".to_owned()),
        (Case::with(|case| case.security().privileged = true), field("privileged")),
        (Case::with(|case| case.security().masked_paths = strings(&["/a", "b"])), field("masked_paths[1]")),
        (Case::with(|case| case.security().readonly_paths = strings(&[""])), field("readonly_paths[0]")),
    ];
    for (case, field) in table {
        assert_eq!(case.refused(), (ErrorKind::Invalid, field));
    }
}

/// Strings that are more often interesting than random ones.
fn text() -> impl Strategy<Value = String> {
    prop_oneof![
        Just(String::new()),
        "[a-z]{1,3}",
        "/[a-z./]{0,8}",
        "[A-Z=0-9]{1,4}",
        any::<String>(),
        Just("/dev".to_owned()),
        Just("app:video".to_owned()),
        Just("ALL".to_owned()),
        Just("localhost/".to_owned()),
    ]
}

fn number() -> impl Strategy<Value = i64> {
    prop_oneof![Just(0), Just(-1), Just(i64::MIN), Just(i64::MAX), -2000_i64..2000, any::<i64>()]
}

fn mode() -> impl Strategy<Value = i32> {
    prop_oneof![0..4, any::<i32>()]
}

fn texts() -> impl Strategy<Value = Vec<String>> {
    proptest::collection::vec(text(), 0..3)
}

prop_compose! {
    fn mount()(
        paths in (text(), text()),
        flags in any::<(bool, bool, bool)>(),
        propagation in mode(),
        ids in proptest::collection::vec(any::<(u32, u32, u32)>(), 0..2),
        options in texts(),
    ) -> cri::Mount {
        let map = |(host_id, container_id, length)| cri::IdMapping { host_id, container_id, length };
        cri::Mount {
            container_path: paths.0,
            host_path: paths.1,
            readonly: flags.0,
            recursive_read_only: flags.1,
            propagation,
            uid_mappings: ids.iter().copied().map(map).collect(),
            gid_mappings: ids.iter().copied().map(map).collect(),
            image: flags.2.then(cri::ImageSpec::default),
            mount_options: options,
            ..Default::default()
        }
    }
}

prop_compose! {
    fn security()(
        lists in (texts(), texts(), texts(), texts(), texts()),
        ids in (proptest::option::of(number()), proptest::option::of(number()), text()),
        groups in proptest::collection::vec(number(), 0..3),
        flags in any::<(bool, bool, bool)>(),
        modes in (mode(), mode(), mode(), mode(), mode()),
        profile in proptest::option::of((mode(), text())),
    ) -> cri::LinuxContainerSecurityContext {
        let int = |value| cri::Int64Value { value };
        let profile = profile.map(|(profile_type, localhost_ref)| cri::SecurityProfile { profile_type, localhost_ref });
        cri::LinuxContainerSecurityContext {
            capabilities: Some(cri::Capability {
                add_capabilities: lists.0,
                drop_capabilities: lists.1,
                add_ambient_capabilities: lists.2,
            }),
            masked_paths: lists.3,
            readonly_paths: lists.4,
            run_as_user: ids.0.map(int),
            run_as_group: ids.1.map(int),
            run_as_username: ids.2,
            supplemental_groups: groups,
            privileged: flags.0,
            readonly_rootfs: flags.1,
            no_new_privs: flags.2,
            namespace_options: Some(cri::NamespaceOption {
                network: modes.0,
                pid: modes.1,
                ipc: modes.2,
                target_id: String::new(),
                userns_options: None,
            }),
            supplemental_groups_policy: modes.3,
            seccomp: profile.clone(),
            apparmor: profile,
            ..Default::default()
        }
    }
}

prop_compose! {
    fn limits()(
        cpu in (number(), number(), number()),
        memory in (number(), number(), number()),
        sets in (text(), text()),
        huge in proptest::collection::vec((text(), any::<u64>()), 0..2),
        unified in proptest::collection::hash_map(text(), text(), 0..2),
    ) -> cri::LinuxContainerResources {
        cri::LinuxContainerResources {
            cpu_period: cpu.0,
            cpu_quota: cpu.1,
            cpu_shares: cpu.2,
            memory_limit_in_bytes: memory.0,
            memory_swap_limit_in_bytes: memory.1,
            oom_score_adj: memory.2,
            cpuset_cpus: sets.0,
            cpuset_mems: sets.1,
            hugepage_limits: huge.into_iter().map(|(page_size, limit)| cri::HugepageLimit { page_size, limit }).collect(),
            unified,
        }
    }
}

proptest! {
    #![proptest_config(ProptestConfig { failure_persistence: None, ..ProptestConfig::with_cases(2000) })]

    /// Each part on its own is arbitrary, so that later parts are reached, too.
    #[test]
    fn never_panics_and_always_names_a_field(
        security in proptest::option::of(security()),
        limits in proptest::option::of(limits()),
        mounts in proptest::collection::vec(mount(), 0..3),
        envs in proptest::collection::vec((text(), any::<Vec<u8>>()), 0..3),
        command in texts(),
        image in (text(), texts(), text()),
        sandbox_privileged in any::<bool>(),
        floor in proptest::option::of(-1000..1000),
    ) {
        let case = Case::with(|case| {
            case.config.linux = Some(cri::LinuxContainerConfig { resources: limits, security_context: security });
            case.config.mounts = mounts;
            case.config.command = command;
            case.config.envs = envs.into_iter().map(|(key, value)| cri::KeyValue { key, value }).collect();
            case.image.set_user(Some(image.0)).set_env(Some(image.1)).set_working_dir(Some(image.2));
            case.sandbox_security().privileged = sandbox_privileged;
            case.host.oom_score_adj_floor = floor;
        });
        match case.build() {
            Ok(spec) => {
                // What is accepted can be written, read again, executed in and reported.
                let json = serde_json::to_string(&spec).unwrap();
                prop_assert_eq!(&serde_json::from_str::<Spec>(&json).unwrap(), &spec);
                crate::exec(&spec, &strings(&["ls"]), true).unwrap();
                let resources = spec.linux().clone().unwrap().resources().clone().unwrap();
                crate::reported_resources(&resources, None);
                let oom = spec.process().as_ref().unwrap().oom_score_adj().unwrap();
                prop_assert!(oom >= floor.unwrap_or(-1000));
            }
            Err(error) => prop_assert!(!crate::testing::field_of(&error).is_empty()),
        }
        let _ = crate::seccomp_request(&case.config);
    }

    #[test]
    fn resources_never_panic(
        first in limits(),
        second in limits(),
    ) {
        let host = Case::default().host;
        if let Ok(current) = resources::of_container(Some(&first), &host, Some(1))
            && let Ok(merged) = crate::resources(&current, &second, &host) {
            crate::reported_resources(&merged, Some(0));
        }
    }
}
