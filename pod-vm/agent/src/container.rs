//! A container's states and verbs.
//!
//! ```text
//! Creating ──▶ Created ──Start──▶ Starting ──▶ Running ──▶ Exited
//!    │ failed                        │ failed: exits by itself ▲
//!    ▼                               └─────────────────────────┘
//!  gone
//! ```

use std::fs::File;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::path::PathBuf;

use oci_spec::runtime::{LinuxResources, Process, Spec};
use podvisor_container::{Cgroup, ContainerError, Io, Launch, Pending, Plan, Running, Seccomp};
use podvisor_proto::agent::{
    self as wire, CreateContainer, Done, Exit, KillContainer, ProcessState, Resize, Started, UpdateContainer,
    reply,
};
use rustix::pipe::{PipeFlags, pipe_with};
use rustix::process::{Pid, Signal, pidfd_send_signal};

use crate::agent::Agent;
use crate::disks::Numbers;
use crate::failure::Failure;
use crate::init::{Init, NAME};
use crate::storage::{self, Storage};
use crate::streams::Standard;
use crate::sys;
use crate::verbs::Answered;

/// The parent of the containers' cgroups, which holds them to the guest's memory less its reserve.
pub(crate) const PARENT: &str = "/pod";

/// Where a container is in its life.
#[derive(Debug)]
pub(crate) enum State {
    /// `request` waits for the outcome.
    Creating {
        pending: Pending,
        request: u64,
    },
    Created {
        pending: Pending,
    },
    Starting {
        pending: Pending,
        request: u64,
    },
    Running {
        running: Running,
    },
    Exited {
        exit: Exit,
    },
}

/// One container.
#[derive(Debug)]
pub(crate) struct Container {
    pub(crate) state: State,
    pub(crate) cgroup: Cgroup,
    pub(crate) standard: Standard,
    /// Places of shares that it mounts.
    shared: Vec<PathBuf>,
    /// `memory.events`, which the kernel marks when it changes.
    memory: Option<File>,
    oom_kills: u64,
    disks: Numbers,
}

impl Container {
    pub(crate) fn pid(&self) -> Option<Pid> {
        match &self.state {
            State::Creating { pending, .. }
            | State::Created { pending }
            | State::Starting { pending, .. } => Some(pending.pid()),
            State::Running { running } => Some(running.pid),
            State::Exited { .. } => None,
        }
    }

    pub(crate) fn pidfd(&self) -> Option<BorrowedFd<'_>> {
        match &self.state {
            State::Creating { pending, .. }
            | State::Created { pending }
            | State::Starting { pending, .. } => Some(pending.pidfd()),
            State::Running { running } => Some(running.pidfd.as_fd()),
            State::Exited { .. } => None,
        }
    }

    /// Readable when its preparation has come further.
    pub(crate) fn preparation(&self) -> Option<BorrowedFd<'_>> {
        match &self.state {
            State::Creating { pending, .. } | State::Starting { pending, .. } => Some(pending.descriptor()),
            _ => None,
        }
    }

    pub(crate) fn memory_events(&self) -> Option<BorrowedFd<'_>> {
        match self.state {
            State::Exited { .. } => None,
            _ => self.memory.as_ref().map(AsFd::as_fd),
        }
    }

    /// Whether the kernel has killed more of it since the last look.
    fn new_oom_kills(&mut self) -> bool {
        let kills = self.cgroup.place().oom_kills().unwrap_or(self.oom_kills);
        std::mem::replace(&mut self.oom_kills, kills) < kills
    }

    fn describe(&self, id: &str) -> wire::Process {
        let (state, exit) = match &self.state {
            State::Creating { .. } => (ProcessState::Creating, None),
            State::Created { .. } | State::Starting { .. } => (ProcessState::Created, None),
            State::Running { .. } => (ProcessState::Running, None),
            State::Exited { exit } => (ProcessState::Exited, Some(*exit)),
        };
        let pid = self.pid().map_or(0, Pid::as_raw_pid);
        wire::Process { id: id.to_owned(), state: state.into(), pid, exit }
    }
}

/// The process's ends of its streams, and ours.
pub(crate) fn connect(terminal: bool, stdin: bool) -> Result<(Io, Standard), Failure> {
    if terminal {
        return Ok((Io::Terminal, Standard::default()));
    }
    let failed = |error: std::io::Error| Failure::system("make pipes", error);
    let pipe = || -> Result<(OwnedFd, OwnedFd), Failure> {
        pipe_with(PipeFlags::CLOEXEC).map_err(|error| failed(error.into()))
    };
    let ours = |end: &OwnedFd| {
        rustix::fs::fcntl_setfl(end, rustix::fs::OFlags::NONBLOCK).map_err(|error| failed(error.into()))
    };
    let (stdout_reader, stdout) = pipe()?;
    let (stderr_reader, stderr) = pipe()?;
    ours(&stdout_reader)?;
    ours(&stderr_reader)?;
    let (stdin_reader, stdin_writer) = if stdin {
        let (reader, writer) = pipe()?;
        ours(&writer)?;
        (reader, Some(writer))
    } else {
        (File::open("/dev/null").map_err(failed)?.into(), None)
    };
    let standard = Standard {
        stdin: stdin_writer,
        stdout: Some(stdout_reader),
        stderr: Some(stderr_reader),
        terminal: None,
    };
    Ok((Io::Streams { stdin: stdin_reader, stdout, stderr }, standard))
}

/// The terminal that a child has handed over, ready to be pumped.
pub(crate) fn adopt_terminal(standard: &mut Standard, terminal: Option<OwnedFd>) {
    if let Some(terminal) = terminal {
        // A terminal that cannot be set so is read late, not lost.
        let _ = rustix::fs::fcntl_setfl(&terminal, rustix::fs::OFlags::NONBLOCK | rustix::fs::OFlags::RDWR);
        standard.terminal = Some(terminal);
    }
}

pub(crate) fn seccomp(wanted: Option<&wire::Seccomp>) -> Option<Seccomp> {
    wanted.map(|wanted| Seccomp { program: wanted.program.clone(), flags: wanted.flags })
}

/// An id as the monitor makes them: it becomes a directory's name.
pub(crate) fn check_id(id: &str) -> Result<(), Failure> {
    let plain = id.bytes().all(|byte| byte.is_ascii_alphanumeric() || b"-_.".contains(&byte));
    if id.is_empty() || id.len() > 128 || !plain || id.starts_with('.') || id == NAME {
        return Err(Failure::invalid(format!("{id:?} is no id: 1 to 128 letters, digits, '-', '_' and '.'")));
    }
    Ok(())
}

impl Agent {
    fn container(&mut self, id: &str) -> Result<&mut Container, Failure> {
        self.containers.get_mut(id).ok_or_else(|| Failure::not_found(format!("no container {id:?}")))
    }

    /// The request is answered when its process is prepared.
    pub(crate) fn create_container(
        &mut self,
        request: u64,
        wanted: &CreateContainer,
        disks: Numbers,
    ) -> Result<(), Failure> {
        let id = &wanted.container_id;
        check_id(id)?;
        if self.containers.contains_key(id) {
            return Err(Failure::exists(format!("container {id:?} is there already")));
        }
        let mut spec: Spec = serde_json::from_slice(&wanted.spec)
            .map_err(|error| Failure::invalid(format!("the spec cannot be read: {error}")))?;
        self.place_pid_namespace(&mut spec, wanted)?;
        disks.put_into(&mut spec);
        let root = spec.root().as_ref().map(|root| root.path().clone()).unwrap_or_default();
        let root = if root.is_absolute() { root } else { storage::root_of(id) };
        let mut plan = Plan::new(&spec, root, seccomp(wanted.seccomp.as_ref()))
            .map_err(|refused| Failure::invalid(refused.to_string()))?;
        plan.distrust(&crate::volumes::directory());
        let terminal = spec.process().as_ref().and_then(Process::terminal).unwrap_or(false);
        let (io, standard) = connect(terminal, wanted.stdin)?;
        let resources = spec.linux().as_ref().and_then(|linux| linux.resources().clone()).unwrap_or_default();
        let cgroup = Cgroup::create(self.cgroups.cgroup(&format!("{PARENT}/{id}")), &resources)?;
        let shared = storage::shared(spec.mounts().as_ref());
        Storage::reach(&shared);
        let pending = match podvisor_container::create(&plan, &cgroup, &io) {
            Ok(pending) => pending,
            Err(error) => {
                let _ = cgroup.place().kill();
                let _ = cgroup.place().remove();
                self.leave(shared);
                return Err(error.into());
            }
        };
        let memory = cgroup.place().directory("memory").map(|directory| directory.join("memory.events"));
        let memory = memory.and_then(|path: PathBuf| File::open(path).ok());
        let state = State::Creating { pending, request };
        let container = Container { state, cgroup, standard, shared, memory, oom_kills: 0, disks };
        self.containers.insert(id.clone(), container);
        Ok(())
    }

    /// The pod's shared pid namespace, or that of another container, in place of what the spec says: only the agent knows the pids.
    fn place_pid_namespace(&self, spec: &mut Spec, wanted: &CreateContainer) -> Result<(), Failure> {
        let pid = match (wanted.share_pid, wanted.target.as_str()) {
            (false, "") => return Ok(()),
            (true, "") => {
                let running = self.pod.init.as_ref().and_then(Init::pid);
                running.ok_or_else(|| Failure::state("the pod has no init that runs"))?
            }
            (false, target) => {
                let container = self.containers.get(target);
                let running = container.and_then(Container::pid);
                running.ok_or_else(|| Failure::state(format!("container {target:?} is not running")))?
            }
            (true, _) => return Err(Failure::invalid("share_pid and target exclude each other")),
        };
        let path = format!("/proc/{}/ns/pid", pid.as_raw_pid());
        let linux =
            spec.linux_mut().as_mut().ok_or_else(|| Failure::invalid("the spec has no linux part"))?;
        let mut namespaces = linux.namespaces().clone().unwrap_or_default();
        namespaces.retain(|namespace| namespace.typ() != oci_spec::runtime::LinuxNamespaceType::Pid);
        let mut namespace = oci_spec::runtime::LinuxNamespace::default();
        namespace.set_typ(oci_spec::runtime::LinuxNamespaceType::Pid).set_path(Some(path.into()));
        namespaces.push(namespace);
        linux.set_namespaces(Some(namespaces));
        Ok(())
    }

    /// What its process says while it is being prepared or started.
    pub(crate) fn container_prepared(&mut self, id: &str) {
        let Some(container) = self.containers.get_mut(id) else { return };
        let (pending, request) = match &mut container.state {
            State::Creating { pending, request } | State::Starting { pending, request } => {
                (pending, *request)
            }
            _ => return,
        };
        let progress = pending.poll();
        adopt_terminal(&mut container.standard, pending.take_terminal());
        let pid = pending.pid().as_raw_pid();
        match progress {
            Ok(Launch::Wait) => {}
            Ok(Launch::Ready) => {
                container.state =
                    match std::mem::replace(&mut container.state, State::Exited { exit: Exit::default() }) {
                        State::Creating { pending, .. } => State::Created { pending },
                        other => other,
                    };
                self.answer(request, Ok(reply::Result::Started(Started { pid })));
                self.take_stray(id);
            }
            Ok(Launch::Executed) => {
                container.state =
                    match std::mem::replace(&mut container.state, State::Exited { exit: Exit::default() }) {
                        State::Starting { pending, .. } => State::Running { running: pending.into_running() },
                        other => other,
                    };
                self.answer(request, Ok(reply::Result::Done(Done {})));
                self.take_stray(id);
            }
            Err(error) => self.not_prepared(id, error),
        }
    }

    /// Answers the request that waits for it. What never became a container is forgotten; one that could not be started stays until its
    /// exit is told. Its process ends by itself.
    fn not_prepared(&mut self, id: &str, error: ContainerError) {
        let Some(container) = self.containers.get_mut(id) else { return };
        let request = match std::mem::replace(&mut container.state, State::Exited { exit: Exit::default() }) {
            State::Creating { request, .. } => {
                self.forget(id);
                request
            }
            State::Starting { pending, request } => {
                container.state = State::Created { pending };
                request
            }
            other => {
                container.state = other;
                return;
            }
        };
        self.answer(request, Err(error.into()));
    }

    /// Its process ended before its request was over.
    fn take_stray(&mut self, id: &str) {
        let Some(pid) = self.containers.get(id).and_then(Container::pid) else { return };
        if let Some(at) = self.pod.strays.iter().position(|(stray, _)| *stray == pid)
            && let Some((_, exit)) = self.pod.strays.remove(at)
        {
            self.container_ended(id, exit);
        }
    }

    pub(crate) fn start_container(&mut self, request: u64, id: &str) -> Answered {
        let container = self.container(id)?;
        match std::mem::replace(&mut container.state, State::Exited { exit: Exit::default() }) {
            State::Created { mut pending } => {
                let started = pending.start();
                container.state = State::Starting { pending, request };
                started?;
                Ok(None)
            }
            other => {
                container.state = other;
                Err(Failure::state(format!("container {id:?} is not in the state created")))
            }
        }
    }

    pub(crate) fn container_ended(&mut self, id: &str, mut exit: Exit) {
        // Its last words may still be on the socket: the exit and they can be heard of in either order.
        self.container_prepared(id);
        let Some(container) = self.containers.get_mut(id) else { return };
        // Whatever else is in its cgroup ends with its first process, as a pid namespace of its own would have it.
        let _ = container.cgroup.place().kill();
        if matches!(container.state, State::Creating { .. } | State::Starting { .. }) {
            self.not_prepared(id, ContainerError::Vanished);
        }
        let Some(container) = self.containers.get_mut(id) else { return };
        exit.oom_killed = container.oom_kills > 0 || container.new_oom_kills();
        container.state = State::Exited { exit };
        self.tell_exit(id, exit);
    }

    pub(crate) fn memory_changed(&mut self, id: &str) {
        use std::os::unix::fs::FileExt;
        let Some(container) = self.containers.get_mut(id) else { return };
        if let Some(memory) = &container.memory {
            // Reading is what makes the next change visible (kernfs_poll).
            let _ = memory.read_at(&mut [0; 512], 0);
        }
        if container.new_oom_kills() {
            self.tell_out_of_memory(id);
        }
    }

    pub(crate) fn kill_container(&mut self, kill: &KillContainer) -> Result<(), Failure> {
        let container = self.container(&kill.container_id)?;
        if kill.all && kill.signal == Signal::KILL.as_raw() {
            return container
                .cgroup
                .place()
                .kill()
                .map_err(|error| Failure::system("kill the container", error));
        }
        let Some(pidfd) = container.pidfd() else { return Ok(()) };
        if kill.all {
            let pids = container.cgroup.place().all_pids();
            for pid in pids.map_err(|error| Failure::system("list the container's processes", error))? {
                if let Some(pid) = Pid::from_raw(pid) {
                    // One that has just ended needs none.
                    let _ = rustix::process::kill_process(pid, signal(kill.signal)?);
                }
            }
            return Ok(());
        }
        send(pidfd, kill.signal)
    }

    pub(crate) fn delete_container(&mut self, id: &str) -> Result<(), Failure> {
        let Some(container) = self.containers.get(id) else { return Ok(()) };
        container.cgroup.place().kill().map_err(|error| Failure::system("kill the container", error))?;
        self.forget(id);
        Ok(())
    }

    fn forget(&mut self, id: &str) {
        self.execs.retain(|_, exec| exec.container != id);
        if let Some(container) = self.containers.remove(id) {
            let _ = container.cgroup.place().kill();
            // Its processes are ours to reap, and a cgroup with zombies can be removed.
            let _ = container.cgroup.place().remove();
            self.leave(container.shared);
        }
    }

    /// Unmounts places of shares, except those that another container uses.
    fn leave(&self, mut shared: Vec<PathBuf>) {
        shared.retain(|place| self.containers.values().all(|other| !other.shared.contains(place)));
        Storage::leave(&shared);
    }

    pub(crate) fn update_container(&mut self, update: &UpdateContainer) -> Result<(), Failure> {
        let mut resources: LinuxResources = serde_json::from_slice(&update.resources)
            .map_err(|error| Failure::invalid(format!("the resources cannot be read: {error}")))?;
        let container = self.container(&update.container_id)?;
        container.disks.put_into_rules(&mut resources);
        Ok(container.cgroup.update(&resources)?)
    }

    pub(crate) fn resize(&mut self, resize: &Resize) -> Result<(), Failure> {
        let standard = match self.containers.get(&resize.id) {
            Some(container) => &container.standard,
            None => match self.execs.get(&resize.id) {
                Some(exec) => &exec.standard,
                None => return Err(Failure::not_found(format!("no container or exec {:?}", resize.id))),
            },
        };
        let terminal = standard.terminal.as_ref().ok_or_else(|| Failure::state("it has no terminal"))?;
        let side = |value: u32| u16::try_from(value).unwrap_or(u16::MAX);
        let size = rustix::termios::Winsize {
            ws_col: side(resize.columns),
            ws_row: side(resize.rows),
            ws_xpixel: 0,
            ws_ypixel: 0,
        };
        rustix::termios::tcsetwinsize(terminal, size)
            .map_err(|error| Failure::system("resize the terminal", error))
    }

    pub(crate) fn list(&self) -> wire::Processes {
        let containers = self.containers.iter().map(|(id, container)| container.describe(id));
        let execs = self.execs.iter().map(|(id, exec)| exec.describe(id));
        let init = self.pod.init.as_ref().map(Init::describe);
        wire::Processes { processes: init.into_iter().chain(containers).chain(execs).collect() }
    }

    /// Before the guest ends.
    pub(crate) fn kill_all(&mut self) {
        for container in self.containers.values() {
            let _ = container.cgroup.place().kill();
        }
        if let Some(init) = &self.pod.init {
            init.kill();
        }
    }
}

/// A signal by its number, the real-time ones too: some images are stopped by one.
pub(crate) fn signal(number: i32) -> Result<Signal, Failure> {
    sys::signal(number).ok_or_else(|| Failure::invalid(format!("{number} is no signal")))
}

pub(crate) fn send(pidfd: BorrowedFd<'_>, number: i32) -> Result<(), Failure> {
    match pidfd_send_signal(pidfd, signal(number)?) {
        // It has ended already.
        Ok(()) | Err(rustix::io::Errno::SRCH) => Ok(()),
        Err(error) => Err(Failure::system("send a signal", error)),
    }
}
