//! Threads that serve devices: each waits for the devices that it has. Devices come and go while it waits.

use std::collections::BTreeMap;
use std::io;
use std::os::fd::OwnedFd;
use std::sync::{Mutex, PoisonError};

use podvisor_virtio::device::Wake;
use podvisor_virtio::sys;
use podvisor_virtio::transport::Attached;
use rustix::buffer::spare_capacity;
use rustix::event::epoll::{self, EventData, EventFlags};
use rustix::io::Errno;

/// A wake as a number: the device's place, then its queue, or its source from here on.
const SOURCES: usize = 128;
const WAKES: usize = 256;

/// A thread's devices, and what wakes them.
pub(crate) struct Worker {
    epoll: OwnedFd,
    /// By their places.
    devices: Mutex<BTreeMap<usize, Attached>>,
}

impl Worker {
    pub(crate) fn new() -> io::Result<Self> {
        let epoll = epoll::create(epoll::CreateFlags::CLOEXEC)?;
        Ok(Self { epoll, devices: Mutex::default() })
    }

    fn with<R>(&self, look: impl FnOnce(&mut BTreeMap<usize, Attached>) -> R) -> R {
        look(&mut self.devices.lock().unwrap_or_else(PoisonError::into_inner))
    }

    /// How many devices it has.
    pub(crate) fn load(&self) -> usize {
        self.with(|devices| devices.len())
    }

    /// Calls `look` with each of them.
    pub(crate) fn each(&self, look: impl FnMut(&Attached)) {
        let devices: Vec<Attached> = self.with(|devices| devices.values().cloned().collect());
        devices.iter().for_each(look);
    }

    /// Watches all that belongs to a device from now on.
    pub(crate) fn add(&self, place: usize, device: Attached) -> io::Result<()> {
        self.with(|devices| devices.insert(place, device.clone()));
        let watched = self.watch(place, &device);
        if watched.is_err() {
            self.remove(place);
        }
        watched
    }

    fn watch(&self, place: usize, device: &Attached) -> io::Result<()> {
        let number = |wake: usize| EventData::new_u64((place * WAKES + wake) as u64);
        for (queue, kick) in device.kicks().iter().enumerate() {
            epoll::add(&self.epoll, sys::descriptor(kick), number(queue), EventFlags::IN)?;
        }
        device.with(|endpoint, _| -> io::Result<()> {
            for (index, source) in endpoint.device().sources().into_iter().enumerate() {
                let edge = if source.edge { EventFlags::ET } else { EventFlags::empty() };
                let data = number(SOURCES + index);
                epoll::add(&self.epoll, source.descriptor, data, EventFlags::IN | edge)?;
            }
            Ok(())
        })
    }

    /// Watches nothing of a device any more.
    pub(crate) fn remove(&self, place: usize) {
        let Some(device) = self.with(|devices| devices.remove(&place)) else { return };
        // One that was not watched yet is no error.
        for kick in device.kicks() {
            let _ = epoll::delete(&self.epoll, sys::descriptor(kick));
        }
        device.with(|endpoint, _| {
            for source in endpoint.device().sources() {
                let _ = epoll::delete(&self.epoll, source.descriptor);
            }
        });
    }

    /// Serves until the machine ends.
    pub(crate) fn run(&self) -> io::Error {
        const AT_ONCE: usize = 16;
        let mut events = Vec::with_capacity(AT_ONCE);
        loop {
            events.clear();
            match epoll::wait(&self.epoll, spare_capacity(&mut events), None) {
                Ok(_) | Err(Errno::INTR) => {}
                Err(error) => return error.into(),
            }
            for event in &events {
                // The kernel's struct is packed: copy the field out.
                let data = event.data;
                let Ok(number) = usize::try_from(data.u64()) else { continue };
                let wake = match number % WAKES {
                    queue @ ..SOURCES => Wake::Queue(queue),
                    source => Wake::Source(source - SOURCES),
                };
                // One that has left since the events were taken is not there.
                let device = self.with(|devices| devices.get(&(number / WAKES)).cloned());
                if let Some(device) = device {
                    device.serve(wake);
                }
            }
        }
    }
}
