//! Devices that a container asks for, looked up on the host.

use std::os::unix::fs::{FileTypeExt, MetadataExt};
use std::path::{Path, PathBuf};

use podvisor_proto::cri;
use podvisor_spec::{DeviceKind, ResolvedDevice};

use crate::error::PodError;

/// The device node at `host` as it appears at `container`; `None` when it is none.
pub(crate) fn node(host: &Path, container: &Path) -> Option<ResolvedDevice> {
    let metadata = std::fs::metadata(host).ok()?;
    let kind = match metadata.file_type() {
        kind if kind.is_block_device() => DeviceKind::Block,
        kind if kind.is_char_device() => DeviceKind::Character,
        _ => return None,
    };
    Some(ResolvedDevice {
        container_path: container.to_owned(),
        kind,
        major: i64::from(rustix::fs::major(metadata.rdev())),
        minor: i64::from(rustix::fs::minor(metadata.rdev())),
        mode: metadata.mode() & 0o7777,
        uid: metadata.uid(),
        gid: metadata.gid(),
        access: "rwm".into(),
    })
}

/// Looks up all devices of a request; a directory stands for the devices in it.
pub(crate) fn resolve(devices: &[cri::Device]) -> Result<Vec<ResolvedDevice>, PodError> {
    let mut resolved = Vec::new();
    for (index, device) in devices.iter().enumerate() {
        let field = |name: &str| format!("config.devices[{index}].{name}");
        let access = if device.permissions.is_empty() { "rwm" } else { &device.permissions };
        if !access.chars().all(|letter| "rwm".contains(letter)) {
            return Err(PodError::invalid(field("permissions"), "only the letters r, w and m are allowed"));
        }
        let host = Path::new(&device.host_path);
        let container = if device.container_path.is_empty() {
            host.to_owned()
        } else {
            PathBuf::from(&device.container_path)
        };
        let invalid = |why: String| PodError::invalid(field("host_path"), why);
        let metadata =
            std::fs::metadata(host).map_err(|error| invalid(format!("{}: {error}", host.display())))?;
        let mut found = Vec::new();
        if metadata.is_dir() {
            let entries =
                std::fs::read_dir(host).map_err(|error| invalid(format!("{}: {error}", host.display())))?;
            for entry in entries.flatten() {
                found.extend(node(&entry.path(), &container.join(entry.file_name())));
            }
        } else {
            found.extend(node(host, &container));
        }
        if found.is_empty() {
            return Err(invalid(format!("{} is no device and holds none", host.display())));
        }
        resolved.extend(found.into_iter().map(|found| ResolvedDevice { access: access.into(), ..found }));
    }
    Ok(resolved)
}
