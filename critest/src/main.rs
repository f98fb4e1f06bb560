//! The command line of the test tools: `podvisor-critest sandbox`, `images`, `run`.

use std::ffi::OsString;
use std::path::{Path, PathBuf};
use std::process::ExitCode;

use anyhow::{Context, Result};
use clap::{Parser, Subcommand};

use podvisor_critest::catalogue::{MIRRORED, Prepared};
use podvisor_critest::contents;
use podvisor_critest::expected::{Expected, as_list};
use podvisor_critest::image::Image;
use podvisor_critest::layer::Compression;
use podvisor_critest::node::{self, Node};
use podvisor_critest::peer::{Kind, Peer};
use podvisor_critest::registry::{Access, Registry};
use podvisor_critest::report::{Outcome, Outcomes};
use podvisor_critest::sandbox::{self, Stage};
use podvisor_critest::suite;

/// Test images, a private environment, and the conformance suite.
#[derive(Debug, Parser)]
#[command(version)]
struct Arguments {
    #[command(subcommand)]
    command: Command,
}

#[derive(Debug, Subcommand)]
enum Command {
    /// Makes the conformance suite's images, if they are not there, and prints the digest that critest is built with.
    Images,
    /// Serves a busybox image as `library/busybox:latest`; prints where, and runs until the end of its input.
    Registry {
        /// Directory for the images.
        storage: PathBuf,
    },
    /// Runs the conformance suite and compares its results with a list; fails on any difference. To be run in a sandbox.
    Run(Box<Run>),
    /// Runs a command in namespaces and cgroups of its own; fails when it leaves anything behind.
    Sandbox {
        /// The command with its arguments.
        #[arg(last = true, required = true)]
        command: Vec<OsString>,
    },
    /// Runs a command on a machine that is there for it alone (the lab); fails when it leaves anything behind.
    Machine {
        /// The command with its arguments.
        #[arg(last = true, required = true)]
        command: Vec<OsString>,
    },
    /// One stage of a sandbox; started by `sandbox` itself.
    #[command(hide = true)]
    Stage {
        stage: Stage,
        #[arg(last = true, required = true)]
        command: Vec<OsString>,
    },
}

#[derive(Debug, clap::Args)]
struct Run {
    /// The socket of a runtime that is running already; without it podvisor is started.
    #[arg(long)]
    endpoint: Option<PathBuf>,
    /// Starts containerd instead of podvisor.
    #[arg(long, conflicts_with = "endpoint")]
    peer: bool,
    /// Handler of pods that name none: `runc`, `runc-debian`, `crun`, `runsc` or `vm`.
    #[arg(long, default_value = "runc")]
    handler: String,
    /// What makes the machines of handler `vm`: `kvm` or `qemu`; `auto` takes KVM where it works.
    #[arg(long, default_value = "auto")]
    hypervisor: String,
    /// The list of expected results.
    #[arg(long)]
    expected: PathBuf,
    /// Writes the results as a list to this file.
    #[arg(long)]
    results: Option<PathBuf>,
    /// Where the daemon's log is copied to.
    #[arg(long)]
    daemon_log: Option<PathBuf>,
    #[command(flatten)]
    suite: suite::Options,
}

fn main() -> ExitCode {
    match run(Arguments::parse()) {
        Ok(code) => ExitCode::from(u8::try_from(code).unwrap_or(1)),
        Err(error) => {
            eprintln!("podvisor-critest: {error:#}");
            ExitCode::FAILURE
        }
    }
}

fn run(arguments: Arguments) -> Result<i32> {
    match arguments.command {
        Command::Images => {
            println!("{}", Prepared::make()?.digest()?);
            Ok(0)
        }
        Command::Registry { storage } => serve_busybox(&storage),
        Command::Run(run) => {
            let expected = Expected::read(&run.expected)?;
            let outcomes = match &run.endpoint {
                Some(socket) => suite::run(socket, &run.suite)?,
                None if run.peer => on_the_peer(&run.suite, run.daemon_log.as_deref())?,
                None => {
                    let Run { handler, hypervisor, .. } = *run;
                    let options = node::Options { handler, hypervisor, ..node::Options::default() };
                    on_a_node(options, &run.suite, run.daemon_log.as_deref())?
                }
            };
            if let Some(results) = &run.results {
                std::fs::write(results, as_list(&outcomes))
                    .with_context(|| format!("writing {}", results.display()))?;
            }
            Ok(judge(&outcomes, &expected, run.suite.partial()))
        }
        Command::Sandbox { command } => sandbox::run(&["stage"], &command),
        Command::Machine { command } => sandbox::machine::run(&command),
        Command::Stage { stage, command } => sandbox::stage(stage, &["stage"], &command),
    }
}

fn serve_busybox(storage: &Path) -> Result<i32> {
    let registry = Registry::start(storage, Access::ReadWrite)?;
    let layer = contents::busybox_static()?.pack(Compression::Gzip)?;
    let config = serde_json::json!({"Cmd": ["sh"], "Env": ["PATH=/usr/sbin:/usr/bin:/sbin:/bin"]});
    registry.push("library/busybox", &["latest"], &Image::new(vec![layer], config).bundle()?)?;
    println!("{}", registry.address());
    // A signal would end this program and not the registry.
    std::io::copy(&mut std::io::stdin(), &mut std::io::sink()).context("waiting for the end of the input")?;
    Ok(0)
}

/// Runs the suite against a daemon of this build, with the images behind its mirrors.
fn on_a_node(options: node::Options, suite: &suite::Options, daemon_log: Option<&Path>) -> Result<Outcomes> {
    let registry = Prepared::make()?.serve()?;
    let node = Node::new(&node::Options {
        mirrored: MIRRORED.map(str::to_owned).into(),
        mirror: Some(registry.address()),
        ..options
    })?;
    let daemon = node.start()?;
    let outcomes = suite::run(&node.socket(), suite);
    let ended = daemon.stop();
    if let Some(copy) = daemon_log {
        std::fs::copy(node.log_file(), copy).with_context(|| format!("writing {}", copy.display()))?;
    }
    ended?;
    outcomes
}

/// The same against containerd.
fn on_the_peer(suite: &suite::Options, daemon_log: Option<&Path>) -> Result<Outcomes> {
    let registry = Prepared::make()?.serve()?;
    let peer = Peer::start(Kind::Containerd, &MIRRORED, registry.address(), "registry.k8s.io/pause:3.9")?;
    let outcomes = suite::run(peer.socket(), suite);
    if let Some(copy) = daemon_log {
        std::fs::write(copy, peer.log()).with_context(|| format!("writing {}", copy.display()))?;
    }
    outcomes
}

/// Prints what failed, what was skipped, what differs and the counts; returns the exit status.
fn judge(outcomes: &Outcomes, expected: &Expected, partial: bool) -> i32 {
    let mut counts = [0; 3];
    // Of the failures, those that the list has with this very reason: what the runtime refuses to do.
    let mut refused = 0;
    for (name, outcome) in outcomes {
        match outcome {
            Outcome::Pass => counts[0] += 1,
            Outcome::Fail(said) => {
                counts[1] += 1;
                if let Some(reason) = expected.refusal(name, outcome) {
                    refused += 1;
                    println!("refused as expected {name}: {reason}");
                } else {
                    println!("FAILED {name}\n    {}", said.replace('\n', "\n    "));
                }
            }
            Outcome::Skip(reason) => {
                counts[2] += 1;
                println!("skipped {name}: {reason}");
            }
        }
    }
    let differences = expected.differences(outcomes, partial);
    for difference in &differences {
        println!("DIFFERENT {difference}");
    }
    if refused > 0 {
        println!("critest: {refused} of the failures are expected");
    }
    println!("critest: {} passed, {} failed, {} skipped", counts[0], counts[1], counts[2]);
    i32::from(!differences.is_empty())
}
