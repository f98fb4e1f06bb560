//! All connections, the socket that clients come by, and what is owed to the guest.

use std::collections::{BTreeMap, VecDeque};
use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::unix::net::{UnixListener, UnixStream};

use rustix::buffer::spare_capacity;
use rustix::event::{Timespec, epoll};
use rustix::io::Errno;
use rustix::net::{SocketFlags, accept_with};
use serde::{Deserialize, Serialize};

use super::connection::Connection;
use super::packet::{Header, Operation, TYPE_STREAM};
use super::{GUEST_CID, HOST_CID};

/// Clients at a time. One more is turned away.
pub const CONNECTIONS: usize = 512;
/// Resets that may wait for the guest's buffers before nothing more is taken from it.
const RESETS: usize = 256;
/// What the listening socket is called in epoll. Connections have other numbers.
const LISTENER: u32 = 0;
/// The host's first port. Linux' guests take those above 1023 themselves, but only for what they open, and they open nothing.
const FIRST_PORT: u32 = 1 << 30;

/// Why there is no muxer.
#[derive(Debug, thiserror::Error)]
pub enum MuxerError {
    /// epoll could not be set up.
    #[error("watch the socket of the guest's ports")]
    Watch(#[source] io::Error),
}

/// What is left of the muxer without its clients.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct State {
    /// The last of the host's ports that a connection got.
    pub last_port: u32,
    /// Packets that were dropped because they made no sense.
    pub dropped: u64,
    /// The guest is to be told that the connections it knows are gone.
    pub lost: bool,
}

/// The device, without its queues.
#[derive(Debug)]
pub struct Muxer {
    epoll: OwnedFd,
    listener: UnixListener,
    /// Off while the process has no descriptors left.
    listening: bool,
    /// By the host's port.
    connections: BTreeMap<u32, Connection>,
    pub(super) state: State,
    /// Those that have something for the guest, each once.
    queue: VecDeque<u32>,
    /// Resets for packets that belong to no connection.
    resets: VecDeque<Header>,
}

impl Muxer {
    /// Serves who connects to `listener`.
    pub fn new(listener: UnixListener) -> Result<Self, MuxerError> {
        let epoll =
            epoll::create(epoll::CreateFlags::CLOEXEC).map_err(|error| MuxerError::Watch(error.into()))?;
        listener.set_nonblocking(true).map_err(MuxerError::Watch)?;
        let mut muxer = Self {
            epoll,
            listener,
            listening: false,
            connections: BTreeMap::new(),
            state: State { last_port: FIRST_PORT, dropped: 0, lost: false },
            queue: VecDeque::new(),
            resets: VecDeque::new(),
        };
        muxer.listen().map_err(|error| MuxerError::Watch(error.into()))?;
        Ok(muxer)
    }

    /// Connections that there are just now.
    pub fn connections(&self) -> usize {
        self.connections.len()
    }

    /// Packets that were dropped because they made no sense.
    pub fn dropped(&self) -> u64 {
        self.state.dropped
    }

    /// Bytes that clients have not taken yet.
    pub fn backlog(&self) -> usize {
        self.connections.values().map(Connection::backlog).sum()
    }

    pub(super) fn drop_packet(&mut self) {
        self.state.dropped += 1;
    }

    fn listen(&mut self) -> rustix::io::Result<()> {
        let data = epoll::EventData::new_u64(LISTENER.into());
        epoll::add(&self.epoll, &self.listener, data, epoll::EventFlags::IN)?;
        self.listening = true;
        Ok(())
    }

    /// Takes note of what has happened on the clients' sockets. To be called when [`Self::as_fd`] is readable.
    pub fn advance(&mut self) -> io::Result<()> {
        const AT_ONCE: usize = 64;
        let mut events = Vec::with_capacity(AT_ONCE);
        match epoll::wait(&self.epoll, spare_capacity(&mut events), Some(&Timespec { tv_sec: 0, tv_nsec: 0 }))
        {
            Ok(_) | Err(Errno::INTR) => {}
            Err(error) => return Err(error.into()),
        }
        for event in events {
            // The kernel's struct is packed: copy the fields out.
            let (flags, data) = (event.flags, event.data);
            match u32::try_from(data.u64()) {
                Ok(LISTENER) => self.accept(),
                Ok(port) => {
                    let Some(connection) = self.connections.get_mut(&port) else { continue };
                    let hung_up = flags.intersects(epoll::EventFlags::HUP | epoll::EventFlags::ERR);
                    let readable =
                        hung_up || flags.intersects(epoll::EventFlags::IN | epoll::EventFlags::RDHUP);
                    connection.socket_changed(readable, flags.contains(epoll::EventFlags::OUT), hung_up);
                    self.settle(port);
                }
                Err(_) => {}
            }
        }
        Ok(())
    }

    fn accept(&mut self) {
        // What is left is told again.
        for _ in 0..64 {
            match accept_with(&self.listener, SocketFlags::CLOEXEC | SocketFlags::NONBLOCK) {
                Ok(socket) if self.connections.len() < CONNECTIONS => self.add(socket.into()),
                // Closed at once, which says that nobody listens.
                Ok(_) | Err(Errno::INTR | Errno::CONNABORTED) => {}
                Err(Errno::AGAIN) => return,
                Err(_) => {
                    // No descriptor or no memory for one. The next connection that goes leaves one.
                    self.listening = epoll::delete(&self.epoll, &self.listener).is_err();
                    return;
                }
            }
        }
    }

    fn add(&mut self, socket: UnixStream) {
        let mut port = self.state.last_port;
        loop {
            port = port.checked_add(1).unwrap_or(FIRST_PORT + 1);
            if !self.connections.contains_key(&port) {
                break;
            }
        }
        self.state.last_port = port;
        let flags =
            epoll::EventFlags::IN | epoll::EventFlags::OUT | epoll::EventFlags::RDHUP | epoll::EventFlags::ET;
        // Without being watched it would never move: the client sees it closed.
        if epoll::add(&self.epoll, &socket, epoll::EventData::new_u64(port.into()), flags).is_ok() {
            self.connections.insert(port, Connection::new(socket));
        }
    }

    /// After every change: an ended connection goes, one that has something for the guest queues up.
    fn settle(&mut self, port: u32) {
        let Some(connection) = self.connections.get_mut(&port) else { return };
        if connection.is_gone() {
            self.remove(port);
        } else if connection.wants_to_send() && !connection.queued {
            connection.queued = true;
            self.queue.push_back(port);
        }
    }

    fn remove(&mut self, port: u32) {
        if let Some(connection) = self.connections.remove(&port) {
            connection.end();
        }
        if !self.listening {
            // If there is still no room for it, the next one that goes tries again.
            let _ = self.listen();
        }
    }

    /// Whether the guest's packets can be taken now. If not, they can once [`Self::next_packet`] has given some.
    pub fn accepts(&self) -> bool {
        self.resets.len() < RESETS
    }

    /// Takes one packet of the guest's. `payload` is all that came with it.
    pub fn receive(&mut self, header: &Header, payload: &[u8]) {
        let complete = usize::try_from(header.length).is_ok_and(|length| length == payload.len());
        if header.source_cid != GUEST_CID || header.destination_cid != HOST_CID || !complete {
            self.drop_packet();
            return;
        }
        let port = header.destination_port;
        let connection = self.connections.get_mut(&port).filter(|connection| {
            header.kind == TYPE_STREAM
                && connection.port == header.source_port
                && !connection.is_unknown_to_guest()
        });
        match connection {
            Some(connection) => {
                connection.receive(port, header, payload);
                self.settle(port);
            }
            // The answer to a reset would be answered for ever.
            None if header.operation == Operation::Reset as u16 => {}
            None => self.resets.push_back(header.reset()),
        }
    }

    /// Whether [`Self::next_packet`] is worth a buffer.
    pub fn has_packet(&self) -> bool {
        !(self.resets.is_empty() && self.queue.is_empty())
    }

    /// The next packet for the guest; its payload is put into the first bytes of `room`.
    pub fn next_packet(&mut self, room: &mut [u8]) -> Option<Header> {
        if let Some(reset) = self.resets.pop_front() {
            return Some(reset);
        }
        // Each connection once: with a buffer too small for data some have nothing to say, and still want to.
        for _ in 0..self.queue.len() {
            let port = self.queue.pop_front()?;
            // It may have ended since it queued up.
            let Some(connection) = self.connections.get_mut(&port) else { continue };
            connection.queued = false;
            let header = connection.next(room).map(|outgoing| {
                let (buffer, forwarded) = connection.announce();
                Header {
                    source_cid: HOST_CID,
                    destination_cid: GUEST_CID,
                    source_port: port,
                    destination_port: connection.port,
                    // A payload fits the room, which nobody makes larger than a packet.
                    length: u32::try_from(outgoing.length).unwrap_or(u32::MAX),
                    kind: TYPE_STREAM,
                    operation: outgoing.operation as u16,
                    flags: outgoing.flags,
                    buffer,
                    forwarded,
                }
            });
            self.settle(port);
            if header.is_some() {
                return header;
            }
        }
        None
    }

    /// The guest's driver has begun anew and knows of no connection.
    pub fn reset(&mut self) {
        self.resets.clear();
        self.state.lost = false;
        let known: Vec<u32> = self
            .connections
            .iter()
            .filter(|(_, connection)| !connection.is_unknown_to_guest())
            .map(|(port, _)| *port)
            .collect();
        for port in known {
            self.remove(port);
        }
    }
}

impl AsFd for Muxer {
    /// Readable when [`Self::advance`] has something to do.
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.epoll.as_fd()
    }
}
