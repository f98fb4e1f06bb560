//! One 512-byte tar header: where its fields are and how its numbers are written.
//!
//! Sources: POSIX.1-2017 pax, "ustar Interchange Format"; GNU tar's manual, "Basic Tar Format" (base-256 numbers,
//! type flags L, K, S). Where writers disagree we read as Go's archive/tar does, because that is what image scanners
//! and the other container runtimes read with: all shall see the same tree.

use crate::error::Fault;

pub(crate) const BLOCK: usize = 512;

/// What the magic says about the fields behind it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Format {
    V7,
    Ustar,
    Star,
    Gnu,
}

#[derive(Clone)]
pub(crate) struct Header(pub(crate) [u8; BLOCK]);

impl Header {
    pub(crate) fn is_zero(&self) -> bool {
        self.0.iter().all(|&byte| byte == 0)
    }

    /// The sum of all bytes, the checksum field itself taken as spaces; old writers summed signed bytes.
    pub(crate) fn verify(&self) -> Result<(), Fault> {
        let written = number(&self.0[148..156], "checksum")?;
        let (mut unsigned, mut signed) = (0_i64, 0_i64);
        for (index, &byte) in self.0.iter().enumerate() {
            let byte = if (148..156).contains(&index) { b' ' } else { byte };
            unsigned += i64::from(byte);
            signed += i64::from(byte.cast_signed());
        }
        if written == unsigned || written == signed { Ok(()) } else { Err(Fault::Checksum) }
    }

    fn format(&self) -> Format {
        match (&self.0[257..263], &self.0[263..265], &self.0[508..512]) {
            (b"ustar\0", _, b"tar\0") => Format::Star,
            (b"ustar\0", ..) => Format::Ustar,
            (b"ustar ", b" \0", _) => Format::Gnu,
            _ => Format::V7,
        }
    }

    pub(crate) fn is_gnu(&self) -> bool {
        self.format() == Format::Gnu
    }

    pub(crate) fn type_flag(&self) -> u8 {
        self.0[156]
    }

    pub(crate) fn name(&self) -> Vec<u8> {
        let name = text(&self.0[..100]);
        let prefix = match self.format() {
            Format::Ustar => text(&self.0[345..500]),
            Format::Star => text(&self.0[345..476]),
            Format::V7 | Format::Gnu => b"",
        };
        if prefix.is_empty() { name.to_vec() } else { [prefix, b"/", name].concat() }
    }

    pub(crate) fn link_name(&self) -> Vec<u8> {
        text(&self.0[157..257]).to_vec()
    }

    pub(crate) fn mode(&self) -> Result<i64, Fault> {
        number(&self.0[100..108], "mode")
    }

    pub(crate) fn uid(&self) -> Result<i64, Fault> {
        number(&self.0[108..116], "uid")
    }

    pub(crate) fn gid(&self) -> Result<i64, Fault> {
        number(&self.0[116..124], "gid")
    }

    pub(crate) fn size(&self) -> Result<u64, Fault> {
        length(&self.0[124..136], "size")
    }

    pub(crate) fn mtime(&self) -> Result<i64, Fault> {
        number(&self.0[136..148], "mtime")
    }

    /// Major and minor number of a device.
    pub(crate) fn device(&self) -> Result<(u32, u32), Fault> {
        let field = |range: std::ops::Range<usize>, limit: u32| {
            let value = u32::try_from(number(&self.0[range], "device number")?).ok();
            value.filter(|&value| value <= limit).ok_or(Fault::Number("device number"))
        };
        // Twelve and twenty bits are what the kernel's dev_t holds (include/linux/kdev_t.h).
        Ok((field(329..337, 0xfff)?, field(337..345, 0xf_ffff)?))
    }
}

/// A field up to its first NUL.
pub(crate) fn text(field: &[u8]) -> &[u8] {
    let end = field.iter().position(|&byte| byte == 0).unwrap_or(field.len());
    &field[..end]
}

/// Octal digits between spaces or NULs (an empty field is 0), or base-256 if the first bit is set.
pub(crate) fn number(field: &[u8], what: &'static str) -> Result<i64, Fault> {
    let fault = || Fault::Number(what);
    if let Some(first) = field.first().filter(|&&first| first & 0x80 != 0) {
        // Two's complement, the marker bit taken out: 0x40 is the sign.
        let negative = first & 0x40 != 0;
        let mut value = i128::from(if negative { -1_i8 } else { 0 });
        for (index, &byte) in field.iter().enumerate() {
            let byte = match (index, negative) {
                (0, true) => byte | 0x80,
                (0, false) => byte & 0x7f,
                _ => byte,
            };
            value = (value << 8) | i128::from(byte);
        }
        return i64::try_from(value).map_err(|_| fault());
    }
    let is_padding = |byte: &u8| matches!(byte, b' ' | 0);
    let Some(start) = field.iter().position(|byte| !is_padding(byte)) else { return Ok(0) };
    let end = field.iter().rposition(|byte| !is_padding(byte)).map_or(start, |end| end + 1);
    text(&field[start..end]).iter().try_fold(0_i64, |value, digit| match digit {
        b'0'..=b'7' => value
            .checked_mul(8)
            .and_then(|value| value.checked_add(i64::from(digit - b'0')))
            .ok_or_else(fault),
        _ => Err(fault()),
    })
}

/// A number that must not be negative.
pub(crate) fn length(field: &[u8], what: &'static str) -> Result<u64, Fault> {
    u64::try_from(number(field, what)?).map_err(|_| Fault::Number(what))
}
