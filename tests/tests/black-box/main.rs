//! Black-box tests of the daemon. Each gets a node of its own, and fails if it leaves anything on it.

// A test is run once: neither the size of its future nor one more allocation matters.
#![allow(clippy::large_futures, clippy::assigning_clones)]

mod artifacts;
mod cdi;
mod checkpoints;
mod containers;
mod guests;
mod gvisor;
mod image_volumes;
mod images;
mod input;
mod metrics;
mod nri;
mod observing;
mod pods;
mod recovery;
mod resize;
mod resources;
mod security;
mod telemetry;
mod userns;
mod version;
mod vm;
mod vm_devices;
mod vm_ends;
mod vm_rootfs;
mod vm_shell;
mod vm_volumes;

use std::process::ExitCode;

use anyhow::Result;
use podvisor_tests::Tests;

fn main() -> Result<ExitCode> {
    let mut tests = Tests::new()?;
    version::add(&mut tests);
    guests::add(&mut tests);
    images::add(&mut tests);
    image_volumes::add(&mut tests);
    artifacts::add(&mut tests);
    cdi::add(&mut tests);
    checkpoints::add(&mut tests);
    resources::add(&mut tests);
    pods::add(&mut tests);
    containers::add(&mut tests);
    input::add(&mut tests);
    observing::add(&mut tests);
    metrics::add(&mut tests);
    resize::add(&mut tests);
    telemetry::add(&mut tests);
    recovery::add(&mut tests);
    gvisor::add(&mut tests);
    vm::add(&mut tests);
    vm_ends::add(&mut tests);
    vm_shell::add(&mut tests);
    vm_devices::add(&mut tests);
    vm_volumes::add(&mut tests);
    vm_rootfs::add(&mut tests);
    security::add(&mut tests);
    userns::add(&mut tests);
    nri::add(&mut tests);
    Ok(tests.run())
}
