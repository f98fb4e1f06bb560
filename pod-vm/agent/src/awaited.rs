//! Requests about devices that have not appeared yet. The hypervisor may have plugged one in a moment ago; the request is tried again when
//! something appears, and every now and then, until its time is over.

use std::fs;
use std::time::{Duration, Instant};

use podvisor_proto::agent::{AddRoot, AddShare, CreateContainer, Done, reply};

use crate::agent::Agent;
use crate::disks::Numbers;
use crate::failure::Failure;
use crate::interface::{self, Interface};
use crate::verbs::Answered;

/// How long a device may take to appear: the hypervisor says that it is plugged in before the guest's kernel has seen it.
const PATIENCE: Duration = Duration::from_secs(20);
/// Between two looks when nothing is heard.
const INTERVAL: Duration = Duration::from_millis(100);

/// What is wanted of a device.
#[derive(Debug)]
pub(crate) enum Wanted {
    Interface(Interface),
    Share(AddShare),
    Root(AddRoot),
    Container(Box<CreateContainer>),
}

/// What came of one attempt.
enum Tried {
    /// The device is not there.
    Missing,
    Done,
    /// It is under way, and answered when it is done.
    Begun,
}

impl From<bool> for Tried {
    fn from(done: bool) -> Self {
        if done { Self::Done } else { Self::Missing }
    }
}

impl Wanted {
    fn device(&self) -> String {
        match self {
            Self::Interface(interface) => {
                let bytes = interface.hardware_address.map(|byte| format!("{byte:02x}"));
                format!("no interface with hardware address {}", bytes.join(":"))
            }
            Self::Share(share) => format!("no share with tag {:?}", share.tag),
            Self::Root(root) => {
                format!(
                    "a disk or an image of the root file system of {:?} is missing and has not",
                    root.container_id
                )
            }
            Self::Container(create) => {
                let serials: Vec<&str> =
                    create.block_devices.iter().map(|device| device.serial.as_str()).collect();
                format!("not every disk of {serials:?}")
            }
        }
    }
}

#[derive(Debug)]
struct Waiting {
    request: u64,
    deadline: Instant,
    wanted: Wanted,
}

/// The requests that wait.
#[derive(Debug, Default)]
pub(crate) struct Awaited {
    waiting: Vec<Waiting>,
    tried: Option<Instant>,
}

impl Awaited {
    /// How long to sleep at most.
    pub(crate) fn interval(&self) -> Option<Duration> {
        (!self.waiting.is_empty()).then_some(INTERVAL)
    }

    /// Whether to try again: there is news of devices, or some time has passed.
    pub(crate) fn are_due(&self, news: bool) -> bool {
        !self.waiting.is_empty() && (news || self.tried.is_none_or(|tried| tried.elapsed() >= INTERVAL))
    }
}

impl Agent {
    /// Does it now, or as soon as the device is there.
    pub(crate) fn attempt(&mut self, request: u64, wanted: Wanted) -> Answered {
        let mut tried = self.try_once(request, &wanted)?;
        if matches!(tried, Tried::Missing)
            && let Some(duties) = self.duties.as_mut().filter(|duties| !duties.modules.is_empty())
        {
            // Its driver may be one of those that wait.
            duties.load_all();
            tried = self.try_once(request, &wanted)?;
        }
        match tried {
            Tried::Done => return Ok(Some(reply::Result::Done(Done {}))),
            Tried::Begun => return Ok(None),
            Tried::Missing => {}
        }
        if self.duties.is_some() {
            // For hypervisors that do not announce what they plug in: PCI buses are looked through again. There need be none.
            let _ = fs::write("/sys/bus/pci/rescan", "1");
            self.places.look();
        }
        self.awaited.waiting.push(Waiting { request, deadline: Instant::now() + PATIENCE, wanted });
        Ok(None)
    }

    fn try_once(&mut self, request: u64, wanted: &Wanted) -> Result<Tried, Failure> {
        match wanted {
            Wanted::Interface(wanted) => {
                let interfaces = &self.pod.interfaces;
                let same = |other: &&Interface| other.hardware_address == wanted.hardware_address;
                if interfaces.iter().find(same).is_some() {
                    return Err(Failure::exists(format!(
                        "interface {:?} is configured already",
                        wanted.name
                    )));
                }
                let taken: Vec<String> = interfaces.iter().map(|other| other.name.clone()).collect();
                if let Some(namespaces) = &self.pod.namespaces {
                    interface::hand_over(wanted, namespaces.net())?;
                }
                let done = self.pod.inside(|| interface::add(wanted, &taken))??;
                if done {
                    self.pod.interfaces.push(wanted.clone());
                }
                Ok(done.into())
            }
            Wanted::Share(share) => self.pod.storage.add_share(share).map(Tried::from),
            Wanted::Root(root) => self.pod.storage.add_root(root).map(Tried::from),
            Wanted::Container(create) => match Numbers::of(&create.block_devices)? {
                Some(numbers) => self.create_container(request, create, numbers).map(|()| Tried::Begun),
                None => Ok(Tried::Missing),
            },
        }
    }

    /// Tries everything that waits again.
    pub(crate) fn retry(&mut self) {
        self.awaited.tried = Some(Instant::now());
        if self.duties.is_some() {
            self.places.look();
        }
        for Waiting { request, deadline, wanted } in std::mem::take(&mut self.awaited.waiting) {
            match self.try_once(request, &wanted) {
                Ok(Tried::Done) => self.answer(request, Ok(reply::Result::Done(Done {}))),
                Ok(Tried::Begun) => {}
                Ok(Tried::Missing) if Instant::now() < deadline => {
                    self.awaited.waiting.push(Waiting { request, deadline, wanted });
                }
                Ok(Tried::Missing) => {
                    let what = format!("{} appeared within {} s", wanted.device(), PATIENCE.as_secs());
                    self.answer(request, Err(Failure::timeout(what)));
                }
                Err(failure) => self.answer(request, Err(failure)),
            }
        }
    }

    pub(crate) fn remove_interface(&mut self, text: &str) -> Result<(), Failure> {
        let address = interface::hardware_address(text)?;
        let is_it = |interface: &Interface| interface.hardware_address == address;
        let waits =
            |waiting: &mut Waiting| matches!(&waiting.wanted, Wanted::Interface(wanted) if is_it(wanted));
        let given_up: Vec<Waiting> = self.awaited.waiting.extract_if(.., waits).collect();
        for Waiting { request, .. } in given_up {
            self.answer(request, Err(Failure::state("the interface was removed before it appeared")));
        }
        if let Some(at) = self.pod.interfaces.iter().position(is_it) {
            self.pod.inside(|| interface::remove(&self.pod.interfaces[at]))??;
            self.pod.interfaces.remove(at);
        }
        Ok(())
    }
}
