use std::collections::BTreeSet;

use oci_spec::runtime::LinuxSeccompOperator;
use proptest::prelude::*;

use super::*;
use crate::ErrorKind;
use crate::testing::{field_of, strings};

/// What runs in a container that asks for nothing.
fn default_capabilities() -> Vec<String> {
    let case = crate::testing::Case::default();
    crate::capabilities(&case.config, &case.host).unwrap()
}

fn rules(profile: &LinuxSeccomp, name: &str) -> Vec<LinuxSyscall> {
    let all = profile.syscalls().iter().flatten();
    all.filter(|rule| rule.names().iter().any(|known| known == name)).cloned().collect()
}

fn allowed(profile: &LinuxSeccomp, name: &str) -> bool {
    rules(profile, name)
        .iter()
        .any(|rule| rule.action() == LinuxSeccompAction::ScmpActAllow && rule.args().is_none())
}

#[test]
fn default_denies_what_it_does_not_know() {
    let profile = default_seccomp(&default_capabilities());
    assert_eq!(profile.default_action(), LinuxSeccompAction::ScmpActErrno);
    assert_eq!(profile.default_errno_ret(), Some(1));
    for name in ["read", "openat", "execve", "futex", "clone3_is_below", "chroot", "ptrace"] {
        let expected = name != "clone3_is_below";
        assert_eq!(allowed(&profile, name), expected, "{name}");
    }
    #[rustfmt::skip]
    let denied = [
        "mount", "umount2", "unshare", "setns", "bpf", "perf_event_open", "keyctl", "add_key", "request_key", "init_module",
        "finit_module", "delete_module", "kexec_load", "kexec_file_load", "reboot", "swapon", "swapoff", "userfaultfd", "io_uring_setup",
        "io_uring_enter", "io_uring_register", "open_by_handle_at", "settimeofday", "clock_settime", "sethostname", "pivot_root", "nfsservctl",
        "acct", "iopl", "ioperm", "quotactl", "fsopen", "move_mount", "open_tree", "mount_setattr", "syslog", "vhangup", "kcmp", "lookup_dcookie",
    ];
    for name in denied {
        assert!(rules(&profile, name).is_empty(), "{name} must not be in the profile");
    }
}

#[test]
fn default_follows_capabilities() {
    for (capability, name) in [
        ("CAP_SYS_ADMIN", "mount"),
        ("CAP_SYS_ADMIN", "clone"),
        ("CAP_SYS_ADMIN", "clone3"),
        ("CAP_BPF", "bpf"),
        ("CAP_PERFMON", "perf_event_open"),
        ("CAP_SYS_BOOT", "reboot"),
        ("CAP_SYS_MODULE", "init_module"),
        ("CAP_SYS_TIME", "clock_settime"),
        ("CAP_SYS_PTRACE", "kcmp"),
        ("CAP_SYS_CHROOT", "chroot"),
        ("CAP_SYSLOG", "syslog"),
    ] {
        assert!(!allowed(&default_seccomp(&[]), name), "{name} without {capability}");
        assert!(allowed(&default_seccomp(&strings(&[capability])), name), "{name} with {capability}");
    }
}

#[test]
fn default_takes_new_namespaces_from_clone() {
    let profile = default_seccomp(&default_capabilities());
    let clone = rules(&profile, "clone");
    assert_eq!(clone.len(), 1);
    let argument = clone[0].args().as_ref().unwrap()[0];
    assert_eq!(argument.op(), LinuxSeccompOperator::ScmpCmpMaskedEq);
    // include/uapi/linux/sched.h: NEWNS, NEWCGROUP, NEWUTS, NEWIPC, NEWUSER, NEWPID, NEWNET
    let flags =
        0x0002_0000 | 0x0200_0000 | 0x0400_0000 | 0x0800_0000 | 0x1000_0000 | 0x2000_0000 | 0x4000_0000_u64;
    assert_eq!((argument.index(), argument.value(), argument.value_two()), (0, flags, Some(0)));
    let clone3 = rules(&profile, "clone3");
    assert_eq!(
        (clone3.len(), clone3[0].action(), clone3[0].errno_ret()),
        (1, LinuxSeccompAction::ScmpActErrno, Some(38))
    );
    // With the capability there is no rule that still forbids it: runtimes give the stricter of two the precedence.
    assert_eq!(rules(&default_seccomp(&strings(&["CAP_SYS_ADMIN"])), "clone3").len(), 1);
    let socket = rules(&profile, "socket");
    assert_eq!(socket[0].args().as_ref().unwrap()[0].value(), 40);
    assert_eq!(rules(&profile, "personality").len(), 5);
}

#[test]
fn default_file_is_tidy() {
    let file: File = serde_json::from_str(DEFAULT).unwrap();
    let mut unconditional = BTreeSet::new();
    for rule in &file.syscalls {
        assert!(!rule.names.is_empty());
        for name in &rule.names {
            let plain = rule.includes.is_none() && rule.excludes.is_none() && rule.args.is_none();
            assert!(!plain || unconditional.insert(name.clone()), "{name} is there twice");
        }
        for name in
            rule.includes.iter().chain(&rule.excludes).flat_map(|condition| condition.caps.iter().flatten())
        {
            assert!(crate::capability_names(u64::MAX).contains(name), "{name} is no capability");
        }
    }
    let profile = default_seccomp(&[]);
    let arches = profile.architectures().clone().unwrap();
    #[cfg(target_arch = "x86_64")]
    assert_eq!(arches, [Arch::ScmpArchX86_64, Arch::ScmpArchX86, Arch::ScmpArchX32]);
    #[cfg(target_arch = "aarch64")]
    assert_eq!(arches, [Arch::ScmpArchAarch64, Arch::ScmpArchArm]);
}

const CONDITIONAL: &str = r#"{
  "defaultAction": "SCMP_ACT_ERRNO",
  "archMap": [
    {"architecture": "SCMP_ARCH_X86_64", "subArchitectures": ["SCMP_ARCH_X86"]},
    {"architecture": "SCMP_ARCH_AARCH64", "subArchitectures": null}
  ],
  "unknown field": 1,
  "syscalls": [
    {"names": ["always"], "action": "SCMP_ACT_ALLOW", "args": [], "comment": "", "includes": {}, "excludes": {}},
    {"name": "old_style", "action": "SCMP_ACT_ALLOW", "args": null},
    {"names": ["both"], "action": "SCMP_ACT_ALLOW", "includes": {"caps": ["CAP_SYS_ADMIN", "CAP_BPF"]}},
    {"names": ["unless"], "action": "SCMP_ACT_ALLOW", "excludes": {"caps": ["CAP_SYS_ADMIN", "CAP_BPF"]}},
    {"names": ["new_kernel"], "action": "SCMP_ACT_ALLOW", "includes": {"minKernel": "5.10"}},
    {"names": ["old_kernel"], "action": "SCMP_ACT_ALLOW", "excludes": {"minKernel": "5.10"}},
    {"names": ["here"], "action": "SCMP_ACT_LOG", "includes": {"arches": ["amd64", "arm64", "riscv64"]}},
    {"names": ["elsewhere"], "action": "SCMP_ACT_LOG", "includes": {"arches": ["s390"]}}
  ]
}"#;

fn names(capabilities: &[&str], kernel: (u32, u32)) -> Vec<String> {
    let profile = seccomp_profile(CONDITIONAL, &strings(capabilities), kernel).unwrap();
    profile.syscalls().iter().flatten().flat_map(|rule| rule.names().clone()).collect()
}

#[test]
fn conditions() {
    assert_eq!(names(&[], (5, 9)), ["always", "old_style", "unless", "old_kernel", "here"]);
    assert_eq!(names(&["CAP_SYS_ADMIN"], (5, 10)), ["always", "old_style", "new_kernel", "here"]);
    assert_eq!(
        names(&["CAP_SYS_ADMIN", "CAP_BPF"], (6, 1)),
        ["always", "old_style", "both", "new_kernel", "here"]
    );
}

#[test]
fn plain_profile_passes_unchanged() {
    let json = r#"{"defaultAction":"SCMP_ACT_ALLOW","defaultErrnoRet":13,"architectures":["SCMP_ARCH_X86_64"],
        "flags":["SECCOMP_FILTER_FLAG_LOG"],"listenerPath":"/run/l.sock","listenerMetadata":"m",
        "syscalls":[{"names":["sethostname"],"action":"SCMP_ACT_ERRNO","errnoRet":1,
        "args":[{"index":0,"value":18446744073709551615,"valueTwo":1,"op":"SCMP_CMP_MASKED_EQ"}]}]}"#;
    let read: LinuxSeccomp = serde_json::from_str(json).unwrap();
    assert_eq!(seccomp_profile(json, &[], (6, 1)).unwrap(), read);
    let least = seccomp_profile(r#"{"defaultAction":"SCMP_ACT_LOG"}"#, &[], (6, 1)).unwrap();
    assert_eq!(least.default_action(), LinuxSeccompAction::ScmpActLog);
    assert_eq!((least.architectures(), least.syscalls()), (&None, &None));
}

#[test]
fn broken_profiles() {
    let both = r#"{"defaultAction":"SCMP_ACT_LOG","architectures":["SCMP_ARCH_X86"],"archMap":[{"architecture":"SCMP_ARCH_X86"}]}"#;
    let rule = |rule: &str| format!(r#"{{"defaultAction":"SCMP_ACT_LOG","syscalls":[{rule}]}}"#);
    let spaces = " ".repeat(MAX_LENGTH);
    for (json, field) in [
        (both.to_owned(), "seccomp profile"),
        (spaces, "seccomp profile"),
        (rule(r#"{"action":"SCMP_ACT_LOG"}"#), "seccomp profile: syscalls[0]"),
        (rule(r#"{"name":"a","names":["b"],"action":"SCMP_ACT_LOG"}"#), "seccomp profile: syscalls[0]"),
        (
            rule(r#"{"name":"a","action":"SCMP_ACT_LOG","includes":{"minKernel":"5"}}"#),
            "seccomp profile: syscalls[0]",
        ),
    ] {
        let error = seccomp_profile(&(json + " "), &[], (6, 1)).unwrap_err();
        assert_eq!((error.kind(), field_of(&error)), (ErrorKind::Invalid, field.to_owned()));
    }
    for json in [
        "",
        "{}",
        "[]",
        r#"{"defaultAction":"ALLOW"}"#,
        r#"{"defaultAction":"SCMP_ACT_LOG","syscalls":[{"names":[1]}]}"#,
    ] {
        assert!(matches!(seccomp_profile(json, &[], (6, 1)), Err(SpecError::SeccompSyntax(_))), "{json}");
    }
}

proptest! {
    #![proptest_config(ProptestConfig { failure_persistence: None, ..ProptestConfig::with_cases(500) })]

    #[test]
    fn cut_and_changed_files_never_panic(cut in 0..DEFAULT.len(), at in 0..DEFAULT.len(), byte in any::<u8>()) {
        let mut bytes = DEFAULT.as_bytes().to_vec();
        bytes[at] = byte;
        let _ = seccomp_profile(&String::from_utf8_lossy(&bytes), &[], (6, 1));
        bytes.truncate(cut);
        let _ = seccomp_profile(&String::from_utf8_lossy(&bytes), &[], (6, 1));
    }
}
