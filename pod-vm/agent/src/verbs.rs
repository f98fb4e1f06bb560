//! Which request goes where. A request is answered at once, or, where a process has to be prepared first, when that is over.

use std::path::PathBuf;

use podvisor_proto::agent::request::Verb;
use podvisor_proto::agent::{Done, HelloReply, PROTOCOL_VERSION, Request, reply};

use crate::agent::Agent;
use crate::awaited::Wanted;
use crate::disks;
use crate::failure::Failure;
use crate::images;
use crate::interface::Interface;

/// What a request comes to: an answer, or later.
pub(crate) type Answered = Result<Option<reply::Result>, Failure>;

/// The answer of verbs that have nothing to tell.
pub(crate) fn done(outcome: Result<(), Failure>) -> Answered {
    outcome.map(|()| Some(reply::Result::Done(Done {})))
}

/// Whether file systems have to be usable for it that no device asks for.
fn needs_file_systems(verb: &Verb) -> bool {
    matches!(verb, Verb::AddRoot(_) | Verb::CreateContainer(_))
}

impl Agent {
    pub(crate) fn serve(&mut self, request: Request) {
        let Request { id, verb } = request;
        self.requests += 1;
        let number = self.requests;
        if let Some(control) = &mut self.control {
            control.asked(number, id);
        }
        let greeted = self.control.as_ref().is_some_and(|control| control.greeted);
        let answered = match verb {
            None => Err(Failure::unsupported("this agent does not know the verb")),
            Some(Verb::Hello(_)) => Ok(Some(reply::Result::Hello(self.hello()))),
            Some(_) if !greeted => Err(Failure::state("Hello comes first")),
            Some(verb) => self.perform(number, verb),
        };
        match answered {
            Ok(None) => {}
            Ok(Some(result)) => self.answer(number, Ok(result)),
            Err(failure) => self.answer(number, Err(failure)),
        }
        if !greeted && let Some(control) = self.control.as_mut().filter(|control| control.greeted) {
            for event in self.events.waiting() {
                control.tell(event);
            }
        }
    }

    fn perform(&mut self, request: u64, verb: Verb) -> Answered {
        if needs_file_systems(&verb)
            && let Some(duties) = &mut self.duties
        {
            duties.load_all();
        }
        match verb {
            Verb::Hello(_) => Ok(None),
            Verb::Personalise(wanted) => done(self.personalise(&wanted)),
            Verb::SetTime(time) => done(self.clock.told(time.time_ns)),
            Verb::Acknowledge(acknowledged) => {
                self.events.acknowledge(acknowledged.sequence);
                done(Ok(()))
            }
            Verb::AddInterface(wanted) => {
                self.attempt(request, Wanted::Interface(Interface::parse(&wanted)?))
            }
            Verb::RemoveInterface(interface) => done(self.remove_interface(&interface.hardware_address)),
            Verb::AddShare(share) => self.attempt(request, Wanted::Share(share)),
            Verb::RemoveShare(share) => done(self.pod.storage.remove_share(&share.tag)),
            Verb::AddRoot(root) => self.attempt(request, Wanted::Root(root)),
            Verb::RemoveRoot(root) => done(self.pod.storage.remove_root(&root.container_id)),
            Verb::AddVolume(volume) => done(self.pod.volumes.add(&volume)),
            Verb::WriteVersion(part) => done(self.pod.volumes.write(&part)),
            Verb::RemoveVolume(volume) => done(self.pod.volumes.remove(&volume.name)),
            Verb::ReleaseDisk(disk) => done(self.release(disks::device(&disk.serial), &disk.serial)),
            Verb::ReleaseImage(image) => done(self.release(images::device(&image.serial), &image.serial)),
            Verb::StartInit(_) => self.start_init(),
            Verb::CreateContainer(create) => self.attempt(request, Wanted::Container(Box::new(create))),
            Verb::StartContainer(start) => self.start_container(request, &start.container_id),
            Verb::KillContainer(kill) => done(self.kill_container(&kill)),
            Verb::DeleteContainer(delete) => done(self.delete_container(&delete.container_id)),
            Verb::UpdateContainer(update) => done(self.update_container(&update)),
            Verb::Exec(exec) => self.execute(request, &exec),
            Verb::KillExec(kill) => done(self.kill_exec(&kill)),
            Verb::Resize(resize) => done(self.resize(&resize)),
            Verb::Adapt(adapt) => done(self.adapt(&adapt)),
            Verb::Stats(stats) => Ok(Some(reply::Result::Stats(self.stats(&stats)))),
            Verb::List(_) => Ok(Some(reply::Result::Processes(self.list()))),
            Verb::Shutdown(_) => {
                self.ending = true;
                self.kill_all();
                done(Ok(()))
            }
        }
    }

    fn hello(&mut self) -> HelloReply {
        if let Some(control) = &mut self.control {
            control.greeted = true;
        }
        HelloReply {
            protocol_version: PROTOCOL_VERSION,
            build: env!("CARGO_PKG_VERSION").to_owned(),
            kernel_release: rustix::system::uname().release().to_string_lossy().into_owned(),
            ready_ns: self.pod.ready_ns(),
            personalised: self.pod.is_personalised(),
            volumes: true,
            block_devices: true,
            images: true,
            huge_pages: true,
        }
    }

    /// One that is not there was let go of.
    fn release(&mut self, device: Option<PathBuf>, serial: &str) -> Result<(), Failure> {
        let Some(device) = device.filter(|_| self.duties.is_some()) else { return Ok(()) };
        self.places.let_go(&device).map_err(|error| Failure::system(&format!("let go of {serial:?}"), error))
    }

    /// Answers a request; nobody may be there any more to hear it.
    pub(crate) fn answer(&mut self, request: u64, outcome: Result<reply::Result, Failure>) {
        if let Some(control) = &mut self.control {
            control.reply(request, outcome);
        }
    }
}
