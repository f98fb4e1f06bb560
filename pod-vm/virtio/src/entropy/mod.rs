//! Entropy: random bytes of the host's kernel (virtio 1.3, section 5.4).

mod device;
#[cfg(test)]
mod tests;

pub use device::Entropy;
