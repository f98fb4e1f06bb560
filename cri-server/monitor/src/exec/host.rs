//! Execs by an OCI runtime: its `exec --detach`, and the process that the monitor becomes the parent of.

use std::ffi::OsString;
use std::os::unix::fs::OpenOptionsExt;

use podvisor_proto::monitor::{self as proto, Place};
use rustix::process::Pid;

use super::{Client, Known, Stage};
use crate::cgroup::Cgroup;
use crate::connection::Role;
use crate::container::{present_text, read_pid};
use crate::failure::Failure;
use crate::monitor::Monitor;
use crate::poll::Timer;
use crate::process::{Child, exit_code, kill_tree};
use crate::runtime::Purpose;
use crate::stdio::{Streams, Wanted};

impl Monitor {
    /// Tells the runtime to start exec `id` in a container; gives the monitor's ends of its streams.
    pub(super) fn exec_on_host(
        &mut self,
        key: u64,
        container: u64,
        id: &str,
        process: &[u8],
        wanted: Wanted,
    ) -> Result<Streams, Failure> {
        let Some(target) = self.containers.get(&container) else {
            return Err(Failure::wrong_state("the container is gone"));
        };
        let (Some(host), Some(pod)) = (target.maker.on_host(), &self.pod) else {
            return Err(Failure::wrong_state("this monitor has no pod yet"));
        };
        let (container_id, runtime, run_dir) = (target.id.clone(), host.runtime.clone(), pod.run_dir.clone());
        let inside = host.place == Place::Inside;
        let (streams, ends) = Streams::open(key, wanted, &run_dir)
            .map_err(|error| Failure::system(format!("make the standard streams of exec {id}"), error))?;
        let process_file = self.exec_file(key, "process.json");
        write_private(&process_file, process)
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
        Ok(streams)
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
        let number = read_pid(&self.exec_file(key, "inner")).ok();
        self.remove_exec_files(key);
        let Some(exec) = self.execs.get_mut(&key) else { return };
        exec.known = Known::OnHost { inner: number };
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
            Err(failure) => return self.exec_on_host_failed(key, failure, pid.ok()),
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
            Some(status) => self.exec_ended(key, exit_code(status)),
            None => self.resume_exec_output(key),
        }
    }

    fn exec_on_host_failed(&mut self, key: u64, mut failure: Failure, pid: Option<Pid>) {
        let Some(exec) = self.execs.get_mut(&key) else { return };
        if failure.runtime_log.is_empty()
            && let Some(stderr) = &mut exec.streams.stderr
        {
            failure.runtime_log = present_text(stderr);
        }
        let container = exec.container;
        // A runtime that was stopped half-way may have started the process nevertheless.
        if let Some(child) = pid.and_then(|pid| Child::identify(pid).ok()) {
            kill_tree(&child, || self.candidates(container));
        }
        self.exec_failed(key, failure);
    }

    pub(super) fn kill_on_host(&mut self, key: u64) {
        let Some(exec) = self.execs.get(&key) else { return };
        let Stage::Running(child) = &exec.stage else { return };
        match exec.known {
            // The child only waits for it, and ends with it.
            Known::OnHost { inner: Some(number) } => self.kill_inside(exec.container, number),
            _ => kill_tree(child, || self.candidates(exec.container)),
        }
    }

    /// The processes among which an exec's descendants are.
    fn candidates(&self, container: u64) -> Vec<i32> {
        let cgroup = self.containers.get(&container).and_then(|container| container.cgroup.as_ref());
        cgroup.map_or_else(podvisor_cgroup::kin::all, Cgroup::processes)
    }
}

fn write_private(path: &std::path::Path, bytes: &[u8]) -> std::io::Result<()> {
    use std::io::Write;
    let mut options = std::fs::OpenOptions::new();
    options.write(true).create(true).truncate(true).mode(0o600).open(path)?.write_all(bytes)
}
