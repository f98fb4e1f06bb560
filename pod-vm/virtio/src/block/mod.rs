//! A disk: a raw file or a block device (virtio 1.3, section 5.2).
//!
//! Requests are carried out one after the other by the thread that serves the disk, through a buffer of this process. An error of the file, a full
//! file system among them, is the request's result, which the guest hands on to who wrote.

mod device;
mod medium;
mod request;
#[cfg(test)]
mod tests;

pub use device::{Disk, State};
