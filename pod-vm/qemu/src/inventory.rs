//! What a machine has, and what a request to change it comes to.

use podvisor_hypervisor::failure::Failure;
use podvisor_hypervisor::request::{MEMORY_STEP, check_disk, check_image, check_network, check_share};
use podvisor_hypervisor::{files, tap};
use podvisor_proto::hypervisor::{Disk, Image, Network, Share, request::Verb};
use serde_json::{Value, json};

use crate::changes::{Change, Outcome, Step};
use crate::command_line::slots;
use crate::device::{self, Added, Kind, descriptor_set};
use crate::joined;
use crate::plan::{self, Plan};

/// Devices, memory and processors of a machine.
#[derive(Debug)]
pub(crate) struct Inventory {
    plan: Plan,
    devices: Vec<Added>,
    /// How many shares, disks and networks there have been.
    counts: [usize; 3],
    memory: u64,
}

impl Inventory {
    pub(crate) fn new(plan: &Plan) -> Self {
        let start = &plan.start;
        let shares = start.shares.iter().map(|share| (Kind::Share, &share.tag));
        let disks = start.disks.iter().map(|disk| (Kind::Disk, &disk.serial));
        let networks = start.networks.iter().map(|network| (Kind::Network, &network.hardware_address));
        let mut inventory =
            Self { plan: plan.clone(), devices: Vec::new(), counts: [0; 3], memory: start.memory };
        // In the order of the command line, which gives each the next slot.
        for (slot, (kind, name)) in shares.chain(disks).chain(networks).enumerate() {
            let number = inventory.number(kind);
            inventory.devices.push(Added { kind, name: name.clone(), number, slot, joined: None });
        }
        inventory
    }

    /// What is to be done for a request.
    pub(crate) fn change(&mut self, verb: Verb) -> Result<Change, Failure> {
        match verb {
            Verb::AddShare(add) => self.add_share(&add.share.unwrap_or_default()),
            Verb::AddDisk(add) => self.add_disk(&add.disk.unwrap_or_default()),
            Verb::AddNetwork(add) => self.add_network(&add.network.unwrap_or_default()),
            Verb::RemoveShare(remove) => self.remove(Kind::Share, &remove.tag),
            Verb::RemoveDisk(remove) => self.remove(Kind::Disk, &remove.serial),
            Verb::RemoveNetwork(remove) => self.remove(Kind::Network, &remove.hardware_address),
            Verb::SetMemory(set) => self.set_memory(set.bytes),
            Verb::SetCpus(set) => self.set_processors(set.count),
            Verb::AddImage(add) => self.add_image(&add.image.unwrap_or_default()),
            Verb::RemoveImage(remove) => self.remove(Kind::Disk, &remove.serial),
            Verb::Start(_) | Verb::Stop(_) | Verb::Check(_) => {
                Err(Failure::invalid("that is no change of a machine"))
            }
        }
    }

    /// A change was made.
    pub(crate) fn note(&mut self, outcome: Outcome) {
        match outcome {
            Outcome::Nothing => {}
            Outcome::Added(device) => self.devices.push(device),
            Outcome::Removed(id) => self.devices.retain(|device| device.kind.id(device.number) != id),
            Outcome::Memory { from_start, added } => self.memory = from_start + added,
        }
    }

    /// A number that no device of the kind has had.
    fn number(&mut self, kind: Kind) -> usize {
        let count = &mut self.counts[kind as usize];
        *count += 1;
        *count - 1
    }

    /// Where one more device can go. Names and numbers of those that are there are checked first.
    fn place(&mut self, kind: Kind, name: &str) -> Result<Added, Failure> {
        if self.plan.kind != plan::Kind::Q35 {
            return Err(Failure::unsupported("nothing can be plugged into a microvm"));
        }
        if self.devices.iter().any(|device| device.kind == kind && device.name == name) {
            return Err(Failure::invalid(format!("there is a device {name} already")));
        }
        let slots = slots(&self.plan);
        let slot = (0..slots).find(|slot| self.devices.iter().all(|device| device.slot != *slot));
        let slot = slot.ok_or_else(|| {
            Failure::unsupported(format!("all {slots} slots of this machine have a device in them"))
        })?;
        Ok(Added { kind, name: name.to_owned(), number: self.number(kind), slot, joined: None })
    }

    fn add_share(&mut self, share: &Share) -> Result<Change, Failure> {
        check_share(share)?;
        let added = self.place(Kind::Share, &share.tag)?;
        let socket = files::connect_share(share)?;
        let backend = added.backend();
        let address = json!({ "type": "fd", "data": { "str": backend } });
        let socket_backend = json!({ "type": "socket", "data": { "addr": address, "server": false } });
        let steps = vec![
            Step::new("getfd", json!({ "fdname": backend }))
                .with_descriptor(socket)
                .with_undo("closefd", json!({ "fdname": backend })),
            Step::new("chardev-add", json!({ "id": backend, "backend": socket_backend }))
                .with_undo("chardev-remove", json!({ "id": backend })),
            Step::new("device_add", device::share(added.number, share, added.place())),
        ];
        Ok(Self::adding("plug share", added, steps))
    }

    fn add_disk(&mut self, disk: &Disk) -> Result<Change, Failure> {
        check_disk(disk)?;
        let added = self.place(Kind::Disk, &disk.serial)?;
        let (file, described) = files::open_disk(disk)?;
        let set = json!({ "fdset-id": descriptor_set(added.number) });
        let steps = vec![
            Step::new("add-fd", set.clone()).with_descriptor(file).with_undo("remove-fd", set),
            Step::new("blockdev-add", device::block_node(added.number, disk, described.block_device))
                .with_undo("blockdev-del", json!({ "node-name": added.backend() })),
            Step::new("device_add", device::disk(added.number, disk, described.block_device, added.place())),
        ];
        Ok(Self::adding("plug disk", added, steps))
    }

    fn add_image(&mut self, image: &Image) -> Result<Change, Failure> {
        check_image(image)?;
        if !image.disk {
            return Err(Failure::unsupported(
                "QEMU maps no images into a guest's memory: use shares or disks",
            ));
        }
        let added = self.place(Kind::Disk, &image.serial)?;
        let added = Added { joined: Some(image.paths.len()), ..added };
        let failed = |error| Failure::failed(format!("use image {}", image.serial), error);
        let mut opened = Vec::new();
        let mut lengths = Vec::new();
        for path in &image.paths {
            let file = files::open_for_reading("image", path, 0)?;
            lengths.push(file.metadata().map_err(failed)?.len());
            opened.push(file);
        }
        let description = joined::description(added.number, &lengths).map_err(failed)?;
        let sets = joined::sets(added.number, opened.len());
        let mut steps: Vec<Step> = std::iter::once(description)
            .chain(opened)
            .zip(sets)
            .map(|(file, set)| {
                let set = json!({ "fdset-id": set });
                Step::new("add-fd", set.clone()).with_descriptor(file).with_undo("remove-fd", set)
            })
            .collect();
        steps.push(
            Step::new("blockdev-add", joined::block_node(added.number))
                .with_undo("blockdev-del", json!({ "node-name": added.backend() })),
        );
        let disk = Disk { serial: image.serial.clone(), path: String::new(), read_only: true };
        steps.push(Step::new("device_add", device::disk(added.number, &disk, false, added.place())));
        Ok(Self::adding("plug image", added, steps))
    }

    fn add_network(&mut self, network: &Network) -> Result<Change, Failure> {
        check_network(network)?;
        let added = self.place(Kind::Network, &network.hardware_address)?;
        let tap = tap::open(network)?;
        let backend = added.backend();
        let steps = vec![
            Step::new("getfd", json!({ "fdname": backend }))
                .with_descriptor(tap)
                .with_undo("closefd", json!({ "fdname": backend })),
            Step::new("netdev_add", json!({ "type": "tap", "id": backend, "fd": backend, "vhost": false }))
                .with_undo("netdev_del", json!({ "id": backend })),
            Step::new("device_add", device::network(added.number, network, added.place())),
        ];
        Ok(Self::adding("plug network", added, steps))
    }

    fn adding(what: &str, added: Added, steps: Vec<Step>) -> Change {
        let attempt = format!("{what} {}", added.name);
        Change { attempt, steps: steps.into(), outcome: Outcome::Added(added) }
    }

    fn remove(&self, kind: Kind, name: &str) -> Result<Change, Failure> {
        if self.plan.kind != plan::Kind::Q35 {
            return Err(Failure::unsupported("nothing can be unplugged from a microvm"));
        }
        let found = self.devices.iter().find(|device| device.kind == kind && device.name == name);
        let device = found.ok_or_else(|| Failure::not_found(format!("there is no device {name}")))?;
        let id = device.kind.id(device.number);
        let backend = device.backend();
        let mut steps = vec![Step::Release(id.clone())];
        match kind {
            Kind::Share => steps.push(Step::new("chardev-remove", json!({ "id": backend }))),
            Kind::Disk => {
                steps.push(Step::new("blockdev-del", json!({ "node-name": backend })));
                let sets = match device.joined {
                    Some(files) => joined::sets(device.number, files).collect(),
                    None => vec![descriptor_set(device.number)],
                };
                let remove = |set| Step::new("remove-fd", json!({ "fdset-id": set }));
                steps.extend(sets.into_iter().map(remove));
            }
            Kind::Network => steps.push(Step::new("netdev_del", json!({ "id": backend }))),
        }
        Ok(Change { attempt: format!("unplug {name}"), steps: steps.into(), outcome: Outcome::Removed(id) })
    }

    fn set_memory(&self, bytes: u64) -> Result<Change, Failure> {
        let start = &self.plan.start;
        let attempt = format!("change the memory to {bytes} bytes");
        if bytes == self.memory {
            return Ok(Change { attempt, steps: Vec::new().into(), outcome: Outcome::Nothing });
        }
        if start.memory_limit == start.memory {
            return Err(Failure::unsupported("this machine was started with memory that cannot change"));
        }
        if !bytes.is_multiple_of(MEMORY_STEP) || bytes < start.memory || bytes > start.memory_limit {
            return Err(Failure::invalid(format!(
                "memory must be a multiple of 2 MiB from {} to {} bytes",
                start.memory, start.memory_limit
            )));
        }
        let added = |bytes: u64| bytes - start.memory;
        let before = Self::memory_property(added(self.memory));
        let steps = vec![
            Self::request_memory(added(bytes)).with_undo("qom-set", before),
            Step::Memory { added: added(bytes), less: bytes < self.memory },
        ];
        let outcome = Outcome::Memory { from_start: start.memory, added: added(bytes) };
        Ok(Change { attempt, steps: steps.into(), outcome })
    }

    /// The guest is asked to have so much of the memory that can be added.
    pub(crate) fn request_memory(added: u64) -> Step {
        Step::new("qom-set", Self::memory_property(added))
    }

    fn memory_property(added: u64) -> Value {
        json!({ "path": "/machine/peripheral/grow", "property": "requested-size", "value": added })
    }

    /// All processors are there from the start, and which of them the guest uses is between it and its agent.
    fn set_processors(&self, count: u32) -> Result<Change, Failure> {
        let limit = self.plan.start.cpus_limit;
        if count == 0 || count > limit {
            return Err(Failure::invalid(format!("there must be 1 to {limit} processors")));
        }
        let attempt = format!("change the number of processors to {count}");
        Ok(Change { attempt, steps: Vec::new().into(), outcome: Outcome::Nothing })
    }
}

#[cfg(test)]
mod tests {
    use podvisor_proto::hypervisor::{AddDisk, ErrorCode, RemoveDisk, SetCpus, SetMemory, Start};

    use super::*;
    use crate::plan::Choice;
    use crate::plan::tests::start;

    fn inventory(start: Start) -> Inventory {
        Inventory::new(&Plan::new(start, Choice::ByNeed).unwrap())
    }

    fn growing() -> Start {
        Start { memory_limit: 512 << 20, cpus_limit: 4, ..start() }
    }

    fn code(inventory: &mut Inventory, verb: Verb) -> ErrorCode {
        inventory.change(verb).unwrap_err().code
    }

    fn memory(bytes: u64) -> Verb {
        Verb::SetMemory(SetMemory { bytes })
    }

    #[test]
    fn a_microvm_stays_as_it_is() {
        let mut inventory = inventory(start());
        let disk = Disk { serial: "one".into(), path: "/one".into(), read_only: true };
        let add = Verb::AddDisk(AddDisk { disk: Some(disk) });
        assert_eq!(code(&mut inventory, add), ErrorCode::Unsupported);
        assert_eq!(code(&mut inventory, memory(512 << 20)), ErrorCode::Unsupported);
        assert_eq!(code(&mut inventory, Verb::SetCpus(SetCpus { count: 2 })), ErrorCode::Invalid);
        assert!(inventory.change(memory(256 << 20)).unwrap().steps.is_empty());
        assert!(inventory.change(Verb::SetCpus(SetCpus { count: 1 })).unwrap().steps.is_empty());
    }

    #[test]
    fn sizes_stay_within_their_limits() {
        let mut inventory = inventory(growing());
        for bytes in [(256 << 20) - (2 << 20), (256 << 20) + 4096, (512 << 20) + (2 << 20)] {
            assert_eq!(code(&mut inventory, memory(bytes)), ErrorCode::Invalid);
        }
        for count in [0, 5] {
            assert_eq!(code(&mut inventory, Verb::SetCpus(SetCpus { count })), ErrorCode::Invalid);
        }
        assert!(inventory.change(Verb::SetCpus(SetCpus { count: 4 })).is_ok());
    }

    #[test]
    fn slots_and_names_are_used_once() {
        use crate::device::SLOTS;

        let mut inventory = inventory(growing());
        let file = tempfile::NamedTempFile::new().unwrap();
        let add = |serial: &str| {
            let path = file.path().to_str().unwrap().to_owned();
            Verb::AddDisk(AddDisk { disk: Some(Disk { serial: serial.into(), path, read_only: true }) })
        };
        for number in 0..SLOTS {
            let change = inventory.change(add(&number.to_string())).unwrap();
            inventory.note(change.outcome);
        }
        assert_eq!(code(&mut inventory, add("3")), ErrorCode::Invalid);
        assert_eq!(code(&mut inventory, add("one more")), ErrorCode::Invalid);
        assert_eq!(code(&mut inventory, add("another")), ErrorCode::Unsupported);
        let remove = |serial: &str| Verb::RemoveDisk(RemoveDisk { serial: serial.into() });
        assert_eq!(code(&mut inventory, remove("another")), ErrorCode::NotFound);
        let change = inventory.change(remove("3")).unwrap();
        inventory.note(change.outcome);
        let Outcome::Added(added) = inventory.change(add("another")).unwrap().outcome else { panic!() };
        // The slot of the removed one, and a number of its own.
        assert_eq!((added.slot, added.number), (3, SLOTS));
    }
}
