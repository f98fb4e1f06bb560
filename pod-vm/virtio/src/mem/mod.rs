//! Memory that comes and goes (virtio 1.3, section 5.15): the guest takes blocks of it, or gives them back, as much as is wanted.
//!
//! What is given back is the host's again at once. Blocks that the guest has not taken it could use too, as far as the region reaches that was
//! made usable: what is wanted, to the end of a block of Linux' own.

mod device;
mod request;
#[cfg(test)]
mod tests;

pub use device::{BLOCK, LARGE_BLOCK, Reserve, Size, State, usable};
