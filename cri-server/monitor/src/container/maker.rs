//! Who makes a container, starts, signals and removes it. Everything else (streams, log, records, attached clients) is the same for
//! both kinds of pod; each verb asks this once.

use podvisor_proto::monitor::{GuestContainer, Place};

use crate::runtime::Runtime;
use crate::stdio::TheirEnds;

/// Who makes a container.
#[derive(Debug)]
pub(crate) enum Maker {
    /// An OCI runtime, on this host.
    Runtime(OnHost),
    /// The agent in the pod's virtual machine.
    Guest(InGuest),
}

/// What belongs to a container of an OCI runtime.
#[derive(Debug)]
pub(crate) struct OnHost {
    pub(crate) runtime: Runtime,
    pub(crate) place: Place,
    /// What its process gets for standard streams, until the runtime has taken it: with `create`, or inside with `start`.
    pub(super) ends: Option<TheirEnds>,
    /// What the runtime has written to the container's stderr while it created it.
    pub(super) words: Vec<u8>,
}

/// What belongs to a container in the pod's virtual machine.
#[derive(Debug)]
pub(crate) struct InGuest {
    pub(crate) wanted: GuestContainer,
    /// How many of its volumes are there.
    pub(crate) volumes: usize,
    /// The code of an end that came before its streams were there.
    pub(crate) ended: Option<i32>,
}

impl Maker {
    pub(crate) fn on_host(&self) -> Option<&OnHost> {
        match self {
            Self::Runtime(host) => Some(host),
            Self::Guest(_) => None,
        }
    }

    /// Where its processes are; `None` in a guest.
    pub(crate) fn place(&self) -> Option<Place> {
        self.on_host().map(|host| host.place)
    }

    /// Its first process is a child of the monitor.
    pub(crate) fn makes_children(&self) -> bool {
        self.place().is_some_and(|place| place != Place::Inside)
    }

    pub(super) fn ends(&mut self) -> Option<TheirEnds> {
        match self {
            Self::Runtime(host) => host.ends.take(),
            Self::Guest(_) => None,
        }
    }
}
