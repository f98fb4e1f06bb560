//! A private place for one test: namespaces and a cgroup subtree of its own, the real monitor, the real runc.
//!
//! [`run`] starts the test's own binary again inside `unshare`, with that one test to run; there it is PID 1, and
//! whatever it leaves behind ends with it. Mounts, /run and /tmp are private, so nothing stays in the host's.
#![allow(dead_code, missing_docs, unreachable_pub)]

pub mod agent;
pub mod bundle;
pub mod client;
pub mod fake;
pub mod machine;

use std::fs;
use std::os::fd::AsRawFd;
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use podvisor_proto::monitor::{
    Adopt, CreateContainer, DeleteContainer, Exit, Hello, ListProcesses, Process, ProcessState, Runtime,
    StartContainer, Started, reply, request::Verb,
};

pub use bundle::Spec;
pub use client::Client;

/// The monitor under test; another build of it where the environment names one.
pub fn monitor() -> String {
    std::env::var("PODVISOR_MONITOR").unwrap_or_else(|_| env!("CARGO_BIN_EXE_podvisor-monitor").into())
}

/// The agent, which is the guest of a machine that is none.
pub fn agent_program() -> PathBuf {
    let path = std::env::var_os("PODVISOR_AGENT").map_or_else(
        || Path::new(env!("CARGO_BIN_EXE_podvisor-monitor")).with_file_name("podvisor-agent"),
        PathBuf::from,
    );
    assert!(path.exists(), "{} is missing: cargo build -p podvisor-agent", path.display());
    path
}

pub const POD: &str = "pod0";
const RUNC: &str = "/usr/sbin/runc";
const MARKER: &str = "PODVISOR_MONITOR_LAB";

/// Longest that anything in a test is waited for.
pub const PATIENCE: Duration = Duration::from_secs(30);

/// Makes two tests of each function: one whose pods have containers on the host, one whose pods are machines.
#[macro_export]
macro_rules! on_both {
    ($($name:ident)*) => {
        mod on_host {
            $(#[test] fn $name() { super::lab::run(super::$name); })*
        }
        mod in_guest {
            $(#[test] fn $name() { super::lab::run_in_guest(super::$name); })*
        }
        /// The hypervisor of the latter.
        #[test]
        fn plays_a_program() {
            lab::fake::play();
        }
    };
}

/// Runs a test inside.
pub fn run(test: impl FnOnce(&mut Lab)) {
    run_as(false, test);
}

/// The same with pods that are machines.
pub fn run_in_guest(test: impl FnOnce(&mut Lab)) {
    run_as(true, test);
}

fn run_as(guest: bool, test: impl FnOnce(&mut Lab)) {
    if let Ok(cgroup) = std::env::var(MARKER) {
        let mut lab = Lab::new(cgroup);
        lab.guest = guest;
        test(&mut lab);
        return;
    }
    let name = std::thread::current().name().expect("tests run in named threads").to_owned();
    let cgroup = format!("podvisor-test-{}-{}", std::process::id(), name.replace("::", "-"));
    let output = Command::new("unshare")
        .args(["--mount", "--net", "--ipc", "--uts", "--pid", "--fork", "--kill-child", "--mount-proc"])
        .arg(std::env::current_exe().expect("own path"))
        .args(["--exact", &name, "--nocapture", "--test-threads=1", "--include-ignored"])
        .env(MARKER, &cgroup)
        .stdin(Stdio::null())
        .output()
        .expect("unshare (util-linux) runs");
    remove_cgroups(&cgroup);
    let text = |bytes: &[u8]| String::from_utf8_lossy(bytes).into_owned();
    // The outer test harness shows it when it is told to.
    println!("{}", text(&output.stdout));
    assert!(output.status.success(), "failed inside: {}", text(&output.stderr));
}

fn controllers() -> Vec<PathBuf> {
    if Path::new("/sys/fs/cgroup/cgroup.controllers").exists() {
        return vec!["/sys/fs/cgroup".into()];
    }
    fs::read_dir("/sys/fs/cgroup").expect("cgroups").flatten().map(|entry| entry.path()).collect()
}

fn remove_cgroups(name: &str) {
    fn remove(directory: &Path) {
        for entry in fs::read_dir(directory).into_iter().flatten().flatten() {
            if entry.file_type().is_ok_and(|kind| kind.is_dir()) {
                remove(&entry.path());
            }
        }
        // Processes that were killed with the namespace take a moment to be gone.
        until("the cgroup can be removed", || fs::remove_dir(directory).is_ok() || !directory.exists());
    }
    for controller in controllers() {
        if controller.join(name).exists() {
            remove(&controller.join(name));
        }
    }
}

/// Waits for a condition.
pub fn until(what: &str, mut condition: impl FnMut() -> bool) {
    let deadline = Instant::now() + PATIENCE;
    while !condition() {
        assert!(Instant::now() < deadline, "waited {PATIENCE:?} in vain: {what}");
        std::thread::sleep(Duration::from_millis(2));
    }
}

/// Bytes of memory that a process shares with nobody.
pub fn private_memory(pid: u32) -> u64 {
    rolled_up(pid, &["Private_Clean:", "Private_Dirty:"])
}

/// Bytes of memory that a process has filled itself. Pages of its program do not count: how many of those are there, and with whom they are
/// shared, is for the kernel to decide, and a test's build has many.
pub fn own_memory(pid: u32) -> u64 {
    rolled_up(pid, &["Anonymous:"])
}

/// The sum of these lines of proc_pid_smaps_rollup(5).
fn rolled_up(pid: u32, names: &[&str]) -> u64 {
    let text = fs::read_to_string(format!("/proc/{pid}/smaps_rollup")).expect("smaps");
    let lines = text.lines().filter(|line| names.iter().any(|name| line.starts_with(name)));
    lines.filter_map(|line| line.split_ascii_whitespace().nth(1)?.parse::<u64>().ok()).sum::<u64>() * 1024
}

/// A monitor that has not been adopted, and the daemon's end of its connection.
pub fn unadopted() -> (Child, Client) {
    let (ours, theirs) = UnixStream::pair().expect("socketpair");
    // One test runs in this process, so nobody else inherits it.
    rustix::io::fcntl_setfd(&theirs, rustix::io::FdFlags::empty()).expect("clear close-on-exec");
    let child = Command::new(monitor())
        .args(["--control-fd", &theirs.as_raw_fd().to_string()])
        .stdin(Stdio::null())
        .spawn()
        .expect("the monitor starts");
    (child, Client::new(ours))
}

/// The private place.
pub struct Lab {
    pub cgroup: String,
    pub directory: PathBuf,
    pub rootfs: PathBuf,
    /// Its pods are machines.
    pub guest: bool,
}

impl Lab {
    fn new(cgroup: String) -> Self {
        use rustix::mount::{MountFlags, mount};
        for place in ["/run", "/tmp"] {
            mount("tmpfs", place, "tmpfs", MountFlags::empty(), c"mode=0755").expect("mount a tmpfs");
        }
        let up = Command::new("ip").args(["link", "set", "lo", "up"]).status().expect("ip (iproute2) runs");
        assert!(up.success());
        let directory = PathBuf::from("/run/lab");
        let rootfs = directory.join("rootfs");
        bundle::make_rootfs(&rootfs);
        Self { cgroup, directory, rootfs, guest: false }
    }

    /// A monitor of [`POD`] in the node's network, and a connection to it.
    pub fn pod(&self) -> Pod {
        if self.guest { self.machine() } else { self.pod_with(self.directory.join("run"), "") }
    }

    pub fn pod_with(&self, run_dir: PathBuf, network_namespace: &str) -> Pod {
        let (child, mut daemon) = unadopted();
        let state_dir = self.directory.join("state");
        daemon.ask(Verb::Hello(Hello { protocol_version: 1 })).expect("hello");
        daemon.done(Verb::Adopt(Adopt {
            pod_id: POD.into(),
            run_dir: run_dir.display().to_string(),
            state_dir: state_dir.display().to_string(),
            network_namespace: network_namespace.into(),
        }));
        Pod {
            child,
            daemon,
            run_dir,
            state_dir,
            logs: self.directory.join("logs"),
            bundles: self.directory.join("bundles"),
            rootfs: self.rootfs.clone(),
            cgroup: self.cgroup.clone(),
            runtime: RUNC.into(),
            timeout_ms: 0,
            guest: false,
        }
    }

    /// An executable script.
    pub fn script(&self, name: &str, text: &str) -> String {
        use std::os::unix::fs::PermissionsExt;
        let path = self.directory.join(name);
        fs::write(&path, format!("#!/bin/sh\n{text}\n")).expect("write the script");
        fs::set_permissions(&path, fs::Permissions::from_mode(0o755)).expect("make it executable");
        path.display().to_string()
    }
}

/// A pod's monitor and what a test says to it.
pub struct Pod {
    pub child: Child,
    pub daemon: Client,
    pub run_dir: PathBuf,
    pub state_dir: PathBuf,
    pub logs: PathBuf,
    pub bundles: PathBuf,
    pub rootfs: PathBuf,
    pub cgroup: String,
    pub runtime: String,
    pub timeout_ms: u32,
    /// The pod is a virtual machine: its containers are made in it.
    pub guest: bool,
}

impl Pod {
    /// Another connection, as a new daemon or a stream makes it.
    pub fn connect(&self) -> Client {
        Client::new(UnixStream::connect(self.run_dir.join("monitor.sock")).expect("connect to the monitor"))
    }

    /// A connection that gets events.
    pub fn subscribe(&self) -> Client {
        let mut events = self.connect();
        events.done(Verb::Subscribe(podvisor_proto::monitor::Subscribe {}));
        events
    }

    /// The request that creates a container, with its bundle written.
    pub fn container(&self, id: &str, spec: &Spec) -> CreateContainer {
        let bundle = self.bundles.join(id);
        // In a guest the root is where the agent mounts it.
        let rootfs = if self.guest { Path::new("") } else { &self.rootfs };
        spec.write(&bundle, rootfs, &format!("/{}/{id}", self.cgroup));
        let runtime = Runtime {
            path: self.runtime.clone(),
            root: "/run/lab/runc".into(),
            timeout_ms: self.timeout_ms,
            ..Runtime::default()
        };
        CreateContainer {
            place: 0,
            guest: self.guest.then(|| machine::guest_container(id)),
            container_id: id.into(),
            runtime: (!self.guest).then_some(runtime),
            bundle: bundle.display().to_string(),
            terminal: spec.terminal,
            stdin: spec.stdin,
            stdin_once: spec.stdin_once,
            log_path: self.log(id).display().to_string(),
            log_line: 0,
        }
    }

    pub fn log(&self, id: &str) -> PathBuf {
        self.logs.join(id).join("0.log")
    }

    /// The log's lines without their times.
    pub fn log_lines(&self, id: &str) -> Vec<String> {
        let text = fs::read_to_string(self.log(id)).unwrap_or_default();
        // Not lines(), which would take a terminal's carriage return for a part of the line's end.
        text.split_terminator('\n')
            .map(|line| {
                let (time, rest) = line.split_once(' ').expect("a time");
                assert!(time.len() == 30 && time.ends_with('Z') && time.contains('T'), "{line:?}");
                rest.to_owned()
            })
            .collect()
    }

    pub fn create(&mut self, id: &str, spec: &Spec) -> Started {
        let request = self.container(id, spec);
        match self.daemon.ask(Verb::CreateContainer(request)).expect("create") {
            reply::Result::Started(started) => started,
            other => panic!("create answered {other:?}"),
        }
    }

    pub fn start(&mut self, id: &str) {
        self.daemon.done(Verb::StartContainer(StartContainer { container_id: id.into() }));
    }

    pub fn run(&mut self, id: &str, spec: &Spec) -> Started {
        let started = self.create(id, spec);
        self.start(id);
        started
    }

    pub fn delete(&mut self, id: &str) {
        self.daemon.done(Verb::DeleteContainer(DeleteContainer { container_id: id.into() }));
    }

    pub fn list(&mut self) -> Vec<Process> {
        match self.daemon.ask(Verb::ListProcesses(ListProcesses {})).expect("list") {
            reply::Result::Processes(processes) => processes.processes,
            other => panic!("list answered {other:?}"),
        }
    }

    /// The same without the machine.
    pub fn containers(&mut self) -> Vec<Process> {
        let mut processes = self.list();
        processes.retain(|process| process.id != POD);
        processes
    }

    pub fn state(&mut self, id: &str) -> Option<ProcessState> {
        self.list().into_iter().find(|process| process.id == id).map(|process| process.state())
    }

    /// Waits for a container's end, by asking.
    pub fn exit(&mut self, id: &str) -> Exit {
        let mut exit = None;
        until("the container has exited", || {
            exit = self.list().into_iter().find(|process| process.id == id).and_then(|process| process.exit);
            exit.is_some()
        });
        exit.expect("just seen")
    }

    /// Runs a container to its end and gives its exit.
    pub fn run_to_end(&mut self, id: &str, spec: &Spec) -> Exit {
        self.run(id, spec);
        self.exit(id)
    }
}

impl Drop for Pod {
    fn drop(&mut self) {
        // A test that panics: say what the monitor had to say.
        if std::thread::panicking()
            && let Ok(text) = fs::read_to_string(self.run_dir.join("monitor.log"))
        {
            eprintln!("monitor.log:\n{text}");
        }
    }
}
