//! Persistent memory (virtio 1.3, section 5.19): a range of the guest's addresses that it uses as a disk without requests.
//!
//! Here it is an image that nobody writes: what a driver asks to be made durable is so.

mod device;
#[cfg(test)]
mod tests;

pub use device::{Image, State};
