//! Pax extended headers: `LENGTH KEY=VALUE\n` records that override the fields of the next header.
//!
//! Source: POSIX.1-2017 pax, "pax Extended Header"; `SCHILY.xattr.` is star's, `GNU.sparse.` is GNU tar's.

use rustix::fs::Timespec;

use crate::error::Fault;
use crate::sparse::PaxSparse;

/// The largest extended header accepted, in bytes; the same as Go's archive/tar.
pub(crate) const MAX_HEADER: u64 = 1 << 20;
/// The kernel's XATTR_NAME_MAX and XATTR_SIZE_MAX (include/uapi/linux/limits.h).
const MAX_XATTR_NAME: usize = 255;
const MAX_XATTR_VALUE: usize = 65536;
const MAX_XATTRS: usize = 256;

/// Key and value.
type Record<'a> = (&'a [u8], &'a [u8]);

/// An extended attribute: name and value.
pub(crate) type Xattr = (Vec<u8>, Vec<u8>);

/// What the records of one header say; a key without a record leaves the header's own field in force.
#[derive(Debug, Default)]
pub(crate) struct Pax {
    pub(crate) path: Option<Vec<u8>>,
    pub(crate) link_path: Option<Vec<u8>>,
    pub(crate) size: Option<u64>,
    pub(crate) uid: Option<i64>,
    pub(crate) gid: Option<i64>,
    pub(crate) mtime: Option<Timespec>,
    pub(crate) xattrs: Vec<Xattr>,
    pub(crate) sparse: PaxSparse,
}

impl Pax {
    pub(crate) fn parse(mut records: &[u8]) -> Result<Self, Fault> {
        let mut pax = Self::default();
        while !records.is_empty() {
            let (record, rest) = split_record(records)?;
            pax.record(record.0, record.1)?;
            records = rest;
        }
        Ok(pax)
    }

    fn record(&mut self, key: &[u8], value: &[u8]) -> Result<(), Fault> {
        // An empty value takes an earlier record back.
        let set = !value.is_empty();
        match key {
            b"path" => self.path = set.then(|| without_nul(value)).transpose()?,
            b"linkpath" => self.link_path = set.then(|| without_nul(value)).transpose()?,
            b"size" => self.size = set.then(|| unsigned(value)).transpose()?,
            b"uid" => self.uid = set.then(|| signed(value)).transpose()?,
            b"gid" => self.gid = set.then(|| signed(value)).transpose()?,
            b"mtime" => self.mtime = set.then(|| time(value)).transpose()?,
            _ => {
                if let Some(name) = key.strip_prefix(b"SCHILY.xattr.") {
                    self.xattr(name, value)?;
                } else if let Some(key) = key.strip_prefix(b"GNU.sparse.") {
                    self.sparse.record(key, value)?;
                }
            }
        }
        Ok(())
    }

    fn xattr(&mut self, name: &[u8], value: &[u8]) -> Result<(), Fault> {
        if name.is_empty() || name.contains(&0) {
            return Err(Fault::Xattr);
        }
        for (what, size, limit) in [
            ("extended attribute's name", name.len(), MAX_XATTR_NAME),
            ("extended attribute", value.len(), MAX_XATTR_VALUE),
            ("number of extended attributes", self.xattrs.len() + 1, MAX_XATTRS),
        ] {
            if size > limit {
                return Err(Fault::TooLarge { what, limit: limit as u64 });
            }
        }
        self.xattrs.retain(|(earlier, _)| earlier != name);
        self.xattrs.push((name.to_vec(), value.to_vec()));
        Ok(())
    }
}

/// One record, key and value, and what follows it.
fn split_record(records: &[u8]) -> Result<(Record<'_>, &[u8]), Fault> {
    let space = records.iter().take(20).position(|&byte| byte == b' ').ok_or(Fault::Pax)?;
    let length = usize::try_from(unsigned(&records[..space])?).map_err(|_| Fault::Pax)?;
    if length > records.len() || length < space + 2 {
        return Err(Fault::Pax);
    }
    let (record, rest) = records.split_at(length);
    let record = record[space + 1..].strip_suffix(b"\n").ok_or(Fault::Pax)?;
    let equals = record.iter().position(|&byte| byte == b'=').ok_or(Fault::Pax)?;
    let (key, value) = (&record[..equals], &record[equals + 1..]);
    if key.is_empty() || key.contains(&0) {
        return Err(Fault::Pax);
    }
    Ok(((key, value), rest))
}

fn without_nul(value: &[u8]) -> Result<Vec<u8>, Fault> {
    if value.contains(&0) { Err(Fault::Name) } else { Ok(value.to_vec()) }
}

/// Decimal digits that fit a non-negative `i64`.
pub(crate) fn unsigned(digits: &[u8]) -> Result<u64, Fault> {
    if digits.is_empty() {
        return Err(Fault::Pax);
    }
    digits
        .iter()
        .try_fold(0_i64, |value, digit| match digit {
            b'0'..=b'9' => value.checked_mul(10)?.checked_add(i64::from(digit - b'0')),
            _ => None,
        })
        .map(i64::cast_unsigned)
        .ok_or(Fault::Pax)
}

fn signed(value: &[u8]) -> Result<i64, Fault> {
    let (negative, digits) = match value.strip_prefix(b"-") {
        Some(digits) => (true, digits),
        None => (false, value),
    };
    let magnitude = unsigned(digits)?.cast_signed();
    Ok(if negative { -magnitude } else { magnitude })
}

/// `[-]SECONDS[.FRACTION]`; what is finer than a nanosecond is cut off.
fn time(value: &[u8]) -> Result<Timespec, Fault> {
    let (negative, digits) = match value.strip_prefix(b"-") {
        Some(digits) => (true, digits),
        None => (false, value),
    };
    let (seconds, fraction) = match digits.iter().position(|&byte| byte == b'.') {
        Some(dot) => (&digits[..dot], &digits[dot + 1..]),
        None => (digits, &b""[..]),
    };
    let seconds = unsigned(seconds)?.cast_signed();
    if !fraction.iter().all(u8::is_ascii_digit) {
        return Err(Fault::Pax);
    }
    let nanos = (0..9).fold(0_i64, |nanos, place| {
        nanos * 10 + fraction.get(place).map_or(0, |digit| i64::from(digit - b'0'))
    });
    Ok(match (negative, nanos) {
        (false, _) => Timespec { tv_sec: seconds, tv_nsec: nanos },
        (true, 0) => Timespec { tv_sec: -seconds, tv_nsec: 0 },
        // The kernel counts nanoseconds forward from the second before.
        (true, _) => Timespec { tv_sec: -seconds - 1, tv_nsec: 1_000_000_000 - nanos },
    })
}

#[cfg(test)]
mod tests {
    use super::{Pax, time};

    #[test]
    fn times_have_nanoseconds_and_may_lie_before_1970() {
        for (text, seconds, nanos) in [
            ("1", 1, 0),
            ("1.5", 1, 500_000_000),
            ("12.0000000019", 12, 1),
            ("-1.25", -2, 750_000_000),
            ("-3", -3, 0),
            ("0.", 0, 0),
        ] {
            let time = time(text.as_bytes()).expect(text);
            assert_eq!((time.tv_sec, time.tv_nsec), (seconds, nanos), "{text}");
        }
        for text in ["", "-", ".5", "1.x", "+1", "99999999999999999999", "1 "] {
            assert!(time(text.as_bytes()).is_err(), "{text}");
        }
    }

    #[test]
    fn malformed_records_are_refused() {
        for records in [
            "5 a=b",
            "7 a=b\n",
            "0 a=b\n",
            "3 \n",
            "6 =ab\n",
            "6 abc\n",
            "-6 a=b\n",
            "x",
            "6 a=b\n6",
            " a=b\n",
            "99999999999999999999999 a=b\n",
        ] {
            assert!(Pax::parse(records.as_bytes()).is_err(), "{records:?}");
        }
        let pax = Pax::parse(b"9 path=x\n8 uid=7\n7 uid=\n").expect("valid records");
        assert_eq!(pax.path.as_deref(), Some(&b"x"[..]));
        assert_eq!(pax.uid, None);
    }
}
