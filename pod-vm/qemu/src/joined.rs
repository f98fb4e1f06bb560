//! Files one after the other as one disk that cannot be written. QEMU's only driver that joins files is that of VMDK: a description (VMware, Virtual Disk
//! Format 5.0) names extents, here by the sets of descriptors that the files are in, and these are taken as they are.

use std::fmt::Write as _;
use std::fs::File;
use std::io::{self, Write as _};

use rustix::fs::{MemfdFlags, memfd_create};
use serde_json::{Value, json};

use crate::device::Kind;

/// What extents are counted in, bytes.
const SECTOR: u64 = 512;
/// Sets of descriptors above those of disks; so many for each image.
const FIRST_SET: usize = 1 << 20;
const SETS: usize = 256;

/// The sets of descriptors of the image's description and of its files.
pub(crate) fn sets(number: usize, files: usize) -> impl Iterator<Item = usize> {
    let first = FIRST_SET + number * SETS;
    first..=first + files
}

/// A file that describes extents of these lengths, in bytes.
pub(crate) fn description(number: usize, lengths: &[u64]) -> io::Result<File> {
    // No empty lines: QEMU takes an extent behind one for two.
    let mut text =
        "# Disk DescriptorFile\nversion=1\nCID=fffffffe\nparentCID=ffffffff\ncreateType=\"monolithicFlat\"\n"
            .to_owned();
    for (set, length) in sets(number, lengths.len()).skip(1).zip(lengths) {
        if !length.is_multiple_of(SECTOR) {
            return Err(io::Error::other("a file is not whole sectors long"));
        }
        // An extent of no length is none. "RW": QEMU passes over those that are "RDONLY"; nothing here can be written to.
        if *length > 0 {
            let sectors = length / SECTOR;
            writeln!(text, "RW {sectors} FLAT \"/dev/fdset/{set}\" 0").map_err(io::Error::other)?;
        }
    }
    text.push_str("ddb.adapterType = \"ide\"\nddb.geometry.cylinders = \"1\"\nddb.geometry.heads = \"16\"\nddb.geometry.sectors = \"63\"\n");
    let mut file = File::from(memfd_create("podvisor-extents", MemfdFlags::CLOEXEC)?);
    file.write_all(text.as_bytes())?;
    // QEMU's process reads it and can change nothing.
    let path = format!("/proc/self/fd/{}", std::os::fd::AsRawFd::as_raw_fd(&file));
    File::open(path)
}

/// The block node.
pub(crate) fn block_node(number: usize) -> Value {
    let description = sets(number, 0).next().unwrap_or_default();
    json!({
        "driver": "vmdk",
        "node-name": Kind::Disk.backend(number),
        "read-only": true,
        "file": {
            "driver": "file",
            "filename": format!("/dev/fdset/{description}"),
            "read-only": true,
        },
    })
}

#[cfg(test)]
mod tests {
    use std::io::Read;

    use super::*;

    #[test]
    fn extents_are_named_by_their_descriptors() {
        let mut text = String::new();
        description(2, &[8192, 0, 512]).unwrap().read_to_string(&mut text).unwrap();
        let first = FIRST_SET + 2 * SETS;
        let extents: Vec<&str> = text.lines().filter(|line| line.starts_with("RW")).collect();
        let wanted = [(16, 1), (1, 3)]
            .map(|(sectors, set)| format!("RW {sectors} FLAT \"/dev/fdset/{}\" 0", first + set));
        assert_eq!(extents, wanted);
        assert!(description(0, &[100]).is_err());
        assert_eq!(block_node(2)["file"]["filename"], format!("/dev/fdset/{first}"));
    }
}
