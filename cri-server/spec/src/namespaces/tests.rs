use std::path::Path;

use super::*;
use crate::ErrorKind;
use crate::testing::Case;

fn options(network: NamespaceMode, pid: NamespaceMode, ipc: NamespaceMode) -> Option<cri::NamespaceOption> {
    Some(cri::NamespaceOption {
        network: network.into(),
        pid: pid.into(),
        ipc: ipc.into(),
        target_id: if pid == NamespaceMode::Target { "other".to_owned() } else { String::new() },
        userns_options: None,
    })
}

fn both(network: NamespaceMode, pid: NamespaceMode, ipc: NamespaceMode) -> Case {
    Case::with(|case| {
        case.sandbox_security().namespace_options = options(network, pid, ipc);
        case.security().namespace_options = options(network, pid, ipc);
    })
}

/// Kind and path of each.
fn found(case: &Case) -> Vec<(String, Option<String>)> {
    let list = case.spec().linux().clone().unwrap().namespaces().clone().unwrap();
    let path = |path: &Path| path.display().to_string();
    list.iter().map(|one| (one.typ().to_string(), one.path().as_deref().map(path))).collect()
}

fn some(kind: &str, path: &str) -> (String, Option<String>) {
    (kind.to_owned(), Some(path.to_owned()))
}

fn fresh(kind: &str) -> (String, Option<String>) {
    (kind.to_owned(), None)
}

use NamespaceMode::{Container, Node, Pod, Target};

#[test]
fn modes_to_namespaces() {
    let net = some("net", "/run/netns/pod");
    let uts = some("uts", "/run/utsns/pod");
    let ipc = some("ipc", "/run/ipcns/pod");
    let pid = some("pid", "/proc/77/ns/pid");
    let own = |list: &[&(String, Option<String>)]| -> Vec<_> {
        let mut all = vec![fresh("mnt")];
        all.extend(list.iter().map(|one| (*one).clone()));
        all.push(fresh("cgroup"));
        all
    };
    assert_eq!(found(&Case::default()), own(&[&net, &uts, &ipc, &pid]));
    assert_eq!(found(&both(Pod, Pod, Pod)), own(&[&net, &uts, &ipc, &pid]));
    assert_eq!(found(&both(Pod, Container, Pod)), own(&[&net, &uts, &ipc, &fresh("pid")]));
    assert_eq!(found(&both(Node, Node, Node)), own(&[]));
    assert_eq!(found(&both(Node, Container, Pod)), own(&[&ipc, &fresh("pid")]));

    let target = Case::with(|case| case.security().namespace_options = options(Pod, Target, Pod));
    assert_eq!(found(&target), own(&[&net, &uts, &ipc, &pid]));
    // Only the sandbox says that it is on the node's network.
    let sandbox_only = Case::with(|case| case.sandbox_security().namespace_options = options(Node, Pod, Pod));
    assert_eq!(found(&sandbox_only), own(&[&ipc, &pid]));
}

#[test]
fn isolation_without_a_path_is_a_new_namespace() {
    let case = Case::with(|case| case.namespaces = crate::NamespacePaths::default());
    let expected: Vec<_> =
        ["mnt", "net", "uts", "ipc", "pid", "cgroup"].iter().map(|kind| fresh(kind)).collect();
    assert_eq!(found(&case), expected);
    assert_eq!(case.spec().hostname().as_deref(), Some("pod-host"));
    assert_eq!(Case::default().spec().hostname(), &None);
}

#[test]
fn cgroup_namespace() {
    let has = |case: &Case| found(case).contains(&fresh("cgroup"));
    assert!(has(&Case::default()));
    assert!(!has(&Case::with(Case::privileged)));
    assert!(!has(&Case::with(|case| case.host.cgroup_v2 = false)));
}

#[test]
fn refused() {
    let field = |name: &str| format!("{FIELD}.{name}");
    let own = |change: &dyn Fn(&mut cri::NamespaceOption)| {
        Case::with(|case| change(case.security().namespace_options.insert(cri::NamespaceOption::default())))
    };
    let user = |mode: NamespaceMode, length| {
        let uids = vec![cri::IdMapping { host_id: 0, container_id: 0, length }; length as usize];
        Some(cri::UserNamespace { mode: mode.into(), uids, gids: Vec::new() })
    };
    #[rustfmt::skip]
    let table = [
        (own(&|options| options.network = Node.into()), ErrorKind::Invalid, field("network")),
        (own(&|options| options.ipc = Node.into()), ErrorKind::Invalid, field("ipc")),
        (own(&|options| options.network = Target.into()), ErrorKind::Invalid, field("network")),
        (own(&|options| options.pid = 99), ErrorKind::Invalid, field("pid")),
        (own(&|options| options.pid = Target.into()), ErrorKind::Invalid, field("target_id")),
        (own(&|options| options.userns_options = user(Pod, 1)), ErrorKind::Invalid, field("userns_options.uids[0].host_id")),
        (own(&|options| options.userns_options = user(Node, 1)), ErrorKind::Invalid, field("userns_options.uids")),
        (own(&|options| options.userns_options = user(Container, 0)), ErrorKind::Invalid, field("userns_options.mode")),
    ];
    for (case, kind, field) in table {
        assert_eq!(case.refused(), (kind, field));
    }
    own(&|options| options.userns_options = user(Node, 0)).spec();

    let gone = Case::with(|case| {
        case.security().namespace_options = options(Pod, Target, Pod);
        case.namespaces.pid = None;
    });
    assert_eq!(gone.refused().1, field("target_id"));
}
