//! A root file system around a static busybox, a cgroup, and a caller of the crate as simple as can be: it blocks.
#![allow(dead_code)] // not every test program uses all of it

use std::cell::Cell;
use std::fs::{self, File};
use std::io::Read;
use std::os::fd::{AsFd, OwnedFd};
use std::path::PathBuf;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail, ensure};
use oci_spec::runtime::{Process, Spec};
use podvisor_cgroup::Layout;
use podvisor_container::{Cgroup, Io, Launch, Pending, Plan, ProcessPlan, Seccomp};
use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::mount::{MountFlags, UnmountFlags};
use rustix::process::{Pid, WaitId, WaitIdOptions, waitid};
use serde_json::{Value, json};

const PATIENCE: Duration = Duration::from_secs(60);

pub(crate) struct Lab {
    directory: tempfile::TempDir,
    cgroups: Layout,
    count: Cell<u32>,
}

/// How a process ended, and what it wrote.
#[derive(Debug)]
pub(crate) struct Outcome {
    pub(crate) code: i32,
    pub(crate) output: String,
}

pub(crate) struct Container {
    pending: Pending,
    cgroup: Cgroup,
    output: Option<OwnedFd>,
    /// Holds for its further processes too.
    seccomp: Option<Seccomp>,
}

impl Lab {
    pub(crate) fn new() -> Result<Self> {
        ensure!(
            std::env::var_os(podvisor_critest::sandbox::MARK).is_some(),
            "run this in a sandbox: tests/scripts/cargo-test"
        );
        let directory = tempfile::tempdir()?;
        // The sandbox's own part of version 2, also where the machine has its controllers in version 1.
        let cgroups = directory.path().join("cgroup");
        fs::create_dir(&cgroups)?;
        rustix::mount::mount("cgroup2", &cgroups, "cgroup2", MountFlags::empty(), c"")
            .context("mounting cgroup2")?;
        let lab = Self { cgroups: Layout::V2 { mount: cgroups }, directory, count: Cell::new(0) };
        let rootfs = lab.rootfs();
        for directory in ["bin", "proc", "dev", "sys", "tmp", "etc"] {
            fs::create_dir_all(rootfs.join(directory))?;
        }
        let busybox = podvisor_critest::contents::busybox_program();
        fs::copy(&busybox, rootfs.join("bin/busybox")).context("`make images` fetches busybox")?;
        let listed = std::process::Command::new(&busybox).arg("--list").output()?;
        for name in String::from_utf8(listed.stdout)?.lines().filter(|name| *name != "busybox") {
            std::os::unix::fs::symlink("busybox", rootfs.join("bin").join(name))?;
        }
        Ok(lab)
    }

    pub(crate) fn rootfs(&self) -> PathBuf {
        self.directory.path().join("rootfs")
    }

    pub(crate) fn directory(&self, name: &str) -> Result<PathBuf> {
        let path = self.directory.path().join(name);
        fs::create_dir(&path)?;
        Ok(path)
    }

    /// Makes a user of the host the owner of the root file system.
    pub(crate) fn give_to(&self, uid: u32) -> Result<()> {
        let mut pending = vec![self.directory.path().to_owned()];
        while let Some(path) = pending.pop() {
            std::os::unix::fs::lchown(&path, Some(uid), Some(uid))?;
            if fs::symlink_metadata(&path)?.is_dir() {
                pending.extend(fs::read_dir(&path)?.flatten().map(|entry| entry.path()));
            }
        }
        Ok(())
    }

    pub(crate) fn spec(&self, script: &str, change: impl FnOnce(&mut Value)) -> Value {
        let mut spec = json!({
            "ociVersion": "1.0.2",
            "root": {"path": self.rootfs()},
            "process": {
                "args": ["sh", "-c", script], "env": ["PATH=/bin"], "cwd": "/", "user": {"uid": 0, "gid": 0},
            },
            "mounts": [
                {"destination": "/proc", "type": "proc", "source": "proc", "options": ["nosuid", "noexec", "nodev"]},
                {"destination": "/dev", "type": "tmpfs", "source": "tmpfs", "options": ["nosuid", "mode=755", "size=65536k"]},
                {"destination": "/dev/pts", "type": "devpts", "source": "devpts",
                 "options": ["nosuid", "noexec", "newinstance", "ptmxmode=0666", "mode=0620"]},
                {"destination": "/dev/shm", "type": "tmpfs", "source": "shm", "options": ["nosuid", "mode=1777"]},
                {"destination": "/sys/fs/cgroup", "type": "cgroup", "source": "cgroup", "options": ["ro", "nosuid"]},
            ],
            "linux": {"namespaces": [
                {"type": "mount"}, {"type": "pid"}, {"type": "network"}, {"type": "ipc"}, {"type": "uts"}, {"type": "cgroup"},
            ]},
        });
        change(&mut spec);
        spec
    }

    /// One for a process that is no container's.
    pub(crate) fn cgroup(&self, name: &str) -> Result<Cgroup> {
        let name = format!("/{name}-{}", std::process::id());
        Ok(Cgroup::create(self.cgroups.cgroup(&name), &Default::default())?)
    }

    pub(crate) fn create(&self, spec: &Value) -> Result<Container> {
        let spec: Spec = serde_json::from_value(spec.clone())?;
        let profile = spec.linux().as_ref().and_then(|linux| linux.seccomp().as_ref());
        let seccomp = profile.map(podvisor_seccomp::compile).transpose()?;
        let seccomp = seccomp.map(|compiled| Seccomp { program: compiled.program, flags: compiled.flags });
        let plan = Plan::new(&spec, self.rootfs(), seccomp.clone())?;
        self.count.set(self.count.get() + 1);
        let name = format!("/container-{}-{}", std::process::id(), self.count.get());
        let resources = spec.linux().as_ref().and_then(|linux| linux.resources().clone()).unwrap_or_default();
        let cgroup = Cgroup::create(self.cgroups.cgroup(&name), &resources)?;
        let terminal = spec.process().as_ref().and_then(Process::terminal).unwrap_or(false);
        let (io, output) = connections(terminal)?;
        let pending = podvisor_container::create(&plan, &cgroup, &io)?;
        Ok(Container { pending, cgroup, output, seccomp })
    }

    /// A container from its creation to its removal.
    pub(crate) fn shell(&self, script: &str, change: impl FnOnce(&mut Value)) -> Result<Outcome> {
        let mut container = self.create(&self.spec(script, change))?;
        container.ready()?;
        container.start()?;
        let outcome = container.wait()?;
        container.remove()?;
        Ok(outcome)
    }
}

fn connections(terminal: bool) -> Result<(Io, Option<OwnedFd>)> {
    if terminal {
        return Ok((Io::Terminal, None));
    }
    let (reader, writer) = rustix::pipe::pipe_with(rustix::pipe::PipeFlags::CLOEXEC)?;
    let io =
        Io::Streams { stdin: File::open("/dev/null")?.into(), stdout: writer.try_clone()?, stderr: writer };
    Ok((io, Some(reader)))
}

fn readable(descriptor: impl AsFd) -> Result<()> {
    let limit = Timespec { tv_sec: PATIENCE.as_secs().cast_signed(), tv_nsec: 0 };
    let ready = poll(&mut [PollFd::new(&descriptor, PollFlags::IN)], Some(&limit))?;
    ensure!(ready > 0, "nothing came within {PATIENCE:?}");
    Ok(())
}

fn advance(pending: &mut Pending) -> Result<Launch> {
    loop {
        readable(pending.descriptor())?;
        match pending.poll()? {
            Launch::Wait => {}
            news => return Ok(news),
        }
    }
}

/// Reads to the end, then reaps.
fn finish(output: Option<OwnedFd>, terminal: Option<OwnedFd>, pid: Pid) -> Result<Outcome> {
    let mut bytes = Vec::new();
    if let Some(output) = output.or(terminal) {
        // A terminal ends with EIO.
        let _ = File::from(output).read_to_end(&mut bytes);
    }
    let ended = waitid(WaitId::Pid(pid), WaitIdOptions::EXITED)?.context("it has not ended")?;
    let code = ended.exit_status().or(ended.terminating_signal().map(|signal| 128 + signal)).unwrap_or(-1);
    Ok(Outcome { code, output: String::from_utf8_lossy(&bytes).into_owned() })
}

impl Drop for Lab {
    fn drop(&mut self) {
        let _ = rustix::mount::unmount(self.directory.path().join("cgroup"), UnmountFlags::DETACH);
    }
}

impl Container {
    pub(crate) fn ready(&mut self) -> Result<()> {
        match advance(&mut self.pending)? {
            Launch::Ready => Ok(()),
            other => bail!("it is {other:?} and not ready"),
        }
    }

    pub(crate) fn start(&mut self) -> Result<()> {
        self.pending.start()?;
        match advance(&mut self.pending)? {
            Launch::Executed => Ok(()),
            other => bail!("it is {other:?} and not executed"),
        }
    }

    pub(crate) fn wait(&mut self) -> Result<Outcome> {
        finish(self.output.take(), self.pending.take_terminal(), self.pending.pid())
    }

    pub(crate) fn execute(&self, process: &Value) -> Result<Outcome> {
        let process: Process = serde_json::from_value(process.clone())?;
        let plan = ProcessPlan::new(&process, self.seccomp.clone())?;
        let (io, output) = connections(false)?;
        let init = self.pending.pidfd().try_clone_to_owned()?;
        let mut pending = podvisor_container::execute(&plan, &init, self.pending.pid(), &self.cgroup, &io)?;
        drop(io);
        let executed = advance(&mut pending);
        let outcome = finish(output, pending.take_terminal(), pending.pid())?;
        executed.map(|_| outcome)
    }

    pub(crate) fn kill(&self) -> Result<()> {
        Ok(self.cgroup.place().kill()?)
    }

    pub(crate) fn until_processes(&self, count: usize) -> Result<()> {
        let deadline = Instant::now() + PATIENCE;
        while self.cgroup.place().pids()?.len() < count {
            ensure!(Instant::now() < deadline, "there are fewer than {count} processes");
            std::thread::yield_now();
        }
        Ok(())
    }

    pub(crate) fn remove(&self) -> Result<()> {
        Ok(self.cgroup.place().remove()?)
    }
}

impl Drop for Container {
    fn drop(&mut self) {
        let _ = self.cgroup.place().kill();
        let _ = rustix::process::waitpid(Some(self.pending.pid()), rustix::process::WaitOptions::empty());
        let _ = self.cgroup.place().remove();
    }
}
