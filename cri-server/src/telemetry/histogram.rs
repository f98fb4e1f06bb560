//! Durations, counted by how long they took.

use std::time::Duration;

use super::text::Family;

/// Upper bounds in seconds: a list answers in a millisecond, a container starts in a tenth of a second, a pull takes minutes.
const BOUNDS: [f64; 15] =
    [0.001, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 300.0];

#[derive(Debug, Clone, Default, PartialEq)]
pub(super) struct Histogram {
    /// Not yet summed up.
    counts: [u64; BOUNDS.len()],
    count: u64,
    sum: f64,
}

impl Histogram {
    pub(super) fn take(&mut self, duration: Duration) {
        let seconds = duration.as_secs_f64();
        if let Some(index) = BOUNDS.iter().position(|bound| seconds <= *bound) {
            self.counts[index] += 1;
        }
        self.count += 1;
        self.sum += seconds;
    }

    #[allow(clippy::cast_precision_loss)]
    pub(super) fn write(&self, family: &mut Family<'_>, labels: &[(&str, &str)]) {
        let mut below = 0;
        for (bound, count) in BOUNDS.iter().zip(self.counts) {
            below += count;
            let bound = bound.to_string();
            family.sample("_bucket", &[labels, &[("le", &bound)]].concat(), below as f64);
        }
        family.sample("_bucket", &[labels, &[("le", "+Inf")]].concat(), self.count as f64);
        family.sample("_sum", labels, self.sum);
        family.sample("_count", labels, self.count as f64);
    }
}

#[cfg(test)]
mod tests {
    use super::super::text::{Kind, Page};
    use super::*;

    #[test]
    fn buckets_hold_all_below_them() {
        let mut histogram = Histogram::default();
        for milliseconds in [1, 3, 100, 1_000_000] {
            histogram.take(Duration::from_millis(milliseconds));
        }
        let mut page = Page::default();
        histogram.write(&mut page.family("h", Kind::Histogram, "H."), &[("m", "x")]);
        let page = page.finish();
        for line in [
            "h_bucket{m=\"x\",le=\"0.001\"} 1",
            "h_bucket{m=\"x\",le=\"0.005\"} 2",
            "h_bucket{m=\"x\",le=\"0.1\"} 3",
            "h_bucket{m=\"x\",le=\"300\"} 3",
            "h_bucket{m=\"x\",le=\"+Inf\"} 4",
            "h_sum{m=\"x\"} 1000.104",
            "h_count{m=\"x\"} 4",
        ] {
            assert!(page.lines().any(|written| written == line), "{line} is not in\n{page}");
        }
    }
}
