//! A network interface: a tap of the host (virtio 1.3, section 5.1).
//!
//! Packets pass through a buffer of this process, with their virtio header, which the tap and the guest both know, so that checksums and segmentation
//! are left to whoever can do them best.

mod device;
mod request;
#[cfg(test)]
mod tests;

pub use device::{Network, State};
pub use request::{HEADER, Offloads};
