//! One 512-byte header block (POSIX.1-1988 ustar, with what GNU tar and star made of it).

use super::number::number;
use crate::error::TarProblem;

pub(super) const BLOCK: usize = 512;

/// A header block whose checksum is right.
#[derive(Clone, Copy)]
pub(super) struct Header<'b>(&'b [u8; BLOCK]);

/// What the magic says about the rest.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Format {
    /// No magic: the name field is all there is.
    V7,
    Ustar,
    /// ustar with a shorter prefix and times behind it.
    Star,
    /// Where ustar has a prefix, GNU has times and a sparse map.
    Gnu,
}

impl<'b> Header<'b> {
    /// Checks the sum. Some old tars added signed bytes.
    pub(super) fn check(block: &'b [u8; BLOCK]) -> Result<Self, TarProblem> {
        let stored = number(&block[148..156]).ok_or(TarProblem::Number("checksum"))?;
        let summed =
            || block.iter().enumerate().map(|(at, byte)| if (148..156).contains(&at) { b' ' } else { *byte });
        let unsigned: i64 = summed().map(i64::from).sum();
        let signed: i64 = summed().map(|byte| i64::from(byte.cast_signed())).sum();
        if stored == unsigned || stored == signed { Ok(Self(block)) } else { Err(TarProblem::Checksum) }
    }

    pub(super) fn format(self) -> Format {
        match (&self.0[257..263], &self.0[508..512]) {
            (b"ustar\0", b"tar\0") => Format::Star,
            (b"ustar\0", _) => Format::Ustar,
            (b"ustar ", _) if &self.0[263..265] == b" \0" => Format::Gnu,
            _ => Format::V7,
        }
    }

    /// With the prefix, where there is one.
    pub(super) fn name(self) -> Vec<u8> {
        let name = text(&self.0[..100]);
        let prefix = match self.format() {
            Format::Ustar => text(&self.0[345..500]),
            Format::Star => text(&self.0[345..476]),
            Format::Gnu | Format::V7 => &[],
        };
        if prefix.is_empty() {
            return name.to_vec();
        }
        [prefix, b"/", name].concat()
    }

    pub(super) fn link(self) -> &'b [u8] {
        text(&self.0[157..257])
    }

    pub(super) fn kind(self) -> u8 {
        self.0[156]
    }

    pub(super) fn mode(self) -> Result<i64, TarProblem> {
        self.field("mode", 100, 8)
    }

    pub(super) fn uid(self) -> Result<i64, TarProblem> {
        self.field("uid", 108, 8)
    }

    pub(super) fn gid(self) -> Result<i64, TarProblem> {
        self.field("gid", 116, 8)
    }

    pub(super) fn size(self) -> Result<i64, TarProblem> {
        self.field("size", 124, 12)
    }

    pub(super) fn mtime(self) -> Result<i64, TarProblem> {
        self.field("mtime", 136, 12)
    }

    pub(super) fn device(self) -> Result<(i64, i64), TarProblem> {
        Ok((self.field("devmajor", 329, 8)?, self.field("devminor", 337, 8)?))
    }

    /// GNU's sparse fields: four map entries, whether more follow, the file's size with its holes.
    pub(super) fn gnu_sparse(self) -> Result<(&'b [u8], bool, i64), TarProblem> {
        Ok((&self.0[386..482], self.0[482] != 0, self.field("realsize", 483, 12)?))
    }

    fn field(self, name: &'static str, start: usize, length: usize) -> Result<i64, TarProblem> {
        number(&self.0[start..start + length]).ok_or(TarProblem::Number(name))
    }
}

/// Up to the first zero byte.
pub(super) fn text(field: &[u8]) -> &[u8] {
    &field[..field.iter().position(|&byte| byte == 0).unwrap_or(field.len())]
}
