//! From a profile to a program: what is decided about each number of each calling convention.

use std::collections::{BTreeMap, BTreeSet};

use oci_spec::runtime::{Arch, LinuxSeccomp, LinuxSeccompAction, LinuxSeccompFilterFlag, LinuxSyscall};

use crate::condition::Condition;
use crate::program::{
    ARCHITECTURE, Decision, Instruction, JUMP_EQUAL, JUMP_GREATER_EQUAL, LOAD, NUMBER, RETURN, search,
};

/// Longest program that the kernel takes (linux/filter.h, BPF_MAXINSNS).
const LONGEST: usize = 4096;

/// Set in numbers of the x32 convention (asm/unistd.h, __X32_SYSCALL_BIT).
const X32: u32 = 0x4000_0000;

// Answers (linux/seccomp.h).
const KILL_PROCESS: u32 = 0x8000_0000;
const KILL_THREAD: u32 = 0;
const TRAP: u32 = 0x0003_0000;
const ERRNO: u32 = 0x0005_0000;
const TRACE: u32 = 0x7ff0_0000;
const LOG: u32 = 0x7ffc_0000;
const ALLOW: u32 = 0x7fff_0000;

const EPERM: u32 = 1;
const ENOSYS: u32 = 38;

/// A profile, ready to be loaded.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Compiled {
    /// `struct sock_filter`s in the host's byte order.
    pub program: Vec<u8>,
    /// SECCOMP_FILTER_FLAG_… for seccomp(2).
    pub flags: u32,
}

/// Why a profile cannot be compiled.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum SeccompError {
    /// SCMP_ACT_NOTIFY.
    #[error("seccomp action {0} needs a listener, which a pod in a virtual machine cannot have")]
    Action(&'static str),
    /// An argument index above 5.
    #[error("seccomp rule for {name:?} compares argument {index}, but system calls have arguments 0 to 5")]
    Argument {
        /// The rule's first system call.
        name: String,
        /// As given.
        index: usize,
    },
    /// A flag that means something only with a listener.
    #[error("seccomp flag {0} is for listeners, which a pod in a virtual machine cannot have")]
    Flag(&'static str),
    /// More than the kernel takes.
    #[error("the seccomp profile needs {0} instructions, the kernel allows {LONGEST}")]
    TooLong(usize),
}

/// A calling convention: its number for the kernel (linux/audit.h) and its system calls.
struct Convention {
    audit: u32,
    number: fn(&str) -> Option<u32>,
    highest: fn() -> u32,
}

/// Compiles a profile for x86-64 and, where the profile lists it, 32-bit programs.
pub fn compile(profile: &LinuxSeccomp) -> Result<Compiled, SeccompError> {
    let default = answer(profile.default_action(), profile.default_errno_ret())?;
    let listed = profile.architectures().clone().unwrap_or_default();
    let x86_64 = listed.is_empty()
        || listed.iter().any(|arch| matches!(arch, Arch::ScmpArchX86_64 | Arch::ScmpArchNative));
    let x86 = listed.contains(&Arch::ScmpArchX86);
    let mut conventions = Vec::new();
    if x86_64 {
        conventions.push(Convention {
            audit: 0xc000_003e,
            number: |name| name.parse::<syscalls::x86_64::Sysno>().ok().map(|call| call as u32),
            highest: || syscalls::x86_64::Sysno::last() as u32,
        });
    }
    if x86 {
        conventions.push(Convention {
            audit: 0x4000_0003,
            number: |name| name.parse::<syscalls::x86::Sysno>().ok().map(|call| call as u32),
            highest: || syscalls::x86::Sysno::last() as u32,
        });
    }

    let mut code = vec![Instruction::plain(LOAD, ARCHITECTURE)];
    for convention in conventions {
        let ranges = ranges(profile.syscalls().as_deref().unwrap_or_default(), &convention, default)?;
        let mut block = vec![Instruction::plain(LOAD, NUMBER)];
        if convention.audit == 0xc000_003e {
            block.push(Instruction::branch(JUMP_GREATER_EQUAL, X32, 0, 1));
            block.push(Instruction::plain(RETURN, ERRNO | ENOSYS));
        }
        block.extend(search(&ranges));
        code.push(Instruction::branch(JUMP_EQUAL, convention.audit, 1, 0));
        let over = u32::try_from(block.len()).unwrap_or(u32::MAX);
        code.push(Instruction::plain(crate::program::JUMP, over));
        code.extend(block);
    }
    code.push(Instruction::plain(RETURN, KILL_PROCESS));
    if code.len() > LONGEST {
        return Err(SeccompError::TooLong(code.len()));
    }
    Ok(Compiled { program: bytes(&code), flags: flags(profile)? })
}

/// Ranges of numbers that are decided alike, ascending from 0.
fn ranges(
    rules: &[LinuxSyscall],
    convention: &Convention,
    default: u32,
) -> Result<Vec<(u32, Decision)>, SeccompError> {
    let mut decisions: BTreeMap<u32, Decision> = BTreeMap::new();
    let mut settled = BTreeSet::new();
    for rule in rules {
        let value = answer(rule.action(), rule.errno_ret())?;
        let alternatives = alternatives(rule)?;
        if value == default {
            continue;
        }
        for number in rule.names().iter().filter_map(|name| (convention.number)(name)) {
            if settled.contains(&number) {
                continue;
            }
            let decision = decisions.entry(number).or_insert_with(|| Decision::always(default));
            if alternatives.is_empty() {
                *decision = Decision::always(value);
                settled.insert(number);
            } else {
                decision.conditional.extend(alternatives.iter().map(|all| (all.clone(), value)));
            }
        }
    }
    let beyond = (convention.highest)() + 1;
    let unknown = if default & 0xffff_0000 == ERRNO { ERRNO | ENOSYS } else { default };
    let mut ranges: Vec<(u32, Decision)> = vec![(0, Decision::always(default))];
    let mut add = |start: u32, decision: Decision| match ranges.last_mut() {
        Some((last, previous)) if *last == start => *previous = decision,
        Some((_, previous)) if *previous == decision => {}
        _ => ranges.push((start, decision)),
    };
    for (number, decision) in decisions {
        add(number, decision);
        add(number + 1, Decision::always(default));
    }
    add(beyond, Decision::always(unknown));
    // Replacing the first of a range may have made it equal to the one before.
    ranges.dedup_by(|later, earlier| later.1 == earlier.1);
    Ok(ranges)
}

/// The conditions of a rule as alternatives of which each has all to hold. None: the rule is unconditional.
fn alternatives(rule: &LinuxSyscall) -> Result<Vec<Vec<Condition>>, SeccompError> {
    let mut conditions = Vec::new();
    for argument in rule.args().iter().flatten() {
        conditions.push(Condition::new(argument).ok_or_else(|| SeccompError::Argument {
            name: rule.names().first().cloned().unwrap_or_default(),
            index: argument.index(),
        })?);
    }
    let repeated = conditions
        .iter()
        .enumerate()
        .any(|(at, one)| conditions[..at].iter().any(|other| other.argument == one.argument));
    Ok(match (conditions.is_empty(), repeated) {
        (true, _) => Vec::new(),
        (false, true) => conditions.into_iter().map(|condition| vec![condition]).collect(),
        (false, false) => vec![conditions],
    })
}

fn answer(action: LinuxSeccompAction, errno: Option<u32>) -> Result<u32, SeccompError> {
    use LinuxSeccompAction as A;
    let data = |default: u32| errno.unwrap_or(default) & 0xffff;
    Ok(match action {
        A::ScmpActKill | A::ScmpActKillThread => KILL_THREAD,
        A::ScmpActKillProcess => KILL_PROCESS,
        A::ScmpActTrap => TRAP,
        A::ScmpActErrno => ERRNO | data(EPERM),
        A::ScmpActTrace => TRACE | data(EPERM),
        A::ScmpActLog => LOG,
        A::ScmpActAllow => ALLOW,
        A::ScmpActNotify => return Err(SeccompError::Action("SCMP_ACT_NOTIFY")),
    })
}

fn flags(profile: &LinuxSeccomp) -> Result<u32, SeccompError> {
    use LinuxSeccompFilterFlag as F;
    let mut flags = 0;
    for flag in profile.flags().iter().flatten() {
        flags |= match flag {
            // One thread loads it before the program runs.
            F::SeccompFilterFlagTsync => 0,
            F::SeccompFilterFlagLog => 2,
            F::SeccompFilterFlagSpecAllow => 4,
            F::SeccompFilterFlagWaitKillableRecv => {
                return Err(SeccompError::Flag("SECCOMP_FILTER_FLAG_WAIT_KILLABLE_RECV"));
            }
        };
    }
    Ok(flags)
}

fn bytes(code: &[Instruction]) -> Vec<u8> {
    let mut bytes = Vec::with_capacity(code.len() * 8);
    for instruction in code {
        bytes.extend(instruction.code.to_ne_bytes());
        bytes.extend([instruction.if_true, instruction.if_false]);
        bytes.extend(instruction.value.to_ne_bytes());
    }
    bytes
}

#[cfg(test)]
mod tests;
