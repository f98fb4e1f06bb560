//! A share: what the guest asks of its files is passed on to a file server (virtio 1.3, section 5.11; vhost-user).
//!
//! ```text
//!   guest ── queue ──▶ Share ── copies ──▶ bounce memory ◀── vhost-user ── file server
//! ```
//!
//! *The file server never sees the guest's memory.* It gets a small memory of its own, in which the device has a queue that shadows the guest's. A request
//! is copied there, in one piece, and its answer back; lengths and places are the device's own. So the guest's memory can be private to the process that
//! runs it, and a file server that was taken over finds nothing in reach but requests to itself.
//!
//! | file | idea |
//! |---|---|
//! | `bounce.rs` | the memory: where the queues lie in it, and where requests are put |
//! | `request.rs` | requests that the server has, and its queue |
//! | `server.rs` | the connection |
//! | `device.rs` | the device |

mod bounce;
mod device;
mod request;
mod server;
#[cfg(test)]
mod tests;

pub use bounce::MEMORY;
pub use device::{Share, State};
pub use request::Waiting;
pub use server::ServerError;
