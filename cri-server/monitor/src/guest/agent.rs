//! Requests to the agent: each is asked for a purpose, which says what its answer is for, and has a time within which a guest that
//! lives answers it.

use std::collections::BTreeMap;
use std::time::{Duration, Instant};

use podvisor_proto::agent::{self as wire, ErrorCode, MAX_FRAME, Reply, Request, reply, request::Verb};
use prost::Message;

use super::bounds::{self, line};
use super::news::News;
use crate::channel::Channel;
use crate::failure::Failure;
use crate::frame::{Filled, frame};
use crate::monitor::Monitor;
use crate::poll::{Ready, Timer, TimerId};
use crate::runtime::LOG_LIMIT;
use crate::verbs::ReplyTo;

/// What the agent answered.
pub(super) type Outcome = Result<reply::Result, Failure>;

/// Bytes that may wait for an agent: two requests of the largest size. Who lets more pile up does not read.
pub(super) const QUEUE_LIMIT: usize = 2 * MAX_FRAME;
/// How much longer somebody waits who wants something of a machine that does not get to run; then it is of no use to him. With the time
/// that there is for a signal it is less than the two minutes that kubelet has for a pod's end.
const EXTRA: Duration = Duration::from_secs(40);
/// Elements in one reply. Decoded, each takes up to a few hundred bytes, however few it had on the way.
const ELEMENTS: usize = 4096;

/// The agent in the guest, as far as it is known.
#[derive(Debug, Default)]
pub(super) struct Agent {
    /// The control connection, and the number that its events carry.
    pub(super) channel: Option<(u64, Channel)>,
    /// The connection has been greeted and compared with what is known: requests go out on it.
    pub(super) greeted: bool,
    /// Requests that were made while there was no such connection.
    pub(super) waiting: Vec<(u64, Vec<u8>)>,
    pub(super) asked: BTreeMap<u64, Asked>,
    last_id: u64,
    pub(super) news: News,
    /// Containers whose start was asked for on a connection that was lost, and who is to be answered.
    pub(super) doubtful: Vec<(u64, ReplyTo)>,
    /// Of terminals, by container or exec.
    pub(super) sizes: BTreeMap<u64, super::exec::Sizes>,
    pub(super) losses: super::link::Losses,
    pub(super) pulse: super::pulse::Pulse,
}

/// A request that has not been answered.
#[derive(Debug)]
pub(super) struct Asked {
    pub(super) purpose: Purpose,
    /// What is asked again when the connection is lost: it does not matter how often it is done.
    pub(super) again: Option<Verb>,
    pub(super) at: Instant,
    /// `None`: the start of the machine has a time limit of its own.
    pub(super) timer: Option<TimerId>,
}

/// What a request was made for. Numbers are containers or execs.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Purpose {
    /// The next step of the machine's start.
    Boot,
    /// Hello on a new connection, and List after it.
    Greet,
    Compare,
    Time,
    Acknowledge(u64),
    AddRoot(u64),
    /// For a container; a part of a version of a volume; for nobody.
    AddVolume(u64),
    Version(u64),
    RemoveVolume,
    ReleaseDevice,
    Create(u64),
    Start(u64, ReplyTo),
    Kill(u64, Option<ReplyTo>),
    Update(ReplyTo),
    /// After a container has ended.
    Delete(u64),
    RemoveRoot(u64),
    /// After its creation has failed.
    CleanUp(u64),
    CleanUpRoot(u64),
    Exec(u64),
    KillExec(u64),
    Resize(u64),
    Stats(ReplyTo),
    /// A step of a resize.
    Adapt,
}

impl Purpose {
    /// What the agent was to do.
    pub(super) fn what(self) -> &'static str {
        match self {
            Self::Boot => "make the guest the pod's",
            Self::Greet => "answer",
            Self::Compare => "list its processes",
            Self::Time => "set the guest's time",
            Self::Acknowledge(_) => "take an acknowledgement",
            Self::AddRoot(_) => "mount the container's root file system",
            Self::AddVolume(_) => "make a volume",
            Self::Version(_) => "write a volume",
            Self::RemoveVolume => "remove a volume",
            Self::ReleaseDevice => "let go of a device",
            Self::Create(_) => "create the container",
            Self::Start(..) => "start the container",
            Self::Kill(..) => "signal the container",
            Self::Update(_) => "update the container",
            Self::Delete(_) | Self::CleanUp(_) => "delete the container",
            Self::RemoveRoot(_) | Self::CleanUpRoot(_) => "unmount the container's root file system",
            Self::Exec(_) => "start the process",
            Self::KillExec(_) => "kill the process",
            Self::Resize(_) => "resize the terminal",
            Self::Stats(_) => "tell its figures",
            Self::Adapt => "follow the machine's size",
        }
    }

    /// An agent that has not answered by then never will: it prepares processes beside its loop, and nothing else takes it long.
    fn patience(self) -> Option<Duration> {
        match self {
            Self::Boot => None,
            // As long as an OCI runtime has for it.
            Self::AddRoot(_) | Self::Create(_) | Self::Start(..) | Self::Exec(_) => {
                Some(Duration::from_secs(120))
            }
            Self::Greet | Self::Compare => Some(super::link::PATIENCE),
            // Nobody waits for it.
            Self::Time => Some(Duration::from_secs(60)),
            _ => Some(Duration::from_secs(20)),
        }
    }
}

/// It does not matter how often it is done.
fn is_repeatable(verb: &Verb) -> bool {
    match verb {
        Verb::KillContainer(kill) => kill.signal == libc::SIGKILL,
        Verb::KillExec(_)
        | Verb::DeleteContainer(_)
        | Verb::RemoveRoot(_)
        | Verb::AddVolume(_)
        | Verb::RemoveVolume(_)
        | Verb::UpdateContainer(_)
        | Verb::Adapt(_)
        | Verb::Stats(_) => true,
        // A part of a version, for one, may have been written or not: the version is begun anew.
        _ => false,
    }
}

impl Agent {
    pub(super) fn send(&mut self, poller: &crate::poll::Poller, frame: Vec<u8>) {
        if let Some((_, channel)) = &mut self.channel {
            channel.send(poller, frame);
        }
    }
}

impl Monitor {
    /// Asks the agent. Its answer, or that there will be none, goes to [`Monitor::agent_answered`].
    pub(super) fn ask_agent(&mut self, verb: Verb, purpose: Purpose) -> Result<(), Failure> {
        let Self { machine: Some(machine), timers, poller, .. } = self else {
            return Err(Failure::wrong_state("this pod is no virtual machine"));
        };
        let boots = purpose == Purpose::Boot && matches!(machine.stage, super::Stage::Starting(_));
        if !(machine.is_running() || boots) {
            return Err(machine.gone());
        }
        let agent = &mut machine.agent;
        agent.last_id += 1;
        let id = agent.last_id;
        let again = is_repeatable(&verb).then(|| verb.clone());
        let frame = frame(&Request { id, verb: Some(verb) });
        if frame.len() > MAX_FRAME {
            let detail = format!("{} bytes are more than a request to the agent may have", frame.len());
            return Err(Failure::invalid(detail));
        }
        if agent.greeted || matches!(purpose, Purpose::Boot | Purpose::Greet | Purpose::Compare) {
            agent.send(poller, frame);
        } else if agent.waiting.iter().map(|(_, frame)| frame.len()).sum::<usize>() > QUEUE_LIMIT {
            return Err(Failure::vm("too much waits for the agent in the guest", String::new()));
        } else {
            agent.waiting.push((id, frame));
        }
        let timer = purpose.patience().map(|patience| timers.set(patience, Timer::Request(id)));
        agent.asked.insert(id, Asked { purpose, again, at: Instant::now(), timer });
        Ok(())
    }

    /// Asks for what nobody waits for: that the machine is gone says enough.
    pub(super) fn tell_agent(&mut self, verb: Verb, purpose: Purpose) {
        let _ = self.ask_agent(verb, purpose);
    }

    pub(crate) fn request_time_is_over(&mut self, id: u64) {
        let Some(asked) = self.machine.as_ref().and_then(|machine| machine.agent.asked.get(&id)) else {
            return;
        };
        let (at, patience) = (asked.at, asked.purpose.patience().unwrap_or_default());
        let (limit, what) = (patience.as_secs(), asked.purpose.what());
        let asked_for_somebody = asked.purpose != Purpose::Time;
        let mut left = self.patience_left(at, patience);
        if asked_for_somebody {
            left = left.min((patience + EXTRA).saturating_sub(at.elapsed()));
        }
        if !left.is_zero() {
            let timer = self.timers.set(left, Timer::Request(id));
            if let Some(asked) = self.machine.as_mut().and_then(|it| it.agent.asked.get_mut(&id)) {
                asked.timer = Some(timer);
            }
            return;
        }
        self.end_machine(super::end::Cause::guest(format!("the agent did not {what} within {limit} s")));
    }

    /// The agent's connection has something, or takes more.
    pub(crate) fn agent_ready(&mut self, key: u64, event: Ready) {
        let Some(channel) = self.agent_channel(key) else { return };
        let reads = channel.reads();
        if event.readable && reads {
            return self.read_agent(key);
        }
        let Self { machine: Some(machine), poller, .. } = self else { return };
        let Some((_, channel)) = &mut machine.agent.channel else { return };
        if event.writable {
            channel.flush(poller);
        } else if event.hung_up {
            channel.abort();
        }
    }

    fn agent_channel(&mut self, key: u64) -> Option<&mut Channel> {
        let (its_key, channel) = self.machine.as_mut()?.agent.channel.as_mut()?;
        (*its_key == key).then_some(channel)
    }

    fn read_agent(&mut self, key: u64) {
        let Some(channel) = self.agent_channel(key) else { return };
        match channel.incoming.fill(&channel.socket) {
            Ok(Filled::More) => {}
            Ok(Filled::Nothing) => return,
            Ok(Filled::End) | Err(_) => return self.agent_lost(),
        }
        while let Some(channel) = self.agent_channel(key) {
            let reply = match channel.incoming.next() {
                Ok(Some(body)) => decode(body),
                Ok(None) => return,
                Err(error) => Err(error.to_string()),
            };
            match reply {
                Ok(reply) => self.agent_said(reply),
                Err(why) => return self.distrust(&why),
            }
        }
    }

    fn agent_said(&mut self, reply: Reply) {
        self.agent_lives();
        if reply.id == 0 {
            if let Some(reply::Result::Event(event)) = reply.result {
                self.agent_told(event);
            }
            return;
        }
        let Some(machine) = &mut self.machine else { return };
        let Some(asked) = machine.agent.asked.remove(&reply.id) else {
            return self.distrust("it answered what it was not asked");
        };
        if let Some(timer) = asked.timer {
            self.timers.cancel(timer);
        }
        let outcome = match reply.result {
            Some(reply::Result::Error(error)) => Err(refusal(asked.purpose, &error)),
            Some(result) => Ok(result),
            None => Err(Failure::unsupported(format!(
                "the agent answered in a way that this monitor does not know when it was to {}",
                asked.purpose.what()
            ))),
        };
        self.agent_answered(asked.purpose, outcome);
    }

    /// Goes on with what a request was made for.
    pub(super) fn agent_answered(&mut self, purpose: Purpose, outcome: Outcome) {
        match purpose {
            Purpose::Boot => self.boot_answered(outcome),
            Purpose::Greet => self.greeted(outcome),
            Purpose::Compare => self.compared(outcome),
            Purpose::Time | Purpose::Resize(_) | Purpose::RemoveVolume | Purpose::ReleaseDevice => {}
            Purpose::AddVolume(container) => self.volume_added(container, done(outcome)),
            Purpose::Version(volume) => self.version_answered(volume, done(outcome)),
            Purpose::Acknowledge(sequence) => self.acknowledged(sequence, outcome.is_ok()),
            Purpose::AddRoot(container) => self.root_added(container, done(outcome)),
            Purpose::Create(container) => self.created_in_guest(container, outcome),
            Purpose::Start(container, to) => self.start_ended(container, to, done(outcome)),
            Purpose::Kill(container, to) => self.kill_ended(container, to, done(outcome)),
            Purpose::Update(to) => {
                let outcome = done(outcome);
                self.reply(to, outcome.map(|()| crate::verbs::done()));
            }
            Purpose::Delete(container) => self.deleted_in_guest(container, done(outcome)),
            Purpose::RemoveRoot(container) => self.root_removed(container, done(outcome)),
            Purpose::CleanUp(container) => self.cleaned_up_in_guest(container, done(outcome)),
            Purpose::CleanUpRoot(container) => self.root_cleaned_up(container, done(outcome)),
            Purpose::Exec(exec) => self.exec_started_in_guest(exec, outcome),
            Purpose::KillExec(exec) => self.exec_killed_in_guest(exec, done(outcome)),
            Purpose::Adapt => self.resize_answered(done(outcome).map(|()| None)),
            Purpose::Stats(to) => self.stats_told(to, outcome),
        }
        if let Purpose::Resize(key) = purpose {
            self.resized_in_guest(key);
        }
    }

    /// What the agent sends is not what was agreed. Nothing else that it says counts.
    pub(super) fn distrust(&mut self, why: &str) {
        self.end_machine(super::end::Cause::guest(format!("the agent does not keep to its protocol: {why}")));
    }
}

/// For answers that have nothing to tell.
pub(super) fn done(outcome: Outcome) -> Result<(), Failure> {
    match outcome? {
        reply::Result::Done(wire::Done {}) => Ok(()),
        _ => Err(confused()),
    }
}

pub(super) fn confused() -> Failure {
    Failure::runtime("the agent answered with something else than was asked", String::new())
}

/// What the agent refused, in the words that the daemon gets. It has the part that an OCI runtime has on the host.
fn refusal(purpose: Purpose, error: &wire::Error) -> Failure {
    let detail = format!("the agent in the guest could not {}", purpose.what());
    let words = line(&error.detail, LOG_LIMIT);
    match error.code() {
        ErrorCode::NotFound => Failure::not_found(detail, words),
        ErrorCode::WrongState => Failure::wrong_state(format!("{detail}: {words}")),
        ErrorCode::Timeout => Failure::timeout(detail, words),
        ErrorCode::Unspecified
        | ErrorCode::Unsupported
        | ErrorCode::Invalid
        | ErrorCode::AlreadyExists
        | ErrorCode::Refused
        | ErrorCode::System => Failure::runtime(detail, words),
    }
}

fn decode(body: &[u8]) -> Result<Reply, String> {
    match bounds::elements(body) {
        None => return Err("it sent no message".to_owned()),
        Some(elements) if elements > ELEMENTS => {
            return Err(format!("it sent a list of more than {ELEMENTS} elements"));
        }
        Some(_) => {}
    }
    Reply::decode(body).map_err(|_| "it sent no message".to_owned())
}
