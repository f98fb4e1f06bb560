//! podvisor-qemu: one virtual machine of QEMU's, for a pod's monitor.
//!
//! It serves the hypervisor protocol ([`podvisor_proto::hypervisor`]) to the monitor that started it, is the parent of QEMU, and the guest's
//! vsock device. See README.md for the map and for what confines QEMU.

mod changes;
mod command_line;
mod confine;
mod device;
mod inventory;
mod joined;
mod kvm;
mod landlock;
mod launch;
mod plan;
mod qmp;
mod start;
mod tsc;
mod up;
mod verdict;
mod vsock;

use std::io;
use std::os::fd::AsFd;
use std::process::ExitCode;

use plan::{Choice, Plan};
use podvisor_hypervisor::keeper::Keeper;
use podvisor_hypervisor::{failure, sys};
use up::Up;

/// Why the program had to end.
#[derive(Debug, thiserror::Error)]
enum ProgramError {
    #[error("use descriptor {0} as the control connection")]
    Control(i32, #[source] io::Error),
    #[error("wait for events")]
    Wait(#[source] io::Error),
}

fn main() -> ExitCode {
    let arguments: Vec<String> =
        std::env::args_os().skip(1).map(|argument| argument.to_string_lossy().into_owned()).collect();
    let arguments: Vec<&str> = arguments.iter().map(String::as_str).collect();
    let (number, choice) = match arguments[..] {
        ["--version"] => {
            println!("podvisor-qemu {}", env!("CARGO_PKG_VERSION"));
            return ExitCode::SUCCESS;
        }
        ["--control-fd", number] => (number.parse().ok(), Some(Choice::ByNeed)),
        ["--control-fd", number, "--machine", machine] => (number.parse().ok(), Choice::from_name(machine)),
        _ => (None, None),
    };
    let (Some(number), Some(choice)) = (number, choice) else {
        eprintln!("usage: podvisor-qemu --control-fd N [--machine auto|microvm|q35] | --version");
        return ExitCode::from(2);
    };
    match serve(number, choice) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("podvisor-qemu: {}", failure::chain(&error));
            ExitCode::FAILURE
        }
    }
}

fn serve(number: i32, choice: Choice) -> Result<(), ProgramError> {
    let clock = tsc::Clock::begin();
    let control = sys::inherited_descriptor(number).map_err(|error| ProgramError::Control(number, error))?;
    sys::close_other_descriptors(control.as_fd());
    sys::tune_allocator();
    // Fails when this process leads a group already, and then it is as detached as it can be.
    let _ = rustix::process::setsid();
    // The machine is a pod's: where the monitor was started from must not be kept from being unmounted.
    let _ = std::env::set_current_dir("/");
    rustix::process::umask(rustix::fs::Mode::from_raw_mode(0o077));
    let begin = |start, request| Up::new(Plan::new(start, choice)?, clock, request);
    Keeper::new(control, begin).run().map_err(ProgramError::Wait)
}
