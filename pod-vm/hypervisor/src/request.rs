//! What a monitor asks for, checked. Nothing is touched here.

use podvisor_proto::hypervisor::{Disk, Image, Network, Share, Start};

use crate::failure::Failure;

/// What memory is counted in, in bytes.
pub const MEMORY_STEP: u64 = 2 << 20;

/// Puts the values of other fields in the place of the zeros that stand for them, and refuses what contradicts itself.
pub fn complete(start: &mut Start) -> Result<(), Failure> {
    if start.memory_limit == 0 {
        start.memory_limit = start.memory;
    }
    if start.cpus_limit == 0 {
        start.cpus_limit = start.cpus;
    }
    if start.console_limit == 0 {
        start.console_limit = 64 << 10;
    }
    check(start)
}

fn check(start: &Start) -> Result<(), Failure> {
    for (field, path) in [
        ("kernel", &start.kernel),
        ("initramfs", &start.initramfs),
        ("vsock_path", &start.vsock_path),
        ("run_dir", &start.run_dir),
    ] {
        check_path(field, path)?;
    }
    if !start.console_path.is_empty() {
        check_path("console_path", &start.console_path)?;
    }
    if !start.program.is_empty() {
        check_path("program", &start.program)?;
    }
    for path in &start.cgroup_procs {
        check_path("cgroup_procs", path)?;
    }
    for (field, bytes) in [("memory", start.memory), ("memory_limit", start.memory_limit)] {
        if bytes == 0 || !bytes.is_multiple_of(MEMORY_STEP) {
            return Err(Failure::invalid(format!("{field} must be a multiple of 2 MiB, and more than none")));
        }
    }
    if start.memory_limit < start.memory || start.cpus_limit < start.cpus {
        return Err(Failure::invalid("a limit must not be below what the machine begins with"));
    }
    if start.cpus == 0 || start.cpus_limit > 255 {
        return Err(Failure::invalid("there must be 1 to 255 cpus"));
    }
    if start.command_line.contains(['\0', '\n']) {
        return Err(Failure::invalid("command_line must be one line"));
    }
    start.shares.iter().try_for_each(check_share)?;
    start.disks.iter().try_for_each(check_disk)?;
    start.networks.iter().try_for_each(check_network)?;
    check_distinct("shares with the tag", start.shares.iter().map(|share| &share.tag))?;
    check_distinct("disks with the serial", start.disks.iter().map(|disk| &disk.serial))?;
    check_distinct(
        "networks with the address",
        start.networks.iter().map(|network| &network.hardware_address),
    )
}

/// Refuses a share that cannot be one.
pub fn check_share(share: &Share) -> Result<(), Failure> {
    check_name("tag", &share.tag, 36)?;
    check_path("socket_path", &share.socket_path)
}

/// Refuses a disk that cannot be one.
pub fn check_disk(disk: &Disk) -> Result<(), Failure> {
    check_name("serial", &disk.serial, 20)?;
    check_path("path", &disk.path)
}

/// Refuses an image that cannot be one.
pub fn check_image(image: &Image) -> Result<(), Failure> {
    check_name("serial", &image.serial, if image.disk { 20 } else { 64 })?;
    if !(1..=200).contains(&image.paths.len()) {
        return Err(Failure::invalid("an image must have 1 to 200 files"));
    }
    image.paths.iter().try_for_each(|path| check_path("path", path))
}

/// Refuses a network that cannot be one.
pub fn check_network(network: &Network) -> Result<(), Failure> {
    let parts: Vec<&str> = network.hardware_address.split(':').collect();
    let is_byte = |part: &&str| part.len() == 2 && part.bytes().all(|digit| digit.is_ascii_hexdigit());
    if parts.len() != 6 || !parts.iter().all(is_byte) {
        return Err(Failure::invalid("hardware_address must be like aa:bb:cc:dd:ee:ff"));
    }
    // The interface is used by a process in another namespace, by this name (IFNAMSIZ).
    check_name("tap", &network.tap, 15)?;
    check_path("namespace", &network.namespace)?;
    if network.mtu != 0 && !(68..=65_535).contains(&network.mtu) {
        return Err(Failure::invalid("mtu must be 68 to 65535, or 0 for the default"));
    }
    Ok(())
}

/// Names become parts of options, where a comma would begin another one.
fn check_name(field: &str, name: &str, longest: usize) -> Result<(), Failure> {
    let harmless = |byte: u8| byte.is_ascii_alphanumeric() || b"-_.@:".contains(&byte);
    if name.is_empty() || name.len() > longest || !name.bytes().all(harmless) {
        return Err(Failure::invalid(format!("{field} must be 1 to {longest} of A-Z a-z 0-9 - _ . @ :")));
    }
    Ok(())
}

fn check_path(field: &str, path: &str) -> Result<(), Failure> {
    if !path.starts_with('/') || path.contains('\0') {
        return Err(Failure::invalid(format!("{field} must be an absolute path")));
    }
    Ok(())
}

fn check_distinct<'a>(what: &str, names: impl Iterator<Item = &'a String>) -> Result<(), Failure> {
    let mut seen: Vec<&String> = Vec::new();
    for name in names {
        if seen.contains(&name) {
            return Err(Failure::invalid(format!("there are two {what} {name}")));
        }
        seen.push(name);
    }
    Ok(())
}
