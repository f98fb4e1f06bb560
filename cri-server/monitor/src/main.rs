//! podvisor-monitor: one process per pod, between the daemon and the pod's containers.
//!
//! It is the parent of the pod's containers, holds their standard streams, writes their CRI logs and exit records, and
//! serves the monitor protocol ([`podvisor_proto::monitor`]). It outlives the daemon. See README.md for the map.

mod adopt;
mod cgroup;
mod channel;
mod connection;
mod console;
mod container;
mod disk;
mod exec;
mod exit_record;
mod failure;
mod follow;
mod forward;
mod frame;
mod guest;
mod init;
mod journal;
mod monitor;
mod output;
mod pod_init;
mod poll;
mod port;
mod process;
mod runtime;
mod stdio;
mod strays;
mod sys;
mod verbs;
mod version;

use std::io;
use std::os::fd::AsFd;
use std::process::ExitCode;

/// Why a monitor could not begin or had to end.
#[derive(Debug, thiserror::Error)]
enum MonitorError {
    #[error("use descriptor {0} as the control connection")]
    Control(i32, #[source] io::Error),
    #[error("set up the monitor")]
    SetUp(#[source] io::Error),
    #[error("wait for events")]
    Wait(#[source] io::Error),
}

fn main() -> ExitCode {
    let arguments: Vec<String> =
        std::env::args_os().skip(1).map(|argument| argument.to_string_lossy().into_owned()).collect();
    let arguments: Vec<&str> = arguments.iter().map(String::as_str).collect();
    match arguments[..] {
        [init::VERB] => init::main(),
        [guest::leash::VERB, ref arguments @ ..] => guest::leash::main(arguments),
        ["--version"] => {
            println!("podvisor-monitor {}", env!("CARGO_PKG_VERSION"));
            ExitCode::SUCCESS
        }
        ["--control-fd", number] if number.parse::<i32>().is_ok() => {
            match number.parse().map_or(Ok(()), serve) {
                Ok(()) => ExitCode::SUCCESS,
                Err(error) => {
                    eprintln!("podvisor-monitor: {}", disk::chain(error));
                    ExitCode::FAILURE
                }
            }
        }
        _ => {
            eprintln!("usage: podvisor-monitor --control-fd N | --version");
            ExitCode::from(2)
        }
    }
}

fn serve(number: i32) -> Result<(), MonitorError> {
    let control = sys::inherited_descriptor(number).map_err(|error| MonitorError::Control(number, error))?;
    sys::close_other_descriptors(control.as_fd());
    sys::tune_allocator();
    // Fails when this process leads a group already, and then it is as detached as it can be.
    let _ = rustix::process::setsid();
    std::env::set_current_dir("/").map_err(MonitorError::SetUp)?;
    // Containers inherit it through their runtime; and the log's mode 0640 must come out as such.
    rustix::process::umask(rustix::fs::Mode::from_raw_mode(0o022));
    monitor::Monitor::new(control).map_err(MonitorError::SetUp)?.run().map_err(MonitorError::Wait)
}
