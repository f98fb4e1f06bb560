//! A machine that runs, as the process that started it sees it: its process, what it says, its console, its end.

use std::ffi::CString;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::process::ExitStatus;
use std::time::{Duration, Instant};

use podvisor_hypervisor::console::{Console, Tail};
use podvisor_hypervisor::failure::{Failure, one_line};
use podvisor_hypervisor::keeper::{Answer, Machine, Outcome};
use podvisor_hypervisor::process::Process;
use podvisor_hypervisor::request::{self, MEMORY_STEP};
use podvisor_hypervisor::verdict::{of_process, panic_in};
use podvisor_proto::hypervisor::{
    AddImage, Check, Done, EndReason, Ended, ErrorCode, Reply, Request, Start, Started, event, reply,
    request::Verb,
};
use prost::Message;
use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::net::{RecvFlags, recv};

use crate::open::{self, Names};
use crate::{confine, handover};

/// The longest message of a machine.
const LONGEST: usize = 16 << 10;
/// How long a file server may take to say what it can do.
const SERVER_PATIENCE: Duration = Duration::from_secs(5);
/// Processors that a machine can have.
const MOST_PROCESSORS: u32 = 32;

/// A machine whose process runs.
#[derive(Debug)]
pub(crate) struct Up {
    process: Process,
    link: Option<OwnedFd>,
    console: Console,
    start: Start,
    /// The request for it, until it is answered.
    starting: Option<u64>,
    /// Requests to the machine's own process that it has not answered yet.
    asked: Vec<u64>,
    /// Connections to file servers that the machine speaks with for a request, and until when.
    servers: Vec<(u64, OwnedFd, Instant)>,
    started: bool,
    /// What it has written to stderr.
    words: Tail,
    /// How it ended, in its own words.
    ended: Option<Ended>,
    _names: Names,
}

impl Up {
    /// Opens everything, starts the process, and hands it over. What was made is gone again when it fails.
    pub(crate) fn begin(start: Start, request: u64) -> Result<Self, Failure> {
        let start = check(start)?;
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
            asked: Vec::new(),
            servers: Vec::new(),
            started: false,
            words: Tail::default(),
            ended: None,
            _names: names,
        })
    }

    /// Asks the machine's own process for a sign of life, which is answered later.
    fn check(&mut self, request: u64) {
        // If it cannot be sent the machine has ended, which is seen too, or does not read, and so does not work.
        let _ = self.send(request, Verb::Check(Check {}), &[]);
        self.asked.push(request);
    }

    fn send(&self, request: u64, verb: Verb, opened: &[OwnedFd]) -> std::io::Result<()> {
        let message = Request { id: request, verb: Some(verb) }.encode_to_vec();
        let link = self.link.as_ref().ok_or(std::io::ErrorKind::NotConnected)?;
        handover::send(link, &message, opened)
    }

    /// The machine has one thread for all that it is asked: a file server that says nothing is hung up on.
    fn hang_up(&mut self) {
        let asked = &self.asked;
        self.servers.retain(|(request, socket, deadline)| {
            let is_over = *deadline <= Instant::now();
            if is_over {
                // One that has hung up itself is no error.
                let _ = rustix::net::shutdown(socket, rustix::net::Shutdown::Both);
            }
            !is_over && asked.contains(request)
        });
    }

    /// Whether the machine owes an answer of that number, which has come now.
    fn was_asked(&mut self, request: u64) -> bool {
        let at = self.asked.iter().position(|asked| *asked == request);
        at.map(|at| self.asked.swap_remove(at)).is_some()
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

    /// Changes a machine that runs, as far as it can be. `None`: it is answered later.
    fn change(&mut self, request: u64, verb: Verb) -> Option<Outcome> {
        let done = Ok(reply::Result::Done(Done {}));
        match verb {
            // All processors are there from the start, and which of them the guest uses is between it and its agent.
            Verb::SetCpus(wanted) if (1..=self.start.cpus_limit).contains(&wanted.count) => Some(done),
            Verb::SetCpus(_) => {
                let limit = self.start.cpus_limit;
                Some(Err(Failure::invalid(format!("there must be 1 to {limit} processors"))))
            }
            Verb::SetMemory(wanted)
                if self.start.memory_limit == self.start.memory && wanted.bytes == self.start.memory =>
            {
                Some(done)
            }
            Verb::SetMemory(_) if self.start.memory_limit == self.start.memory => {
                Some(Err(Failure::unsupported("this machine was started with memory that cannot change")))
            }
            Verb::SetMemory(wanted) => {
                let (least, most) = (self.start.memory, self.start.memory_limit);
                if !wanted.bytes.is_multiple_of(MEMORY_STEP) || !(least..=most).contains(&wanted.bytes) {
                    let limits = format!("memory must be a multiple of 2 MiB from {least} to {most} bytes");
                    return Some(Err(Failure::invalid(limits)));
                }
                self.plug(request, verb).err().map(Err)
            }
            _ if !self.start.plugs => {
                Some(Err(Failure::unsupported("nothing can be plugged into, or out of, this machine")))
            }
            verb => self.plug(request, verb).err().map(Err),
        }
    }

    /// Hands the machine what a change needs.
    fn plug(&mut self, request: u64, mut verb: Verb) -> Result<(), Failure> {
        let failed = |error| Failure::failed("ask the machine to change its devices", error);
        let opened = open::device(&verb)?;
        // Its own process gets the files and can do nothing with their names.
        if let Verb::AddImage(AddImage { image: Some(image) }) = &mut verb {
            image.paths.clear();
        }
        let is_share = matches!(verb, Verb::AddShare(_));
        self.send(request, verb, &opened).map_err(failed)?;
        self.asked.push(request);
        if is_share {
            let deadline = Instant::now() + SERVER_PATIENCE;
            self.servers.extend(opened.into_iter().map(|socket| (request, socket, deadline)));
        }
        Ok(())
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
}

impl Machine for Up {
    const NAME: &'static str = "the machine";

    fn descriptors(&self) -> Vec<BorrowedFd<'_>> {
        let stderr = self.process.stderr.as_ref().map(AsFd::as_fd);
        let link = self.link.as_ref().map(AsFd::as_fd);
        [Some(self.process.descriptor()), link, self.console.descriptor(), stderr]
            .into_iter()
            .flatten()
            .collect()
    }

    fn deadline(&self) -> Option<Instant> {
        self.servers.iter().map(|(_, _, deadline)| *deadline).min()
    }

    fn has_started(&self) -> bool {
        self.started
    }

    fn has_ended(&self) -> bool {
        let mut watched = [PollFd::from_borrowed_fd(self.process.descriptor(), PollFlags::IN)];
        poll(&mut watched, Some(&Timespec { tv_sec: 0, tv_nsec: 0 })).is_ok_and(|ready| ready > 0)
    }

    fn unanswered(&self) -> Vec<u64> {
        self.starting.into_iter().chain(self.asked.iter().copied()).collect()
    }

    fn request(&mut self, request: u64, verb: Verb) -> Option<Outcome> {
        if matches!(verb, Verb::Check(_)) {
            self.check(request);
            return None;
        }
        self.change(request, verb)
    }

    fn listen(&mut self) -> Vec<Answer> {
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
                Some(result @ (reply::Result::Done(_) | reply::Result::Resized(_)))
                    if self.was_asked(reply.id) =>
                {
                    answers.push((reply.id, Ok(result)));
                }
                Some(reply::Result::Error(error)) if self.was_asked(reply.id) => {
                    let failure = Failure { code: error.code(), detail: one_line(&error.detail) };
                    answers.push((reply.id, Err(failure)));
                }
                Some(reply::Result::Event(event)) => {
                    if let Some(event::Kind::Ended(ended)) = event.kind {
                        self.ended.get_or_insert(ended);
                    }
                }
                _ => self.process.kill(),
            }
        }
        self.hang_up();
        answers
    }

    fn end(mut self) -> Ended {
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
    match ended.map(|ended| (ended.reason(), ended.detail.clone())) {
        // A panicking kernel resets the machine (panic=-1).
        Some((reason @ (EndReason::Panic | EndReason::Reset), detail)) => {
            panic_in(console).map_or((reason, detail), |panic| (EndReason::Panic, panic))
        }
        Some(said) => said,
        None => of_process("the machine", status, words),
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
    Ok(start)
}

#[cfg(test)]
mod tests {
    use std::os::unix::process::ExitStatusExt;

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
        assert_eq!(judge(None, libc::SIGKILL, "").0, EndReason::Killed);
        assert_eq!(judge(None, 1 << 8, "").1, "the machine ended with exit code 1: words");
    }
}
