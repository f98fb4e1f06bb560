//! The command line of the test tools: `podvisor-critest sandbox`, `images`, `run`.

use std::ffi::OsString;
use std::process::ExitCode;

use anyhow::Result;
use clap::{Parser, Subcommand};

use podvisor_critest::catalogue::Prepared;
use podvisor_critest::sandbox::{self, Stage};

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
    /// Runs a command in namespaces and cgroups of its own; fails when it leaves anything behind.
    Sandbox {
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
        Command::Sandbox { command } => sandbox::run(&["stage"], &command),
        Command::Stage { stage, command } => sandbox::stage(stage, &["stage"], &command),
    }
}
