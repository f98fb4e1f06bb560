//! Volumes in the guest's memory: there before a container that names them is made. What kubelet changes on the host is followed for as
//! long as a container uses it (`follow.rs` reads it, here it goes to the agent).

use std::collections::{BTreeMap, BTreeSet, VecDeque};

use podvisor_proto::agent::{AddVolume, Attributes, RemoveVolume, request::Verb};
use podvisor_proto::monitor::guest_volume::Kind;
use podvisor_proto::monitor::{FOLLOWED_BYTES, FOLLOWED_BYTES_OF_A_POD, FOLLOWED_FILES, FollowedVolume};

use super::agent::Purpose;
use crate::container::{Maker, State};
use crate::failure::Failure;
use crate::follow::{Follower, News};
use crate::monitor::Monitor;
use crate::poll::{Interest, Token, Watch};
use crate::version::Version;

/// Those that are followed.
#[derive(Debug, Default)]
pub(super) struct Volumes {
    follower: Option<(Follower, Watch)>,
    /// By the number that requests about them carry.
    followed: BTreeMap<u64, Followed>,
}

#[derive(Debug)]
struct Followed {
    name: String,
    /// Containers that name it; those among them that are not made before it is there.
    users: BTreeSet<u64>,
    waiting: Vec<u64>,
    there: bool,
    /// Of the version that is there, or on its way.
    bytes: u64,
    /// It does not fit beside the others, which has been said.
    too_much: bool,
    /// What is still to be asked for a version to be there. The first has been asked.
    requests: VecDeque<Verb>,
}

impl Monitor {
    /// Sees to the next volume of a container that is being made; when there is none left, to the container.
    pub(super) fn next_volume(&mut self, key: u64) {
        let Some(container) = self.containers.get(&key) else { return };
        let Maker::Guest(guest) = &container.maker else { return };
        if !matches!(container.state, State::Creating { .. }) {
            return;
        }
        let volume = guest.wanted.volumes.get(guest.volumes).cloned();
        let called_off = !container.deletes.is_empty();
        let asked = match volume {
            Some(_) if called_off => Err(super::container::deleted(&container.id)),
            Some(volume) => match volume.kind {
                Some(Kind::Memory(wanted)) => {
                    self.ask_agent(Verb::AddVolume(wanted), Purpose::AddVolume(key))
                }
                Some(Kind::Followed(wanted)) => self.follow(key, &wanted),
                None => Err(Failure::invalid("a volume is of a kind that this monitor does not know")),
            },
            None => return self.create_with_volumes(key),
        };
        if let Err(failure) = asked {
            self.creation_failed(key, failure, true);
        }
    }

    pub(super) fn volume_added(&mut self, key: u64, outcome: Result<(), Failure>) {
        match outcome {
            Ok(()) => {
                if let Some(container) = self.containers.get_mut(&key)
                    && let Maker::Guest(guest) = &mut container.maker
                {
                    guest.volumes += 1;
                }
                self.next_volume(key);
            }
            Err(failure) => self.creation_failed(key, failure, true),
        }
    }

    fn follow(&mut self, key: u64, wanted: &FollowedVolume) -> Result<(), Failure> {
        let volume = self.new_key();
        let Self { machine: Some(machine), poller, .. } = self else {
            return Err(Failure::wrong_state("this pod is no virtual machine"));
        };
        let known = machine.volumes.followed.values_mut().find(|followed| followed.name == wanted.name);
        if let Some(followed) = known {
            followed.users.insert(key);
            if followed.there {
                self.volume_added(key, Ok(()));
            } else {
                followed.waiting.push(key);
            }
            return Ok(());
        }
        if machine.volumes.follower.is_none() {
            let started = Follower::start().and_then(|follower| {
                let mut watch = Watch::new(Token::Volumes);
                watch.set(poller, follower.waker(), Some(Interest::READ))?;
                Ok((follower, watch))
            });
            let failed = |error| Failure::system("follow a volume", error);
            machine.volumes.follower = Some(started.map_err(failed)?);
        }
        let followed = Followed {
            name: wanted.name.clone(),
            users: BTreeSet::from([key]),
            waiting: vec![key],
            there: false,
            bytes: 0,
            too_much: false,
            requests: VecDeque::new(),
        };
        machine.volumes.followed.insert(volume, followed);
        if let Some((follower, _)) = &machine.volumes.follower {
            follower.follow(volume, wanted);
        }
        Ok(())
    }

    /// The follower has something to tell.
    pub(crate) fn volumes_changed(&mut self) {
        if let Some((follower, _)) = self.follower() {
            follower.quiet();
        }
        while let Some(news) = self.follower().and_then(|(follower, _)| follower.next()) {
            match news {
                News::Version { key, root, version } => self.new_version(key, root, *version),
                News::Trouble { key, why } => {
                    let Some(followed) = self.followed(key) else { continue };
                    let (name, waiting) = (followed.name.clone(), std::mem::take(&mut followed.waiting));
                    self.journal.note("a volume is not followed", &name, &why);
                    let failure = Failure::system("copy a volume into the guest", why);
                    for container in waiting {
                        self.volume_added(container, Err(failure.clone()));
                    }
                }
            }
        }
    }

    fn follower(&self) -> Option<&(Follower, Watch)> {
        self.machine.as_ref()?.volumes.follower.as_ref()
    }

    fn followed(&mut self, volume: u64) -> Option<&mut Followed> {
        self.machine.as_mut()?.volumes.followed.get_mut(&volume)
    }

    fn new_version(&mut self, volume: u64, root: Attributes, version: Version) {
        let Some(machine) = &mut self.machine else { return };
        let all = &mut machine.volumes.followed;
        let others: u64 = all.iter().filter(|(key, _)| **key != volume).map(|(_, other)| other.bytes).sum();
        // Whoever used it may have gone meanwhile.
        let Some(followed) = all.get_mut(&volume) else { return };
        if others + version.bytes > FOLLOWED_BYTES_OF_A_POD {
            return self.too_much(volume, others, version.bytes);
        }
        (followed.bytes, followed.too_much) = (version.bytes, false);
        let parts = version.parts(&followed.name).into_iter().map(Verb::WriteVersion);
        followed.requests = parts.collect();
        if !followed.there {
            let add = AddVolume {
                name: followed.name.clone(),
                // Two versions are there while they are exchanged.
                size: 2 * FOLLOWED_BYTES + (1 << 20),
                files: 4 * u64::try_from(FOLLOWED_FILES).unwrap_or(u64::MAX),
                attributes: Some(root),
                ..AddVolume::default()
            };
            followed.requests.push_front(Verb::AddVolume(add));
        }
        self.next_request(volume);
    }

    /// There is no room for a version beside the pod's other volumes. What is there stays; it is tried again, as one of them may go.
    fn too_much(&mut self, volume: u64, others: u64, bytes: u64) {
        let why = format!(
            "it has {bytes} bytes, and the configMaps, secrets, projected and downward volumes of the pod have {others} already: a pod in a virtual \
             machine can have {FOLLOWED_BYTES_OF_A_POD} bytes of them. Mount fewer, or what is large from another volume"
        );
        let Some(followed) = self.followed(volume) else { return };
        let said = std::mem::replace(&mut followed.too_much, true);
        let (name, waiting) = (followed.name.clone(), std::mem::take(&mut followed.waiting));
        if !said {
            self.journal.note("a volume's version was not written", &name, &why);
        }
        if let Some((follower, _)) = self.follower() {
            follower.written(volume, false);
        }
        let failure = Failure::system("copy a volume into the guest", why);
        for container in waiting {
            self.volume_added(container, Err(failure.clone()));
        }
    }

    fn next_request(&mut self, volume: u64) {
        let Some(followed) = self.followed(volume) else { return };
        let Some(verb) = followed.requests.pop_front() else { return self.version_written(volume, Ok(())) };
        if let Err(failure) = self.ask_agent(verb, Purpose::Version(volume)) {
            self.version_written(volume, Err(failure));
        }
    }

    /// The agent has done a part of it.
    pub(super) fn version_answered(&mut self, volume: u64, outcome: Result<(), Failure>) {
        match outcome {
            Ok(()) => self.next_request(volume),
            Err(failure) => self.version_written(volume, Err(failure)),
        }
    }

    fn version_written(&mut self, volume: u64, outcome: Result<(), Failure>) {
        let Some(followed) = self.followed(volume) else { return };
        followed.requests.clear();
        followed.there |= outcome.is_ok();
        let (name, waiting) = (followed.name.clone(), std::mem::take(&mut followed.waiting));
        if let Some((follower, _)) = self.follower() {
            follower.written(volume, outcome.is_ok());
        }
        if let Err(failure) = &outcome {
            self.journal.note("a volume's version was not written", &name, &failure.detail);
        }
        for container in waiting {
            self.volume_added(container, outcome.clone());
        }
    }

    /// A container has gone: what only it used is not followed any more.
    pub(crate) fn leave_volumes(&mut self, container: u64) {
        let Some(machine) = &mut self.machine else { return };
        let Volumes { follower, followed } = &mut machine.volumes;
        let mut left = Vec::new();
        followed.retain(|key, volume| {
            volume.waiting.retain(|waiting| *waiting != container);
            if !(volume.users.remove(&container) && volume.users.is_empty()) {
                return true;
            }
            if let Some((follower, _)) = follower {
                follower.leave(*key);
            }
            left.push(std::mem::take(&mut volume.name));
            false
        });
        for name in left {
            self.tell_agent(Verb::RemoveVolume(RemoveVolume { name }), Purpose::RemoveVolume);
        }
    }
}
