//! A machine that runs, as the process that started it sees it: its process, what it says, its console, its end.

use std::ffi::CString;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::unix::process::ExitStatusExt;
use std::process::ExitStatus;

use podvisor_hypervisor::console::{Console, Tail};
use podvisor_hypervisor::failure::{Failure, one_line};
use podvisor_hypervisor::process::Process;
use podvisor_proto::hypervisor::{
    Check, Done, EndReason, Ended, ErrorCode, Reply, Request, Start, Started, event, reply, request::Verb,
};
use prost::Message;
use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::net::{RecvFlags, SendFlags, recv, send};

use crate::open::{self, Names};
use crate::{confine, handover};

/// A request's number and its answer.
pub(crate) type Answer = (u64, Result<reply::Result, Failure>);
/// The longest message of a machine.
const LONGEST: usize = 16 << 10;
/// What Linux writes on the console when it gives up.
const PANIC: &str = "Kernel panic - not syncing";

/// A machine whose process runs.
#[derive(Debug)]
pub(crate) struct Up {
    process: Process,
    link: Option<OwnedFd>,
    console: Console,
    start: Start,
    /// The request for it, until it is answered.
    starting: Option<u64>,
    /// Requests for a sign of life that the machine has not given yet.
    checks: Vec<u64>,
    started: bool,
    /// What it has written to stderr.
    words: Tail,
    /// How it ended, in its own words.
    ended: Option<Ended>,
    _names: Names,
}

impl Up {
    /// Opens everything, starts the process, and hands it over. What was made is gone again when it fails.
    pub(crate) fn new(start: Start, request: u64) -> Result<Self, Failure> {
        let descriptors =
            |error| Failure::failed("make the sockets between this process and the machine", error);
        let (console, theirs) = std::os::unix::net::UnixStream::pair().map_err(descriptors)?;
        let console =
            Console::new(console.into(), &start.console_path, start.console_limit).map_err(|error| {
                Failure::failed(format!("write the console to {}", start.console_path), error)
            })?;
        let (parts, names) = open::open(&start, theirs.into())?;
        let (link, machines) = handover::pair().map_err(descriptors)?;
        let cgroups: Vec<CString> = start
            .cgroup_procs
            .iter()
            .map(|path| CString::new(path.as_str()))
            .collect::<Result<_, _>>()
            .map_err(|error| Failure::failed("join the cgroup", error))?;
        let process = confine::spawn(&machines, cgroups)
            .map_err(|error| Failure::failed("start the machine's process", error))?;
        drop(machines);
        let message = Request { id: request, verb: Some(Verb::Start(start.clone())) };
        handover::send(&link, &message.encode_to_vec(), &parts.into_descriptors())
            .map_err(|error| Failure::failed("hand the machine what it is made of", error))?;
        Ok(Self {
            process,
            link: Some(link),
            console,
            start,
            starting: Some(request),
            checks: Vec::new(),
            started: false,
            words: Tail::default(),
            ended: None,
            _names: names,
        })
    }

    /// What to watch for reading.
    pub(crate) fn descriptors(&self) -> Vec<BorrowedFd<'_>> {
        let stderr = self.process.stderr.as_ref().map(AsFd::as_fd);
        let link = self.link.as_ref().map(AsFd::as_fd);
        [Some(self.process.descriptor()), link, self.console.descriptor(), stderr]
            .into_iter()
            .flatten()
            .collect()
    }

    pub(crate) fn has_started(&self) -> bool {
        self.started
    }

    /// Requests that wait for their answers.
    pub(crate) fn unanswered(&self) -> Vec<u64> {
        self.starting.into_iter().chain(self.checks.iter().copied()).collect()
    }

    /// Asks the machine's own process for a sign of life, which is answered later.
    pub(crate) fn check(&mut self, request: u64) {
        let message = Request { id: request, verb: Some(Verb::Check(Check {})) }.encode_to_vec();
        let flags = SendFlags::DONTWAIT | SendFlags::NOSIGNAL;
        // If it cannot be sent the machine has ended, which is seen too, or does not read, and so does not work.
        let _ = self.link.as_ref().map(|link| send(link, &message, flags));
        self.checks.push(request);
    }

    /// Reads what there is to read; gives the answers that are ready.
    pub(crate) fn listen(&mut self) -> Vec<Answer> {
        self.console.read();
        self.read_words();
        let mut answers = Vec::new();
        while let Some(reply) = self.hear() {
            match reply.result {
                Some(reply::Result::Started(started)) if self.starting == Some(reply.id) => {
                    self.started = true;
                    self.starting = None;
                    let started = Started { pid: self.process.pid(), ..started };
                    answers.push((reply.id, Ok(reply::Result::Started(started))));
                }
                Some(reply::Result::Error(error)) if self.starting == Some(reply.id) => {
                    self.starting = None;
                    let detail = one_line(&error.detail);
                    answers.push((reply.id, Err(Failure { code: ErrorCode::Failed, detail })));
                }
                Some(reply::Result::Done(done)) if self.checks.contains(&reply.id) => {
                    self.checks.retain(|check| *check != reply.id);
                    answers.push((reply.id, Ok(reply::Result::Done(done))));
                }
                Some(reply::Result::Event(event)) => {
                    if let Some(event::Kind::Ended(ended)) = event.kind {
                        self.ended.get_or_insert(ended);
                    }
                }
                _ => self.process.kill(),
            }
        }
        answers
    }

    /// The machine's next message. One that is none is its end.
    fn hear(&mut self) -> Option<Reply> {
        let link = self.link.as_ref()?;
        let mut bytes = [0; LONGEST];
        match recv(link, &mut bytes, RecvFlags::DONTWAIT) {
            Err(rustix::io::Errno::AGAIN | rustix::io::Errno::INTR) => None,
            Ok((count @ 1.., _)) => {
                let reply = Reply::decode(&bytes[..count]).ok();
                if reply.is_none() {
                    self.process.kill();
                }
                reply
            }
            Ok((0, _)) | Err(_) => {
                self.link = None;
                None
            }
        }
    }

    /// Changes a machine that runs, as far as it can be.
    pub(crate) fn change(&self, verb: &Verb) -> Result<reply::Result, Failure> {
        match verb {
            // All processors are there from the start, and which of them the guest uses is between it and its agent.
            Verb::SetCpus(wanted) if (1..=self.start.cpus_limit).contains(&wanted.count) => {
                Ok(reply::Result::Done(Done {}))
            }
            Verb::SetCpus(_) => {
                Err(Failure::invalid(format!("there must be 1 to {} processors", self.start.cpus_limit)))
            }
            Verb::SetMemory(wanted) if wanted.bytes == self.start.memory => Ok(reply::Result::Done(Done {})),
            Verb::SetMemory(_) => {
                Err(Failure::unsupported("this machine was started with memory that cannot change"))
            }
            _ => Err(Failure::unsupported("nothing can be plugged into, or out of, this machine")),
        }
    }

    fn read_words(&mut self) -> bool {
        let Some(stderr) = &self.process.stderr else { return false };
        let mut bytes = [0; 4096];
        match rustix::io::read(stderr, &mut bytes) {
            Ok(count @ 1..) => {
                self.words.push(&bytes[..count]);
                true
            }
            Err(rustix::io::Errno::INTR) => true,
            Err(rustix::io::Errno::AGAIN) => false,
            Ok(0) | Err(_) => {
                self.process.stderr = None;
                false
            }
        }
    }

    pub(crate) fn has_ended(&self) -> bool {
        let mut watched = [PollFd::from_borrowed_fd(self.process.descriptor(), PollFlags::IN)];
        poll(&mut watched, Some(&Timespec { tv_sec: 0, tv_nsec: 0 })).is_ok_and(|ready| ready > 0)
    }

    /// Why it has ended. Its sockets still hold its last words.
    pub(crate) fn end(mut self: Box<Self>) -> Ended {
        let status = self.process.wait();
        while self.console.read() {}
        while self.read_words() {}
        let console = self.console.tail();
        let (reason, detail) = verdict(self.ended.as_ref(), status, &console, &self.words.text());
        Ended { reason: reason.into(), detail: one_line(&detail), console }
    }
}

/// The reason and its words, from what the machine said, how its process ended, its console and what it wrote to stderr.
fn verdict(ended: Option<&Ended>, status: ExitStatus, console: &str, words: &str) -> (EndReason, String) {
    let panic = console.lines().rev().find_map(|line| line.find(PANIC).map(|at| line[at..].to_owned()));
    if let Some(ended) = ended {
        return match (ended.reason(), panic) {
            // A panicking kernel resets the machine (panic=-1).
            (EndReason::Panic | EndReason::Reset, Some(panic)) => (EndReason::Panic, panic),
            (reason, _) => (reason, ended.detail.clone()),
        };
    }
    let with_words = |text: String| match one_line(words) {
        words if words.is_empty() => text,
        words => format!("{text}: {words}"),
    };
    match (status.signal(), status.code()) {
        (Some(libc::SIGKILL), _) => (
            EndReason::Killed,
            "the machine was killed by SIGKILL, by the kernel for want of memory perhaps".to_owned(),
        ),
        (Some(libc::SIGTERM | libc::SIGINT | libc::SIGHUP), _) => {
            (EndReason::Killed, with_words("the machine was ended by a signal".to_owned()))
        }
        (Some(libc::SIGSYS), _) => (
            EndReason::Failure,
            with_words("the machine was killed for a system call that its sandbox forbids".to_owned()),
        ),
        (Some(signal), _) => {
            (EndReason::Failure, with_words(format!("the machine was killed by signal {signal}")))
        }
        (None, code) => {
            let code = code.unwrap_or_default();
            (EndReason::Failure, with_words(format!("the machine ended with exit code {code}")))
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_end_has_its_reason() {
        let panic = "[    1.5] Kernel panic - not syncing: sysrq triggered crash\n[    1.6] CPU: 0\n";
        let said =
            |reason: EndReason| Ended { reason: reason.into(), detail: "so".into(), ..Ended::default() };
        let judge = |ended: Option<EndReason>, raw: i32, console: &str| {
            verdict(ended.map(said).as_ref(), ExitStatus::from_raw(raw), console, "words\n")
        };
        assert_eq!(judge(Some(EndReason::PowerOff), 0, panic).0, EndReason::PowerOff);
        assert_eq!(judge(Some(EndReason::Reset), 0, ""), (EndReason::Reset, "so".to_owned()));
        let (reason, detail) = judge(Some(EndReason::Reset), 0, panic);
        assert_eq!(
            (reason, &*detail),
            (EndReason::Panic, "Kernel panic - not syncing: sysrq triggered crash")
        );
        assert_eq!(judge(Some(EndReason::Panic), 0, ""), (EndReason::Panic, "so".to_owned()));
        assert_eq!(judge(None, libc::SIGKILL, panic).0, EndReason::Killed);
        assert_eq!(judge(None, libc::SIGTERM, "").0, EndReason::Killed);
        let (reason, detail) = judge(None, libc::SIGSYS, "");
        assert!(reason == EndReason::Failure && detail.contains("forbids: words"), "{detail}");
        assert_eq!(judge(None, 1 << 8, "").1, "the machine ended with exit code 1: words");
    }
}
