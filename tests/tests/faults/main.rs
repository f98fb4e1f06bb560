//! Failure tests: whatever dies, hangs or is full, no pod is lost, and nothing is left.
//!
//! `make test` runs them in a short form (fewer kills), `make test-faults` (`PODVISOR_FAULTS=full`) whole.

// A test is run once: neither the size of its future nor one more allocation matters.
#![allow(clippy::large_futures, clippy::assigning_clones)]

mod disk;
mod dying_monitor;
mod joins;
mod kills;
mod load;
mod monitors;
mod plugins;
mod points;
mod records;
mod runtimes;

use std::process::ExitCode;

use anyhow::Result;
use podvisor_tests::Tests;

/// One of two numbers: for the short form and for the whole.
pub(crate) fn scale(short: u32, full: u32) -> u32 {
    if is_full() { full } else { short }
}

pub(crate) fn is_full() -> bool {
    std::env::var_os("PODVISOR_FAULTS").is_some_and(|value| value == "full")
}

fn main() -> Result<ExitCode> {
    if std::env::args().nth(1).is_some_and(|verb| verb == dying_monitor::VERB) {
        return dying_monitor::main().map(|()| ExitCode::SUCCESS);
    }
    let mut tests = Tests::new()?;
    points::add(&mut tests);
    kills::add(&mut tests);
    monitors::add(&mut tests);
    runtimes::add(&mut tests);
    plugins::add(&mut tests);
    disk::add(&mut tests);
    records::add(&mut tests);
    joins::add(&mut tests);
    load::add(&mut tests);
    Ok(tests.run())
}
