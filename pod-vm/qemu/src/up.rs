//! A machine whose QEMU runs: what QEMU says of it, and its end.

use std::collections::BTreeMap;
use std::os::fd::{AsFd, BorrowedFd};
use std::time::{Duration, Instant};

use podvisor_hypervisor::console::Tail;
use podvisor_hypervisor::failure::{Failure, one_line};
use podvisor_hypervisor::keeper::{Answer, Machine, Outcome};
use podvisor_proto::hypervisor::{Done, Ended, Started, reply, request::Verb};
use rustix::event::{PollFd, PollFlags, Timespec, poll};
use serde_json::Value;

use crate::changes::Changes;
use crate::plan::{Kind, Plan};
use crate::qmp::Message;
use crate::start::{Begun, begin};
use crate::tsc::Clock;
use crate::verdict::{Evidence, verdict};

/// How long QEMU may take to end after it has said that the guest has.
const LAST_STEPS: Duration = Duration::from_millis(500);

/// A machine whose QEMU runs.
#[derive(Debug)]
pub(crate) struct Up {
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
    changes: Changes,
    /// Questions whether it runs: QEMU's numbers and the monitor's.
    checks: BTreeMap<u64, u64>,
    /// When its patience with QEMU's end is over.
    deadline: Option<Instant>,
}

impl Up {
    pub(crate) fn new(plan: Plan, clock: Clock, request: u64) -> Result<Self, Failure> {
        Ok(Self {
            begun: begin(&plan, clock)?,
            changes: Changes::new(&plan),
            plan,
            starting: Some(request),
            first: None,
            version: String::new(),
            words: Tail::default(),
            evidence: Evidence::default(),
            checks: BTreeMap::new(),
            deadline: None,
        })
    }

    fn hear(&mut self, message: Message) -> Option<Answer> {
        match message {
            Message::Greeting(version) => {
                self.version = version;
                // If it cannot be sent QEMU has ended, which is seen too.
                self.first = self.begun.qmp.execute("qmp_capabilities", Value::Null, None).ok();
            }
            Message::Answer(number, Ok(_)) if self.first == Some(number) => {
                let request = self.starting.take()?;
                return Some((request, Ok(reply::Result::Started(self.started()))));
            }
            Message::Answer(number, result) => match self.checks.remove(&number) {
                Some(request) => return Some((request, runs(result))),
                None => self.changes.answered(number, result.map(drop)),
            },
            Message::Event(name, data) => match name.as_str() {
                "GUEST_PANICKED" => self.evidence.panicked = true,
                "SHUTDOWN" => {
                    self.evidence.shutdown = data["reason"].as_str().map(str::to_owned);
                    self.deadline = Some(Instant::now() + LAST_STEPS);
                }
                _ => self.changes.heard(&name, &data),
            },
        }
        None
    }

    fn started(&self) -> Started {
        let start = &self.plan.start;
        let plugs = self.plan.kind == Kind::Q35;
        Started {
            pid: self.begun.process.pid(),
            name: "qemu".into(),
            version: self.version.clone(),
            emulated: start.emulate,
            adds_shares: plugs,
            adds_disks: plugs,
            adds_networks: plugs,
            adds_images: false,
            adds_image_disks: plugs,
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
}

impl Machine for Up {
    const NAME: &'static str = "QEMU";

    fn descriptors(&self) -> Vec<BorrowedFd<'_>> {
        let begun = &self.begun;
        let stderr = begun.process.stderr.as_ref().map(AsFd::as_fd);
        [Some(begun.process.descriptor()), begun.qmp.descriptor(), begun.console.descriptor(), stderr]
            .into_iter()
            .flatten()
            .collect()
    }

    fn deadline(&self) -> Option<Instant> {
        self.deadline.into_iter().chain(self.changes.deadline()).min()
    }

    fn has_started(&self) -> bool {
        self.starting.is_none()
    }

    fn has_ended(&self) -> bool {
        let mut watched = [PollFd::from_borrowed_fd(self.begun.process.descriptor(), PollFlags::IN)];
        poll(&mut watched, Some(&Timespec { tv_sec: 0, tv_nsec: 0 })).is_ok_and(|ready| ready > 0)
    }

    fn unanswered(&self) -> Vec<u64> {
        let checks = self.checks.values().copied();
        self.starting.into_iter().chain(checks).chain(self.changes.unanswered()).collect()
    }

    fn request(&mut self, request: u64, verb: Verb) -> Option<Outcome> {
        if matches!(verb, Verb::Check(_)) {
            // If it cannot be sent QEMU has ended, which is seen too, or does not read, and so does not work.
            if let Ok(number) = self.begun.qmp.execute("query-status", Value::Null, None) {
                self.checks.insert(number, request);
            }
        } else {
            self.changes.push(request, verb);
        }
        None
    }

    fn listen(&mut self) -> Vec<Answer> {
        self.begun.console.read();
        self.read_words();
        let mut answers = Vec::new();
        match self.begun.qmp.read() {
            Ok(messages) => {
                for message in messages.into_iter().flatten() {
                    answers.extend(self.hear(message));
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
        if self.has_started() {
            answers.extend(self.changes.advance(&mut self.begun.qmp));
        }
        answers
    }

    fn end(mut self) -> Ended {
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

/// What QEMU says of its virtual processors (QMP, `query-status`).
fn runs(status: Result<Value, String>) -> Result<reply::Result, Failure> {
    match status {
        Ok(status) if status["running"] == true => Ok(reply::Result::Done(Done {})),
        Ok(status) => Err(Failure::wrong_state(format!("the machine is held: {}", status["status"]))),
        Err(why) => Err(Failure::failed("ask QEMU whether the machine runs", why)),
    }
}
