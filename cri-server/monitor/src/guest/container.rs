//! Containers in the guest: what the agent is asked where the verbs of `container/` part ways.

use podvisor_proto::agent::{
    CreateContainer, DeleteContainer, KillContainer, RemoveRoot, StartContainer, UpdateContainer, reply,
    request::Verb,
};
use podvisor_proto::monitor::{self as proto, GuestContainer, Place, event};
use rustix::process::Signal;

use super::agent::{Outcome, Purpose, confused};
use super::devices::Then;
use crate::container::{Maker, Removal, State};
use crate::failure::Failure;
use crate::monitor::Monitor;
use crate::process::Child;
use crate::verbs::{Answer, Answered, ReplyTo};

impl Monitor {
    /// Whether a container can be made in the guest.
    pub(crate) fn check_guest_container(
        &self,
        id: &str,
        place: Place,
        mut guest: GuestContainer,
    ) -> Result<GuestContainer, Failure> {
        self.running_machine()?;
        if place != Place::Own {
            return Err(Failure::invalid("a container in a virtual machine has no other place"));
        }
        let root = guest.root.as_mut().ok_or_else(|| Failure::invalid("guest.root is missing"))?;
        id.clone_into(&mut root.container_id);
        Ok(guest)
    }

    /// Whether a container can be made on the host.
    pub(crate) fn check_host_container(&self) -> Result<(), Failure> {
        match self.machine {
            None => Ok(()),
            Some(_) => {
                Err(Failure::invalid("the containers of a virtual machine are made in it: guest is missing"))
            }
        }
    }

    /// Begins with what the machine is to have for it.
    pub(crate) fn create_in_guest(&mut self, key: u64) {
        let Some(container) = self.containers.get_mut(&key) else { return };
        let State::Opening { reply } = container.state else { return };
        container.state = State::Creating { reply, call: None };
        self.plug_devices(key);
    }

    /// The machine has all that.
    pub(super) fn add_root(&mut self, key: u64) {
        let Some(container) = self.containers.get_mut(&key) else { return };
        let Maker::Guest(guest) = &mut container.maker else { return };
        let root = guest.wanted.root.take().unwrap_or_default();
        let asked = if container.deletes.is_empty() {
            self.ask_agent(Verb::AddRoot(root), Purpose::AddRoot(key))
        } else {
            Err(deleted(&container.id))
        };
        if let Err(failure) = asked {
            self.creation_failed(key, failure, true);
        }
    }

    pub(super) fn root_added(&mut self, key: u64, outcome: Result<(), Failure>) {
        match outcome {
            Ok(()) => self.next_volume(key),
            Err(failure) => self.creation_failed(key, failure, true),
        }
    }

    /// The guest has all volumes.
    pub(super) fn create_with_volumes(&mut self, key: u64) {
        let asked = self
            .create_request(key)
            .and_then(|request| self.ask_agent(Verb::CreateContainer(request), Purpose::Create(key)));
        if let Err(failure) = asked {
            self.creation_failed(key, failure, true);
        }
    }

    fn create_request(&self, key: u64) -> Result<CreateContainer, Failure> {
        let gone = || Failure::wrong_state("the container is gone");
        let container = self.containers.get(&key).ok_or_else(gone)?;
        let Maker::Guest(guest) = &container.maker else { return Err(gone()) };
        if !container.deletes.is_empty() {
            return Err(deleted(&container.id));
        }
        let file = std::path::Path::new(&container.bundle).join("config.json");
        let spec = std::fs::read(&file)
            .map_err(|error| Failure::system(format!("read {}", file.display()), error))?;
        Ok(CreateContainer {
            container_id: container.id.clone(),
            spec,
            seccomp: guest.wanted.seccomp.clone(),
            stdin: container.wanted.stdin,
            share_pid: guest.wanted.share_pid,
            target: guest.wanted.target.clone(),
            block_devices: guest.wanted.block_devices.clone(),
        })
    }

    pub(super) fn created_in_guest(&mut self, key: u64, outcome: Outcome) {
        let started = outcome.and_then(|result| match result {
            reply::Result::Started(_) => Ok(()),
            _ => Err(confused()),
        });
        let Some(container) = self.containers.get(&key) else { return };
        let id = container.id.clone();
        match started {
            Err(failure) => self.creation_failed(key, failure, true),
            Ok(()) if !container.deletes.is_empty() => self.creation_failed(key, deleted(&id), true),
            Ok(()) => self.open_streams(key, &id, container.wanted),
        }
    }

    /// Its streams are open: it is created.
    pub(super) fn container_connected(&mut self, key: u64) {
        let child = self.machine_child();
        let Some(container) = self.containers.get_mut(&key) else { return };
        let State::Creating { reply, .. } = container.state else { return };
        let child = match child {
            Ok(child) if container.deletes.is_empty() => child,
            Ok(_) => {
                let failure = deleted(&container.id);
                return self.creation_failed(key, failure, true);
            }
            Err(failure) => return self.creation_failed(key, failure, true),
        };
        let started = proto::Started { pid: child.pid.as_raw_pid(), start_time: child.start_time };
        container.state = State::Created { child, starting: false };
        let ended = match &mut container.maker {
            Maker::Guest(guest) => guest.ended.take(),
            Maker::Runtime(_) => None,
        };
        self.reply(reply, Ok(proto::reply::Result::Started(started)));
        match ended {
            Some(code) => self.container_ended(key, code),
            None => self.watch_output(key),
        }
    }

    /// The machine, which is the process that a container of the guest has on the host.
    pub(super) fn machine_child(&self) -> Result<Child, Failure> {
        let machine = self.running_machine()?;
        let relative = machine.process.as_ref().map(|process| &process.relative);
        let relative = relative.ok_or_else(|| Failure::vm("the machine has no process", String::new()))?;
        Ok(Child::of_relative(relative))
    }

    /// Removes what there may be of a container that could not be created; `false`: there is nothing to wait for.
    pub(crate) fn clean_up_in_guest(&mut self, key: u64) -> bool {
        self.hang_up(|goal| goal.is_of(key));
        let Some(container) = self.containers.get(&key) else { return false };
        let container_id = container.id.clone();
        self.ask_agent(Verb::DeleteContainer(DeleteContainer { container_id }), Purpose::CleanUp(key)).is_ok()
    }

    pub(super) fn cleaned_up_in_guest(&mut self, key: u64, outcome: Result<(), Failure>) {
        self.note_failure("clean up after a failed create", outcome);
        let Some(container) = self.containers.get(&key) else { return };
        let container_id = container.id.clone();
        let asked = self.ask_agent(Verb::RemoveRoot(RemoveRoot { container_id }), Purpose::CleanUpRoot(key));
        if asked.is_err() {
            self.creation_undone(key);
        }
    }

    pub(super) fn root_cleaned_up(&mut self, key: u64, outcome: Result<(), Failure>) {
        self.note_failure("clean up after a failed create", outcome);
        if !self.unplug_devices(key, Then::Undone) {
            self.creation_undone(key);
        }
    }

    fn note_failure(&self, what: &str, outcome: Result<(), Failure>) {
        if let Err(failure) = outcome {
            self.journal.note(what, &failure.detail, &failure.runtime_log);
        }
    }

    pub(crate) fn start_in_guest(&mut self, key: u64, to: ReplyTo) -> Result<(), Failure> {
        let container_id = self.container_name(key);
        self.ask_agent(Verb::StartContainer(StartContainer { container_id }), Purpose::Start(key, to))
    }

    fn container_name(&self, key: u64) -> String {
        self.containers.get(&key).map(|container| container.id.clone()).unwrap_or_default()
    }

    pub(crate) fn signal_in_guest(
        &mut self,
        key: u64,
        signal: Signal,
        all: bool,
        to: Option<ReplyTo>,
    ) -> Answered {
        let kill = KillContainer { container_id: self.container_name(key), signal: signal.as_raw(), all };
        match self.ask_agent(Verb::KillContainer(kill), Purpose::Kill(key, to)) {
            Ok(()) => Ok(Answer::Later),
            // It ends with the machine.
            Err(_) if !self.machine_is_running() => Ok(Answer::DONE),
            Err(failure) => Err(failure),
        }
    }

    pub(crate) fn update_in_guest(&mut self, to: ReplyTo, key: u64, resources: Vec<u8>) -> Answered {
        let update = UpdateContainer { container_id: self.container_name(key), resources };
        self.ask_agent(Verb::UpdateContainer(update), Purpose::Update(to)).map(|()| Answer::Later)
    }

    /// Lets the agent delete a container that has ended, when none of its execs is still to be told of: the agent forgets them with it.
    pub(crate) fn remove_from_guest(&mut self, key: u64) {
        let running = self.machine_is_running();
        if running && self.execs.values().any(|exec| exec.container == key && exec.has_not_ended()) {
            return;
        }
        let Some(container) = self.containers.get_mut(&key) else { return };
        container.removal = Removal::Running { force: true };
        let container_id = container.id.clone();
        let delete = Verb::DeleteContainer(DeleteContainer { container_id });
        // With the machine it has gone.
        if self.ask_agent(delete, Purpose::Delete(key)).is_err() {
            self.removal_ended(key, Ok(()));
        }
    }

    pub(super) fn deleted_in_guest(&mut self, key: u64, outcome: Result<(), Failure>) {
        if !self.machine_is_running() {
            return self.removal_ended(key, Ok(()));
        }
        if outcome.is_err() {
            return self.removal_ended(key, outcome);
        }
        let container_id = self.container_name(key);
        if self.ask_agent(Verb::RemoveRoot(RemoveRoot { container_id }), Purpose::RemoveRoot(key)).is_err() {
            self.removal_ended(key, Ok(()));
        }
    }

    pub(super) fn root_removed(&mut self, key: u64, outcome: Result<(), Failure>) {
        let running = self.machine_is_running();
        if outcome.is_err() && running {
            return self.removal_ended(key, outcome);
        }
        if !self.unplug_devices(key, Then::Removed) {
            self.removal_ended(key, Ok(()));
        }
    }

    /// The guest's kernel killed a process for want of memory. What is told too often is counted alone.
    pub(super) fn out_of_memory_in_guest(&mut self, id: &str) {
        let Some(container) = self.find_container(id).and_then(|key| self.containers.get_mut(&key)) else {
            return;
        };
        if !(matches!(container.maker, Maker::Guest(_)) && container.is_alive()) {
            return;
        }
        container.oom_kills += 1;
        let container_id = container.id.clone();
        if self.machine.as_mut().is_some_and(|machine| machine.agent.news.oom_budget.take()) {
            self.broadcast(event::Kind::Oom(proto::OomKill { container_id }));
        }
    }
}

pub(super) fn deleted(id: &str) -> Failure {
    Failure::wrong_state(format!("container {id} was deleted while it was being created"))
}
