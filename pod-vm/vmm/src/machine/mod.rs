//! The process that is the machine. It gets everything by its connection to the process that started it, gives up everything else, and runs until the
//! guest ends or that process does.
//!
//! | file | idea |
//! |---|---|
//! | `parts.rs` | what it gets |
//! | `build.rs` | from those to a machine that can run |
//! | `bus.rs`, `transport.rs` | what processors reach besides memory |
//! | `console.rs` | the serial port |
//! | `workers.rs` | threads that serve devices |
//! | `ending.rs` | the end |

mod build;
pub(crate) mod bus;
pub(crate) mod console;
pub(crate) mod ending;
pub(crate) mod parts;
pub(crate) mod transport;
mod workers;

use std::io;
use std::os::fd::OwnedFd;
use std::sync::{Arc, Barrier};
use std::thread;

use podvisor_hypervisor::failure::{Failure, chain};
use podvisor_proto::hypervisor::{Done, EndReason, Request, Started, reply, request::Verb};
use prost::Message;

use crate::confine::{self, ConfineError, Role};
use crate::{cpu, handover};
use ending::Ending;
use parts::Parts;

/// Why there is no machine.
#[derive(Debug, thiserror::Error)]
pub(crate) enum MachineError {
    #[error("confine the machine")]
    Confine(#[from] ConfineError),
    #[error("use KVM: {0}")]
    Unusable(&'static str),
    #[error("ask KVM to {0}")]
    Kvm(&'static str, #[source] io::Error),
    #[error("make the guest's memory")]
    Memory(#[source] io::Error),
    #[error("write to the guest's memory")]
    Write(#[from] vm_memory::GuestMemoryError),
    #[error("load the guest")]
    Boot(#[from] crate::boot::BootError),
    #[error("make events")]
    Descriptors(#[source] io::Error),
    #[error("start threads")]
    Threads(#[source] io::Error),
    #[error("make device {0}")]
    Device(String, #[source] io::Error),
    #[error("use the file server of share {0}")]
    Share(String, #[source] podvisor_virtio::fs::ServerError),
    #[error("make a device's queues")]
    Queues(#[from] podvisor_virtio::device::Misuse),
    #[error("give every device a place: there are {0}")]
    Places(usize),
}

/// Why this process has to end before there is a machine, or without one.
#[derive(Debug, thiserror::Error)]
pub(crate) enum LinkError {
    #[error("receive what the machine is made of")]
    Receive(#[source] io::Error),
    #[error("understand what the machine is made of")]
    Nonsense,
}

/// Stacks of this process's threads, in bytes.
const STACK: usize = 256 << 10;

/// Makes the machine that is asked for by `link`, and runs it.
pub(crate) fn run(link: OwnedFd) -> Result<(), LinkError> {
    let (bytes, descriptors) = handover::receive(&link).map_err(LinkError::Receive)?;
    let request = Request::decode(bytes.as_slice()).map_err(|_| LinkError::Nonsense)?;
    let Some(Verb::Start(start)) = request.verb else { return Err(LinkError::Nonsense) };
    let parts = Parts::from_descriptors(&start, descriptors).ok_or(LinkError::Nonsense)?;
    let made = confine::enter(&start)
        .map_err(MachineError::from)
        .and_then(|()| build::build(&start, parts, link.try_clone().map_err(MachineError::Descriptors)?));
    match made.and_then(|machine| begin(machine, request.id)) {
        Ok(ending) => {
            wait(&ending);
            Ok(())
        }
        Err(error) => {
            let failure = Failure::failed("make the machine", chain(&error));
            let reply = podvisor_proto::hypervisor::Reply {
                id: request.id,
                result: Some(reply::Result::Error(failure.into())),
            };
            // A receiver that has gone does not wait for it.
            let _ = rustix::net::send(&link, &reply.encode_to_vec(), rustix::net::SendFlags::NOSIGNAL);
            Ok(())
        }
    }
}

/// Starts all threads, confines them, says so, and lets the processors run.
fn begin(machine: build::Machine, request: u64) -> Result<Arc<Ending>, MachineError> {
    let build::Machine { vm, vcpus, bus, ending, workers, .. } = machine;
    let filters = confine::filters().map_err(ConfineError::from)?;
    let (bus, filters) = (Arc::new(bus), Arc::new(filters));
    let ready = Arc::new(Barrier::new(vcpus.len() + 1));
    let cpus = u32::try_from(vcpus.len()).unwrap_or(0);
    let spawn = |name: String, role: Role, body: Box<dyn FnOnce(&Ending) + Send>| {
        let (ending, filters) = (Arc::clone(&ending), Arc::clone(&filters));
        thread::Builder::new()
            .name(name)
            .stack_size(STACK)
            .spawn(move || {
                if let Err(error) = filters.restrict(role) {
                    ending.tell(EndReason::Failure, &chain(&error));
                }
                body(&ending);
            })
            .map_err(MachineError::Threads)
    };
    for (number, (role, worker)) in workers.into_iter().enumerate() {
        let serve = move |ending: &Ending| {
            let error = worker.run();
            ending.tell(EndReason::Failure, &format!("wait for devices: {error}"));
        };
        spawn(format!("devices{number}"), role, Box::new(serve))?;
    }
    for (number, vcpu) in (0u8..).zip(vcpus) {
        let (bus, ready) = (Arc::clone(&bus), Arc::clone(&ready));
        let run = move |ending: &Ending| {
            ready.wait();
            cpu::run(vcpu, number, &bus, ending);
        };
        spawn(format!("cpu{number}"), Role::Processor, Box::new(run))?;
    }
    filters.restrict(Role::Main).map_err(ConfineError::from)?;
    ending.send(
        request,
        reply::Result::Started(Started {
            name: "podvisor-vmm".to_owned(),
            version: env!("CARGO_PKG_VERSION").to_owned(),
            cpus_limit: cpus,
            memory_limit: machine.memory,
            ..Started::default()
        }),
    );
    // The machine's descriptor lives as long as the process.
    std::mem::forget(vm);
    ready.wait();
    Ok(ending)
}

/// Gives signs of life until who started this process has gone, or sends what it never does. Then the machine goes with this process.
fn wait(link: &Ending) {
    let mut bytes = [0; 64];
    loop {
        let flags = rustix::net::RecvFlags::empty();
        let request = match rustix::net::recv(link, &mut bytes, flags) {
            Err(rustix::io::Errno::INTR) => continue,
            Ok((count @ 1.., _)) => Request::decode(&bytes[..count]).ok(),
            Ok((0, _)) | Err(_) => return,
        };
        match request {
            Some(Request { id, verb: Some(Verb::Check(_)) }) => link.send(id, reply::Result::Done(Done {})),
            _ => return,
        }
    }
}
