//! The machine's states, and the loop that everything happens in.
//!
//! ```text
//!   Idle ──Start──▶ Up ──Stop, or QEMU has ended──▶ Ended
//!     └─────────Stop─────────────────────────────────▲
//! ```
//!
//! In Ended the program is about to end; it does when the last answer is sent. When the monitor is gone it does at once, and QEMU with it.

use std::io;
use std::os::fd::OwnedFd;
use std::time::{Duration, Instant};

use podvisor_hypervisor::control::Control;
use podvisor_hypervisor::failure::Failure;
use podvisor_proto::hypervisor::{Done, Request, event, reply, request::Verb};
use rustix::event::{PollFd, PollFlags, Timespec, poll};

use crate::plan::{Choice, Plan};
use crate::tsc::Clock;
use crate::up::Up;

/// How long the monitor may take to take the last answer.
const FAREWELL: Duration = Duration::from_secs(5);

#[derive(Debug)]
enum State {
    Idle,
    Up(Box<Up>),
    Ended,
}

/// All there is.
#[derive(Debug)]
pub(crate) struct Machine {
    control: Control,
    choice: Choice,
    clock: Clock,
    state: State,
}

impl Machine {
    pub(crate) fn new(control: OwnedFd, choice: Choice, clock: Clock) -> Self {
        Self { control: Control::new(control), choice, clock, state: State::Idle }
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
                // QEMU is killed and its files are removed as they are dropped.
                return Ok(());
            }
            self.look_after_qemu();
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
        let mut timeout = None;
        if let State::Up(up) = &self.state {
            watched
                .extend(up.descriptors().into_iter().map(|fd| PollFd::from_borrowed_fd(fd, PollFlags::IN)));
            timeout = up.deadline().map(|deadline| deadline.saturating_duration_since(Instant::now()));
        }
        let timeout = timeout.map(|left| Timespec {
            tv_sec: i64::try_from(left.as_secs()).unwrap_or(i64::MAX),
            tv_nsec: left.subsec_nanos().into(),
        });
        match poll(&mut watched, timeout.as_ref()) {
            Ok(_) | Err(rustix::io::Errno::INTR) => Ok(()),
            Err(error) => Err(error.into()),
        }
    }

    fn request(&mut self, request: Request) {
        let outcome = match (request.verb, &mut self.state) {
            (_, State::Ended) => Err(Failure::wrong_state("the machine has ended")),
            (Some(Verb::Start(start)), State::Idle) => {
                let plan = Plan::new(start, self.choice);
                match plan.and_then(|plan| Up::new(plan, self.clock, request.id)) {
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
            (Some(verb), State::Up(up)) => {
                up.request(request.id, verb);
                return;
            }
        };
        self.control.reply(request.id, outcome);
    }

    fn stop(&mut self) {
        let State::Up(up) = std::mem::replace(&mut self.state, State::Ended) else { return };
        let unanswered = up.unanswered();
        // QEMU is killed and waited for.
        drop(up);
        for request in unanswered {
            self.control.reply(request, Err(Failure::wrong_state("the machine was stopped")));
        }
    }

    /// Takes note of what QEMU says, and of its end.
    fn look_after_qemu(&mut self) {
        let State::Up(up) = &mut self.state else { return };
        for (request, outcome) in up.listen() {
            self.control.reply(request, outcome);
        }
        if !up.has_ended() {
            return;
        }
        let State::Up(up) = std::mem::replace(&mut self.state, State::Ended) else { return };
        let unanswered = up.unanswered();
        let has_started = up.has_started();
        let ended = up.end();
        let attempt = if has_started { "change the machine, which has ended" } else { "start QEMU" };
        for request in unanswered {
            self.control.reply(request, Err(Failure::failed(attempt, &ended.detail)));
        }
        if has_started {
            self.control.tell(event::Kind::Ended(ended));
        }
    }
}
