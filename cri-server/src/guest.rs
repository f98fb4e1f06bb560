//! `podvisor guest`: builds, lists, checks and removes the guests that pods in virtual machines start from.

use std::fmt::Write as _;
use std::io::{self, IsTerminal, Write as _};
use std::path::{Path, PathBuf};
use std::process::ExitCode;

use anyhow::Context;
use clap::{ArgGroup, Args, Subcommand};
use podvisor_config::Config;
use podvisor_guest::{Debian, Fetched, GuestId, Guests, Inputs};

#[derive(Debug, Subcommand)]
pub(crate) enum GuestCommand {
    /// Builds a guest from a distribution's kernel and installs it.
    Build(Build),
    /// Fetches Debian's kernel for clouds with apt and does nothing else, for machines that cannot.
    Fetch {
        /// Where it is unpacked; must not exist.
        directory: PathBuf,
        #[command(flatten)]
        debian: Archive,
    },
    /// Lists the installed guests; a star marks the one that new pods get.
    List,
    /// Makes a guest the one that new pods get.
    Use {
        /// Its id, as in the list.
        id: GuestId,
    },
    /// Compares the files of one guest, or of all, with their digests.
    Verify {
        /// Its id, as in the list.
        id: Option<GuestId>,
    },
    /// Removes a guest that is not the current one.
    Remove {
        /// Its id, as in the list.
        id: GuestId,
    },
}

#[derive(Debug, Args)]
pub(crate) struct Archive {
    /// bookworm, bookworm-backports, …; the machine's own release if left out.
    #[arg(long)]
    suite: Option<String>,
    /// The archive that the suite is in, if it is not that of the machine's apt sources.
    #[arg(long, value_name = "URL")]
    mirror: Option<String>,
}

#[derive(Debug, Args)]
#[command(group = ArgGroup::new("source").required(true))]
pub(crate) struct Build {
    /// The distribution's kernel (vmlinuz).
    #[arg(long, value_name = "FILE", requires = "modules", group = "source")]
    kernel: Option<PathBuf>,
    /// The kernel's module directory (/lib/modules/VERSION).
    #[arg(long, value_name = "DIRECTORY", requires = "kernel")]
    modules: Option<PathBuf>,
    /// Fetches Debian's kernel for clouds with apt, from SUITE (bookworm, bookworm-backports, …) or the machine's own release.
    #[arg(long, value_name = "SUITE", num_args = 0..=1, group = "source")]
    #[expect(clippy::option_option, reason = "not given, given alone, given with a suite")]
    debian: Option<Option<String>>,
    /// The archive that the suite is in, if it is not that of the machine's apt sources.
    #[arg(long, value_name = "URL", requires = "debian")]
    mirror: Option<String>,
    /// The guest's first process; podvisor-agent beside this program if left out.
    #[arg(long, value_name = "FILE")]
    agent: Option<PathBuf>,
    /// A static shell, e.g. busybox, for `podvisor shell`. Without one nobody gets a console in the guest.
    #[arg(long, value_name = "FILE")]
    shell: Option<PathBuf>,
    /// Carries one more kernel module, with what it needs. May be repeated.
    #[arg(long, value_name = "NAME")]
    module: Vec<String>,
    /// Leaves the current guest the current one.
    #[arg(long)]
    keep_current: bool,
}

pub(crate) fn run(command: &GuestCommand, config: &Config) -> anyhow::Result<ExitCode> {
    let guests = Guests::open(&config.root);
    match command {
        GuestCommand::Build(build) => build.run(&guests)?,
        GuestCommand::Fetch { directory, debian } => fetch(directory, debian)?,
        GuestCommand::List => print!("{}", list(&guests)?),
        GuestCommand::Use { id } => {
            let guest = guests.choose(id)?;
            println!("new pods get guest {id}, kernel {}", guest.kernel_release());
        }
        GuestCommand::Verify { id } => return verify(&guests, id.as_ref()),
        GuestCommand::Remove { id } => {
            let users =
                crate::pod::record::Records::new(config.root.join("pods")).users_of_guest(id.as_str())?;
            anyhow::ensure!(
                users.is_empty(),
                "pods run with guest {id}: {}; remove it when they are gone",
                users.iter().map(ToString::to_string).collect::<Vec<_>>().join(", ")
            );
            guests.remove(id)?;
            println!("guest {id} is removed");
        }
    }
    Ok(ExitCode::SUCCESS)
}

impl Build {
    fn run(&self, guests: &Guests) -> anyhow::Result<()> {
        let agent = match &self.agent {
            Some(agent) => agent.clone(),
            None => {
                std::env::current_exe().context("finding podvisor-agent")?.with_file_name("podvisor-agent")
            }
        };
        anyhow::ensure!(
            agent.is_file(),
            "the guest's first process {} is no file: name it (--agent FILE)",
            agent.display()
        );
        let mut progress = Progress::new();
        let scratch = guests.scratch()?;
        let (vmlinuz, modules, package) = match (&self.kernel, &self.modules, &self.debian) {
            (Some(kernel), Some(modules), _) => (kernel.clone(), modules.clone(), None),
            (_, _, debian) => {
                let what = Debian { suite: debian.clone().flatten(), mirror: self.mirror.clone() };
                let fetched = podvisor_guest::fetch(&what, scratch.path(), &mut |step| progress.step(step))?;
                let Fetched { vmlinuz, modules, package } = fetched;
                (vmlinuz, modules, Some(package))
            }
        };
        let inputs = Inputs {
            vmlinuz,
            modules,
            agent,
            extra_modules: self.module.clone(),
            package,
            shell: self.shell.clone(),
        };
        let built = podvisor_guest::build(&inputs, &mut |step| progress.step(step))?;
        progress.step("installing");
        let installed = guests.install(&built, !self.keep_current)?;
        progress.end();
        let guest = &installed.guest;
        println!(
            "guest {} {}: kernel {}, {} modules, {} MB",
            guest.id(),
            if installed.is_new { "is installed" } else { "was there already" },
            guest.kernel_release(),
            guest.manifest().modules.len(),
            guest.size() / 1_000_000
        );
        if !guest.manifest().missing.is_empty() {
            println!(
                "not in this kernel, and not needed by every pod: {}",
                guest.manifest().missing.join(", ")
            );
        }
        if guests.current()?.is_some_and(|current| current.id() == guest.id()) {
            println!("new pods get it; those that run keep what they began with");
        } else {
            println!("new pods get it after `podvisor guest use {}`", guest.id());
        }
        Ok(())
    }
}

/// Fetches a kernel beside `directory`, which appears when all of it is there.
fn fetch(directory: &Path, debian: &Archive) -> anyhow::Result<()> {
    anyhow::ensure!(!directory.exists(), "{} exists already", directory.display());
    let directory = std::path::absolute(directory).context("finding the directory")?;
    let mut part = directory.as_os_str().to_owned();
    part.push(".part");
    let part = PathBuf::from(part);
    match std::fs::remove_dir_all(&part) {
        Err(error) if error.kind() != io::ErrorKind::NotFound => {
            return Err(error).with_context(|| format!("removing {}", part.display()));
        }
        _ => std::fs::create_dir_all(&part).with_context(|| format!("making {}", part.display()))?,
    }
    let what = Debian { suite: debian.suite.clone(), mirror: debian.mirror.clone() };
    let mut progress = Progress::new();
    let fetched = podvisor_guest::fetch(&what, &part, &mut |step| progress.step(step))?;
    std::fs::rename(&part, &directory).with_context(|| format!("making {}", directory.display()))?;
    progress.end();
    let place = |path: &Path| path.strip_prefix(&part).map_or(path.to_owned(), |path| directory.join(path));
    println!("{} {} is in {}", fetched.package.name, fetched.package.version, directory.display());
    println!(
        "build it with: podvisor guest build --kernel {} --modules {}",
        place(&fetched.vmlinuz).display(),
        place(&fetched.modules).display()
    );
    Ok(())
}

/// Table of the guests.
fn list(guests: &Guests) -> anyhow::Result<String> {
    let mut table = String::new();
    let listed = guests.list()?;
    if listed.is_empty() {
        return Ok("there are no guests: `podvisor guest build` makes one\n".to_owned());
    }
    writeln!(table, "  {:<16}  {:<32}  {:<8}  {:>6}  AGENT", "ID", "KERNEL", "PROTOCOL", "SIZE")?;
    for entry in &listed {
        let mark = if entry.is_current { '*' } else { ' ' };
        match &entry.guest {
            Ok(guest) => writeln!(
                table,
                "{mark} {:<16}  {:<32}  {:<8}  {:>4}MB  {}",
                entry.id,
                guest.kernel_release(),
                guest.protocol(),
                guest.size() / 1_000_000,
                &guest.manifest().agent.sha256.get(..12).unwrap_or_default(),
            )?,
            Err(error) => writeln!(table, "{mark} {:<16}  {}", entry.id, crate::error::chain(error))?,
        }
    }
    Ok(table)
}

fn verify(guests: &Guests, id: Option<&GuestId>) -> anyhow::Result<ExitCode> {
    let chosen: Vec<GuestId> = match id {
        Some(id) => vec![id.clone()],
        None => guests.list()?.into_iter().map(|listed| listed.id).collect(),
    };
    let mut is_good = true;
    for id in &chosen {
        match guests.verify(id) {
            Ok(differences) if differences.is_empty() => println!("{id}: good"),
            Ok(differences) => {
                is_good = false;
                for difference in differences {
                    println!("{id}: {difference}");
                }
            }
            Err(error) => {
                is_good = false;
                println!("{id}: {}", crate::error::chain(&error));
            }
        }
    }
    if !is_good {
        println!("build what differs again (`podvisor guest build`)");
    }
    Ok(if is_good { ExitCode::SUCCESS } else { ExitCode::FAILURE })
}

/// Shows steps: one changing line on a terminal, else a line each.
struct Progress {
    is_terminal: bool,
}

impl Progress {
    fn new() -> Self {
        Self { is_terminal: io::stderr().is_terminal() }
    }

    fn step(&mut self, text: &str) {
        if self.is_terminal {
            // Carriage return, and erase to the end of the line.
            eprint!("\r\x1b[K{text} …");
            let _ = io::stderr().flush();
        } else {
            eprintln!("{text}");
        }
    }

    fn end(&mut self) {
        if self.is_terminal {
            eprint!("\r\x1b[K");
            let _ = io::stderr().flush();
        }
    }
}

impl Drop for Progress {
    fn drop(&mut self) {
        self.end();
    }
}
