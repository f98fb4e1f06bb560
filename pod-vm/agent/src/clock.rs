//! The guest's clock, kept by the host's: by KVM's where that tells (`ptp_kvm`), else by what the monitor says once a second.
//!
//! What the monitor says is late by the time that it was under way, on a busy host seconds; never early. So of several differences the
//! largest is the best, one that puts the clock forward is true at once, and only many in agreement put it back.
//!
//! Within [`STEP`] the clock is slewed, by at most 0.5 ms each second (adjtime(3)). Behind by more, it is set at the next word; ahead by
//! more than [`STEP_BACK`], after [`WORDS`].

use std::fs::{self, File};
use std::os::fd::AsFd;

use rustix::time::{ClockId, Timespec, clock_settime};

use crate::agent::now;
use crate::failure::Failure;
use crate::{modules, sys};

const STEP: i64 = 100_000_000;
const STEP_BACK: i64 = 500_000_000;
/// How many words of the monitor's are compared.
const WORDS: usize = 8;

/// What the clock is kept by.
#[derive(Debug)]
pub(crate) struct Clock {
    host: Host,
    /// By how many ns the host's clock was ahead, as the monitor said it.
    told: Vec<i64>,
}

#[derive(Debug)]
enum Host {
    /// It has not been looked for.
    Unknown,
    /// Its clock can be read.
    Read(File),
    /// It tells nothing by itself.
    Silent,
}

impl Default for Clock {
    fn default() -> Self {
        Self { host: Host::Unknown, told: Vec::new() }
    }
}

impl Clock {
    /// The monitor says that it is `ns` since the epoch.
    pub(crate) fn told(&mut self, ns: i64) -> Result<(), Failure> {
        if std::process::id() != 1 {
            // Without a guest around it the clock is the machine's.
            return Ok(());
        }
        let difference = match self.read_host() {
            Some(difference) => Some(difference),
            None => self.heed(ns.saturating_sub(now())),
        };
        difference.map_or(Ok(()), correct)
    }

    /// By how much the host's clock is ahead, once that is known from what was said.
    fn heed(&mut self, difference: i64) -> Option<i64> {
        self.told.push(difference);
        let best = self.told.iter().copied().max()?;
        if best < STEP && self.told.len() < WORDS {
            return None;
        }
        self.told.clear();
        Some(best)
    }

    fn read_host(&mut self) -> Option<i64> {
        if matches!(self.host, Host::Unknown) {
            modules::demand_quietly("ptp_kvm");
            self.host = kvm_clock().map_or(Host::Silent, Host::Read);
        }
        let Host::Read(clock) = &self.host else { return None };
        let difference = sys::clock_difference(clock.as_fd()).ok();
        if difference.is_none() {
            self.host = Host::Silent;
        }
        difference
    }
}

/// KVM's clock device. The host may have it, and not tell, when its own clock is not the processor's counter.
fn kvm_clock() -> Option<File> {
    let is_kvms = |name: &str| {
        fs::read_to_string(format!("/sys/class/ptp/{name}/clock_name"))
            .is_ok_and(|clock| clock.contains("KVM"))
    };
    let devices = fs::read_dir("/sys/class/ptp").ok()?.flatten();
    let name =
        devices.filter_map(|device| device.file_name().into_string().ok()).find(|name| is_kvms(name))?;
    File::open(format!("/dev/{name}")).ok()
}

fn correct(difference: i64) -> Result<(), Failure> {
    if (-STEP_BACK..STEP).contains(&difference) {
        return sys::slew_clock(difference).map_err(|error| Failure::system("slew the clock", error));
    }
    set(now().saturating_add(difference))
}

/// Sets the clock to ns since the epoch.
pub(crate) fn set(ns: i64) -> Result<(), Failure> {
    let time = Timespec { tv_sec: ns.div_euclid(1_000_000_000), tv_nsec: ns.rem_euclid(1_000_000_000) };
    clock_settime(ClockId::Realtime, time).map_err(|error| Failure::system("set the clock", error))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn words_that_were_long_under_way_do_not_count() {
        let mut clock = Clock::default();
        let late = [-3_000_000_000, -90_000_000, -400_000, -5_000_000_000, -700_000, -500_000, -2_000_000];
        for difference in late {
            assert_eq!(clock.heed(difference), None);
        }
        assert_eq!(clock.heed(-900_000), Some(-400_000));
        // And begins anew.
        assert_eq!(clock.heed(-900_000), None);
    }

    #[test]
    fn a_clock_that_is_behind_is_set_at_once() {
        let mut clock = Clock::default();
        assert_eq!(clock.heed(-2_000_000), None);
        assert_eq!(clock.heed(5_000_000_000), Some(5_000_000_000));
        for _ in 1..WORDS {
            assert_eq!(clock.heed(-3_600_000_000_000), None);
        }
        assert_eq!(clock.heed(-3_600_000_000_001), Some(-3_600_000_000_000));
    }
}
