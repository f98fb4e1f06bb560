//! StartVm: the file server listens, the hypervisor makes the machine, the agent answers and makes the guest the pod's. One step after
//! the other, each begun by the end of the one before it, all within one time limit.

use std::os::fd::AsRawFd;
use std::path::PathBuf;
use std::time::{Duration, Instant};

use podvisor_proto::agent::{self as wire, AddShare, HelloReply, StartInit, reply, request::Verb};
use podvisor_proto::hypervisor::{Share, Started};
use podvisor_proto::monitor::{self as proto, StartVm, VmStarted};
use rustix::pipe::{PipeFlags, pipe_with};
use rustix::process::{Pid, Resource, Rlimit, getrlimit};
use rustix::rand::{GetRandomFlags, getrandom};

use super::agent::{Agent, Outcome, Purpose, confused};
use super::bounds::line;
use super::dial::Goal;
use super::end::Cause;
use super::hypervisor::{Hypervisor, spawn_with};
use super::resize::Size;
use super::{FileServer, Machine, MachineProcess, Stage, leash};
use crate::failure::{Failure, check_absolute};
use crate::monitor::Monitor;
use crate::output::timestamp;
use crate::poll::{Interest, Timer, TimerId, Token, Watch};
use crate::process::Relative;
use crate::verbs::{Answer, Answered, ReplyTo};

/// For a request that names no time limit.
const LIMIT: Duration = Duration::from_secs(60);
/// Bytes of randomness that a guest begins with.
const SEED: usize = 64;

/// A machine that is being started.
#[derive(Debug)]
pub(super) struct Starting {
    pub(super) waiting: Vec<ReplyTo>,
    wanted: StartVm,
    pub(super) step: Step,
    until: Instant,
    pub(super) timer: TimerId,
    answer: VmStarted,
}

/// What is being done.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Step {
    Files,
    Machine,
    Reach,
    Greet,
    Personalise,
    Share,
    Interface(usize),
    Init,
}

impl Step {
    pub(super) fn what(self) -> &'static str {
        match self {
            Self::Files => "start the file server",
            Self::Machine => "start the machine",
            Self::Reach => "reach the agent in the guest",
            Self::Greet => "greet the agent in the guest",
            Self::Personalise => "make the guest the pod's",
            Self::Share => "mount the pod's files in the guest",
            Self::Interface(_) => "configure a network interface in the guest",
            Self::Init => "start the pod's init in the guest",
        }
    }

    /// The next one that is wanted.
    fn next(self, wanted: &StartVm) -> Option<Self> {
        let step = match self {
            Self::Files => Self::Machine,
            Self::Machine => Self::Reach,
            Self::Reach => Self::Greet,
            Self::Greet => Self::Personalise,
            Self::Personalise => Self::Share,
            Self::Share => Self::Interface(0),
            Self::Interface(index) => Self::Interface(index + 1),
            Self::Init => return None,
        };
        match step {
            Self::Share if wanted.file_server.is_none() => step.next(wanted),
            Self::Interface(index) if index >= wanted.interfaces.len() => wanted.init.then_some(Self::Init),
            step => Some(step),
        }
    }
}

impl Monitor {
    /// Joins a start that is under way, and answers again for a machine that runs: a daemon that was started again repeats what the one
    /// before it had begun.
    pub(crate) fn start_vm(&mut self, to: ReplyTo, request: StartVm) -> Answered {
        match self.machine.as_mut().map(|machine| &mut machine.stage) {
            None => {}
            Some(Stage::Starting(starting)) => {
                starting.waiting.push(to);
                return Ok(Answer::Later);
            }
            Some(Stage::Running(answer)) => {
                return Ok(Answer::Now(proto::reply::Result::VmStarted(VmStarted::clone(answer))));
            }
            Some(_) => return self.running_machine().map(|_| Answer::DONE),
        }
        check(&request)?;
        if self.init.is_some() || !self.containers.is_empty() {
            return Err(Failure::wrong_state("the pod has an init or containers on the host"));
        }
        let machine = request.machine.clone().unwrap_or_default();
        let key = self.new_key();
        let size = Size { memory: machine.memory, cpus: machine.cpus, huge_pages: Vec::new() };
        let hypervisor = Hypervisor::spawn(key, &request.hypervisor, &self.poller).map_err(|error| {
            Failure::vm(format!("execute {}: {error}", request.hypervisor), String::new())
        })?;
        let files_key = self.new_key();
        let files = request.file_server.as_ref().map(|wanted| {
            FileServer::spawn(files_key, wanted, &self.poller)
                .map_err(|error| Failure::vm(format!("execute {}: {error}", wanted.program), String::new()))
        });
        let files = match files.transpose() {
            Ok(files) => files,
            Err(failure) => {
                hypervisor.program.kill();
                return Err(failure);
            }
        };
        let limit = match request.timeout_ms {
            0 => LIMIT,
            limit => Duration::from_millis(limit.into()),
        };
        let starting = Starting {
            waiting: vec![to],
            step: Step::Files,
            until: Instant::now() + limit,
            timer: self.timers.set(limit, Timer::Machine(key)),
            answer: VmStarted {
                hypervisor_pid: hypervisor.program.pid().as_raw_pid(),
                file_server_pid: files.as_ref().map_or(0, |files| files.program.pid().as_raw_pid()),
                ..VmStarted::default()
            },
            wanted: request,
        };
        let served = files.is_some();
        self.machine = Some(Box::new(Machine {
            key,
            stage: Stage::Starting(Box::new(starting)),
            files,
            hypervisor,
            agent: Agent::default(),
            dials: Default::default(),
            volumes: Default::default(),
            devices: Default::default(),
            started_with: size.memory,
            size,
            resizing: None,
            vsock: PathBuf::from(machine.vsock_path),
            console: PathBuf::from(machine.console_path),
            process: None,
        }));
        if !served {
            self.next_step();
        }
        Ok(Answer::Later)
    }

    fn starting(&mut self) -> Option<&mut Starting> {
        match &mut self.machine.as_mut()?.stage {
            Stage::Starting(starting) => Some(starting),
            _ => None,
        }
    }

    /// The file server has closed its descriptor, or written to it: it listens. Or it has ended, which is seen when it is reaped: then
    /// there is no socket.
    pub(crate) fn files_ready(&mut self, key: u64) {
        let Self { machine: Some(machine), poller, .. } = self else { return };
        let Some(files) = machine.files.as_mut().filter(|files| files.key == key) else { return };
        let Some((ready, mut watch)) = files.ready.take() else { return };
        let _ = watch.set(poller, &ready, None);
        if files.socket.exists() && self.starting().is_some_and(|starting| starting.step == Step::Files) {
            self.next_step();
        }
    }

    /// Begins the step that follows.
    fn next_step(&mut self) {
        let Some(starting) = self.starting() else { return };
        let Some(step) = starting.step.next(&starting.wanted) else { return self.machine_started() };
        starting.step = step;
        let wanted = &mut starting.wanted;
        let verb = match step {
            Step::Files | Step::Greet => return,
            Step::Machine => return self.tell_hypervisor(),
            Step::Reach => {
                let until = starting.until;
                return self.dial(Goal::Control, Some(until));
            }
            Step::Personalise => match personalise(wanted.personalise.take().unwrap_or_default()) {
                Ok(personalise) => Verb::Personalise(personalise),
                Err(error) => {
                    return self.end_machine(Cause::guest(format!("randomness for the guest: {error}")));
                }
            },
            Step::Share => {
                let tag = wanted.file_server.as_ref().map(|files| files.tag.clone()).unwrap_or_default();
                Verb::AddShare(AddShare { tag, read_only: false })
            }
            Step::Interface(index) => Verb::AddInterface(wanted.interfaces[index].clone()),
            Step::Init => Verb::StartInit(StartInit {}),
        };
        self.tell_agent(verb, Purpose::Boot);
    }

    fn tell_hypervisor(&mut self) {
        let Self { machine: Some(machine), poller, .. } = self else { return };
        let Stage::Starting(starting) = &mut machine.stage else { return };
        let mut start = starting.wanted.machine.take().unwrap_or_default();
        if let Some(files) = &starting.wanted.file_server {
            start.shares.push(Share { tag: files.tag.clone(), socket_path: files.socket_path.clone() });
        }
        machine.hypervisor.start(start, poller);
    }

    /// The hypervisor has made the machine, and lets it run.
    pub(super) fn machine_runs(&mut self, mut started: Started) {
        let Some(machine) = &mut self.machine else { return };
        let Stage::Starting(starting) = &mut machine.stage else { return };
        let hypervisor = machine.hypervisor.program.pid();
        let named = Pid::from_raw(started.pid).ok_or_else(|| std::io::ErrorKind::InvalidInput.into());
        let relative = match named.and_then(|pid| Relative::identify(pid, hypervisor)) {
            Ok(relative) => relative,
            Err(error) => {
                let text =
                    format!("the hypervisor named process {}, which is not its own: {error}", started.pid);
                return self.end_machine(Cause::guest(text));
            }
        };
        (started.name, started.version) = (line(&started.name, 256), line(&started.version, 256));
        starting.answer.pid = started.pid;
        starting.answer.start_time = relative.start_time;
        starting.answer.machine = Some(started);
        let watch = Watch::new(Token::MachineGone(machine.key));
        machine.process = Some(MachineProcess { relative, watch, gone: false });
        self.next_step();
    }

    /// The agent has answered what it was asked last.
    pub(super) fn boot_answered(&mut self, outcome: Outcome) {
        let Some(starting) = self.starting() else { return };
        let expected = match (outcome, starting.step) {
            (Ok(reply::Result::Hello(hello)), Step::Greet) => {
                starting.answer.agent = Some(HelloReply {
                    build: line(&hello.build, 256),
                    kernel_release: line(&hello.kernel_release, 256),
                    ..hello
                });
                Ok(())
            }
            (Ok(reply::Result::Started(_)), Step::Init) => Ok(()),
            (Ok(reply::Result::Done(_)), Step::Personalise | Step::Share | Step::Interface(_)) => Ok(()),
            (Ok(_), _) => Err(confused()),
            (Err(failure), _) => Err(failure),
        };
        match expected {
            Ok(()) => self.next_step(),
            Err(failure) => {
                let words = failure.runtime_log;
                let text =
                    if words.is_empty() { failure.detail } else { format!("{}: {words}", failure.detail) };
                self.end_machine(Cause::guest(text));
            }
        }
    }

    /// Everything has been done: the machine is the pod.
    fn machine_started(&mut self) {
        let Some(starting) = self.starting() else { return };
        let (timer, answer) = (starting.timer, std::mem::take(&mut starting.answer));
        let waiting = std::mem::take(&mut starting.waiting);
        self.timers.cancel(timer);
        if let Some(machine) = &mut self.machine {
            machine.stage = Stage::Running(Box::new(answer.clone()));
            machine.agent.greeted = true;
        }
        self.feel_pulse();
        for to in waiting {
            self.reply(to, Ok(proto::reply::Result::VmStarted(answer.clone())));
        }
    }
}

impl FileServer {
    /// Starts podvisor-fs, which closes a descriptor when it listens.
    fn spawn(key: u64, wanted: &proto::FileServer, poller: &crate::poll::Poller) -> std::io::Result<Self> {
        let socket = PathBuf::from(&wanted.socket_path);
        // One that an earlier attempt left behind would be in the way.
        let _ = std::fs::remove_file(&socket);
        let (ready, theirs) = pipe_with(PipeFlags::CLOEXEC)?;
        let mut watch = Watch::new(Token::FilesReady(key));
        watch.set(poller, &ready, Some(Interest::READ))?;
        let mut command = leash::command(&wanted.program, &wanted.cgroup_procs);
        command.arg("--socket-path").arg(&wanted.socket_path).arg("--shared-dir").arg(&wanted.directory);
        command.arg("--tag").arg(&wanted.tag).arg("--ready-fd").arg(theirs.as_raw_fd().to_string());
        let program = spawn_with(key, &wanted.program, &mut command, &theirs, poller)?;
        Ok(Self { key, program, socket, ready: Some((ready, watch)) })
    }
}

fn check(request: &StartVm) -> Result<(), Failure> {
    let machine = request.machine.as_ref().ok_or_else(|| Failure::invalid("machine is missing"))?;
    check_absolute("hypervisor", &request.hypervisor)?;
    check_absolute("machine.vsock_path", &machine.vsock_path)?;
    if !machine.console_path.is_empty() {
        check_absolute("machine.console_path", &machine.console_path)?;
    }
    if let Some(files) = &request.file_server {
        check_absolute("file_server.program", &files.program)?;
        check_absolute("file_server.directory", &files.directory)?;
        check_absolute("file_server.socket_path", &files.socket_path)?;
        for path in &files.cgroup_procs {
            check_absolute("file_server.cgroup_procs", path)?;
        }
        if files.tag.is_empty() || files.tag.contains('\0') {
            return Err(Failure::invalid("file_server.tag is missing"));
        }
    }
    Ok(())
}

/// Limits that a container on the host has from this process. Where a core file goes is the node's business, so the guest keeps its own
/// RLIMIT_CORE; the others would bind the agent.
const LIMITS: [(&str, Resource); 6] = [
    ("RLIMIT_NOFILE", Resource::Nofile),
    ("RLIMIT_NPROC", Resource::Nproc),
    ("RLIMIT_MEMLOCK", Resource::Memlock),
    ("RLIMIT_SIGPENDING", Resource::Sigpending),
    ("RLIMIT_MSGQUEUE", Resource::Msgqueue),
    ("RLIMIT_STACK", Resource::Stack),
];

/// What only the moment, and this process, can give.
fn personalise(mut personalise: wire::Personalise) -> Result<wire::Personalise, rustix::io::Errno> {
    let mut seed = [0; SEED];
    let filled = getrandom(&mut seed, GetRandomFlags::empty())?;
    personalise.seed = seed[..filled].to_vec();
    personalise.time_ns = timestamp::nanoseconds();
    let limits = LIMITS.iter().map(|(name, resource)| {
        let Rlimit { current, maximum } = getrlimit(*resource);
        let (soft, hard) = (current.unwrap_or(u64::MAX), maximum.unwrap_or(u64::MAX));
        wire::ResourceLimit { name: (*name).to_owned(), soft, hard }
    });
    personalise.limits = limits.collect();
    Ok(personalise)
}
