//! Instructions of classic BPF (linux/filter.h, linux/bpf_common.h) and the search for a number.

use crate::condition::Condition;

/// One instruction, as `struct sock_filter`.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Instruction {
    pub(crate) code: u16,
    pub(crate) if_true: u8,
    pub(crate) if_false: u8,
    pub(crate) value: u32,
}

pub(crate) const LOAD: u16 = 0x20;
pub(crate) const JUMP: u16 = 0x05;
pub(crate) const JUMP_EQUAL: u16 = 0x15;
pub(crate) const JUMP_GREATER: u16 = 0x25;
pub(crate) const JUMP_GREATER_EQUAL: u16 = 0x35;
pub(crate) const AND: u16 = 0x54;
pub(crate) const RETURN: u16 = 0x06;

/// Offsets in `struct seccomp_data`.
pub(crate) const NUMBER: u32 = 0;
pub(crate) const ARCHITECTURE: u32 = 4;

impl Instruction {
    pub(crate) fn plain(code: u16, value: u32) -> Self {
        Self { code, if_true: 0, if_false: 0, value }
    }

    pub(crate) fn branch(code: u16, value: u32, if_true: u8, if_false: u8) -> Self {
        Self { code, if_true, if_false, value }
    }
}

/// What is decided about a number.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Decision {
    /// Tried in order: all conditions of one hold, then its value is the answer.
    pub(crate) conditional: Vec<(Vec<Condition>, u32)>,
    pub(crate) otherwise: u32,
}

impl Decision {
    pub(crate) fn always(value: u32) -> Self {
        Self { conditional: Vec::new(), otherwise: value }
    }

    fn instructions(&self) -> Vec<Instruction> {
        let mut code = Vec::new();
        for (conditions, value) in &self.conditional {
            code.extend(crate::condition::guarded(conditions, *value));
        }
        code.push(Instruction::plain(RETURN, self.otherwise));
        code
    }
}

/// Finds the decision for the loaded number. `ranges` are the first numbers of ranges with their decisions, ascending, the first from 0.
pub(crate) fn search(ranges: &[(u32, Decision)]) -> Vec<Instruction> {
    match ranges {
        [] => Vec::new(),
        [(_, decision)] => decision.instructions(),
        _ => {
            let (low, high) = ranges.split_at(ranges.len() / 2);
            let (low, high_code) = (search(low), search(high));
            let mut code = Vec::with_capacity(low.len() + high_code.len() + 2);
            let first_high = high[0].0;
            if let Ok(over) = u8::try_from(high_code.len()) {
                code.push(Instruction::branch(JUMP_GREATER_EQUAL, first_high, 0, over));
            } else {
                code.push(Instruction::branch(JUMP_GREATER_EQUAL, first_high, 1, 0));
                // Programs are limited to 4096 instructions, far below what this can express.
                let over = u32::try_from(high_code.len()).unwrap_or(u32::MAX);
                code.push(Instruction::plain(JUMP, over));
            }
            code.extend(high_code);
            code.extend(low);
            code
        }
    }
}
