//! CPU use as a rate, for the fields of statistics that want one: from the last two readings that lie at least [`INTERVAL`] apart.
//!
//! kubelet computes it for containers itself, but not for pods (`cri_stats_provider_linux.go`, `addCRIPodCPUStats`).

use std::collections::BTreeMap;
use std::sync::Mutex;

/// ns. Over less the rate would jump with the scheduler.
const INTERVAL: i64 = 1_000_000_000;

/// ns. Who is not asked about for this long is forgotten.
const FORGET: i64 = 10 * 60 * INTERVAL;

/// By pod or container.
#[derive(Debug, Default)]
pub(crate) struct Rates {
    known: Mutex<BTreeMap<String, Reading>>,
}

#[derive(Debug, Clone, Copy)]
struct Reading {
    at: i64,
    usage: u64,
    rate: Option<u64>,
}

impl Rates {
    /// Takes a reading (ns since the epoch, ns of CPU time) and answers the rate, ns per second; `None` at the first.
    pub(crate) fn take(&self, id: &str, at: i64, usage: u64) -> Option<u64> {
        let mut known = self.known.lock().expect("no panic under this lock");
        let Some(last) = known.get(id).copied() else {
            known.retain(|_, reading| at - reading.at < FORGET);
            known.insert(id.to_owned(), Reading { at, usage, rate: None });
            return None;
        };
        let elapsed = at - last.at;
        if (0..INTERVAL).contains(&elapsed) {
            return last.rate;
        }
        // A clock that was set back, or a counter that began anew: from here on.
        let used = usage.checked_sub(last.usage).filter(|_| elapsed > 0);
        let rate = used.and_then(|used| {
            let rate = u128::from(used) * u128::try_from(INTERVAL).ok()? / u128::try_from(elapsed).ok()?;
            u64::try_from(rate).ok()
        });
        known.insert(id.to_owned(), Reading { at, usage, rate });
        rate
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const S: i64 = 1_000_000_000;

    #[test]
    fn a_rate_needs_two_readings_and_time_between_them() {
        let rates = Rates::default();
        assert_eq!(rates.take("a", S, 500), None);
        assert_eq!(rates.take("a", S + 5, 900), None);
        assert_eq!(rates.take("a", 3 * S, 2_000_000_500), Some(1_000_000_000));
        assert_eq!(rates.take("a", 3 * S + 7, 9_000_000_000), Some(1_000_000_000));
        assert_eq!(rates.take("b", 3 * S, 0), None);
    }

    #[test]
    fn neither_clock_nor_counter_may_run_backwards() {
        let rates = Rates::default();
        rates.take("a", 10 * S, 5000);
        assert_eq!(rates.take("a", 12 * S, 10), None);
        assert_eq!(rates.take("a", 5 * S, 20), None);
        assert_eq!(rates.take("a", 6 * S, 120), Some(100));
    }

    #[test]
    fn what_nobody_asks_about_is_forgotten() {
        let rates = Rates::default();
        rates.take("a", 0, 1);
        rates.take("b", FORGET, 1);
        assert_eq!(rates.known.lock().unwrap().len(), 1);
    }
}
