//! The process that is the machine. It gets everything by its connection to the process that started it, gives up everything else, and runs until the
//! guest ends or that process does.
//!
//! | file | idea |
//! |---|---|
//! | `parts.rs` | what it gets |
//! | `build.rs` | from those to a machine that can run |
//! | `devices.rs` | devices that come and go |
//! | `growth.rs` | memory that comes and goes |
//! | `images.rs` | files in the guest's memory |
//! | `slots.rs` | which memory is the guest's |
//! | `bus.rs`, `transport.rs` | what processors reach besides memory |
//! | `console.rs` | the serial port |
//! | `workers.rs` | threads that serve devices |
//! | `ending.rs` | the end |

mod build;
pub(crate) mod bus;
pub(crate) mod console;
mod devices;
pub(crate) mod ending;
mod growth;
mod images;
pub(crate) mod parts;
mod slots;
pub(crate) mod transport;
mod workers;

use std::io;
use std::os::fd::OwnedFd;
use std::sync::{Arc, Barrier};
use std::thread;
use std::time::Instant;

use podvisor_hypervisor::failure::{Failure, chain};
use podvisor_proto::hypervisor::{Done, EndReason, Request, Started, reply, request::Verb};
use prost::Message;
use rustix::event::{PollFd, PollFlags, Timespec, poll};
use vmm_sys_util::eventfd::EventFd;

use crate::confine::{self, ConfineError, Role};
use crate::{cpu, handover};
use devices::Devices;
use ending::Ending;
use growth::Growth;
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
    #[error("find a place for one more device")]
    Full,
}

/// Why this process has to end before there is a machine, or without one.
#[derive(Debug, thiserror::Error)]
pub(crate) enum LinkError {
    #[error("receive what the machine is made of")]
    Receive(#[source] io::Error),
    #[error("understand what the machine is made of")]
    Nonsense,
}

/// Bytes of a request to a machine that runs.
const LONGEST_CHANGE: usize = 4096;

/// Stacks of this process's threads, in bytes.
const STACK: usize = 256 << 10;

/// Makes the machine that is asked for by `link`, and runs it.
pub(crate) fn run(link: OwnedFd) -> Result<(), LinkError> {
    let (bytes, descriptors) = handover::receive(&link, handover::LONGEST).map_err(LinkError::Receive)?;
    let request = Request::decode(bytes.as_slice()).map_err(|_| LinkError::Nonsense)?;
    let Some(Verb::Start(start)) = request.verb else { return Err(LinkError::Nonsense) };
    let parts = Parts::from_descriptors(&start, descriptors).ok_or(LinkError::Nonsense)?;
    let made = confine::enter(&start)
        .map_err(MachineError::from)
        .and_then(|()| build::build(&start, parts, link.try_clone().map_err(MachineError::Descriptors)?));
    match made.and_then(|machine| begin(machine, request.id)) {
        Ok(mut running) => {
            running.wait();
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

/// A machine whose processors run.
struct Running {
    ending: Arc<Ending>,
    devices: Devices,
    growth: Option<Growth>,
    news: EventFd,
    plugs: bool,
}

/// Starts all threads, confines them, says so, and lets the processors run.
fn begin(machine: build::Machine, request: u64) -> Result<Running, MachineError> {
    let build::Machine { vcpus, bus, ending, devices, growth, news, memory_limit, plugs } = machine;
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
    let (quick, disks) = devices.workers();
    let workers = std::iter::once((Role::Devices, quick)).chain(disks.into_iter().map(|it| (Role::Disk, it)));
    for (number, (role, worker)) in workers.enumerate() {
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
            adds_shares: plugs,
            adds_disks: plugs,
            adds_networks: plugs,
            adds_images: plugs,
            adds_image_disks: plugs,
            cpus_limit: cpus,
            memory_limit,
            ..Started::default()
        }),
    );
    ready.wait();
    Ok(Running { ending, devices, growth, news, plugs })
}

impl Running {
    /// Gives signs of life and changes devices, until who started this process has gone, or sends what it never does. Then the machine goes with
    /// this process.
    fn wait(&mut self) {
        loop {
            for (request, outcome) in self.devices.removed() {
                self.answer(request, outcome);
            }
            if let Some((request, outcome)) = self.growth.as_mut().and_then(Growth::advance) {
                self.tell(request, outcome);
            }
            let growth = self.growth.as_ref().and_then(Growth::deadline);
            let timeout = self.devices.deadline().into_iter().chain(growth).min().map(|deadline| {
                let left = deadline.saturating_duration_since(Instant::now());
                // Less than a minute.
                Timespec {
                    tv_sec: i64::try_from(left.as_secs()).unwrap_or(1),
                    tv_nsec: left.subsec_nanos().into(),
                }
            });
            let link = PollFd::new(&*self.ending, PollFlags::IN);
            let news = PollFd::from_borrowed_fd(podvisor_virtio::sys::descriptor(&self.news), PollFlags::IN);
            let mut watched = [link, news];
            match poll(&mut watched, timeout.as_ref()) {
                Ok(_) | Err(rustix::io::Errno::INTR) => {}
                Err(error) => self.ending.tell(EndReason::Failure, &format!("wait for requests: {error}")),
            }
            let asked = !watched[0].revents().is_empty();
            // What is told from now on wakes again.
            let _ = self.news.read();
            if asked && !self.hear() {
                return;
            }
        }
    }

    /// Takes a request; false: there will be none.
    fn hear(&mut self) -> bool {
        let Ok((bytes, descriptors)) = handover::receive(&*self.ending, LONGEST_CHANGE) else { return false };
        match Request::decode(bytes.as_slice()) {
            Ok(Request { id, verb: Some(Verb::Check(_)) }) => {
                self.ending.send(id, reply::Result::Done(Done {}));
                true
            }
            Ok(Request { id, verb: Some(Verb::SetMemory(wanted)) }) => {
                let Self { growth: Some(growth), devices, .. } = self else { return false };
                if let Some(outcome) = growth.set(id, wanted.bytes, devices) {
                    self.tell(id, outcome);
                }
                true
            }
            Ok(Request { id, verb: Some(verb) }) if self.plugs => {
                match self.devices.change(id, verb, descriptors) {
                    Ok(true) => self.answer(id, Ok(())),
                    Ok(false) => {}
                    Err(failure) => self.answer(id, Err(failure)),
                }
                true
            }
            _ => false,
        }
    }

    fn answer(&self, request: u64, outcome: Result<(), Failure>) {
        self.tell(request, outcome.map(|()| reply::Result::Done(Done {})));
    }

    fn tell(&self, request: u64, outcome: Result<reply::Result, Failure>) {
        let result = outcome.unwrap_or_else(|failure| reply::Result::Error(failure.into()));
        self.ending.send(request, result);
    }
}
