//! Gives the orders: one round after the other, and in each every subject in turn, because the machine is not equally fast all the time.

use std::collections::BTreeMap;
use std::fs;
use std::os::unix::net::UnixListener;
use std::path::Path;
use std::process::{Child, Command, Stdio};

use anyhow::{Context, Result, bail, ensure};
use podvisor_critest::target_dir;

use crate::subject::Name;
use crate::wire::{Line, Order, Ready, Report};
use crate::workload::Workload;
use crate::{images, plot, table};

/// Values of every series, by its name and unit, then by subject; series in the order of their first sample.
#[derive(Debug, Default)]
pub(crate) struct Samples {
    pub(crate) series: Vec<(String, String)>,
    pub(crate) values: BTreeMap<(String, Name), Vec<f64>>,
}

impl Samples {
    fn add(&mut self, subject: Name, series: &str, unit: &str, value: f64) {
        if !self.series.iter().any(|(known, _)| known == series) {
            self.series.push((series.to_owned(), unit.to_owned()));
        }
        self.values.entry((series.to_owned(), subject)).or_default().push(value);
    }

    pub(crate) fn of(&self, series: &str, subject: Name) -> &[f64] {
        self.values.get(&(series.to_owned(), subject)).map_or(&[], Vec::as_slice)
    }
}

struct Node {
    process: Child,
    line: Line,
    subject: Name,
    version: String,
}

pub(crate) fn run(subjects: &[Name], workloads: &[Workload], rounds: u32, output: &Path) -> Result<()> {
    fs::create_dir_all(output).with_context(|| format!("making {}", output.display()))?;
    // In the project's target directory, which every sandbox sees.
    let shared = tempfile::Builder::new().prefix("bench.").tempdir_in(target_dir())?;
    let storage = shared.path().join("registry");
    fs::create_dir(&storage)?;
    images::push(&storage, workloads.iter().any(|workload| workload.needs_application()))?;
    let mut nodes = Vec::new();
    for subject in subjects {
        nodes.push(start(*subject, shared.path(), &storage)?);
    }
    let mut samples = Samples::default();
    for workload in workloads {
        eprintln!("{}", workload.as_str());
        let count = workload.rounds(rounds);
        // One to warm up.
        let warm = u32::from(count > 1);
        for round in 0..count + warm {
            for node in &mut nodes {
                if node.subject.is_bare() && !workload.has_limit() {
                    continue;
                }
                for sample in node.order(*workload, round)? {
                    if round >= warm {
                        samples.add(node.subject, &sample.series, &sample.unit, sample.value);
                    }
                }
            }
        }
    }
    let versions: Vec<(Name, String)> =
        nodes.iter().map(|node| (node.subject, node.version.clone())).collect();
    for node in nodes {
        node.end()?;
    }
    table::print(subjects, &versions, &samples);
    table::keep(&output.join("samples.json"), &versions, &samples)?;
    plot::draw(output, subjects, &samples)
}

fn start(subject: Name, shared: &Path, storage: &Path) -> Result<Node> {
    let socket = shared.join(format!("{}.sock", subject.as_str()));
    let listener =
        UnixListener::bind(&socket).with_context(|| format!("listening on {}", socket.display()))?;
    listener.set_nonblocking(true)?;
    let mut process = Command::new(target_dir().join("release/podvisor-critest"))
        .args(["sandbox", "--"])
        .arg(std::env::current_exe()?)
        .args(["node", subject.as_str()])
        .args([&socket, storage])
        .stdin(Stdio::null())
        .spawn()
        .context("starting a sandbox (`make build` makes podvisor-critest)")?;
    let stream = loop {
        match listener.accept() {
            Ok((stream, _)) => break stream,
            Err(error) if error.kind() == std::io::ErrorKind::WouldBlock => {
                if let Some(status) = process.try_wait()? {
                    bail!("{} did not start: {status}", subject.as_str());
                }
                std::thread::sleep(std::time::Duration::from_millis(20));
            }
            Err(error) => return Err(error.into()),
        }
    };
    stream.set_nonblocking(false)?;
    let mut line = Line::new(stream);
    let Some(Ready { version, .. }) = line.hear()? else { bail!("{} did not start", subject.as_str()) };
    eprintln!("{} runs: {version}", subject.as_str());
    Ok(Node { process, line, subject, version })
}

impl Node {
    fn order(&mut self, workload: Workload, round: u32) -> Result<Vec<crate::wire::Sample>> {
        let (subject, what) = (self.subject.as_str(), workload.as_str());
        self.line.say(&Order { workload, round })?;
        let Some(Report { outcome }) = self.line.hear()? else { bail!("{subject} ended during {what}") };
        outcome.map_err(|error| anyhow::anyhow!("{subject}, {what}: {error}"))
    }

    fn end(mut self) -> Result<()> {
        drop(self.line);
        let status = self.process.wait()?;
        // A peer may leave something in its sandbox, which goes with it.
        let left = status.code() == Some(podvisor_critest::sandbox::LEFTOVERS) && self.subject.is_peer();
        ensure!(status.success() || left, "{} ended with {status}", self.subject.as_str());
        Ok(())
    }
}
