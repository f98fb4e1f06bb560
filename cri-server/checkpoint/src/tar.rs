//! Writing tar: ustar headers, with pax records before them for what does not fit (POSIX.1-2017, pax, "ustar Interchange Format" and "pax
//! Extended Header"). Extended attributes are records `SCHILY.xattr.NAME`, as in images' layers.

use std::io::{self, Read, Write};

const BLOCK: usize = 512;

/// What an entry is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Kind<'a> {
    Directory,
    /// Of so many bytes, which follow.
    File(u64),
    /// To this target.
    Symlink(&'a [u8]),
    /// To an entry before it.
    Hardlink(&'a [u8]),
    Character(u32, u32),
    Block(u32, u32),
    Fifo,
}

/// One entry.
#[derive(Debug, Clone)]
pub(crate) struct Entry<'a> {
    /// Relative.
    pub(crate) path: &'a [u8],
    pub(crate) kind: Kind<'a>,
    pub(crate) mode: u32,
    pub(crate) uid: u32,
    pub(crate) gid: u32,
    /// Seconds since the epoch.
    pub(crate) modified: i64,
    pub(crate) attributes: Vec<(Vec<u8>, Vec<u8>)>,
}

/// A tar stream.
#[derive(Debug)]
pub(crate) struct Writer<W> {
    output: W,
}

impl<W: Write> Writer<W> {
    pub(crate) fn new(output: W) -> Self {
        Self { output }
    }

    /// Writes an entry; `content` has the bytes of a file. One that has less is `UnexpectedEof`.
    pub(crate) fn entry(&mut self, entry: &Entry<'_>, content: impl Read) -> io::Result<()> {
        let mut records = Vec::new();
        let mut path = entry.path.to_vec();
        if entry.kind == Kind::Directory && !path.ends_with(b"/") {
            path.push(b'/');
        }
        let (flag, link, size, device) = match entry.kind {
            Kind::File(size) => (b'0', &b""[..], size, (0, 0)),
            Kind::Hardlink(to) => (b'1', to, 0, (0, 0)),
            Kind::Symlink(to) => (b'2', to, 0, (0, 0)),
            Kind::Character(major, minor) => (b'3', &b""[..], 0, (major, minor)),
            Kind::Block(major, minor) => (b'4', &b""[..], 0, (major, minor)),
            Kind::Directory => (b'5', &b""[..], 0, (0, 0)),
            Kind::Fifo => (b'6', &b""[..], 0, (0, 0)),
        };
        let mut header = Header::new(flag);
        if !header.text(0, 100, &path) {
            record(&mut records, b"path", &path);
        }
        if !header.text(157, 100, link) {
            record(&mut records, b"linkpath", link);
        }
        header.number(100, 8, (entry.mode & 0o7777).into());
        for (at, length, name, value) in [
            (108, 8, "uid", u64::from(entry.uid)),
            (116, 8, "gid", u64::from(entry.gid)),
            (124, 12, "size", size),
        ] {
            if !header.number(at, length, value) {
                record(&mut records, name.as_bytes(), value.to_string().as_bytes());
            }
        }
        let modified = u64::try_from(entry.modified);
        if modified.is_err() || !header.number(136, 12, modified.unwrap_or_default()) {
            record(&mut records, b"mtime", entry.modified.to_string().as_bytes());
        }
        header.number(329, 8, device.0.into());
        header.number(337, 8, device.1.into());
        for (name, value) in &entry.attributes {
            record(&mut records, &[b"SCHILY.xattr.", name.as_slice()].concat(), value);
        }
        if !records.is_empty() {
            let mut extended = Header::new(b'x');
            extended.text(0, 100, b"pax");
            extended.number(100, 8, 0o644);
            extended.number(124, 12, records.len() as u64);
            self.output.write_all(&extended.finished())?;
            self.output.write_all(&records)?;
            self.pad(records.len() as u64)?;
        }
        self.output.write_all(&header.finished())?;
        if size > 0 {
            if io::copy(&mut content.take(size), &mut self.output)? < size {
                return Err(io::ErrorKind::UnexpectedEof.into());
            }
            self.pad(size)?;
        }
        Ok(())
    }

    /// Ends the stream.
    pub(crate) fn finish(mut self) -> io::Result<W> {
        self.output.write_all(&[0; 2 * BLOCK])?;
        self.output.flush()?;
        Ok(self.output)
    }

    fn pad(&mut self, length: u64) -> io::Result<()> {
        let over = usize::try_from(length % BLOCK as u64).unwrap_or_default();
        self.output.write_all(&[0; BLOCK][..(BLOCK - over) % BLOCK])
    }
}

/// `LENGTH NAME=VALUE\n`, the length counting itself.
fn record(records: &mut Vec<u8>, name: &[u8], value: &[u8]) {
    let rest = name.len() + value.len() + 3;
    let mut length = rest + 1;
    while length != rest + length.to_string().len() {
        length = rest + length.to_string().len();
    }
    records.extend_from_slice(length.to_string().as_bytes());
    records.push(b' ');
    records.extend_from_slice(name);
    records.push(b'=');
    records.extend_from_slice(value);
    records.push(b'\n');
}

struct Header([u8; BLOCK]);

impl Header {
    fn new(flag: u8) -> Self {
        let mut header = Self([0; BLOCK]);
        header.0[156] = flag;
        header.0[257..265].copy_from_slice(b"ustar\x0000");
        for (at, length) in [(108, 8), (116, 8), (124, 12), (136, 12), (329, 8), (337, 8)] {
            header.number(at, length, 0);
        }
        header
    }

    /// False: it does not fit.
    fn text(&mut self, at: usize, length: usize, text: &[u8]) -> bool {
        let fits = text.len() <= length;
        let text = &text[..text.len().min(length)];
        self.0[at..at + text.len()].copy_from_slice(text);
        fits
    }

    /// In octal digits with a NUL at the end; false: it does not fit, and is 0.
    fn number(&mut self, at: usize, length: usize, value: u64) -> bool {
        let digits = length - 1;
        let fits = value < 1 << (3 * digits);
        let text = format!("{:0digits$o}", if fits { value } else { 0 });
        self.0[at..at + digits].copy_from_slice(text.as_bytes());
        fits
    }

    fn finished(mut self) -> [u8; BLOCK] {
        self.0[148..156].copy_from_slice(b"        ");
        let sum: u32 = self.0.iter().map(|&byte| u32::from(byte)).sum();
        self.0[148..155].copy_from_slice(format!("{sum:06o}\0").as_bytes());
        self.0
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn records_count_themselves() {
        for length in [1, 80, 92, 93, 94, 990, 991, 9985] {
            let mut records = Vec::new();
            record(&mut records, b"path", &vec![b'x'; length]);
            let text = String::from_utf8(records).unwrap();
            let (said, _) = text.split_once(' ').unwrap();
            assert_eq!(said.parse::<usize>().unwrap(), text.len(), "{length}");
        }
    }

    #[test]
    fn content_that_ends_early_is_an_error() {
        let entry = Entry {
            path: b"file",
            kind: Kind::File(3),
            mode: 0o644,
            uid: 0,
            gid: 0,
            modified: 0,
            attributes: Vec::new(),
        };
        let mut writer = Writer::new(Vec::new());
        assert_eq!(writer.entry(&entry, &b"ab"[..]).unwrap_err().kind(), io::ErrorKind::UnexpectedEof);
        let mut writer = Writer::new(Vec::new());
        writer.entry(&entry, &b"abcd"[..]).unwrap();
        assert_eq!(writer.finish().unwrap().len(), 4 * BLOCK);
    }
}
