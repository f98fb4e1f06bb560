//! The other daemon's files as one flat set of values, each taken once. What nobody takes is reported.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

use toml::{Table, Value};

use super::ImportError;

/// One value and the file that has set it last.
#[derive(Debug)]
pub(super) struct Leaf {
    /// Dotted, as it stands in the file.
    pub(super) key: String,
    pub(super) file: PathBuf,
    pub(super) value: Value,
}

/// The values by their path. A table without any key is a value too: it may mean something by being there.
#[derive(Debug, Default)]
pub(super) struct Source {
    leaves: BTreeMap<Vec<String>, Leaf>,
}

/// TOML of a file.
pub(super) fn parse(path: &Path, text: &[u8]) -> Result<Table, ImportError> {
    let syntax = |line: usize, message: String| ImportError::Syntax { path: path.to_owned(), line, message };
    let lines = |before: &[u8]| before.split(|byte| *byte == b'\n').count();
    let text = std::str::from_utf8(text)
        .map_err(|error| syntax(lines(&text[..error.valid_up_to()]), "not UTF-8".to_owned()))?;
    text.parse::<Table>().map_err(|error| {
        let line = lines(&text.as_bytes()[..error.span().map_or(0, |span| span.start).min(text.len())]);
        syntax(line, error.message().lines().collect::<Vec<_>>().join(", "))
    })
}

impl Source {
    /// Adds a file's values; they go before those that are there. `rename` makes one path of those that mean the same.
    pub(super) fn add(&mut self, file: &Path, table: Table, rename: fn(Vec<String>) -> Vec<String>) {
        self.flatten(file, &mut Vec::new(), table, rename);
    }

    fn flatten(
        &mut self,
        file: &Path,
        above: &mut Vec<String>,
        table: Table,
        rename: fn(Vec<String>) -> Vec<String>,
    ) {
        for (name, value) in table {
            above.push(name);
            match value {
                Value::Table(table) if !table.is_empty() => self.flatten(file, above, table, rename),
                value => {
                    let leaf = Leaf { key: dotted(above), file: file.to_owned(), value };
                    self.leaves.insert(rename(above.clone()), leaf);
                }
            }
            above.pop();
        }
    }

    /// The value at `path`, which nobody has taken yet.
    pub(super) fn take(&mut self, path: &[&str]) -> Option<Leaf> {
        self.leaves.remove(path.iter().map(ToString::to_string).collect::<Vec<_>>().as_slice())
    }

    /// The names right below `path`.
    pub(super) fn names(&self, path: &[&str]) -> Vec<String> {
        let below = self.leaves.keys().filter(|key| {
            key.len() > path.len() && key.iter().zip(path).all(|(name, wanted)| name == wanted)
        });
        let mut names: Vec<_> = below.map(|key| key[path.len()].clone()).collect();
        names.dedup();
        names
    }

    /// All values below `path`.
    pub(super) fn take_below(&mut self, path: &[&str]) -> Vec<Leaf> {
        let is_below = |key: &Vec<String>| {
            key.iter().zip(path).filter(|(name, wanted)| name == wanted).count() == path.len()
        };
        let keys: Vec<_> = self.leaves.keys().filter(|key| is_below(key)).cloned().collect();
        keys.iter().filter_map(|key| self.leaves.remove(key)).collect()
    }

    /// What nobody took, with its path.
    pub(super) fn rest(self) -> impl Iterator<Item = (Vec<String>, Leaf)> {
        self.leaves.into_iter()
    }
}

/// A path as TOML writes it: a name that is no bare key is quoted.
fn dotted(path: &[String]) -> String {
    let bare =
        |name: &str| !name.is_empty() && name.chars().all(|c| c.is_ascii_alphanumeric() || "-_".contains(c));
    let name =
        |name: &String| if bare(name) { name.clone() } else { Value::String(name.clone()).to_string() };
    path.iter().map(name).collect::<Vec<_>>().join(".")
}

impl Leaf {
    pub(super) fn text(&self) -> Option<&str> {
        self.value.as_str()
    }

    /// The texts of an array, those that are none left out.
    pub(super) fn texts(&self) -> Vec<String> {
        let array = self.value.as_array().map(Vec::as_slice).unwrap_or_default();
        array.iter().filter_map(Value::as_str).map(str::to_owned).collect()
    }

    /// Whether it says nothing: what an empty text, list, table, zero or false is in Go.
    pub(super) fn is_zero(&self) -> bool {
        match &self.value {
            Value::String(text) => text.is_empty(),
            Value::Integer(number) => *number == 0,
            Value::Boolean(value) => !value,
            Value::Array(array) => array.is_empty(),
            Value::Table(table) => table.is_empty(),
            Value::Float(_) | Value::Datetime(_) => false,
        }
    }

    /// Whole seconds of a duration as Go writes it (time.ParseDuration: `1h2m3s`, `1.5s`, `300ms`), rounded up.
    pub(super) fn seconds(&self) -> Option<i64> {
        let text = self.text()?;
        let mut left = text;
        let mut seconds = 0.0;
        if left.is_empty() {
            return None;
        }
        while !left.is_empty() {
            let digits = left.find(|c: char| !c.is_ascii_digit() && c != '.')?;
            let (number, rest) = left.split_at(digits);
            let end = rest.find(|c: char| c.is_ascii_digit() || c == '.').unwrap_or(rest.len());
            let (unit, rest) = rest.split_at(end);
            let unit = match unit {
                "h" => 3600.0,
                "m" => 60.0,
                "s" => 1.0,
                "ms" => 1e-3,
                "us" | "µs" | "μs" => 1e-6,
                "ns" => 1e-9,
                _ => return None,
            };
            seconds += number.parse::<f64>().ok()? * unit;
            left = rest;
        }
        // Rounded first: 0.3 s thrice must not become two.
        let whole = (seconds * 1e6).round() / 1e6;
        format!("{:.0}", whole.ceil()).parse().ok()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn durations_of_go() {
        let seconds = |text: &str| {
            let leaf =
                Leaf { key: String::new(), file: PathBuf::new(), value: Value::String(text.to_owned()) };
            leaf.seconds()
        };
        for (text, expected) in
            [("4h0m0s", 14400), ("1.5s", 2), ("300ms", 1), ("1h", 3600), ("0s", 0), ("2m0.5s", 121)]
        {
            assert_eq!(seconds(text), Some(expected), "{text}");
        }
        for text in ["", "5", "s", "4 h", "-1s", "1d"] {
            assert_eq!(seconds(text), None, "{text}");
        }
    }
}
