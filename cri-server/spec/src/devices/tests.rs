use podvisor_proto::cri;

use super::*;
use crate::ErrorKind;
use crate::testing::{Case, device};

fn rules(case: &Case) -> Vec<String> {
    let spec = case.spec();
    let resources = spec.linux().as_ref().unwrap().resources().clone().unwrap();
    let sign = |rule: &LinuxDeviceCgroup| if rule.allow() { '+' } else { '-' };
    resources.devices().iter().flatten().map(|rule| format!("{}{rule}", sign(rule))).collect()
}

fn nodes(case: &Case) -> Vec<String> {
    let nodes = case.spec().linux().as_ref().unwrap().devices().clone().unwrap();
    nodes.iter().map(|node| format!("{} {}:{}", node.path().display(), node.major(), node.minor())).collect()
}

#[test]
fn nothing_but_the_defaults() {
    let rules = rules(&Case::default());
    assert_eq!(rules[0], "-a *:* rwm");
    assert_eq!(rules.len(), 10);
    assert!(rules[1..].iter().all(|rule| rule.starts_with("+c ")));
    assert_eq!(nodes(&Case::default()), [""; 0]);
}

#[test]
fn requested_devices() {
    let case = Case::with(|case| case.devices = vec![device("/dev/disk", 8, 16)]);
    assert_eq!(nodes(&case), ["/dev/disk 8:16"]);
    assert_eq!(rules(&case).last().unwrap(), "+b 8:16 rw");
}

#[test]
fn privileged_has_the_nodes_devices() {
    let case = Case::with(|case| {
        case.privileged();
        case.devices = vec![device("/dev/sda", 7, 7)];
        case.host.devices =
            vec![device("/dev/sda", 8, 0), device("/dev/pts/3", 136, 3), device("/dev/kvm", 10, 232)];
    });
    // What was asked for wins where both have a path.
    assert_eq!(nodes(&case), ["/dev/sda 7:7", "/dev/kvm 10:232"]);
    assert_eq!(rules(&case), ["+a *:* rwm"]);
}

#[test]
fn refused() {
    let request = |host: &str, container: &str, permissions: &str| {
        Case::with(|case| {
            case.config.devices = vec![cri::Device {
                host_path: host.to_owned(),
                container_path: container.to_owned(),
                permissions: permissions.to_owned(),
            }];
        })
    };
    for (case, field) in [
        (request("", "/dev/x", "r"), "host_path"),
        (request("dev/x", "/dev/x", "r"), "host_path"),
        (request("/dev/x", "x", "r"), "container_path"),
        (request("/dev/x", "/dev/x", "rx"), "permissions"),
    ] {
        assert_eq!(case.refused(), (ErrorKind::Invalid, format!("config.devices[0].{field}")));
    }
    request("/dev/x", "", "").spec();
}
