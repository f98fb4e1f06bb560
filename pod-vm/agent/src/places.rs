//! Places where virtio-mmio devices can be. What a hypervisor plugs in there it cannot announce, nor ask for: a place gets its driver, and
//! loses it, by the agent. Buses that tell the kernel themselves, as PCI does, need nothing of this.

use std::collections::BTreeMap;
use std::ffi::{OsStr, OsString};
use std::fs;
use std::io;
use std::os::unix::ffi::OsStrExt;
use std::path::Path;
use std::process::Command;
use std::time::{Duration, Instant};

const DEVICES: &str = "/sys/bus/platform/devices";
const DRIVER: &str = "/sys/bus/platform/drivers/virtio-mmio";
/// What ACPI calls such a place.
const NAME: &[u8] = b"LNRO0005:";
/// How long a place is left alone that the guest has let go of: the hypervisor takes the device out meanwhile.
const REST: Duration = Duration::from_secs(1);

/// What is remembered of them.
#[derive(Debug, Default)]
pub(crate) struct Places {
    /// Those that were let go of, and when.
    resting: BTreeMap<OsString, Instant>,
}

impl Places {
    /// Tries all that have no driver: one without a device refuses.
    pub(crate) fn look(&mut self) {
        self.resting.retain(|_, since| since.elapsed() < REST);
        for place in fs::read_dir(DEVICES).into_iter().flatten().flatten() {
            let name = place.file_name();
            let is_free = name.as_bytes().starts_with(NAME) && !place.path().join("driver").exists();
            if is_free && !self.resting.contains_key(&name) {
                let _ = fs::write(Path::new(DRIVER).join("bind"), name.as_bytes());
            }
        }
    }

    /// Lets go of a device of sysfs, where it is in such a place. A process of its own does it: it takes until the device has answered what
    /// it was asked.
    pub(crate) fn let_go(&mut self, device: &Path) -> io::Result<()> {
        let device = fs::canonicalize(device)?;
        let Some(place) = place_of(&device) else { return Ok(()) };
        self.resting.insert(place.to_owned(), Instant::now());
        // Reaped like every child.
        Command::new("/proc/self/exe").arg("--let-go").arg(place).spawn().map(drop)
    }
}

/// What that process does.
pub(crate) fn unbind(place: &str) -> io::Result<()> {
    fs::write(Path::new(DRIVER).join("unbind"), place)
}

fn place_of(device: &Path) -> Option<&OsStr> {
    let mut above = device.ancestors().filter_map(Path::file_name);
    above.find(|name| name.as_bytes().starts_with(NAME))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_device_is_in_a_place_or_on_another_bus() {
        let place = |path: &str| place_of(Path::new(path)).map(|name| name.to_str().unwrap().to_owned());
        assert_eq!(place("/sys/devices/LNXSYSTM:00/LNRO0005:03/virtio4").as_deref(), Some("LNRO0005:03"));
        assert_eq!(place("/sys/devices/pci0000:00/0000:00:03.0/virtio4"), None);
    }
}
