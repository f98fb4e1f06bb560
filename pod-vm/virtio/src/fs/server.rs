//! The connection to the file server: a vhost-user back end (QEMU, docs/interop/vhost-user.rst).

use std::io;
use std::os::fd::AsRawFd;
use std::os::unix::net::UnixStream;

use vhost::vhost_user::message::{VhostUserProtocolFeatures, VhostUserVirtioFeatures};
use vhost::vhost_user::{Frontend, VhostUserFrontend};
use vhost::{VhostBackend, VhostUserMemoryRegionInfo, VringConfigData};
use virtio_bindings::bindings::virtio_config::VIRTIO_F_VERSION_1;
use vm_memory::GuestMemoryRegion;
use vmm_sys_util::eventfd::EventFd;

use super::bounce::Bounce;
use super::request::{PLACES, Shadow};

/// Why a file server cannot be used.
#[derive(Debug, thiserror::Error)]
pub enum ServerError {
    /// No memory or descriptors.
    #[error("make the memory that is shared with the file server")]
    Memory(#[source] io::Error),
    /// The connection has ended, or it says nonsense.
    #[error("speak with the file server")]
    Speak(#[source] vhost::Error),
    /// It cannot what is needed.
    #[error("use the file server: it does not offer virtio 1.0 and vhost-user's protocol features")]
    Features,
}

impl From<vhost::Error> for ServerError {
    fn from(error: vhost::Error) -> Self {
        Self::Speak(error)
    }
}

/// A server that has the bounce memory and its queues.
pub(super) struct Server {
    /// With it the server ends.
    _connection: Frontend,
    kicks: Vec<EventFd>,
    /// The server has answered something of a queue.
    pub(super) calls: Vec<EventFd>,
}

impl Server {
    pub(super) fn new(socket: UnixStream, bounce: &Bounce, shadows: &[Shadow]) -> Result<Self, ServerError> {
        let mut connection = Frontend::from_stream(socket, shadows.len() as u64);
        connection.set_owner()?;
        let wanted = 1 << VIRTIO_F_VERSION_1 | VhostUserVirtioFeatures::PROTOCOL_FEATURES.bits();
        if connection.get_features()? & wanted != wanted {
            return Err(ServerError::Features);
        }
        let protocol = VhostUserProtocolFeatures::MQ | VhostUserProtocolFeatures::REPLY_ACK;
        let offered = connection.get_protocol_features()?;
        connection.set_protocol_features(offered & protocol)?;
        connection.set_features(wanted)?;

        let region = bounce.region().ok_or(ServerError::Features)?;
        let begin = region.as_ptr() as u64;
        let handle = region.file_offset().map_or(-1, |file| file.file().as_raw_fd());
        connection.set_mem_table(&[VhostUserMemoryRegionInfo {
            guest_phys_addr: 0,
            memory_size: region.len(),
            userspace_addr: begin,
            mmap_offset: 0,
            mmap_handle: handle,
        }])?;
        let (mut kicks, mut calls) = (Vec::new(), Vec::new());
        for (index, shadow) in shadows.iter().enumerate() {
            let event = || EventFd::new(crate::transport::flags()).map_err(ServerError::Memory);
            let (kick, call) = (event()?, event()?);
            let places = shadow.places();
            connection.set_vring_num(index, PLACES)?;
            connection.set_vring_addr(
                index,
                &VringConfigData {
                    queue_max_size: PLACES,
                    queue_size: PLACES,
                    flags: 0,
                    desc_table_addr: begin + places.descriptors,
                    used_ring_addr: begin + places.used,
                    avail_ring_addr: begin + places.available,
                    log_addr: None,
                },
            )?;
            connection.set_vring_base(index, 0)?;
            connection.set_vring_call(index, &call)?;
            connection.set_vring_kick(index, &kick)?;
            connection.set_vring_enable(index, true)?;
            kicks.push(kick);
            calls.push(call);
        }
        Ok(Self { _connection: connection, kicks, calls })
    }

    /// There is something in a queue.
    pub(super) fn kick(&self, index: usize) {
        // Fails only when it would overflow, and then it is set.
        let _ = self.kicks.get(index).map(|kick| kick.write(1));
    }
}
