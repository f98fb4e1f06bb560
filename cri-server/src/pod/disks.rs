//! Block volumes of a pod in a virtual machine: block devices of the host that become disks of the guest. The monitor has them plugged before
//! it makes a container, and unplugged when no container has them any more.
//!
//! The spec has the host's numbers of the device, which the agent replaces by those of its disk: it finds that by its serial.

use std::os::unix::fs::FileTypeExt;
use std::path::Path;

use oci_spec::runtime::{LinuxDeviceType, Spec};
use podvisor_proto::agent::BlockDevice;
use podvisor_proto::cri;
use podvisor_proto::hypervisor::Disk;

use super::record::PodRecord;
use crate::error::PodError;

/// Refuses devices that a guest cannot have.
pub(super) fn validate(pod: &PodRecord, devices: &[cri::Device]) -> Result<(), PodError> {
    let has_user = pod.namespaces().user.is_some();
    let plugs = pod.machine.as_ref().is_some_and(|machine| machine.adds_disks);
    for (index, device) in devices.iter().enumerate() {
        let path = Path::new(&device.host_path);
        let why = match std::fs::metadata(path) {
            Err(error) => Some(error.to_string()),
            Ok(metadata) => why_not(metadata.file_type().is_block_device(), has_user).map(str::to_owned),
        };
        if let Some(why) = why {
            let field = format!("config.devices[{index}].host_path");
            return Err(PodError::invalid(field, format!("{}: {why}", path.display())));
        }
        if !plugs {
            return Err(PodError::CannotPlug { path: path.to_owned(), handler: pod.handler.clone() });
        }
    }
    Ok(())
}

/// Why a pod's containers cannot have a device.
fn why_not(is_block: bool, has_user: bool) -> Option<&'static str> {
    match (is_block, has_user) {
        (false, _) => {
            Some("is of the host, and a pod in a virtual machine can have only block devices from there")
        }
        // Nodes are bound there, and bound they belong to the guest's root.
        (true, true) => Some("is a block device, which a pod with a user namespace of its own cannot have"),
        (true, false) => None,
    }
}

/// The disks of a container, and the numbers that they have in its spec. A device is one disk of the guest, however many of its containers
/// have it, so that all of them see the same; one that may not be written is a disk that cannot be.
pub(super) fn of(devices: &[cri::Device], spec: &Spec) -> (Vec<Disk>, Vec<BlockDevice>) {
    let nodes = spec.linux().as_ref().and_then(|linux| linux.devices().as_ref());
    let mut disks: Vec<Disk> = Vec::new();
    let mut numbers = Vec::new();
    for device in devices {
        let place = if device.container_path.is_empty() { &device.host_path } else { &device.container_path };
        let node = nodes.into_iter().flatten().find(|node| node.path() == Path::new(place));
        let Some(node) = node.filter(|node| node.typ() == LinuxDeviceType::B) else { continue };
        let number = |number: i64| u32::try_from(number).unwrap_or_default();
        let (major, minor) = (number(node.major()), number(node.minor()));
        // Empty: everything.
        let read_only = !device.permissions.is_empty() && !device.permissions.contains('w');
        let serial = format!("{major}:{minor}{}", if read_only { "r" } else { "w" });
        numbers.push(BlockDevice { serial: serial.clone(), major, minor });
        if disks.iter().all(|disk| disk.serial != serial) {
            disks.push(Disk { serial, path: device.host_path.clone(), read_only });
        }
    }
    (disks, numbers)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn device(host: &str, container: &str, permissions: &str) -> cri::Device {
        cri::Device {
            host_path: host.into(),
            container_path: container.into(),
            permissions: permissions.into(),
        }
    }

    #[test]
    fn who_cannot_have_it_is_told() {
        assert_eq!(why_not(true, false), None);
        assert!(why_not(true, true).unwrap().contains("user namespace"));
        assert!(why_not(false, true).unwrap().contains("only block devices"));
    }

    #[test]
    fn a_device_is_one_disk() {
        let node = |path: &str, minor: i64| serde_json::json!({ "path": path, "type": "b", "major": 7, "minor": minor });
        let spec = serde_json::json!({
            "ociVersion": "1.0.2",
            "linux": { "devices": [node("/dev/a", 3), node("/dev/b", 3), node("/dev/loop4", 4)] },
        });
        let spec: Spec = serde_json::from_value(spec).unwrap();
        let devices = [
            device("/dev/loop3", "/dev/a", "rwm"),
            device("/dev/loop3", "/dev/b", ""),
            device("/dev/loop4", "", "rm"),
        ];
        let (disks, numbers) = of(&devices, &spec);
        let disks: Vec<(&str, &str, bool)> =
            disks.iter().map(|disk| (disk.serial.as_str(), disk.path.as_str(), disk.read_only)).collect();
        assert_eq!(disks, [("7:3w", "/dev/loop3", false), ("7:4r", "/dev/loop4", true)]);
        let numbers: Vec<(&str, u32)> = numbers.iter().map(|it| (it.serial.as_str(), it.minor)).collect();
        assert_eq!(numbers, [("7:3w", 3), ("7:3w", 3), ("7:4r", 4)]);
    }
}
