//! One connection: its states, the credit of both directions, and its ends.
//!
//! ```text
//!   Greeting ──line──▶ Requesting ──response──▶ Open ──both ends──▶ gone
//!                          │                     │ guest has closed
//!                        reset                   ▼
//!                          ▼                  Draining ──client has all──▶ gone
//!                        gone
//! ```

use std::num::Wrapping;
use std::os::unix::net::UnixStream;

use rustix::io::Errno;
use rustix::net::{RecvFlags, SendFlags, Shutdown, recv, send, shutdown};

use super::backlog::Backlog;
use super::greeting::{self, Greeting};
use super::packet::{Header, Operation, SHUTDOWN_RECEIVE, SHUTDOWN_SEND};

/// What the guest may send on one connection before the client has taken it, in bytes.
pub const BUFFER: u32 = 64 * 1024;

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum State {
    /// The client has not named a port yet.
    Greeting,
    /// The guest is asked for the connection, or is to be.
    Requesting {
        sent: bool,
    },
    Open,
    /// The guest has closed, or forgotten the connection; the client gets what was sent before that.
    Draining {
        answer: bool,
    },
    /// A reset is owed, then it is gone.
    Broken,
    Gone,
}

/// A packet to the guest, without what is the same for all packets of the connection.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Outgoing {
    pub(super) operation: Operation,
    pub(super) flags: u32,
    pub(super) length: usize,
}

impl From<Operation> for Outgoing {
    fn from(operation: Operation) -> Self {
        Self { operation, flags: 0, length: 0 }
    }
}

/// A client and the port of the guest that it is connected with.
#[derive(Debug)]
pub(super) struct Connection {
    pub(super) socket: UnixStream,
    /// The guest's; 0 until the client has named it.
    pub(super) port: u32,
    state: State,
    /// The socket was readable, writable when it was last heard of; it is heard of when that changes.
    readable: bool,
    writable: bool,
    /// The client has closed the whole socket.
    hung_up: bool,
    /// The client sends no more, or nobody wants it any more.
    client_ended: bool,
    /// The client takes no more.
    client_deaf: bool,
    /// The directions that the guest has ended.
    guest_ended: u32,
    /// The client was told that the guest sends no more.
    client_told: bool,
    /// The directions that the guest was told are ended.
    told: u32,
    backlog: Backlog,
    /// From the guest: bytes that came, went on to the client, and of the latter how many the guest knows.
    received: Wrapping<u32>,
    forwarded: Wrapping<u32>,
    announced: Wrapping<u32>,
    /// To the guest: bytes sent, and what the guest says of its own buffer.
    sent: Wrapping<u32>,
    guest_buffer: u32,
    guest_forwarded: Wrapping<u32>,
    /// The guest asked for our credit.
    owes_credit: bool,
    /// The guest was asked for its credit and has not answered.
    asked_credit: bool,
    /// It stands in the muxer's queue.
    pub(super) queued: bool,
}

impl Connection {
    pub(super) fn new(socket: UnixStream) -> Self {
        Self {
            socket,
            port: 0,
            state: State::Greeting,
            readable: false,
            writable: true,
            hung_up: false,
            client_ended: false,
            client_deaf: false,
            guest_ended: 0,
            client_told: false,
            told: 0,
            backlog: Backlog::default(),
            received: Wrapping(0),
            forwarded: Wrapping(0),
            announced: Wrapping(0),
            sent: Wrapping(0),
            guest_buffer: 0,
            guest_forwarded: Wrapping(0),
            owes_credit: false,
            asked_credit: false,
            queued: false,
        }
    }

    /// Bytes that the client has not taken yet.
    pub(super) fn backlog(&self) -> usize {
        self.backlog.len()
    }

    /// Nothing is left to be done for it.
    pub(super) fn is_gone(&self) -> bool {
        self.state == State::Gone
    }

    /// The guest has never heard of it.
    pub(super) fn is_unknown_to_guest(&self) -> bool {
        matches!(self.state, State::Greeting | State::Requesting { sent: false })
    }

    /// The socket has become readable, writable, or its other end was closed.
    pub(super) fn socket_changed(&mut self, readable: bool, writable: bool, hung_up: bool) {
        self.readable |= readable;
        self.writable |= writable;
        self.hung_up |= hung_up;
        match self.state {
            State::Greeting => match greeting::read(&self.socket) {
                Greeting::Port(port) => {
                    self.port = port;
                    self.state = State::Requesting { sent: false };
                }
                Greeting::Incomplete if !self.hung_up => {}
                Greeting::Incomplete | Greeting::Wrong => self.state = State::Gone,
            },
            State::Requesting { sent } if self.hung_up => {
                self.state = if sent { State::Broken } else { State::Gone };
            }
            State::Open | State::Draining { .. } => self.flush(),
            State::Requesting { .. } | State::Broken | State::Gone => {}
        }
    }

    /// A packet of the guest's; `number` is what the host calls the connection.
    pub(super) fn receive(&mut self, number: u32, header: &Header, payload: &[u8]) {
        let operation = Operation::from_number(header.operation);
        if operation != Some(Operation::Reset) && !self.learn_credit(header) {
            self.state = State::Broken;
            return;
        }
        match (operation, self.state) {
            (Some(Operation::Reset), State::Open | State::Draining { .. }) => {
                self.state = State::Draining { answer: false };
                self.flush();
            }
            (Some(Operation::Reset), _) => self.state = State::Gone,
            (Some(Operation::Response), State::Requesting { sent: true }) => self.open(number),
            (Some(Operation::Data), State::Open) if self.guest_ended & SHUTDOWN_SEND == 0 => {
                self.accept(payload);
            }
            (Some(Operation::Shutdown), State::Open) => self.guest_ends(header.flags),
            (Some(Operation::CreditRequest), State::Open) => self.owes_credit = true,
            (Some(Operation::CreditUpdate), State::Open) => {}
            // What a guest may still have to say when it has closed.
            (
                Some(Operation::Shutdown | Operation::CreditRequest | Operation::CreditUpdate),
                State::Draining { .. },
            ) => {}
            _ => self.state = State::Broken,
        }
    }

    /// Takes note of what the guest has room for. It cannot have passed on what it was not sent, nor take that back.
    fn learn_credit(&mut self, header: &Header) -> bool {
        let forwarded = Wrapping(header.forwarded);
        let possible = forwarded - self.guest_forwarded <= self.sent - self.guest_forwarded;
        if possible {
            self.guest_buffer = header.buffer;
            self.guest_forwarded = forwarded;
            // A guest that answers without having room will say so by itself when it has.
            self.asked_credit &= self.credit() == 0;
        }
        possible
    }

    fn open(&mut self, number: u32) {
        let line = format!("OK {number}\n");
        // A few bytes into an empty socket, which it has no reason to take in parts.
        self.state = match send(&self.socket, line.as_bytes(), SendFlags::NOSIGNAL | SendFlags::DONTWAIT) {
            Ok(count) if count == line.len() => State::Open,
            _ => State::Broken,
        };
    }

    fn accept(&mut self, payload: &[u8]) {
        if self.backlog.len() + payload.len() > BUFFER as usize {
            // More than its credit.
            self.state = State::Broken;
            return;
        }
        // The number of bytes is at most BUFFER.
        self.received += Wrapping(u32::try_from(payload.len()).unwrap_or(u32::MAX));
        let direct = if self.backlog.is_empty() { self.write(payload) } else { 0 };
        self.backlog.push(&payload[direct..]);
        self.flush();
    }

    fn guest_ends(&mut self, flags: u32) {
        self.guest_ended |= flags & (SHUTDOWN_RECEIVE | SHUTDOWN_SEND);
        if self.guest_ended & SHUTDOWN_RECEIVE != 0 && !self.client_ended {
            self.client_ended = true;
            // The client's next write fails, as it would on a socket to the guest's program itself.
            let _ = shutdown(&self.socket, Shutdown::Read);
        }
        if self.guest_ended == SHUTDOWN_RECEIVE | SHUTDOWN_SEND {
            self.state = State::Draining { answer: true };
        }
        self.flush();
    }

    /// Gives the client what it takes now.
    fn flush(&mut self) {
        while !self.backlog.is_empty() {
            let backlog = std::mem::take(&mut self.backlog);
            let count = self.write(backlog.front());
            self.backlog = backlog;
            if count == 0 {
                return;
            }
            self.backlog.advance(count);
        }
        // Once: every time would be news from the socket again.
        if self.guest_ended & SHUTDOWN_SEND != 0 && !std::mem::replace(&mut self.client_told, true) {
            let _ = shutdown(&self.socket, Shutdown::Write);
        }
        match self.state {
            State::Draining { answer: true } => self.state = State::Broken,
            State::Draining { answer: false } => self.state = State::Gone,
            _ => {}
        }
    }

    /// Writes to the client; tells how many bytes are done with. Those that nobody takes any more are, too.
    fn write(&mut self, bytes: &[u8]) -> usize {
        let mut done = 0;
        while done < bytes.len() && self.writable && !self.client_deaf {
            match send(&self.socket, &bytes[done..], SendFlags::NOSIGNAL | SendFlags::DONTWAIT) {
                Ok(count) => done += count,
                Err(Errno::INTR) => {}
                Err(Errno::AGAIN) => self.writable = false,
                Err(_) => self.client_deaf = true,
            }
        }
        if self.client_deaf {
            done = bytes.len();
        }
        // At most the length of a packet or of the backlog.
        self.forwarded += Wrapping(u32::try_from(done).unwrap_or(u32::MAX));
        done
    }

    /// Bytes that the guest has room for.
    fn credit(&self) -> usize {
        // A guest may take back what it has promised: then it gets nothing until it has passed on enough.
        let on_their_way = (self.sent - self.guest_forwarded).0;
        self.guest_buffer.saturating_sub(on_their_way) as usize
    }

    /// The guest learns of new room early enough to go on sending, and late enough not to be told of every byte.
    fn owes_update(&self) -> bool {
        self.owes_credit || (self.forwarded - self.announced).0 >= BUFFER / 2
    }

    fn may_read(&self) -> bool {
        self.readable && !self.client_ended
    }

    /// The directions that have ended on the client's side.
    fn ended(&self) -> u32 {
        let mut ended = 0;
        if self.client_ended {
            ended |= SHUTDOWN_SEND;
        }
        if self.client_deaf || (self.client_ended && self.hung_up) {
            ended |= SHUTDOWN_RECEIVE;
        }
        ended
    }

    /// Whether [`Self::next`] may have something for the guest.
    pub(super) fn wants_to_send(&self) -> bool {
        match self.state {
            State::Requesting { sent } => !sent,
            State::Open => {
                self.owes_update()
                    || (self.may_read() && (self.credit() > 0 || !self.asked_credit))
                    || self.ended() != self.told
            }
            State::Broken => true,
            State::Greeting | State::Draining { .. } | State::Gone => false,
        }
    }

    /// The next packet for the guest; data is read into `room`.
    pub(super) fn next(&mut self, room: &mut [u8]) -> Option<Outgoing> {
        match self.state {
            State::Requesting { sent: false } => {
                self.state = State::Requesting { sent: true };
                Some(Operation::Request.into())
            }
            State::Broken => {
                self.state = State::Gone;
                Some(Operation::Reset.into())
            }
            State::Open => {
                if self.owes_update() {
                    return Some(Operation::CreditUpdate.into());
                }
                self.next_data(room).or_else(|| self.next_end())
            }
            _ => None,
        }
    }

    fn next_data(&mut self, room: &mut [u8]) -> Option<Outgoing> {
        while self.may_read() {
            let credit = self.credit().min(room.len());
            if credit == 0 {
                // Without room in the buffer there is nothing to ask for.
                let ask = !room.is_empty() && !std::mem::replace(&mut self.asked_credit, true);
                return ask.then(|| Operation::CreditRequest.into());
            }
            match recv(&self.socket, &mut room[..credit], RecvFlags::DONTWAIT) {
                Ok((0, _)) => self.client_ended = true,
                Ok((length, _)) => {
                    // At most the credit, which was a u32.
                    self.sent += Wrapping(u32::try_from(length).unwrap_or(u32::MAX));
                    return Some(Outgoing { operation: Operation::Data, flags: 0, length });
                }
                Err(Errno::INTR) => {}
                Err(Errno::AGAIN) => self.readable = false,
                Err(_) => {
                    self.client_ended = true;
                    self.client_deaf = true;
                }
            }
        }
        None
    }

    fn next_end(&mut self) -> Option<Outgoing> {
        let ended = self.ended();
        if ended == self.told {
            return None;
        }
        self.told = ended;
        if ended == SHUTDOWN_RECEIVE | SHUTDOWN_SEND {
            self.state = State::Gone;
        }
        Some(Outgoing { operation: Operation::Shutdown, flags: ended, length: 0 })
    }

    /// The last that is done with it.
    pub(super) fn end(self) {
        let _ = shutdown(&self.socket, Shutdown::Both);
        // A unix socket that is closed with unread input resets the connection: the client would see an error after the last byte
        // instead of the end. Nothing more can come, so this ends.
        let mut unread = [0; 4096];
        while matches!(recv(&self.socket, &mut unread, RecvFlags::DONTWAIT), Ok((1.., _))) {}
    }

    /// What every packet of the connection says of our own buffer.
    pub(super) fn announce(&mut self) -> (u32, u32) {
        self.announced = self.forwarded;
        self.owes_credit = false;
        (BUFFER, self.forwarded.0)
    }
}
