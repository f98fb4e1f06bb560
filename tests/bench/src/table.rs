//! Medians beside each other, and every sample in a file.

use std::fs;
use std::path::Path;

use anyhow::{Context, Result};
use serde_json::{Value, json};

use crate::front::Outcome;
use crate::subject::Name;

/// Markdown: a row per series, a column per subject, and podvisor beside each peer and beside the limit.
pub(crate) fn markdown(Outcome { versions, samples, .. }: &Outcome) -> String {
    let mut lines: Vec<String> =
        versions.iter().map(|(subject, version)| format!("- {}: {version}", subject.as_str())).collect();
    let subjects: Vec<Name> = versions.iter().map(|(subject, _)| *subject).collect();
    let mut head = vec!["median (95th percentile)"];
    head.extend(subjects.iter().map(|subject| subject.as_str()));
    head.extend(["/ containerd", "/ crio", "/ limit"]);
    lines.push(String::new());
    lines.push(format!("| {} |", head.join(" | ")));
    lines.push(format!("|{}", "---|".repeat(head.len())));
    for series in samples.figures() {
        let mut cells = vec![format!("{series}, {}", series.unit)];
        for subject in &subjects {
            cells.push(
                samples
                    .summary(series, *subject)
                    .map_or_else(String::new, |of| format!("{} ({})", digits(of.median), digits(of.p95))),
            );
        }
        let ours = [(Name::Podvisor, Name::Runc), (Name::PodvisorVm, Name::Qemu)]
            .into_iter()
            .find_map(|(name, limit)| Some((samples.median(series, name)?, limit)));
        if let Some((ours, limit)) = ours {
            for other in [Name::Containerd, Name::Crio, limit] {
                let other = samples.median(series, other).filter(|other| *other > 0.0);
                cells.push(other.map_or_else(String::new, |other| format!("{:.2}", ours / other)));
            }
        }
        cells.resize(head.len(), String::new());
        lines.push(format!("| {} |", cells.join(" | ")));
    }
    lines.push(String::new());
    lines.join("\n")
}

/// Three digits that count.
pub(crate) fn digits(value: f64) -> String {
    match value.abs() {
        large if large >= 100.0 => format!("{value:.0}"),
        middle if middle >= 10.0 => format!("{value:.1}"),
        _ => format!("{value:.2}"),
    }
}

/// Writes everything to a file.
pub(crate) fn keep(file: &Path, Outcome { versions, samples, failures }: &Outcome) -> Result<()> {
    let versions: serde_json::Map<String, Value> =
        versions.iter().map(|(subject, version)| (subject.as_str().to_owned(), json!(version))).collect();
    let mut all = Vec::new();
    for series in &samples.series {
        for subject in Name::ALL {
            if let Some(summary) = samples.summary(series, subject) {
                all.push(json!({
                    "series": series,
                    "subject": subject.as_str(),
                    "summary": summary,
                    "samples": samples.of(series, subject),
                }));
            }
        }
    }
    let failures: Vec<Value> =
        failures.iter().map(|(subject, why)| json!({"subject": subject.as_str(), "why": why})).collect();
    let document = json!({"versions": versions, "series": all, "failures": failures});
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
