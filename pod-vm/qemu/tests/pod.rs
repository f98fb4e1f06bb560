//! With the other parts of a pod as they are built for users (`make build`): the agent and the file server.
#![allow(missing_docs)]

#[path = "../../hypervisor/tests/lab/mod.rs"]
mod lab;

/// The program under test.
const PROGRAM: &str = env!("CARGO_BIN_EXE_podvisor-qemu");

use std::io::{Read, Write};

use lab::{FileServer, Hypervisor, Suite, built, eventually, with_agent};
use podvisor_proto::agent;
use podvisor_proto::hypervisor::{AddShare, EndReason, RemoveShare, Start, Stop, request::Verb};
use prost::Message;

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
