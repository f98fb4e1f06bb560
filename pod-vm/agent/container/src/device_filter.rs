//! Which devices a container may use: the rules of the spec as an eBPF program of type CGROUP_DEVICE (Documentation/bpf, linux/bpf.h,
//! `struct bpf_cgroup_dev_ctx`). Rules are read from the last to the first; the first that fits decides, and where none does the answer is no.

use oci_spec::runtime::{LinuxDeviceCgroup, LinuxDeviceType};

use crate::sys::EbpfInstruction;

/// One rule: kind, numbers and accesses that it is about, and what it says.
#[derive(Debug, Clone, Copy)]
struct Rule {
    /// 1 block, 2 character (BPF_DEVCG_DEV_…); `None`: both.
    kind: Option<u32>,
    major: Option<u32>,
    minor: Option<u32>,
    /// 1 mknod, 2 read, 4 write (BPF_DEVCG_ACC_…).
    access: u32,
    allow: bool,
}

const BLOCK: u32 = 1;
const CHARACTER: u32 = 2;
const MKNOD: u32 = 1;
const ALL: u32 = 7;

/// What every container may do whatever its rules say, as every OCI runtime has it: make nodes, use the default devices and terminals.
const ALWAYS: [(u32, Option<u32>, Option<u32>, u32); 10] = [
    (CHARACTER, None, None, MKNOD),
    (BLOCK, None, None, MKNOD),
    (CHARACTER, Some(1), Some(3), ALL),
    (CHARACTER, Some(1), Some(5), ALL),
    (CHARACTER, Some(1), Some(7), ALL),
    (CHARACTER, Some(1), Some(8), ALL),
    (CHARACTER, Some(1), Some(9), ALL),
    (CHARACTER, Some(5), Some(0), ALL),
    (CHARACTER, Some(5), Some(2), ALL),
    (CHARACTER, Some(136), None, ALL),
];

/// The program for a spec's rules.
pub(crate) fn program(rules: &[LinuxDeviceCgroup]) -> Vec<EbpfInstruction> {
    let asked = rules.iter().map(|rule| Rule {
        kind: match rule.typ() {
            Some(LinuxDeviceType::B) => Some(BLOCK),
            Some(LinuxDeviceType::C | LinuxDeviceType::U) => Some(CHARACTER),
            Some(LinuxDeviceType::A | LinuxDeviceType::P) | None => None,
        },
        major: number(rule.major()),
        minor: number(rule.minor()),
        access: access(rule.access().as_deref()),
        allow: rule.allow(),
    });
    let always = ALWAYS.iter().map(|(kind, major, minor, access)| Rule {
        kind: Some(*kind),
        major: *major,
        minor: *minor,
        access: *access,
        allow: true,
    });
    let rules: Vec<Rule> = asked.chain(always).collect();
    encode(&rules)
}

/// Negative means any, as in `*`.
fn number(value: Option<i64>) -> Option<u32> {
    value.and_then(|value| u32::try_from(value).ok())
}

fn access(letters: Option<&str>) -> u32 {
    let letters = letters.unwrap_or_default();
    if letters.is_empty() {
        return ALL;
    }
    letters.chars().fold(0, |access, letter| {
        access
            | match letter {
                'm' => MKNOD,
                'r' => 2,
                'w' => 4,
                _ => 0,
            }
    })
}

const KIND: u64 = 2;
const ACCESS: u64 = 3;
const MAJOR: u64 = 4;
const MINOR: u64 = 5;
const SCRATCH: u64 = 6;

fn instruction(code: u64, to: u64, from: u64, offset: i16, value: u32) -> EbpfInstruction {
    code | to << 8 | from << 12 | u64::from(offset.cast_unsigned()) << 16 | u64::from(value) << 32
}

fn load(to: u64, offset: i16) -> EbpfInstruction {
    instruction(0x61, to, 1, offset, 0)
}
fn copy(to: u64, from: u64) -> EbpfInstruction {
    instruction(0xbc, to, from, 0, 0)
}
fn and(to: u64, value: u32) -> EbpfInstruction {
    instruction(0x54, to, 0, 0, value)
}
fn shift_right(to: u64, bits: u32) -> EbpfInstruction {
    instruction(0x74, to, 0, 0, bits)
}

fn encode(rules: &[Rule]) -> Vec<EbpfInstruction> {
    let mut program = vec![
        load(KIND, 0),
        copy(ACCESS, KIND),
        and(KIND, 0xffff),
        shift_right(ACCESS, 16),
        load(MAJOR, 4),
        load(MINOR, 8),
    ];
    for rule in rules.iter().rev() {
        // Each test jumps over the rest of its rule when it does not fit; how far is known when the rule is complete.
        const NOT_EQUAL: u64 = 0x56;
        const EQUAL: u64 = 0x16;
        let mut tests: Vec<Vec<EbpfInstruction>> = Vec::new();
        for (register, wanted) in [(KIND, rule.kind), (MAJOR, rule.major), (MINOR, rule.minor)] {
            if let Some(wanted) = wanted {
                tests.push(vec![instruction(NOT_EQUAL, register, 0, 0, wanted)]);
            }
        }
        if rule.access != ALL {
            // An allowance has to cover all that is asked for; a refusal any of it.
            let (mask, jump) =
                if rule.allow { (!rule.access & ALL, NOT_EQUAL) } else { (rule.access, EQUAL) };
            tests.push(vec![copy(SCRATCH, ACCESS), and(SCRATCH, mask), instruction(jump, SCRATCH, 0, 0, 0)]);
        }
        let always = tests.is_empty();
        let mut block: Vec<EbpfInstruction> = tests.concat();
        block.extend(answer(rule.allow));
        let length = block.len();
        for (at, code) in block.iter_mut().enumerate() {
            if matches!(*code & 0xff, NOT_EQUAL | EQUAL) {
                let over = u64::try_from(length - at - 1).unwrap_or_default();
                *code |= over << 16;
            }
        }
        program.extend(block);
        if always {
            // The kernel refuses a program with instructions that nothing leads to.
            return program;
        }
    }
    program.extend(answer(false));
    program
}

fn answer(allow: bool) -> [EbpfInstruction; 2] {
    [instruction(0xb7, 0, 0, 0, u32::from(allow)), instruction(0x95, 0, 0, 0, 0)]
}

#[cfg(test)]
mod tests {
    use super::*;

    /// What the program answers, by an interpreter of the few instructions it has.
    fn ask(program: &[EbpfInstruction], kind: u32, access: u32, major: u32, minor: u32) -> bool {
        let context = [access << 16 | kind, major, minor];
        let mut registers = [0_u32; 7];
        let mut at = 0;
        loop {
            let code = program[at];
            let (to, from) =
                (usize::try_from(code >> 8 & 15).unwrap(), usize::try_from(code >> 12 & 15).unwrap());
            let offset = usize::try_from(code >> 16 & 0xffff).unwrap();
            let value = u32::try_from(code >> 32).unwrap();
            at += 1;
            match code & 0xff {
                0x61 => registers[to] = context[offset / 4],
                0xbc => registers[to] = registers[from],
                0x54 => registers[to] &= value,
                0x74 => registers[to] >>= value,
                0xb7 => registers[to] = value,
                0x56 if registers[to] != value => at += offset,
                0x16 if registers[to] == value => at += offset,
                0x56 | 0x16 => {}
                0x95 => return registers[0] == 1,
                other => panic!("{other:#x}"),
            }
        }
    }

    fn rules(text: &str) -> Vec<EbpfInstruction> {
        program(&serde_json::from_str::<Vec<LinuxDeviceCgroup>>(text).unwrap())
    }

    #[test]
    fn later_rules_win_and_the_default_devices_are_always_allowed() {
        let program = rules(
            r#"[{"allow": false, "access": "rwm"},
                {"allow": true, "type": "c", "major": 10, "minor": 229, "access": "rw"},
                {"allow": true, "type": "b", "major": 8, "access": "r"},
                {"allow": false, "type": "b", "major": 8, "minor": 3, "access": "r"}]"#,
        );
        assert!(ask(&program, CHARACTER, 2, 10, 229) && ask(&program, CHARACTER, 6, 10, 229));
        assert!(!ask(&program, CHARACTER, 6, 10, 228));
        assert!(!ask(&program, BLOCK, 2, 10, 229));
        assert!(
            ask(&program, BLOCK, 2, 8, 0) && !ask(&program, BLOCK, 4, 8, 0) && !ask(&program, BLOCK, 6, 8, 0)
        );
        assert!(!ask(&program, BLOCK, 2, 8, 3));
        assert!(ask(&program, BLOCK, MKNOD, 8, 3), "nodes can be made, not used");
        assert!(ask(&program, CHARACTER, 6, 1, 3) && ask(&program, CHARACTER, 6, 136, 7));
        assert!(!ask(&program, CHARACTER, 6, 1, 1), "/dev/mem");
    }

    #[test]
    fn without_rules_nothing_but_the_default_devices() {
        let program = rules("[]");
        assert!(ask(&program, CHARACTER, 6, 1, 5) && !ask(&program, BLOCK, 2, 8, 0));
        let program = rules(r#"[{"allow": true, "access": "rwm"}]"#);
        assert!(ask(&program, BLOCK, 6, 8, 0));
    }
}
