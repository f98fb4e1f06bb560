//! Inputs made for tests: as small as they can be, and right, so that a test can make one thing wrong.

use std::fs;
use std::io::Write;
use std::path::{Path, PathBuf};

use crate::build::Inputs;
use crate::elf::{HEADER, PROGRAM_HEADER, PT_LOAD, PT_NOTE, Segment};
use crate::modules::WANTED;

pub(crate) const RELEASE: &str = "6.1.0-1-test";

/// A note.
pub(crate) fn note(owner: &str, kind: u32, content: &[u8]) -> Vec<u8> {
    let mut note = Vec::new();
    for number in [owner.len() + 1, content.len(), kind as usize] {
        note.extend((number as u32).to_le_bytes());
    }
    for part in [[owner.as_bytes(), b"\0"].concat(), content.to_vec()] {
        note.extend(part);
        note.resize(note.len().next_multiple_of(4), 0);
    }
    note
}

/// An ELF file of segments (type, address, content, bytes of zeros after it) and sections.
pub(crate) fn elf(segments: &[(u32, u64, &[u8], u64)], sections: &[(&str, &[u8])]) -> Vec<u8> {
    let mut file = b"\x7fELF\x02\x01\x01\0\0\0\0\0\0\0\0\0".to_vec();
    file.extend([2, 0, 62, 0, 1, 0, 0, 0]);
    file.resize(HEADER + segments.len() * PROGRAM_HEADER, 0);
    let mut headers = Vec::new();
    for (kind, address, content, zeros) in segments {
        let segment = Segment {
            kind: *kind,
            flags: 5,
            offset: file.len() as u64,
            virtual_address: *address,
            physical_address: *address,
            file_size: content.len() as u64,
            memory_size: content.len() as u64 + zeros,
            align: 4,
        };
        segment.write(&mut headers);
        file.extend_from_slice(content);
    }
    file[HEADER..HEADER + headers.len()].copy_from_slice(&headers);
    file[32..40].copy_from_slice(&(HEADER as u64).to_le_bytes());
    file[54..58].copy_from_slice(&[56, 0, segments.len() as u8, 0]);
    if sections.is_empty() {
        return file;
    }
    // Names first: an empty one, those of the sections.
    let mut names = b"\0".to_vec();
    let mut headers = vec![0; 64];
    for (name, content) in sections {
        headers.extend(section(names.len(), file.len(), content.len()));
        names.extend([name.as_bytes(), b"\0"].concat());
        file.extend_from_slice(content);
    }
    headers.extend(section(0, file.len(), names.len()));
    file.extend(names);
    let table = file.len() as u64;
    file.extend(headers);
    file[40..48].copy_from_slice(&table.to_le_bytes());
    let count = sections.len() as u8;
    file[58..64].copy_from_slice(&[64, 0, count + 2, 0, count + 1, 0]);
    file
}

fn section(name: usize, offset: usize, size: usize) -> Vec<u8> {
    let mut header = [(name as u32).to_le_bytes(), 1u32.to_le_bytes()].concat();
    header.resize(24, 0);
    header.extend((offset as u64).to_le_bytes());
    header.extend((size as u64).to_le_bytes());
    header.resize(64, 0);
    header
}

/// An ELF kernel with a PVH entry.
pub(crate) fn kernel() -> Vec<u8> {
    let note = note("Xen", 18, &0x100_0010u64.to_le_bytes());
    let banner = format!("%s version %s\0Linux version {RELEASE} (test)\0");
    let text = [&[0x90; 64], banner.as_bytes(), &[0; 37]].concat();
    // Enough that something can be compressed, and zeros at the end that need not be kept.
    let data = [b"some data ".repeat(1000), vec![0; 5000]].concat();
    let mut file = elf(
        &[(PT_LOAD, 0x100_0000, &text, 0), (PT_LOAD, 0x200_0123, &data, 70_000), (PT_NOTE, 0, &[], 0)],
        &[(".shstrtab", b"not loaded")],
    );
    // The note lies in a third loaded segment, as in real kernels.
    let offset = file.len() as u64;
    file.extend(&note);
    let mut headers = Vec::new();
    for kind in [PT_LOAD, PT_NOTE] {
        let size = note.len() as u64;
        let (address, align) = (0x300_0000, 4);
        Segment {
            kind,
            flags: 4,
            offset,
            virtual_address: address,
            physical_address: address,
            file_size: size,
            memory_size: size,
            align,
        }
        .write(&mut headers);
    }
    // One header more than the table has room for: the table moves to the end.
    let mut table = file[HEADER..HEADER + 2 * PROGRAM_HEADER].to_vec();
    table.extend(headers);
    let at = file.len() as u64;
    file.extend(table);
    file[32..40].copy_from_slice(&at.to_le_bytes());
    file[56] = 4;
    file
}

/// How a kernel may be compressed.
pub(crate) const PACKINGS: [&str; 4] = ["gzip", "xz", "lz4", "zstd"];

/// Compresses; all but gzip with the length after it, as the kernel's build does.
pub(crate) fn pack(how: &str, data: &[u8]) -> Vec<u8> {
    let mut packed = compress(how, data);
    if how != "gzip" {
        packed.extend((data.len() as u32).to_le_bytes());
    }
    packed
}

pub(crate) fn compress(how: &str, data: &[u8]) -> Vec<u8> {
    match how {
        "gzip" => {
            let mut encoder = flate2::write::GzEncoder::new(Vec::new(), flate2::Compression::fast());
            encoder.write_all(data).unwrap();
            encoder.finish().unwrap()
        }
        "xz" => {
            let options = lzma_rust2::XzOptions::with_preset(1);
            let mut encoder = lzma_rust2::XzWriter::new(Vec::new(), options).unwrap();
            encoder.write_all(data).unwrap();
            encoder.finish().unwrap()
        }
        "lz4" => {
            let mut packed = b"\x02\x21\x4c\x18".to_vec();
            for block in data.chunks(8 << 20) {
                let block = lz4_flex::block::compress(block);
                packed.extend((block.len() as u32).to_le_bytes());
                packed.extend(block);
            }
            packed
        }
        _ => zstd::encode_all(data, 3).unwrap(),
    }
}

/// A bzImage of boot protocol 2.15 around a payload.
pub(crate) fn bzimage(payload: &[u8]) -> Vec<u8> {
    let mut file = vec![0; 0x260];
    file[0x1f1] = 1;
    file[0x202..0x208].copy_from_slice(b"HdrS\x0f\x02");
    file[0x248..0x24c].copy_from_slice(&0x33u32.to_le_bytes());
    file[0x24c..0x250].copy_from_slice(&(payload.len() as u32).to_le_bytes());
    file.resize(1024 + 0x33, 0);
    file.extend_from_slice(payload);
    file.extend(b"what follows the payload");
    file
}

/// A module; `info` are the fields of its `.modinfo` besides the kernel's version.
pub(crate) fn module(info: &[&str]) -> Vec<u8> {
    let mut section = format!("vermagic={RELEASE} SMP mod_unload\0").into_bytes();
    for field in info {
        section.extend([field.as_bytes(), b"\0"].concat());
    }
    elf(&[], &[(".text", b"code"), (".modinfo", &section)])
}

/// A program that can be the agent.
pub(crate) fn agent(protocol: u32) -> Vec<u8> {
    let note = note("podvisor", 1, &protocol.to_le_bytes());
    elf(&[(PT_LOAD, 0x40_0000, b"code", 0), (PT_NOTE, 0x40_1000, &note, 0)], &[])
}

/// A module directory in which all is built in that has no file: files are (path, content).
pub(crate) fn modules(directory: &Path, files: &[(&str, Vec<u8>)]) {
    fs::create_dir_all(directory).unwrap();
    let mut builtin = String::new();
    for wanted in WANTED {
        builtin.push_str(&format!("kernel/drivers/{}.ko\n", wanted.name));
    }
    fs::write(directory.join("modules.builtin"), builtin).unwrap();
    fs::write(directory.join("modules.builtin.modinfo"), b"crc.alias=crypto-crc\0crc.license=GPL\0").unwrap();
    for (path, content) in files {
        let path = directory.join(path);
        fs::create_dir_all(path.parent().unwrap()).unwrap();
        fs::write(path, content).unwrap();
    }
}

/// Everything that a guest is built from, below a directory.
pub(crate) fn inputs(directory: &Path) -> Inputs {
    let modules_directory = directory.join("modules");
    modules(
        &modules_directory,
        &[
            ("kernel/virtio.ko.zst", compress("zstd", &module(&["alias=virtio:d1"]))),
            ("kernel/virtio-rng.ko.gz", compress("gzip", &module(&["depends=virtio", "alias=virtio:d4v*"]))),
            (
                "kernel/overlay.ko.xz",
                compress("xz", &module(&["alias=fs-overlay", "softdep=pre: crypto-crc absent"])),
            ),
            ("kernel/veth.ko", module(&["depends="])),
        ],
    );
    let write = |name: &str, content: Vec<u8>| -> PathBuf {
        let path = directory.join(name);
        fs::write(&path, content).unwrap();
        path
    };
    Inputs {
        vmlinuz: write("vmlinuz", bzimage(&pack("zstd", &kernel()))),
        modules: modules_directory,
        agent: write("agent", agent(3)),
        extra_modules: Vec::new(),
        shell: None,
        package: None,
    }
}

/// An error with all its causes.
pub(crate) fn chain(error: &dyn std::error::Error) -> String {
    let mut text = error.to_string();
    let mut source = error.source();
    while let Some(cause) = source {
        text.push_str(": ");
        text.push_str(&cause.to_string());
        source = cause.source();
    }
    text
}
