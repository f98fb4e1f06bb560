//! The vsock device: who connects to its unix socket on the host reaches a port of the guest.
//!
//! ```text
//!   clients ── unix socket ──▶ Muxer ◀── receive ─┬─ drain ◀── transmit queue ── guest
//!                                │                │
//!                                └── next_packet ─┴─▶ fill ──▶ receive queue ──▶ guest
//! ```
//!
//! | file | idea |
//! |---|---|
//! | `packet.rs` | the header as it lies in the guest's memory |
//! | `greeting.rs` | `CONNECT <port>`, the client's first line |
//! | `connection.rs` | one connection: states, credit, ends |
//! | `backlog.rs` | bytes that the client has not taken yet |
//! | `muxer.rs` | all of them, and their clients' sockets |
//! | `queues.rs` | packets out of and into virtqueues |
//! | `device.rs` | the device, for a transport that leads into the same process |
//!
//! Invariants:
//! - *Whatever the guest sends, memory stays bounded*: per connection [`BUFFER`] bytes of what its client has not taken, [`CONNECTIONS`]
//!   connections, which only clients open, and a bounded number of resets that are owed. Who has those owed is not read from until
//!   the guest takes them.
//! - *A guest that breaks the rules loses the connection that it broke them on*, by a reset; what is addressed to nobody is dropped.
//! - What the guest has sent within its credit is delivered, also when it has closed since; a client's bytes stay in its socket until
//!   there is both credit and a buffer of the guest's.
//! - Nothing is polled, and there are no timers: a client that tires of waiting closes its end.
//!
//! Decisions:
//! - *A connection that both sides have ended is forgotten at once*, where Linux' vhost waits for the guest's reset: a guest that
//!   never answers could otherwise use up the connections. Packets that still come for it get a reset, which is what ends it for Linux.
//! - *Edge-triggered epoll*: a client that has hung up while the guest gives no credit would wake a level-triggered one for ever.
//! - *Connections do not outlive the device*: their clients are processes of the host's. A device that goes on from another's state tells the guest
//!   that all of them are gone, by the event that is there for it.
//! - *A client that comes before the guest has a driver waits* for the driver, so that nobody has to poll for the longest part of a boot.
//!
//! Sources: virtio 1.3, section 5.10 (socket device); for what Linux does `net/vmw_vsock/virtio_transport_common.c`.

mod backlog;
mod connection;
mod device;
mod greeting;
mod muxer;
mod packet;
mod queues;
#[cfg(test)]
mod tests;

pub use connection::BUFFER;
pub use device::Vsock;
pub use muxer::{CONNECTIONS, Muxer, MuxerError, State};
pub use packet::{HEADER_LENGTH, Header, Operation};
pub use queues::{Filled, QueueError, Scratch, drain, fill};

/// The guest's address, the same in every guest: it is only known between a guest and its own device.
pub const GUEST_CID: u64 = 3;
/// The host's address (`VMADDR_CID_HOST`).
pub const HOST_CID: u64 = 2;
