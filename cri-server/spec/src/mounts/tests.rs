use super::*;
use crate::ErrorKind;
use crate::testing::{Case, strings};

fn volume(container: &str) -> cri::Mount {
    cri::Mount { container_path: container.to_owned(), host_path: "/host".to_owned(), ..Default::default() }
}

fn image(container: &str) -> cri::Mount {
    let image = Some(cri::ImageSpec { image: "sha256:00".into(), ..Default::default() });
    cri::Mount { container_path: container.to_owned(), readonly: true, image, ..Default::default() }
}

fn with(volumes: Vec<cri::Mount>) -> Case {
    Case::with(|case| case.config.mounts = volumes)
}

fn destinations(case: &Case) -> Vec<String> {
    case.mounts().iter().map(|mount| mount.destination().display().to_string()).collect()
}

fn options(case: &Case, destination: &str) -> String {
    let mounts = case.mounts();
    let mount = mounts.iter().find(|mount| mount.destination() == Path::new(destination)).unwrap();
    mount.options().clone().unwrap().join(",")
}

const DEFAULTS: [&str; 10] = [
    "/proc",
    "/dev",
    "/dev/pts",
    "/dev/mqueue",
    "/sys",
    "/sys/fs/cgroup",
    "/etc/hostname",
    "/etc/hosts",
    "/etc/resolv.conf",
    "/dev/shm",
];

#[test]
fn defaults() {
    assert_eq!(destinations(&Case::default()), DEFAULTS);
    assert_eq!(options(&Case::default(), "/sys"), "nosuid,noexec,nodev,ro");
    assert_eq!(options(&Case::default(), "/etc/hosts"), "rbind,rprivate,rw");
    let privileged = Case::with(Case::privileged);
    assert_eq!(options(&privileged, "/sys"), "nosuid,noexec,nodev,rw");
    assert_eq!(options(&privileged, "/sys/fs/cgroup"), "nosuid,noexec,nodev,relatime,rw");
    let read_only = Case::with(|case| case.security().readonly_rootfs = true);
    assert_eq!(options(&read_only, "/etc/hosts"), "rbind,rprivate,ro");
    assert_eq!(options(&read_only, "/dev/shm"), "rbind,rprivate,rw");
    assert_eq!(read_only.spec().root().as_ref().unwrap().readonly(), Some(true));
}

#[test]
fn pod_without_files() {
    let case = Case::with(|case| {
        case.pod_files = crate::PodFiles { hostname: None, hosts: None, resolv_conf: None, shm: None };
    });
    assert!(!destinations(&case).iter().any(|path| path.starts_with("/etc")));
    // Shared memory is always there.
    assert!(options(&case, "/dev/shm").contains("mode=1777"));
}

#[test]
fn volumes_replace_defaults_and_are_sorted() {
    let case = with(vec![
        volume("/data/a/b"),
        volume("/etc//hosts"),
        volume("/data"),
        volume("/b"),
        volume("/data/a"),
    ]);
    let found = destinations(&case);
    assert_eq!(found.len(), 9 + 5);
    assert_eq!(found[9..], ["/data", "/b", "/etc/hosts", "/data/a", "/data/a/b"]);

    let own_dev = with(vec![volume("/dev")]);
    let found = destinations(&own_dev);
    assert!(!found.iter().any(|path| path.starts_with("/dev/")));
    assert_eq!(found.last().unwrap(), "/dev");
}

#[test]
fn options_of_volumes() {
    let change = |change: &dyn Fn(&mut cri::Mount)| {
        let mut one = volume("/v");
        change(&mut one);
        with(vec![one])
    };
    #[rustfmt::skip]
    let table = [
        (change(&|_| {}), "rbind,rprivate,rw", None),
        (change(&|one| one.readonly = true), "rbind,rprivate,ro", None),
        (change(&|one| { one.readonly = true; one.recursive_read_only = true; }), "rbind,rprivate,rro", None),
        (change(&|one| one.propagation = 1), "rbind,rslave,rw", Some("rslave")),
        (change(&|one| one.propagation = 2), "rbind,rshared,rw", Some("rshared")),
        (change(&|one| one.mount_options = strings(&["noexec", "nosuid", "noexec", "nodev"])),
         "rbind,rprivate,rw,noexec,nosuid,nodev", None),
        (change(&|one| one.selinux_relabel = true), "rbind,rprivate,rw", None),
    ];
    for (case, expected, root) in table {
        assert_eq!(options(&case, "/v"), expected);
        assert_eq!(case.spec().linux().as_ref().unwrap().rootfs_propagation().as_deref(), root);
    }
    let mut slave = volume("/s");
    slave.propagation = 1;
    let mut shared = volume("/t");
    shared.propagation = 2;
    let case = with(vec![shared, slave]);
    assert_eq!(case.spec().linux().as_ref().unwrap().rootfs_propagation().as_deref(), Some("rshared"));
}

#[test]
fn an_image_brings_files_only() {
    let mut optioned = image("/exec");
    optioned.mount_options = strings(&["noexec", "nosuid"]);
    let case = with(vec![image("/model"), optioned]);
    assert_eq!(options(&case, "/model"), "rbind,rprivate,ro,nosuid,nodev");
    assert_eq!(options(&case, "/exec"), "rbind,rprivate,ro,nosuid,nodev,noexec");
}

#[test]
fn refused() {
    let change = |change: &dyn Fn(&mut cri::Mount)| {
        let mut one = volume("/v");
        change(&mut one);
        with(vec![volume("/first"), one])
    };
    let overflow = cri::IdMapping { host_id: u32::MAX, container_id: 0, length: 2 };
    let long = format!("/{}", "x".repeat(4096));
    #[rustfmt::skip]
    let table = [
        (change(&|one| one.container_path.clear()), ErrorKind::Invalid, "container_path"),
        (change(&|one| one.container_path = "v".into()), ErrorKind::Invalid, "container_path"),
        (change(&|one| one.container_path = "/v\0".into()), ErrorKind::Invalid, "container_path"),
        (change(&|one| one.container_path.clone_from(&long)), ErrorKind::Invalid, "container_path"),
        (change(&|one| one.container_path = "/a/../".into()), ErrorKind::Invalid, "container_path"),
        (change(&|one| one.host_path.clear()), ErrorKind::Invalid, "host_path"),
        (change(&|one| one.host_path = "rel".into()), ErrorKind::Invalid, "host_path"),
        (change(&|one| one.propagation = 3), ErrorKind::Invalid, "propagation"),
        (change(&|one| one.recursive_read_only = true), ErrorKind::Invalid, "recursive_read_only"),
        (change(&|one| { one.recursive_read_only = true; one.readonly = true; one.propagation = 1; }),
         ErrorKind::Invalid, "recursive_read_only"),
        (change(&|one| { one.recursive_read_only = true; one.readonly = true; one.propagation = 2; }),
         ErrorKind::Invalid, "recursive_read_only"),
        (change(&|one| one.mount_options = strings(&["noexec", "exec"])), ErrorKind::Invalid, "mount_options[1]"),
        (change(&|one| one.mount_options = strings(&["remount"])), ErrorKind::Invalid, "mount_options[0]"),
        (change(&|one| one.uid_mappings = vec![overflow]), ErrorKind::Invalid, "uidMappings[0]"),
        (change(&|one| one.uid_mappings = vec![cri::IdMapping { length: 1, ..overflow }]),
         ErrorKind::Invalid, "uidMappings[0]"),
        (change(&|one| one.uid_mappings = vec![cri::IdMapping { host_id: 1, container_id: 0, length: 2 }]),
         ErrorKind::Invalid, "uidMappings"),
        (change(&|one| one.image_sub_path = "a".into()), ErrorKind::Invalid, "image_sub_path"),
        (change(&|one| one.image = Some(cri::ImageSpec::default())), ErrorKind::Invalid, "host_path"),
        (change(&|one| { one.image = Some(cri::ImageSpec::default()); one.host_path.clear(); }),
         ErrorKind::Invalid, "readonly"),
        (change(&|one| { *one = image("/v"); one.image_sub_path = "a\0".into(); }),
         ErrorKind::Invalid, "image_sub_path"),
        (change(&|one| { *one = image("/v"); one.propagation = 3; }), ErrorKind::Invalid, "propagation"),
    ];
    for (case, kind, field) in table {
        assert_eq!(case.refused(), (kind, format!("config.mounts[1].{field}")));
    }
}
