//! Devices of a machine, and its memory, which they reach: made of what was opened for them, put into places, and served by threads. A device goes when no driver of the guest's uses
//! it any more.

use std::fs::File;
use std::os::fd::{BorrowedFd, OwnedFd};
use std::os::unix::net::UnixStream;
use std::sync::Arc;
use std::time::{Duration, Instant};

use podvisor_hypervisor::failure::{Failure, chain};
use podvisor_proto::hypervisor::{Disk, Image, Network, Share, request::Verb};
use podvisor_virtio::block;
use podvisor_virtio::device::{Device, Memory};
use podvisor_virtio::endpoint::Endpoint;
use podvisor_virtio::{fs, net, pmem};
use vm_memory::{GuestAddress, GuestRegionMmap};

use super::MachineError;
use super::images::{self, Area};
use super::slots::{Slot, Slots};
use super::transport::Transport;
use super::workers::Worker;
use crate::sys;

/// How long a guest may take to let go of a device.
const PATIENCE: Duration = Duration::from_secs(10);

/// What kinds of devices a pod has.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Kind {
    Share,
    Disk,
    Network,
    Image,
}

/// A device that was put into a place.
struct Placed {
    kind: Kind,
    /// What the pod knows it by: tag, serial or hardware address.
    name: String,
    place: usize,
    worker: Arc<Worker>,
    /// The request to remove it, and until when the guest has time.
    leaving: Option<(u64, Instant)>,
    /// The memory that goes with it.
    image: Option<images::Placed>,
}

/// All of them.
pub(crate) struct Devices {
    memory: Memory,
    slots: Slots,
    area: Area,
    transport: Arc<dyn Transport>,
    placed: Vec<Placed>,
    /// Serves all that never waits.
    quick: Arc<Worker>,
    /// Disks wait for the host's: each of the start has a thread of its own, those that come later share some.
    disks: Vec<Arc<Worker>>,
}

/// A removal that is over: the request's number, and what came of it.
pub(crate) type Removed = (u64, Result<(), Failure>);

impl Devices {
    pub(crate) fn new(
        memory: Memory,
        slots: Slots,
        area: Area,
        transport: Arc<dyn Transport>,
        disk_threads: usize,
    ) -> Result<Self, MachineError> {
        let quick = Arc::new(Worker::new().map_err(MachineError::Descriptors)?);
        let disks = (0..disk_threads).map(|_| Worker::new().map(Arc::new));
        let disks = disks.collect::<Result<_, _>>().map_err(MachineError::Descriptors)?;
        Ok(Self { memory, slots, area, transport, placed: Vec::new(), quick, disks })
    }

    /// The thread for everything but disks, and those for disks.
    pub(crate) fn workers(&self) -> (Arc<Worker>, Vec<Arc<Worker>>) {
        (Arc::clone(&self.quick), self.disks.clone())
    }

    /// The guest has this too, and so have the devices that there are and those that come.
    pub(crate) fn add_memory(&mut self, region: GuestRegionMmap) -> Result<Slot, MachineError> {
        let region = Arc::new(region);
        let memory = self.memory.insert_region(Arc::clone(&region));
        let memory = memory.map_err(|error| MachineError::Memory(std::io::Error::other(error)))?;
        let before = self.memory.clone();
        // The devices first: what the guest has must be theirs.
        self.set_memory(memory);
        let added = self.slots.add(&region);
        added.map_err(|error| {
            self.set_memory(before);
            MachineError::Kvm("map more of the guest's memory", error.into())
        })
    }

    /// The guest has an image's memory no longer.
    fn remove_memory(&mut self, image: images::Placed) -> Result<(), MachineError> {
        self.slots.remove(image.slot)?;
        let removed = self.memory.remove_region(GuestAddress(image.begin), image.length);
        let (memory, _region) =
            removed.map_err(|error| MachineError::Memory(std::io::Error::other(error)))?;
        self.set_memory(memory);
        self.area.give_back(image.begin);
        Ok(())
    }

    fn set_memory(&mut self, memory: Memory) {
        self.memory = memory.clone();
        for worker in self.disks.iter().chain([&self.quick]) {
            worker.each(|device| device.with(|endpoint, _| endpoint.set_memory(memory.clone())));
        }
    }

    fn put(&mut self, worker: &Arc<Worker>, device: Box<dyn Device>) -> Result<usize, MachineError> {
        let endpoint = Endpoint::new(device, self.memory.clone())?;
        let (place, attached) = self.transport.attach(endpoint).ok_or(MachineError::Full)?;
        if let Err(error) = worker.add(place, attached) {
            self.transport.detach(place);
            return Err(MachineError::Descriptors(error));
        }
        Ok(place)
    }

    /// One that every machine has, for as long as it lives.
    pub(crate) fn add_own(&mut self, device: impl Device + 'static) -> Result<(), MachineError> {
        let worker = Arc::clone(&self.quick);
        self.put(&worker, Box::new(device)).map(drop)
    }

    fn add(
        &mut self,
        kind: Kind,
        name: &str,
        worker: Arc<Worker>,
        device: impl Device + 'static,
    ) -> Result<(), MachineError> {
        let place = self.put(&worker, Box::new(device))?;
        self.placed.push(Placed { kind, name: name.to_owned(), place, worker, leaving: None, image: None });
        Ok(())
    }

    /// The other end of `socket` is the file server.
    pub(crate) fn add_share(&mut self, share: &Share, socket: UnixStream) -> Result<(), MachineError> {
        let device = fs::Share::new(socket, &share.tag)
            .map_err(|error| MachineError::Share(share.tag.clone(), error))?;
        self.add(Kind::Share, &share.tag, Arc::clone(&self.quick), device)
    }

    pub(crate) fn add_disk(&mut self, disk: &Disk, file: File) -> Result<(), MachineError> {
        let device = block::Disk::new(file, &disk.serial, disk.read_only)
            .map_err(|error| MachineError::Device(disk.serial.clone(), error))?;
        self.add_to_disks(Kind::Disk, &disk.serial, device)
    }

    fn add_to_disks(&mut self, kind: Kind, name: &str, device: block::Disk) -> Result<(), MachineError> {
        let worker = self.disks.iter().min_by_key(|worker| worker.load()).cloned();
        self.add(kind, name, worker.ok_or(MachineError::Full)?, device)
    }

    pub(crate) fn add_network(&mut self, network: &Network, tap: File) -> Result<(), MachineError> {
        let mtu = u16::try_from(network.mtu).unwrap_or(0);
        let offload = |tap: BorrowedFd<'_>, offloads: net::Offloads| sys::set_tap_offload(tap, offloads.0);
        let device = net::Network::new(tap, address(&network.hardware_address), mtu, offload);
        self.add(Kind::Network, &network.hardware_address, Arc::clone(&self.quick), device)
    }

    pub(crate) fn add_image(&mut self, image: &Image, files: Vec<File>) -> Result<(), MachineError> {
        let failed = |error| MachineError::Device(image.serial.clone(), error);
        if image.disk {
            let device = block::Disk::joined(files, &image.serial).map_err(failed)?;
            return self.add_to_disks(Kind::Image, &image.serial, device);
        }
        let files = files.into_iter().map(|file| file.metadata().map(|found| (file, found.len())));
        let files = files.collect::<Result<Vec<_>, _>>().map_err(failed)?;
        let lengths: Vec<u64> = files.iter().map(|(_, length)| *length).collect();
        let length = images::length(&lengths).ok_or(MachineError::Full)?;
        let mapped = images::map(&files, &image.serial, length).map_err(failed)?;
        let begin = self.area.take(length).ok_or(MachineError::Full)?;
        let region = images::region(mapped, begin).map_err(failed);
        let slot = match region.and_then(|region| self.add_memory(region)) {
            Ok(slot) => slot,
            Err(error) => {
                self.area.give_back(begin);
                return Err(error);
            }
        };
        let placed = images::Placed { begin, length, slot };
        let device = pmem::Image::new(pmem::State { begin, length });
        match self.add(Kind::Image, &image.serial, Arc::clone(&self.quick), device) {
            Ok(()) => {
                if let Some(added) = self.placed.last_mut() {
                    added.image = Some(placed);
                }
                Ok(())
            }
            Err(error) => {
                // The first failure is the one to tell.
                let _ = self.remove_memory(placed);
                Err(error)
            }
        }
    }

    /// Does what is asked of a machine that runs. `Ok(false)`: it is under way, and told by [`Self::removed`].
    pub(crate) fn change(
        &mut self,
        request: u64,
        verb: Verb,
        descriptors: Vec<OwnedFd>,
    ) -> Result<bool, Failure> {
        let mut descriptors = descriptors.into_iter();
        let mut opened =
            || descriptors.next().ok_or_else(|| Failure::invalid("nothing was opened for the device"));
        let (name, added) = match verb {
            Verb::AddShare(add) => {
                let share = add.share.unwrap_or_default();
                self.check_new(Kind::Share, &share.tag)?;
                let added = self.add_share(&share, opened()?.into());
                (share.tag, added)
            }
            Verb::AddDisk(add) => {
                let disk = add.disk.unwrap_or_default();
                self.check_new(Kind::Disk, &disk.serial)?;
                let added = self.add_disk(&disk, opened()?.into());
                (disk.serial, added)
            }
            Verb::AddNetwork(add) => {
                let network = add.network.unwrap_or_default();
                self.check_new(Kind::Network, &network.hardware_address)?;
                let added = self.add_network(&network, opened()?.into());
                (network.hardware_address, added)
            }
            Verb::AddImage(add) => {
                let image = add.image.unwrap_or_default();
                self.check_new(Kind::Image, &image.serial)?;
                let added = self.add_image(&image, descriptors.map(File::from).collect());
                (image.serial, added)
            }
            Verb::RemoveShare(remove) => return self.remove(request, Kind::Share, &remove.tag),
            Verb::RemoveDisk(remove) => return self.remove(request, Kind::Disk, &remove.serial),
            Verb::RemoveImage(remove) => return self.remove(request, Kind::Image, &remove.serial),
            Verb::RemoveNetwork(remove) => {
                return self.remove(request, Kind::Network, &remove.hardware_address);
            }
            _ => return Err(Failure::unsupported("this machine does not know that request")),
        };
        match added {
            Ok(()) => Ok(true),
            Err(MachineError::Full) => {
                Err(Failure::unsupported("all places of this machine have a device in them"))
            }
            Err(error) => Err(Failure::failed(format!("plug {name}"), chain(&error))),
        }
    }

    fn check_new(&self, kind: Kind, name: &str) -> Result<(), Failure> {
        if self.placed.iter().any(|placed| placed.kind == kind && placed.name == name) {
            return Err(Failure::invalid(format!("there is a device {name} already")));
        }
        Ok(())
    }

    fn remove(&mut self, request: u64, kind: Kind, name: &str) -> Result<bool, Failure> {
        let found = self.placed.iter_mut().find(|placed| placed.kind == kind && placed.name == name);
        let placed = found.ok_or_else(|| Failure::not_found(format!("there is no device {name}")))?;
        if placed.leaving.is_some() {
            return Err(Failure::invalid(format!("device {name} is being removed already")));
        }
        placed.leaving = Some((request, Instant::now() + PATIENCE));
        self.transport.leave(placed.place, true);
        Ok(false)
    }

    /// When [`Self::removed`] has something to do at the latest, though no driver has said anything.
    pub(crate) fn deadline(&self) -> Option<Instant> {
        /// Somebody looks at a device for a moment, and nobody says when that is over.
        const AGAIN: Duration = Duration::from_millis(10);
        let leaving = self.placed.iter().filter_map(|placed| Some((placed, placed.leaving?)));
        let due = leaving.map(|(placed, (_, deadline))| {
            let known = self.transport.is_unused(placed.place) == Some(false);
            if known { deadline } else { deadline.min(Instant::now() + AGAIN) }
        });
        due.min()
    }

    /// Takes out what the guest has let go of, and gives up what it has not in time.
    pub(crate) fn removed(&mut self) -> Vec<Removed> {
        let mut over = Vec::new();
        let mut images = Vec::new();
        self.placed.retain_mut(|placed| {
            let Some((request, deadline)) = placed.leaving else { return true };
            if self.transport.is_unused(placed.place) == Some(true) {
                placed.worker.remove(placed.place);
                self.transport.detach(placed.place);
                match placed.image.take() {
                    Some(image) => images.push((request, image)),
                    None => over.push((request, Ok(()))),
                }
                return false;
            }
            if deadline <= Instant::now() {
                placed.leaving = None;
                self.transport.leave(placed.place, false);
                let cause = format!("the guest has not let go of it within {} s", PATIENCE.as_secs());
                over.push((request, Err(Failure::failed(format!("unplug {}", placed.name), cause))));
            }
            true
        });
        for (request, image) in images {
            let removed = self.remove_memory(image);
            over.push((request, removed.map_err(|error| Failure::failed("unplug an image", chain(&error)))));
        }
        over
    }
}

/// A hardware address whose form was checked.
fn address(text: &str) -> [u8; 6] {
    let mut address = [0; 6];
    for (byte, digits) in address.iter_mut().zip(text.split(':')) {
        *byte = u8::from_str_radix(digits, 16).unwrap_or(0);
    }
    address
}
