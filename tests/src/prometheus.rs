//! A strict reader of Prometheus' text format (version 0.0.4): what the format leaves to goodwill is an error here.

use std::collections::{BTreeMap, BTreeSet};

use anyhow::{Context, Result, bail, ensure};

/// All samples of one name, with what its TYPE line says.
#[derive(Debug, Default)]
pub struct Family {
    /// `counter`, `gauge` or `histogram`.
    pub kind: String,
    /// Name with suffix, labels, value.
    pub samples: Vec<(String, BTreeMap<String, String>, f64)>,
}

impl Family {
    /// The value of the one sample that has these labels, among others.
    pub fn value(&self, labels: &[(&str, &str)]) -> Result<f64> {
        let fits = |own: &BTreeMap<String, String>| {
            labels.iter().all(|(label, value)| own.get(*label).is_some_and(|own| own == value))
        };
        let found: Vec<f64> =
            self.samples.iter().filter(|(_, own, _)| fits(own)).map(|(_, _, value)| *value).collect();
        ensure!(found.len() == 1, "{} samples with {labels:?}", found.len());
        Ok(found[0])
    }
}

/// Reads a whole page. Each family has HELP and TYPE before its samples and stands in one place; no sample stands twice; counters are
/// not negative and end in `_total`; histograms are complete and grow.
pub fn read(page: &str) -> Result<BTreeMap<String, Family>> {
    ensure!(page.ends_with('\n'), "the last line has no end");
    let mut families: BTreeMap<String, Family> = BTreeMap::new();
    let (mut helped, mut current) = (BTreeSet::new(), String::new());
    let mut seen = BTreeSet::new();
    for line in page.lines() {
        if let Some(rest) = line.strip_prefix("# HELP ") {
            let (name, help) = rest.split_once(' ').with_context(|| format!("no help: {line}"))?;
            ensure!(is_name(name) && !help.trim().is_empty(), "{line}");
            ensure!(helped.insert(name.to_owned()), "two HELP lines of {name}");
            name.clone_into(&mut current);
        } else if let Some(rest) = line.strip_prefix("# TYPE ") {
            let (name, kind) = rest.split_once(' ').with_context(|| format!("no type: {line}"))?;
            ensure!(name == current, "the TYPE of {name} does not follow its HELP");
            ensure!(["counter", "gauge", "histogram"].contains(&kind), "{line}");
            let family = Family { kind: kind.to_owned(), samples: Vec::new() };
            ensure!(families.insert(name.to_owned(), family).is_none(), "two TYPE lines of {name}");
        } else {
            let (name, labels, value) = sample(line).with_context(|| format!("no sample: {line}"))?;
            let family = families.get_mut(&current).with_context(|| format!("before any TYPE: {line}"))?;
            let suffix =
                name.strip_prefix(current.as_str()).with_context(|| format!("not of {current}: {line}"))?;
            let fits = match family.kind.as_str() {
                "histogram" => ["_bucket", "_sum", "_count"].contains(&suffix),
                "counter" => suffix.is_empty() && name.ends_with("_total") && value >= 0.0,
                _ => suffix.is_empty(),
            };
            ensure!(fits && value.is_finite(), "not of a {}: {line}", family.kind);
            ensure!(seen.insert((name.clone(), labels.clone())), "twice: {line}");
            family.samples.push((name, labels, value));
        }
    }
    for (name, family) in &families {
        let keys: BTreeSet<Vec<&String>> = family
            .samples
            .iter()
            .map(|(_, labels, _)| labels.keys().filter(|label| *label != "le").collect())
            .collect();
        ensure!(keys.len() <= 1, "samples of {name} have different labels: {keys:?}");
        if family.kind == "histogram" {
            histogram(name, family)?;
        }
    }
    Ok(families)
}

/// Buckets by their bounds, sum, count.
type Series = (Vec<(f64, f64)>, Option<f64>, Option<f64>);

fn histogram(name: &str, family: &Family) -> Result<()> {
    let mut series: BTreeMap<Vec<(String, String)>, Series> = BTreeMap::new();
    for (sample, labels, value) in &family.samples {
        let mut own = labels.clone();
        let bound = own.remove("le");
        let entry = series.entry(own.into_iter().collect()).or_default();
        match (sample.strip_prefix(name), bound) {
            (Some("_bucket"), Some(bound)) => {
                let bound = if bound == "+Inf" { f64::INFINITY } else { bound.parse()? };
                entry.0.push((bound, *value));
            }
            (Some("_sum"), None) => entry.1 = Some(*value),
            (Some("_count"), None) => entry.2 = Some(*value),
            _ => bail!("{sample} with {labels:?}"),
        }
    }
    for (labels, (buckets, sum, count)) in series {
        ensure!(sum.is_some(), "{name} has no sum for {labels:?}");
        ensure!(
            buckets.windows(2).all(|pair| pair[0].0 < pair[1].0 && pair[0].1 <= pair[1].1),
            "buckets of {name} do not grow: {buckets:?}"
        );
        let last = buckets.last().with_context(|| format!("{name} has no bucket"))?;
        ensure!(last.0.is_infinite() && Some(last.1) == count, "{name} does not count all of {labels:?}");
    }
    Ok(())
}

fn is_name(name: &str) -> bool {
    let rest = |letter: char| letter.is_ascii_alphanumeric() || letter == '_' || letter == ':';
    name.starts_with(|letter: char| letter.is_ascii_alphabetic() || letter == '_' || letter == ':')
        && name.chars().all(rest)
}

type Sample = (String, BTreeMap<String, String>, f64);

fn sample(line: &str) -> Result<Sample> {
    let end = line.find(['{', ' ']).context("no end of the name")?;
    let (name, mut rest) = line.split_at(end);
    ensure!(is_name(name), "{name:?} is no name");
    let mut labels = BTreeMap::new();
    if let Some(inner) = rest.strip_prefix('{') {
        rest = inner;
        loop {
            let (label, after) = rest.split_once("=\"").context("no label")?;
            ensure!(
                is_name(label) && !label.contains(':') && !label.starts_with("__"),
                "{label:?} is no label"
            );
            let (value, after) = quoted(after)?;
            ensure!(labels.insert(label.to_owned(), value).is_none(), "{label} stands twice");
            if let Some(after) = after.strip_prefix(',') {
                rest = after;
            } else {
                rest = after.strip_prefix('}').context("no end of the labels")?;
                break;
            }
        }
    }
    let value = rest.strip_prefix(' ').context("no value")?;
    ensure!(!value.contains(' '), "a time, which nothing needs here");
    Ok((name.to_owned(), labels, value.parse()?))
}

/// Up to the closing quote, and what comes after it.
fn quoted(text: &str) -> Result<(String, &str)> {
    let mut value = String::new();
    let mut letters = text.char_indices();
    while let Some((at, letter)) = letters.next() {
        match letter {
            '"' => return Ok((value, &text[at + 1..])),
            '\\' => value.push(match letters.next().map(|(_, letter)| letter) {
                Some('n') => '\n',
                Some(letter @ ('\\' | '"')) => letter,
                other => bail!("\\{other:?} is no escape"),
            }),
            other => value.push(other),
        }
    }
    bail!("no closing quote")
}

#[cfg(test)]
mod tests {
    use super::*;

    const GOOD: &str = "# HELP a_total A.\n# TYPE a_total counter\na_total{x=\"q\\\"\\\\\\n\"} 1\n\
                        # HELP h H.\n# TYPE h histogram\nh_bucket{le=\"1\"} 1\nh_bucket{le=\"+Inf\"} 2\nh_sum 3\nh_count 2\n";

    #[test]
    fn a_good_page() {
        let families = read(GOOD).unwrap();
        assert_eq!(families["a_total"].value(&[("x", "q\"\\\n")]).unwrap().to_bits(), 1.0_f64.to_bits());
        assert_eq!(families["h"].samples.len(), 4);
    }

    #[test]
    fn bad_pages() {
        for (from, to) in [
            ("# HELP a_total A.\n", ""),
            ("# TYPE a_total counter", "# TYPE a_total untyped"),
            ("a_total{", "b_total{"),
            ("} 1\n# HELP h", "} -1\n# HELP h"),
            ("} 1\n# HELP h", "} one\n# HELP h"),
            ("{x=", "{x-y="),
            ("\\n\"}", "\\t\"}"),
            ("h_count 2", "h_count 3"),
            ("h_sum 3\n", ""),
            ("le=\"1\"} 1", "le=\"1\"} 9"),
            ("h_sum 3\n", "h_sum 3\nh_sum 3\n"),
        ] {
            let page = GOOD.replacen(from, to, 1);
            assert_ne!(page, GOOD, "{from}");
            assert!(read(&page).is_err(), "{page}");
        }
    }
}
