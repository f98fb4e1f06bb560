//! One client: what it sent, what it is still to be sent, and what it is connected for.

use std::collections::VecDeque;
use std::os::fd::{AsFd, OwnedFd};

use podvisor_proto::monitor::MAX_FRAME;
use rustix::net::SendFlags;

use crate::frame::Incoming;
use crate::poll::{Interest, Poller, Token, Watch};

/// Bytes that may wait for a control client, one ExecSync reply of the largest size and the same again. Who has let
/// that much pile up is not reading, and is dropped.
const QUEUE_LIMIT: usize = 2 * MAX_FRAME;

/// What a connection is for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Role {
    /// Requests and replies, perhaps events.
    Control,
    /// Its stream verb has not been answered yet: what it sends meanwhile waits.
    Opening,
    /// The stream of an exec.
    Exec(u64),
    /// Attached to a container, with its input or without.
    Attach { container: u64, stdin: bool },
}

/// A client's connection.
#[derive(Debug)]
pub(crate) struct Connection {
    pub(crate) socket: OwnedFd,
    pub(crate) incoming: Incoming,
    pub(crate) role: Role,
    /// Wants events.
    pub(crate) subscribed: bool,
    /// It has used a control verb other than Hello, so it is no stream connection.
    pub(crate) used: bool,
    /// Nothing is read from it for now: what it sends has nowhere to go yet.
    paused: bool,
    /// Ends when everything is sent.
    closing: bool,
    /// Ends now.
    broken: bool,
    outgoing: VecDeque<Vec<u8>>,
    /// Bytes of the first frame of `outgoing` that are sent.
    sent: usize,
    queued: usize,
    watch: Watch,
}

impl Connection {
    pub(crate) fn new(key: u64, socket: OwnedFd) -> Self {
        Self {
            socket,
            incoming: Incoming::default(),
            role: Role::Control,
            subscribed: false,
            used: false,
            paused: false,
            closing: false,
            broken: false,
            outgoing: VecDeque::new(),
            sent: 0,
            queued: 0,
            watch: Watch::new(Token::Connection(key)),
        }
    }

    /// Bytes that wait to be taken by the client.
    pub(crate) fn queued(&self) -> usize {
        self.queued
    }

    /// Sends a frame, or as much of it as the client takes now, the rest later.
    pub(crate) fn send(&mut self, poller: &Poller, frame: Vec<u8>) {
        if self.broken || self.closing {
            return;
        }
        if self.queued > QUEUE_LIMIT {
            self.broken = true;
            return;
        }
        self.queued += frame.len();
        self.outgoing.push_back(frame);
        if self.outgoing.len() == 1 {
            self.flush(poller);
        }
    }

    /// Sends what waits.
    pub(crate) fn flush(&mut self, poller: &Poller) {
        while let Some(first) = self.outgoing.front() {
            match rustix::net::send(
                &self.socket,
                &first[self.sent..],
                SendFlags::NOSIGNAL | SendFlags::DONTWAIT,
            ) {
                Ok(count) => {
                    self.sent += count;
                    self.queued -= count;
                    if self.sent == first.len() {
                        self.outgoing.pop_front();
                        self.sent = 0;
                    }
                }
                Err(rustix::io::Errno::INTR) => {}
                Err(rustix::io::Errno::AGAIN) => break,
                Err(_) => {
                    self.broken = true;
                    break;
                }
            }
        }
        if self.outgoing.is_empty() {
            self.outgoing = VecDeque::new();
        }
        self.watch(poller);
    }

    /// Stops or resumes reading from the client; tells whether it was stopped before.
    pub(crate) fn pause(&mut self, poller: &Poller, paused: bool) -> bool {
        let before = std::mem::replace(&mut self.paused, paused);
        self.watch(poller);
        before
    }

    /// Ends the connection when everything that waits is sent. Nothing more is read or queued.
    pub(crate) fn close(&mut self, poller: &Poller) {
        self.closing = true;
        self.watch(poller);
    }

    /// Ends the connection without sending what waits.
    pub(crate) fn abort(&mut self) {
        self.broken = true;
    }

    pub(crate) fn reads(&self) -> bool {
        !(self.paused || self.closing || self.broken)
    }

    /// It is to be dropped.
    pub(crate) fn is_over(&self) -> bool {
        self.broken || (self.closing && self.outgoing.is_empty())
    }

    /// Watches for what is wanted now. It stays registered even for nothing, so that a hang-up is noticed.
    pub(crate) fn watch(&mut self, poller: &Poller) {
        let wanted = Interest { read: self.reads(), write: !self.outgoing.is_empty() };
        if self.watch.set(poller, &self.socket, Some(wanted)).is_err() {
            self.broken = true;
        }
    }

    /// The last that is done with it.
    pub(crate) fn end(mut self, poller: &Poller) {
        let _ = self.watch.set(poller, &self.socket, None);
        // A unix socket that is closed with unread input resets the connection, and the client would see an error
        // after the last frame instead of the end.
        let mut unread = [0; 4096];
        for _ in 0..256 {
            let read = rustix::net::recv(self.socket.as_fd(), &mut unread, rustix::net::RecvFlags::DONTWAIT);
            if !matches!(read, Ok((1.., _))) {
                break;
            }
        }
    }
}
