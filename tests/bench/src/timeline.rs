//! A pod's life step by step: from the daemon's log, and as a picture of text.

use std::collections::BTreeMap;
use std::fmt::Write as _;

use anyhow::{Context, Result};
use serde::Deserialize;

use crate::samples::Samples;
use crate::subject::Name;
use crate::wire::{Sample, Series};

/// The units of the two series that there are for each step: when it begins, counted from the pod's first request, and how long it takes.
const BEGINS: &str = "ms after the first request";
const TAKES: &str = "ms, a step";
/// Between a request and its step.
const WITHIN: &str = ": ";
/// Columns of the picture.
const WIDTH: f64 = 60.0;

/// A series that is drawn here and nowhere else.
pub(crate) fn is_step(series: &Series) -> bool {
    [BEGINS, TAKES].contains(&series.unit.as_str())
}

/// A line of the log.
#[derive(Debug, Deserialize)]
struct Line {
    /// Of its end, in UTC: `2024-02-29T23:59:59.999999Z`.
    timestamp: String,
    fields: Fields,
}

#[derive(Debug, Deserialize)]
struct Fields {
    /// A request,
    rpc: Option<String>,
    /// or a step.
    step: Option<String>,
    milliseconds: Option<f64>,
}

/// Something that took time, in ms since the day began.
#[derive(Debug)]
struct Stretch {
    name: String,
    begin: f64,
    end: f64,
}

/// The samples of every pod that the log tells of, which came one after the other.
pub(crate) fn lives(log: &str) -> Result<Vec<Vec<Sample>>> {
    let (mut requests, mut steps) = (Vec::new(), Vec::new());
    // What the daemon said before it was to speak JSON is not for us.
    for text in log.lines().filter(|line| line.starts_with('{')) {
        let line: Line = serde_json::from_str(text).with_context(|| text.to_owned())?;
        let Some(took) = line.fields.milliseconds else { continue };
        let end = time_of_day(&line.timestamp).with_context(|| text.to_owned())?;
        let stretch = |name| Stretch { name, begin: end - took, end };
        match (line.fields.rpc, line.fields.step) {
            (Some(rpc), _) => requests.push(stretch(rpc)),
            (None, Some(step)) => steps.push(stretch(step)),
            (None, None) => {}
        }
    }
    let mut lives: Vec<Vec<Sample>> = Vec::new();
    let mut first = 0.0;
    for request in &requests {
        if request.name == "RunPodSandbox" {
            lives.push(Vec::new());
            first = request.begin;
        }
        let Some(life) = lives.last_mut() else { continue };
        let mut tell = |name: &str, stretch: &Stretch| {
            life.push(Sample::new(name, BEGINS, stretch.begin - first));
            life.push(Sample::new(name, TAKES, stretch.end - stretch.begin));
        };
        tell(&request.name, request);
        let mut times = BTreeMap::new();
        for step in steps.iter().filter(|step| (request.begin..request.end).contains(&step.begin)) {
            let nth = times.entry(&step.name).and_modify(|nth| *nth += 1).or_insert(1);
            let again = if *nth > 1 { format!(" ({nth})") } else { String::new() };
            tell(&format!("{}{WITHIN}{}{again}", request.name, step.name), step);
        }
    }
    Ok(lives)
}

/// Milliseconds since midnight.
fn time_of_day(timestamp: &str) -> Option<f64> {
    let (_, time) = timestamp.strip_suffix('Z')?.split_once('T')?;
    let mut parts = time.split(':').map(str::parse::<f64>);
    let mut next = || parts.next()?.ok();
    let (hours, minutes, seconds) = (next()?, next()?, next()?);
    Some(((hours * 60.0 + minutes) * 60.0 + seconds) * 1000.0)
}

/// A block of text per subject: every step with when it begins, how long it takes, and a bar. Empty when none was measured.
pub(crate) fn markdown(samples: &Samples) -> String {
    let mut text = String::new();
    for subject in Name::ALL {
        let mut steps: Vec<(&str, f64, f64)> = samples
            .series
            .iter()
            .filter(|series| series.unit == BEGINS)
            .filter_map(|series| {
                let takes = Series { unit: TAKES.to_owned(), ..series.clone() };
                Some((
                    series.name.as_str(),
                    samples.median(series, subject)?,
                    samples.median(&takes, subject)?,
                ))
            })
            .collect();
        // A request before its steps.
        steps.sort_by(|a, b| a.1.total_cmp(&b.1));
        let Some(end) = steps.iter().map(|(_, begin, takes)| begin + takes).reduce(f64::max) else {
            continue;
        };
        // Writing to a string cannot fail.
        let _ = writeln!(text, "{}, ms, medians:\n\n```text\n   from  takes", subject.as_str());
        for (name, begin, takes) in steps {
            let name =
                name.split_once(WITHIN).map_or_else(|| name.to_owned(), |(_, step)| format!("  {step}"));
            let column = |time: f64| cells(time / end * WIDTH);
            let bar = " ".repeat(column(begin)) + &"#".repeat((column(begin + takes) - column(begin)).max(1));
            let _ = writeln!(text, "{begin:7.1} {takes:6.1}  {name:24}|{bar}");
        }
        text += "```\n\n";
    }
    text
}

#[allow(clippy::cast_possible_truncation, clippy::cast_sign_loss)] // of a picture's width
fn cells(columns: f64) -> usize {
    columns.max(0.0).round() as usize
}

#[cfg(test)]
mod tests {
    use super::*;

    fn line(time: &str, fields: &str) -> String {
        format!("{{\"timestamp\":\"2024-02-29T10:00:{time}Z\",\"level\":\"INFO\",\"fields\":{{{fields}}}}}\n")
    }

    #[test]
    fn steps_belong_to_the_request_in_which_they_begin() {
        let log = [
            "not of this format\n".to_owned(),
            line("00.900000", r#""message":"starts""#),
            line("01.010000", r#""step":"record","of":"a","milliseconds":5.0"#),
            line("01.030000", r#""step":"record","of":"a","milliseconds":10.0"#),
            line("01.040000", r#""rpc":"RunPodSandbox","milliseconds":40.0"#),
            line("01.050000", r#""step":"afterwards","of":"a","milliseconds":5.0"#),
            line("01.100000", r#""rpc":"StopPodSandbox","milliseconds":20.0"#),
        ];
        let lives = lives(&log.concat()).unwrap();
        assert_eq!(lives.len(), 1);
        let mut samples = Samples::default();
        for sample in lives.into_iter().flatten() {
            samples.add(Name::Podvisor, sample);
        }
        let picture = markdown(&samples);
        let rows: Vec<Vec<&str>> = picture
            .lines()
            .filter_map(|row| row.split_once('|'))
            .map(|(row, _)| row.split_whitespace().collect())
            .collect();
        let expected = [
            vec!["0.0", "40.0", "RunPodSandbox"],
            vec!["5.0", "5.0", "record"],
            vec!["20.0", "10.0", "record", "(2)"],
            vec!["80.0", "20.0", "StopPodSandbox"],
        ];
        assert_eq!(rows, expected);
    }
}
