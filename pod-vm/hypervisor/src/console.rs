//! The guest's console: its last lines in memory, more of it in a file.

use std::collections::VecDeque;
use std::fs::{File, OpenOptions};
use std::io::{self, Write};
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::unix::fs::{FileExt, OpenOptionsExt};
use std::path::{Path, PathBuf};

use rustix::io::Errno;
use rustix::net::{RecvFlags, recv};

/// How much of the end is told when a machine ends.
pub const TAIL: usize = 4096;

/// The last bytes of a stream.
#[derive(Debug, Default)]
pub struct Tail(VecDeque<u8>);

impl Tail {
    /// Adds bytes at the end.
    pub fn push(&mut self, bytes: &[u8]) {
        let bytes = &bytes[bytes.len().saturating_sub(TAIL)..];
        let excess = (self.0.len() + bytes.len()).saturating_sub(TAIL);
        self.0.drain(..excess);
        self.0.extend(bytes);
    }

    /// As text of at most [`TAIL`] bytes, without control characters other than the ends of lines. Of a stream that was cut off, the
    /// first line is left out when it is not whole.
    pub fn text(&self) -> String {
        let bytes: Vec<u8> = self.0.iter().copied().collect();
        let mut text: String = String::from_utf8_lossy(&bytes)
            .chars()
            .filter(|character| *character == '\n' || !character.is_control())
            .collect();
        if self.0.len() == TAIL
            && let Some(end) = text.find('\n')
        {
            text.drain(..=end);
        }
        // Bytes that were no text have become three each.
        while text.len() > TAIL {
            text.remove(0);
        }
        text
    }
}

/// A file that keeps the end of what is written to it: between one and two times as much as it must.
#[derive(Debug)]
struct Kept {
    path: PathBuf,
    file: File,
    length: u64,
    limit: u64,
}

impl Kept {
    fn create(path: &Path, limit: u64) -> io::Result<Self> {
        let file = OpenOptions::new()
            .read(true)
            .write(true)
            .create(true)
            .truncate(true)
            .mode(0o640)
            .custom_flags(libc::O_NOFOLLOW)
            .open(path)?;
        Ok(Self { path: path.to_owned(), file, length: 0, limit })
    }

    fn append(&mut self, bytes: &[u8]) -> io::Result<()> {
        self.file.write_all_at(bytes, self.length)?;
        self.length += bytes.len() as u64;
        if self.length >= self.limit.saturating_mul(2) {
            self.begin_anew()?;
        }
        Ok(())
    }

    /// The end moves into a new file, which takes the old one's place: who reads sees one or the other.
    fn begin_anew(&mut self) -> io::Result<()> {
        let path = self.path.with_extension("new");
        let mut next = Self::create(&path, self.limit)?;
        let mut from = self.length - self.limit;
        let mut bytes = [0; 16 * 1024];
        while from < self.length {
            let count = self.file.read_at(&mut bytes, from)?;
            if count == 0 {
                break;
            }
            next.file.write_all(&bytes[..count])?;
            next.length += count as u64;
            from += count as u64;
        }
        std::fs::rename(&path, &self.path)?;
        (self.file, self.length) = (next.file, next.length);
        Ok(())
    }
}

/// The console's end on the host's side.
#[derive(Debug)]
pub struct Console {
    socket: Option<OwnedFd>,
    tail: Tail,
    kept: Option<Kept>,
}

impl Console {
    /// `path`: where it is kept; empty for nowhere.
    pub fn new(socket: OwnedFd, path: &str, limit: u64) -> io::Result<Self> {
        let kept = if path.is_empty() { None } else { Some(Kept::create(Path::new(path), limit)?) };
        Ok(Self { socket: Some(socket), tail: Tail::default(), kept })
    }

    /// What to watch for reading, until its end.
    pub fn descriptor(&self) -> Option<BorrowedFd<'_>> {
        self.socket.as_ref().map(AsFd::as_fd)
    }

    /// Reads once; false when there is nothing more just now.
    pub fn read(&mut self) -> bool {
        let Some(socket) = &self.socket else { return false };
        let mut bytes = [0; 4096];
        match recv(socket, &mut bytes, RecvFlags::DONTWAIT) {
            Ok((count @ 1.., _)) => {
                self.tail.push(&bytes[..count]);
                // A full disk must not end the machine: the console's end stays in memory.
                if self.kept.as_mut().is_some_and(|kept| kept.append(&bytes[..count]).is_err()) {
                    self.kept = None;
                }
                true
            }
            Err(Errno::INTR) => true,
            Err(Errno::AGAIN) => false,
            Ok((0, _)) | Err(_) => {
                self.socket = None;
                false
            }
        }
    }

    /// The last lines, as [`Tail::text`] has them.
    pub fn tail(&self) -> String {
        self.tail.text()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_tail_is_whole_lines_without_control_characters() {
        let mut tail = Tail::default();
        tail.push(b"one\r\n\x1b[31mtwo\x07\xff\n");
        assert_eq!(tail.text(), "one\n[31mtwo\u{fffd}\n");
        for number in 0..2000 {
            tail.push(format!("line {number}\n").as_bytes());
        }
        let text = tail.text();
        assert!(text.len() <= TAIL && text.ends_with("line 1999\n") && text.starts_with("line "), "{text}");
        tail.push(&[0xff; 3 * TAIL]);
        assert!(tail.text().len() <= TAIL);
        tail.push(&[b'x'; 3 * TAIL]);
        assert_eq!(tail.text().len(), TAIL);
    }

    #[test]
    fn the_file_keeps_the_end() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("console.log");
        let mut kept = Kept::create(&path, 1000).unwrap();
        let mut all = Vec::new();
        for number in 0..1000 {
            let line = format!("line {number}\n");
            kept.append(line.as_bytes()).unwrap();
            all.extend_from_slice(line.as_bytes());
            let there = std::fs::read(&path).unwrap();
            assert!(there.len() < 2000 && there.len() >= all.len().min(1000), "{}", there.len());
            assert!(all.ends_with(&there));
        }
        assert_eq!(std::fs::read_dir(directory.path()).unwrap().count(), 1);
    }
}
