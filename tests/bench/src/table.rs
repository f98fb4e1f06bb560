//! Medians beside each other, and every sample in a file.

use std::fs;
use std::path::Path;

use anyhow::{Context, Result};
use serde_json::{Value, json};

use crate::front::Samples;
use crate::statistics::summary;
use crate::subject::Name;

/// Of these more is better; of everything else less is.
pub(crate) fn more_is_better(unit: &str) -> bool {
    matches!(unit, "MB/s" | "MB")
}

/// Markdown: a row per series, a column per subject, and podvisor beside the better peer and beside its own OCI runtime.
pub(crate) fn print(subjects: &[Name], versions: &[(Name, String)], samples: &Samples) {
    for (subject, version) in versions {
        println!("- {}: {version}", subject.as_str());
    }
    println!();
    print!("| median (95th percentile) |");
    for subject in subjects {
        print!(" {} |", subject.as_str());
    }
    println!(" podvisor / better peer | podvisor / runc |");
    println!("|---|{}---|---|", "---|".repeat(subjects.len()));
    for (series, unit) in &samples.series {
        print!("| {series}, {unit} |");
        for subject in subjects {
            match summary(samples.of(series, *subject)) {
                Some(of) => print!(" {} ({}) |", digits(of.median), digits(of.p95)),
                None => print!(" |"),
            }
        }
        let ours = summary(samples.of(series, Name::Podvisor)).map(|of| of.median);
        let peers = subjects
            .iter()
            .filter(|subject| subject.is_peer())
            .filter_map(|peer| summary(samples.of(series, *peer)));
        let better = if more_is_better(unit) {
            peers.map(|of| of.median).reduce(f64::max)
        } else {
            peers.map(|of| of.median).reduce(f64::min)
        };
        let limit = summary(samples.of(series, Name::Podvisor.limit())).map(|of| of.median);
        for other in [better, limit] {
            match (ours, other) {
                (Some(ours), Some(other)) if other > 0.0 => print!(" {:.2} |", ours / other),
                _ => print!(" |"),
            }
        }
        println!();
    }
}

/// Three digits that count.
fn digits(value: f64) -> String {
    match value.abs() {
        large if large >= 100.0 => format!("{value:.0}"),
        middle if middle >= 10.0 => format!("{value:.1}"),
        _ => format!("{value:.2}"),
    }
}

/// Writes everything to a file.
pub(crate) fn keep(file: &Path, versions: &[(Name, String)], samples: &Samples) -> Result<()> {
    let versions: serde_json::Map<String, Value> =
        versions.iter().map(|(subject, version)| (subject.as_str().to_owned(), json!(version))).collect();
    let mut series = Vec::new();
    for (name, unit) in &samples.series {
        for ((of, subject), values) in samples.values.iter().filter(|((of, _), _)| of == name) {
            series.push(json!({
                "series": of,
                "unit": unit,
                "subject": subject.as_str(),
                "summary": summary(values),
                "samples": values,
            }));
        }
    }
    let document = json!({"versions": versions, "series": series});
    fs::write(file, serde_json::to_vec_pretty(&document)?)
        .with_context(|| format!("writing {}", file.display()))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn three_digits() {
        for (value, text) in [(0.0, "0.00"), (1.234, "1.23"), (12.34, "12.3"), (1234.5, "1234")] {
            assert_eq!(digits(value), text);
        }
    }
}
