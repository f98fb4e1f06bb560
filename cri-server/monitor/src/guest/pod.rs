//! Verbs for the whole guest: connections to its ports, and figures.

use std::os::fd::{AsFd, OwnedFd};

use podvisor_proto::agent::{Connect, Open, Stats, open, reply, request::Verb};
use podvisor_proto::monitor::{self as proto, GuestStats};

use super::agent::{Outcome, Purpose, confused};
use super::dial::{DialError, Goal};
use crate::disk::chain;
use crate::failure::Failure;
use crate::monitor::Monitor;
use crate::verbs::{Answer, Answered, ReplyTo};

impl Monitor {
    /// Lets the agent connect to a port inside.
    pub(crate) fn connect_in_guest(&mut self, to: ReplyTo, number: u16) -> Answered {
        self.running_machine()?;
        let connect = open::Stream::Connect(Connect { port: number.into() });
        self.dial(Goal::Port { to, number, open: Open { stream: Some(connect) } }, None);
        Ok(Answer::Later)
    }

    pub(super) fn port_dialled(&mut self, to: ReplyTo, number: u16, outcome: Result<OwnedFd, DialError>) {
        match outcome {
            Ok(socket) => self.hand_over(to, socket.as_fd()),
            Err(error) => {
                let failure = Failure::system(format!("connect to port {number} in the pod"), chain(error));
                self.reply(to, Err(failure));
            }
        }
    }

    /// The client is gone.
    pub(crate) fn dials_abandoned(&mut self, connection: u64) {
        self.hang_up(|goal| matches!(goal, Goal::Port { to, .. } if to.connection == connection));
    }

    pub(crate) fn guest_stats(&mut self, to: ReplyTo, request: GuestStats) -> Answered {
        let stats = Stats { container_ids: request.container_ids };
        self.ask_agent(Verb::Stats(stats), Purpose::Stats(to)).map(|()| Answer::Later)
    }

    pub(super) fn stats_told(&mut self, to: ReplyTo, outcome: Outcome) {
        let stats = outcome.and_then(|result| match result {
            reply::Result::Stats(stats) => Ok(proto::reply::Result::GuestStats(stats)),
            _ => Err(confused()),
        });
        self.reply(to, stats);
    }
}
