//! Comparisons of arguments. They are 64 bits wide and an instruction sees 32, so each is made of two.

use oci_spec::runtime::{LinuxSeccompArg, LinuxSeccompOperator};

use crate::program::{AND, Instruction, JUMP_EQUAL, JUMP_GREATER, JUMP_GREATER_EQUAL, LOAD, RETURN};

/// One comparison: of which argument, how, and with what.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Condition {
    pub(crate) argument: u32,
    comparison: Comparison,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Comparison {
    NotEqual(u64),
    Less(u64),
    LessEqual(u64),
    Equal(u64),
    GreaterEqual(u64),
    Greater(u64),
    Masked { mask: u64, value: u64 },
}

/// Where a comparison goes when it is decided; turned into distances when its length is known.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum To {
    Next,
    Holds,
    Fails,
}

impl Condition {
    /// `None` for an argument that no system call has.
    pub(crate) fn new(argument: &LinuxSeccompArg) -> Option<Self> {
        use LinuxSeccompOperator as O;
        let value = argument.value();
        let comparison = match argument.op() {
            O::ScmpCmpNe => Comparison::NotEqual(value),
            O::ScmpCmpLt => Comparison::Less(value),
            O::ScmpCmpLe => Comparison::LessEqual(value),
            O::ScmpCmpEq => Comparison::Equal(value),
            O::ScmpCmpGe => Comparison::GreaterEqual(value),
            O::ScmpCmpGt => Comparison::Greater(value),
            O::ScmpCmpMaskedEq => {
                Comparison::Masked { mask: value, value: argument.value_two().unwrap_or(0) }
            }
        };
        let index = u32::try_from(argument.index()).ok().filter(|index| *index < 6)?;
        Some(Self { argument: index, comparison })
    }

    /// Its instructions; a branch says where it goes.
    fn instructions(self) -> Vec<(Instruction, To, To)> {
        // struct seccomp_data: the arguments begin at 16; the low half comes first (little-endian).
        let low_at = 16 + 8 * self.argument;
        let plain = |code, value| (Instruction::plain(code, value), To::Next, To::Next);
        let load = |offset| plain(LOAD, offset);
        let branch =
            |code, value, if_true, if_false| (Instruction::branch(code, value, 0, 0), if_true, if_false);
        let halves = |value: u64| {
            let [.., a, b, c, d] = value.to_be_bytes();
            let high = u32::try_from(value >> 32).unwrap_or_default();
            (high, u32::from_be_bytes([a, b, c, d]))
        };
        // The high half decides unless it is equal; then the low one does.
        let ordered = |value, greater: To, less: To, low_code, low_true, low_false| {
            let (high, low) = halves(value);
            vec![
                load(low_at + 4),
                branch(JUMP_GREATER, high, greater, To::Next),
                branch(JUMP_EQUAL, high, To::Next, less),
                load(low_at),
                branch(low_code, low, low_true, low_false),
            ]
        };
        match self.comparison {
            Comparison::Equal(value) => Self::masked(u64::MAX, value, low_at),
            Comparison::Masked { mask, value } => Self::masked(mask, value, low_at),
            Comparison::NotEqual(value) => {
                let (high, low) = halves(value);
                vec![
                    load(low_at + 4),
                    branch(JUMP_EQUAL, high, To::Next, To::Holds),
                    load(low_at),
                    branch(JUMP_EQUAL, low, To::Fails, To::Holds),
                ]
            }
            Comparison::Greater(value) => {
                ordered(value, To::Holds, To::Fails, JUMP_GREATER, To::Holds, To::Fails)
            }
            Comparison::GreaterEqual(value) => {
                ordered(value, To::Holds, To::Fails, JUMP_GREATER_EQUAL, To::Holds, To::Fails)
            }
            Comparison::Less(value) => {
                ordered(value, To::Fails, To::Holds, JUMP_GREATER_EQUAL, To::Fails, To::Holds)
            }
            Comparison::LessEqual(value) => {
                ordered(value, To::Fails, To::Holds, JUMP_GREATER, To::Fails, To::Holds)
            }
        }
    }

    fn masked(mask: u64, value: u64, low_at: u32) -> Vec<(Instruction, To, To)> {
        let mut code = Vec::new();
        for (offset, shift) in [(low_at + 4, 32), (low_at, 0)] {
            let half = |value: u64| u32::try_from(value >> shift & u64::from(u32::MAX)).unwrap_or_default();
            code.push((Instruction::plain(LOAD, offset), To::Next, To::Next));
            if half(mask) != u32::MAX {
                code.push((Instruction::plain(AND, half(mask)), To::Next, To::Next));
            }
            let holds = if shift == 0 { To::Holds } else { To::Next };
            code.push((Instruction::branch(JUMP_EQUAL, half(value), 0, 0), holds, To::Fails));
        }
        code
    }
}

/// Returns `value` when every condition holds, else goes on behind.
pub(crate) fn guarded(conditions: &[Condition], value: u32) -> Vec<Instruction> {
    let blocks: Vec<_> = conditions.iter().map(|condition| condition.instructions()).collect();
    let total: usize = blocks.iter().map(Vec::len).sum::<usize>() + 1;
    let mut code = Vec::with_capacity(total);
    let mut end_of_block = 0;
    for block in blocks {
        end_of_block += block.len();
        for (mut instruction, if_true, if_false) in block {
            let at = code.len();
            // At most six conditions of seven instructions: far within a byte.
            let distance = |to| match to {
                To::Next => 0,
                To::Holds => end_of_block - at - 1,
                To::Fails => total - at - 1,
            };
            let byte = |distance| u8::try_from(distance).unwrap_or(u8::MAX);
            (instruction.if_true, instruction.if_false) = (byte(distance(if_true)), byte(distance(if_false)));
            code.push(instruction);
        }
    }
    code.push(Instruction::plain(RETURN, value));
    code
}
