//! podvisor-vmm: a pod's virtual machine on KVM.
//!
//! Two processes. The one that the pod's monitor starts serves the hypervisor protocol ([`podvisor_proto::hypervisor`]) and opens what it names; its
//! child, which gets nothing but that, is the machine. See README.md for the map and for what confines the machine.

mod boot;
mod confine;
mod cpu;
mod handover;
mod layout;
mod machine;
mod open;
mod sys;
mod up;

use std::io;
use std::os::fd::AsFd;
use std::process::ExitCode;

use podvisor_hypervisor::failure::chain;
use podvisor_hypervisor::keeper::Keeper;
use podvisor_hypervisor::sys::{close_other_descriptors, inherited_descriptor, tune_allocator};

/// Why the program had to end.
#[derive(Debug, thiserror::Error)]
enum ProgramError {
    #[error("use descriptor {0} as the connection")]
    Control(i32, #[source] io::Error),
    #[error("wait for events")]
    Wait(#[source] io::Error),
    #[error("be a machine")]
    Machine(#[from] machine::LinkError),
}

/// What this process is.
enum Part {
    Keeper,
    Machine,
}

/// What it has to say goes to the process that started it.
struct Words;

impl log::Log for Words {
    fn enabled(&self, metadata: &log::Metadata<'_>) -> bool {
        metadata.level() <= log::Level::Warn
    }

    fn log(&self, record: &log::Record<'_>) {
        if self.enabled(record.metadata()) {
            eprintln!("podvisor-vmm: {}", record.args());
        }
    }

    fn flush(&self) {}
}

fn main() -> ExitCode {
    let arguments: Vec<String> =
        std::env::args_os().skip(1).map(|argument| argument.to_string_lossy().into_owned()).collect();
    let arguments: Vec<&str> = arguments.iter().map(String::as_str).collect();
    let (number, part) = match arguments[..] {
        ["--version"] => {
            println!("podvisor-vmm {}", env!("CARGO_PKG_VERSION"));
            return ExitCode::SUCCESS;
        }
        ["--control-fd", number] => (number.parse().ok(), Part::Keeper),
        ["--machine-fd", number] => (number.parse().ok(), Part::Machine),
        _ => (None, Part::Keeper),
    };
    let Some(number) = number else {
        eprintln!("usage: podvisor-vmm --control-fd N | --version");
        return ExitCode::from(2);
    };
    // Set once, here.
    let _ = log::set_logger(&Words);
    log::set_max_level(log::LevelFilter::Warn);
    match serve(number, &part) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("podvisor-vmm: {}", chain(&error));
            ExitCode::FAILURE
        }
    }
}

fn serve(number: i32, part: &Part) -> Result<(), ProgramError> {
    let control = inherited_descriptor(number).map_err(|error| ProgramError::Control(number, error))?;
    close_other_descriptors(control.as_fd());
    tune_allocator();
    match part {
        Part::Keeper => {
            // Fails when this process leads a group already, and then it is as detached as it can be.
            let _ = rustix::process::setsid();
            // The machine is a pod's: where the monitor was started from must not be kept from being unmounted.
            let _ = std::env::set_current_dir("/");
            rustix::process::umask(rustix::fs::Mode::from_raw_mode(0o077));
            Keeper::new(control, up::Up::begin).run().map_err(ProgramError::Wait)
        }
        Part::Machine => Ok(machine::run(control)?),
    }
}
