//! Choices that can be repeated.

use std::time::{SystemTime, UNIX_EPOCH};

/// Small and good enough to pick moments and orders (xorshift64).
#[derive(Debug)]
pub struct Random(u64);

impl Random {
    /// From `PODVISOR_SEED`, else from the clock; the seed is printed, so that a run can be repeated as far as time allows.
    pub fn seeded(what: &str) -> Self {
        let asked = std::env::var("PODVISOR_SEED").ok().and_then(|seed| seed.parse().ok());
        let seed = asked.unwrap_or_else(|| {
            let since = SystemTime::now().duration_since(UNIX_EPOCH);
            since.map_or(1, |since| u64::from(since.subsec_nanos()) | 1)
        });
        println!("{what}: PODVISOR_SEED={seed}");
        Self(seed)
    }

    /// Another one, for another task.
    #[must_use]
    pub fn fork(&mut self) -> Self {
        Self(self.below(u64::MAX) | 1)
    }

    /// Below `limit`.
    pub fn below(&mut self, limit: u64) -> u64 {
        self.0 ^= self.0 << 13;
        self.0 ^= self.0 >> 7;
        self.0 ^= self.0 << 17;
        self.0 % limit
    }

    /// One time in so many.
    pub fn one_in(&mut self, many: u64) -> bool {
        self.below(many) == 0
    }
}
