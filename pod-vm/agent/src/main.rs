//! podvisor-agent: the first process of a pod's guest. It makes the pod's containers and tells the pod's monitor about them.
//!
//! One thread, one loop around poll(2): what is watched is derived from what there is, so nothing is registered or forgotten. It serves
//! the agent protocol ([`podvisor_proto::agent`]); the monitor dials, the agent never does.
//!
//! | file | idea |
//! |---|---|
//! | `boot.rs` | from the kernel's start to a usable guest |
//! | `modules.rs` | kernel modules, those of every start and those that are asked for |
//! | `uevents.rs` | news of devices |
//! | `listen.rs` | where the monitor dials |
//! | `agent.rs` | what there is, and the loop |
//! | `control.rs` | the control connection |
//! | `verbs.rs` | which request goes where |
//! | `container.rs` | a container's states and verbs |
//! | `exec.rs` | one more process in a container |
//! | `console.rs` | a shell of the guest itself, for the node's operator |
//! | `connect.rs` | connections to the pod's ports |
//! | `init.rs` | the first process of a pid namespace that containers share |
//! | `places.rs` | devices that no bus announces |
//! | `pod.rs` | what a guest becomes a pod by: name, randomness, limits |
//! | `limits.rs` | resource limits that containers inherit |
//! | `clock.rs` | the guest's clock |
//! | `size.rs` | memory and processors that come and go |
//! | `interface.rs` | network interfaces |
//! | `netlink.rs` | the kernel's interface for those |
//! | `awaited.rs` | requests about devices that have not appeared yet |
//! | `storage.rs` | shares and root file systems |
//! | `images.rs` | images in the guest's memory by their serials |
//! | `disks.rs` | disks by their serials, and their numbers in specs |
//! | `events.rs` | ends of processes, kept until they are acknowledged |
//! | `streams.rs` | bytes between programs and stream connections |
//! | `stats.rs` | what containers and the guest use |
//! | `failure.rs` | errors as they go over the wire |
//! | `sys.rs` | system calls without a safe wrapper |
//!
//! Invariants: no message makes it panic or grow without bound; no container's behaviour holds up another's; an exit is told until it is
//! acknowledged.

mod agent;
mod awaited;
mod boot;
mod clock;
mod connect;
mod console;
mod container;
mod control;
mod disks;
mod events;
mod exec;
mod failure;
mod huge_pages;
mod images;
mod init;
mod interface;
mod limits;
mod listen;
mod modules;
mod netlink;
mod places;
mod pod;
mod size;
mod stats;
mod storage;
mod streams;
mod sys;
mod uevents;
mod verbs;
mod volumes;

use std::collections::BTreeMap;
use std::path::PathBuf;
use std::process::ExitCode;

use agent::Agent;
use listen::Listeners;

/// Why there is no agent.
#[derive(Debug, thiserror::Error)]
enum AgentError {
    #[error("prepare the guest")]
    Boot(#[from] boot::BootError),
    #[error(transparent)]
    Module(modules::LoadError),
    #[error("let go of a device")]
    Unbind(#[source] std::io::Error),
    #[error("listen for the monitor")]
    Listen(#[source] std::io::Error),
    #[error("wait for events")]
    Wait(#[source] std::io::Error),
}

fn main() -> ExitCode {
    let arguments: Vec<_> = std::env::args_os().skip(1).collect();
    let outcome = match arguments.iter().map(|argument| argument.to_str()).collect::<Vec<_>>()[..] {
        [Some("--version")] => {
            println!("podvisor-agent {}", env!("CARGO_PKG_VERSION"));
            return ExitCode::SUCCESS;
        }
        // For tests, and for a look at it without a virtual machine.
        [Some("--listen"), Some(directory), Some("--cgroups"), Some(mount), ref shares @ ..]
            if stand_ins(shares).is_some() =>
        {
            on_unix(directory.into(), mount.into(), stand_ins(shares).unwrap_or_default())
        }
        // The kernel asks for a module: see `modules.rs`.
        [Some("-q"), Some("--"), Some(alias)] => modules::demand(alias).map_err(AgentError::Module),
        [Some("--let-go"), Some(place)] => places::unbind(place).map_err(AgentError::Unbind),
        _ if std::process::id() == 1 => in_guest(),
        _ => {
            eprintln!(
                "usage: podvisor-agent --listen DIRECTORY --cgroups MOUNT [--share TAG=DIRECTORY] | --version (or as the first process of a guest)"
            );
            return ExitCode::from(2);
        }
    };
    match outcome {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("podvisor-agent: {}", failure::chain(&error));
            if std::process::id() == 1 {
                // The hypervisor sees the guest's end; the console has the reason.
                boot::power_off();
            }
            ExitCode::FAILURE
        }
    }
}

fn in_guest() -> Result<(), AgentError> {
    let duties = boot::prepare()?;
    let listeners = Listeners::vsock().map_err(AgentError::Listen)?;
    Agent::new(listeners, PathBuf::from(boot::CGROUPS), Some(duties))
        .and_then(Agent::run)
        .map_err(AgentError::Wait)?;
    boot::power_off();
    Ok(())
}

fn on_unix(
    directory: PathBuf,
    cgroups: PathBuf,
    shares: BTreeMap<String, PathBuf>,
) -> Result<(), AgentError> {
    let listeners = Listeners::unix(&directory).map_err(AgentError::Listen)?;
    let mut agent = Agent::new(listeners, cgroups, None).map_err(AgentError::Wait)?;
    agent.pod.storage.stand_ins = shares;
    agent.run().map_err(AgentError::Wait)
}

/// `--share TAG=DIRECTORY`, any number of times: there is no file server without a machine.
fn stand_ins(arguments: &[Option<&str>]) -> Option<BTreeMap<String, PathBuf>> {
    let pairs = arguments.chunks(2).map(|pair| match pair {
        [Some("--share"), Some(share)] => {
            share.split_once('=').map(|(tag, directory)| (tag.into(), directory.into()))
        }
        _ => None,
    });
    pairs.collect()
}
