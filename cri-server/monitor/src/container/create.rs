//! CreateContainer: log, streams, the runtime's `create`, and the way back when one of them fails.

use std::ffi::OsString;
use std::path::PathBuf;
use std::time::Duration;

use podvisor_proto::monitor::{self as proto, CreateContainer, Place, reply};
use rustix::process::Pid;

use super::{Container, InGuest, Maker, MemoryWatch, OnHost, Removal, State};
use crate::cgroup::Cgroup;
use crate::disk::Job;
use crate::failure::{Failure, check_absolute, check_id};
use crate::monitor::Monitor;
use crate::output::lines::{LONGEST, Lines, Stream};
use crate::output::pace::Pace;
use crate::poll::{Interest, Timer, Token, Watch};
use crate::process::{Child, exit_code};
use crate::runtime::{Call, Purpose, Runtime, shorten};
use crate::stdio::{Chunk, Streams, TheirEnds, Wanted};
use crate::verbs::{Answer, Answered, ReplyTo};

/// As much of a line is held in memory for each stream.
const LINE_MAX: usize = 1 << 20;

impl Monitor {
    pub(crate) fn create_container(&mut self, to: ReplyTo, request: CreateContainer) -> Answered {
        let id = request.container_id;
        check_id("container_id", &id)?;
        check_absolute("bundle", &request.bundle)?;
        let logged = !request.log_path.is_empty();
        if logged {
            check_absolute("log_path", &request.log_path)?;
        }
        if request.stdin_once && !request.stdin {
            return Err(Failure::invalid("stdin_once without stdin"));
        }
        // A daemon that does not know the field leaves it out.
        let longest = if request.log_line == 0 { LONGEST } else { request.log_line as usize };
        if longest > LINE_MAX {
            return Err(Failure::invalid(format!("log_line {longest} is more than {LINE_MAX}")));
        }
        let Some(pod) = &self.pod else { return Err(Failure::wrong_state("this monitor has no pod yet")) };
        let run_dir = pod.run_dir.clone();
        let place = Place::try_from(request.place).map_err(|_| Failure::invalid("place is not known"))?;
        if (id == pod.id) != (place == Place::Sandbox) {
            return Err(Failure::invalid("the sandbox's container and no other has the pod's id"));
        }
        let guest = match request.guest {
            Some(guest) => Some(self.check_guest_container(&id, place, guest)?),
            None => self.check_host_container().map(|()| None)?,
        };
        if let Some(key) = self.find_container(&id) {
            let state = self.containers[&key].state_name();
            return Err(Failure::exists(format!("container {id} exists and is {state}")));
        }
        let key = self.new_key();
        let wanted = Wanted {
            terminal: request.terminal,
            stdin: request.stdin,
            stdout: true,
            stderr: !request.terminal,
        };
        let (maker, streams) = if let Some(guest) = guest {
            // Its streams are connections to the agent, which has them when it has made the container.
            (Maker::Guest(InGuest { wanted: guest, volumes: 0, ended: None }), Streams::default())
        } else {
            let runtime = Runtime::parse(request.runtime)?;
            let (streams, ends) = Streams::open(key, wanted, &run_dir).map_err(|error| {
                Failure::system(format!("make the standard streams of container {id}"), error)
            })?;
            (Maker::Runtime(OnHost { runtime, place, ends: Some(ends), words: Vec::new() }), streams)
        };
        let container = Container {
            id,
            maker,
            state: State::Opening { reply: to },
            streams,
            cgroup: None,
            bundle: request.bundle,
            wanted,
            stdin_once: request.stdin_once,
            logged,
            stdout: Lines::new(Stream::Stdout, longest),
            stderr: Lines::new(Stream::Stderr, longest),
            backlog: 0,
            held_back: false,
            pace: Pace::new(),
            resting: false,
            reopening: Vec::new(),
            attached: Vec::new(),
            memory: None,
            oom_kills: 0,
            because: String::new(),
            removal: Removal::NotBegun,
            started: false,
            killed: false,
            starts: Vec::new(),
            checkpoint: None,
            deletes: Vec::new(),
        };
        self.containers.insert(key, container);
        if logged {
            self.disk.send(Job::Open { key, path: request.log_path.into() });
        } else {
            self.make(key);
        }
        Ok(Answer::Later)
    }

    /// Lets its maker create a container whose log is open.
    fn make(&mut self, key: u64) {
        match self.containers.get(&key).map(|container| &container.maker) {
            Some(Maker::Runtime(_)) => self.run_create(key),
            Some(Maker::Guest(_)) => self.create_in_guest(key),
            None => {}
        }
    }

    pub(crate) fn find_container(&self, id: &str) -> Option<u64> {
        self.containers.iter().find(|(_, container)| container.id == id).map(|(key, _)| *key)
    }

    /// The disk thread has opened the log, or could not.
    pub(crate) fn log_opened(&mut self, key: u64, result: Result<(), String>) {
        let Some(container) = self.containers.get(&key) else { return self.disk.send(Job::Close { key }) };
        let id = &container.id;
        if !container.deletes.is_empty() {
            let failure =
                Failure::wrong_state(format!("container {id} was deleted while it was being created"));
            self.creation_failed(key, failure, false);
        } else if let Err(error) = result {
            self.creation_failed(key, Failure::system(format!("create container {id}"), error), false);
        } else {
            self.make(key);
        }
    }

    fn run_create(&mut self, key: u64) {
        let pid_file = self.pid_file(key);
        let Some(container) = self.containers.get_mut(&key) else { return };
        let State::Opening { reply } = container.state else { return };
        let Maker::Runtime(host) = &mut container.maker else { return };
        let _ = std::fs::remove_file(&pid_file);
        let mut arguments: Vec<OsString> =
            vec!["--bundle".into(), container.bundle.clone().into(), "--pid-file".into(), pid_file.into()];
        if let Some(console) = &container.streams.console {
            arguments.extend(["--console-socket".into(), console.path().into()]);
        }
        arguments.push(container.id.clone().into());
        let runtime = host.runtime.clone();
        let ends = if host.place == Place::Inside { None } else { host.ends.take() };
        match self.call(&runtime, "create", &arguments, ends, Purpose::Create(key)) {
            Ok(call) => {
                if let Some(container) = self.containers.get_mut(&key) {
                    container.state = State::Creating { reply, call: Some(call) };
                }
                self.watch_output(key);
            }
            Err(failure) => self.creation_failed(key, failure, false),
        }
    }

    /// Starts a call of the OCI runtime.
    pub(crate) fn call(
        &mut self,
        runtime: &Runtime,
        verb: &'static str,
        arguments: &[OsString],
        ends: Option<TheirEnds>,
        purpose: Purpose,
    ) -> Result<u64, Failure> {
        let limit = runtime.timeout();
        self.call_within(Some(limit), runtime, verb, arguments, ends, purpose)
    }

    /// The same with another time limit, or none.
    pub(crate) fn call_within(
        &mut self,
        limit: Option<Duration>,
        runtime: &Runtime,
        verb: &'static str,
        arguments: &[OsString],
        ends: Option<TheirEnds>,
        purpose: Purpose,
    ) -> Result<u64, Failure> {
        let key = self.new_key();
        let log = self.run_file(&format!("{key}.runtime.log"));
        let pid = runtime.spawn(verb, arguments, ends, &log)?;
        let deadline = limit.map(|limit| self.timers.set(limit, Timer::Call(key)));
        let call = Call { pid, runtime: runtime.clone(), verb, log, deadline, purpose, stopped: None };
        self.calls.insert(key, call);
        Ok(key)
    }

    /// A file in the pod's run directory.
    pub(crate) fn run_file(&self, name: &str) -> PathBuf {
        self.pod.as_ref().map(|pod| pod.run_dir.join(name)).unwrap_or_default()
    }

    /// `<container>.pid`: a daemon that finds no monitor finds the container's process by it.
    fn pid_file(&self, key: u64) -> PathBuf {
        let id = self.containers.get(&key).map(|container| container.id.as_str()).unwrap_or_default();
        self.run_file(&format!("{id}.pid"))
    }

    /// The runtime's `create` has ended.
    pub(crate) fn create_ended(&mut self, key: u64, outcome: Result<(), Failure>) {
        let pid_file = self.pid_file(key);
        // The last of what the runtime itself has to say. What comes later is the container's.
        self.watch_output(key);
        let Some(container) = self.containers.get_mut(&key) else { return };
        let Maker::Runtime(host) = &mut container.maker else { return };
        let words = std::mem::take(&mut host.words);
        if let Err(mut failure) = outcome {
            if failure.runtime_log.is_empty() {
                String::from_utf8_lossy(&words).trim().clone_into(&mut failure.runtime_log);
            }
            return self.creation_failed(key, failure, true);
        }
        match self.created(key, &pid_file) {
            Ok(started) => {
                if let Some(State::Creating { reply, .. }) = started.previous {
                    self.reply(reply, Ok(reply::Result::Started(started.started)));
                }
                if let Some(status) = started.ended {
                    self.container_ended(key, exit_code(status));
                } else {
                    self.watch_output(key);
                }
            }
            Err(failure) => self.creation_failed(key, failure, true),
        }
    }

    fn created(&mut self, key: u64, pid_file: &std::path::Path) -> Result<Creation, Failure> {
        let Some(container) = self.containers.get_mut(&key) else {
            return Err(Failure::wrong_state("the container is gone"));
        };
        let pid = read_pid(pid_file)?;
        let inside = container.maker.place() == Some(Place::Inside);
        let ended = self.strays.take(pid);
        let not_found =
            |error| Failure::system(format!("find process {pid} of container {}", container.id), error);
        let child = match ended {
            // Reaped before its pid was known. Its pidfd and start time are lost with it.
            Some(_) => Child::gone(pid),
            None if inside => Child::elsewhere(pid).map_err(not_found)?,
            None => Child::identify(pid).map_err(not_found)?,
        };
        container
            .streams
            .take_terminal(key, container.wanted)
            .map_err(|error| Failure::system("receive the terminal from the OCI runtime", error))?;
        // Inside, the process is everybody's: its cgroup says nothing about this container.
        container.cgroup = (!inside).then(|| Cgroup::of_process(pid)).flatten();
        container.oom_kills = container.cgroup.as_ref().and_then(Cgroup::oom_kills).unwrap_or(0);
        if let Some(notices) = container.cgroup.as_ref().and_then(|cgroup| cgroup.watch_memory().ok()) {
            let mut watch = Watch::new(Token::Oom(key));
            if watch.set(&self.poller, &notices, Some(Interest::READ)).is_ok() {
                container.memory = Some(MemoryWatch { notices, watch });
            }
        }
        let started = proto::Started { pid: pid.as_raw_pid(), start_time: child.start_time };
        let previous = std::mem::replace(&mut container.state, State::Created { child, starting: false });
        Ok(Creation { started, previous: Some(previous), ended })
    }

    /// Undoes what there is of a container that could not be created, and then answers. `maker_knows`: the runtime or the agent may
    /// have made something.
    pub(crate) fn creation_failed(&mut self, key: u64, failure: Failure, maker_knows: bool) {
        let Some(container) = self.containers.get_mut(&key) else { return };
        let (State::Opening { reply, .. } | State::Creating { reply, .. }) = container.state else { return };
        container.state = State::Failed { reply, failure };
        container.streams.close(&self.poller);
        drop(container.maker.ends());
        let undoing = maker_knows
            && match &container.maker {
                Maker::Runtime(host) => {
                    let runtime = host.runtime.clone();
                    let arguments = ["--force".into(), container.id.clone().into()];
                    self.call(&runtime, "delete", &arguments, None, Purpose::CleanUp(key)).is_ok()
                }
                Maker::Guest(_) => self.clean_up_in_guest(key),
            };
        if !undoing {
            self.creation_undone(key);
        }
    }

    /// Nothing is left of a container that could not be created.
    pub(crate) fn creation_undone(&mut self, key: u64) {
        let _ = std::fs::remove_file(self.pid_file(key));
        let Some(container) = self.containers.remove(&key) else { return };
        self.leave_volumes(key);
        self.disk.send(Job::Close { key });
        if let State::Failed { reply, failure } = container.state {
            self.reply(reply, Err(failure));
        }
        for waiting in container.deletes {
            self.reply(waiting, Ok(reply::Result::Done(proto::Done {})));
        }
        self.exit_is_settled(key);
    }
}

/// What a successful `create` comes to.
struct Creation {
    started: proto::Started,
    previous: Option<State>,
    /// How its process has ended already.
    ended: Option<rustix::process::WaitStatus>,
}

/// Reads the pid that an OCI runtime has written.
pub(crate) fn read_pid(path: &std::path::Path) -> Result<Pid, Failure> {
    let text = std::fs::read_to_string(path)
        .map_err(|error| Failure::system(format!("read the pid file {}", path.display()), error))?;
    text.trim().parse().ok().filter(|pid| *pid > 1).and_then(Pid::from_raw).ok_or_else(|| {
        Failure::runtime(format!("the OCI runtime wrote no pid into {}", path.display()), shorten(text))
    })
}

/// What a stream holds just now, as text.
pub(crate) fn present_text(stream: &mut crate::stdio::Output) -> String {
    let mut buffer = vec![0; 4096];
    match stream.read(&mut buffer) {
        Chunk::Data(count) => shorten(String::from_utf8_lossy(&buffer[..count]).trim().to_owned()),
        Chunk::Blocked | Chunk::End => String::new(),
    }
}
