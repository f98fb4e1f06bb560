//! The archive that the kernel unpacks as its first file system: cpio, format "newc".
//!
//! Source: Documentation/driver-api/early-userspace/buffer-format.rst. Every entry has a header of 110 ASCII bytes (a magic and
//! thirteen numbers of eight hexadecimal digits), its name with a zero, and its content, both padded to four bytes. All owners are
//! root and all times 0, so the same entries make the same bytes.

use thiserror::Error;

const MAGIC: &[u8] = b"070701";
const HEADER: usize = 110;
const TRAILER: &str = "TRAILER!!!";

/// What an entry is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Kind<'d> {
    Directory,
    File(&'d [u8]),
    /// A character device with its major and minor number.
    Device(u32, u32),
}

/// One entry.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Entry<'d> {
    /// Path from the root, without a slash at its begin.
    pub(crate) name: &'d str,
    /// Permission bits.
    pub(crate) mode: u32,
    pub(crate) kind: Kind<'d>,
}

/// Why an archive cannot be read.
#[derive(Debug, Error, PartialEq, Eq)]
#[error("the archive is damaged at byte {0}")]
pub struct CpioError(usize);

/// The archive of `entries`, in their order: a directory stands before what is in it.
pub(crate) fn write(entries: &[Entry<'_>]) -> Vec<u8> {
    let mut archive = Vec::new();
    for (index, entry) in entries.iter().enumerate() {
        // Inode numbers matter only to tell links; there are none.
        append(&mut archive, index + 1, entry);
    }
    append(&mut archive, 0, &Entry { name: TRAILER, mode: 0, kind: Kind::File(&[]) });
    archive
}

fn append(archive: &mut Vec<u8>, inode: usize, entry: &Entry<'_>) {
    let (format, content, (major, minor)) = match entry.kind {
        Kind::Directory => (0o040_000, [].as_slice(), (0, 0)),
        Kind::File(content) => (0o100_000, content, (0, 0)),
        Kind::Device(major, minor) => (0o020_000, [].as_slice(), (major, minor)),
    };
    let mode = if entry.name == TRAILER { 0 } else { format | entry.mode };
    let links = if entry.kind == Kind::Directory { 2 } else { 1 };
    archive.extend_from_slice(MAGIC);
    // ino, mode, uid, gid, nlink, mtime, filesize, devmajor, devminor, rdevmajor, rdevminor, namesize, check. Content is bounded
    // by what the builder reads, far below 4 GiB.
    let numbers = [
        inode as u64,
        mode.into(),
        0,
        0,
        links,
        0,
        content.len() as u64,
        0,
        0,
        major.into(),
        minor.into(),
        entry.name.len() as u64 + 1,
        0,
    ];
    for number in numbers {
        archive.extend_from_slice(format!("{number:08x}").as_bytes());
    }
    archive.extend_from_slice(entry.name.as_bytes());
    archive.push(0);
    pad(archive);
    archive.extend_from_slice(content);
    pad(archive);
}

fn pad(archive: &mut Vec<u8>) {
    archive.resize(archive.len().next_multiple_of(4), 0);
}

/// The regular files of an archive with their contents.
pub(crate) fn files(archive: &[u8]) -> Result<Vec<(&str, &[u8])>, CpioError> {
    let mut files = Vec::new();
    let mut at = 0;
    loop {
        let (name, mode, content, next) = entry(archive, at).ok_or(CpioError(at))?;
        if name == TRAILER {
            return Ok(files);
        }
        if mode & 0o170_000 == 0o100_000 {
            files.push((name, content));
        }
        at = next;
    }
}

/// The entry at `at`: name, mode, content, and where the next one begins.
fn entry(archive: &[u8], at: usize) -> Option<(&str, u32, &[u8], usize)> {
    let header = archive.get(at..at.checked_add(HEADER)?)?;
    let numbers = header.strip_prefix(MAGIC)?;
    let number = |index: usize| {
        let digits = std::str::from_utf8(numbers.get(index * 8..index * 8 + 8)?).ok()?;
        u32::from_str_radix(digits, 16).ok()
    };
    let (mode, size, name_size) = (number(1)?, number(6)? as usize, number(11)? as usize);
    let name_end = at + HEADER + name_size;
    let name = archive.get(at + HEADER..name_end)?.strip_suffix(b"\0")?;
    let start = name_end.next_multiple_of(4);
    let content = archive.get(start..start.checked_add(size)?)?;
    Some((std::str::from_utf8(name).ok()?, mode, content, (start + size).next_multiple_of(4)))
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn the_kernels_format_is_written() {
        let archive = write(&[
            Entry { name: "dev", mode: 0o755, kind: Kind::Directory },
            Entry { name: "dev/null", mode: 0o666, kind: Kind::Device(1, 3) },
            Entry { name: "init", mode: 0o755, kind: Kind::File(b"hello") },
        ]);
        let header = |ino, mode, links, size, major, minor, name| {
            format!(
                "070701{ino:08x}{mode:08x}{0:08x}{0:08x}{links:08x}{0:08x}{size:08x}{0:08x}{0:08x}{major:08x}{minor:08x}{name:08x}{0:08x}",
                0
            )
        };
        let expected = [
            header(1, 0o040_755, 2, 0, 0, 0, 4) + "dev\0\0\0",
            header(2, 0o020_666, 1, 0, 1, 3, 9) + "dev/null\0\0",
            header(3, 0o100_755, 1, 5, 0, 0, 5) + "init\0\0hello\0\0\0",
            header(0, 0, 1, 0, 0, 0, 11) + "TRAILER!!!\0\0\0\0",
        ];
        assert_eq!(String::from_utf8(archive.clone()).unwrap(), expected.concat());
        assert_eq!(files(&archive), Ok(vec![("init", b"hello".as_slice())]));
        for length in 0..archive.len() - 4 {
            assert!(files(&archive[..length]).is_err(), "{length}");
        }
    }

    proptest! {
        #[test]
        fn damaged_archives_do_no_harm(changes in prop::collection::vec((any::<prop::sample::Index>(), any::<u8>()), 1..6)) {
            let mut archive = write(&[
                Entry { name: "a", mode: 0o644, kind: Kind::File(b"content") },
                Entry { name: "b", mode: 0o644, kind: Kind::File(b"") },
            ]);
            for (at, byte) in changes {
                let at = at.index(archive.len());
                archive[at] = byte;
            }
            let _ = files(&archive);
        }
    }
}
