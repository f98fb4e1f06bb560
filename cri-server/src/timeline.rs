//! Where the time of a pod goes: the steps that its RPCs wait for, each told when it has ended.
//!
//! Told at the level `debug` below a target of their own, so that `log.level = "info,podvisor::timeline=debug"` shows them and nothing else:
//! which step (`step`), of which pod or container (`of`), and how long it took (`milliseconds`). When it began is the line's time less that.
//! `make bench` draws them (`tests/bench/src/timeline.rs`).

use std::fmt::Display;
use std::time::Instant;

/// Does one step.
pub(crate) async fn timed<F: Future>(step: &str, of: &impl Display, work: F) -> F::Output {
    let begin = Instant::now();
    let outcome = work.await;
    told(step, of, begin);
    outcome
}

/// The same for what does not wait.
pub(crate) fn timed_here<T>(step: &str, of: &impl Display, work: impl FnOnce() -> T) -> T {
    let begin = Instant::now();
    let outcome = work();
    told(step, of, begin);
    outcome
}

fn told(step: &str, of: &impl Display, begin: Instant) {
    let milliseconds = begin.elapsed().as_secs_f64() * 1000.0;
    tracing::debug!(target: "podvisor::timeline", step, %of, milliseconds, "step done");
}
