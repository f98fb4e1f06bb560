//! With the other parts of a pod as they are built for users (`make build`): the agent and the file server.
#![allow(missing_docs)]

#[path = "../../hypervisor/tests/lab/mod.rs"]
mod lab;

/// The program under test.
const PROGRAM: &str = env!("CARGO_BIN_EXE_podvisor-qemu");

use std::fs;
use std::io::{Read, Write};
use std::os::fd::AsRawFd;
use std::path::{Path, PathBuf};
use std::process::{Child, Command};

use lab::{Hypervisor, Suite, eventually, target, with_agent};
use podvisor_proto::agent;
use podvisor_proto::hypervisor::{AddShare, EndReason, RemoveShare, Share, Start, Stop, request::Verb};
use prost::Message;

fn built(program: &str) -> PathBuf {
    let path = target().join("release").join(program);
    assert!(path.is_file(), "{} is missing; `make build` makes it", path.display());
    path.canonicalize().unwrap()
}

/// The agent answers on its port, and ends the machine when it is told to.
#[test]
fn the_agent_is_reached() {
    let directory = tempfile::tempdir().unwrap();
    let guest = with_agent(Suite::Backports, &built("podvisor-agent"), directory.path());
    let mut hypervisor = Hypervisor::new(&[]);
    let start = Start {
        kernel: guest.kernel.to_str().unwrap().into(),
        initramfs: guest.initramfs.to_str().unwrap().into(),
        ..hypervisor.start(Suite::Backports)
    };
    let started = hypervisor.begin(start);
    let mut socket = None;
    eventually("the agent listens", || {
        socket = hypervisor.connect(agent::CONTROL_PORT);
        socket.is_some()
    });
    let mut socket = socket.unwrap();
    let mut ask = |id: u64, verb: agent::request::Verb| {
        let request = agent::Request { id, verb: Some(verb) };
        let mut bytes = u32::try_from(request.encoded_len()).unwrap().to_le_bytes().to_vec();
        request.encode(&mut bytes).unwrap();
        socket.write_all(&bytes).unwrap();
        let mut header = [0; 4];
        socket.read_exact(&mut header).unwrap();
        let mut body = vec![0; u32::from_le_bytes(header) as usize];
        socket.read_exact(&mut body).unwrap();
        agent::Reply::decode(&*body).unwrap()
    };
    let hello = agent::Hello { protocol_version: agent::PROTOCOL_VERSION };
    match ask(1, agent::request::Verb::Hello(hello)).result.unwrap() {
        agent::reply::Result::Hello(hello) => assert!(hello.kernel_release.starts_with("6.12."), "{hello:?}"),
        other => panic!("{other:?}"),
    }
    ask(2, agent::request::Verb::Shutdown(agent::Shutdown {}));
    let ended = hypervisor.ended();
    assert_eq!(ended.reason(), EndReason::PowerOff, "{ended:?}");
    hypervisor.finish(started.pid);
}

/// podvisor-fs with a directory of its own.
struct FileServer {
    process: Child,
    directory: tempfile::TempDir,
}

impl FileServer {
    fn new(content: &str) -> Self {
        let directory = tempfile::tempdir().unwrap();
        let shared = directory.path().join("shared");
        fs::create_dir(&shared).unwrap();
        fs::write(shared.join("file"), content).unwrap();
        mount(&["--bind"], &shared);
        mount(&["--make-shared"], &shared);
        let (mut ready, theirs) = std::io::pipe().unwrap();
        // Another descriptor of the same pipe, which the program inherits.
        let inherited = rustix::io::dup(&theirs).unwrap();
        let process = Command::new(built("podvisor-fs"))
            .arg("--socket-path")
            .arg(directory.path().join("fs.sock"))
            .arg("--shared-dir")
            .arg(&shared)
            .args(["--ready-fd", &inherited.as_raw_fd().to_string()])
            .spawn()
            .unwrap();
        drop((theirs, inherited));
        assert_eq!(ready.read(&mut [0]).unwrap(), 0);
        Self { process, directory }
    }

    fn share(&self, tag: &str) -> Share {
        let socket_path = self.directory.path().join("fs.sock").to_str().unwrap().to_owned();
        Share { tag: tag.into(), socket_path }
    }
}

fn mount(how: &[&str], place: &Path) {
    let both = how == ["--bind"];
    let mut command = Command::new("mount");
    command.args(how).arg(place).args(both.then_some(place));
    assert!(command.status().unwrap().success());
}

impl Drop for FileServer {
    fn drop(&mut self) {
        let _ = self.process.kill();
        let _ = self.process.wait();
        let _ = Command::new("umount").arg(self.directory.path().join("shared")).status();
    }
}

#[test]
fn shares() {
    let from_start = FileServer::new("from the start");
    let later = FileServer::new("added later");
    let mut hypervisor = Hypervisor::new(&["--machine", "q35"]);
    let start = Start { shares: vec![from_start.share("pod")], ..hypervisor.start(Suite::Bookworm) };
    let started = hypervisor.begin(start);
    assert_eq!(hypervisor.tell("mount virtiofs pod /pod"), "ok");
    assert_eq!(hypervisor.tell("read /pod/file"), "from the start");

    hypervisor.done(Verb::AddShare(AddShare { share: Some(later.share("more")) }));
    eventually("the guest has the share", || hypervisor.tell("mount virtiofs more /more") == "ok");
    assert_eq!(hypervisor.tell("read /more/file"), "added later");
    assert_eq!(hypervisor.tell("unmount /more"), "ok");
    hypervisor.done(Verb::RemoveShare(RemoveShare { tag: "more".into() }));
    assert_eq!(hypervisor.tell("read /pod/file"), "from the start");
    hypervisor.done(Verb::Stop(Stop {}));
    hypervisor.finish(started.pid);
}

/// What a pod's machine has by default.
#[test]
fn a_share_of_a_microvm() {
    let server = FileServer::new("from the start");
    let mut hypervisor = Hypervisor::new(&[]);
    let start = Start { shares: vec![server.share("pod")], ..hypervisor.start(Suite::Backports) };
    let started = hypervisor.begin(start);
    assert!(!started.adds_shares);
    assert_eq!(hypervisor.tell("mount virtiofs pod /pod"), "ok");
    assert_eq!(hypervisor.tell("read /pod/file"), "from the start");
    hypervisor.done(Verb::Stop(Stop {}));
    hypervisor.finish(started.pid);
}
