//! Reading 64-bit little-endian x86 ELF files that nobody has checked: kernels, modules, the agent.
//!
//! Layouts are those of the System V ABI, "Object Files", and of `include/uapi/linux/elf.h`. Every number in the file is used
//! through [`slice`], so that none of them can reach outside the data.

use thiserror::Error;

/// `e_type`: an executable at fixed addresses.
pub(crate) const ET_EXEC: u16 = 2;
/// `p_type`: loaded into memory.
pub(crate) const PT_LOAD: u32 = 1;
/// `p_type`: names the dynamic linker.
pub(crate) const PT_INTERP: u32 = 3;
/// `p_type`: notes.
pub(crate) const PT_NOTE: u32 = 4;
/// Bytes of the file header.
pub(crate) const HEADER: usize = 64;
/// Bytes of one program header.
pub(crate) const PROGRAM_HEADER: usize = 56;

/// Bytes of one section header.
const SECTION_HEADER: usize = 64;

/// What is wrong with an ELF file.
#[derive(Debug, Error, PartialEq, Eq)]
pub enum ElfError {
    /// No ELF magic.
    #[error("it is no ELF file")]
    NoElf,
    /// Another class, byte order or processor.
    #[error("it is an ELF file, but not for 64-bit x86")]
    OtherMachine,
    /// A number in the file points past its end.
    #[error("{0} reaches past the end of the file")]
    Truncated(&'static str),
    /// A header has an unexpected size.
    #[error("{0} has an unknown format")]
    Format(&'static str),
}

/// An ELF file whose header was checked.
#[derive(Debug)]
pub(crate) struct Elf<'d> {
    data: &'d [u8],
    /// `e_type`.
    pub(crate) kind: u16,
    /// Its program headers.
    pub(crate) segments: Vec<Segment>,
}

/// A program header.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Segment {
    pub(crate) kind: u32,
    pub(crate) flags: u32,
    pub(crate) offset: u64,
    pub(crate) virtual_address: u64,
    pub(crate) physical_address: u64,
    pub(crate) file_size: u64,
    pub(crate) memory_size: u64,
    pub(crate) align: u64,
}

/// One note.
#[derive(Debug, PartialEq, Eq)]
pub(crate) struct Note<'d> {
    /// The owner, without its terminating zero.
    pub(crate) owner: &'d [u8],
    pub(crate) kind: u32,
    pub(crate) content: &'d [u8],
}

/// `data[offset..offset + length]`, if it is there.
pub(crate) fn slice(data: &[u8], offset: u64, length: u64) -> Option<&[u8]> {
    let start = usize::try_from(offset).ok()?;
    let end = start.checked_add(usize::try_from(length).ok()?)?;
    data.get(start..end)
}

/// The little-endian number of two bytes at `offset`.
pub(crate) fn u16_at(data: &[u8], offset: usize) -> Option<u16> {
    Some(u16::from_le_bytes(*data.get(offset..)?.first_chunk()?))
}

/// The little-endian number of four bytes at `offset`.
pub(crate) fn u32_at(data: &[u8], offset: usize) -> Option<u32> {
    Some(u32::from_le_bytes(*data.get(offset..)?.first_chunk()?))
}

/// The little-endian number of eight bytes at `offset`.
pub(crate) fn u64_at(data: &[u8], offset: usize) -> Option<u64> {
    Some(u64::from_le_bytes(*data.get(offset..)?.first_chunk()?))
}

/// Entry `index` of a table whose entries have `size` bytes.
fn entry(data: &[u8], table: u64, index: u64, size: usize) -> Option<&[u8]> {
    let offset = table.checked_add(index.checked_mul(size as u64)?)?;
    slice(data, offset, size as u64)
}

impl<'d> Elf<'d> {
    pub(crate) fn parse(data: &'d [u8]) -> Result<Self, ElfError> {
        if !data.starts_with(b"\x7fELF") {
            return Err(ElfError::NoElf);
        }
        let header = data.get(..HEADER).ok_or(ElfError::Truncated("the header"))?;
        let number = |offset| u16_at(header, offset).unwrap_or_default();
        // ELFCLASS64, ELFDATA2LSB, EM_X86_64.
        if header[4] != 2 || header[5] != 1 || number(18) != 62 {
            return Err(ElfError::OtherMachine);
        }
        let (count, size) = (number(56), number(54));
        if count > 0 && usize::from(size) != PROGRAM_HEADER {
            return Err(ElfError::Format("its program header table"));
        }
        let table = u64_at(header, 32).unwrap_or_default();
        let segments = (0..u64::from(count))
            .map(|index| entry(data, table, index, PROGRAM_HEADER).and_then(Segment::parse))
            .collect::<Option<Vec<_>>>()
            .ok_or(ElfError::Truncated("its program header table"))?;
        Ok(Self { data, kind: number(16), segments })
    }

    /// Where execution begins.
    pub(crate) fn entry(&self) -> u64 {
        u64_at(self.data, 24).unwrap_or_default()
    }

    /// What the file holds of a segment.
    pub(crate) fn content(&self, segment: &Segment) -> Result<&'d [u8], ElfError> {
        slice(self.data, segment.offset, segment.file_size).ok_or(ElfError::Truncated("a segment"))
    }

    /// All notes in the note segments.
    pub(crate) fn notes(&self) -> Result<Vec<Note<'d>>, ElfError> {
        let mut notes = Vec::new();
        for segment in self.segments.iter().filter(|segment| segment.kind == PT_NOTE) {
            // Notes of alignment 8 exist only beside properties (NT_GNU_PROPERTY_TYPE_0).
            let align = if segment.align == 8 { 8 } else { 4 };
            let mut rest = self.content(segment)?;
            while rest.len() >= 12 {
                let (note, end) = Note::parse(rest, align).ok_or(ElfError::Truncated("a note"))?;
                notes.push(note);
                rest = rest.get(end..).unwrap_or_default();
            }
        }
        Ok(notes)
    }

    /// The content of the section called `name`, if there is one.
    pub(crate) fn section(&self, name: &[u8]) -> Result<Option<&'d [u8]>, ElfError> {
        const TABLE: &str = "its section header table";
        const SHT_NOBITS: u32 = 8;
        let number = |offset| u16_at(self.data, offset).unwrap_or_default();
        let (size, count, names) = (number(58), number(60), number(62));
        if count == 0 {
            return Ok(None);
        }
        if usize::from(size) != SECTION_HEADER {
            return Err(ElfError::Format(TABLE));
        }
        let table = u64_at(self.data, 40).unwrap_or_default();
        let header = |index: u16| {
            entry(self.data, table, index.into(), SECTION_HEADER).ok_or(ElfError::Truncated(TABLE))
        };
        let content = |header: &[u8]| {
            let (offset, size) =
                (u64_at(header, 24).unwrap_or_default(), u64_at(header, 32).unwrap_or_default());
            slice(self.data, offset, size).ok_or(ElfError::Truncated("a section"))
        };
        let names = content(header(names)?)?;
        for index in 0..count {
            let header = header(index)?;
            let at = u32_at(header, 0).unwrap_or_default() as usize;
            let found = names.get(at..).and_then(|rest| rest.split(|byte| *byte == 0).next());
            if found == Some(name) && u32_at(header, 4) != Some(SHT_NOBITS) {
                return content(header).map(Some);
            }
        }
        Ok(None)
    }
}

impl Segment {
    fn parse(header: &[u8]) -> Option<Self> {
        Some(Self {
            kind: u32_at(header, 0)?,
            flags: u32_at(header, 4)?,
            offset: u64_at(header, 8)?,
            virtual_address: u64_at(header, 16)?,
            physical_address: u64_at(header, 24)?,
            file_size: u64_at(header, 32)?,
            memory_size: u64_at(header, 40)?,
            align: u64_at(header, 48)?,
        })
    }

    /// The header's bytes.
    pub(crate) fn write(&self, to: &mut Vec<u8>) {
        to.extend(self.kind.to_le_bytes());
        to.extend(self.flags.to_le_bytes());
        for number in [
            self.offset,
            self.virtual_address,
            self.physical_address,
            self.file_size,
            self.memory_size,
            self.align,
        ] {
            to.extend(number.to_le_bytes());
        }
    }
}

impl<'d> Note<'d> {
    /// The first note of `data`, and where the next one begins.
    fn parse(data: &'d [u8], align: usize) -> Option<(Self, usize)> {
        let owner_size = u32_at(data, 0)? as usize;
        let size = u32_at(data, 4)? as usize;
        let owner = data.get(12..12usize.checked_add(owner_size)?)?;
        let start = (12 + owner_size).checked_next_multiple_of(align)?;
        let end = start.checked_add(size)?;
        let content = data.get(start..end)?;
        let note =
            Self { owner: owner.strip_suffix(b"\0").unwrap_or(owner), kind: u32_at(data, 8)?, content };
        Some((note, end.checked_next_multiple_of(align)?))
    }
}
