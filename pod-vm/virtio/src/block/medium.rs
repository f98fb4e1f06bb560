//! What a disk is kept in: a file or block device; or several files one after the other, which are only read.

use std::fs::File;
use std::io::{self, Seek, SeekFrom};
use std::os::unix::fs::FileExt;

use rustix::fs::{FallocateFlags, fallocate};

/// Where a file's bytes are on the disk: from where the one before it ends.
#[derive(Debug)]
struct Part {
    end: u64,
    file: File,
}

/// All of it, in bytes.
#[derive(Debug)]
pub(super) struct Medium(Vec<Part>);

impl Medium {
    /// Of the length that the file has now.
    pub(super) fn one(file: File) -> io::Result<Self> {
        Self::joined(vec![file], 1)
    }

    /// Files of lengths that are multiples of `unit`.
    pub(super) fn joined(files: Vec<File>, unit: u64) -> io::Result<Self> {
        let (mut parts, mut end) = (Vec::new(), 0u64);
        for mut file in files {
            let length = file.seek(SeekFrom::End(0))?;
            if !length.is_multiple_of(unit) {
                return Err(io::Error::other(format!("a file is not a multiple of {unit} bytes long")));
            }
            end = end.checked_add(length).ok_or(io::ErrorKind::FileTooLarge)?;
            parts.push(Part { end, file });
        }
        Ok(Self(parts))
    }

    pub(super) fn length(&self) -> u64 {
        self.0.last().map_or(0, |part| part.end)
    }

    /// Fills `bytes` with what is there from `at` on.
    pub(super) fn read(&self, bytes: &mut [u8], at: u64) -> io::Result<()> {
        let (mut rest, mut at) = (bytes, at);
        let mut next = self.0.partition_point(|part| part.end <= at);
        while !rest.is_empty() {
            let part = self.0.get(next).ok_or(io::ErrorKind::UnexpectedEof)?;
            let begin = next.checked_sub(1).map_or(0, |before| self.0[before].end);
            let count = usize::try_from(part.end - at).unwrap_or(usize::MAX).min(rest.len());
            let (now, later) = rest.split_at_mut(count);
            part.file.read_exact_at(now, at - begin)?;
            (rest, at, next) = (later, at + count as u64, next + 1);
        }
        Ok(())
    }

    /// The only file.
    fn file(&self) -> io::Result<&File> {
        match &self.0[..] {
            [part] => Ok(&part.file),
            _ => Err(io::ErrorKind::ReadOnlyFilesystem.into()),
        }
    }

    pub(super) fn write(&self, bytes: &[u8], at: u64) -> io::Result<()> {
        self.file()?.write_all_at(bytes, at)
    }

    /// What was written is there for good.
    pub(super) fn sync(&self) -> io::Result<()> {
        self.0.iter().try_for_each(|part| part.file.sync_data())
    }

    /// Makes a hole, which reads as zeros.
    pub(super) fn punch(&self, at: u64, length: u64) -> io::Result<()> {
        self.allocate(FallocateFlags::PUNCH_HOLE, at, length)
    }

    /// Makes zeros that have room.
    pub(super) fn zero(&self, at: u64, length: u64) -> io::Result<()> {
        self.allocate(FallocateFlags::ZERO_RANGE, at, length)
    }

    fn allocate(&self, what: FallocateFlags, at: u64, length: u64) -> io::Result<()> {
        Ok(fallocate(self.file()?, what | FallocateFlags::KEEP_SIZE, at, length)?)
    }
}
