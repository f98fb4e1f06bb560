//! The process that the monitor speaks with: the machine's states, and the loop that everything happens in.
//!
//! ```text
//!   Idle ──Start──▶ Up ──Stop, or the machine has ended──▶ Ended
//!     └─────────Stop────────────────────────────────────────▲
//! ```
//!
//! In Ended the program is about to end; it does when the last answer is sent. When the monitor is gone it does at once, and the machine with it.

use std::io;
use std::os::fd::OwnedFd;
use std::time::Duration;

use podvisor_hypervisor::control::Control;
use podvisor_hypervisor::failure::Failure;
use podvisor_hypervisor::request;
use podvisor_proto::hypervisor::{Done, Request, Start, event, reply, request::Verb};
use rustix::event::{PollFd, PollFlags, poll};

use crate::up::Up;

/// How long the monitor may take to take the last answer.
const FAREWELL: Duration = Duration::from_secs(5);
/// Processors that a machine can have.
const MOST_PROCESSORS: u32 = 32;

#[derive(Debug)]
enum State {
    Idle,
    Up(Box<Up>),
    Ended,
}

/// All there is.
#[derive(Debug)]
pub(crate) struct Keeper {
    control: Control,
    state: State,
}

impl Keeper {
    pub(crate) fn new(control: OwnedFd) -> Self {
        Self { control: Control::new(control), state: State::Idle }
    }

    /// Serves until the end of the machine or of the monitor.
    pub(crate) fn run(mut self) -> io::Result<()> {
        loop {
            self.wait()?;
            for request in self.control.read() {
                self.request(request);
            }
            self.control.write();
            if self.control.is_over() {
                // The machine is killed and its files are removed as they are dropped.
                return Ok(());
            }
            self.look_after_machine();
            if matches!(self.state, State::Ended) {
                self.control.finish(FAREWELL);
                return Ok(());
            }
        }
    }

    /// Sleeps until there is something to do.
    fn wait(&self) -> io::Result<()> {
        let mut flags = PollFlags::IN;
        flags.set(PollFlags::OUT, self.control.wants_to_write());
        let mut watched = vec![PollFd::new(&self.control, flags)];
        if let State::Up(up) = &self.state {
            let descriptors = up.descriptors().into_iter();
            watched.extend(descriptors.map(|fd| PollFd::from_borrowed_fd(fd, PollFlags::IN)));
        }
        match poll(&mut watched, None) {
            Ok(_) | Err(rustix::io::Errno::INTR) => Ok(()),
            Err(error) => Err(error.into()),
        }
    }

    fn request(&mut self, request: Request) {
        let outcome = match (request.verb, &mut self.state) {
            (_, State::Ended) => Err(Failure::wrong_state("the machine has ended")),
            (Some(Verb::Start(start)), State::Idle) => {
                match check(start).and_then(|start| Up::new(start, request.id)) {
                    Ok(up) => {
                        self.state = State::Up(Box::new(up));
                        return;
                    }
                    Err(failure) => Err(failure),
                }
            }
            (Some(Verb::Start(_)), State::Up(_)) => {
                Err(Failure::wrong_state("the machine was started already"))
            }
            (Some(Verb::Stop(_)), _) => {
                self.stop();
                Ok(reply::Result::Done(Done {}))
            }
            (None, _) => Err(Failure::unsupported("this hypervisor does not know that request")),
            (Some(_), State::Idle) => Err(Failure::wrong_state("the machine was not started yet")),
            (Some(Verb::Check(_)), State::Up(up)) => {
                up.check(request.id);
                return;
            }
            (Some(verb), State::Up(up)) => up.change(&verb),
        };
        self.control.reply(request.id, outcome);
    }

    fn stop(&mut self) {
        let State::Up(up) = std::mem::replace(&mut self.state, State::Ended) else { return };
        let unanswered = up.unanswered();
        // The machine is killed and waited for.
        drop(up);
        for request in unanswered {
            self.control.reply(request, Err(Failure::wrong_state("the machine was stopped")));
        }
    }

    /// Takes note of what the machine says, and of its end.
    fn look_after_machine(&mut self) {
        let State::Up(up) = &mut self.state else { return };
        for (request, outcome) in up.listen() {
            self.control.reply(request, outcome);
        }
        if !up.has_ended() {
            return;
        }
        let State::Up(mut up) = std::mem::replace(&mut self.state, State::Ended) else { return };
        // What it said last may have come since.
        for (request, outcome) in up.listen() {
            self.control.reply(request, outcome);
        }
        let (started, unanswered) = (up.has_started(), up.unanswered());
        let ended = up.end();
        for request in unanswered {
            let failure = if started {
                Failure::wrong_state("the machine has ended")
            } else {
                Failure::failed("start the machine", &ended.detail)
            };
            self.control.reply(request, Err(failure));
        }
        if started {
            self.control.tell(event::Kind::Ended(ended));
        }
    }
}

/// What can be started.
fn check(mut start: Start) -> Result<Start, Failure> {
    request::complete(&mut start)?;
    if start.emulate {
        return Err(Failure::unsupported("podvisor-vmm does not translate the processor: it needs KVM"));
    }
    if start.cpus_limit > MOST_PROCESSORS {
        return Err(Failure::unsupported(format!("a machine has at most {MOST_PROCESSORS} processors")));
    }
    // It is started all the same, and says in its answer that it cannot grow.
    start.memory_limit = start.memory;
    Ok(start)
}
