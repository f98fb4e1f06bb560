//! Standard streams of containers and execs: a connection each, which takes the place of a pipe. Not reading from it makes the guest's
//! program wait, as with a pipe.

use std::os::fd::OwnedFd;

use podvisor_proto::agent::{Open, Standard, StandardStream, open};

use super::dial::{DialError, Goal};
use crate::disk::chain;
use crate::failure::Failure;
use crate::monitor::Monitor;
use crate::output::lines::Stream;
use crate::stdio::Wanted;

impl Goal {
    /// It is a stream of this container or exec.
    pub(super) fn is_of(&self, key: u64) -> bool {
        matches!(self, Self::Standard { owner, .. } if *owner == key)
    }
}

impl Monitor {
    /// Connects the streams of a container or exec, which the agent calls `name`.
    pub(super) fn open_streams(&mut self, key: u64, name: &str, wanted: Wanted) {
        let mut dial = |which: Option<Stream>, standard: StandardStream| {
            let standard = Standard { id: name.to_owned(), which: standard.into() };
            let open = Open { stream: Some(open::Stream::Standard(standard)) };
            self.dial(Goal::Standard { owner: key, which, open }, None);
        };
        // A terminal's connection carries both directions.
        if wanted.stdout || wanted.terminal {
            dial(Some(Stream::Stdout), StandardStream::Stdout);
        }
        if wanted.stderr && !wanted.terminal {
            dial(Some(Stream::Stderr), StandardStream::Stderr);
        }
        if wanted.stdin && !wanted.terminal {
            dial(None, StandardStream::Stdin);
        }
    }

    /// A stream is connected, or cannot be.
    pub(super) fn stream_dialled(
        &mut self,
        key: u64,
        which: Option<Stream>,
        outcome: Result<OwnedFd, DialError>,
    ) {
        let (streams, wanted) = match (self.containers.get_mut(&key), self.execs.get_mut(&key)) {
            (Some(container), _) => (&mut container.streams, container.wanted),
            (None, Some(exec)) => (&mut exec.streams, exec.wanted),
            (None, None) => return,
        };
        let plugged = outcome.map_err(chain).and_then(|socket| {
            let plugged = match which {
                Some(stream) => streams.plug_output(key, stream, socket, wanted.terminal && wanted.stdin),
                None => streams.plug_input(key, socket),
            };
            plugged.map_err(chain)
        });
        if let Err(why) = plugged {
            let failure = Failure::runtime("the agent in the guest could not open a standard stream", why);
            return self.streams_failed(key, failure);
        }
        let more =
            self.machine.iter().flat_map(|machine| machine.dials.values()).any(|dial| dial.goal.is_of(key));
        if more {
            return;
        }
        if self.containers.contains_key(&key) {
            self.container_connected(key);
        } else {
            self.exec_connected(key);
        }
    }

    /// A container or exec without its streams comes to nothing.
    pub(super) fn streams_failed(&mut self, key: u64, failure: Failure) {
        self.hang_up(|goal| goal.is_of(key));
        if self.containers.contains_key(&key) {
            self.creation_failed(key, failure, true);
        } else if self.execs.contains_key(&key) {
            self.kill_exec_in_guest(key);
            self.exec_failed(key, failure);
        }
    }
}
