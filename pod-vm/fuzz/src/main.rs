//! A fuzzer (libFuzzer) for the target that `PODVISOR_FUZZ` names: `make fuzz TARGET=… SECONDS=…`.
#![no_main]
// libFuzzer, which is C++, calls functions by their names: the macro makes them.
#![allow(unsafe_code)]

use std::sync::OnceLock;

use libfuzzer_sys::fuzz_target;
use podvisor_fuzz::{Target, target};

fn chosen() -> Target {
    static CHOSEN: OnceLock<Target> = OnceLock::new();
    *CHOSEN.get_or_init(|| {
        let name = std::env::var("PODVISOR_FUZZ").unwrap_or_default();
        target(&name).unwrap_or_else(|| panic!("PODVISOR_FUZZ={name}: there is no such target"))
    })
}

fuzz_target!(|bytes: &[u8]| chosen()(bytes));
