use podvisor_proto::cri::NamespaceMode::{self, Container, Node, Pod, Target};

use super::*;
use crate::testing::{Case, int};
use oci_spec::runtime::LinuxNamespaceType;

const SANDBOX: &str = "sandbox_config.linux.security_context.namespace_options";
const OWN: &str = "config.linux.security_context.namespace_options";

fn mapping(host_id: u32, container_id: u32, length: u32) -> Vec<cri::IdMapping> {
    vec![cri::IdMapping { host_id, container_id, length }]
}

fn options(mode: NamespaceMode, mappings: Vec<cri::IdMapping>) -> cri::NamespaceOption {
    let user = cri::UserNamespace { mode: mode.into(), uids: mappings.clone(), gids: mappings };
    cri::NamespaceOption { userns_options: Some(user), ..cri::NamespaceOption::default() }
}

fn usual() -> cri::NamespaceOption {
    options(Pod, mapping(100_000, 0, 65_536))
}

/// A container in a pod with a user namespace, as kubelet asks for it.
fn case(change: impl FnOnce(&mut Case)) -> Case {
    Case::with(|case| {
        case.sandbox_security().namespace_options = Some(usual());
        case.security().namespace_options = Some(usual());
        case.namespaces.user = Some("/run/userns/pod".into());
        change(case);
    })
}

#[test]
fn the_pods_namespace_is_joined_first() {
    let spec = case(|_| {}).spec();
    let linux = spec.linux().as_ref().unwrap();
    let user = linux
        .namespaces()
        .iter()
        .flatten()
        .find(|namespace| namespace.typ() == LinuxNamespaceType::User)
        .unwrap();
    assert_eq!(user.path().as_deref().unwrap().to_str(), Some("/run/userns/pod"));
    assert_eq!((linux.uid_mappings(), linux.gid_mappings()), (&None, &None), "it has them already");

    let new = case(|case| case.namespaces.user = None).spec();
    let mappings = new.linux().as_ref().unwrap().uid_mappings().clone().unwrap();
    assert_eq!((mappings[0].host_id(), mappings[0].container_id(), mappings[0].size()), (100_000, 0, 65_536));

    let none = Case::default().spec();
    let namespaces = none.linux().as_ref().unwrap().namespaces().clone().unwrap();
    assert!(namespaces.iter().all(|namespace| namespace.typ() != LinuxNamespaceType::User));
    // A container that says nothing is in its pod's.
    case(|case| case.security().namespace_options = None).spec();
}

#[test]
fn a_pod_that_cannot_be_is_refused() {
    let with = |change: fn(&mut cri::NamespaceOption)| {
        let mut options = usual();
        change(&mut options);
        options
    };
    let user = |options: &mut cri::NamespaceOption| options.userns_options.clone().unwrap();
    let two = [mapping(1000, 0, 10), mapping(5000, 10, 10)].concat();
    #[rustfmt::skip]
    let table = [
        (options(Pod, Vec::new()), "uids"),
        (options(Pod, two), "uids"),
        (options(Pod, mapping(1000, 1, 10)), "uids[0].container_id"),
        (options(Pod, mapping(0, 0, 10)), "uids[0].host_id"),
        (options(Pod, mapping(1000, 0, 0)), "uids[0].length"),
        (options(Pod, mapping(1000, 0, u32::MAX)), "uids[0].length"),
        (options(Node, mapping(1000, 0, 10)), "uids"),
        (options(Container, Vec::new()), "mode"),
        (options(Target, Vec::new()), "mode"),
        (with(|options| options.userns_options.as_mut().unwrap().gids.clear()), "gids"),
        (with(|options| options.userns_options.as_mut().unwrap().mode = 9), "mode"),
        (with(|options| options.network = Node.into()), ""),
        (with(|options| options.pid = Node.into()), ""),
        (with(|options| options.ipc = Node.into()), ""),
    ];
    for (options, part) in table {
        let error = user_namespace("field", Some(&options)).unwrap_err();
        let wanted = if part.is_empty() {
            "field.userns_options".to_owned()
        } else {
            format!("field.userns_options.{part}")
        };
        assert_eq!(crate::testing::field_of(&error), wanted, "{:?}", user(&mut options.clone()));
    }
    // All ids but -1, and the last range that there is.
    for (first, length) in [(1, u32::MAX - 1), (u32::MAX - 1, 1)] {
        let found = user_namespace("field", Some(&options(Pod, mapping(first, 0, length)))).unwrap().unwrap();
        assert_eq!((found.uids.first, found.gids.length), (first, length));
    }
    assert_eq!(user_namespace("field", None).unwrap(), None);
    assert_eq!(user_namespace("field", Some(&options(Node, Vec::new()))).unwrap(), None);
}

#[test]
fn a_container_that_differs_is_refused() {
    let other = case(|case| {
        case.security().namespace_options = Some(options(Pod, mapping(200_000, 0, 65_536)));
    });
    assert_eq!(other.refused().1, format!("{OWN}.userns_options"));
    let node = case(|case| case.security().namespace_options = Some(options(Node, Vec::new())));
    assert_eq!(node.refused().1, format!("{OWN}.userns_options"));
    let only = Case::with(|case| case.security().namespace_options = Some(usual()));
    assert_eq!(only.refused().1, format!("{OWN}.userns_options"));
    let pid = case(|case| case.security().namespace_options.as_mut().unwrap().pid = Node.into());
    assert_eq!(pid.refused().1, format!("{OWN}.pid"));
    let network =
        case(|case| case.sandbox_security().namespace_options.as_mut().unwrap().network = Node.into());
    assert_eq!(network.refused().1, format!("{SANDBOX}.userns_options"));
}

#[test]
fn users_outside_are_refused() {
    let security = "config.linux.security_context";
    #[rustfmt::skip]
    let table = [
        (case(|case| case.security().run_as_user = int(65_536)), format!("{security}.run_as_user")),
        (case(|case| {
            case.security().run_as_user = int(1);
            case.security().run_as_group = int(70_000);
        }), format!("{security}.run_as_group")),
        (case(|case| case.security().supplemental_groups = vec![5, 65_536]), format!("{security}.supplemental_groups")),
        (case(|case| { case.image.set_user(Some("100000".to_owned())); }), "image user".to_owned()),
        (case(|case| { case.image.set_user(Some("1:100000".to_owned())); }), "image user".to_owned()),
    ];
    for (case, field) in table {
        assert_eq!(case.refused().1, field);
    }
    case(|case| case.security().run_as_user = int(65_535)).spec();
}

#[test]
fn small_namespaces_have_no_group_of_terminals() {
    let terminals = |length: u32| {
        let case = case(|case| {
            case.sandbox_security().namespace_options = Some(options(Pod, mapping(100_000, 0, length)));
            case.security().namespace_options = None;
            // The image's root is in group 50.
            case.security().supplemental_groups_policy = cri::SupplementalGroupsPolicy::Strict.into();
        });
        let mounts = case.mounts();
        let terminals = mounts.iter().find(|mount| mount.destination().ends_with("pts")).unwrap();
        terminals.options().clone().unwrap().contains(&"gid=5".to_owned())
    };
    assert!(!terminals(5) && terminals(6));
}

#[test]
fn volumes_get_the_mappings_they_come_with() {
    let volume = cri::Mount {
        host_path: "/volume".to_owned(),
        container_path: "/data".to_owned(),
        uid_mappings: mapping(100_000, 0, 65_536),
        gid_mappings: mapping(100_000, 0, 65_536),
        ..cri::Mount::default()
    };
    let mounts = case(|case| case.config.mounts.push(volume.clone())).mounts();
    let mapped = mounts.last().unwrap().uid_mappings().clone().unwrap();
    assert_eq!((mapped[0].host_id(), mapped[0].size()), (100_000, 65_536));
    let without = Case::with(|case| case.config.mounts.push(volume));
    assert_eq!(without.refused().1, "config.mounts[0].uidMappings");
}
