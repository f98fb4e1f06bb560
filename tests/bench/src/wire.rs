//! What the front asks a node, and what it answers: one JSON document per line.

use std::fmt;
use std::io::{BufRead, BufReader, Write};
use std::os::unix::net::UnixStream;

use anyhow::{Context, Result};
use serde::de::DeserializeOwned;
use serde::{Deserialize, Serialize};

use crate::subject::Name;
use crate::workload::Workload;

/// The first line, from a node that is ready.
#[derive(Debug, Serialize, Deserialize)]
pub(crate) struct Ready {
    pub(crate) subject: Name,
    /// What it says it is: name and version.
    pub(crate) version: String,
}

/// Work to be done once; the end of the connection ends the node.
#[derive(Debug, Serialize, Deserialize)]
pub(crate) struct Order {
    pub(crate) workload: Workload,
    pub(crate) round: u32,
}

/// What it has done.
#[derive(Debug, Serialize, Deserialize)]
pub(crate) struct Report {
    /// What was measured, or why nothing could be.
    pub(crate) outcome: Result<Vec<Sample>, String>,
}

/// What figures are of; those of one series are compared with each other.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
pub(crate) struct Series {
    /// `ExecSync`.
    pub(crate) name: String,
    /// What was on the node meanwhile, where that is what is measured: `(200, "pods")`.
    pub(crate) among: Option<(u32, String)>,
    /// `ms`, `s`, `MiB`, …
    pub(crate) unit: String,
}

impl Series {
    /// Whether one value of it is better than another.
    pub(crate) fn is_better(&self, one: f64, other: f64) -> bool {
        if matches!(self.unit.as_str(), "MB/s" | "MB") { one > other } else { one < other }
    }
}

impl fmt::Display for Series {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match &self.among {
            Some((count, what)) => write!(f, "{}, {count} {what}", self.name),
            None => f.write_str(&self.name),
        }
    }
}

/// One figure.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub(crate) struct Sample {
    pub(crate) series: Series,
    pub(crate) value: f64,
}

impl Sample {
    pub(crate) fn new(name: &str, unit: &str, value: f64) -> Self {
        Self { series: Series { name: name.to_owned(), among: None, unit: unit.to_owned() }, value }
    }

    pub(crate) fn milliseconds(name: &str, time: std::time::Duration) -> Self {
        Self::new(name, "ms", time.as_secs_f64() * 1000.0)
    }

    /// Measured on a node with so many pods or images.
    #[must_use]
    pub(crate) fn among(mut self, count: u32, what: &str) -> Self {
        self.series.among = Some((count, what.to_owned()));
        self
    }
}

/// Both ends of a connection.
#[derive(Debug)]
pub(crate) struct Line {
    reader: BufReader<UnixStream>,
}

impl Line {
    pub(crate) fn new(stream: UnixStream) -> Self {
        Self { reader: BufReader::new(stream) }
    }

    pub(crate) fn say(&mut self, message: &impl Serialize) -> Result<()> {
        let mut text = serde_json::to_string(message)?;
        text.push('\n');
        self.reader.get_mut().write_all(text.as_bytes()).context("writing to the other side")
    }

    /// The next message; `None` when the other side has ended.
    pub(crate) fn hear<T: DeserializeOwned>(&mut self) -> Result<Option<T>> {
        let mut text = String::new();
        if self.reader.read_line(&mut text).context("reading from the other side")? == 0 {
            return Ok(None);
        }
        serde_json::from_str(&text).with_context(|| format!("understanding {text:?}")).map(Some)
    }
}
