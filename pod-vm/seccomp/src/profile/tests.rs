//! Programs, run by an interpreter of the instructions that seccomp knows.

use oci_spec::runtime::LinuxSeccomp;
use proptest::prelude::*;

use super::*;
use crate::program::{AND, JUMP, JUMP_GREATER};

const X86_64: u32 = 0xc000_003e;
const X86: u32 = 0x4000_0003;
const EAFNOSUPPORT: u32 = 97;

/// What the kernel would answer.
fn run(program: &[u8], architecture: u32, number: u32, arguments: [u64; 6]) -> u32 {
    let mut data = Vec::new();
    data.extend(number.to_ne_bytes());
    data.extend(architecture.to_ne_bytes());
    data.extend(0_u64.to_ne_bytes());
    for argument in arguments {
        data.extend(argument.to_ne_bytes());
    }
    let (mut at, mut accumulator) = (0, 0_u32);
    loop {
        let bytes: &[u8; 8] = program[at * 8..at * 8 + 8].try_into().unwrap();
        let code = u16::from_ne_bytes([bytes[0], bytes[1]]);
        let value = u32::from_ne_bytes(bytes[4..].try_into().unwrap());
        at += 1;
        let mut branch = |taken: bool| at += usize::from(if taken { bytes[2] } else { bytes[3] });
        match code {
            LOAD => {
                let offset = usize::try_from(value).unwrap();
                accumulator = u32::from_ne_bytes(data[offset..offset + 4].try_into().unwrap());
            }
            AND => accumulator &= value,
            JUMP => at += usize::try_from(value).unwrap(),
            JUMP_EQUAL => branch(accumulator == value),
            JUMP_GREATER => branch(accumulator > value),
            JUMP_GREATER_EQUAL => branch(accumulator >= value),
            RETURN => return value,
            other => panic!("{other:#x}"),
        }
    }
}

fn profile(json: &str) -> LinuxSeccomp {
    podvisor_spec::seccomp_profile(json, &[], (6, 12)).unwrap()
}

fn number(name: &str) -> u32 {
    name.parse::<syscalls::x86_64::Sysno>().unwrap() as u32
}

#[test]
fn the_default_profile() {
    let capabilities = ["CAP_SYS_ADMIN".to_owned()];
    for (capabilities, mount) in [(&[][..], ERRNO | EPERM), (&capabilities[..], ALLOW)] {
        let compiled = compile(&podvisor_spec::default_seccomp(capabilities)).unwrap();
        let ask = |name: &str, arguments| run(&compiled.program, X86_64, number(name), arguments);
        assert_eq!(ask("read", [0; 6]), ALLOW);
        assert_eq!(ask("execve", [0; 6]), ALLOW);
        assert_eq!(ask("mount", [0; 6]), mount);
        assert_eq!(ask("kexec_load", [0; 6]), ERRNO | EPERM);
        assert_eq!(
            run(&compiled.program, X86_64, 0x7000, [0; 6]),
            ERRNO | ENOSYS,
            "newer than anything known"
        );
        assert_eq!(run(&compiled.program, X86_64, X32 | 1, [0; 6]), ERRNO | ENOSYS);
        assert_eq!(run(&compiled.program, 0xc000_00b7, 1, [0; 6]), KILL_PROCESS, "not listed");
        assert!(compiled.program.len() / 8 < 700, "{} instructions", compiled.program.len() / 8);
    }
    // Threads may be made, namespaces not.
    let compiled = compile(&podvisor_spec::default_seccomp(&[])).unwrap();
    let clone = |flags| run(&compiled.program, X86_64, number("clone"), [flags, 0, 0, 0, 0, 0]);
    assert_eq!((clone(0x0011_2233), clone(0x1000_0000)), (ALLOW, ERRNO | EPERM));
}

#[test]
fn thirty_two_bit_programs_where_they_are_listed() {
    let json = r#"{"defaultAction": "SCMP_ACT_ERRNO", "architectures": ["SCMP_ARCH_X86_64", "SCMP_ARCH_X86"],
        "syscalls": [{"names": ["write", "no_such_call"], "action": "SCMP_ACT_ALLOW"}]}"#;
    let compiled = compile(&profile(json)).unwrap();
    assert_eq!(run(&compiled.program, X86_64, 1, [0; 6]), ALLOW);
    assert_eq!(run(&compiled.program, X86, 4, [0; 6]), ALLOW);
    assert_eq!(run(&compiled.program, X86, 1, [0; 6]), ERRNO | EPERM);
    assert_eq!(run(&compiled.program, X86_64, 4, [0; 6]), ERRNO | EPERM);
}

#[test]
fn unconditional_rules_win_and_others_are_tried_in_order() {
    let json = r#"{"defaultAction": "SCMP_ACT_ALLOW", "syscalls": [
        {"names": ["socket"], "action": "SCMP_ACT_ERRNO", "errnoRet": 97, "args": [{"index": 0, "value": 16, "op": "SCMP_CMP_EQ"}]},
        {"names": ["socket"], "action": "SCMP_ACT_TRAP", "args": [{"index": 0, "value": 10, "op": "SCMP_CMP_GT"}]},
        {"names": ["openat"], "action": "SCMP_ACT_TRAP", "args": [{"index": 1, "value": 1, "op": "SCMP_CMP_EQ"}]},
        {"names": ["openat"], "action": "SCMP_ACT_KILL_PROCESS"}]}"#;
    let compiled = compile(&profile(json)).unwrap();
    let socket = |family| run(&compiled.program, X86_64, number("socket"), [family, 0, 0, 0, 0, 0]);
    assert_eq!((socket(16), socket(11), socket(2)), (ERRNO | EAFNOSUPPORT, TRAP, ALLOW));
    assert_eq!(run(&compiled.program, X86_64, number("openat"), [0, 1, 0, 0, 0, 0]), KILL_PROCESS);
    assert_eq!(run(&compiled.program, X86_64, 0x7000, [0; 6]), ALLOW);
}

#[test]
fn conditions_on_one_argument_are_alternatives() {
    let json = r#"{"defaultAction": "SCMP_ACT_ERRNO", "syscalls": [{"names": ["personality"], "action": "SCMP_ACT_ALLOW", "args": [
        {"index": 0, "value": 0, "op": "SCMP_CMP_EQ"}, {"index": 0, "value": 8, "op": "SCMP_CMP_EQ"}]}]}"#;
    let compiled = compile(&profile(json)).unwrap();
    let ask = |value| run(&compiled.program, X86_64, number("personality"), [value, 0, 0, 0, 0, 0]);
    assert_eq!((ask(0), ask(8), ask(4), ask(8 << 32)), (ALLOW, ALLOW, ERRNO | EPERM, ERRNO | EPERM));
}

#[test]
fn what_cannot_be_is_refused() {
    let bad = |json| compile(&profile(json)).unwrap_err();
    assert_eq!(bad(r#"{"defaultAction": "SCMP_ACT_NOTIFY"}"#), SeccompError::Action("SCMP_ACT_NOTIFY"));
    let json = r#"{"defaultAction": "SCMP_ACT_ALLOW", "syscalls": [{"names": ["read"], "action": "SCMP_ACT_TRAP",
        "args": [{"index": 6, "value": 0, "op": "SCMP_CMP_EQ"}]}]}"#;
    assert_eq!(bad(json), SeccompError::Argument { name: "read".into(), index: 6 });
}

proptest! {
    /// Each comparison, over values whose halves are near each other's ends.
    #[test]
    fn comparisons_are_of_all_64_bits(
        value in edge(), argument in edge(), mask in edge(), operator in 0..7_usize,
    ) {
        let (name, holds) = [
            ("NE", argument != value), ("LT", argument < value), ("LE", argument <= value), ("EQ", argument == value),
            ("GE", argument >= value), ("GT", argument > value), ("MASKED_EQ", argument & mask == value),
        ][operator];
        let (first, second) = if name == "MASKED_EQ" { (mask, value) } else { (value, 0) };
        let json = format!(
            r#"{{"defaultAction": "SCMP_ACT_ERRNO", "syscalls": [{{"names": ["lseek"], "action": "SCMP_ACT_ALLOW",
            "args": [{{"index": 3, "value": {first}, "valueTwo": {second}, "op": "SCMP_CMP_{name}"}}]}}]}}"#
        );
        let compiled = compile(&profile(&json)).unwrap();
        let answer = run(&compiled.program, X86_64, number("lseek"), [0, 0, 0, argument, 0, 0]);
        prop_assert_eq!(answer, if holds { ALLOW } else { ERRNO | EPERM });
    }
}

fn edge() -> impl Strategy<Value = u64> {
    let half =
        prop_oneof![Just(0_u64), Just(1), Just(2), Just(0xffff_ffff), Just(0x8000_0000), 0..0xffff_ffff_u64];
    (half.clone(), half).prop_map(|(high, low)| high << 32 | low)
}
