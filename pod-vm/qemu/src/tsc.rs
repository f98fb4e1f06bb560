//! How fast the processor's time stamp counter runs.
//!
//! QEMU's translator hands the host's counter to the guest. A guest that measures its speed against an emulated timer, on a machine that has
//! other things to do, gets it wrong and then stands still, so it is told (`tsc_early_khz`).

use std::time::{Duration, Instant};

use podvisor_hypervisor::sys;

/// Long enough for an error of some 20 millionths; the guest's clock is set by the agent all the time anyway.
const BASELINE: Duration = Duration::from_millis(5);

/// A measurement that has begun.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Clock {
    instant: Instant,
    ticks: u64,
}

impl Clock {
    /// Begins to measure: at the program's start, so that there has been time enough when the answer is needed.
    pub(crate) fn begin() -> Self {
        // The closest of a few pairs, in case the processor is taken away between the two readings.
        let pairs = (0..5).map(|_| {
            let before = sys::ticks();
            let instant = Instant::now();
            let after = sys::ticks();
            (after - before, Self { instant, ticks: before + (after - before) / 2 })
        });
        pairs
            .min_by_key(|(uncertainty, _)| *uncertainty)
            .map_or_else(|| Self { instant: Instant::now(), ticks: sys::ticks() }, |(_, clock)| clock)
    }

    /// The counter's speed in kHz.
    pub(crate) fn kilohertz(self) -> u64 {
        std::thread::sleep(BASELINE.saturating_sub(self.instant.elapsed()));
        let now = Self::begin();
        let nanoseconds = (now.instant - self.instant).as_nanos().max(1);
        let ticks = u128::from(now.ticks.wrapping_sub(self.ticks));
        u64::try_from(ticks * 1_000_000 / nanoseconds).unwrap_or(u64::MAX)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn measurements_agree() {
        let clock = Clock::begin();
        let (first, second) = (clock.kilohertz(), clock.kilohertz());
        assert!(first.abs_diff(second) < first / 100, "{first} {second}");
        // Between 100 MHz and 100 GHz.
        assert!((100_000..100_000_000).contains(&first), "{first}");
    }
}
