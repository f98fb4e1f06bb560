//! An agent, a root file system for its containers, and a client that blocks.

use std::collections::{BTreeMap, VecDeque};
use std::fs;
use std::io::{BufRead, BufReader, Read, Write};
use std::net::Shutdown;
use std::os::unix::net::UnixStream;
use std::path::PathBuf;
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use podvisor_proto::agent::request::Verb;
use podvisor_proto::agent::{
    CreateContainer, Error, ErrorCode, Event, Exec, Exit, Hello, KillContainer, Open, Opened, Personalise,
    Reply, Request, Standard, StandardStream, StartContainer, UserNamespace, event, open, reply,
};
use prost::Message;
use rustix::mount::{MountFlags, UnmountFlags, mount, unmount};
use serde_json::{Value, json};

const PATIENCE: Duration = Duration::from_secs(60);

/// What a request came to.
pub(crate) type Outcome = Result<reply::Result, Error>;

/// The code of a refusal.
pub(crate) fn code<T: std::fmt::Debug>(outcome: Result<T, Error>) -> ErrorCode {
    outcome.expect_err("it must be refused").code()
}

/// A control connection.
pub(crate) struct Client {
    socket: UnixStream,
    count: u64,
    answers: BTreeMap<u64, Outcome>,
    events: VecDeque<Event>,
}

/// A stream connection.
pub(crate) struct Bytes(UnixStream);

/// The agent.
pub(crate) struct Guest {
    directory: tempfile::TempDir,
    agent: Child,
    client: Client,
}

pub(crate) fn process(arguments: &[&str]) -> Value {
    json!({"args": arguments, "env": ["PATH=/bin"], "cwd": "/", "user": {"uid": 0, "gid": 0}})
}

/// A spec without its root.
pub(crate) fn shell(script: &str) -> Value {
    json!({
        "ociVersion": "1.0.2",
        "process": process(&["sh", "-c", script]),
        "root": {"path": ""},
        "mounts": [
            {"destination": "/proc", "type": "proc", "source": "proc", "options": ["nosuid", "noexec", "nodev"]},
            {"destination": "/dev", "type": "tmpfs", "source": "tmpfs", "options": ["nosuid", "mode=755"]},
            {"destination": "/dev/pts", "type": "devpts", "source": "devpts",
             "options": ["nosuid", "noexec", "newinstance", "ptmxmode=0666", "mode=0620"]},
        ],
        "linux": {"namespaces": [
            {"type": "mount"}, {"type": "pid"}, {"type": "ipc"}, {"type": "uts"}, {"type": "cgroup"},
        ]},
    })
}

impl Guest {
    pub(crate) fn new() -> Self {
        Self::started_by(&[], None)
    }

    /// Its agent has a network namespace of its own, and a /run; the pod has a user namespace.
    pub(crate) fn with_user_namespace() -> Self {
        let own_run = "mount -t tmpfs run /run && exec \"$@\"";
        Self::started_by(
            &["unshare", "--net", "--mount", "--propagation", "slave", "sh", "-c", own_run, "agent"],
            Some(UserNamespace { uid: 300_000, uids: 65_536, gid: 300_000, gids: 65_536 }),
        )
    }

    /// Makes a user of the host the owner of the root file system.
    pub(crate) fn give_root_to(&self, uid: u32) {
        let uid = uid.to_string();
        let status = Command::new("chown").args(["-hR", &uid]).arg(self.directory.path()).status();
        assert!(status.expect("chown runs").success());
    }

    /// Its agent has a network namespace of its own.
    pub(crate) fn with_network() -> Self {
        Self::started_by(&["unshare", "--net"], None)
    }

    /// Of the agent.
    pub(crate) fn pid(&self) -> u32 {
        self.agent.id()
    }

    fn started_by(words: &[&str], user_namespace: Option<UserNamespace>) -> Self {
        assert!(
            std::env::var_os(podvisor_critest::sandbox::MARK).is_some(),
            "run this in a sandbox: tests/scripts/cargo-test"
        );
        let directory = tempfile::tempdir().expect("a directory");
        let cgroups = directory.path().join("cgroup");
        fs::create_dir(&cgroups).expect("make a directory");
        mount("cgroup2", &cgroups, "cgroup2", MountFlags::empty(), c"").expect("mount cgroup2");
        let own = cgroups.join(format!("agent-{}", directory.path().file_name().unwrap().display()));
        fs::create_dir(&own).expect("make a cgroup");
        let rootfs = directory.path().join("rootfs");
        for name in ["bin", "proc", "dev", "tmp", "etc"] {
            fs::create_dir_all(rootfs.join(name)).expect("make the root");
        }
        let busybox = podvisor_critest::contents::busybox_program();
        fs::copy(&busybox, rootfs.join("bin/busybox")).expect("`make images` fetches busybox");
        let listed = Command::new(&busybox).arg("--list").output().expect("busybox runs");
        for name in String::from_utf8(listed.stdout).unwrap().lines().filter(|name| *name != "busybox") {
            std::os::unix::fs::symlink("busybox", rootfs.join("bin").join(name)).expect("link");
        }
        let words = [words, &[env!("CARGO_BIN_EXE_podvisor-agent")]].concat();
        let agent = Command::new(words[0])
            .args(&words[1..])
            .arg("--listen")
            .arg(directory.path())
            .arg("--cgroups")
            .arg(&own)
            .stdin(Stdio::null())
            .spawn()
            .expect("the agent starts");
        let client = Client::hello(&directory.path().join("control.sock"));
        let mut guest = Self { directory, agent, client };
        // The sysctls are a pod's alone, and set only where it has namespaces.
        let sysctls = [("net.ipv4.ip_default_ttl", "77"), ("kernel.shmmni", "33")];
        guest.done(Verb::Personalise(Personalise {
            seed: vec![7; 32],
            hostname: "the-pod".into(),
            sysctls: sysctls.map(|(name, value)| (name.into(), value.into())).into(),
            user_namespace,
            ..Default::default()
        }));
        guest
    }

    fn own_cgroup(&self) -> PathBuf {
        let name = self.directory.path().file_name().unwrap();
        self.directory.path().join("cgroup").join(format!("agent-{}", name.display()))
    }

    pub(crate) fn rootfs(&self) -> PathBuf {
        self.directory.path().join("rootfs")
    }

    /// Names of the containers' cgroups.
    pub(crate) fn cgroups(&self) -> Vec<String> {
        let entries = fs::read_dir(self.own_cgroup().join("pod")).expect("the pod's cgroup").flatten();
        let directories = entries.filter(|entry| entry.path().is_dir());
        directories.map(|entry| entry.file_name().into_string().unwrap()).collect()
    }

    pub(crate) fn ask(&mut self, verb: Verb) -> Outcome {
        self.client.ask(verb)
    }

    /// Asks and does not wait; the answer is [`Self::answer`]'s.
    pub(crate) fn send(&mut self, verb: Verb) -> u64 {
        self.client.send(verb)
    }

    pub(crate) fn answer(&mut self, request: u64) -> Outcome {
        self.client.answer(request)
    }

    pub(crate) fn done(&mut self, verb: Verb) {
        let shown = format!("{verb:?}");
        match self.ask(verb) {
            Ok(reply::Result::Done(_)) => {}
            other => panic!("{shown}: {other:?}"),
        }
    }

    /// The spec with its root.
    pub(crate) fn spec(&self, spec: &Value) -> Value {
        let mut spec = spec.clone();
        spec["root"]["path"] = json!(self.rootfs());
        spec
    }

    /// Kills one of its processes from outside.
    pub(crate) fn kill(pid: i32) {
        let pid = rustix::process::Pid::from_raw(pid).expect("a pid");
        rustix::process::kill_process(pid, rustix::process::Signal::KILL).expect("it is there");
    }

    pub(crate) fn create(&mut self, id: &str, spec: &Value, stdin: bool) {
        let spec = self.spec(spec);
        let create = CreateContainer {
            container_id: id.into(),
            spec: spec.to_string().into_bytes(),
            stdin,
            ..Default::default()
        };
        match self.ask(Verb::CreateContainer(create)) {
            Ok(reply::Result::Started(_)) => {}
            other => panic!("{other:?}"),
        }
    }

    pub(crate) fn start(&mut self, id: &str) {
        self.done(Verb::StartContainer(StartContainer { container_id: id.into() }));
    }

    pub(crate) fn running(&mut self, id: &str, script: &str) {
        self.create(id, &shell(script), false);
        self.start(id);
    }

    pub(crate) fn execute(&mut self, container: &str, id: &str, arguments: &[&str]) -> Outcome {
        self.ask(Verb::Exec(Exec {
            container_id: container.into(),
            exec_id: id.into(),
            process: process(arguments).to_string().into_bytes(),
            ..Default::default()
        }))
    }

    /// A shell sets its trap some time after it was started: until then PID 1 of a namespace ignores the signal.
    pub(crate) fn signal_until_trapped(&mut self, id: &str, signal: i32) {
        let deadline = Instant::now() + PATIENCE;
        while self.client.events.is_empty() {
            assert!(Instant::now() < deadline, "the signal is not obeyed");
            self.done(Verb::KillContainer(KillContainer { container_id: id.into(), signal, all: false }));
        }
    }

    pub(crate) fn stream(&self, id: &str, which: StandardStream) -> Bytes {
        let standard = Standard { id: id.into(), which: which.into() };
        self.open(&Open { stream: Some(open::Stream::Standard(standard)) }).expect("the stream opens")
    }

    pub(crate) fn open(&self, open: &Open) -> Result<Bytes, Error> {
        let mut socket = connect(&self.directory.path().join("stream.sock"));
        send(&mut socket, open);
        match receive::<Opened>(&mut socket).error {
            None => Ok(Bytes(socket)),
            Some(error) => Err(error),
        }
    }

    /// Bytes of the agent's own memory.
    pub(crate) fn resident(&self) -> u64 {
        let status = fs::read_to_string(format!("/proc/{}/status", self.agent.id())).expect("its status");
        let line = status.lines().find_map(|line| line.strip_prefix("VmRSS:")).expect("VmRSS");
        line.split_whitespace().next().unwrap().parse::<u64>().unwrap() * 1024
    }

    pub(crate) fn exit_of(&mut self, id: &str) -> Exit {
        loop {
            if let Some(event::Kind::Exited(exited)) = self.next_event().kind
                && exited.id == id
            {
                return exited.exit.expect("an exit");
            }
        }
    }

    pub(crate) fn next_event(&mut self) -> Event {
        self.client.next_event()
    }

    pub(crate) fn reconnect(&mut self) {
        self.client = Client::hello(&self.directory.path().join("control.sock"));
    }

    /// A control connection that has not said Hello.
    pub(crate) fn silent(&self) -> Client {
        Client::new(&self.directory.path().join("control.sock"))
    }

    pub(crate) fn raw_control(&self, bytes: &[u8]) {
        write_and_see_the_end(&self.directory.path().join("control.sock"), bytes);
    }

    pub(crate) fn raw_stream(&self, bytes: &[u8]) {
        write_and_see_the_end(&self.directory.path().join("stream.sock"), bytes);
    }
}

fn write_and_see_the_end(path: &std::path::Path, bytes: &[u8]) {
    let mut socket = connect(path);
    socket.write_all(bytes).expect("write");
    // A reset is an end too.
    let _ = socket.shutdown(Shutdown::Write);
    let _ = socket.read_to_end(&mut Vec::new());
}

impl Drop for Guest {
    fn drop(&mut self) {
        // Everything below its cgroup, the agent's own children among them.
        let _ = fs::write(self.own_cgroup().join("cgroup.kill"), "1");
        let _ = self.agent.kill();
        let _ = self.agent.wait();
        let deadline = Instant::now() + PATIENCE;
        for directory in self
            .cgroups()
            .iter()
            .map(|name| self.own_cgroup().join("pod").join(name))
            .chain([self.own_cgroup().join("pod"), self.own_cgroup()])
        {
            while directory.exists() && fs::remove_dir(&directory).is_err() && Instant::now() < deadline {
                std::thread::yield_now();
            }
        }
        let _ = unmount(self.directory.path().join("cgroup"), UnmountFlags::DETACH);
    }
}

fn connect(path: &std::path::Path) -> UnixStream {
    let deadline = Instant::now() + PATIENCE;
    loop {
        match UnixStream::connect(path) {
            Ok(socket) => {
                socket.set_read_timeout(Some(PATIENCE)).expect("set a time limit");
                return socket;
            }
            Err(error) => assert!(Instant::now() < deadline, "the agent does not listen: {error}"),
        }
        std::thread::yield_now();
    }
}

fn send(socket: &mut UnixStream, message: &impl Message) {
    let body = message.encode_to_vec();
    let length = u32::try_from(body.len()).unwrap();
    socket.write_all(&[&length.to_le_bytes()[..], &body].concat()).expect("send");
}

fn receive<M: Message + Default>(socket: &mut UnixStream) -> M {
    let mut length = [0; 4];
    socket.read_exact(&mut length).expect("an answer");
    let mut body = vec![0; usize::try_from(u32::from_le_bytes(length)).unwrap()];
    socket.read_exact(&mut body).expect("a whole answer");
    M::decode(body.as_slice()).expect("a message")
}

impl Client {
    fn new(path: &std::path::Path) -> Self {
        Self { socket: connect(path), count: 0, answers: BTreeMap::new(), events: VecDeque::new() }
    }

    fn hello(path: &std::path::Path) -> Self {
        let mut client = Self::new(path);
        let reply::Result::Hello(hello) = client.ask(Verb::Hello(Hello { protocol_version: 1 })).unwrap()
        else {
            panic!("no Hello")
        };
        assert_eq!(hello.protocol_version, 1);
        client
    }

    pub(crate) fn ask(&mut self, verb: Verb) -> Outcome {
        let request = self.send(verb);
        self.answer(request)
    }

    fn send(&mut self, verb: Verb) -> u64 {
        self.count += 1;
        send(&mut self.socket, &Request { id: self.count, verb: Some(verb) });
        self.count
    }

    fn answer(&mut self, request: u64) -> Outcome {
        loop {
            if let Some(answer) = self.answers.remove(&request) {
                return answer;
            }
            let reply: Reply = receive(&mut self.socket);
            match reply.result.expect("a result") {
                reply::Result::Event(event) => self.events.push_back(event),
                other if reply.id == 0 => panic!("an answer to nothing: {other:?}"),
                reply::Result::Error(error) => drop(self.answers.insert(reply.id, Err(error))),
                result => drop(self.answers.insert(reply.id, Ok(result))),
            }
        }
    }

    fn next_event(&mut self) -> Event {
        if let Some(event) = self.events.pop_front() {
            return event;
        }
        let reply: Reply = receive(&mut self.socket);
        match reply.result {
            Some(reply::Result::Event(event)) => event,
            other => panic!("no event: {other:?}"),
        }
    }
}

impl Bytes {
    pub(crate) fn write(&self, bytes: &[u8]) {
        (&self.0).write_all(bytes).expect("write to the stream");
    }

    pub(crate) fn close(&self) {
        self.0.shutdown(Shutdown::Write).expect("close the stream");
    }

    pub(crate) fn read_line(&self) -> String {
        let mut line = String::new();
        BufReader::with_capacity(1, &self.0).read_line(&mut line).expect("a line");
        line
    }

    pub(crate) fn read_all(&self) -> String {
        let mut bytes = Vec::new();
        (&self.0).read_to_end(&mut bytes).expect("read the stream");
        String::from_utf8(bytes).expect("text")
    }
}
