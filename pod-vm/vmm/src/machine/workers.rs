//! Threads that serve devices: each waits for the devices that it has.

use std::io;

use podvisor_virtio::device::Wake;
use podvisor_virtio::sys;
use podvisor_virtio::transport::Attached;
use rustix::buffer::spare_capacity;
use rustix::event::epoll::{self, EventData, EventFlags};
use rustix::io::Errno;

/// A thread's devices, and what wakes them.
pub(crate) struct Worker {
    epoll: std::os::fd::OwnedFd,
    wakes: Vec<(usize, Wake)>,
    devices: Vec<Attached>,
}

impl Worker {
    /// Watches all that belongs to `devices`.
    pub(crate) fn new(devices: Vec<Attached>) -> io::Result<Self> {
        let epoll = epoll::create(epoll::CreateFlags::CLOEXEC)?;
        let mut wakes = Vec::new();
        for (number, device) in devices.iter().enumerate() {
            for (queue, kick) in device.kicks().iter().enumerate() {
                let data = EventData::new_u64(wakes.len() as u64);
                epoll::add(&epoll, sys::descriptor(kick), data, EventFlags::IN)?;
                wakes.push((number, Wake::Queue(queue)));
            }
            device.with(|endpoint, _| -> io::Result<()> {
                for (index, source) in endpoint.device().sources().into_iter().enumerate() {
                    let edge = if source.edge { EventFlags::ET } else { EventFlags::empty() };
                    let data = EventData::new_u64(wakes.len() as u64);
                    epoll::add(&epoll, source.descriptor, data, EventFlags::IN | edge)?;
                    wakes.push((number, Wake::Source(index)));
                }
                Ok(())
            })?;
        }
        Ok(Self { epoll, wakes, devices })
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
                let wake = usize::try_from(data.u64()).ok().and_then(|index| self.wakes.get(index));
                if let Some((number, wake)) = wake {
                    self.devices[*number].serve(*wake);
                }
            }
        }
    }
}
