//! What containers have of the machine: block volumes, and images that root file systems are made of. Plugged before a container is made that has them,
//! unplugged when the last that had them is gone.
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

use podvisor_proto::agent::{ReleaseDisk, ReleaseImage, request::Verb as AgentVerb};
use podvisor_proto::hypervisor::{
    AddDisk, AddImage, Disk, Error, Image, RemoveDisk, RemoveImage, request::Verb,
};

use super::agent::Purpose;
use super::bounds::line;
use super::hypervisor::{Ask, refusal};
use crate::container::{Maker, State};
use crate::failure::Failure;
use crate::monitor::Monitor;

/// Devices of the machine that containers have, by a number for each.
#[derive(Debug, Default)]
pub(super) struct Devices(BTreeMap<u64, Plugged>);

/// One that a container wants.
#[derive(Debug, Clone)]
enum Device {
    Disk(Disk),
    Image(Image),
}

impl Device {
    /// What the hypervisor and the guest know it by, each kind for itself.
    fn is(&self, other: &Self) -> bool {
        match (self, other) {
            (Self::Disk(one), Self::Disk(other)) => one.serial == other.serial,
            (Self::Image(one), Self::Image(other)) => one.serial == other.serial,
            _ => false,
        }
    }

    fn add(&self) -> Verb {
        match self.clone() {
            Self::Disk(disk) => Verb::AddDisk(AddDisk { disk: Some(disk) }),
            Self::Image(image) => Verb::AddImage(AddImage { image: Some(image) }),
        }
    }

    fn remove(&self) -> Verb {
        match self.clone() {
            Self::Disk(Disk { serial, .. }) => Verb::RemoveDisk(RemoveDisk { serial }),
            Self::Image(Image { serial, .. }) => Verb::RemoveImage(RemoveImage { serial }),
        }
    }

    fn release(&self) -> AgentVerb {
        match self.clone() {
            Self::Disk(Disk { serial, .. }) => AgentVerb::ReleaseDisk(ReleaseDisk { serial }),
            Self::Image(Image { serial, disk: true, .. }) => AgentVerb::ReleaseDisk(ReleaseDisk { serial }),
            Self::Image(Image { serial, .. }) => AgentVerb::ReleaseImage(ReleaseImage { serial }),
        }
    }

    fn name(&self) -> &'static str {
        match self {
            Self::Disk(_) => "block volume",
            Self::Image(_) => "image",
        }
    }
}

#[derive(Debug)]
struct Plugged {
    device: Device,
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

/// What follows when a container's devices are unplugged.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Then {
    /// The container is removed.
    Removed,
    /// Its creation is undone.
    Undone,
}

impl Devices {
    fn find(&mut self, device: &Device) -> Option<(u64, &mut Plugged)> {
        let found = self.0.iter_mut().find(|(_, plugged)| plugged.device.is(device));
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
    pub(super) fn plug_devices(&mut self, container: u64) {
        let Some(Maker::Guest(guest)) = self.containers.get(&container).map(|container| &container.maker)
        else {
            return;
        };
        let disks = guest.wanted.disks.iter().cloned().map(Device::Disk);
        let wanted: Vec<Device> = disks.chain(guest.wanted.image.clone().map(Device::Image)).collect();
        for device in wanted {
            let new = self.new_key();
            let Self { machine: Some(machine), poller, .. } = self else { return };
            let (number, verb) = if let Some((number, plugged)) = machine.devices.find(&device) {
                let forsaken = plugged.stage == Stage::There && plugged.users.is_empty();
                plugged.users.insert(container);
                if !forsaken {
                    continue;
                }
                (number, None)
            } else {
                let users = BTreeSet::from([container]);
                let add = device.add();
                let plugged = Plugged { device, stage: Stage::Coming, users, leaving: Vec::new() };
                machine.devices.0.insert(new, plugged);
                (new, Some(add))
            };
            match verb {
                Some(add) => machine.hypervisor.ask(add, Ask::Plug(number), poller),
                None => self.unplug(number),
            }
        }
        self.go_on_if_plugged(container);
    }

    fn go_on_if_plugged(&mut self, container: u64) {
        let state = self.containers.get(&container).map(|container| &container.state);
        let creating = matches!(state, Some(State::Creating { .. }));
        if creating && self.machine.as_ref().is_some_and(|machine| machine.devices.has_all(container)) {
            self.add_root(container);
        }
    }

    /// The hypervisor has plugged a device, or could not.
    pub(super) fn device_plugged(&mut self, number: u64, outcome: Result<(), Error>) {
        let Self { machine: Some(machine), .. } = self else { return };
        let Some(plugged) = machine.devices.0.get_mut(&number) else { return };
        let users = plugged.users.clone();
        match outcome {
            Ok(()) if users.is_empty() => self.unplug(number),
            Ok(()) => {
                plugged.stage = Stage::There;
                for container in users {
                    self.go_on_if_plugged(container);
                }
            }
            Err(error) => {
                let leaving = std::mem::take(&mut plugged.leaving);
                machine.devices.0.remove(&number);
                for container in users {
                    self.creation_failed(container, refusal(&error), true);
                }
                self.devices_left(leaving);
            }
        }
    }

    /// Gives up what a container has, and unplugs what nobody else has. `false`: there is nothing to wait for.
    pub(super) fn unplug_devices(&mut self, container: u64, then: Then) -> bool {
        let Self { machine: Some(machine), .. } = self else { return false };
        if !machine.is_running() {
            return false;
        }
        let mut waits = false;
        let mut forsaken = Vec::new();
        for (number, plugged) in &mut machine.devices.0 {
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

    /// Has a device taken out, and the guest let go of it.
    fn unplug(&mut self, number: u64) {
        let Self { machine: Some(machine), poller, .. } = self else { return };
        let Some(plugged) = machine.devices.0.get_mut(&number) else { return };
        plugged.stage = Stage::Going;
        let release = plugged.device.release();
        machine.hypervisor.ask(plugged.device.remove(), Ask::Unplug(number), poller);
        // An agent that does not know it is one of a machine whose bus does it.
        self.tell_agent(release, Purpose::ReleaseDevice);
    }

    /// The guest has let go of a device, or has not.
    pub(super) fn device_unplugged(&mut self, number: u64, outcome: Result<(), Error>) {
        let Self { machine: Some(machine), poller, .. } = self else { return };
        let Some(plugged) = machine.devices.0.get_mut(&number) else { return };
        let leaving = std::mem::take(&mut plugged.leaving);
        let users = plugged.users.clone();
        match outcome {
            Ok(()) if users.is_empty() => drop(machine.devices.0.remove(&number)),
            Ok(()) => {
                plugged.stage = Stage::Coming;
                machine.hypervisor.ask(plugged.device.add(), Ask::Plug(number), poller);
            }
            Err(error) => {
                plugged.stage = Stage::There;
                plugged.users.clear();
                let (detail, name) = (line(&error.detail, 512), plugged.device.name());
                self.journal.note("a device stays plugged until the machine ends", "machine", &detail);
                for container in users {
                    let failure = Failure::vm(
                        format!("the guest does not let go of the {name} that it had before"),
                        detail.clone(),
                    );
                    self.creation_failed(container, failure, true);
                }
            }
        }
        self.devices_left(leaving);
    }

    /// Goes on with containers whose devices are all gone.
    fn devices_left(&mut self, leaving: Vec<(u64, Then)>) {
        for (container, then) in leaving {
            let waits = self.machine.as_ref().is_some_and(|machine| {
                machine.devices.0.values().any(|it| it.leaving.contains(&(container, then)))
            });
            if !waits {
                self.devices_released(container, then);
            }
        }
    }

    fn devices_released(&mut self, container: u64, then: Then) {
        match then {
            Then::Removed => self.removal_ended(container, Ok(())),
            Then::Undone => self.creation_undone(container),
        }
    }

    /// With the machine all of them go.
    pub(super) fn devices_gone(&mut self) {
        let Some(machine) = &mut self.machine else { return };
        let devices = std::mem::take(&mut machine.devices);
        let leaving: BTreeMap<u64, Then> =
            devices.0.into_values().flat_map(|plugged| plugged.leaving).collect();
        for (container, then) in leaving {
            self.devices_released(container, then);
        }
    }
}
