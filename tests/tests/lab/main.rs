//! Tests for what this machine is not: another cgroup version, systemd as PID 1, a loss of power. `make test-lab` runs each in the lab
//! that it needs; elsewhere they are skipped.

// A test is run once: neither the size of its future nor one more allocation matters.
#![allow(clippy::large_futures, clippy::assigning_clones)]

mod apparmor;
mod checkpoint;
mod limits;
mod package;
mod reboot;
mod selinux;
mod systemd;

use std::future::Future;

use anyhow::Result;

/// Runs a test to its end; a failure shows the whole chain of causes, without a backtrace.
#[allow(clippy::panic)] // how a test fails
fn run(test: impl Future<Output = Result<()>>) {
    let runtime = tokio::runtime::Builder::new_multi_thread().worker_threads(2).enable_all().build();
    if let Err(error) = runtime.map_err(Into::into).and_then(|runtime| runtime.block_on(test)) {
        panic!("{error:#}");
    }
}
