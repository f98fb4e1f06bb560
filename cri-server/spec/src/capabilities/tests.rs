use super::*;
use crate::ErrorKind;
use crate::testing::{Case, strings};

fn bounding(case: &Case) -> Vec<String> {
    let sets = case.process().capabilities().clone().unwrap();
    let mut names: Vec<_> = sets.bounding().clone().unwrap().iter().map(ToString::to_string).collect();
    names.sort();
    assert_eq!(sets.bounding(), sets.effective());
    assert_eq!(sets.bounding(), sets.permitted());
    assert_eq!(sets.inheritable(), sets.ambient());
    names
}

fn case(add: &[&str], drop: &[&str]) -> Case {
    Case::with(|case| {
        case.security().capabilities = Some(cri::Capability {
            add_capabilities: strings(add),
            drop_capabilities: strings(drop),
            ..Default::default()
        });
    })
}

fn bare(names: &[&str]) -> Vec<String> {
    let mut names: Vec<_> =
        names.iter().map(|name| name.strip_prefix("CAP_").unwrap_or(name).to_owned()).collect();
    names.sort();
    names
}

#[test]
fn numbers_are_the_kernels() {
    assert_eq!(
        capability_names(1 | 1 << 21 | 1 << 40),
        ["CAP_CHOWN", "CAP_SYS_ADMIN", "CAP_CHECKPOINT_RESTORE"]
    );
    assert_eq!(capability_names(1 << 24 | 1 << 63), ["CAP_SYS_RESOURCE"]);
    for (name, capability) in NAMES {
        assert_eq!(format!("CAP_{capability}"), name);
    }
}

#[test]
fn additions_and_removals() {
    assert_eq!(bounding(&Case::default()), bare(&DEFAULT));
    assert_eq!(bounding(&case(&[], &["ALL"])), [""; 0]);
    assert_eq!(bounding(&case(&["NET_ADMIN", "cap_chown"], &["all"])), bare(&["CHOWN", "NET_ADMIN"]));
    assert_eq!(bounding(&case(&["CAP_SYS_TIME"], &["CAP_SYS_TIME", "ALL"])), [""; 0]);
    let all = bounding(&case(&["ALL"], &["SYS_ADMIN"]));
    assert_eq!(all.len(), 39, "41 without SYS_RESOURCE, which the node lacks, and SYS_ADMIN");
    assert!(!all.contains(&"SYS_ADMIN".to_owned()));
    let less = bounding(&case(&[], &["KILL"]));
    assert_eq!(less.len(), DEFAULT.len() - 1);
}

#[test]
fn names_for_seccomp_are_the_bounding_set() {
    let case = case(&["SYS_ADMIN"], &["ALL"]);
    assert_eq!(capabilities(&case.config, &case.host).unwrap(), ["CAP_SYS_ADMIN"]);
}

#[test]
fn a_node_without_a_default_capability_leaves_it_out() {
    let case = Case::with(|case| case.host.capabilities.retain(|name| name != "CAP_MKNOD"));
    assert_eq!(bounding(&case).len(), DEFAULT.len() - 1);
}

#[test]
fn ambient() {
    let case = Case::with(|case| {
        case.security().capabilities = Some(cri::Capability {
            drop_capabilities: strings(&["ALL"]),
            add_ambient_capabilities: strings(&["NET_BIND_SERVICE"]),
            ..Default::default()
        });
    });
    assert_eq!(bounding(&case), ["NET_BIND_SERVICE"]);
    let sets = case.process().capabilities().clone().unwrap();
    assert_eq!(sets.ambient().as_ref().unwrap().len(), 1);
}

#[test]
fn privileged_gets_what_the_node_has() {
    let mut case = case(&[], &["ALL"]);
    case.privileged();
    assert_eq!(bounding(&case).len(), 40);
}

#[test]
fn refused() {
    let prefix = "config.linux.security_context.capabilities";
    assert_eq!(
        case(&["CHOWN", "FLY"], &[]).refused(),
        (ErrorKind::Invalid, format!("{prefix}.add_capabilities[1]"))
    );
    assert_eq!(
        case(&[], &["CAP_"]).refused(),
        (ErrorKind::Invalid, format!("{prefix}.drop_capabilities[0]"))
    );
    assert_eq!(
        case(&["SYS_RESOURCE"], &[]).refused(),
        (ErrorKind::Unsupported, format!("{prefix}.add_capabilities[0]"))
    );
}
