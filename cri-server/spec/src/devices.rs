//! Device nodes in a container and what its device cgroup allows.

use oci_spec::runtime::{LinuxDevice, LinuxDeviceCgroup, LinuxDeviceType};

use crate::error::{Result, SpecError};
use crate::{DeviceKind, Input, ResolvedDevice};

/// What every container may use: the OCI runtime spec's default devices (config-linux.md, "Default Devices") and its own terminals.
/// `None`: any minor number.
const ALWAYS: [(i64, Option<i64>); 9] = [
    (1, Some(3)), // null
    (1, Some(5)), // zero
    (1, Some(7)), // full
    (1, Some(8)), // random
    (1, Some(9)), // urandom
    (5, Some(0)), // tty
    (5, Some(1)), // console
    (5, Some(2)), // ptmx
    (136, None),  // devpts
];

/// Made by the runtime itself, or by mounts on them.
const NOT_FROM_HOST: [&str; 6] =
    ["/dev/console", "/dev/fd", "/dev/mqueue", "/dev/ptmx", "/dev/pts", "/dev/shm"];

/// Nodes and rules.
pub(crate) fn of_container(
    input: &Input<'_>,
    privileged: bool,
) -> Result<(Vec<LinuxDevice>, Vec<LinuxDeviceCgroup>)> {
    for (index, device) in input.config.devices.iter().enumerate() {
        check(index, device)?;
    }
    let mut nodes: Vec<LinuxDevice> = Vec::new();
    let mut rules = vec![rule(false, LinuxDeviceType::A, None, None, "rwm")];
    for (major, minor) in ALWAYS {
        rules.push(rule(true, LinuxDeviceType::C, Some(major), minor, "rwm"));
    }
    for device in &input.devices {
        rules.push(rule(true, kind(device.kind), Some(device.major), Some(device.minor), &device.access));
        nodes.push(node(device));
    }
    if privileged {
        rules = vec![rule(true, LinuxDeviceType::A, None, None, "rwm")];
        for device in &input.host.devices {
            let from_host = NOT_FROM_HOST.iter().all(|path| !device.container_path.starts_with(path));
            let taken = nodes.iter().any(|node| *node.path() == device.container_path);
            if from_host && !taken {
                nodes.push(node(device));
            }
        }
    }
    Ok((nodes, rules))
}

fn check(index: usize, device: &podvisor_proto::cri::Device) -> Result<()> {
    let field = |name: &str| format!("config.devices[{index}].{name}");
    // An empty one means the same path as on the host, an empty permission string all of them: older device plugins send both.
    if !device.container_path.is_empty() {
        crate::error::absolute_path(|| field("container_path"), &device.container_path)?;
    }
    crate::error::absolute_path(|| field("host_path"), &device.host_path)?;
    if !device.permissions.chars().all(|letter| "rwm".contains(letter)) {
        let why = format!("{:?} has letters other than r, w and m", device.permissions);
        return Err(SpecError::invalid(field("permissions"), why));
    }
    Ok(())
}

fn kind(kind: DeviceKind) -> LinuxDeviceType {
    match kind {
        DeviceKind::Block => LinuxDeviceType::B,
        DeviceKind::Character => LinuxDeviceType::C,
    }
}

fn node(device: &ResolvedDevice) -> LinuxDevice {
    let mut node = LinuxDevice::default();
    node.set_path(device.container_path.clone())
        .set_typ(kind(device.kind))
        .set_major(device.major)
        .set_minor(device.minor)
        .set_file_mode(Some(device.mode))
        .set_uid(Some(device.uid))
        .set_gid(Some(device.gid));
    node
}

fn rule(
    allow: bool,
    kind: LinuxDeviceType,
    major: Option<i64>,
    minor: Option<i64>,
    access: &str,
) -> LinuxDeviceCgroup {
    let mut rule = LinuxDeviceCgroup::default();
    rule.set_allow(allow)
        .set_typ(Some(kind))
        .set_major(major)
        .set_minor(minor)
        .set_access(Some(access.to_owned()));
    rule
}

#[cfg(test)]
mod tests;
