//! Samples of one series and one subject, in order.

/// What is said of them.
#[derive(Debug, Clone, Copy, PartialEq, serde::Serialize)]
pub(crate) struct Summary {
    pub(crate) count: usize,
    pub(crate) min: f64,
    pub(crate) median: f64,
    pub(crate) p95: f64,
    pub(crate) p99: f64,
    pub(crate) max: f64,
}

/// `None` without samples.
pub(crate) fn summary(samples: &[f64]) -> Option<Summary> {
    let mut sorted = samples.to_vec();
    sorted.sort_by(f64::total_cmp);
    let (min, max) = (*sorted.first()?, *sorted.last()?);
    // The smallest sample that so many of a hundred are not above.
    let percentile = |percent: usize| sorted[(sorted.len() * percent).div_ceil(100).max(1) - 1];
    Some(Summary {
        count: sorted.len(),
        min,
        median: percentile(50),
        p95: percentile(95),
        p99: percentile(99),
        max,
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn of_a_hundred_and_of_one() {
        let hundred: Vec<f64> = (1..=100).rev().map(f64::from).collect();
        let of = summary(&hundred).unwrap();
        assert_eq!(
            (of.count, of.min, of.median, of.p95, of.p99, of.max),
            (100, 1.0, 50.0, 95.0, 99.0, 100.0)
        );
        let of = summary(&[7.0]).unwrap();
        assert_eq!((of.count, of.min, of.median, of.p99), (1, 7.0, 7.0, 7.0));
        assert_eq!(summary(&[]), None);
    }
}
