//! Exec and ExecSync: another process in a running container.
//!
//! Both let the runtime start the process detached, with streams of the monitor's, and become its parent when the
//! runtime has ended. The client of a stream that reads slowly slows its process down (its own output is all
//! there is); ExecSync reads everything and keeps up to its limit. When the process has ended, what is in
//! its pipes is still passed on, but nobody waits for background children that hold them open.
//!
//! The time limit of ExecSync begins when the process runs, as in containerd: on a busy node the runtime's own start
//! would otherwise eat a probe's second.

use std::ffi::OsString;
use std::os::unix::fs::OpenOptionsExt;
use std::time::Duration;

use podvisor_proto::monitor::{
    self as proto, ExecProcess, ExecSyncReply, Exit, Place, StreamFrame, reply, stream_frame::Frame,
};
use rustix::process::{Pid, WaitStatus};

use crate::cgroup::Cgroup;
use crate::connection::Role;
use crate::container::{present_text, read_pid};
use crate::failure::{Failure, check_id};
use crate::monitor::Monitor;
use crate::output::lines::Stream;
use crate::output::timestamp;
use crate::poll::{Timer, TimerId};
use crate::process::{Child, all_processes, exit_code, kill_tree};
use crate::runtime::Purpose;
use crate::stdio::{Chunk, Streams, Wanted};
use crate::verbs::{Answer, Answered, ReplyTo};

/// Bytes that may wait for the client of a stream before its process has to.
const WINDOW: usize = 256 * 1024;
/// How long a terminal may take to report its end after its process has ended.
const PATIENCE: Duration = Duration::from_millis(500);

/// An exec from its request until its process is reaped and its client has everything.
#[derive(Debug)]
pub(crate) struct Exec {
    id: String,
    container: u64,
    wanted: Wanted,
    pub(crate) streams: Streams,
    client: Client,
    stage: Stage,
    /// The number that the runtime knows its process by, where that is no process of the host.
    inner: Option<Pid>,
    timer: Option<TimerId>,
}

/// Who gets the output.
#[derive(Debug)]
enum Client {
    Sync {
        to: ReplyTo,
        limit: usize,
        timeout: Option<Duration>,
        stdout: Vec<u8>,
        stderr: Vec<u8>,
    },
    Stream {
        to: ReplyTo,
    },
    /// Nobody any more: the client is gone, or has been told that the time was over.
    Gone,
}

/// How far it is.
#[derive(Debug)]
enum Stage {
    /// The runtime has been told.
    Starting,
    Running(Child),
    /// Its process has been reaped; its output may not have been passed on completely.
    Ended(Exit),
}

impl Exec {
    /// Of its process, while that has not been reaped.
    pub(crate) fn pid(&self) -> Option<Pid> {
        match &self.stage {
            Stage::Running(child) => Some(child.pid),
            Stage::Starting | Stage::Ended(_) => None,
        }
    }

    fn connection(&self) -> Option<u64> {
        match self.client {
            Client::Sync { to, .. } | Client::Stream { to } => Some(to.connection),
            Client::Gone => None,
        }
    }

    /// Whether its client has as much waiting as it may.
    fn window_is_full(
        &self,
        connections: &std::collections::BTreeMap<u64, crate::connection::Connection>,
    ) -> bool {
        match self.client {
            Client::Stream { to } => connections.get(&to.connection).is_some_and(|it| it.queued() >= WINDOW),
            Client::Sync { .. } | Client::Gone => false,
        }
    }
}

impl Monitor {
    pub(crate) fn exec_sync(&mut self, to: ReplyTo, request: proto::ExecSync) -> Answered {
        let wanted = Wanted { terminal: false, stdin: false, stdout: true, stderr: true };
        let client = Client::Sync {
            to,
            limit: usize::try_from(request.output_limit)
                .unwrap_or(usize::MAX)
                .min(proto::MAX_FRAME / 2 - 4096),
            timeout: (request.timeout_ms > 0).then(|| Duration::from_millis(request.timeout_ms)),
            stdout: Vec::new(),
            stderr: Vec::new(),
        };
        self.start_exec(request.exec, wanted, client)
    }

    pub(crate) fn exec(&mut self, to: ReplyTo, request: proto::Exec) -> Answered {
        if request.terminal && request.stderr {
            return Err(Failure::invalid("stderr of a terminal is part of its stdout"));
        }
        let wanted = Wanted {
            terminal: request.terminal,
            stdin: request.stdin,
            stdout: request.stdout,
            stderr: request.stderr,
        };
        self.start_exec(request.exec, wanted, Client::Stream { to })
    }

    fn start_exec(&mut self, process: Option<ExecProcess>, wanted: Wanted, client: Client) -> Answered {
        let process = process.ok_or_else(|| Failure::invalid("exec is missing"))?;
        let id = process.exec_id;
        check_id("exec_id", &id)?;
        let container_id = &process.container_id;
        let container =
            self.find_container(container_id).ok_or_else(|| Failure::no_container(container_id))?;
        let target = &self.containers[&container];
        if !target.is_running() {
            let state = target.state_name();
            return Err(Failure::wrong_state(format!("container {container_id} is {state}, not running")));
        }
        if self.execs.values().any(|exec| exec.id == id) {
            return Err(Failure::exists(format!("exec {id} is running")));
        }
        let Some(pod) = &self.pod else { return Err(Failure::wrong_state("this monitor has no pod yet")) };
        let (runtime, run_dir) = (target.runtime.clone(), pod.run_dir.clone());
        let inside = target.place == Place::Inside;
        let key = self.new_key();
        let (streams, ends) = Streams::open(key, wanted, &run_dir)
            .map_err(|error| Failure::system(format!("make the standard streams of exec {id}"), error))?;
        let process_file = self.exec_file(key, "process.json");
        write_private(&process_file, &process.process)
            .map_err(|error| Failure::system(format!("write {}", process_file.display()), error))?;
        let mut arguments: Vec<OsString> = vec![
            "--process".into(),
            process_file.into(),
            "--pid-file".into(),
            self.exec_file(key, "pid").into(),
            "--detach".into(),
        ];
        if inside {
            arguments.extend(["--internal-pid-file".into(), self.exec_file(key, "inner").into()]);
        }
        if let Some(console) = &streams.console {
            arguments.extend(["--console-socket".into(), console.path().into()]);
        }
        arguments.push(container_id.into());
        if let Err(failure) = self.call(&runtime, "exec", &arguments, Some(ends), Purpose::Exec(key)) {
            self.remove_exec_files(key);
            return Err(failure);
        }
        let stage = Stage::Starting;
        let exec = Exec { id, container, wanted, streams, client, stage, inner: None, timer: None };
        self.execs.insert(key, exec);
        Ok(Answer::Later)
    }

    fn exec_file(&self, key: u64, suffix: &str) -> std::path::PathBuf {
        self.run_file(&format!("exec{key}.{suffix}"))
    }

    fn remove_exec_files(&self, key: u64) {
        for suffix in ["process.json", "pid", "inner"] {
            let _ = std::fs::remove_file(self.exec_file(key, suffix));
        }
    }

    /// The runtime's `exec` has ended: the process runs, or has run, or could not be started.
    pub(crate) fn exec_call_ended(&mut self, key: u64, outcome: Result<(), Failure>) {
        let pid = read_pid(&self.exec_file(key, "pid"));
        let inner = read_pid(&self.exec_file(key, "inner")).ok();
        self.remove_exec_files(key);
        let Some(exec) = self.execs.get_mut(&key) else { return };
        exec.inner = inner;
        let started = outcome.and_then(|()| pid.clone()).and_then(|pid| {
            let ended = self.strays.take(pid);
            let child = match ended {
                Some(_) => Child::gone(pid),
                None => Child::identify(pid).map_err(|error| {
                    Failure::system(format!("find process {pid} of exec {}", exec.id), error)
                })?,
            };
            exec.streams
                .take_terminal(key, exec.wanted)
                .map_err(|error| Failure::system("receive the terminal from the OCI runtime", error))?;
            Ok((child, ended))
        });
        let (child, ended) = match started {
            Ok(started) => started,
            Err(failure) => return self.exec_failed(key, failure, pid.ok()),
        };
        let started = proto::Started { pid: child.pid.as_raw_pid(), start_time: child.start_time };
        exec.stage = Stage::Running(child);
        match exec.client {
            Client::Stream { to } => self.stream_opened(to, started, Role::Exec(key)),
            Client::Sync { timeout: Some(timeout), .. } => {
                exec.timer = Some(self.timers.set(timeout, Timer::Exec(key)));
            }
            Client::Sync { timeout: None, .. } => {}
            Client::Gone => self.kill_exec(key),
        }
        match ended {
            Some(status) => self.exec_ended(key, status),
            None => self.resume_exec_output(key),
        }
    }

    fn exec_failed(&mut self, key: u64, mut failure: Failure, pid: Option<Pid>) {
        let Some(mut exec) = self.execs.remove(&key) else { return };
        // A runtime that was stopped half-way may have started the process nevertheless.
        if let Some(child) = pid.and_then(|pid| Child::identify(pid).ok()) {
            kill_tree(&child, || self.candidates(exec.container));
        }
        if failure.runtime_log.is_empty()
            && let Some(stderr) = &mut exec.streams.stderr
        {
            failure.runtime_log = present_text(stderr);
        }
        exec.streams.close(&self.poller);
        if let Client::Sync { to, .. } | Client::Stream { to } = exec.client {
            self.reply(to, Err(failure));
        }
    }

    /// Passes on what an exec's process writes, as fast as its client takes it.
    pub(crate) fn pump_exec(&mut self, key: u64, stream: Stream) {
        const TURNS: usize = 8;
        let mut buffer = std::mem::take(&mut self.buffer);
        for turn in 0.. {
            let Some(exec) = self.execs.get_mut(&key) else { break };
            let full = exec.window_is_full(&self.connections);
            let place = match stream {
                Stream::Stdout => &mut exec.streams.stdout,
                Stream::Stderr => &mut exec.streams.stderr,
            };
            let Some(output) = place else { break };
            if full || turn == TURNS {
                output.watch(&self.poller, !full);
                break;
            }
            match output.read(&mut buffer) {
                Chunk::Data(count) => self.pass_on(key, stream, &buffer[..count]),
                Chunk::Blocked => {
                    output.watch(&self.poller, true);
                    break;
                }
                Chunk::End => {
                    if let Some(output) = place.take() {
                        output.close(&self.poller);
                    }
                    break;
                }
            }
        }
        self.buffer = buffer;
        self.finish_exec(key);
    }

    fn pass_on(&mut self, key: u64, stream: Stream, bytes: &[u8]) {
        let Some(exec) = self.execs.get_mut(&key) else { return };
        match &mut exec.client {
            Client::Sync { limit, stdout, stderr, .. } => {
                let kept = match stream {
                    Stream::Stdout => stdout,
                    Stream::Stderr => stderr,
                };
                let room = limit.saturating_sub(kept.len()).min(bytes.len());
                kept.extend_from_slice(&bytes[..room]);
            }
            // A terminal is read also when its output was not asked for.
            Client::Stream { to } if exec.wanted.stdout || stream == Stream::Stderr => {
                let connection = to.connection;
                let frame = match stream {
                    Stream::Stdout => Frame::Stdout(bytes.to_vec()),
                    Stream::Stderr => Frame::Stderr(bytes.to_vec()),
                };
                self.send_frame(connection, frame);
            }
            Client::Stream { .. } | Client::Gone => {}
        }
    }

    /// Reads an exec's output again.
    fn resume_exec_output(&mut self, key: u64) {
        self.pump_exec(key, Stream::Stdout);
        self.pump_exec(key, Stream::Stderr);
    }

    /// A client has taken some of what waited for it.
    pub(crate) fn client_took_output(&mut self, connection: u64) {
        if let Some(connection) = self.connections.get(&connection)
            && let Role::Exec(exec) = connection.role
            && connection.queued() < WINDOW / 2
        {
            self.resume_exec_output(exec);
        }
    }

    /// An exec's process has been reaped.
    pub(crate) fn exec_ended(&mut self, key: u64, status: WaitStatus) {
        let exit = Exit { code: exit_code(status), finished_at: timestamp::nanoseconds(), oom_killed: false };
        let Some(exec) = self.execs.get_mut(&key) else { return };
        exec.stage = Stage::Ended(exit);
        if let Some(timer) = exec.timer.take() {
            self.timers.cancel(timer);
        }
        if let Some(input) = exec.streams.stdin.take() {
            input.close(&self.poller);
        }
        for output in [&mut exec.streams.stdout, &mut exec.streams.stderr].into_iter().flatten() {
            if output.is_terminal() {
                // What was written last is still on its way through the kernel, so the terminal's end is waited for:
                // its session ends with this process, which hangs it up.
                output.give_up_slave();
                exec.timer = Some(self.timers.set(PATIENCE, Timer::Drain(key)));
            } else {
                output.limit_to_present();
            }
        }
        self.flush_input(key);
        self.resume_exec_output(key);
        self.finish_exec(key);
    }

    /// The last frame or the reply, when everything is passed on.
    fn finish_exec(&mut self, key: u64) {
        let Some(exec) = self.execs.get(&key) else { return };
        let Stage::Ended(exit) = exec.stage else { return };
        if !exec.streams.drained() {
            return;
        }
        let Some(exec) = self.execs.remove(&key) else { return };
        if let Some(timer) = exec.timer {
            self.timers.cancel(timer);
        }
        match exec.client {
            Client::Sync { to, stdout, stderr, .. } => {
                let exec_sync = ExecSyncReply { exit_code: exit.code, stdout, stderr, timed_out: false };
                self.reply(to, Ok(reply::Result::ExecSync(exec_sync)));
            }
            Client::Stream { to } => {
                self.send_frame(to.connection, Frame::Exit(exit));
                if let Some(connection) = self.connections.get_mut(&to.connection) {
                    connection.close(&self.poller);
                }
            }
            Client::Gone => {}
        }
    }

    /// What the client of an exec stream sends.
    pub(crate) fn exec_input(&mut self, key: u64, frame: StreamFrame) {
        let Some(exec) = self.execs.get_mut(&key) else { return };
        match frame.frame {
            Some(Frame::Resize(size)) => exec.streams.resize(size.width, size.height),
            Some(Frame::Stdin(bytes)) => {
                let Some(input) = &mut exec.streams.stdin else { return };
                if bytes.is_empty() {
                    input.finish();
                } else {
                    input.push(&bytes);
                }
                self.flush_input(key);
            }
            _ => {}
        }
    }

    /// ExecSync's time is over: the answer goes out now, however long the killed process takes to be gone.
    pub(crate) fn exec_time_is_over(&mut self, key: u64) {
        self.kill_exec(key);
        let Some(exec) = self.execs.get_mut(&key) else { return };
        for output in [&mut exec.streams.stdout, &mut exec.streams.stderr].into_iter().flatten() {
            output.limit_to_present();
        }
        self.resume_exec_output(key);
        let Some(exec) = self.execs.get_mut(&key) else { return };
        exec.streams.close(&self.poller);
        if let Client::Sync { to, stdout, stderr, .. } = std::mem::replace(&mut exec.client, Client::Gone) {
            let exit_code = 128 + libc::SIGKILL;
            let exec_sync = ExecSyncReply { exit_code, stdout, stderr, timed_out: true };
            self.reply(to, Ok(reply::Result::ExecSync(exec_sync)));
        }
    }

    /// A client is gone: its execs end.
    pub(crate) fn execs_abandoned(&mut self, connection: u64) {
        let abandoned: Vec<u64> = self
            .execs
            .iter()
            .filter(|(_, exec)| exec.connection() == Some(connection))
            .map(|(key, _)| *key)
            .collect();
        for key in abandoned {
            self.kill_exec(key);
            let Some(exec) = self.execs.get_mut(&key) else { continue };
            exec.client = Client::Gone;
            // While the runtime works, the streams are its business: the terminal is still to come.
            if !matches!(exec.stage, Stage::Starting) {
                exec.streams.close(&self.poller);
            }
            self.finish_exec(key);
        }
    }

    /// Kills an exec's process and what it started; its end is noticed as any other.
    fn kill_exec(&mut self, key: u64) {
        let Some(exec) = self.execs.get(&key) else { return };
        let Stage::Running(child) = &exec.stage else { return };
        match exec.inner {
            // The child only waits for it, and ends with it.
            Some(inner) => self.kill_inside(exec.container, inner),
            None => kill_tree(child, || self.candidates(exec.container)),
        }
    }

    /// The processes among which an exec's descendants are.
    fn candidates(&self, container: u64) -> Vec<i32> {
        let cgroup = self.containers.get(&container).and_then(|container| container.cgroup.as_ref());
        cgroup.map_or_else(all_processes, Cgroup::processes)
    }
}

fn write_private(path: &std::path::Path, bytes: &[u8]) -> std::io::Result<()> {
    use std::io::Write;
    let mut options = std::fs::OpenOptions::new();
    options.write(true).create(true).truncate(true).mode(0o600).open(path)?.write_all(bytes)
}
