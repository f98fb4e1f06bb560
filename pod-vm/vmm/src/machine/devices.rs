//! Devices of a machine: made of what was opened for them, put into places, and served by threads. A device goes when no driver of the guest's uses
//! it any more.

use std::fs::File;
use std::os::fd::{BorrowedFd, OwnedFd};
use std::os::unix::net::UnixStream;
use std::sync::Arc;
use std::time::{Duration, Instant};

use podvisor_hypervisor::failure::{Failure, chain};
use podvisor_proto::hypervisor::{Disk, Network, Share, request::Verb};
use podvisor_virtio::block;
use podvisor_virtio::device::{Device, Memory};
use podvisor_virtio::endpoint::Endpoint;
use podvisor_virtio::{fs, net};

use super::MachineError;
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
}

/// All of them.
pub(crate) struct Devices {
    memory: Memory,
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
        transport: Arc<dyn Transport>,
        disk_threads: usize,
    ) -> Result<Self, MachineError> {
        let quick = Arc::new(Worker::new().map_err(MachineError::Descriptors)?);
        let disks = (0..disk_threads).map(|_| Worker::new().map(Arc::new));
        let disks = disks.collect::<Result<_, _>>().map_err(MachineError::Descriptors)?;
        Ok(Self { memory, transport, placed: Vec::new(), quick, disks })
    }

    /// The thread for everything but disks, and those for disks.
    pub(crate) fn workers(&self) -> (Arc<Worker>, Vec<Arc<Worker>>) {
        (Arc::clone(&self.quick), self.disks.clone())
    }

    /// The guest's memory.
    pub(crate) fn memory(&self) -> &Memory {
        &self.memory
    }

    /// From now on the guest's memory is this, for the devices that there are and those that come.
    pub(crate) fn set_memory(&mut self, memory: &Memory) {
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
        self.placed.push(Placed { kind, name: name.to_owned(), place, worker, leaving: None });
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
        let worker = self.disks.iter().min_by_key(|worker| worker.load()).cloned();
        self.add(Kind::Disk, &disk.serial, worker.ok_or(MachineError::Full)?, device)
    }

    pub(crate) fn add_network(&mut self, network: &Network, tap: File) -> Result<(), MachineError> {
        let mtu = u16::try_from(network.mtu).unwrap_or(0);
        let offload = |tap: BorrowedFd<'_>, offloads: net::Offloads| sys::set_tap_offload(tap, offloads.0);
        let device = net::Network::new(tap, address(&network.hardware_address), mtu, offload);
        self.add(Kind::Network, &network.hardware_address, Arc::clone(&self.quick), device)
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
            Verb::RemoveShare(remove) => return self.remove(request, Kind::Share, &remove.tag),
            Verb::RemoveDisk(remove) => return self.remove(request, Kind::Disk, &remove.serial),
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
        self.placed.retain_mut(|placed| {
            let Some((request, deadline)) = placed.leaving else { return true };
            if self.transport.is_unused(placed.place) == Some(true) {
                placed.worker.remove(placed.place);
                self.transport.detach(placed.place);
                over.push((request, Ok(())));
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
