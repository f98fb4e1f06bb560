//! A distribution's `vmlinuz` becomes the ELF file that a virtual machine monitor loads: only what is loaded, with a PVH entry.
//!
//! Sources: Documentation/arch/x86/boot.rst for the bzImage; `arch/x86/boot/compressed/mkpiggy.c` for the payload's end;
//! the PVH boot ABI (Xen's docs/misc/pvh.pandoc) and `arch/x86/platform/pvh/head.S` for the entry.
//!
//! Decision: a loader reads every byte of the file, so what is not memory of the kernel is left out. Sections and symbols go, and
//! the zeros at a segment's end (the linker wrote .bss and .brk out, 10 MiB of them) become memory that is not in the file: loaders
//! clear it anyway. Of 53 MB in Debian's 6.1, 37 MB remain. Segments begin at page boundaries, so that a loader may map them.

use thiserror::Error;

use crate::decompress::{Compression, DecompressError, decompress};
use crate::elf::{
    ET_EXEC, Elf, ElfError, HEADER, PROGRAM_HEADER, PT_LOAD, PT_NOTE, Segment, slice, u16_at, u32_at,
};

/// Longest kernel that is unpacked, bytes. Distribution kernels have about 60 MB.
pub(crate) const LONGEST: u64 = 512 << 20;

const PAGE: u64 = 4096;

/// Why a file cannot be the guest's kernel.
#[derive(Debug, Error)]
pub enum KernelError {
    /// Neither bzImage nor ELF.
    #[error("it is neither an x86 kernel image (bzImage, what distributions call vmlinuz) nor an ELF kernel")]
    NoKernel,
    /// Before boot protocol 2.08.
    #[error("its boot protocol {}.{:02} is older than 2.08 and does not say where the kernel is", .0 >> 8, .0 & 0xff)]
    OldProtocol(u16),
    /// The header's numbers point past the end.
    #[error("it is cut off: its header speaks of bytes past its end")]
    Truncated,
    /// The payload could not be unpacked.
    #[error("the kernel inside cannot be unpacked")]
    Payload(#[source] DecompressError),
    /// The payload has another length than it says.
    #[error("the kernel inside has {found} bytes instead of {said}: the file is damaged")]
    Length {
        /// What came out.
        found: u64,
        /// What the file says.
        said: u64,
    },
    /// The unpacked kernel is no good ELF file.
    #[error("the kernel's ELF file is not usable")]
    Elf(#[source] ElfError),
    /// A kernel in another form than an executable with segments at fixed addresses.
    #[error("the kernel's ELF file is not usable: {0}")]
    Form(&'static str),
    /// No PVH note.
    #[error(
        "the kernel has no PVH entry: it was built without CONFIG_PVH; take a distribution's kernel for clouds"
    )]
    NoPvh,
    /// The kernel's version was not found.
    #[error("the kernel does not say its version")]
    NoRelease,
}

/// A kernel ready to be loaded.
#[derive(Debug)]
pub(crate) struct Kernel {
    /// The ELF file.
    pub(crate) elf: Vec<u8>,
    /// What `uname -r` will say.
    pub(crate) release: String,
    /// Physical address of the 32-bit PVH entry.
    pub(crate) pvh_entry: u32,
}

impl Kernel {
    /// Takes the kernel out of a bzImage, or an ELF kernel as it is.
    pub(crate) fn extract(file: &[u8]) -> Result<Self, KernelError> {
        if file.starts_with(b"\x7fELF") {
            return Self::from_elf(file);
        }
        let payload = payload(file)?;
        let compression = Compression::of(payload).map_err(KernelError::Payload)?;
        // The build appends the unpacked length to what it compressed (mkpiggy.c reads it there); gzip's own format ends with it.
        let (stream, said) = payload.split_last_chunk::<4>().ok_or(KernelError::Truncated)?;
        let said = u64::from(u32::from_le_bytes(*said));
        if said > LONGEST {
            return Err(KernelError::Payload(DecompressError::TooLong(LONGEST)));
        }
        let stream = if compression == Compression::Gzip { payload } else { stream };
        let unpacked = decompress(compression, stream, said).map_err(KernelError::Payload)?;
        if unpacked.len() as u64 != said {
            return Err(KernelError::Length { found: unpacked.len() as u64, said });
        }
        Self::from_elf(&unpacked)
    }

    fn from_elf(file: &[u8]) -> Result<Self, KernelError> {
        // What counts is what is loaded: a damaged file may say something else besides.
        let elf = strip(&Elf::parse(file).map_err(KernelError::Elf)?)?;
        let release = release(&elf).ok_or(KernelError::NoRelease)?;
        let pvh_entry = pvh_entry(&Elf::parse(&elf).map_err(KernelError::Elf)?)?;
        Ok(Self { elf, release, pvh_entry })
    }
}

/// The compressed kernel in a bzImage.
fn payload(file: &[u8]) -> Result<&[u8], KernelError> {
    // The setup header: "HdrS" at 0x202.
    if file.get(0x202..0x206) != Some(b"HdrS") {
        return Err(KernelError::NoKernel);
    }
    let protocol = u16_at(file, 0x206).ok_or(KernelError::Truncated)?;
    // payload_offset and payload_length exist since 2.08.
    if protocol < 0x208 {
        return Err(KernelError::OldProtocol(protocol));
    }
    // setup_sects, without the boot sector; 0 means 4.
    let sectors = match file[0x1f1] {
        0 => 4,
        sectors => u64::from(sectors),
    };
    let (offset, length) = u32_at(file, 0x248).zip(u32_at(file, 0x24c)).ok_or(KernelError::Truncated)?;
    let start = (sectors + 1) * 512 + u64::from(offset);
    slice(file, start, length.into()).ok_or(KernelError::Truncated)
}

/// The version from the banner (`init/version.c`): "Linux version RELEASE (".
fn release(file: &[u8]) -> Option<String> {
    const BANNER: &[u8] = b"Linux version ";
    const LONGEST: usize = 64; // __NEW_UTS_LEN
    let mut rest = file;
    while let Some(at) = find(rest, BANNER) {
        rest = &rest[at + BANNER.len()..];
        let length = rest.iter().take(LONGEST + 1).position(|byte| *byte == b' ');
        let word = length.and_then(|length| std::str::from_utf8(&rest[..length]).ok());
        let is_release = |word: &&str| {
            word.starts_with(|c: char| c.is_ascii_digit())
                && word.chars().all(|c| c.is_ascii_graphic() && c != '/')
        };
        if let Some(word) = word.filter(is_release) {
            return Some(word.to_owned());
        }
    }
    None
}

/// Where `what` begins in `data`.
fn find(data: &[u8], what: &[u8]) -> Option<usize> {
    let mut from = 0;
    loop {
        // One byte first: this runs over some fifty MB.
        from += data.get(from..)?.iter().position(|byte| *byte == what[0])?;
        if data[from..].starts_with(what) {
            return Some(from);
        }
        from += 1;
    }
}

/// The entry that the note XEN_ELFNOTE_PHYS32_ENTRY names.
fn pvh_entry(elf: &Elf<'_>) -> Result<u32, KernelError> {
    const PHYS32_ENTRY: u32 = 18;
    let notes = elf.notes().map_err(KernelError::Elf)?;
    let note = notes.iter().find(|note| note.owner == b"Xen" && note.kind == PHYS32_ENTRY);
    // The ABI asks for 4 bytes, Linux writes a pointer of 8.
    let number: Option<u64> = note.and_then(|note| match note.content.len() {
        4 => note.content.try_into().ok().map(|bytes| u32::from_le_bytes(bytes).into()),
        8 => note.content.try_into().ok().map(u64::from_le_bytes),
        _ => None,
    });
    let entry = number.ok_or(KernelError::NoPvh)?;
    let inside = |segment: &&Segment| {
        segment.kind == PT_LOAD
            && entry.checked_sub(segment.physical_address).is_some_and(|offset| offset < segment.file_size)
    };
    match (u32::try_from(entry), elf.segments.iter().find(inside)) {
        (Ok(entry), Some(_)) => Ok(entry),
        _ => Err(KernelError::Form("its PVH entry lies in no segment")),
    }
}

/// The same kernel with nothing but what is loaded, and its notes.
fn strip(elf: &Elf<'_>) -> Result<Vec<u8>, KernelError> {
    if elf.kind != ET_EXEC {
        return Err(KernelError::Form("it is no executable at fixed addresses"));
    }
    let of_kind = |kind| elf.segments.iter().filter(move |segment| segment.kind == kind);
    let headers = of_kind(PT_LOAD).count() + of_kind(PT_NOTE).count();
    let mut content = vec![0; HEADER + headers * PROGRAM_HEADER];
    let mut kept = Vec::new();
    let mut total: u64 = 0;
    for segment in of_kind(PT_LOAD) {
        let bytes = elf.content(segment).map_err(KernelError::Elf)?;
        let end = segment.physical_address.checked_add(segment.memory_size);
        if segment.memory_size < segment.file_size || end.is_none() {
            return Err(KernelError::Form("a segment has impossible sizes"));
        }
        // Segments may overlap in a hostile file, and each is copied.
        total = total.saturating_add(segment.file_size);
        if total > LONGEST {
            return Err(KernelError::Form("its segments are longer than the kernel"));
        }
        let zeros_from = bytes.iter().rposition(|byte| *byte != 0).map_or(0, |last| last as u64 + 1);
        // Notes are read from the file, also the zeros that they end with.
        let notes = of_kind(PT_NOTE).filter_map(|note| end_within(note, segment)).max();
        let length = zeros_from.max(notes.unwrap_or(0));
        // Offset and address agree in a page, as ELF demands.
        let offset = (content.len() as u64).next_multiple_of(PAGE) + segment.virtual_address % PAGE;
        content.resize(usize::try_from(offset).map_err(|_| KernelError::Truncated)?, 0);
        // `length` is at most the length of `bytes`.
        content.extend_from_slice(slice(bytes, 0, length).unwrap_or(bytes));
        kept.push((segment, Segment { offset, file_size: length, align: PAGE, ..*segment }));
    }
    if kept.is_empty() {
        return Err(KernelError::Form("nothing in it is loaded"));
    }
    let mut segments: Vec<Segment> = kept.iter().map(|(_, segment)| *segment).collect();
    for note in of_kind(PT_NOTE) {
        let home = kept
            .iter()
            .find_map(|(old, new)| end_within(note, old).map(|_| new.offset + (note.offset - old.offset)));
        let offset = home.ok_or(KernelError::Form("its notes are not loaded"))?;
        segments.push(Segment { offset, ..*note });
    }
    write_headers(&mut content, elf.entry(), &segments);
    Ok(content)
}

/// Where a note segment ends in the segment that it lies in, counted from that one's beginning.
fn end_within(note: &Segment, segment: &Segment) -> Option<u64> {
    let end = note.offset.checked_sub(segment.offset)?.checked_add(note.file_size)?;
    (end <= segment.file_size).then_some(end)
}

/// Writes the file header and the program headers at the beginning of `file`, which has room for them.
fn write_headers(file: &mut [u8], entry: u64, segments: &[Segment]) {
    let mut header = Vec::with_capacity(HEADER + segments.len() * PROGRAM_HEADER);
    // e_ident: 64 bits, little endian, version 1. e_type, e_machine, e_version.
    header.extend(b"\x7fELF\x02\x01\x01\0\0\0\0\0\0\0\0\0");
    header.extend(ET_EXEC.to_le_bytes());
    header.extend(62u16.to_le_bytes());
    header.extend(1u32.to_le_bytes());
    header.extend(entry.to_le_bytes());
    // e_phoff, no sections, no flags.
    header.extend((HEADER as u64).to_le_bytes());
    header.extend([0; 8 + 4]);
    // The counts fit: there were no more of them in the original header, which counts in 16 bits.
    for number in [HEADER, PROGRAM_HEADER, segments.len(), 0, 0, 0] {
        header.extend(u16::try_from(number).unwrap_or(u16::MAX).to_le_bytes());
    }
    for segment in segments {
        segment.write(&mut header);
    }
    file[..header.len()].copy_from_slice(&header);
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;
    use crate::fake;

    fn content(file: &[u8], index: usize) -> (Segment, Vec<u8>) {
        let elf = Elf::parse(file).unwrap();
        let segment = elf.segments[index];
        (segment, elf.content(&segment).unwrap().to_vec())
    }

    #[test]
    fn every_compression_gives_the_same_kernel() {
        let plain = Kernel::extract(&fake::kernel()).unwrap();
        assert_eq!(plain.release, fake::RELEASE);
        assert_eq!(plain.pvh_entry, 0x100_0010);
        for how in fake::PACKINGS {
            let kernel = Kernel::extract(&fake::bzimage(&fake::pack(how, &fake::kernel()))).unwrap();
            assert_eq!(kernel.elf, plain.elf, "{how}");
        }
    }

    #[test]
    fn only_what_is_loaded_stays() {
        let original = fake::kernel();
        let kernel = Kernel::extract(&original).unwrap();
        assert!(kernel.elf.len() < original.len() + 3 * 4096);
        assert_eq!(Elf::parse(&kernel.elf).unwrap().section(b".shstrtab"), Ok(None));
        for index in 0..3 {
            let (before, full) = content(&original, index);
            let (after, mut kept) = content(&kernel.elf, index);
            assert_eq!(after.offset % 4096, after.virtual_address % 4096);
            assert_eq!(after.memory_size, before.memory_size);
            assert_eq!(after.physical_address, before.physical_address);
            // The third one is the notes, which end with zeros.
            assert!(index == 2 || kept.last() != Some(&0), "zeros at the end of {index} are kept");
            kept.resize(full.len(), 0);
            assert_eq!(kept, full);
        }
        // What was written is read again: the same notes, and nothing more to take away.
        let again = Kernel::extract(&kernel.elf).unwrap();
        assert_eq!((again.pvh_entry, again.elf), (kernel.pvh_entry, kernel.elf));
    }

    #[test]
    fn what_cannot_be_used_is_named() {
        let reason = |file: &[u8]| crate::fake::chain(&Kernel::extract(file).unwrap_err());
        let cases: [(Vec<u8>, &str); 9] = [
            (b"#!/bin/sh\n".to_vec(), "neither an x86 kernel image"),
            (fake::bzimage(b"BZh91AY"), "bzip2, which is not supported"),
            (fake::bzimage(b"\x5d\0\0\0\x04abc"), "LZMA, which is not supported"),
            (fake::bzimage(b"\x89LZO\0\x0d\x0a\x1a\x0a"), "LZO, which is not supported"),
            (fake::bzimage(b"something else"), "like no compression"),
            (fake::bzimage(&fake::pack("zstd", b"no kernel")), "no ELF file"),
            (fake::elf(&[(PT_LOAD, 0x1000, b"Linux version 6.1 (x)", 0)], &[]), "CONFIG_PVH"),
            (fake::elf(&[(PT_LOAD, 0x1000, b"nothing", 0)], &[]), "does not say its version"),
            (b"\x7fELF\x01\x01".repeat(20), "not for 64-bit x86"),
        ];
        for (file, expected) in cases {
            let reason = reason(&file);
            assert!(reason.contains(expected), "{reason:?} does not contain {expected:?}");
        }
        let mut old = fake::bzimage(b"");
        old[0x206] = 7;
        assert!(reason(&old).contains("2.07 is older than 2.08"));
    }

    #[test]
    fn lengths_that_lie_are_found() {
        let length = u32::try_from(fake::kernel().len()).unwrap();
        for how in fake::PACKINGS {
            let good = fake::pack(how, &fake::kernel());
            for said in [0, 1, length - 1, length + 1, u32::MAX] {
                let mut lying = good.clone();
                let at = lying.len() - 4;
                lying[at..].copy_from_slice(&said.to_le_bytes());
                let result = Kernel::extract(&fake::bzimage(&lying));
                assert!(
                    matches!(result, Err(KernelError::Payload(_) | KernelError::Length { .. })),
                    "{how} {said}: {result:?}"
                );
            }
        }
    }

    #[test]
    fn no_cut_is_taken_for_a_kernel() {
        for how in fake::PACKINGS {
            let payload = fake::pack(how, &fake::kernel());
            let whole = fake::bzimage(&payload);
            for length in (0..whole.len() - b"what follows the payload".len()).step_by(5) {
                assert!(Kernel::extract(&whole[..length]).is_err(), "{how} {length}");
            }
        }
    }

    #[test]
    fn a_damaged_byte_gives_no_kernel_that_cannot_be_read_again() {
        for how in fake::PACKINGS {
            let mut file = fake::bzimage(&fake::pack(how, &fake::kernel()));
            for at in 0..file.len() {
                let good = std::mem::replace(&mut file[at], b's');
                if let Ok(kernel) = Kernel::extract(&file) {
                    assert_eq!(Kernel::extract(&kernel.elf).unwrap().elf, kernel.elf, "{how} {at}");
                }
                file[at] = good;
            }
        }
    }

    proptest! {
        /// Nothing in a file makes it panic, or give a kernel that cannot be read again.
        #[test]
        fn damaged_kernels_do_no_harm(
            how in 0..5usize,
            changes in prop::collection::vec((any::<prop::sample::Index>(), any::<u8>()), 0..8),
            header in prop::collection::vec((0x1f0..0x250usize, any::<u8>()), 0..2),
        ) {
            let mut file = match fake::PACKINGS.get(how) {
                Some(how) => fake::bzimage(&fake::pack(how, &fake::kernel())),
                None => fake::kernel(),
            };
            for (at, byte) in changes {
                let at = at.index(file.len());
                file[at] = byte;
            }
            for (at, byte) in header {
                file[at] = byte;
            }
            if let Ok(kernel) = Kernel::extract(&file) {
                prop_assert!(Kernel::extract(&kernel.elf).is_ok());
            }
        }

        /// The same for the ELF headers, where a changed byte is most likely to matter.
        #[test]
        fn damaged_headers_do_no_harm(changes in prop::collection::vec((0..2usize, 0..288usize, any::<u8>()), 1..5)) {
            let mut file = fake::kernel();
            let table = file.len() - 4 * PROGRAM_HEADER;
            for (part, at, byte) in changes {
                let at = if part == 0 { at % HEADER } else { table + at % (4 * PROGRAM_HEADER) };
                file[at] = byte;
            }
            let _ = Kernel::extract(&file);
        }
    }
}
