//! A container's image as persistent memory of the pod's machine (virtio-pmem): the guest reads the host's page cache, and what the container
//! writes goes through the file server, into the same directory that it is in otherwise. Or the same image as a disk.
//!
//! ```text
//! host                                        guest
//!   image store: metadata, data of layers ──▶ /dev/pmem0: EROFS, lower layer ─┐
//!   snapshot: upper, work ── file server ───▶ a share: upper layer ───────────┴─▶ overlayfs: the container's root
//!             or a disk (writable.rs)
//! ```

use std::collections::BTreeSet;
use std::path::PathBuf;

use podvisor_image_store::Rootfs;
use podvisor_proto::agent::{AddRoot, add_root};
use podvisor_proto::hypervisor::{Disk, Image};

use super::record::{ContainerRecord, PinnedVm, PodRecord, RootfsForm, SharedPages};
use super::{share, writable};
use crate::error::{PodError, chain};
use crate::node::Node;

/// Images that a machine has at most: each takes one of the places for devices, and block volumes need some too.
const MOST: usize = 8;

/// Of one container.
#[derive(Debug)]
pub(super) struct GuestImage {
    image: Image,
    changes: Changes,
}

/// Where it writes.
#[derive(Debug)]
enum Changes {
    /// The snapshot's upper and work directory.
    Shared(PathBuf),
    Disk(Disk),
}

/// What the pod's machine has room for.
#[derive(Debug, Clone, Copy, Default)]
pub(crate) struct Room {
    pub(crate) image: bool,
    pub(crate) disk: bool,
}

/// For one more container of this image, where `others` are the images of the pod's other containers.
pub(super) fn room<'i>(image: &str, others: impl Iterator<Item = &'i str>) -> Room {
    let others: Vec<&str> = others.collect();
    Room { disk: writable::fits(others.len()), image: fits(image, others.into_iter()) }
}

/// Whether one more container of this image can have it so, where `others` are the images of the pod's other containers.
fn fits<'i>(image: &str, others: impl Iterator<Item = &'i str>) -> bool {
    let others: BTreeSet<&str> = others.collect();
    others.contains(image) || others.len() < MOST
}

/// The image of a container, made if need be; `None`: the container has it through the file server.
pub(super) async fn find(
    node: &Node,
    pod: &PodRecord,
    record: &ContainerRecord,
    snapshot: &Rootfs,
    room: Room,
) -> Result<Option<GuestImage>, PodError> {
    let Some(vm) = pod.runtime.vm() else { return Ok(None) };
    let disk = vm.rootfs == RootfsForm::Block;
    let machine = pod.machine.as_ref();
    let can = machine.is_some_and(|machine| if disk { machine.plugs_images } else { machine.maps_images });
    let why = match vm.rootfs {
        RootfsForm::Pmem => {
            "the handler has rootfs = \"pmem\", but the pod's machine cannot have images in its memory: \
             that takes hypervisor = \"kvm\"; use rootfs = \"auto\", \"block\" or \"fs\""
        }
        RootfsForm::Block => {
            "the handler has rootfs = \"block\", but nothing can be plugged into the pod's machine: \
             with machine = \"microvm\" use rootfs = \"fs\""
        }
        RootfsForm::Auto | RootfsForm::Fs => "",
    };
    if !can && !why.is_empty() {
        return Err(PodError::invalid("runtime_handler", why));
    }
    let Some(changes) = snapshot.changes().map(PathBuf::from) else { return Ok(None) };
    // Ids that are mapped are the file server's to map.
    if vm.rootfs == RootfsForm::Fs || !can || !room.image || pod.namespaces().user.is_some() {
        return Ok(None);
    }
    let made = node.images.machine_image(record.id.as_str(), domain(pod, vm).as_deref()).await;
    let made = match made {
        Ok(made) => made,
        Err(error) if vm.rootfs == RootfsForm::Auto => {
            tracing::warn!(
                container = %record.id, image = %record.image_id, error = %chain(&error),
                "the container gets its image through the file server"
            );
            return Ok(None);
        }
        Err(error) => return Err(PodError::Image(error)),
    };
    let files = std::iter::once(&made.metadata).chain(&made.blobs);
    let image = Image {
        serial: serial(&record.image_id, if disk { DISK_DIGITS } else { DIGITS }),
        disk,
        paths: files.map(|path| path.display().to_string()).collect(),
    };
    let changes = if vm.writable_disk > 0 && room.disk && machine.is_some_and(|machine| machine.adds_disks) {
        Changes::Disk(writable::make(&record.id, &changes.join("upper"), vm.writable_disk).await?)
    } else {
        Changes::Shared(changes)
    };
    Ok(Some(GuestImage { image, changes }))
}

/// Digits of a digest that tell images of a pod from each other: a disk's serial has 20 bytes.
const DIGITS: usize = 40;
const DISK_DIGITS: usize = 14;

/// What the machine knows it by: all containers of the pod with the image have the same.
fn serial(image: &str, digits: usize) -> String {
    let digest = image.rsplit(':').next().unwrap_or_default();
    format!("image-{}", digest.chars().filter(char::is_ascii_alphanumeric).take(digits).collect::<String>())
}

/// Who shares its pages; `None`: all of the node.
fn domain(pod: &PodRecord, vm: &PinnedVm) -> Option<String> {
    match vm.share_images {
        SharedPages::Node => None,
        SharedPages::Namespace => {
            let metadata = pod.config.0.metadata.as_ref();
            Some(format!("namespace {}", metadata.map_or("", |metadata| metadata.namespace.as_str())))
        }
        SharedPages::Pod => Some(format!("pod {}", pod.id)),
    }
}

impl GuestImage {
    /// What the machine gets.
    pub(super) fn image(&self) -> Image {
        self.image.clone()
    }

    /// The disk that it writes to.
    pub(super) fn disk(&self) -> Option<Disk> {
        match &self.changes {
            Changes::Disk(disk) => Some(disk.clone()),
            Changes::Shared(_) => None,
        }
    }

    /// What the file server is to have of it.
    pub(super) fn shared(&self) -> Option<PathBuf> {
        match &self.changes {
            Changes::Shared(changes) => Some(changes.clone()),
            Changes::Disk(_) => None,
        }
    }

    /// What the agent makes of it.
    pub(super) fn root(&self, record: &ContainerRecord) -> AddRoot {
        AddRoot {
            container_id: record.id.to_string(),
            lower: Some(if self.image.disk {
                add_root::Lower::BlockSerial(self.image.serial.clone())
            } else {
                add_root::Lower::PmemSerial(self.image.serial.clone())
            }),
            upper: Some(match &self.changes {
                Changes::Shared(_) => {
                    add_root::Upper::SharedLayers(format!("{}/{}/changes", share::TAG, record.id))
                }
                Changes::Disk(disk) => add_root::Upper::DiskSerial(disk.serial.clone()),
            }),
            format: false,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_machine_has_room_for_some_images() {
        let images: Vec<String> = (0..MOST).map(|number| format!("sha256:{number}")).collect();
        let others = |count: usize| images[..count].iter().map(String::as_str);
        assert!(fits("sha256:new", others(MOST - 1)));
        assert!(!fits("sha256:new", others(MOST)));
        assert!(fits("sha256:3", others(MOST)));
    }

    #[test]
    fn serials_are_short_and_harmless() {
        let digest = "0123456789abcdef".repeat(4);
        assert_eq!(serial(&format!("sha256:{digest}"), DIGITS), format!("image-{}", &digest[..40]));
        assert_eq!(serial(&format!("sha256:{digest}"), DISK_DIGITS).len(), 20);
    }
}
