//! Disks of the guest, known to the host by their serials.
//!
//! A container's spec has a block volume with the numbers that the device has on the host: only the guest knows those of its disk.

use std::fs;
use std::path::{Path, PathBuf};

use oci_spec::runtime::{LinuxDeviceType, LinuxResources, Spec};
use podvisor_proto::agent::BlockDevice;

use crate::failure::Failure;

const DISKS: &str = "/sys/block";

/// Major and minor.
type Number = (i64, i64);

/// The disk that has this serial (virtio-blk, as sysfs shows it).
pub(crate) fn node(serial: &str) -> Option<PathBuf> {
    Some(Path::new("/dev").join(find(Path::new(DISKS), serial)?.file_name()?))
}

/// The device of the disk that has this serial.
pub(crate) fn device(serial: &str) -> Option<PathBuf> {
    Some(find(Path::new(DISKS), serial)?.join("device"))
}

fn find(disks: &Path, serial: &str) -> Option<PathBuf> {
    let mut disks = fs::read_dir(disks).ok()?.flatten().map(|disk| disk.path());
    disks.find(|disk| fs::read_to_string(disk.join("serial")).is_ok_and(|found| found.trim() == serial))
}

/// Which numbers of a spec stand for which of the guest.
#[derive(Debug, Clone, Default)]
pub(crate) struct Numbers(Vec<(Number, Number)>);

impl Numbers {
    /// `None` when a disk is not there.
    pub(crate) fn of(wanted: &[BlockDevice]) -> Result<Option<Self>, Failure> {
        Self::among(Path::new(DISKS), wanted)
    }

    fn among(disks: &Path, wanted: &[BlockDevice]) -> Result<Option<Self>, Failure> {
        let mut numbers = Vec::new();
        for device in wanted {
            if device.serial.is_empty() {
                return Err(Failure::invalid("a block device needs a serial"));
            }
            let Some(disk) = find(disks, &device.serial) else { return Ok(None) };
            let file = disk.join("dev");
            let text = fs::read_to_string(&file)
                .map_err(|error| Failure::system(&format!("read {}", file.display()), error))?;
            let number = text.trim().split_once(':');
            let number = number.and_then(|(major, minor)| Some((major.parse().ok()?, minor.parse().ok()?)));
            let number =
                number.ok_or_else(|| Failure::unsupported(format!("{text:?} is no device number")))?;
            numbers.push(((device.major.into(), device.minor.into()), number));
        }
        Ok(Some(Self(numbers)))
    }

    fn of_guest(&self, number: Number) -> Option<Number> {
        self.0.iter().find(|(of_host, _)| *of_host == number).map(|(_, of_guest)| *of_guest)
    }

    /// Nodes and rules.
    pub(crate) fn put_into(&self, spec: &mut Spec) {
        let Some(linux) = spec.linux_mut() else { return };
        let devices = linux.devices_mut().iter_mut().flatten();
        for device in devices.filter(|device| device.typ() == LinuxDeviceType::B) {
            if let Some((major, minor)) = self.of_guest((device.major(), device.minor())) {
                device.set_major(major).set_minor(minor);
            }
        }
        if let Some(resources) = linux.resources_mut() {
            self.put_into_rules(resources);
        }
    }

    pub(crate) fn put_into_rules(&self, resources: &mut LinuxResources) {
        let rules = resources.devices_mut().iter_mut().flatten();
        for rule in rules.filter(|rule| rule.typ() == Some(LinuxDeviceType::B)) {
            let (Some(major), Some(minor)) = (rule.major(), rule.minor()) else { continue };
            if let Some((major, minor)) = self.of_guest((major, minor)) {
                rule.set_major(Some(major)).set_minor(Some(minor));
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use oci_spec::runtime::{LinuxDevice, LinuxDeviceCgroup};

    use super::*;

    fn device(serial: &str, major: u32, minor: u32) -> BlockDevice {
        BlockDevice { serial: serial.into(), major, minor }
    }

    #[test]
    fn the_guests_numbers_take_the_place_of_the_hosts() {
        let disks = tempfile::tempdir().unwrap();
        for (name, serial, number) in [("vda", "one", "254:0\n"), ("vdb", "two\n", "254:16\n")] {
            let disk = disks.path().join(name);
            fs::create_dir(&disk).unwrap();
            fs::write(disk.join("serial"), serial).unwrap();
            fs::write(disk.join("dev"), number).unwrap();
        }
        fs::create_dir(disks.path().join("loop0")).unwrap();
        let among = |wanted: &[BlockDevice]| Numbers::among(disks.path(), wanted);
        assert!(among(&[device("one", 7, 0), device("three", 7, 1)]).unwrap().is_none());
        assert!(among(&[device("", 7, 0)]).is_err());
        // The numbers of one on the host can be those of another one in the guest.
        let numbers = among(&[device("one", 254, 16), device("two", 254, 0)]).unwrap().unwrap();
        let node = |path: &str, kind: &str, minor: i64| serde_json::json!({ "path": path, "type": kind, "major": 254, "minor": minor });
        let rule = |kind: &str, minor: serde_json::Value| serde_json::json!({ "allow": true, "type": kind, "major": 254, "minor": minor, "access": "r" });
        let mut spec: Spec = serde_json::from_value(serde_json::json!({
            "ociVersion": "1.0.2",
            "linux": {
                "devices": [node("/dev/a", "b", 16), node("/dev/b", "b", 0), node("/dev/c", "c", 16)],
                "resources": { "devices": [rule("b", 16.into()), rule("b", 0.into()), rule("c", 0.into()),
                    rule("b", serde_json::Value::Null)] },
            },
        }))
        .unwrap();
        numbers.put_into(&mut spec);
        let linux = spec.linux().as_ref().unwrap();
        let minors: Vec<i64> = linux.devices().iter().flatten().map(LinuxDevice::minor).collect();
        assert_eq!(minors, [0, 16, 16]);
        let rules = linux.resources().as_ref().unwrap().devices().clone().unwrap();
        let minors: Vec<Option<i64>> = rules.iter().map(LinuxDeviceCgroup::minor).collect();
        assert_eq!(minors, [Some(0), Some(16), Some(0), None]);
    }
}
