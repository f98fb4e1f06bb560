//! The crate behind the command line of an OCI runtime, so that the runtime specification's own tests can be run on it.
//!
//! ```text
//! oci-runtime create [--bundle DIR] [--pid-file FILE] ID
//! oci-runtime start|state|delete ID
//! oci-runtime kill ID [SIGNAL]
//! ```
//!
//! Containers are kept in the directory that `OCI_RUNTIME_STATE` names, their cgroups in that which `OCI_RUNTIME_CGROUP` names (version 2).
//! A keeper, one process per container, holds what a pod's agent would: it creates, starts, reaps. The specification wants each command to
//! be a program of its own; they speak to the keeper through a socket.

use std::fs;
use std::io::{Read, Write};
use std::os::fd::AsFd;
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::{Path, PathBuf};
use std::process::{Command, ExitCode};

use anyhow::{Context, Result, bail, ensure};
use oci_spec::runtime::{Process, Spec};
use podvisor_cgroup::Layout;
use podvisor_container::{Cgroup, Io, Launch, Pending, Plan, Seccomp};
use rustix::event::{PollFd, PollFlags, poll};
use rustix::process::{Pid, Signal, WaitId, WaitIdOptions, kill_process, test_kill_process, waitid};
use serde::{Deserialize, Serialize};

/// As the specification has it (runtime.md, "State").
#[derive(Debug, Clone, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
struct State {
    oci_version: String,
    id: String,
    status: Status,
    #[serde(skip_serializing_if = "Option::is_none")]
    pid: Option<i32>,
    bundle: PathBuf,
    #[serde(default)]
    annotations: serde_json::Map<String, serde_json::Value>,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
enum Status {
    Created,
    Running,
    Stopped,
}

/// A container's directory.
struct Place(PathBuf);

impl Place {
    fn of(id: &str) -> Result<Self> {
        let name =
            !id.is_empty() && id.bytes().all(|byte| byte.is_ascii_alphanumeric() || b"+-._".contains(&byte));
        ensure!(name && id != "." && id != "..", "{id:?} is no container's id");
        Ok(Self(Path::new(&variable("OCI_RUNTIME_STATE")?).join(id)))
    }

    fn state(&self) -> Result<State> {
        let text = fs::read(self.0.join("state.json")).context("no such container")?;
        Ok(serde_json::from_slice(&text)?)
    }

    fn record(&self, state: &State) -> Result<()> {
        let new = self.0.join("state.json.new");
        fs::write(&new, serde_json::to_vec(state)?)?;
        Ok(fs::rename(new, self.0.join("state.json"))?)
    }
}

fn variable(name: &str) -> Result<String> {
    std::env::var(name).with_context(|| format!("the environment has no {name}"))
}

fn main() -> ExitCode {
    let arguments: Vec<String> = std::env::args().skip(1).collect();
    let words: Vec<&str> = arguments.iter().map(String::as_str).collect();
    let done = match words[..] {
        ["create", ref rest @ ..] => create(rest),
        ["keep", id, bundle] => keep(id, Path::new(bundle)),
        ["start", id] => start(id),
        ["state", id] => Place::of(id).and_then(|place| place.state()).and_then(|state| {
            println!("{}", serde_json::to_string(&state)?);
            Ok(())
        }),
        ["kill", id] => kill(id, "TERM"),
        ["kill", id, signal] => kill(id, signal),
        ["delete", id] => delete(id),
        _ => Err(anyhow::anyhow!("create, start, state, kill or delete, and a container's id")),
    };
    match done {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("oci-runtime: {error:#}");
            ExitCode::FAILURE
        }
    }
}

fn create(arguments: &[&str]) -> Result<()> {
    let (mut bundle, mut pid_file, mut id) = (PathBuf::from("."), None, None);
    let mut words = arguments.iter();
    while let Some(word) = words.next() {
        match *word {
            "--bundle" => bundle = words.next().context("--bundle takes a directory")?.into(),
            "--pid-file" => pid_file = Some(words.next().context("--pid-file takes a file")?),
            word => ensure!(id.replace(word).is_none(), "one container at a time"),
        }
    }
    let id = id.context("a container's id is missing")?;
    let place = Place::of(id)?;
    let bundle = fs::canonicalize(&bundle).with_context(|| format!("bundle {}", bundle.display()))?;
    fs::create_dir(&place.0).with_context(|| format!("container {id} cannot be made"))?;
    let created = keeper(id, &place, &bundle);
    if created.is_err() {
        let _ = fs::remove_dir_all(&place.0);
    }
    created?;
    if let Some(file) = pid_file {
        fs::write(file, place.state()?.pid.context("it has no process")?.to_string())?;
    }
    Ok(())
}

/// Starts it and hears whether the container is created.
fn keeper(id: &str, place: &Place, bundle: &Path) -> Result<()> {
    let report = UnixListener::bind(place.0.join("report"))?;
    let mut keeper = Command::new(std::env::current_exe()?).args(["keep", id]).arg(bundle).spawn()?;
    let (mut stream, _) = report.accept()?;
    let mut said = String::new();
    stream.read_to_string(&mut said)?;
    if said != "ok" {
        keeper.wait()?;
        bail!("{said}");
    }
    Ok(())
}

fn keep(id: &str, bundle: &Path) -> Result<()> {
    let place = Place::of(id)?;
    let mut report = UnixStream::connect(place.0.join("report"))?;
    match prepare(id, &place, bundle) {
        Ok((mut state, cgroup, mut pending)) => {
            report.write_all(b"ok")?;
            // The container's process, which has not executed anything yet, holds a copy of the descriptor.
            report.shutdown(std::net::Shutdown::Both)?;
            let kept = serve(&place, &mut state, &mut pending);
            let _ = kill_process(pending.pid(), Signal::KILL);
            waitid(WaitId::Pid(pending.pid()), WaitIdOptions::EXITED)?;
            let _ = cgroup.place().kill();
            cgroup.place().remove().map_err(|error| anyhow::anyhow!("{error}"))?;
            (state.status, state.pid) = (Status::Stopped, None);
            place.record(&state)?;
            kept
        }
        Err(error) => Ok(report.write_all(format!("{error:#}").as_bytes())?),
    }
}

fn prepare(id: &str, place: &Place, bundle: &Path) -> Result<(State, Cgroup, Pending)> {
    let spec = Spec::load(bundle.join("config.json")).context("config.json")?;
    let root = spec.root().as_ref().context("root is missing")?;
    let profile = spec.linux().as_ref().and_then(|linux| linux.seccomp().as_ref());
    let seccomp = profile.map(podvisor_seccomp::compile).transpose()?;
    let seccomp = seccomp.map(|compiled| Seccomp { program: compiled.program, flags: compiled.flags });
    let plan = Plan::new(&spec, bundle.join(root.path()), seccomp)?;
    let resources = spec.linux().as_ref().and_then(|linux| linux.resources().clone()).unwrap_or_default();
    let layout = Layout::V2 { mount: variable("OCI_RUNTIME_CGROUP")?.into() };
    let cgroup = Cgroup::create(layout.cgroup(&format!("/{id}")), &resources)?;
    let terminal = spec.process().as_ref().and_then(Process::terminal).unwrap_or(false);
    let io = if terminal { Io::Terminal } else { streams()? };
    let created = podvisor_container::create(&plan, &cgroup, &io).map_err(anyhow::Error::from).and_then(
        |mut pending| match advance(&mut pending) {
            Ok(()) => Ok(pending),
            Err(error) => {
                let _ = waitid(WaitId::Pid(pending.pid()), WaitIdOptions::EXITED);
                Err(error)
            }
        },
    );
    let pending = match created {
        Ok(pending) => pending,
        Err(error) => {
            let _ = cgroup.place().remove();
            return Err(error);
        }
    };
    let annotations = spec.annotations().clone().unwrap_or_default();
    let state = State {
        oci_version: spec.version().clone(),
        id: id.to_owned(),
        status: Status::Created,
        pid: Some(pending.pid().as_raw_pid()),
        bundle: bundle.to_owned(),
        annotations: annotations.into_iter().map(|(key, value)| (key, value.into())).collect(),
    };
    place.record(&state)?;
    Ok((state, cgroup, pending))
}

/// What this program was given.
fn streams() -> Result<Io> {
    Ok(Io::Streams {
        stdin: std::io::stdin().as_fd().try_clone_to_owned()?,
        stdout: std::io::stdout().as_fd().try_clone_to_owned()?,
        stderr: std::io::stderr().as_fd().try_clone_to_owned()?,
    })
}

fn advance(pending: &mut Pending) -> Result<()> {
    loop {
        poll(&mut [PollFd::new(&pending.descriptor(), PollFlags::IN)], None)?;
        if !matches!(pending.poll()?, Launch::Wait) {
            return Ok(());
        }
    }
}

/// Until the container's process has ended.
fn serve(place: &Place, state: &mut State, pending: &mut Pending) -> Result<()> {
    let commands = UnixListener::bind(place.0.join("start"))?;
    loop {
        let process = pending.pidfd().try_clone_to_owned()?;
        let mut events = [PollFd::new(&process, PollFlags::IN), PollFd::new(&commands, PollFlags::IN)];
        poll(&mut events, None)?;
        if !events[0].revents().is_empty() {
            return Ok(());
        }
        let (mut stream, _) = commands.accept()?;
        let started = if state.status == Status::Created {
            pending.start().map_err(anyhow::Error::from).and_then(|()| advance(pending))
        } else {
            Err(anyhow::anyhow!("it is not created but {:?}", state.status))
        };
        match started {
            Ok(()) => {
                state.status = Status::Running;
                place.record(state)?;
                stream.write_all(b"ok")?;
            }
            Err(error) => stream.write_all(format!("{error:#}").as_bytes())?,
        }
    }
}

fn start(id: &str) -> Result<()> {
    let place = Place::of(id)?;
    let state = place.state()?;
    ensure!(state.status == Status::Created, "it is not created but {:?}", state.status);
    let mut stream = UnixStream::connect(place.0.join("start")).context("its keeper")?;
    let mut said = String::new();
    stream.read_to_string(&mut said)?;
    ensure!(said == "ok", "{said}");
    Ok(())
}

fn kill(id: &str, signal: &str) -> Result<()> {
    let state = Place::of(id)?.state()?;
    let pid = state.pid.and_then(Pid::from_raw).context("it is neither created nor running")?;
    let name = signal.strip_prefix("SIG").unwrap_or(signal);
    let number = match name.parse() {
        Ok(number) => number,
        Err(_) => [
            "HUP", "INT", "QUIT", "ILL", "TRAP", "ABRT", "BUS", "FPE", "KILL", "USR1", "SEGV", "USR2",
            "PIPE", "ALRM", "TERM",
        ]
        .iter()
        .position(|known| *known == name)
        .map(|place| i32::try_from(place).unwrap_or(0) + 1)
        .with_context(|| format!("{signal:?} is no signal"))?,
    };
    if number == 0 {
        return Ok(test_kill_process(pid)?);
    }
    kill_process(pid, Signal::from_named_raw(number).context("no such signal")?)?;
    Ok(())
}

fn delete(id: &str) -> Result<()> {
    let place = Place::of(id)?;
    let state = place.state()?;
    ensure!(state.status == Status::Stopped, "it is not stopped but {:?}", state.status);
    Ok(fs::remove_dir_all(&place.0)?)
}
