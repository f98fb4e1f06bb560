//! The machine's states, and the loop that everything happens in.
//!
//! ```text
//!   Idle ──Start──▶ Up ──Stop, or the machine has ended──▶ Ended
//!     └─────────Stop────────────────────────────────────────▲
//! ```
//!
//! In Ended the program is about to end; it does when the last answer is sent. When the monitor is gone it does at once, and the machine with it.

use std::io;
use std::os::fd::{BorrowedFd, OwnedFd};
use std::time::{Duration, Instant};

use podvisor_proto::hypervisor::{Done, Ended, Request, Start, event, reply, request::Verb};
use rustix::event::{PollFd, PollFlags, Timespec, poll};

use crate::control::Control;
use crate::failure::Failure;

/// How long the monitor may take to take the last answer.
const FAREWELL: Duration = Duration::from_secs(5);

/// What came of a request.
pub type Outcome = Result<reply::Result, Failure>;
/// A request's number and what came of it.
pub type Answer = (u64, Outcome);

/// A machine whose process runs. Dropped, it is killed, and its files are removed.
pub trait Machine {
    /// What is started, as errors have it.
    const NAME: &'static str;
    /// What to watch for reading.
    fn descriptors(&self) -> Vec<BorrowedFd<'_>>;
    /// When there is something to do though nothing has happened.
    fn deadline(&self) -> Option<Instant>;
    /// The request for it has been answered.
    fn has_started(&self) -> bool;
    /// Its process is gone.
    fn has_ended(&self) -> bool;
    /// Requests that wait for their answers, that for the machine itself among them.
    fn unanswered(&self) -> Vec<u64>;
    /// Takes a request about the machine. `None`: it is answered later.
    fn request(&mut self, request: u64, verb: Verb) -> Option<Outcome>;
    /// Does what there is to do; gives the answers that are ready.
    fn listen(&mut self) -> Vec<Answer>;
    /// Why it has ended.
    fn end(self) -> Ended;
}

enum State<M> {
    Idle,
    Up(Box<M>),
    Ended,
}

/// All there is. `B` begins to make a machine, for the request of that number.
pub struct Keeper<M, B> {
    control: Control,
    begin: B,
    state: State<M>,
}

impl<M: Machine, B: FnMut(Start, u64) -> Result<M, Failure>> Keeper<M, B> {
    /// Serves the monitor at the other end of `control`.
    pub fn new(control: OwnedFd, begin: B) -> Self {
        Self { control: Control::new(control), begin, state: State::Idle }
    }

    /// Serves until the end of the machine or of the monitor.
    pub fn run(mut self) -> io::Result<()> {
        loop {
            self.wait()?;
            for request in self.control.read() {
                self.request(request);
            }
            self.control.write();
            if self.control.is_over() {
                // The machine goes as it is dropped.
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
        let mut timeout = None;
        if let State::Up(up) = &self.state {
            let descriptors = up.descriptors().into_iter();
            watched.extend(descriptors.map(|fd| PollFd::from_borrowed_fd(fd, PollFlags::IN)));
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
            (Some(Verb::Start(start)), State::Idle) => match (self.begin)(start, request.id) {
                Ok(up) => {
                    self.state = State::Up(Box::new(up));
                    return;
                }
                Err(failure) => Err(failure),
            },
            (Some(Verb::Start(_)), State::Up(_)) => {
                Err(Failure::wrong_state("the machine was started already"))
            }
            (Some(Verb::Stop(_)), _) => {
                self.stop();
                Ok(reply::Result::Done(Done {}))
            }
            (None, _) => Err(Failure::unsupported("this hypervisor does not know that request")),
            (Some(_), State::Idle) => Err(Failure::wrong_state("the machine was not started yet")),
            (Some(verb), State::Up(up)) => match up.request(request.id, verb) {
                Some(outcome) => outcome,
                None => return,
            },
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
            let attempt = if started {
                "change the machine, which has ended".to_owned()
            } else {
                format!("start {}", M::NAME)
            };
            self.control.reply(request, Err(Failure::failed(attempt, &ended.detail)));
        }
        if started {
            self.control.tell(event::Kind::Ended(ended));
        }
    }
}
