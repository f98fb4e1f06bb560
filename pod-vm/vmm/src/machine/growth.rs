//! Memory that a guest can have besides what it began with: a region above it, of which more becomes the guest's as more is wanted. One change
//! at a time.
//!
//! Host memory is mapped, and KVM told of it, for no more than was ever wanted: what lies beyond is no memory, whatever the guest does.

use std::sync::Arc;
use std::time::{Duration, Instant};

use podvisor_hypervisor::failure::{Failure, chain};
use podvisor_proto::hypervisor::{Resized, reply};
use podvisor_virtio::mem::{Size, usable};
use vm_memory::mmap::MmapRegion;
use vm_memory::{GuestAddress, GuestRegionMmap};

use super::MachineError;
use super::devices::Devices;

/// How long a guest may take to take memory, or to give some back.
const PATIENCE: Duration = Duration::from_secs(10);

/// Where the region is.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Region {
    pub(crate) begin: u64,
    pub(crate) length: u64,
}

/// A change that the guest has not made yet.
#[derive(Debug)]
struct Change {
    request: u64,
    deadline: Instant,
    /// What was wanted before.
    before: u64,
}

/// All of it, in bytes.
pub(crate) struct Growth {
    region: Region,
    size: Arc<Size>,
    from_start: u64,
    mapped: u64,
    wanted: u64,
    change: Option<Change>,
}

/// A request's number and its answer.
type Answer = (u64, Result<reply::Result, Failure>);

impl Growth {
    pub(crate) fn new(region: Region, size: Arc<Size>, from_start: u64) -> Self {
        Self { region, size, from_start, mapped: 0, wanted: 0, change: None }
    }

    /// The machine is to have so much memory. `None`: it is answered later, by [`Self::advance`].
    pub(crate) fn set(
        &mut self,
        request: u64,
        bytes: u64,
        devices: &mut Devices,
    ) -> Option<Result<reply::Result, Failure>> {
        if self.change.is_some() {
            return Some(Err(Failure::wrong_state("the memory is being changed already")));
        }
        let Some(added) = bytes.checked_sub(self.from_start).filter(|added| *added <= self.region.length)
        else {
            return Some(Err(Failure::invalid("there cannot be so much memory")));
        };
        if added == self.wanted && added == self.size.has() {
            return Some(Ok(self.resized()));
        }
        if let Err(error) = self.map(usable(added).min(self.region.length), devices) {
            return Some(Err(Failure::failed("make more memory", chain(&error))));
        }
        let before = std::mem::replace(&mut self.wanted, added);
        self.size.want(added);
        self.change = Some(Change { request, deadline: Instant::now() + PATIENCE, before });
        None
    }

    fn resized(&self) -> reply::Result {
        reply::Result::Resized(Resized { memory: self.from_start + self.size.has() })
    }

    /// Has at least so much of the region mapped.
    fn map(&mut self, bytes: u64, devices: &mut Devices) -> Result<(), MachineError> {
        let Some(length) = bytes.checked_sub(self.mapped).filter(|length| *length > 0) else { return Ok(()) };
        let other =
            |error: &dyn std::error::Error| MachineError::Memory(std::io::Error::other(error.to_string()));
        let size = usize::try_from(length).map_err(|error| other(&error))?;
        let region = MmapRegion::new(size).map_err(|error| other(&error))?;
        let begin = self.region.begin + self.mapped;
        let region = GuestRegionMmap::new(region, GuestAddress(begin))
            .ok_or_else(|| MachineError::Memory(std::io::ErrorKind::InvalidInput.into()))?;
        // For as long as the machine lives.
        devices.add_memory(region)?;
        self.mapped = bytes;
        Ok(())
    }

    /// When the guest's time is over.
    pub(crate) fn deadline(&self) -> Option<Instant> {
        self.change.as_ref().map(|change| change.deadline)
    }

    /// The answer to the change that is under way, if the guest has made it, or has not in time.
    pub(crate) fn advance(&mut self) -> Option<Answer> {
        let has = self.size.has();
        let change = self.change.take_if(|change| has == self.wanted || change.deadline <= Instant::now())?;
        if has == self.wanted {
            return Some((change.request, Ok(self.resized())));
        }
        let less = self.wanted < change.before;
        // Of less the guest keeps what it has not given back; more is taken back.
        self.wanted = if less { has } else { change.before };
        self.size.want(self.wanted);
        let seconds = PATIENCE.as_secs();
        let late = || Failure::failed("add memory", format!("the guest has not taken it within {seconds} s"));
        Some((change.request, if less { Ok(self.resized()) } else { Err(late()) }))
    }
}
