//! Block volumes of containers: plugged before a container is made that has them, unplugged when the last that had them is gone.
//!
//! ```text
//!            refused
//!   gone ◀───────────── Coming ──────▶ There ──nobody has it──▶ Going ──▶ gone, or Coming where somebody wants it meanwhile
//!                                        ▲                        │ the guest does not let go
//!                                        └────────────────────────┘
//! ```
//!
//! One that the guest does not let go of goes with the machine. Who wants it until then waits until it is gone, so as to get the device
//! that it is on the host by then.

use std::collections::{BTreeMap, BTreeSet};

use podvisor_proto::agent::{ReleaseDisk, request::Verb as AgentVerb};
use podvisor_proto::hypervisor::{AddDisk, Disk, Error, RemoveDisk, request::Verb};

use super::agent::Purpose;
use super::bounds::line;
use super::hypervisor::{Ask, refusal};
use crate::container::{Maker, State};
use crate::failure::Failure;
use crate::monitor::Monitor;

/// Disks of the machine that containers have, by a number for each.
#[derive(Debug, Default)]
pub(super) struct Disks(BTreeMap<u64, Plugged>);

#[derive(Debug)]
struct Plugged {
    disk: Disk,
    stage: Stage,
    /// Containers that have it, or wait for it.
    users: BTreeSet<u64>,
    /// Containers that are gone when it is.
    leaving: Vec<(u64, Then)>,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Stage {
    Coming,
    There,
    Going,
}

/// What follows when a container's disks are unplugged.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Then {
    /// The container is removed.
    Removed,
    /// Its creation is undone.
    Undone,
}

impl Disks {
    fn find(&mut self, serial: &str) -> Option<(u64, &mut Plugged)> {
        let found = self.0.iter_mut().find(|(_, plugged)| plugged.disk.serial == serial);
        found.map(|(number, plugged)| (*number, plugged))
    }

    /// Whether everything that a container wants is there.
    fn has_all(&self, container: u64) -> bool {
        let mut wanted = self.0.values().filter(|plugged| plugged.users.contains(&container));
        wanted.all(|plugged| plugged.stage == Stage::There)
    }
}

impl Monitor {
    /// Plugs what a container wants; goes on with its creation when all is there.
    pub(super) fn plug_disks(&mut self, container: u64) {
        let wanted = match self.containers.get(&container).map(|container| &container.maker) {
            Some(Maker::Guest(guest)) => guest.wanted.disks.clone(),
            _ => return,
        };
        for disk in wanted {
            let new = self.new_key();
            let Self { machine: Some(machine), poller, .. } = self else { return };
            let (number, verb) = if let Some((number, plugged)) = machine.disks.find(&disk.serial) {
                let forsaken = plugged.stage == Stage::There && plugged.users.is_empty();
                plugged.users.insert(container);
                if !forsaken {
                    continue;
                }
                (number, None)
            } else {
                let users = BTreeSet::from([container]);
                let plugged =
                    Plugged { disk: disk.clone(), stage: Stage::Coming, users, leaving: Vec::new() };
                machine.disks.0.insert(new, plugged);
                (new, Some(add(disk)))
            };
            match verb {
                Some(add) => machine.hypervisor.ask(add, Ask::Plug(number), poller),
                None => self.unplug(number),
            }
        }
        self.create_if_plugged(container);
    }

    fn create_if_plugged(&mut self, container: u64) {
        let state = self.containers.get(&container).map(|container| &container.state);
        let creating = matches!(state, Some(State::Creating { .. }));
        if !creating || !self.machine.as_ref().is_some_and(|machine| machine.disks.has_all(container)) {
            return;
        }
        let asked = self.create_request(container).and_then(|request| {
            self.ask_agent(AgentVerb::CreateContainer(request), Purpose::Create(container))
        });
        if let Err(failure) = asked {
            self.creation_failed(container, failure, true);
        }
    }

    /// The hypervisor has plugged a disk, or could not.
    pub(super) fn disk_plugged(&mut self, number: u64, outcome: Result<(), Error>) {
        let Self { machine: Some(machine), .. } = self else { return };
        let Some(plugged) = machine.disks.0.get_mut(&number) else { return };
        let users = plugged.users.clone();
        match outcome {
            Ok(()) if users.is_empty() => self.unplug(number),
            Ok(()) => {
                plugged.stage = Stage::There;
                for container in users {
                    self.create_if_plugged(container);
                }
            }
            Err(error) => {
                let leaving = std::mem::take(&mut plugged.leaving);
                machine.disks.0.remove(&number);
                for container in users {
                    self.creation_failed(container, refusal(&error), true);
                }
                self.disks_left(leaving);
            }
        }
    }

    /// Gives up what a container has, and unplugs what nobody else has. `false`: there is nothing to wait for.
    pub(super) fn unplug_disks(&mut self, container: u64, then: Then) -> bool {
        let Self { machine: Some(machine), .. } = self else { return false };
        if !machine.is_running() {
            return false;
        }
        let mut waits = false;
        let mut forsaken = Vec::new();
        for (number, plugged) in &mut machine.disks.0 {
            if !plugged.users.remove(&container) || !plugged.users.is_empty() {
                continue;
            }
            waits = true;
            plugged.leaving.push((container, then));
            if plugged.stage == Stage::There {
                forsaken.push(*number);
            }
        }
        for number in forsaken {
            self.unplug(number);
        }
        waits
    }

    /// Has a disk taken out, and the guest let go of it.
    fn unplug(&mut self, number: u64) {
        let Self { machine: Some(machine), poller, .. } = self else { return };
        let Some(plugged) = machine.disks.0.get_mut(&number) else { return };
        plugged.stage = Stage::Going;
        let serial = plugged.disk.serial.clone();
        machine.hypervisor.ask(remove(&serial), Ask::Unplug(number), poller);
        // An agent that does not know it is one of a machine whose bus does it.
        self.tell_agent(AgentVerb::ReleaseDisk(ReleaseDisk { serial }), Purpose::ReleaseDisk);
    }

    /// The guest has let go of a disk, or has not.
    pub(super) fn disk_unplugged(&mut self, number: u64, outcome: Result<(), Error>) {
        let Self { machine: Some(machine), poller, .. } = self else { return };
        let Some(plugged) = machine.disks.0.get_mut(&number) else { return };
        let leaving = std::mem::take(&mut plugged.leaving);
        let users = plugged.users.clone();
        match outcome {
            Ok(()) if users.is_empty() => drop(machine.disks.0.remove(&number)),
            Ok(()) => {
                plugged.stage = Stage::Coming;
                machine.hypervisor.ask(add(plugged.disk.clone()), Ask::Plug(number), poller);
            }
            Err(error) => {
                plugged.stage = Stage::There;
                plugged.users.clear();
                let detail = line(&error.detail, 512);
                self.journal.note("a disk stays plugged until the machine ends", "machine", &detail);
                for container in users {
                    let failure = Failure::vm(
                        "the guest does not let go of the block volume that it had before".to_owned(),
                        detail.clone(),
                    );
                    self.creation_failed(container, failure, true);
                }
            }
        }
        self.disks_left(leaving);
    }

    /// Goes on with containers whose disks are all gone.
    fn disks_left(&mut self, leaving: Vec<(u64, Then)>) {
        for (container, then) in leaving {
            let waits = self.machine.as_ref().is_some_and(|machine| {
                machine.disks.0.values().any(|it| it.leaving.contains(&(container, then)))
            });
            if !waits {
                self.disks_released(container, then);
            }
        }
    }

    fn disks_released(&mut self, container: u64, then: Then) {
        match then {
            Then::Removed => self.removal_ended(container, Ok(())),
            Then::Undone => self.creation_undone(container),
        }
    }

    /// With the machine all of them go.
    pub(super) fn disks_gone(&mut self) {
        let Some(machine) = &mut self.machine else { return };
        let disks = std::mem::take(&mut machine.disks);
        let leaving: BTreeMap<u64, Then> =
            disks.0.into_values().flat_map(|plugged| plugged.leaving).collect();
        for (container, then) in leaving {
            self.disks_released(container, then);
        }
    }
}

fn add(disk: Disk) -> Verb {
    Verb::AddDisk(AddDisk { disk: Some(disk) })
}

fn remove(serial: &str) -> Verb {
    Verb::RemoveDisk(RemoveDisk { serial: serial.to_owned() })
}
