//! Whatever a guest, a file server or a file may say, as bytes of a fuzzer: each target makes of them what the other side does, and holds that
//! nothing panics, hangs or grows.
//!
//! | file | idea |
//! |---|---|
//! | `input.rs` | bytes as numbers and choices |
//! | `guest.rs` | a driver that does what the bytes say with the queues of a device |
//! | `devices.rs` | the devices, and the other side of each |
//! | `server.rs` | a file server that does what the bytes say |
//! | `messages.rs` | registers, packets, protocols, the manifest |

mod devices;
mod guest;
mod input;
mod messages;
mod server;

/// What is done with a fuzzer's bytes.
pub type Target = fn(&[u8]);

/// All there are, by name.
pub const TARGETS: [(&str, Target); 12] = [
    ("balloon", devices::balloon),
    ("block", devices::block),
    ("entropy", devices::entropy),
    ("fs", devices::fs),
    ("mem", devices::mem),
    ("net", devices::net),
    ("vsock", devices::vsock),
    ("mmio", messages::mmio),
    ("packets", messages::packets),
    ("hypervisor", messages::hypervisor),
    ("agent", messages::agent),
    ("manifest", messages::manifest),
];

/// The target of that name.
pub fn target(name: &str) -> Option<Target> {
    TARGETS.iter().find(|(known, _)| *known == name).map(|(_, target)| *target)
}
