#![allow(deprecated)]

use super::*;
use crate::testing::{Case, field_of};

fn new(kind: i32, local: &str) -> Option<cri::SecurityProfile> {
    Some(cri::SecurityProfile { profile_type: kind, localhost_ref: local.to_owned() })
}

fn local(name: &str) -> SecurityProfile {
    SecurityProfile::Localhost(name.to_owned())
}

#[test]
fn new_field_wins_over_the_deprecated_one() {
    use SecurityProfile::{RuntimeDefault, Unconfined};
    #[rustfmt::skip]
    let table = [
        (None, "", Unconfined),
        (None, "runtime/default", RuntimeDefault),
        (None, "docker/default", RuntimeDefault),
        (None, "unconfined", Unconfined),
        (None, "localhost//etc/p.json", local("/etc/p.json")),
        (new(0, ""), "unconfined", RuntimeDefault),
        (new(1, ""), "runtime/default", Unconfined),
        (new(2, "/etc/p.json"), "", local("/etc/p.json")),
        (new(2, "localhost//etc/p.json"), "", local("/etc/p.json")),
    ];
    for (field, old, expected) in table {
        let mut case = Case::with(|case| {
            case.security().seccomp = field.clone();
            case.security().seccomp_profile_path = old.to_owned();
        });
        assert_eq!(seccomp_request(&case.config).unwrap(), expected, "{field:?} {old:?}");
        case.security().privileged = true;
        assert_eq!(seccomp_request(&case.config).unwrap(), Unconfined);
    }
}

#[test]
fn apparmor() {
    use SecurityProfile::{RuntimeDefault, Unconfined};
    for (field, old, expected) in [
        (None, "", None),
        (None, "runtime/default", Some(RuntimeDefault)),
        (None, "localhost/mine", Some(local("mine"))),
        (new(1, ""), "localhost/mine", Some(Unconfined)),
        (new(2, "mine"), "", Some(local("mine"))),
    ] {
        let case = Case::with(|case| {
            case.security().apparmor = field.clone();
            case.security().apparmor_profile = old.to_owned();
        });
        assert_eq!(apparmor_request(&case.config).unwrap(), expected);
    }
    assert_eq!(apparmor_request(&cri::ContainerConfig::default()).unwrap(), None);
    assert_eq!(seccomp_request(&cri::ContainerConfig::default()).unwrap(), Unconfined);
}

#[test]
fn refused() {
    for (field, old, expected) in [
        (new(2, ""), "", "seccomp.localhost_ref"),
        (new(2, "localhost/"), "", "seccomp.localhost_ref"),
        (new(2, "relative.json"), "", "seccomp.localhost_ref"),
        (new(2, "/a\0"), "", "seccomp.localhost_ref"),
        (new(0, "/p"), "", "seccomp.localhost_ref"),
        (new(9, ""), "", "seccomp.profile_type"),
        (None, "localhost/", "seccomp_profile_path"),
        (None, "localhost/relative.json", "seccomp_profile_path"),
        (None, "whatever", "seccomp_profile_path"),
    ] {
        let case = Case::with(|case| {
            case.security().seccomp = field.clone();
            case.security().seccomp_profile_path = old.to_owned();
        });
        let error = seccomp_request(&case.config).unwrap_err();
        assert_eq!(
            field_of(&error),
            format!("config.linux.security_context.{expected}"),
            "{field:?} {old:?}"
        );
    }
}
