//! Virtio devices that podvisor implements itself.
//!
//! A device does not know what carries its queues: one machine reaches it through vhost-user, another has it in its own process.
//!
//! | file, folder | what |
//! |---|---|
//! | `device.rs` | what a device is: queues, interrupts, buffers |
//! | `endpoint.rs` | a device with what was negotiated with the guest's driver |
//! | `state.rs` | what a device is apart from threads and descriptors |
//! | `transport/` | how a guest finds devices and speaks with them |
//! | `balloon/` | memory that the guest does not use |
//! | `block/` | a disk: a file or a block device |
//! | `entropy/` | random bytes |
//! | `fs/` | a share: requests are passed on to a file server that never sees the guest's memory |
//! | `mem/` | memory that comes and goes |
//! | `net/` | a network interface: a tap |
//! | `pmem/` | an image that lies in the guest's memory |
//! | `vsock/` | the guest's ports as unix sockets of the host |
//!
//! Invariants:
//! - *Every byte of a guest is read once*, into memory of this process, and only the copy is looked at. Memory of the guest is reached through
//!   vm-memory alone.
//! - *A guest that makes nonsense gets a device that needs a reset* ([`device::Misuse`]), is counted and told of once; nothing panics, no request makes
//!   work or memory without a bound.
//! - *What devices may not write they do not*: of the guest's memory some is mapped for reading alone, as images are. A driver that has a device
//!   write there makes nonsense.
//! - *Nothing is polled.*
//! - *A device is its state and what it was made of*: what is not a thread or a descriptor is in one plain struct, which can be kept
//!   ([`device::Device::state`]), and with which another device of the same parts goes on ([`device::Device::restore`]).

pub mod balloon;
pub mod block;
pub mod device;
#[cfg(test)]
mod driver;
pub mod endpoint;
pub mod entropy;
pub mod fs;
pub mod mem;
pub mod net;
pub mod pmem;
pub mod state;
pub mod sys;
pub mod transport;
pub mod vsock;
