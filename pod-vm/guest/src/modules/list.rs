//! The file `/modules` of the initramfs: what the guest's first process loads, and when.
//!
//! ```text
//! podvisor-modules 1
//! start virtio
//! start virtio_blk virtio
//! demand virtio_balloon virtio
//! alias virtio:d00000005v* virtio_balloon
//! ```
//!
//! `start` and `demand` are followed by a module's name and all modules that must be loaded before it, in load order; its file is
//! `/lib/modules/NAME.ko`. The lines stand in load order too, so whoever loads every `start` line from the first to the last needs
//! nothing else. `alias` is followed by a pattern (`*`, `?` and `[…]` as in a shell) by which the kernel asks for a module: in a
//! device's `modalias`, or as the last argument of the program in `/proc/sys/kernel/modprobe`.

use std::fmt::Write as _;

use super::{Module, When};

/// The file's content.
pub(crate) fn write(modules: &[Module]) -> String {
    let mut text = "podvisor-modules 1\n".to_owned();
    for module in modules {
        let when = match module.when {
            When::Start => "start",
            When::Demand => "demand",
        };
        // Writing to a string cannot fail.
        let _ = write!(text, "{when} {}", module.name);
        for needs in &module.needs {
            let _ = write!(text, " {needs}");
        }
        text.push('\n');
    }
    for module in modules {
        for alias in &module.aliases {
            let _ = writeln!(text, "alias {alias} {}", module.name);
        }
    }
    text
}
