//! The device: requests from the guest's queues to the file system.
//!
//! The thread that reads the queues serves a request itself when it is the only one there: handing it to another thread takes as long as
//! most requests do. When more are waiting, all but the last go to the workers, and so does always what waits for a disk by its nature. So
//! one slow request holds up others for its own duration at most, and only if it came alone.

use std::io;
use std::process;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, PoisonError, RwLock};

use vhost::vhost_user::message::VhostUserProtocolFeatures as Protocol;
use vhost_user_backend::bitmap::BitmapMmapRegion;
use vhost_user_backend::{VhostUserBackend, VringMutex, VringT};
use virtio_queue::{DescriptorChain, QueueOwnedT};
use virtiofsd::descriptor_utils::{Reader, Writer};
use virtiofsd::fuse::{InHeader, Opcode};
use virtiofsd::server::Server;
use vm_memory::{Bytes, GuestAddressSpace, GuestMemoryAtomic, GuestMemoryLoadGuard, GuestMemoryMmap};
use vmm_sys_util::epoll::EventSet;

use crate::share::Share;
use crate::workers::Workers;

type Memory = GuestMemoryMmap<BitmapMmapRegion>;
type Ring = VringMutex<GuestMemoryAtomic<Memory>>;

/// Forgotten files, and everything else (virtio 1.2, 5.11.2).
const QUEUES: u32 = 2;

/// Descriptors in a queue: QEMU's most.
const LONGEST_QUEUE: usize = 1024;

/// Bytes of the tag in the configuration (virtio 1.2, 5.11.4).
const TAG_LENGTH: usize = 36;

const VIRTIO_RING_F_INDIRECT_DESC: u64 = 1 << 28;
const VIRTIO_RING_F_EVENT_IDX: u64 = 1 << 29;
const VHOST_USER_F_PROTOCOL_FEATURES: u64 = 1 << 30;
const VIRTIO_F_VERSION_1: u64 = 1 << 32;

/// Who may serve a request.
#[derive(Debug, PartialEq)]
enum Placement {
    /// The thread that reads the queues: it is done at once.
    Here,
    /// It too, if nothing else waits.
    HereIfAlone,
    /// A worker: it waits for a disk.
    Worker,
}

fn placement(opcode: u32) -> Placement {
    match Opcode::try_from(opcode) {
        Ok(Opcode::Forget | Opcode::BatchForget | Opcode::Interrupt) => Placement::Here,
        Ok(Opcode::Fsync | Opcode::Fsyncdir | Opcode::Syncfs | Opcode::Fallocate | Opcode::CopyFileRange) => {
            Placement::Worker
        }
        _ => Placement::HereIfAlone,
    }
}

/// A request as it came from a queue.
struct Request {
    chain: DescriptorChain<GuestMemoryLoadGuard<Memory>>,
    ring: Ring,
}

/// The device of one machine.
pub(crate) struct Device {
    server: Arc<Server<Share>>,
    workers: Option<Workers<Request>>,
    memory: RwLock<Option<GuestMemoryAtomic<Memory>>>,
    event_index: Arc<AtomicBool>,
    tag: Option<String>,
}

impl Device {
    /// With as many workers as `threads`; with none everything is served by the thread that reads the queues.
    pub(crate) fn new(share: Share, threads: usize, tag: Option<String>) -> io::Result<Self> {
        let server = Arc::new(Server::new(share));
        let event_index = Arc::new(AtomicBool::new(false));
        let workers = (threads > 0)
            .then(|| {
                let (server, event_index) = (Arc::clone(&server), Arc::clone(&event_index));
                Workers::start(threads, move |request| serve(&server, &event_index, request))
            })
            .transpose()?;
        Ok(Self { server, workers, memory: RwLock::new(None), event_index, tag })
    }

    fn serve_all(&self, ring: &Ring) -> Result<(), String> {
        let memory = self.memory.read().unwrap_or_else(PoisonError::into_inner).clone();
        let memory = memory.ok_or("the hypervisor gave no memory")?;
        let next = || -> Result<Option<Request>, String> {
            let mut state = ring.get_mut();
            let mut chains =
                state.get_queue_mut().iter(memory.memory()).map_err(|error| error.to_string())?;
            Ok(chains.next().map(|chain| Request { chain, ring: ring.clone() }))
        };
        loop {
            ring.disable_notification().map_err(|error| error.to_string())?;
            let mut waiting = next()?;
            while let Some(request) = waiting {
                waiting = next()?;
                match (placement(opcode(&request)), &self.workers) {
                    (Placement::Worker, Some(workers)) => workers.hand(request),
                    (Placement::HereIfAlone, Some(workers)) if waiting.is_some() => workers.hand(request),
                    _ => serve(&self.server, &self.event_index, request),
                }
                if waiting.is_none() {
                    waiting = next()?;
                }
            }
            // True if something came before the guest knew that it must notify again.
            if !ring.enable_notification().map_err(|error| error.to_string())? {
                return Ok(());
            }
        }
    }
}

/// What is asked for; 0, which is no request, where the guest sent too little at once. Only who serves it follows from that: what is served is
/// read anew.
fn opcode(request: &Request) -> u32 {
    let first = request.chain.clone().readable().next();
    let first = first.filter(|first| first.len() as usize >= size_of::<InHeader>());
    first
        .and_then(|first| request.chain.memory().read_obj::<InHeader>(first.addr()).ok())
        .map_or(0, |header| header.opcode)
}

/// Serves a request and gives its descriptors back.
fn serve(server: &Server<Share>, event_index: &AtomicBool, request: Request) {
    let Request { chain, ring } = request;
    let head = chain.head_index();
    let memory = chain.memory();
    let served = Reader::new(memory, chain.clone())
        .and_then(|reader| Ok((reader, Writer::new(memory, chain.clone())?)))
        .map_err(|error| error.to_string())
        .and_then(|(reader, writer)| {
            server.handle_message(reader, writer, None::<&mut ()>).map_err(|error| error.to_string())
        });
    let length = match served {
        Ok(length) => u32::try_from(length).unwrap_or(u32::MAX),
        Err(error) => end(&format!("a request cannot be understood: {error}")),
    };
    let mut state = ring.get_mut();
    if let Err(error) = state.add_used(head, length) {
        end(&format!("descriptors cannot be given back: {error}"));
    }
    let wanted = !event_index.load(Ordering::Relaxed) || state.needs_notification().unwrap_or(true);
    if wanted && let Err(error) = state.signal_used_queue() {
        end(&format!("the guest cannot be notified: {error}"));
    }
}

/// Ends this process: the guest or the hypervisor does not keep to the protocol, and without the device the monitor ends the machine.
fn end(why: &str) -> ! {
    log::error!("{why}");
    process::exit(1)
}

impl VhostUserBackend for Device {
    type Bitmap = BitmapMmapRegion;
    type Vring = Ring;

    fn num_queues(&self) -> usize {
        QUEUES as usize
    }

    fn max_queue_size(&self) -> usize {
        LONGEST_QUEUE
    }

    fn features(&self) -> u64 {
        VIRTIO_F_VERSION_1
            | VIRTIO_RING_F_INDIRECT_DESC
            | VIRTIO_RING_F_EVENT_IDX
            | VHOST_USER_F_PROTOCOL_FEATURES
    }

    fn protocol_features(&self) -> Protocol {
        let always =
            Protocol::MQ | Protocol::REPLY_ACK | Protocol::CONFIGURE_MEM_SLOTS | Protocol::RESET_DEVICE;
        if self.tag.is_some() { always | Protocol::CONFIG } else { always }
    }

    fn reset_device(&self) {
        self.server.destroy();
    }

    fn set_event_idx(&self, enabled: bool) {
        self.event_index.store(enabled, Ordering::Relaxed);
    }

    fn get_config(&self, offset: u32, size: u32) -> Vec<u8> {
        let mut content = self.tag.clone().unwrap_or_default().into_bytes();
        content.resize(TAG_LENGTH, 0);
        content.extend((QUEUES - 1).to_le_bytes());
        let (offset, size) = (offset as usize, size as usize);
        let end = offset.saturating_add(size);
        content.get(offset..end).map_or_else(|| vec![0; size], <[u8]>::to_vec)
    }

    fn update_memory(&self, memory: GuestMemoryAtomic<Memory>) -> io::Result<()> {
        *self.memory.write().unwrap_or_else(PoisonError::into_inner) = Some(memory);
        Ok(())
    }

    fn handle_event(&self, queue: u16, events: EventSet, rings: &[Ring], _thread: usize) -> io::Result<()> {
        let Some(ring) = rings.get(usize::from(queue)).filter(|_| events == EventSet::IN) else {
            end(&format!("queue {queue} has events {events:?}"));
        };
        if let Err(error) = self.serve_all(ring) {
            end(&format!("queue {queue} cannot be read: {error}"));
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_waits_for_a_disk_is_the_workers() {
        for (opcode, expected) in [
            (Opcode::Forget, Placement::Here),
            (Opcode::Fsync, Placement::Worker),
            (Opcode::Lookup, Placement::HereIfAlone),
            (Opcode::Read, Placement::HereIfAlone),
        ] {
            assert_eq!(placement(opcode as u32), expected, "{opcode:?}");
        }
        assert_eq!(placement(0), Placement::HereIfAlone);
        assert_eq!(placement(u32::MAX), Placement::HereIfAlone);
    }
}
