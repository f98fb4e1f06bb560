//! What is logged: warnings and errors, to standard error, at a bounded rate, because a guest can cause as many of them as it likes.

use std::sync::{Mutex, PoisonError};
use std::time::{Duration, Instant};

use log::{Level, LevelFilter, Log, Metadata, Record};

/// So many lines are written in one [`PERIOD`].
const LINES: u32 = 20;
const PERIOD: Duration = Duration::from_secs(10);

struct Notes {
    period: Mutex<Period>,
}

struct Period {
    began: Option<Instant>,
    lines: u32,
}

static NOTES: Notes = Notes { period: Mutex::new(Period { began: None, lines: 0 }) };

/// From here on the libraries' warnings are seen.
pub(crate) fn init() {
    // Fails only if there is a logger already; there is not.
    if log::set_logger(&NOTES).is_ok() {
        log::set_max_level(LevelFilter::Warn);
    }
}

impl Period {
    /// Whether a line may be written at this time, and how many were left out before it.
    fn admits(&mut self, now: Instant) -> Option<u32> {
        let mut left_out = 0;
        if self.began.is_none_or(|began| now.duration_since(began) >= PERIOD) {
            left_out = self.lines.saturating_sub(LINES);
            *self = Self { began: Some(now), lines: 0 };
        }
        self.lines = self.lines.saturating_add(1);
        (self.lines <= LINES).then_some(left_out)
    }
}

impl Log for Notes {
    fn enabled(&self, metadata: &Metadata<'_>) -> bool {
        metadata.level() <= Level::Warn
    }

    fn log(&self, record: &Record<'_>) {
        if !self.enabled(record.metadata()) {
            return;
        }
        let mut period = self.period.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(left_out) = period.admits(Instant::now()) {
            if left_out > 0 {
                eprintln!("podvisor-fs: {left_out} lines were left out");
            }
            eprintln!("podvisor-fs: {}: {}", record.level().as_str().to_lowercase(), record.args());
        }
    }

    fn flush(&self) {}
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_flood_is_cut_and_counted() {
        let mut period = Period { began: None, lines: 0 };
        let start = Instant::now();
        let written = (0..100).filter(|_| period.admits(start).is_some()).count();
        assert_eq!(written, 20);
        assert_eq!(period.admits(start + PERIOD), Some(80));
        assert_eq!(period.admits(start + PERIOD), Some(0));
    }
}
