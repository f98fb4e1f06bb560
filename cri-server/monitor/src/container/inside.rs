//! A container whose processes live in another one's process: a runtime with a kernel of its own (gVisor) runs all containers
//! of a pod in one. The host sees none of theirs, so the runtime is asked: `kill` for signals, and one `wait` for each
//! running container, which takes the place that a child of the monitor has otherwise.

use std::fs::OpenOptions;
use std::os::unix::fs::OpenOptionsExt;
use std::path::Path;
use std::process::Stdio;

use podvisor_proto::monitor::{self as proto, reply};
use rustix::process::{Pid, Signal};

use super::State;
use crate::failure::Failure;
use crate::monitor::Monitor;
use crate::runtime::Purpose;
use crate::stdio::TheirEnds;
use crate::verbs::{Answer, Answered, ReplyTo};

/// Nobody can say how it ended, and it is gone: with the process that held it, most likely.
const KILLED: i32 = 128 + libc::SIGKILL;

impl Monitor {
    /// Its start was cancelled: whatever came of it, nobody waits for it, and it goes with the `delete` that follows.
    pub(super) fn never_began(&mut self, key: u64) {
        self.container_ended(key, KILLED);
    }

    /// From now on somebody waits for the container's end.
    pub(super) fn begin_wait(&mut self, key: u64) {
        let file = self.run_file(&format!("{key}.wait"));
        let Some(container) = self.containers.get(&key) else { return };
        let Some(host) = container.maker.on_host() else { return };
        let (runtime, arguments) = (host.runtime.clone(), [container.id.clone().into()]);
        let opened = OpenOptions::new().write(true).create(true).truncate(true).mode(0o600).open(&file);
        let called = opened
            .map_err(|error| Failure::system(format!("make {}", file.display()), error))
            .and_then(|answer| {
                let ends = TheirEnds { stdin: Stdio::null(), stdout: answer.into(), stderr: Stdio::null() };
                let purpose = Purpose::Wait(key, file.clone());
                self.call_within(None, &runtime, "wait", &arguments, Some(ends), purpose)
            });
        if let Err(failure) = called {
            self.wait_ended(key, &file, Err(failure));
        }
    }

    /// The runtime's `wait` has ended, and the container with it. One that nobody can wait for is as good as gone: what
    /// may be left of it goes with the `delete` that follows.
    pub(crate) fn wait_ended(&mut self, key: u64, file: &Path, outcome: Result<(), Failure>) {
        #[derive(serde::Deserialize)]
        struct Answer {
            #[serde(rename = "exitStatus")]
            code: i32,
        }
        let answer = std::fs::read(file).ok().and_then(|text| serde_json::from_slice::<Answer>(&text).ok());
        let _ = std::fs::remove_file(file);
        if let (Err(failure), Some(container)) = (&outcome, self.containers.get(&key)) {
            self.journal.note("nobody waits for a container", &container.id, &failure.detail);
        }
        self.container_ended(key, outcome.ok().and(answer).map_or(KILLED, |answer| answer.code));
    }

    /// Lets the runtime signal a container: its first process, or `all`.
    pub(super) fn signal_inside(
        &mut self,
        key: u64,
        signal: Signal,
        all: bool,
        to: Option<ReplyTo>,
    ) -> Answered {
        let Some(container) = self.containers.get(&key) else { return Ok(Answer::DONE) };
        if matches!(container.state, State::Created { starting: false, .. }) {
            // There is no process yet, only the runtime's promise of one.
            if signal == Signal::KILL {
                self.container_ended(key, KILLED);
            }
            return Ok(Answer::DONE);
        }
        let Some(host) = container.maker.on_host() else { return Ok(Answer::DONE) };
        let runtime = host.runtime.clone();
        let mut arguments = vec![container.id.clone().into(), signal.as_raw().to_string().into()];
        if all {
            arguments.insert(0, "--all".into());
        }
        self.call(&runtime, "kill", &arguments, None, Purpose::Kill(key, to))?;
        Ok(Answer::Later)
    }

    /// Kills one process of a container, by the number that the runtime knows it by.
    pub(crate) fn kill_inside(&mut self, key: u64, process: Pid) {
        let Some(container) = self.containers.get(&key) else { return };
        let Some(host) = container.maker.on_host() else { return };
        let runtime = host.runtime.clone();
        let number = process.as_raw_pid().to_string();
        let arguments = ["--pid".into(), number.into(), container.id.clone().into(), "9".into()];
        if let Err(failure) = self.call(&runtime, "kill", &arguments, None, Purpose::Kill(key, None)) {
            self.kill_ended(key, None, Err(failure));
        }
    }

    /// The runtime's `kill` has ended. That there was nothing left to signal is no failure.
    pub(crate) fn kill_ended(&mut self, key: u64, to: Option<ReplyTo>, outcome: Result<(), Failure>) {
        let container = self.containers.get(&key);
        let gone = container.is_none_or(|it| matches!(it.state, State::Ending(_) | State::Exited { .. }));
        match (outcome, to) {
            (Err(failure), Some(to)) if !gone => self.reply(to, Err(failure)),
            (Err(failure), None) if !gone => {
                let id = container.map(|container| container.id.as_str()).unwrap_or_default();
                self.journal.note("a container could not be signalled", id, &failure.detail);
            }
            (_, Some(to)) => self.reply(to, Ok(reply::Result::Done(proto::Done {}))),
            (_, None) => {}
        }
    }
}
