//! A tar stream as a sequence of entries, each with everything its headers say about it.

use std::io::{BufRead, Read};

use rustix::fs::Timespec;

use crate::error::{Failure, Fault, Result};
use crate::header::{BLOCK, Header, text};
use crate::pax::{MAX_HEADER, Pax, Xattr};
use crate::sparse::{self, Extent, LeadingMap, SparseForm};
use crate::stream::Hashed;

/// The longest name or link target accepted, in bytes: the kernel's PATH_MAX.
pub(crate) const MAX_NAME: usize = 4096;

#[derive(Debug)]
pub(crate) enum Kind {
    /// Its size with holes, and its map if it has holes.
    File {
        size: u64,
        extents: Option<Vec<Extent>>,
    },
    Directory,
    Symlink {
        to: Vec<u8>,
    },
    HardLink {
        to: Vec<u8>,
    },
    CharDevice {
        major: u32,
        minor: u32,
    },
    BlockDevice {
        major: u32,
        minor: u32,
    },
    Fifo,
}

/// Ownership, permissions, times and extended attributes.
#[derive(Debug)]
pub(crate) struct Metadata {
    pub(crate) mode: u32,
    pub(crate) uid: u32,
    pub(crate) gid: u32,
    pub(crate) mtime: Timespec,
    pub(crate) xattrs: Vec<Xattr>,
}

#[derive(Debug)]
pub(crate) struct Entry {
    pub(crate) path: Vec<u8>,
    pub(crate) kind: Kind,
    pub(crate) metadata: Metadata,
}

pub(crate) struct Archive<R> {
    stream: Hashed<R>,
    /// Stored bytes of the current entry that were not read yet, and the padding after them.
    remaining: u64,
    padding: u64,
}

impl<R: Read> Archive<R> {
    pub(crate) fn new(stream: Hashed<R>) -> Self {
        Self { stream, remaining: 0, padding: 0 }
    }

    pub(crate) fn into_stream(self) -> Hashed<R> {
        self.stream
    }

    pub(crate) fn offset(&self) -> u64 {
        self.stream.offset()
    }

    /// The next entry, what was left of the current one being skipped; `None` at the end mark, or where the stream ends
    /// between two entries (writers that leave the mark out exist; the digest tells a cut stream from a whole one).
    pub(crate) fn next(&mut self) -> Result<Option<Entry>> {
        self.skip_rest()?;
        let mut pax: Option<Pax> = None;
        let (mut long_name, mut long_link) = (None, None);
        loop {
            let Some(header) = self.header()? else {
                return match (pax, long_name, long_link) {
                    (None, None, None) => Ok(None),
                    _ => Err(Fault::Dangling.into()),
                };
            };
            match header.type_flag() {
                b'x' => pax = Some(Pax::parse(&self.small_content(&header, "pax header", MAX_HEADER)?)?),
                // Global records are checked and otherwise ignored, as image scanners and every other runtime do: a
                // layer must not look different to them and to us.
                b'g' => drop(Pax::parse(&self.small_content(&header, "pax header", MAX_HEADER)?)?),
                b'L' => long_name = Some(self.long_text(&header)?),
                b'K' => long_link = Some(self.long_text(&header)?),
                _ => return self.entry(&header, pax.unwrap_or_default(), long_name, long_link).map(Some),
            }
        }
    }

    fn entry(
        &mut self,
        header: &Header,
        pax: Pax,
        long_name: Option<Vec<u8>>,
        long_link: Option<Vec<u8>>,
    ) -> Result<Entry> {
        let path = long_name.or(pax.sparse.name.clone()).or(pax.path).unwrap_or_else(|| header.name());
        let link = long_link.or(pax.link_path).unwrap_or_else(|| header.link_name());
        if path.len() > MAX_NAME || link.len() > MAX_NAME {
            return Err(Fault::TooLarge { what: "name", limit: MAX_NAME as u64 }.into());
        }
        // Only files have content, whatever the size field of the others says.
        let size = match pax.size {
            Some(size) => size,
            None => header.size()?,
        };
        let form = pax.sparse.form()?;
        let kind = match header.type_flag() {
            // Before ustar a directory was a file with a slash at the end of its name.
            0 if path.ends_with(b"/") => Kind::Directory,
            b'S' if header.is_gnu() => {
                self.begin(size);
                self.old_gnu_sparse(header, size)?
            }
            0 | b'0' | b'7' => {
                self.begin(size);
                self.file(size, form)?
            }
            b'1' => Kind::HardLink { to: link },
            b'2' => Kind::Symlink { to: link },
            b'3' => header.device().map(|(major, minor)| Kind::CharDevice { major, minor })?,
            b'4' => header.device().map(|(major, minor)| Kind::BlockDevice { major, minor })?,
            b'5' => Kind::Directory,
            b'6' => Kind::Fifo,
            other => return Err(Fault::EntryType(other).into()),
        };
        let id = |pax: Option<i64>, field: std::result::Result<i64, Fault>, what| {
            // The last value means "leave as it is" to chown(2).
            let id = u32::try_from(pax.map_or(field, Ok)?).ok().filter(|&id| id != u32::MAX);
            id.ok_or(Fault::Number(what))
        };
        let metadata = Metadata {
            mode: u32::try_from(header.mode()? & 0o7777).map_err(|_| Fault::Number("mode"))?,
            uid: id(pax.uid, header.uid(), "uid")?,
            gid: id(pax.gid, header.gid(), "gid")?,
            mtime: match pax.mtime {
                Some(mtime) => mtime,
                None => Timespec { tv_sec: header.mtime()?, tv_nsec: 0 },
            },
            xattrs: pax.xattrs,
        };
        Ok(Entry { path, kind, metadata })
    }

    fn begin(&mut self, size: u64) {
        self.remaining = size;
        self.padding = size.wrapping_neg() % BLOCK as u64;
    }

    fn file(&mut self, stored: u64, form: SparseForm) -> Result<Kind> {
        let (size, extents) = match form {
            SparseForm::Dense => return Ok(Kind::File { size: stored, extents: None }),
            SparseForm::Mapped { real_size, extents } => (real_size, extents),
            SparseForm::Leading { real_size } => {
                let mut map = LeadingMap::default();
                let extents = loop {
                    // The map is part of the stored size, unlike the extension blocks of the old form.
                    self.remaining = self.remaining.checked_sub(BLOCK as u64).ok_or(Fault::Sparse)?;
                    let block = self.block()?.ok_or(Fault::Truncated)?;
                    if let Some(extents) = map.block(&block)? {
                        break extents;
                    }
                };
                (real_size, extents)
            }
        };
        sparse::validate(&extents, size, self.remaining)?;
        Ok(Kind::File { size, extents: Some(extents) })
    }

    fn old_gnu_sparse(&mut self, header: &Header, stored: u64) -> Result<Kind> {
        let size = sparse::old_gnu_real_size(&header.0)?;
        let mut extents = Vec::new();
        let mut more = sparse::read_old_gnu(&header.0, false, &mut extents)?;
        while more {
            let block = self.block()?.ok_or(Fault::Truncated)?;
            more = sparse::read_old_gnu(&block, true, &mut extents)?;
        }
        sparse::validate(&extents, size, stored)?;
        Ok(Kind::File { size, extents: Some(extents) })
    }

    /// At most `limit` bytes of the current entry's content as they lie in the buffer; never empty unless nothing is
    /// left of the entry or `limit` is 0. Follow with [`Self::consume`].
    pub(crate) fn content(&mut self, limit: u64) -> Result<&[u8]> {
        let limit = limit.min(self.remaining);
        if limit == 0 {
            return Ok(&[]);
        }
        let buffer = self.stream.fill_buf().map_err(Failure::Stream)?;
        if buffer.is_empty() {
            return Err(Fault::Truncated.into());
        }
        Ok(&buffer[..buffer.len().min(usize::try_from(limit).unwrap_or(usize::MAX))])
    }

    pub(crate) fn consume(&mut self, count: usize) {
        self.stream.consume(count);
        self.remaining -= count as u64;
    }

    fn skip_rest(&mut self) -> Result<()> {
        // Two steps, because their sum may not fit.
        for _ in 0..2 {
            while self.remaining > 0 {
                let count = self.content(u64::MAX)?.len();
                self.consume(count);
            }
            self.remaining = std::mem::take(&mut self.padding);
        }
        self.remaining = 0;
        Ok(())
    }

    /// A verified header, or `None` at the end.
    fn header(&mut self) -> Result<Option<Header>> {
        self.skip_rest()?;
        let Some(header) = self.block()?.map(Header) else { return Ok(None) };
        if !header.is_zero() {
            header.verify()?;
            return Ok(Some(header));
        }
        match self.block()?.map(Header) {
            Some(second) if !second.is_zero() => Err(Fault::LoneZeroBlock.into()),
            _ => Ok(None),
        }
    }

    /// The next block; `None` if the stream ends exactly here.
    fn block(&mut self) -> Result<Option<[u8; BLOCK]>> {
        let mut block = [0; BLOCK];
        let mut length = 0;
        while length < BLOCK {
            match self.stream.read(&mut block[length..]).map_err(Failure::Stream)? {
                0 if length == 0 => return Ok(None),
                0 => return Err(Fault::Truncated.into()),
                count => length += count,
            }
        }
        Ok(Some(block))
    }

    /// The whole content of a header that describes the entry after it.
    fn small_content(&mut self, header: &Header, what: &'static str, limit: u64) -> Result<Vec<u8>> {
        let size = header.size()?;
        if size > limit {
            return Err(Fault::TooLarge { what, limit }.into());
        }
        self.begin(size);
        let mut content = Vec::new();
        while self.remaining > 0 {
            let part = self.content(u64::MAX)?;
            content.extend_from_slice(part);
            let count = part.len();
            self.consume(count);
        }
        Ok(content)
    }

    fn long_text(&mut self, header: &Header) -> Result<Vec<u8>> {
        // One more for the NUL at its end.
        let content = self.small_content(header, "name", MAX_NAME as u64 + 1)?;
        Ok(text(&content).to_vec())
    }
}
