//! The devices of a pod as QEMU is told of them, on its command line or while it runs.

use podvisor_proto::hypervisor::{Disk, Network, Share};
use serde_json::{Value, json};

/// Where a device is attached.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Place {
    /// One of microvm's places.
    Mmio,
    /// The root bus, for what is never removed.
    Root,
    /// A slot of a bridge, of that number among those of all bridges.
    Slot(usize),
}

impl Place {
    /// A virtio device of this kind at this place.
    pub(crate) fn device(self, kind: &str) -> Value {
        match self {
            Self::Mmio => json!({ "driver": format!("{kind}-device") }),
            Self::Root => json!({ "driver": format!("{kind}-pci"), "bus": "pcie.0", "disable-legacy": "on" }),
            Self::Slot(number) => json!({
                "driver": format!("{kind}-pci"),
                "bus": bridge_id(number / SLOTS),
                // The bridge's own hot-plug controller has the first.
                "addr": format!("{:x}", number % SLOTS + 1),
            }),
        }
    }

    /// A virtio device of a kind that existed before virtio 1.0, which a slot that is not PCI Express's would make speak both.
    fn old_device(self, kind: &str) -> Value {
        let mut device = self.device(kind);
        if matches!(self, Self::Slot(_)) {
            device["disable-legacy"] = "on".into();
        }
        device
    }
}

/// Slots of a bridge for devices.
pub(crate) const SLOTS: usize = 31;

pub(crate) fn bridge_id(number: usize) -> String {
    format!("bridge{number}")
}

/// What kinds of devices a pod has.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Kind {
    Share,
    Disk,
    Network,
}

impl Kind {
    /// What the device is called among QEMU's; numbers are never used twice.
    pub(crate) fn id(self, number: usize) -> String {
        match self {
            Self::Share => format!("share{number}"),
            Self::Disk => format!("disk{number}"),
            Self::Network => format!("network{number}"),
        }
    }

    /// What QEMU calls that which the device works with: a character device, block node or network back end.
    pub(crate) fn backend(self, number: usize) -> String {
        format!("{}-backend", self.id(number))
    }
}

pub(crate) fn share(number: usize, share: &Share, place: Place) -> Value {
    let mut device = place.device("vhost-user-fs");
    device["id"] = Kind::Share.id(number).into();
    device["chardev"] = Kind::Share.backend(number).into();
    device["tag"] = share.tag.as_str().into();
    device
}

pub(crate) fn disk(number: usize, disk: &Disk, block_device: bool, place: Place) -> Value {
    let mut device = place.old_device("virtio-blk");
    if block_device {
        // Who may have a device of the host's at the same time is not QEMU's to decide: a file it would lock for one machine.
        device["share-rw"] = true.into();
    }
    device["id"] = Kind::Disk.id(number).into();
    device["drive"] = Kind::Disk.backend(number).into();
    device["serial"] = disk.serial.as_str().into();
    device
}

pub(crate) fn network(number: usize, network: &Network, place: Place) -> Value {
    let mut device = place.old_device("virtio-net");
    device["id"] = Kind::Network.id(number).into();
    device["netdev"] = Kind::Network.backend(number).into();
    device["mac"] = network.hardware_address.as_str().into();
    if network.mtu != 0 {
        device["host_mtu"] = network.mtu.into();
    }
    if place != Place::Mmio {
        // No program to boot from the network with.
        device["romfile"] = "".into();
    }
    device
}

/// The block node of a disk whose file is in a set of descriptors.
pub(crate) fn block_node(number: usize, disk: &Disk, block_device: bool) -> Value {
    json!({
        "driver": "raw",
        "node-name": Kind::Disk.backend(number),
        "read-only": disk.read_only,
        "discard": "unmap",
        "file": {
            "driver": if block_device { "host_device" } else { "file" },
            "filename": format!("/dev/fdset/{}", descriptor_set(number)),
            "read-only": disk.read_only,
            "discard": "unmap",
        },
    })
}

/// The set of descriptors of a disk's file.
pub(crate) fn descriptor_set(number: usize) -> usize {
    number + 1
}

/// A device that a machine has.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Added {
    pub(crate) kind: Kind,
    /// What the pod knows it by: tag, serial or hardware address.
    pub(crate) name: String,
    pub(crate) number: usize,
    /// Which slot it is in, where there are slots.
    pub(crate) slot: usize,
    /// How many files it is joined of, if it is.
    pub(crate) joined: Option<usize>,
}

impl Added {
    pub(crate) fn place(&self) -> Place {
        Place::Slot(self.slot)
    }

    pub(crate) fn backend(&self) -> String {
        self.kind.backend(self.number)
    }
}
