//! Virtio devices that podvisor implements itself.
//!
//! A device does not know what carries its queues: one machine reaches it through vhost-user, another has it in its own process.
//!
//! | folder | device |
//! |---|---|
//! | `vsock/` | the guest's ports as unix sockets of the host |

pub mod vsock;
