//! Reading a tar stream: headers, their extensions, and the data of each entry.
//!
//! Where formats contradict each other it does what Go's archive/tar does, as images are made and read by it: a GNU
//! long name outranks a pax path, only the last of several `x` headers counts, `g` headers are read and ignored, and
//! only files have data.

mod header;
mod number;
mod pax;
mod sparse;

use self::header::{BLOCK, Format, Header, text};
use self::pax::Pax;
pub(crate) use self::pax::Time;
pub(crate) use self::sparse::Segment;
use crate::chunks::{Chunks, Stop};
use crate::error::{TarProblem, UnpackError};

/// Go's limit for pax headers and long names, bytes.
const EXTENDED_MAX: u64 = 1 << 20;
/// dev_t of the kernel: 12 bits major, 20 bits minor.
const MAJOR_MAX: u32 = (1 << 12) - 1;
const MINOR_MAX: u32 = (1 << 20) - 1;

/// What an entry is.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) enum Kind {
    File,
    /// A second name of the entry that [`Entry::link`] names.
    HardLink,
    Symlink,
    CharDevice {
        major: u32,
        minor: u32,
    },
    BlockDevice {
        major: u32,
        minor: u32,
    },
    Directory,
    Fifo,
}

/// An entry with everything that its headers say.
#[derive(Debug)]
pub(crate) struct Entry {
    pub(crate) name: Vec<u8>,
    pub(crate) link: Vec<u8>,
    pub(crate) kind: Kind,
    /// Permission bits.
    pub(crate) mode: u32,
    pub(crate) uid: u32,
    pub(crate) gid: u32,
    pub(crate) mtime: Time,
    /// With holes, bytes.
    pub(crate) size: u64,
    pub(crate) xattrs: Vec<(Vec<u8>, Vec<u8>)>,
    /// Which parts are in the tar; `None`: all of it.
    pub(crate) sparse: Option<Vec<Segment>>,
}

/// Reads entries one after the other.
pub(crate) struct Reader<'o> {
    chunks: Chunks<'o>,
    /// Data of the current entry that was not read yet, bytes.
    data: u64,
    /// Fill bytes behind it.
    padding: u64,
}

impl<'o> Reader<'o> {
    pub(crate) fn new(chunks: Chunks<'o>) -> Self {
        Self { chunks, data: 0, padding: 0 }
    }

    /// The next entry; `None` at the end. A tar that ends without zero blocks has ended too: its digest tells
    /// whether something is missing.
    pub(crate) fn next(&mut self) -> Result<Option<Entry>, Stop> {
        let mut long_name = None;
        let mut long_link = None;
        let mut pax = Pax::default();
        let mut extended = false;
        loop {
            self.chunks.skip(self.data)?;
            self.chunks.skip(self.padding)?;
            (self.data, self.padding) = (0, 0);
            let mut block = [0; BLOCK];
            if !self.chunks.fill(&mut block)? {
                return if extended { Err(self.chunks.problem(TarProblem::Truncated)) } else { Ok(None) };
            }
            if block == [0; BLOCK] {
                self.end_mark()?;
                return Ok(None);
            }
            let header = self.checked(Header::check(&block))?;
            match header.kind() {
                b'L' => long_name = Some(self.extension(header)?).map(|bytes| text(&bytes).to_vec()),
                b'K' => long_link = Some(self.extension(header)?).map(|bytes| text(&bytes).to_vec()),
                b'x' => {
                    let bytes = self.extension(header)?;
                    pax = self.checked(Pax::parse(&bytes))?;
                }
                b'g' => {
                    let bytes = self.extension(header)?;
                    self.checked(Pax::parse(&bytes))?;
                }
                _ => {
                    let mut entry = self.entry(header, pax)?;
                    entry.name = long_name.unwrap_or(entry.name);
                    entry.link = long_link.unwrap_or(entry.link);
                    return Ok(Some(entry));
                }
            }
            extended = header.kind() != b'g';
        }
    }

    /// The next piece of the current entry's data, at most `max` bytes; nothing when it is through.
    pub(crate) fn data(&mut self, max: u64) -> Result<&[u8], Stop> {
        let wanted = max.min(self.data);
        if wanted == 0 {
            return Ok(&[]);
        }
        // Asked before the borrow of what is taken begins.
        let truncated = self.chunks.offset();
        let piece = self.chunks.take(wanted)?;
        if piece.is_empty() {
            return Err(UnpackError::Tar { offset: truncated, problem: TarProblem::Truncated }.into());
        }
        self.data -= piece.len() as u64;
        Ok(piece)
    }

    /// Reads what follows the last entry and returns the digest of the whole tar, in hex.
    pub(crate) fn finish(self) -> Result<String, Stop> {
        self.chunks.finish()
    }

    /// A zero block was seen; another, or the end of the stream, must follow.
    fn end_mark(&mut self) -> Result<(), Stop> {
        let mut block = [0; BLOCK];
        if self.chunks.fill(&mut block)? && block != [0; BLOCK] {
            return Err(self.chunks.problem(TarProblem::LoneZeroBlock));
        }
        Ok(())
    }

    /// The data of an `x`, `g`, `L` or `K` header.
    fn extension(&mut self, header: Header<'_>) -> Result<Vec<u8>, Stop> {
        let size = self.checked(header.size().and_then(|size| unsigned(size, "size")))?;
        if size > EXTENDED_MAX {
            return Err(self.chunks.problem(TarProblem::ExtendedSize(EXTENDED_MAX)));
        }
        self.start_data(size);
        let mut bytes = Vec::new();
        while self.data > 0 {
            bytes.extend_from_slice(self.data(size)?);
        }
        Ok(bytes)
    }

    fn entry(&mut self, header: Header<'_>, pax: Pax) -> Result<Entry, Stop> {
        let mut name = pax.path.unwrap_or_else(|| header.name());
        let link = pax.link.unwrap_or_else(|| header.link().to_vec());
        let kind = self.checked(kind(header, &name))?;
        let mut size = match pax.size {
            Some(size) => size,
            None => self.checked(header.size().and_then(|size| unsigned(size, "size")))?,
        };
        if i64::try_from(size).is_err() {
            return Err(self.chunks.problem(TarProblem::Number("size")));
        }
        if kind != Kind::File {
            size = 0;
        }
        let mut packed = size;
        let mut map = None;
        if header.kind() == b'S' {
            let (first, extended, real_size) = self.checked(header.gnu_sparse())?;
            size = self.checked(unsigned(real_size, "realsize"))?;
            map = Some(sparse::gnu(&mut self.chunks, first, extended)?);
        } else if kind == Kind::File && pax.sparse.version == Some((1, 0)) {
            size = self.checked(pax.sparse.real_size.ok_or(TarProblem::Sparse))?;
            let (segments, used) = sparse::in_front(&mut self.chunks, packed)?;
            map = Some(segments);
            // What the map took is gone from the data; padding is counted from where it began (whole blocks).
            packed -= used;
        } else if kind == Kind::File
            && matches!(pax.sparse.version, None | Some((0, 0 | 1)))
            && let (Some(count), Some(real_size)) = (pax.sparse.count, pax.sparse.real_size)
        {
            if pax.sparse.map.len() as u64 != count {
                return Err(self.chunks.problem(TarProblem::Sparse));
            }
            size = real_size;
            map = Some(pax.sparse.map);
        } else if pax.sparse.version.is_some_and(|version| version > (1, 0)) {
            return Err(self.chunks.problem(TarProblem::Sparse));
        }
        if let Some(map) = &map {
            self.checked(sparse::check(map, size, packed))?;
            name = pax.sparse.name.unwrap_or(name);
        }
        let uid = match pax.uid {
            Some(uid) => uid,
            None => self.checked(header.uid().and_then(|uid| unsigned(uid, "uid")))?,
        };
        let gid = match pax.gid {
            Some(gid) => gid,
            None => self.checked(header.gid().and_then(|gid| unsigned(gid, "gid")))?,
        };
        let mtime = match pax.mtime {
            Some(time) => time,
            None => Time { seconds: self.checked(header.mtime())?, nanoseconds: 0 },
        };
        let entry = Entry {
            name,
            link,
            kind,
            mode: u32::try_from(self.checked(header.mode())? & 0o7777).unwrap_or(0),
            uid: self.checked(owner(uid, "uid"))?,
            gid: self.checked(owner(gid, "gid"))?,
            mtime,
            size,
            xattrs: pax.xattrs,
            sparse: map,
        };
        self.start_data(packed);
        Ok(entry)
    }

    fn start_data(&mut self, size: u64) {
        self.data = size;
        self.padding = size.wrapping_neg() % BLOCK as u64;
    }

    fn checked<T>(&self, result: Result<T, TarProblem>) -> Result<T, Stop> {
        result.map_err(|problem| self.chunks.problem(problem))
    }
}

fn kind(header: Header<'_>, name: &[u8]) -> Result<Kind, TarProblem> {
    Ok(match header.kind() {
        // Before ustar a directory was a file whose name ends in a slash.
        0 if name.ends_with(b"/") => Kind::Directory,
        0 | b'0' | b'7' => Kind::File,
        b'S' if header.format() == Format::Gnu => Kind::File,
        b'1' => Kind::HardLink,
        b'2' => Kind::Symlink,
        b'3' => {
            let (major, minor) = device(header)?;
            Kind::CharDevice { major, minor }
        }
        b'4' => {
            let (major, minor) = device(header)?;
            Kind::BlockDevice { major, minor }
        }
        b'5' => Kind::Directory,
        b'6' => Kind::Fifo,
        other => return Err(TarProblem::Type(other)),
    })
}

fn device(header: Header<'_>) -> Result<(u32, u32), TarProblem> {
    let number = |value: i64, max| {
        u32::try_from(value).ok().filter(|number| *number <= max).ok_or(TarProblem::DeviceNumber)
    };
    let (major, minor) = header.device()?;
    Ok((number(major, MAJOR_MAX)?, number(minor, MINOR_MAX)?))
}

fn unsigned(value: i64, field: &'static str) -> Result<u64, TarProblem> {
    u64::try_from(value).map_err(|_| TarProblem::Number(field))
}

/// `(uid_t) -1` means "leave it" to the kernel.
fn owner(value: u64, field: &'static str) -> Result<u32, TarProblem> {
    u32::try_from(value).ok().filter(|id| *id != u32::MAX).ok_or(TarProblem::Number(field))
}
