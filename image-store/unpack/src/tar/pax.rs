//! pax extended headers (POSIX.1-2001, "pax Extended Header"): records `LENGTH KEY=VALUE\n`.

use super::number::decimal;
use super::sparse::Segment;
use crate::error::TarProblem;

/// The kernel's XATTR_NAME_MAX and XATTR_SIZE_MAX, bytes.
const XATTR_NAME_MAX: usize = 255;
const XATTR_VALUE_MAX: usize = 64 << 10;

const XATTR: &[u8] = b"SCHILY.xattr.";

/// What an `x` header says about the next entry. What it does not say stays as the header has it.
#[derive(Debug, Default)]
pub(super) struct Pax {
    pub(super) path: Option<Vec<u8>>,
    pub(super) link: Option<Vec<u8>>,
    pub(super) uid: Option<u64>,
    pub(super) gid: Option<u64>,
    pub(super) size: Option<u64>,
    pub(super) mtime: Option<Time>,
    pub(super) xattrs: Vec<(Vec<u8>, Vec<u8>)>,
    pub(super) sparse: PaxSparse,
}

/// GNU's three generations of sparse files in pax headers.
#[derive(Debug, Default)]
pub(super) struct PaxSparse {
    /// 1.0: the map is in front of the data.
    pub(super) version: Option<(u64, u64)>,
    pub(super) name: Option<Vec<u8>>,
    /// `GNU.sparse.realsize` (1.0) or `GNU.sparse.size` (0.x).
    pub(super) real_size: Option<u64>,
    /// Announced number of segments (0.x).
    pub(super) count: Option<u64>,
    /// The map (0.1), or what the repeated records say (0.0).
    pub(super) map: Vec<Segment>,
    offset: Option<u64>,
}

/// A point in time; the nanoseconds count upwards, also before the epoch.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub(crate) struct Time {
    pub(crate) seconds: i64,
    pub(crate) nanoseconds: u32,
}

impl Pax {
    /// Reads all records of a header.
    pub(super) fn parse(mut bytes: &[u8]) -> Result<Self, TarProblem> {
        let mut pax = Self::default();
        while !bytes.is_empty() {
            let (key, value, rest) = record(bytes).ok_or(TarProblem::Pax)?;
            bytes = rest;
            pax.set(key, value)?;
        }
        if pax.sparse.offset.is_some() {
            return Err(TarProblem::Sparse);
        }
        Ok(pax)
    }

    fn set(&mut self, key: &[u8], value: &[u8]) -> Result<(), TarProblem> {
        match key {
            b"path" => self.path = name(value, "path")?,
            b"linkpath" => self.link = name(value, "linkpath")?,
            b"uid" => self.uid = count(value, "uid")?,
            b"gid" => self.gid = count(value, "gid")?,
            b"size" => self.size = count(value, "size")?,
            b"mtime" if value.is_empty() => self.mtime = None,
            b"mtime" => self.mtime = Some(time(value).ok_or(TarProblem::PaxValue("mtime"))?),
            _ => {
                if let Some(attribute) = key.strip_prefix(XATTR) {
                    return self.xattr(attribute, value);
                }
                if let Some(field) = key.strip_prefix(b"GNU.sparse.") {
                    return self.sparse.set(field, value);
                }
            }
        }
        Ok(())
    }

    fn xattr(&mut self, key: &[u8], value: &[u8]) -> Result<(), TarProblem> {
        if key.is_empty() || key.contains(&0) {
            return Err(TarProblem::PaxValue("SCHILY.xattr"));
        }
        if key.len() > XATTR_NAME_MAX || value.len() > XATTR_VALUE_MAX {
            return Err(TarProblem::XattrSize);
        }
        self.xattrs.retain(|(known, _)| known != key);
        self.xattrs.push((key.to_vec(), value.to_vec()));
        Ok(())
    }
}

impl PaxSparse {
    fn set(&mut self, field: &[u8], value: &[u8]) -> Result<(), TarProblem> {
        let number = || decimal(value).ok_or(TarProblem::Sparse);
        match field {
            b"major" => self.version = Some((number()?, self.version.map_or(0, |(_, minor)| minor))),
            b"minor" => self.version = Some((self.version.map_or(0, |(major, _)| major), number()?)),
            b"name" => self.name = name(value, "GNU.sparse.name")?,
            b"size" | b"realsize" => self.real_size = Some(number()?),
            b"numblocks" => self.count = Some(number()?),
            b"map" => {
                let mut numbers = value.split(|&byte| byte == b',').map(decimal);
                self.map.clear();
                while let Some(offset) = numbers.next() {
                    let length = numbers.next().flatten();
                    let (Some(offset), Some(length)) = (offset, length) else {
                        return Err(TarProblem::Sparse);
                    };
                    self.map.push(Segment { offset, length });
                }
            }
            b"offset" => {
                if self.offset.replace(number()?).is_some() {
                    return Err(TarProblem::Sparse);
                }
            }
            b"numbytes" => {
                let offset = self.offset.take().ok_or(TarProblem::Sparse)?;
                self.map.push(Segment { offset, length: number()? });
            }
            _ => {}
        }
        Ok(())
    }
}

/// Splits the first record off.
fn record(bytes: &[u8]) -> Option<(&[u8], &[u8], &[u8])> {
    let space = bytes.iter().take(20).position(|&byte| byte == b' ')?;
    let length = usize::try_from(decimal(&bytes[..space])?).ok()?;
    if length <= space + 1 || length > bytes.len() {
        return None;
    }
    let (record, rest) = bytes.split_at(length);
    let (last, record) = record[space + 1..].split_last()?;
    let equals = record.iter().position(|&byte| byte == b'=')?;
    (*last == b'\n' && equals > 0).then(|| (&record[..equals], &record[equals + 1..], rest))
}

/// An empty value takes the record back.
fn name(value: &[u8], key: &'static str) -> Result<Option<Vec<u8>>, TarProblem> {
    if value.contains(&0) {
        return Err(TarProblem::PaxValue(key));
    }
    Ok((!value.is_empty()).then(|| value.to_vec()))
}

fn count(value: &[u8], key: &'static str) -> Result<Option<u64>, TarProblem> {
    if value.is_empty() {
        return Ok(None);
    }
    decimal(value).map(Some).ok_or(TarProblem::PaxValue(key))
}

/// `[-]SECONDS[.FRACTION]`; digits beyond nanoseconds are dropped.
fn time(text: &[u8]) -> Option<Time> {
    let (negative, text) = match text.strip_prefix(b"-") {
        Some(rest) => (true, rest),
        None => (false, text),
    };
    let dot = text.iter().position(|&byte| byte == b'.');
    let whole = &text[..dot.unwrap_or(text.len())];
    let fraction = dot.map_or(&b""[..], |at| &text[at + 1..]);
    if !fraction.iter().all(u8::is_ascii_digit) {
        return None;
    }
    let seconds = i64::try_from(decimal(whole)?).ok()?;
    let digits = fraction.iter().copied().chain(std::iter::repeat(b'0')).take(9);
    let nanoseconds = digits.fold(0, |value, digit| value * 10 + u32::from(digit - b'0'));
    Some(match (negative, nanoseconds) {
        (false, _) => Time { seconds, nanoseconds },
        (true, 0) => Time { seconds: -seconds, nanoseconds: 0 },
        (true, _) => Time { seconds: -seconds - 1, nanoseconds: 1_000_000_000 - nanoseconds },
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn records() {
        let pax = Pax::parse(b"12 path=a/b\n20 mtime=1.500000000\n30 SCHILY.xattr.user.a=x\ny=\0\xff\n")
            .unwrap_or_else(|problem| panic!("{problem}"));
        assert_eq!(pax.path.as_deref(), Some(&b"a/b"[..]));
        assert_eq!(pax.mtime, Some(Time { seconds: 1, nanoseconds: 500_000_000 }));
        assert_eq!(pax.xattrs, vec![(b"user.a".to_vec(), b"x\ny=\0\xff".to_vec())]);
    }

    #[test]
    fn malformed_records() {
        for garbage in [
            &b"x"[..],
            b"5 a=b",
            b"5 ab\n",
            b"6 a=b\n\n",
            b"0 a=b\n",
            b"2 \n",
            b"3 =\n",
            b"99999999999999999999 a=b\n",
            b"100 a=b\n",
            b"-6 a=b\n",
            b"+6 a=b\n",
            b"5  a=\n",
            b"\0",
        ] {
            assert!(Pax::parse(garbage).is_err(), "{}", garbage.escape_ascii());
        }
        for value in ["12 uid=-100\n", "11 uid=0x1\n", "15 size=1e1000\n", "12 path=a\0b\n", "13 mtime=1.x\n"]
        {
            assert!(Pax::parse(value.as_bytes()).is_err(), "{value:?}");
        }
    }

    #[test]
    fn times() {
        assert_eq!(time(b"1"), Some(Time { seconds: 1, nanoseconds: 0 }));
        assert_eq!(time(b"1.000000001999"), Some(Time { seconds: 1, nanoseconds: 1 }));
        assert_eq!(time(b"-1.25"), Some(Time { seconds: -2, nanoseconds: 750_000_000 }));
        assert_eq!(time(b"-3"), Some(Time { seconds: -3, nanoseconds: 0 }));
        assert_eq!(time(b"1."), Some(Time { seconds: 1, nanoseconds: 0 }));
        for garbage in ["", "-", ".5", "1.2.3", "1.-2", "99999999999999999999"] {
            assert_eq!(time(garbage.as_bytes()), None, "{garbage}");
        }
    }
}
