//! The monitor's state and its loop: sleep until something is ready, do it, never wait inside.

use std::collections::BTreeMap;
use std::io;
use std::os::fd::{BorrowedFd, OwnedFd};
use std::path::PathBuf;
use std::time::Instant;

use podvisor_proto::monitor as proto;
use rustix::event::{EventfdFlags, eventfd};
use rustix::net::{SocketFlags, accept_with};
use rustix::process::{Pid, WaitOptions, WaitStatus, wait};

use crate::connection::{Connection, Role};
use crate::console::ListeningSocket;
use crate::container::{Container, State};
use crate::disk::{Disk, Done};
use crate::exec::Exec;
use crate::forward::Forward;
use crate::guest::Machine;
use crate::journal::Journal;
use crate::output::lines::Stream;
use crate::pod_init::PodInit;
use crate::poll::{Interest, Poller, Ready, Timer, Timers, Token, Watch};
use crate::port::Port;
use crate::process::exit_code;
use crate::runtime::{Call, Purpose, Stopped};
use crate::strays::Strays;
use crate::sys;

/// Bytes read from a process at once. A CRI line has as many at most, and a short line grows to forty times its size
/// in the log, so more would only make the bound on what waits for the disk softer.
const READ_AT_ONCE: usize = 16 * 1024;

/// The pod that adopted this monitor.
#[derive(Debug)]
pub(crate) struct Pod {
    pub(crate) id: String,
    pub(crate) run_dir: PathBuf,
    pub(crate) state_dir: PathBuf,
    /// `None`: the host's.
    pub(crate) network_namespace: Option<PathBuf>,
    pub(crate) listener: ListeningSocket,
    pub(crate) listener_watch: Watch,
}

/// Everything a monitor knows.
#[derive(Debug)]
pub(crate) struct Monitor {
    pub(crate) poller: Poller,
    pub(crate) timers: Timers,
    pub(crate) disk: Disk,
    pub(crate) journal: Journal,
    pub(crate) pod: Option<Pod>,
    pub(crate) connections: BTreeMap<u64, Connection>,
    pub(crate) containers: BTreeMap<u64, Container>,
    pub(crate) execs: BTreeMap<u64, Exec>,
    pub(crate) calls: BTreeMap<u64, Call>,
    pub(crate) ports: BTreeMap<u64, Port>,
    pub(crate) forwards: BTreeMap<u64, Forward>,
    pub(crate) init: Option<PodInit>,
    /// The pod's virtual machine, in place of an init.
    pub(crate) machine: Option<Box<Machine>>,
    pub(crate) strays: Strays,
    /// The monitor is about to end: it only waits for its last replies to be taken.
    pub(crate) farewell: bool,
    /// Who is answered when the init has ended, before the monitor ends.
    pub(crate) farewells: Vec<crate::verbs::ReplyTo>,
    pub(crate) buffer: Box<[u8]>,
    /// The daemon's connection that the monitor was started with.
    cradle: u64,
    next_key: u64,
    children_waker: BorrowedFd<'static>,
}

impl Monitor {
    /// A monitor that waits to be adopted, with the daemon at the other end of `control`.
    pub(crate) fn new(control: OwnedFd) -> io::Result<Self> {
        let poller = Poller::new()?;
        let children_waker = sys::catch_signals(eventfd(0, EventfdFlags::CLOEXEC | EventfdFlags::NONBLOCK)?)?;
        // Containers are created by an OCI runtime that ends; they become children of the nearest subreaper.
        rustix::process::set_child_subreaper(Some(rustix::process::getpid()))?;
        let disk = Disk::start()?;
        Watch::new(Token::Children).set(&poller, children_waker, Some(Interest::READ))?;
        Watch::new(Token::Disk).set(&poller, disk.waker(), Some(Interest::READ))?;
        let mut monitor = Self {
            poller,
            timers: Timers::default(),
            disk,
            journal: Journal::default(),
            pod: None,
            connections: BTreeMap::new(),
            containers: BTreeMap::new(),
            execs: BTreeMap::new(),
            calls: BTreeMap::new(),
            ports: BTreeMap::new(),
            forwards: BTreeMap::new(),
            init: None,
            machine: None,
            strays: Strays::default(),
            farewell: false,
            farewells: Vec::new(),
            buffer: vec![0; READ_AT_ONCE].into(),
            cradle: 0,
            next_key: 0,
            children_waker,
        };
        crate::stdio::set_nonblocking(&control)?;
        monitor.cradle = monitor.add_connection(control);
        Ok(monitor)
    }

    /// A number for a new thing, never given before.
    pub(crate) fn new_key(&mut self) -> u64 {
        self.next_key += 1;
        self.next_key
    }

    /// Works until the monitor is to end.
    pub(crate) fn run(mut self) -> io::Result<()> {
        let mut ready = Vec::new();
        loop {
            self.sweep();
            if self.is_over() {
                return Ok(());
            }
            self.poller.wait(self.timers.next(), &mut ready)?;
            for event in &ready {
                self.on_ready(*event);
            }
            // What is set meanwhile has its turn in the next round, however soon it is due: floods are read by timers, and reading takes time.
            let now = Instant::now();
            while let Some(timer) = self.timers.due(now) {
                self.on_timer(timer);
            }
        }
    }

    /// Whether the daemon that started this monitor still holds its end of the connection.
    pub(crate) fn daemon_is_there(&self) -> bool {
        use rustix::event::{PollFd, PollFlags, poll};
        let Some(cradle) = self.connections.get(&self.cradle) else { return false };
        let mut polled = [PollFd::new(&cradle.channel.socket, PollFlags::RDHUP)];
        let now = rustix::event::Timespec { tv_sec: 0, tv_nsec: 0 };
        let gone = PollFlags::RDHUP | PollFlags::HUP | PollFlags::ERR;
        poll(&mut polled, Some(&now)).is_ok() && !polled[0].revents().intersects(gone)
    }

    fn is_over(&self) -> bool {
        if self.farewell {
            return self.connections.values().all(|connection| connection.channel.queued() == 0);
        }
        self.pod.is_none() && !self.connections.contains_key(&self.cradle)
    }

    fn on_ready(&mut self, event: Ready) {
        match event.token {
            Token::Children => self.reap(),
            Token::Disk => self.disk_done(),
            Token::Listener => self.accept(),
            Token::Connection(key) => {
                if event.readable {
                    self.read_connection(key);
                }
                if let Some(connection) = self.connections.get_mut(&key) {
                    if event.writable {
                        connection.channel.flush(&self.poller);
                        self.client_took_output(key);
                    } else if event.hung_up && !(event.readable && connection.channel.reads()) {
                        // What it sent before it went has been read, or has nowhere to go.
                        connection.channel.abort();
                    }
                }
            }
            Token::Stdin(key) => self.flush_input(key),
            Token::Stdout(key) => self.pump(key, Stream::Stdout),
            Token::Stderr(key) => self.pump(key, Stream::Stderr),
            Token::Oom(key) => self.memory_event(key),
            Token::Port(key) => self.port_ready(key),
            Token::Hypervisor(key) => self.hypervisor_ready(key, event),
            Token::Agent(key) => self.agent_ready(key, event),
            Token::Dial(key) => self.dial_ready(key),
            Token::FilesReady(key) => self.files_ready(key),
            Token::Words(key) => self.program_speaks(key),
            Token::MachineGone(key) => self.machine_process_gone(key),
            Token::Volumes => self.volumes_changed(),
        }
    }

    fn on_timer(&mut self, timer: Timer) {
        match timer {
            Timer::Call(key) => {
                if let Some(call) = self.calls.get_mut(&key) {
                    call.stop(Stopped::Late);
                }
            }
            Timer::Exec(key) => self.exec_time_is_over(key),
            Timer::Drain(key) => self.drain_time_is_over(key),
            Timer::Output(key) => self.rested(key),
            Timer::Checkpoint(key) => self.checkpoint_time_is_over(key),
            Timer::Oom(key, looks) => self.look_for_oom_kills(key, looks),
            Timer::Port(key) => self.port_time_is_over(key),
            Timer::Init => self.init_time_is_over(),
            Timer::Machine(key) => self.machine_time_is_over(key),
            Timer::Dial(key) => self.dial_time_is_over(key),
            Timer::Request(id) => self.request_time_is_over(id),
            Timer::Pulse => self.pulse_is_due(),
            Timer::Accept => self.listen(true),
            Timer::Farewell => self.connections.clear(),
        }
    }

    fn pump(&mut self, key: u64, stream: Stream) {
        if self.containers.contains_key(&key) {
            self.pump_container(key, stream);
        } else {
            self.pump_exec(key, stream);
        }
    }

    fn drain_time_is_over(&mut self, key: u64) {
        if self.containers.contains_key(&key) {
            self.container_drain_is_over(key);
        } else {
            self.exec_drain_is_over(key);
        }
    }

    fn accept(&mut self) {
        while let Some(pod) = &self.pod {
            match accept_with(&pod.listener.socket, SocketFlags::CLOEXEC | SocketFlags::NONBLOCK) {
                Ok(socket) => drop(self.add_connection(socket)),
                Err(rustix::io::Errno::AGAIN | rustix::io::Errno::INTR) => return,
                Err(error) => {
                    // No descriptors left, most likely. The client waits in the queue, and the socket stays readable.
                    self.journal.note("accept failed", &pod.id, &error);
                    self.listen(false);
                    self.timers.set(std::time::Duration::from_secs(1), Timer::Accept);
                    return;
                }
            }
        }
    }

    fn listen(&mut self, on: bool) {
        if let Some(pod) = &mut self.pod {
            let _ = pod.listener_watch.set(&self.poller, &pod.listener.socket, on.then_some(Interest::READ));
        }
    }

    fn add_connection(&mut self, socket: OwnedFd) -> u64 {
        let key = self.new_key();
        let mut connection = Connection::new(key, socket);
        connection.channel.watch(&self.poller);
        self.connections.insert(key, connection);
        key
    }

    /// Drops the connections that are over, with what was done for them alone.
    fn sweep(&mut self) {
        self.sweep_machine();
        loop {
            let over = self
                .connections
                .iter()
                .find(|(_, connection)| connection.channel.is_over())
                .map(|(key, _)| *key);
            let Some((key, connection)) = over.and_then(|key| self.connections.remove_entry(&key)) else {
                return;
            };
            if let Role::Attach { container, stdin } = connection.role {
                self.detach(key, container, stdin);
            }
            connection.channel.end(&self.poller);
            self.ports_abandoned(key);
            self.dials_abandoned(key);
            self.execs_abandoned(key);
            self.checkpoints_abandoned(key);
        }
    }

    /// Collects every child that has ended.
    fn reap(&mut self) {
        let _ = rustix::io::read(self.children_waker, &mut [0u8; 8]);
        while let Ok(Some((pid, status))) = wait(WaitOptions::NOHANG) {
            if status.exited() || status.signaled() {
                self.child_ended(pid, status);
            }
        }
    }

    fn child_ended(&mut self, pid: Pid, status: WaitStatus) {
        if let Some(key) = self.calls.iter().find(|(_, call)| call.pid == pid).map(|(key, _)| *key) {
            self.call_ended(key, status);
        } else if let Some(key) =
            self.containers.iter().find(|(_, it)| it.pid() == Some(pid)).map(|(key, _)| *key)
        {
            self.container_ended(key, exit_code(status));
        } else if let Some(key) = self.execs.iter().find(|(_, it)| it.pid() == Some(pid)).map(|(key, _)| *key)
        {
            self.exec_ended(key, exit_code(status));
        } else if self.init.as_ref().is_some_and(|init| init.pid() == Some(pid)) {
            self.init_ended(pid, status);
        } else if self.machine.as_ref().is_some_and(|machine| machine.owns(pid)) {
            self.machine_program_ended(pid, status);
        } else if self.pid_files_expected() {
            self.strays.add(pid, status);
        }
    }

    /// A pid that is not known yet may soon be: somebody is about to write a pid file.
    fn pid_files_expected(&self) -> bool {
        self.init.as_ref().is_some_and(PodInit::is_starting)
            || self.calls.values().any(|call| matches!(call.purpose, Purpose::Create(_) | Purpose::Exec(_)))
    }

    fn call_ended(&mut self, key: u64, status: WaitStatus) {
        let Some(call) = self.calls.remove(&key) else { return };
        if let Some(deadline) = call.deadline {
            self.timers.cancel(deadline);
        }
        let outcome = call.runtime.outcome(&call, status);
        let _ = std::fs::remove_file(&call.log);
        match call.purpose {
            Purpose::Create(container) => self.create_ended(container, outcome),
            Purpose::Start(container, to) => self.start_ended(container, to, outcome),
            Purpose::Update(to, file) => {
                let _ = std::fs::remove_file(file);
                self.reply(to, outcome.map(|()| proto::reply::Result::Done(proto::Done {})));
            }
            Purpose::Delete(container) => self.removal_ended(container, outcome),
            Purpose::Wait(container, file) => self.wait_ended(container, &file, outcome),
            Purpose::Kill(container, to) => self.kill_ended(container, to, outcome),
            Purpose::Forward(port) => self.forwarded(port, outcome),
            Purpose::CleanUp(container) => {
                if let Err(failure) = outcome {
                    self.journal.note(
                        "clean up after a failed create",
                        &failure.detail,
                        &failure.runtime_log,
                    );
                }
                self.creation_undone(container);
            }
            Purpose::Exec(exec) => self.exec_call_ended(exec, outcome),
            Purpose::Checkpoint(container) => self.checkpoint_call_ended(container, outcome),
        }
        if !self.pid_files_expected() {
            self.strays = Strays::default();
        }
    }

    fn disk_done(&mut self) {
        self.disk.quiet();
        // No more than was done before any of it is looked at: what is read of a flood, as soon as there is room for it, is written while the
        // next is read, and nothing else would have its turn.
        let done: Vec<Done> = std::iter::from_fn(|| self.disk.next()).collect();
        for done in done {
            match done {
                Done::Opened { key, result } => self.log_opened(key, result),
                Done::Written { key, lines } => self.log_written(key, lines),
                Done::Reopened { key, result } => self.log_reopened(key, result),
                Done::Recorded { key, result } => {
                    if let Err(error) = result {
                        self.journal.note("the exit record is not durable", &key.to_string(), &error);
                    }
                    if self.containers.contains_key(&key) {
                        self.container_recorded(key);
                    } else if self.machine.is_some() {
                        self.machine_recorded();
                    } else {
                        self.init_recorded(key);
                    }
                }
            }
        }
    }

    /// Ends the monitor, unless somebody still needs it.
    pub(crate) fn shutdown(&mut self, to: crate::verbs::ReplyTo) -> crate::verbs::Answered {
        if let Some(container) = self.containers.values().next() {
            let detail = format!("container {} still exists", container.id);
            return Err(crate::failure::Failure::wrong_state(detail));
        }
        if self.end_init(to) || self.shut_machine_down(to) {
            return Ok(crate::verbs::Answer::Later);
        }
        self.say_farewell();
        Ok(crate::verbs::Answer::DONE)
    }

    /// From now on only the last replies go out.
    pub(crate) fn say_farewell(&mut self) {
        const PATIENCE: std::time::Duration = std::time::Duration::from_secs(1);
        self.farewell = true;
        self.timers.set(PATIENCE, Timer::Farewell);
        if let Some(pod) = &self.pod {
            let _ = std::fs::remove_file(&pod.listener.path);
        }
    }

    /// The containers and the pod's init or machine.
    pub(crate) fn list_processes(&self) -> Vec<proto::Process> {
        let containers =
            self.containers.values().filter(|container| !matches!(container.state, State::Failed { .. }));
        let init = self.pod.as_ref().zip(self.init.as_ref()).map(|(pod, init)| init.describe(&pod.id));
        let machine = self.pod.as_ref().zip(self.machine.as_ref()).map(|(pod, it)| it.describe(&pod.id));
        containers.map(Container::describe).chain(init).chain(machine).collect()
    }
}
