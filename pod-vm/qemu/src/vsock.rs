//! The guest's vsock device: a vhost-user server in this process, with QEMU as its only client.
//!
//! Two threads: one answers QEMU's messages, which may take as long as QEMU takes to send them; the other moves packets between the guest's
//! queues and the clients' sockets.

use std::io;
use std::os::fd::{AsFd, AsRawFd};
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex};

use podvisor_hypervisor::failure::{Failure, chain};
use podvisor_virtio::vsock::{GUEST_CID, Muxer, QueueError, Scratch, drain, fill};
use vhost::vhost_user::Listener;
use vhost::vhost_user::message::{VhostUserProtocolFeatures, VhostUserVirtioFeatures};
use vhost_user_backend::{VhostUserBackendMut, VhostUserDaemon, VringMutex, VringT};
use virtio_bindings::bindings::{virtio_config::VIRTIO_F_VERSION_1, virtio_ring::VIRTIO_RING_F_EVENT_IDX};
use virtio_queue::QueueT;
use vm_memory::{GuestAddressSpace, GuestMemoryAtomic, GuestMemoryMmap};
use vmm_sys_util::epoll::EventSet;

type Memory = GuestMemoryAtomic<GuestMemoryMmap>;
type Ring = VringMutex<Memory>;

/// What the guest receives by, and what it sends by.
const RECEIVE: usize = 0;
const TRANSMIT: usize = 1;
const QUEUES: usize = 2;
/// What QEMU's devices have at most.
const QUEUE_SIZE: usize = 1024;
/// The number of the clients' sockets among the events; the first ones are the queues and the crate's own.
const CLIENTS: u64 = QUEUES as u64 + 1;

/// The sockets of a device whose machine is not started yet.
#[derive(Debug)]
pub(crate) struct Prepared {
    muxer: Muxer,
    listener: UnixListener,
    /// QEMU's end.
    pub(crate) frontend: UnixStream,
}

/// Makes the sockets. `path`: where clients come; `run_dir`: where a name is needed for a moment.
pub(crate) fn prepare(path: &Path, run_dir: &Path) -> Result<Prepared, Failure> {
    let failed = |error: &dyn std::error::Error| {
        Failure::failed(format!("listen for connections to the guest at {}", path.display()), chain(error))
    };
    // One that a killed hypervisor has left.
    match std::fs::remove_file(path) {
        Err(error) if error.kind() != io::ErrorKind::NotFound => return Err(failed(&error)),
        _ => {}
    }
    let clients = UnixListener::bind(path).map_err(|error| failed(&error))?;
    let muxer = Muxer::new(clients).map_err(|error| failed(&error))?;
    let (listener, frontend) = connected(&run_dir.join("vsock-device")).map_err(|error| {
        Failure::failed(format!("make the vsock device's socket in {}", run_dir.display()), error)
    })?;
    Ok(Prepared { muxer, listener, frontend })
}

/// A listening socket with one connection to it, of which no name is left.
fn connected(path: &PathBuf) -> io::Result<(UnixListener, UnixStream)> {
    let _ = std::fs::remove_file(path);
    let listener = UnixListener::bind(path)?;
    let frontend = UnixStream::connect(path);
    std::fs::remove_file(path)?;
    Ok((listener, frontend?))
}

impl Prepared {
    /// Serves QEMU, for as long as this process lives.
    pub(crate) fn serve(self) -> Result<(), Failure> {
        let failed = |cause: String| Failure::failed("serve the vsock device", cause);
        let muxer = self.muxer.as_fd().as_raw_fd();
        let device = Arc::new(Mutex::new(Device::new(self.muxer)));
        let memory = Memory::new(GuestMemoryMmap::new());
        let mut daemon = VhostUserDaemon::new("vsock".to_owned(), device, memory)
            .map_err(|error| failed(error.to_string()))?;
        for handler in daemon.get_epoll_handlers() {
            // The descriptor lives in the device, which the handler keeps.
            handler
                .register_listener(muxer, EventSet::IN, CLIENTS)
                .map_err(|error| failed(error.to_string()))?;
        }
        daemon.start(&mut Listener::from(self.listener)).map_err(|error| failed(error.to_string()))?;
        // Its threads go on until the process ends.
        std::mem::forget(daemon);
        Ok(())
    }
}

/// The device's state, in the hands of whichever thread has something to do.
struct Device {
    muxer: Muxer,
    scratch: Scratch,
    memory: Memory,
    /// The guest has made nonsense of a queue. It gets no more packets.
    broken: bool,
}

impl Device {
    fn new(muxer: Muxer) -> Self {
        let memory = Memory::new(GuestMemoryMmap::new());
        Self { muxer, scratch: Scratch::default(), memory, broken: false }
    }

    /// Moves packets until there is nothing to move, and sees to it that the guest speaks up when there is.
    fn pump(&mut self, rings: &[Ring]) -> Result<(), QueueError> {
        let memory = self.memory.memory();
        let (Some(receive), Some(transmit)) = (rings.get(RECEIVE), rings.get(TRANSMIT)) else {
            return Ok(());
        };
        loop {
            // A broken epoll cannot be mended from here, and does not happen.
            let _ = self.muxer.advance();
            let mut moved = 0;
            let (mut starved, mut more) = (false, false);

            let mut ring = transmit.get_mut();
            if ring.get_queue().ready() && ring.is_enabled() {
                ring.disable_notification()?;
                let taken = drain(ring.get_queue_mut(), &*memory, &mut self.muxer, &mut self.scratch)?;
                if taken > 0 && ring.needs_notification()? {
                    let _ = ring.signal_used_queue();
                }
                moved += taken;
            }
            drop(ring);

            let mut ring = receive.get_mut();
            if ring.get_queue().ready() && ring.is_enabled() {
                ring.disable_notification()?;
                let filled = fill(ring.get_queue_mut(), &*memory, &mut self.muxer, &mut self.scratch)?;
                if filled.buffers > 0 && ring.needs_notification()? {
                    let _ = ring.signal_used_queue();
                }
                moved += filled.buffers;
                starved = filled.starved;
            }
            drop(ring);
            if moved > 0 {
                continue;
            }

            // Nothing moves: from now on the guest has to say when it has put something there. It may have just done so.
            if self.muxer.accepts() {
                let mut ring = transmit.get_mut();
                more |= ring.get_queue().ready() && ring.is_enabled() && ring.enable_notification()?;
            }
            if starved {
                let mut ring = receive.get_mut();
                more |= ring.enable_notification()?;
            }
            if !more {
                return Ok(());
            }
        }
    }
}

impl VhostUserBackendMut for Device {
    type Bitmap = ();
    type Vring = Ring;

    fn num_queues(&self) -> usize {
        QUEUES
    }

    fn max_queue_size(&self) -> usize {
        QUEUE_SIZE
    }

    fn features(&self) -> u64 {
        1 << VIRTIO_F_VERSION_1
            | 1 << VIRTIO_RING_F_EVENT_IDX
            | VhostUserVirtioFeatures::PROTOCOL_FEATURES.bits()
    }

    /// The guest's driver begins: it knows of no connection of an earlier one.
    fn acked_features(&mut self, _features: u64) {
        self.muxer.reset();
        self.broken = false;
    }

    fn protocol_features(&self) -> VhostUserProtocolFeatures {
        VhostUserProtocolFeatures::CONFIG
    }

    fn set_event_idx(&mut self, _enabled: bool) {
        // The rings know.
    }

    fn get_config(&self, offset: u32, size: u32) -> Vec<u8> {
        let config = GUEST_CID.to_le_bytes();
        let from = usize::try_from(offset).unwrap_or(usize::MAX);
        let to = usize::try_from(size).unwrap_or(usize::MAX).saturating_add(from);
        config.get(from..to).unwrap_or_default().to_vec()
    }

    fn update_memory(&mut self, memory: Memory) -> io::Result<()> {
        self.memory = memory;
        Ok(())
    }

    fn handle_event(
        &mut self,
        _event: u16,
        _set: EventSet,
        rings: &[Ring],
        _thread: usize,
    ) -> io::Result<()> {
        if self.broken {
            let _ = self.muxer.advance();
        } else if let Err(error) = self.pump(rings) {
            eprintln!("podvisor-qemu: vsock device: {}", chain(&error));
            self.broken = true;
            self.muxer.reset();
        }
        Ok(())
    }
}
