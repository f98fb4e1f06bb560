use std::collections::BTreeSet;

use proptest::prelude::*;

use super::*;
use crate::testing::{Case, field_of};

/// As Fedora's container-selinux has it.
const CONTEXTS: &str = r#"
# process = "system_u:system_r:commented_t:s0"
process = "system_u:system_r:container_t:s0"
content = "system_u:object_r:virt_var_lib_t:s0"
file = "system_u:object_r:container_file_t:s0"
ro_file="system_u:object_r:container_ro_file_t:s0"
kvm_process = "system_u:system_r:container_kvm_t:s0"
"#;

fn policy() -> Labels {
    Labels::of_policy(CONTEXTS).unwrap()
}

fn options(user: &str, role: &str, kind: &str, level: &str) -> cri::SeLinuxOption {
    let [user, role, r#type, level] = [user, role, kind, level].map(str::to_owned);
    cri::SeLinuxOption { user, role, r#type, level }
}

fn shown(labels: &Labels) -> (String, String) {
    (labels.process.to_string(), labels.file.to_string())
}

#[test]
fn contexts_of_a_policy() {
    let labels = policy();
    assert_eq!(
        shown(&labels),
        ("system_u:system_r:container_t:s0".to_owned(), "system_u:object_r:container_file_t:s0".to_owned())
    );
    assert_eq!(Labels::of_policy("process = \"a:b:c\""), Err(PolicyError::Missing("file")));
    assert_eq!(Labels::of_policy("; file = \"a:b:c\""), Err(PolicyError::Missing("process")));
    let broken = Labels::of_policy("process = \"a:b\"\nfile = \"a:b:c\"");
    assert_eq!(broken, Err(PolicyError::Invalid(InvalidContext("a:b".to_owned()))));
}

#[test]
fn contexts_are_what_they_were_written_as() {
    for good in ["u:r:t", "u:r:t:s0", "u:r:t:s0-s0:c0.c1023", "u_u:object_r:a-b.c_t:s0:c1,c2"] {
        assert_eq!(good.parse::<Context>().unwrap().to_string(), good);
    }
    for bad in ["", "u:r", "u:r:", "::", "u:r:t:", "u:r:t t", "u:r:t,context=x", "u:r:t:s0 \"", "u:r:t:s0\n"]
    {
        assert!(bad.parse::<Context>().is_err(), "{bad:?}");
    }
}

#[test]
fn a_pod_has_what_it_asks_for_and_a_level_of_its_own() {
    #[rustfmt::skip]
    let table = [
        (None, "system_u:system_r:container_t:s0:c0,c3", "system_u:object_r:container_file_t:s0:c0,c3"),
        (Some(options("", "", "", "")), "system_u:system_r:container_t:s0:c0,c3", "system_u:object_r:container_file_t:s0:c0,c3"),
        (Some(options("", "", "web_t", "")), "system_u:system_r:web_t:s0:c0,c3", "system_u:object_r:container_file_t:s0:c0,c3"),
        (Some(options("", "", "", "s0:c5,c6")), "system_u:system_r:container_t:s0:c5,c6", "system_u:object_r:container_file_t:s0:c5,c6"),
        (Some(options("me_u", "me_r", "me_t", "s0")), "me_u:me_r:me_t:s0", "me_u:object_r:container_file_t:s0"),
    ];
    for (asked, process, file) in table {
        let mut labels = policy().of_pod(asked.as_ref()).unwrap();
        labels.separate(asked.as_ref(), 3, |_| false);
        assert_eq!(shown(&labels), (process.to_owned(), file.to_owned()), "{asked:?}");
    }
    for (asked, field) in [
        (options("a:b", "", "", ""), "user"),
        (options("", "a b", "", ""), "role"),
        (options("", "", "t\0", ""), "type"),
        (options("", "", "", "s0,context=\"x\""), "level"),
    ] {
        let error = policy().of_pod(Some(&asked)).unwrap_err();
        assert_eq!(field_of(&error), format!("{FIELD}.{field}"));
    }
}

#[test]
fn a_level_that_is_taken_is_passed_over() {
    let mut taken = BTreeSet::new();
    for _ in 0..3 {
        let mut labels = policy();
        labels.separate(None, LEVELS - 2, |level| taken.contains(level));
        assert!(taken.insert(labels.level().unwrap().to_owned()));
    }
    assert_eq!(taken.into_iter().collect::<Vec<_>>(), ["s0:c0,c1", "s0:c1021,c1023", "s0:c1022,c1023"]);
    // Of a range the low end.
    let mut ranged = Labels { process: "u:r:t:s0-s0:c0.c9".parse().unwrap(), ..policy() };
    ranged.separate(None, 0, |_| false);
    assert_eq!(ranged.level(), Some("s0:c0,c1"));
    // A policy without levels has none to separate by.
    let mut flat = Labels::of_policy("process = \"u:r:p\"\nfile = \"u:r:f\"").unwrap();
    flat.separate(None, 0, |_| false);
    assert_eq!(shown(&flat), ("u:r:p".to_owned(), "u:r:f".to_owned()));
}

#[test]
fn a_container_is_confined_as_its_pod_unless_it_shares_the_node() {
    const FILES: &str = "system_u:object_r:container_file_t:s0:c1,c2";
    const POD: &str = "system_u:system_r:container_t:s0:c1,c2";
    let node = NamespaceMode::Node as i32;
    let pid = |case: &mut Case| case.security().namespace_options.get_or_insert_default().pid = node;
    let ipc = |case: &mut Case| case.sandbox_security().namespace_options.get_or_insert_default().ipc = node;
    let ask = |case: &mut Case, kind: &str, level: &str| {
        case.security().selinux_options = Some(options("", "", kind, level));
    };
    #[rustfmt::skip]
    let table = [
        (Case::default(), Some(POD), FILES, true),
        (Case::with(|case| ask(case, "web_t", "")), Some("system_u:system_r:web_t:s0:c1,c2"), FILES, true),
        (Case::with(|case| ask(case, "", "s0:c7,c8")), Some("system_u:system_r:container_t:s0:c7,c8"), "system_u:object_r:container_file_t:s0:c7,c8", true),
        (Case::with(|case| ask(case, "spc_t", "")), Some("system_u:system_r:spc_t:s0:c1,c2"), FILES, false),
        (Case::with(Case::privileged), None, FILES, false),
        (Case::with(|case| { case.privileged(); ask(case, "web_t", ""); }), None, FILES, false),
        (Case::with(pid), None, FILES, false),
        (Case::with(ipc), None, FILES, false),
        (Case::with(|case| { pid(case); ask(case, "log_reader_t", ""); }), Some("system_u:system_r:log_reader_t:s0:c1,c2"), FILES, true),
        (Case::with(|case| { pid(case); ask(case, "", "s0:c1,c2"); }), None, FILES, false),
        (Case::with(|case| case.sandbox_security().namespace_options.get_or_insert_default().network = node), Some(POD), FILES, true),
        // Another container of the pod is.
        (Case::with(|case| case.sandbox_security().privileged = true), Some(POD), FILES, true),
    ];
    let asked = options("", "", "", "s0:c1,c2");
    let pod = policy().of_pod(Some(&asked)).unwrap();
    for (mut case, process, files, relabels) in table {
        case.selinux = Confinement::of_container(Some(&pod), &case.sandbox, &case.config).unwrap();
        assert_eq!(case.selinux.relabels(), relabels);
        let spec = case.spec();
        let first = spec.process().as_ref().unwrap();
        assert_eq!(first.selinux_label().as_deref(), process);
        assert_eq!(spec.linux().as_ref().unwrap().mount_label().as_deref(), Some(files));
        let exec = crate::exec(&spec, &["ls".to_owned()], false).unwrap();
        assert_eq!(exec.selinux_label(), first.selinux_label());

        let without = Confinement::of_container(None, &case.sandbox, &case.config).unwrap();
        assert_eq!((without.relabels(), &without), (false, &Confinement::default()));
    }
    let spec = Case::default().spec();
    assert_eq!(spec.process().as_ref().unwrap().selinux_label(), &None);
    assert_eq!(spec.linux().as_ref().unwrap().mount_label(), &None);
}

#[test]
fn labels_survive_in_records() {
    let text = serde_json::to_string(&policy()).unwrap();
    assert_eq!(serde_json::from_str::<Labels>(&text).unwrap(), policy());
    assert!(serde_json::from_str::<Context>("\"nonsense\"").is_err());
}

proptest! {
    #[test]
    fn levels_are_numbered_one_by_one(number in 0..LEVELS - 1) {
        let (first, second) = pair(number);
        prop_assert!(first < second && second < CATEGORIES);
        let next = if first + 1 < second { (first + 1, second) } else { (0, second + 1) };
        prop_assert_eq!(pair(number + 1), next);
    }
}
