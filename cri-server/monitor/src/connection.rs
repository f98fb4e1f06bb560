//! One client: how it is reached, and what it is connected for.

use std::os::fd::OwnedFd;

use podvisor_proto::monitor::MAX_FRAME;

use crate::channel::Channel;
use crate::poll::Token;

/// Bytes that may wait for a client: one ExecSync reply of the largest size and the same again.
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
    pub(crate) channel: Channel,
    pub(crate) role: Role,
    /// Wants events.
    pub(crate) subscribed: bool,
    /// It has used a control verb other than Hello, so it is no stream connection.
    pub(crate) used: bool,
}

impl Connection {
    pub(crate) fn new(key: u64, socket: OwnedFd) -> Self {
        let channel = Channel::new(Token::Connection(key), socket, MAX_FRAME, QUEUE_LIMIT);
        Self { channel, role: Role::Control, subscribed: false, used: false }
    }
}
