//! podvisor beside its peers and beside the bare OCI runtimes: the same work, on the same machine, in turn.
//!
//! `podvisor-compare run` prints a table of medians and the goals, and keeps every sample as JSON and the medians as plots. Each subject lives
//! in a sandbox of its own (`podvisor-critest sandbox`) as `podvisor-compare node`, with a registry on loopback over the same files, and waits
//! there for orders. `README.md` beside this crate says what is measured and how to read it.

mod bare;
mod boot;
mod front;
mod goals;
mod images;
mod node;
mod plot;
mod plugins;
mod process;
mod publish;
mod samples;
mod statistics;
mod subject;
mod table;
mod timeline;
mod unpack;
mod wire;
mod workload;

use std::fs;
use std::path::PathBuf;

use anyhow::{Context, Result, ensure};
use clap::{Parser, Subcommand};

use subject::Name;
use workload::Workload;

#[derive(Debug, Parser)]
#[command(about = "Times and memory of podvisor beside containerd, CRI-O and the bare OCI runtimes")]
struct Arguments {
    #[command(subcommand)]
    command: Command,
}

#[derive(Debug, Subcommand)]
enum Command {
    /// Measures, prints tables, writes samples.json and *.svg.
    Run(Run),
    /// One subject in its sandbox; started by `run`.
    Node {
        /// Which.
        subject: Name,
        /// Where `run` listens.
        socket: PathBuf,
        /// The registry's files.
        images: PathBuf,
    },
}

#[derive(Debug, clap::Args)]
struct Run {
    /// Whom to measure.
    #[arg(long, value_delimiter = ',', default_values = Name::ALL.map(Name::as_str))]
    subjects: Vec<Name>,
    /// What to measure.
    #[arg(long, value_delimiter = ',', default_values = Workload::ALL.map(Workload::as_str))]
    workloads: Vec<Workload>,
    /// How often: every subject does each workload's share of these in turn.
    #[arg(long, default_value_t = 20)]
    rounds: u32,
    /// Where samples.json and the plots go.
    #[arg(long, default_value = "target/bench")]
    output: PathBuf,
    /// Writes the results into the source tree too: the project's README.md, and the plots and the table that it names.
    #[arg(long)]
    publish: bool,
}

fn main() -> Result<()> {
    match Arguments::parse().command {
        Command::Run(Run { subjects, workloads, rounds, output, publish }) => {
            fs::create_dir_all(&output).with_context(|| format!("making {}", output.display()))?;
            let outcome = front::run(&subjects, &workloads, rounds)?;
            table::keep(&output.join("samples.json"), &outcome)?;
            plot::draw(&output, &outcome)?;
            if publish {
                publish::publish(&outcome)?;
            }
            println!(
                "{}\n{}\n{}",
                table::markdown(&outcome),
                timeline::markdown(&outcome.samples),
                goals::markdown(&outcome.samples)
            );
            for (subject, why) in &outcome.failures {
                println!("{} has failed: {why}", subject.as_str());
            }
            let ours = outcome.failures.iter().any(|(subject, _)| subject.is_ours());
            ensure!(!ours, "podvisor has failed");
            Ok(())
        }
        Command::Node { subject, socket, images } => node::serve(subject, &socket, &images),
    }
}
