//! The hypervisor: a program that the monitor starts and asks, and that says how the machine ended. With its connection it ends, and the
//! machine with it.

use std::collections::BTreeMap;
use std::os::fd::{AsRawFd, OwnedFd};
use std::process::Command;

use podvisor_proto::hypervisor::{
    self as wire, EndReason, Ended, ErrorCode, MAX_FRAME, Reply, Request, reply, request::Verb,
};
use prost::Message;
use rustix::io::{FdFlags, fcntl_setfd};
use rustix::net::{AddressFamily, SocketFlags, SocketType, socketpair};

use super::bounds::{line, plain_end};
use super::end::Cause;
use super::program::Program;
use crate::channel::Channel;
use crate::failure::Failure;
use crate::frame::{Filled, frame};
use crate::monitor::Monitor;
use crate::poll::{Poller, Ready, Token};

/// Bytes that may wait for it.
const QUEUE_LIMIT: usize = 2 * MAX_FRAME;
/// Of the console, in an error or a reason.
pub(super) const CONSOLE: usize = 4096;

/// The hypervisor's process and what is said with it.
#[derive(Debug)]
pub(super) struct Hypervisor {
    pub(super) program: Program,
    /// `None`: it has ended the connection.
    pub(super) channel: Option<Channel>,
    asked: BTreeMap<u64, Ask>,
    last_id: u64,
    /// How the machine ended, in its words.
    pub(super) ended: Option<Ended>,
}

/// What a request was made for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Ask {
    Start,
    Stop,
    /// Whether the machine runs.
    Check,
    /// A step of a resize.
    Resize,
    /// A disk, by its number.
    Plug(u64),
    Unplug(u64),
}

impl Hypervisor {
    /// Starts the program. `key` is what events of its connection and its stderr carry.
    pub(super) fn spawn(key: u64, program: &str, poller: &Poller) -> std::io::Result<Self> {
        let (ours, theirs) = socketpair(AddressFamily::UNIX, SocketType::STREAM, SocketFlags::CLOEXEC, None)?;
        crate::stdio::set_nonblocking(&ours)?;
        let mut command = Command::new(program);
        command.arg("--control-fd").arg(theirs.as_raw_fd().to_string());
        let program = spawn_with(key, program, &mut command, &theirs, poller)?;
        let mut channel = Channel::new(Token::Hypervisor(key), ours, MAX_FRAME, QUEUE_LIMIT);
        channel.watch(poller);
        Ok(Self { program, channel: Some(channel), asked: BTreeMap::new(), last_id: 0, ended: None })
    }

    pub(super) fn ask(&mut self, verb: Verb, ask: Ask, poller: &Poller) {
        self.last_id += 1;
        if let Some(channel) = &mut self.channel {
            channel.send(poller, frame(&Request { id: self.last_id, verb: Some(verb) }));
            self.asked.insert(self.last_id, ask);
        }
    }

    pub(super) fn start(&mut self, start: wire::Start, poller: &Poller) {
        self.ask(Verb::Start(start), Ask::Start, poller);
    }

    pub(super) fn check(&mut self, poller: &Poller) {
        self.ask(Verb::Check(wire::Check {}), Ask::Check, poller);
    }

    /// Asks it to end the machine; `false`: it cannot be asked.
    pub(super) fn stop(&mut self, poller: &Poller) -> bool {
        self.ask(Verb::Stop(wire::Stop {}), Ask::Stop, poller);
        self.channel.is_some()
    }
}

/// Starts a program that inherits one descriptor under its number.
///
/// Nothing else is started meanwhile: only this thread starts processes.
pub(super) fn spawn_with(
    key: u64,
    path: &str,
    command: &mut Command,
    inherited: &OwnedFd,
    poller: &Poller,
) -> std::io::Result<Program> {
    fcntl_setfd(inherited, FdFlags::empty())?;
    let program = Program::spawn(key, path, command, poller);
    fcntl_setfd(inherited, FdFlags::CLOEXEC)?;
    program
}

impl Monitor {
    /// The hypervisor's connection has something, or takes more.
    pub(crate) fn hypervisor_ready(&mut self, key: u64, event: Ready) {
        let Self { machine: Some(machine), poller, .. } = self else { return };
        let Some(channel) = machine.hypervisor.channel.as_mut().filter(|_| machine.key == key) else {
            return;
        };
        if event.readable && channel.reads() {
            self.read_hypervisor();
            return;
        }
        if event.writable {
            channel.flush(poller);
        } else if event.hung_up {
            channel.abort();
        }
    }

    fn hypervisor_channel(&mut self) -> Option<&mut Channel> {
        self.machine.as_mut()?.hypervisor.channel.as_mut()
    }

    /// Reads once from the hypervisor; `false`: there was nothing.
    pub(super) fn read_hypervisor(&mut self) -> bool {
        let Some(channel) = self.hypervisor_channel() else { return false };
        match channel.incoming.fill(&channel.socket) {
            Ok(Filled::More) => {}
            Ok(Filled::Nothing) => return false,
            Ok(Filled::End) | Err(_) => {
                self.hypervisor_lost();
                return false;
            }
        }
        while let Some(channel) = self.hypervisor_channel() {
            let reply = match channel.incoming.next() {
                Ok(Some(body)) => Reply::decode(body).map_err(|error| error.to_string()),
                Ok(None) => break,
                Err(error) => Err(error.to_string()),
            };
            match reply {
                Ok(reply) => self.hypervisor_said(reply),
                Err(why) => {
                    self.end_machine(Cause::guest(format!("the hypervisor sent no message: {why}")));
                    self.hypervisor_lost();
                }
            }
        }
        true
    }

    /// Its connection has ended: it is ending, and how will be seen when it is reaped.
    pub(super) fn hypervisor_lost(&mut self) {
        let Self { machine: Some(machine), poller, .. } = self else { return };
        if let Some(channel) = machine.hypervisor.channel.take() {
            channel.end(poller);
        }
        self.end_machine(Cause::Hypervisor);
    }

    fn hypervisor_said(&mut self, reply: Reply) {
        let Some(machine) = &mut self.machine else { return };
        let hypervisor = &mut machine.hypervisor;
        if reply.id == 0 {
            if let Some(reply::Result::Event(wire::Event { kind: Some(wire::event::Kind::Ended(ended)) })) =
                reply.result
            {
                let cause = Cause::ended(&ended);
                hypervisor.ended.get_or_insert(Ended {
                    detail: line(&ended.detail, 512),
                    console: plain_end(&ended.console, CONSOLE),
                    ..ended
                });
                self.end_machine(cause);
            }
            return;
        }
        let Some(ask) = hypervisor.asked.remove(&reply.id) else { return };
        let outcome = match reply.result {
            Some(reply::Result::Error(error)) => Err(error),
            Some(result) => Ok(result),
            None => Err(wire::Error { code: 0, detail: "it answered in an unknown way".to_owned() }),
        };
        match (ask, outcome) {
            (Ask::Start, Ok(reply::Result::Started(started))) => self.machine_runs(started),
            (Ask::Start, Ok(_)) => {
                self.end_machine(Cause::guest("the hypervisor answered with something else".to_owned()));
            }
            (Ask::Start, Err(error)) => self.end_machine(Cause::guest(line(&error.detail, 512))),
            // The rest is seen when it is reaped.
            (Ask::Stop, _) => {}
            (Ask::Check, Ok(_)) => self.hypervisor_checked(true),
            // One that does not know the question has answered, too.
            (Ask::Check, Err(error)) => {
                self.hypervisor_checked(error.code() == ErrorCode::Unsupported);
            }
            (Ask::Resize, outcome) => self.hypervisor_resized(outcome),
            (Ask::Plug(device), outcome) => self.device_plugged(device, outcome.map(drop)),
            (Ask::Unplug(device), outcome) => self.device_unplugged(device, outcome.map(drop)),
        }
    }
}

pub(super) fn refusal(error: &wire::Error) -> Failure {
    let detail = line(&error.detail, 512);
    match error.code() {
        ErrorCode::Unsupported => Failure::unsupported(detail),
        ErrorCode::Invalid => Failure::invalid(detail),
        ErrorCode::WrongState | ErrorCode::NotFound => Failure::wrong_state(detail),
        ErrorCode::Unspecified | ErrorCode::Failed => Failure::vm(detail, String::new()),
    }
}

impl Cause {
    fn ended(ended: &Ended) -> Self {
        let what = match ended.reason() {
            EndReason::PowerOff => "the guest switched itself off",
            EndReason::Panic => "the guest's kernel panicked",
            EndReason::Reset => "the guest wanted to begin anew",
            EndReason::Killed => "the machine's process was killed",
            EndReason::Failure => "the machine's process gave up",
            EndReason::Unspecified => "the machine ended",
        };
        let detail = line(&ended.detail, 512);
        let text = if detail.is_empty() { what.to_owned() } else { format!("{what}: {detail}") };
        Self::Known { text, code: if ended.reason() == EndReason::PowerOff { 0 } else { super::end::KILLED } }
    }
}
