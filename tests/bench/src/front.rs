//! Gives the orders: one round after the other, and in each every subject in turn, because the machine is not equally fast all the time.

use std::fs;
use std::os::unix::net::UnixListener;
use std::path::Path;
use std::process::{Child, Command, Stdio};
use std::time::Instant;

use anyhow::{Context, Result, bail, ensure};
use podvisor_critest::target_dir;

use crate::images;
use crate::samples::Samples;
use crate::subject::Name;
use crate::wire::{Line, Order, Ready, Report, Sample};
use crate::workload::Workload;

/// What came of a run.
#[derive(Debug)]
pub(crate) struct Outcome {
    /// What each subject says it is.
    pub(crate) versions: Vec<(Name, String)>,
    pub(crate) samples: Samples,
    /// Who could not do what, and why.
    pub(crate) failures: Vec<(Name, String)>,
}

struct Node {
    process: Child,
    line: Line,
    subject: Name,
    version: String,
    /// It has ended too early.
    lost: bool,
}

pub(crate) fn run(subjects: &[Name], workloads: &[Workload], rounds: u32) -> Result<Outcome> {
    // In the project's target directory, which every sandbox sees.
    let shared = tempfile::Builder::new().prefix("bench.").tempdir_in(target_dir())?;
    let storage = shared.path().join("registry");
    fs::create_dir(&storage)?;
    let began = Instant::now();
    images::push(&storage, workloads)?;
    eprintln!("images: {:.0} s", began.elapsed().as_secs_f64());
    let mut nodes = Vec::new();
    for subject in subjects {
        if workloads.iter().any(|workload| workload.takes(*subject)) {
            nodes.push(start(*subject, shared.path(), &storage)?);
        }
    }
    let mut outcome = Outcome { versions: Vec::new(), samples: Samples::default(), failures: Vec::new() };
    for workload in workloads {
        let began = Instant::now();
        work(*workload, rounds, &mut nodes, &mut outcome);
        eprintln!("{}: {:.0} s", workload.as_str(), began.elapsed().as_secs_f64());
    }
    // All at the same time: what a peer leaves behind is waited for, in case it goes.
    let mut ends = Vec::new();
    for Node { process, line, subject, version, .. } in nodes {
        drop(line);
        outcome.versions.push((subject, version));
        ends.push((subject, process));
    }
    for (subject, process) in ends {
        if let Err(error) = end(subject, process) {
            outcome.failures.push((subject, format!("{error:#}")));
        }
    }
    Ok(outcome)
}

/// All rounds of one workload. Who fails in one does not do the others, and the rest goes on.
fn work(workload: Workload, rounds: u32, nodes: &mut [Node], outcome: &mut Outcome) {
    let count = workload.rounds(rounds);
    // One to warm up.
    let warm = u32::from(count > 1);
    let mut failed = Vec::new();
    for round in 0..count + warm {
        for node in nodes.iter_mut().filter(|node| workload.takes(node.subject) && !node.lost) {
            if failed.contains(&node.subject) {
                continue;
            }
            match node.order(workload, round) {
                Ok(samples) if round >= warm => {
                    for sample in samples {
                        outcome.samples.add(node.subject, sample);
                    }
                }
                Ok(_) => {}
                Err(error) => {
                    let why = format!("{}: {error:#}", workload.as_str());
                    eprintln!("{}, {why}", node.subject.as_str());
                    outcome.failures.push((node.subject, why));
                    failed.push(node.subject);
                }
            }
        }
    }
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
    Ok(Node { process, line, subject, version, lost: false })
}

impl Node {
    fn order(&mut self, workload: Workload, round: u32) -> Result<Vec<Sample>> {
        self.lost = true;
        self.line.say(&Order { workload, round })?;
        let Some(Report { outcome }) = self.line.hear()? else { bail!("it has ended") };
        self.lost = false;
        outcome.map_err(anyhow::Error::msg)
    }
}

fn end(subject: Name, mut process: Child) -> Result<()> {
    let status = process.wait()?;
    // A peer may leave something in its sandbox, which goes with it.
    let left = status.code() == Some(podvisor_critest::sandbox::LEFTOVERS) && subject.is_peer();
    ensure!(status.success() || left, "{} ended with {status}", subject.as_str());
    Ok(())
}
