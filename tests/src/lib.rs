//! What the black-box tests share: a CRI client, pods and containers as kubelet would ask for them, and a node that is
//! looked over when its test is done.
//!
//! The tests themselves are in `tests/black-box/`, one file per topic. They run the daemon as users do (the release
//! build, as a process of its own), and have to run in a sandbox: `make test` does that.

pub mod ask;
pub mod block_volume;
pub mod cri;
pub mod eventually;
pub mod fixture;
pub mod images;
pub mod load;
pub mod memory;
pub mod nri;
pub mod nri_peer;
pub mod prometheus;
pub mod random;
pub mod stream;
pub mod trials;
pub mod world;
pub mod wrapper;

pub use block_volume::BlockVolume;
pub use eventually::eventually;
pub use fixture::{Fixture, Pod};
pub use trials::Tests;
