//! Memory that the guest does not use and tells of, for the host to use (virtio 1.3, section 5.5: free page reporting). Nothing is asked of the
//! guest: the balloon itself stays empty.

mod device;
#[cfg(test)]
mod tests;

pub use device::{Balloon, State};
