//! The list of results that are expected, and how results differ from it.
//!
//! One line per spec: `pass<TAB>name`, `skip<TAB>name<TAB>reason` or `fail<TAB>name<TAB>reason`. A reason must
//! occur in what the suite says; that of a failure may be empty. Empty lines and lines that start with `#` say why.

use std::collections::BTreeMap;
use std::fmt::Write as _;
use std::fs;
use std::path::Path;

use anyhow::{Context, Result, bail};

use crate::report::{Outcome, Outcomes};

/// What is expected of each spec.
#[derive(Debug, Default)]
pub struct Expected {
    outcomes: BTreeMap<String, Outcome>,
}

impl Expected {
    /// Reads a list.
    pub fn read(file: &Path) -> Result<Self> {
        let text = fs::read_to_string(file).with_context(|| format!("reading {}", file.display()))?;
        Self::parse(&text).with_context(|| format!("reading {}", file.display()))
    }

    fn parse(text: &str) -> Result<Self> {
        let mut outcomes = BTreeMap::new();
        for (number, line) in text.lines().enumerate() {
            if line.is_empty() || line.starts_with('#') {
                continue;
            }
            let fields: Vec<&str> = line.split('\t').collect();
            let (name, outcome) = match fields[..] {
                ["pass", name] => (name, Outcome::Pass),
                ["skip", name, reason] => (name, Outcome::Skip(reason.to_owned())),
                ["fail", name, reason] => (name, Outcome::Fail(reason.to_owned())),
                _ => bail!("line {}: expected pass, skip or fail with a name: {line:?}", number + 1),
            };
            if outcomes.insert(name.to_owned(), outcome).is_some() {
                bail!("line {}: {name:?} stands twice", number + 1);
            }
        }
        Ok(Self { outcomes })
    }

    /// The reason on the list of a failure that is expected.
    pub fn refusal(&self, name: &str, actual: &Outcome) -> Option<&str> {
        match self.outcomes.get(name) {
            Some(expected @ Outcome::Fail(reason)) if agrees(expected, actual) => Some(reason),
            _ => None,
        }
    }

    /// Every difference in either direction, one line each. With `partial` results a spec that did not run is none.
    pub fn differences(&self, actual: &Outcomes, partial: bool) -> Vec<String> {
        let mut lines = Vec::new();
        for (name, outcome) in actual {
            match self.outcomes.get(name) {
                None => lines.push(format!("{name}: {outcome}, but is not on the list")),
                Some(expected) if !agrees(expected, outcome) => {
                    lines.push(format!("{name}: expected {expected}, got {outcome}"));
                }
                Some(_) => {}
            }
        }
        if !partial {
            let missing = self.outcomes.keys().filter(|name| !actual.contains_key(*name));
            lines.extend(missing.map(|name| format!("{name}: is on the list, but did not run")));
        }
        lines
    }
}

fn agrees(expected: &Outcome, actual: &Outcome) -> bool {
    match (expected, actual) {
        (Outcome::Pass, Outcome::Pass) => true,
        (Outcome::Skip(reason), Outcome::Skip(said)) | (Outcome::Fail(reason), Outcome::Fail(said)) => {
            said.contains(reason.as_str())
        }
        _ => false,
    }
}

/// A list with just these outcomes, to start from.
pub fn as_list(actual: &Outcomes) -> String {
    let mut list = String::new();
    for (name, outcome) in actual {
        // Writing to a string cannot fail.
        let _ = match outcome {
            Outcome::Pass => writeln!(list, "pass\t{name}"),
            Outcome::Skip(reason) => writeln!(list, "skip\t{name}\t{reason}"),
            Outcome::Fail(_) => writeln!(list, "fail\t{name}\t"),
        };
    }
    list
}

#[cfg(test)]
mod tests {
    use super::*;

    fn outcomes() -> Outcomes {
        [
            ("a", Outcome::Pass),
            ("b", Outcome::Skip("no AppArmor here".into())),
            ("c", Outcome::Fail("broken".into())),
        ]
        .map(|(name, outcome)| (name.to_owned(), outcome))
        .into()
    }

    #[test]
    fn a_list_agrees_with_what_it_was_made_from() {
        let list = Expected::parse(&as_list(&outcomes())).unwrap();
        assert_eq!(list.differences(&outcomes(), false), Vec::<String>::new());
    }

    #[test]
    fn differences_are_found_in_both_directions() {
        let list = Expected::parse("fail\ta\t\nskip\tb\tother reason\npass\td\n").unwrap();
        assert_eq!(
            list.differences(&outcomes(), false),
            [
                "a: expected fail (), got pass",
                "b: expected skip (other reason), got skip (no AppArmor here)",
                "c: fail (broken), but is not on the list",
                "d: is on the list, but did not run",
            ]
        );
        assert_eq!(list.differences(&outcomes(), true).len(), 3);
    }

    #[test]
    fn a_wrong_line_is_named() {
        for bad in ["pass", "skip\ta", "passed\ta", "pass\ta\npass\ta"] {
            assert!(Expected::parse(bad).is_err(), "{bad}");
        }
    }
}
