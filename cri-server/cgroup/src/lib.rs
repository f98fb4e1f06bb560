//! Cgroups of either version: which layout this host has, paths in either driver's syntax, making, moving, removing, reading.
//!
//! | file | what |
//! |---|---|
//! | `layout.rs` | which hierarchies are mounted, which cgroup a process is in |
//! | `cgroup.rs` | one cgroup: make, fill, kill, remove |
//! | `stats.rs` | what it uses |
//! | `details.rs` | what else metrics want to know |
//! | `kin.rs` | who of its processes has been started by whom |
//! | `driver.rs` | names in kubelet's two syntaxes |
//! | `systemd.rs` | slices and scopes over D-Bus (feature `systemd`) |
//!
//! Invariants: no operation leaves the mount, whatever a path says; the root is never killed or removed; a name is not a promise
//! that the cgroup exists.
//!
//! Decisions, each with what was rejected:
//! - Version 1 kills with the freezer, not by signalling until nobody is left: a fork bomb wins that race, and a frozen pid cannot be reused.
//! - No private connection to systemd beside the bus: see `systemd.rs`.
//! - A missing controller is `None` in statistics, not 0: kubelet evicts by these numbers.
//!
//! Limits are not set here: the OCI runtime applies a container's, kubelet the pod's.

mod cgroup;
mod details;
mod driver;
mod error;
mod files;
pub mod kin;
mod layout;
mod stats;
#[cfg(feature = "systemd")]
pub mod systemd;

pub use cgroup::Cgroup;
pub use details::{Details, HugePages, huge_page_sizes};
pub use driver::Driver;
pub use error::{CgroupError, Result};
pub use layout::{Layout, Processes};
pub use stats::{CpuStats, DeviceIo, IoStats, MemoryStats, Pressure, PressureLine, Stats, SwapStats};
