//! What was measured, by what and of whom.

use std::collections::BTreeMap;

use crate::statistics::{Summary, summary};
use crate::subject::Name;
use crate::timeline;
use crate::wire::{Sample, Series};

/// Values of every series, by subject; series in the order of their first sample.
#[derive(Debug, Default)]
pub(crate) struct Samples {
    pub(crate) series: Vec<Series>,
    values: BTreeMap<(Series, Name), Vec<f64>>,
}

impl Samples {
    pub(crate) fn add(&mut self, subject: Name, Sample { series, value }: Sample) {
        if !self.series.contains(&series) {
            self.series.push(series.clone());
        }
        self.values.entry((series, subject)).or_default().push(value);
    }

    pub(crate) fn of(&self, series: &Series, subject: Name) -> &[f64] {
        self.values.get(&(series.clone(), subject)).map_or(&[], Vec::as_slice)
    }

    pub(crate) fn summary(&self, series: &Series, subject: Name) -> Option<Summary> {
        summary(self.of(series, subject))
    }

    pub(crate) fn median(&self, series: &Series, subject: Name) -> Option<f64> {
        Some(self.summary(series, subject)?.median)
    }

    /// The peer with the best median, and that.
    pub(crate) fn better_peer(&self, series: &Series) -> Option<(Name, f64)> {
        let peers = Name::ALL.into_iter().filter(|name| name.is_peer());
        let peers = peers.filter_map(|peer| Some((peer, self.median(series, peer)?)));
        peers.reduce(|best, other| if series.is_better(other.1, best.1) { other } else { best })
    }

    /// What is told in tables and plots: everything but the steps of timelines.
    pub(crate) fn figures(&self) -> impl Iterator<Item = &Series> {
        self.series.iter().filter(|series| !timeline::is_step(series))
    }

    /// The series of that name, on a node with so many pods where that is part of it.
    pub(crate) fn find(&self, name: &str, pods: Option<u32>) -> Option<&Series> {
        let count = |series: &Series| series.among.as_ref().map(|(count, _)| *count);
        self.figures().find(|series| series.name == name && count(series) == pods)
    }
}
