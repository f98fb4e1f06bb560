//! What there is in the guest, and the loop that everything happens in.

use std::collections::BTreeMap;
use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::path::PathBuf;
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use podvisor_cgroup::Layout;
use podvisor_proto::agent::open::Stream;
use podvisor_proto::agent::{Exit, StandardStream};
use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::process::{Pid, WaitOptions, WaitStatus, wait};

use crate::awaited::Awaited;
use crate::boot::Duties;
use crate::clock::Clock;
use crate::connect::Connecting;
use crate::container::Container;
use crate::control::Control;
use crate::events::Events;
use crate::exec::Exec;
use crate::failure::Failure;
use crate::init::Init;
use crate::listen::{Listeners, accept};
use crate::places::Places;
use crate::pod::Pod;
use crate::streams::{self, Pump, Standard, Streams};
use crate::sys;

/// Ends of children that nobody was known by. A child can end before the request that made it is over.
const STRAYS: usize = 64;

/// Everything.
#[derive(Debug)]
pub(crate) struct Agent {
    listeners: Listeners,
    children: OwnedFd,
    /// As the first process of a guest.
    pub(crate) duties: Option<Duties>,
    pub(crate) control: Option<Control>,
    /// How many requests there have been: a number for each, whichever connection it came over.
    pub(crate) requests: u64,
    pub(crate) awaited: Awaited,
    pub(crate) places: Places,
    pub(crate) events: Events,
    pub(crate) streams: Streams,
    pub(crate) connecting: Connecting,
    pub(crate) cgroups: Layout,
    pub(crate) pod: Pod,
    pub(crate) containers: BTreeMap<String, Container>,
    pub(crate) execs: BTreeMap<String, Exec>,
    pub(crate) clock: Clock,
    pub(crate) ending: bool,
}

/// What a watched descriptor is.
#[derive(Debug, Clone)]
enum Source {
    Children,
    Devices,
    ControlListener,
    StreamListener,
    Control,
    Stream(u64),
    /// A connection to a port of the pod that is being made.
    Connecting(u64),
    /// What a container's or exec's process says while it is being prepared.
    Preparation(String),
    ExecPreparation(String),
    Memory(String),
}

/// Descriptors with what each is.
#[derive(Debug, Default)]
struct Watched<'a> {
    sources: Vec<Source>,
    descriptors: Vec<PollFd<'a>>,
}

impl<'a> Watched<'a> {
    fn add(&mut self, source: Source, descriptor: BorrowedFd<'a>, flags: PollFlags) {
        self.sources.push(source);
        self.descriptors.push(PollFd::from_borrowed_fd(descriptor, flags));
    }

    /// Sleeps until something is ready, or for `limit`.
    fn wait(mut self, limit: Option<Duration>) -> io::Result<Vec<(Source, PollFlags)>> {
        // Short ones only.
        let limit = limit.and_then(|limit| Timespec::try_from(limit).ok());
        match poll(&mut self.descriptors, limit.as_ref()) {
            Ok(_) => {}
            Err(rustix::io::Errno::INTR) => return Ok(Vec::new()),
            Err(error) => return Err(error.into()),
        }
        let ready = self.descriptors.iter().map(PollFd::revents);
        Ok(self.sources.into_iter().zip(ready).filter(|(_, flags)| !flags.is_empty()).collect())
    }
}

impl Agent {
    pub(crate) fn new(listeners: Listeners, cgroups: PathBuf, duties: Option<Duties>) -> io::Result<Self> {
        sys::adopt_orphans()?;
        Ok(Self {
            listeners,
            children: sys::child_signals()?,
            duties,
            control: None,
            requests: 0,
            awaited: Awaited::default(),
            places: Places::default(),
            events: Events::default(),
            streams: Streams::default(),
            connecting: Connecting::default(),
            cgroups: Layout::V2 { mount: cgroups },
            pod: Pod::default(),
            containers: BTreeMap::new(),
            execs: BTreeMap::new(),
            clock: Clock::default(),
            ending: false,
        })
    }

    /// Serves until it is told to end.
    pub(crate) fn run(mut self) -> io::Result<()> {
        let mut buffer = streams::buffer();
        while !self.ending {
            let ready = self.wait()?;
            if ready.is_empty()
                && let Some(duties) = &mut self.duties
            {
                duties.load_next();
            }
            let news = ready.iter().any(|(source, _)| matches!(source, Source::Devices));
            if self.awaited.are_due(news) {
                self.retry();
            }
            self.give_up_connecting();
            for (source, flags) in ready {
                self.handle(source, flags, &mut buffer);
            }
            if self.control.as_ref().is_some_and(Control::is_over) {
                self.control = None;
            }
        }
        if let Some(control) = &mut self.control {
            control.write();
        }
        Ok(())
    }

    fn wait(&self) -> io::Result<Vec<(Source, PollFlags)>> {
        let mut watched = Watched::default();
        watched.add(Source::Children, self.children.as_fd(), PollFlags::IN);
        if let Some(duties) = &self.duties {
            watched.add(Source::Devices, duties.devices.descriptor(), PollFlags::IN);
        }
        watched.add(Source::ControlListener, self.listeners.control.as_fd(), PollFlags::IN);
        watched.add(Source::StreamListener, self.listeners.stream.as_fd(), PollFlags::IN);
        if let Some(control) = &self.control {
            let write = if control.wants_to_write() { PollFlags::OUT } else { PollFlags::empty() };
            watched.add(Source::Control, control.descriptor(), PollFlags::IN | write);
        }
        for (id, container) in &self.containers {
            if let Some(preparation) = container.preparation() {
                watched.add(Source::Preparation(id.clone()), preparation, PollFlags::IN);
            }
            if let Some(memory) = container.memory_events() {
                watched.add(Source::Memory(id.clone()), memory, PollFlags::PRI);
            }
        }
        for (id, exec) in &self.execs {
            if let Some(preparation) = exec.preparation() {
                watched.add(Source::ExecPreparation(id.clone()), preparation, PollFlags::IN);
            }
        }
        let wanted = self.streams.wanted();
        for wanted in &wanted {
            let mut flags = PollFlags::empty();
            flags.set(PollFlags::IN, wanted.read);
            flags.set(PollFlags::OUT, wanted.write);
            watched.add(Source::Stream(wanted.key), wanted.descriptor, flags);
        }
        for (key, socket) in self.connecting.watched() {
            watched.add(Source::Connecting(key), socket, PollFlags::OUT);
        }
        watched.wait(self.limit())
    }

    /// How long to sleep at most.
    fn limit(&self) -> Option<Duration> {
        if self.duties.as_ref().is_some_and(|duties| !duties.modules.is_empty()) {
            return Some(Duration::ZERO);
        }
        self.awaited.interval().into_iter().chain(self.connecting.limit()).min()
    }

    fn handle(&mut self, source: Source, flags: PollFlags, buffer: &mut [u8]) {
        match source {
            Source::Children => {
                // What it holds says nothing that waiting does not; it only has to be emptied.
                while rustix::io::read(&self.children, &mut buffer[..1024]).is_ok() {}
                self.reap();
            }
            Source::Devices => {
                if let Some(duties) = &self.duties {
                    duties.devices.read();
                }
            }
            Source::ControlListener => {
                if let Some(socket) = accept(&self.listeners.control) {
                    // The newest counts: its predecessor may hang where nobody sees it.
                    self.control = Some(Control::new(socket));
                }
            }
            Source::StreamListener => {
                if let Some(socket) = accept(&self.listeners.stream) {
                    self.streams.accept(socket);
                }
            }
            Source::Control => {
                let Some(control) = &mut self.control else { return };
                if flags.contains(PollFlags::OUT) {
                    control.write();
                }
                if flags.intersects(PollFlags::IN | PollFlags::HUP | PollFlags::ERR) {
                    for request in control.read() {
                        self.serve(request);
                    }
                }
            }
            Source::Connecting(key) => self.connected(key),
            Source::Stream(key) => match self.streams.opened(key) {
                Some((connection, Stream::Connect(wanted))) => self.connect(connection, wanted.port),
                Some((connection, open)) => {
                    let pump = self.open(&open);
                    self.streams.carry(connection, pump);
                }
                None => {
                    if let Some(abandoned) = self.streams.advance(key, buffer)
                        && let Some(standard) = self.standard(&abandoned.id)
                    {
                        match abandoned.which {
                            StandardStream::Stderr => standard.stderr = Some(abandoned.end),
                            _ => standard.stdout = Some(abandoned.end),
                        }
                    }
                }
            },
            Source::Preparation(id) => self.container_prepared(&id),
            Source::ExecPreparation(id) => self.exec_prepared(&id),
            Source::Memory(id) => self.memory_changed(&id),
        }
    }

    /// The standard streams of a container or exec.
    fn standard(&mut self, id: &str) -> Option<&mut Standard> {
        match self.containers.get_mut(id) {
            Some(container) => Some(&mut container.standard),
            None => self.execs.get_mut(id).map(|exec| &mut exec.standard),
        }
    }

    fn open(&mut self, open: &Stream) -> Result<Pump, Failure> {
        match open {
            Stream::Standard(wanted) => {
                streams::standard(self.standard(&wanted.id), &wanted.id, wanted.which)
            }
            Stream::Connect(_) => Err(Failure::state("a connection is made beside the loop")),
            Stream::Console(_) => crate::console::open(),
        }
    }

    /// Reaps every child that has ended.
    fn reap(&mut self) {
        while let Ok(Some((pid, status))) = wait(WaitOptions::NOHANG) {
            self.ended(pid, status);
        }
    }

    fn ended(&mut self, pid: Pid, status: WaitStatus) {
        let exit = Exit { code: code_of(status), finished_at: now(), oom_killed: false };
        let container = self.containers.iter().find(|(_, container)| container.pid() == Some(pid));
        if let Some(id) = container.map(|(id, _)| id.clone()) {
            return self.container_ended(&id, exit);
        }
        let exec = self.execs.iter().find(|(_, exec)| exec.pid() == Some(pid));
        if let Some(id) = exec.map(|(id, _)| id.clone()) {
            return self.exec_ended(&id, exit);
        }
        if self.pod.init.as_ref().and_then(Init::pid) == Some(pid) {
            return self.init_ended(exit);
        }
        // An orphan of a container's, or a child that ended before its request was over: the latter is asked for.
        self.pod.strays.push_back((pid, exit));
        if self.pod.strays.len() > STRAYS {
            self.pod.strays.pop_front();
        }
    }

    /// Tells the monitor, now if it listens, else when it comes back.
    pub(crate) fn tell_exit(&mut self, id: &str, exit: Exit) {
        let event = self.events.exited(id, exit);
        if let Some(control) = self.control.as_mut().filter(|control| control.greeted) {
            control.tell(event);
        }
    }

    pub(crate) fn tell_out_of_memory(&mut self, id: &str) {
        let event = self.events.out_of_memory(id);
        if let Some(control) = self.control.as_mut().filter(|control| control.greeted) {
            control.tell(event);
        }
    }
}

/// 128 + signal when it was killed by one.
fn code_of(status: WaitStatus) -> i32 {
    match (status.exit_status(), status.terminating_signal()) {
        (Some(code), _) => code,
        (None, Some(signal)) => 128 + signal,
        (None, None) => 255,
    }
}

/// ns since the epoch.
pub(crate) fn now() -> i64 {
    let since = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
    i64::try_from(since.as_nanos()).unwrap_or(i64::MAX)
}
