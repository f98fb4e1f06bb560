//! Images that the host has put into the guest's memory, known by the serials that their last pages begin with
//! (podvisor.hypervisor.v1.Image): persistent memory has none of its own.

use std::fs::{self, File};
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};

const DISKS: &str = "/sys/block";
const DEVICES: &str = "/dev";
/// Bytes of the page that the serial is in, the last one.
const LABEL: u64 = 4096;
/// What disks are counted in, whatever their own blocks are (sysfs, `size`).
const SECTOR: u64 = 512;

/// The block device of the image that has this serial.
pub(crate) fn node(serial: &str) -> Option<PathBuf> {
    Some(Path::new(DEVICES).join(find(Path::new(DISKS), Path::new(DEVICES), serial)?.file_name()?))
}

/// Its device.
pub(crate) fn device(serial: &str) -> Option<PathBuf> {
    Some(find(Path::new(DISKS), Path::new(DEVICES), serial)?.join("device"))
}

fn find(disks: &Path, devices: &Path, serial: &str) -> Option<PathBuf> {
    fs::read_dir(disks).ok()?.flatten().map(|disk| disk.path()).find(|disk| {
        let name = disk.file_name().unwrap_or_default();
        name.as_encoded_bytes().starts_with(b"pmem")
            && size(disk).is_some_and(|size| labelled(&devices.join(name), size, serial))
    })
}

fn size(disk: &Path) -> Option<u64> {
    fs::read_to_string(disk.join("size")).ok()?.trim().parse::<u64>().ok()?.checked_mul(SECTOR)
}

/// Whether the last page of a device begins with the serial and a zero.
fn labelled(device: &Path, size: u64, serial: &str) -> bool {
    let mut label = [0; 4096];
    let Some(at) = size.checked_sub(LABEL) else { return false };
    let read = File::open(device).and_then(|device| device.read_exact_at(&mut label, at));
    let end = label.iter().position(|byte| *byte == 0);
    read.is_ok() && !serial.is_empty() && end.is_some_and(|end| label[..end] == *serial.as_bytes())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_image_is_found_by_its_label() {
        let (disks, devices) = (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
        for (name, serial) in [("pmem0", "one"), ("pmem1", "two"), ("vda", "three"), ("pmem2", "")] {
            fs::create_dir(disks.path().join(name)).unwrap();
            fs::write(disks.path().join(name).join("size"), "16\n").unwrap();
            let mut content = vec![7; 4096];
            content.extend(serial.as_bytes());
            content.resize(8192, 0);
            fs::write(devices.path().join(name), content).unwrap();
        }
        let found = |serial: &str| {
            let found = find(disks.path(), devices.path(), serial);
            found.map(|disk| disk.file_name().unwrap().to_str().unwrap().to_owned())
        };
        assert_eq!(found("two").as_deref(), Some("pmem1"));
        assert_eq!(found("one").as_deref(), Some("pmem0"));
        for none in ["three", "tw", "twoo", ""] {
            assert_eq!(found(none), None, "{none}");
        }
        fs::write(disks.path().join("pmem0/size"), "1\n").unwrap();
        assert_eq!(found("one"), None);
    }
}
