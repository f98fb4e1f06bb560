//! Frames both ways on one socket, never waiting: a client of the monitor's, the agent in the guest, a hypervisor.

use std::collections::VecDeque;
use std::os::fd::{AsFd, OwnedFd};

use rustix::net::SendFlags;

use crate::frame::Incoming;
use crate::poll::{Interest, Poller, Token, Watch};

/// One side of a connection that carries frames.
#[derive(Debug)]
pub(crate) struct Channel {
    pub(crate) socket: OwnedFd,
    pub(crate) incoming: Incoming,
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
    /// Bytes that may wait to be sent. Who has let more pile up is not reading, and is dropped.
    queue_limit: usize,
    watch: Watch,
}

impl Channel {
    /// A channel whose frames have at most `frame_limit` bytes.
    pub(crate) fn new(token: Token, socket: OwnedFd, frame_limit: usize, queue_limit: usize) -> Self {
        Self {
            socket,
            incoming: Incoming::new(frame_limit),
            paused: false,
            closing: false,
            broken: false,
            outgoing: VecDeque::new(),
            sent: 0,
            queued: 0,
            queue_limit,
            watch: Watch::new(token),
        }
    }

    /// Bytes that wait to be taken by the other side.
    pub(crate) fn queued(&self) -> usize {
        self.queued
    }

    /// Sends a frame, or as much of it as the other side takes now, the rest later.
    pub(crate) fn send(&mut self, poller: &Poller, frame: Vec<u8>) {
        if self.broken || self.closing {
            return;
        }
        if self.queued > self.queue_limit {
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

    /// Stops or resumes reading; tells whether it was stopped before.
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
