//! The machine's end: told to the process that started it, and then this process is gone.

use std::os::fd::{AsFd, BorrowedFd, OwnedFd};

use podvisor_proto::hypervisor::{EndReason, Ended, Event, Reply, event, reply};
use prost::Message;
use rustix::net::{SendFlags, send};

use super::console::Console;
use crate::sys;

/// How any thread ends the machine.
#[derive(Debug)]
pub(crate) struct Ending {
    link: OwnedFd,
    console: Console,
}

impl Ending {
    pub(crate) fn new(link: OwnedFd, console: Console) -> Self {
        Self { link, console }
    }

    /// Sends a message. Its size is less than a packet may have; a receiver that has gone has killed this process too.
    pub(crate) fn send(&self, id: u64, result: reply::Result) {
        let bytes = Reply { id, result: Some(result) }.encode_to_vec();
        let _ = send(&self.link, &bytes, SendFlags::NOSIGNAL);
    }

    /// Ends the machine, from whichever thread.
    pub(crate) fn tell(&self, reason: EndReason, detail: &str) -> ! {
        self.console.flush();
        let ended = Ended { reason: reason.into(), detail: detail.to_owned(), console: String::new() };
        self.send(0, reply::Result::Event(Event { kind: Some(event::Kind::Ended(ended)) }));
        sys::exit_now(0)
    }
}

impl AsFd for Ending {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.link.as_fd()
    }
}
