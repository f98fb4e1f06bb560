//! The command line.

use std::path::{Path, PathBuf};
use std::process::ExitCode;

use anyhow::Context;
use clap::{Parser, Subcommand};
use podvisor_config::Config;
use podvisor_config::import::From;

/// Where the configuration is unless `--config` says otherwise.
const CONFIG: &str = "/etc/podvisor/config.toml";

#[derive(Debug, Parser)]
#[command(
    name = "podvisor",
    version,
    about = "A Kubernetes container runtime: one daemon, every pod isolated as it needs"
)]
struct Arguments {
    /// The configuration file; drop-ins are read from the directory of the same name with `.d` added.
    #[arg(long, global = true, value_name = "FILE")]
    config: Option<PathBuf>,
    #[command(subcommand)]
    command: Command,
}

#[derive(Debug, Subcommand)]
enum Command {
    /// Runs the daemon.
    Serve,
    /// Says what this machine can do, why not, and what to do about it.
    Check,
    /// Works with the configuration.
    Config {
        #[command(subcommand)]
        command: ConfigCommand,
    },
    /// Builds and keeps the kernels that pods in virtual machines start from.
    Guest {
        #[command(subcommand)]
        command: crate::guest::GuestCommand,
    },
    /// Opens a shell in the guest of a pod that is a virtual machine.
    Shell {
        /// The sandbox's id, or its first digits.
        pod: String,
    },
    /// Prints the version.
    Version,
}

#[derive(Debug, Subcommand)]
enum ConfigCommand {
    /// Prints the default configuration with a comment at each key.
    Default,
    /// Reads the configuration and reports every mistake in it.
    Validate,
    /// Prints the configuration in force: the file, its drop-ins and the defaults.
    Show,
    /// Makes a configuration from CRI-O's or containerd's: printed to standard output, a report of every key to standard error.
    Import(ImportArguments),
}

#[derive(Debug, clap::Args)]
#[group(required = true, multiple = false)]
struct ImportArguments {
    /// From CRI-O's file and what lies in the directory of the same name with `.d` added.
    #[arg(long, value_name = "FILE", num_args = 0..=1, default_missing_value = From::Crio.default_file().as_os_str())]
    from_crio: Option<PathBuf>,
    /// From containerd's file and what it imports.
    #[arg(long, value_name = "FILE", num_args = 0..=1, default_missing_value = From::Containerd.default_file().as_os_str())]
    from_containerd: Option<PathBuf>,
}

pub(crate) fn main() -> ExitCode {
    let arguments = Arguments::parse();
    match run(&arguments) {
        Ok(code) => code,
        Err(error) => {
            eprintln!("podvisor: {error:#}");
            ExitCode::FAILURE
        }
    }
}

fn run(arguments: &Arguments) -> anyhow::Result<ExitCode> {
    let load = || load(arguments.config.as_deref());
    match &arguments.command {
        Command::Serve => crate::serve::serve(arguments.config.clone(), load()?)?,
        Command::Check => {
            return Ok(if crate::check::check(&load()?) { ExitCode::SUCCESS } else { ExitCode::FAILURE });
        }
        Command::Config { command: ConfigCommand::Default } => print!("{}", Config::default_toml()),
        Command::Config { command: ConfigCommand::Validate } => {
            load()?;
            println!("{}: valid", arguments.config.as_deref().unwrap_or(Path::new(CONFIG)).display());
        }
        Command::Config { command: ConfigCommand::Show } => print!("{}", load()?.to_toml()),
        Command::Config { command: ConfigCommand::Import(arguments) } => import(arguments)?,
        Command::Guest { command } => return crate::guest::run(command, &load()?),
        Command::Shell { pod } => return crate::shell::run(pod, &load()?),
        Command::Version => println!("podvisor {}", env!("CARGO_PKG_VERSION")),
    }
    Ok(ExitCode::SUCCESS)
}

fn import(arguments: &ImportArguments) -> anyhow::Result<()> {
    let crio = arguments.from_crio.iter().map(|file| (From::Crio, file));
    let containerd = arguments.from_containerd.iter().map(|file| (From::Containerd, file));
    for (from, file) in crio.chain(containerd) {
        let imported = podvisor_config::import::import(from, file)?;
        eprintln!("{}", imported.report());
        print!("{}", imported.toml);
    }
    Ok(())
}

/// Reads the configuration. A file that was named must be there; the default one may be missing.
pub(crate) fn load(file: Option<&Path>) -> anyhow::Result<Config> {
    Config::load(file.unwrap_or(Path::new(CONFIG)), file.is_some()).context("the configuration was refused")
}
