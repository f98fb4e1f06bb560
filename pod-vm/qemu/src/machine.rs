//! The machine's states, and the loop that everything happens in.
//!
//! ```text
//!   Idle ──Start──▶ Starting ──QEMU answers──▶ Running ──▶ Ended
//!     └──Stop──▶ Ended ◀──failed──┘
//! ```
//!
//! In Ended the program is about to end; it does when the last answer is sent. When the monitor is gone it does at once, and QEMU with it.

use std::io;
use std::os::fd::{BorrowedFd, OwnedFd};
use std::time::{Duration, Instant};

use podvisor_proto::hypervisor::{Done, Ended, Request, Started, event, reply, request::Verb};
use rustix::event::{PollFd, PollFlags, Timespec, poll};
use serde_json::Value;

use crate::console::Tail;
use crate::control::Control;
use crate::failure::{Failure, one_line};
use crate::plan::{Choice, Plan};
use crate::qmp::Message;
use crate::start::{Begun, begin};
use crate::tsc::Clock;
use crate::verdict::{Evidence, verdict};

/// How long QEMU may take to end after it has said that the guest has.
const LAST_STEPS: Duration = Duration::from_millis(500);
/// How long the monitor may take to take the last answer.
const FAREWELL: Duration = Duration::from_secs(5);

#[derive(Debug)]
enum State {
    Idle,
    Up(Box<Up>),
    Ended,
}

/// A machine whose QEMU runs.
#[derive(Debug)]
struct Up {
    begun: Begun,
    plan: Plan,
    /// The request for it, until it is answered.
    starting: Option<u64>,
    /// The first command, whose answer says that QEMU has made the machine.
    first: Option<u64>,
    version: String,
    /// What QEMU has written to stderr.
    words: Tail,
    evidence: Evidence,
    /// When its patience with QEMU's end is over.
    deadline: Option<Instant>,
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
            timeout = up.deadline.map(|deadline| deadline.saturating_duration_since(Instant::now()));
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
        let outcome = match (request.verb, &self.state) {
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
            (Some(_), State::Up(_)) => {
                Err(Failure::unsupported("this machine cannot be changed while it runs"))
            }
        };
        self.control.reply(request.id, outcome);
    }

    fn stop(&mut self) {
        let State::Up(up) = std::mem::replace(&mut self.state, State::Ended) else { return };
        let starting = up.starting;
        // QEMU is killed and waited for.
        drop(up);
        if let Some(request) = starting {
            self.control
                .reply(request, Err(Failure::wrong_state("the machine was stopped while it started")));
        }
    }

    /// Takes note of what QEMU says, and of its end.
    fn look_after_qemu(&mut self) {
        let State::Up(up) = &mut self.state else { return };
        let started = up.listen();
        if let Some((request, started)) = started {
            self.control.reply(request, Ok(reply::Result::Started(started)));
        }
        if !up.has_ended() {
            return;
        }
        let State::Up(up) = std::mem::replace(&mut self.state, State::Ended) else { return };
        let starting = up.starting;
        let ended = up.end();
        match starting {
            Some(request) => {
                self.control.reply(request, Err(Failure::failed("start QEMU", ended.detail)));
            }
            None => self.control.tell(event::Kind::Ended(ended)),
        }
    }
}

impl Up {
    fn new(plan: Plan, clock: Clock, request: u64) -> Result<Self, Failure> {
        Ok(Self {
            begun: begin(&plan, clock)?,
            plan,
            starting: Some(request),
            first: None,
            version: String::new(),
            words: Tail::default(),
            evidence: Evidence::default(),
            deadline: None,
        })
    }

    fn descriptors(&self) -> Vec<BorrowedFd<'_>> {
        use std::os::fd::AsFd;
        let begun = &self.begun;
        let stderr = begun.process.stderr.as_ref().map(AsFd::as_fd);
        [Some(begun.process.descriptor()), begun.qmp.descriptor(), begun.console.descriptor(), stderr]
            .into_iter()
            .flatten()
            .collect()
    }

    /// Reads what there is to read; tells when the machine has just started.
    fn listen(&mut self) -> Option<(u64, Started)> {
        self.begun.console.read();
        self.read_words();
        let mut started = None;
        match self.begun.qmp.read() {
            Ok(messages) => {
                for message in messages.into_iter().flatten() {
                    started = self.hear(message).or(started);
                }
            }
            Err(error) => {
                self.words.push(format!("\nQEMU said what makes no sense: {error}").as_bytes());
                self.begun.process.kill();
            }
        }
        if self.deadline.is_some_and(|deadline| deadline <= Instant::now()) {
            self.deadline = None;
            self.begun.process.kill();
        }
        started
    }

    fn hear(&mut self, message: Message) -> Option<(u64, Started)> {
        match message {
            Message::Greeting(version) => {
                self.version = version;
                // If it cannot be sent QEMU has ended, which is seen too.
                self.first = self.begun.qmp.execute("qmp_capabilities", Value::Null, None).ok();
            }
            Message::Answer(number, Ok(_)) if self.first == Some(number) => {
                let request = self.starting.take()?;
                return Some((request, self.started()));
            }
            Message::Answer(_, Ok(_)) => {}
            Message::Answer(_, Err(_)) => {}
            Message::Event(name, data) => match name.as_str() {
                "GUEST_PANICKED" => self.evidence.panicked = true,
                "SHUTDOWN" => {
                    self.evidence.shutdown = data["reason"].as_str().map(str::to_owned);
                    self.deadline = Some(Instant::now() + LAST_STEPS);
                }
                _ => {}
            },
        }
        None
    }

    fn started(&self) -> Started {
        let start = &self.plan.start;
        let plugs = false;
        Started {
            pid: self.begun.process.pid(),
            name: "qemu".into(),
            version: self.version.clone(),
            emulated: start.emulate,
            adds_shares: plugs,
            adds_disks: plugs,
            adds_networks: plugs,
            memory_limit: start.memory_limit,
            cpus_limit: start.cpus_limit,
        }
    }

    fn read_words(&mut self) -> bool {
        let Some(stderr) = &self.begun.process.stderr else { return false };
        let mut bytes = [0; 4096];
        match rustix::io::read(stderr, &mut bytes) {
            Ok(count @ 1..) => {
                self.words.push(&bytes[..count]);
                true
            }
            Err(rustix::io::Errno::INTR) => true,
            Err(rustix::io::Errno::AGAIN) => false,
            Ok(0) | Err(_) => {
                self.begun.process.stderr = None;
                false
            }
        }
    }

    fn has_ended(&self) -> bool {
        let mut watched = [PollFd::from_borrowed_fd(self.begun.process.descriptor(), PollFlags::IN)];
        poll(&mut watched, Some(&Timespec { tv_sec: 0, tv_nsec: 0 })).is_ok_and(|ready| ready > 0)
    }

    /// Why it has ended. Its sockets still hold its last words.
    fn end(mut self: Box<Self>) -> Ended {
        let status = self.begun.process.wait();
        while self.begun.console.read() {}
        while self.read_words() {}
        while let Ok(Some(messages)) = self.begun.qmp.read() {
            for message in messages {
                self.hear(message);
            }
        }
        let console = self.begun.console.tail();
        let (reason, detail) = verdict(&self.evidence, status, &console, &self.words.text());
        Ended { reason: reason.into(), detail: one_line(&detail), console }
    }
}
