//! The protocol itself: hostile and clumsy clients, and connections into the pod.
#![allow(missing_docs)]

mod lab;

use std::io::{Read, Write};
use std::net::TcpListener;
use std::process::Command;

use lab::client::{connected, sync};
use lab::{Client, Lab, Pod, Spec, private_memory, run, until};
use podvisor_proto::monitor::{
    Adopt, Attach, Connect, ErrorCode, Hello, ListProcesses, MAX_FRAME, PROTOCOL_VERSION, Request, Subscribe,
    reply, request::Verb,
};
use prost::Message;

#[test]
fn hello_and_adopt() {
    run(|_| {
        let (mut child, mut daemon) = lab::unadopted();
        assert_eq!(daemon.refused(Verb::Hello(Hello { protocol_version: 0 })).0, ErrorCode::Invalid);
        let Ok(reply::Result::Hello(hello)) = daemon.ask(Verb::Hello(Hello { protocol_version: 99 })) else {
            panic!()
        };
        assert_eq!((hello.protocol_version, hello.pod_id.as_str()), (PROTOCOL_VERSION, ""));
        assert_eq!(u32::try_from(hello.pid).unwrap(), child.id());
        let adopt = |pod_id: &str, run_dir: &str| {
            Verb::Adopt(Adopt {
                pod_id: pod_id.into(),
                run_dir: run_dir.into(),
                state_dir: "/run/lab/state".into(),
                network_namespace: String::new(),
            })
        };
        assert_eq!(daemon.refused(adopt("", "/run/lab/run")).0, ErrorCode::Invalid);
        assert_eq!(daemon.refused(adopt("p", "run")).0, ErrorCode::Invalid);
        assert_eq!(daemon.refused(adopt("p", "/proc/none")).0, ErrorCode::System);
        // Sockets have short names; directories need not.
        let long = format!("/run/lab/{}/run", "long".repeat(30));
        daemon.done(adopt("p", &long));
        daemon.done(adopt("p", &long));
        assert_eq!(daemon.refused(adopt("q", &long)).0, ErrorCode::WrongState);
        assert!(std::path::Path::new(&long).join("monitor.sock").exists());
        let Ok(reply::Result::Hello(hello)) = daemon.ask(Verb::Hello(Hello { protocol_version: 1 })) else {
            panic!()
        };
        assert_eq!(hello.pod_id, "p");
        daemon.done(Verb::Shutdown(podvisor_proto::monitor::Shutdown {}));
        child.wait().unwrap();
        // The connection may be its stdin.
        let (ours, theirs) = std::os::unix::net::UnixStream::pair().unwrap();
        let stdin = std::os::fd::OwnedFd::from(theirs);
        let mut child =
            Command::new(lab::monitor()).args(["--control-fd", "0"]).stdin(stdin).spawn().unwrap();
        let mut daemon = Client::new(ours);
        daemon.ask(Verb::Hello(Hello { protocol_version: 1 })).unwrap();
        let stdin = std::fs::read_link(format!("/proc/{}/fd/0", child.id())).unwrap();
        assert_eq!(stdin, std::path::Path::new("/dev/null"));
        drop(daemon);
        assert!(child.wait().unwrap().success());
        let version = Command::new(lab::monitor()).arg("--version").output().unwrap();
        assert!(version.status.success() && version.stdout.starts_with(b"podvisor-monitor "));
        assert!(!Command::new(lab::monitor()).output().unwrap().status.success());
        assert!(
            !Command::new(lab::monitor()).args(["--control-fd", "77"]).output().unwrap().status.success()
        );
    });
}

#[test]
fn a_terminal_in_a_directory_with_a_long_name() {
    run(|lab| {
        let mut pod = lab.pod_with(lab.directory.join("long".repeat(30)), "");
        assert_eq!(pod.run_to_end("c1", &Spec::shell("echo out").terminal()).code, 0);
        assert_eq!(pod.log_lines("c1"), ["stdout F out\r"]);
    });
}

/// The monitor still serves others.
fn unharmed(pod: &mut Pod) {
    assert_eq!(pod.list(), []);
    assert!(private_memory(pod.child.id()) < 4 << 20);
}

#[test]
fn what_is_no_frame_or_no_message_ends_its_connection_alone() {
    run(|lab| {
        let mut pod = lab.pod();
        for bytes in [
            u32::MAX.to_le_bytes().to_vec(),
            u32::try_from(MAX_FRAME + 1).unwrap().to_le_bytes().to_vec(),
            [&5_u32.to_le_bytes()[..], &[0xff; 5]].concat(),
        ] {
            let mut client = pod.connect();
            client.socket.write_all(&bytes).unwrap();
            assert!(client.read_frame().is_none());
        }
        // A length without its bytes costs no memory, and an unfinished frame nobody else's time.
        let mut patient = pod.connect();
        patient.socket.write_all(&u32::try_from(MAX_FRAME).unwrap().to_le_bytes()).unwrap();
        unharmed(&mut pod);
        drop(patient);

        let mut client = pod.connect();
        client.write(&Request { id: 5, verb: None });
        let reply = client.reply();
        let Some(reply::Result::Error(error)) = reply.result else { panic!() };
        assert_eq!((reply.id, error.code()), (5, ErrorCode::Unsupported));
        // A verb of a later protocol: field 1000, an empty message.
        let mut later = Request { id: 6, verb: None }.encode_to_vec();
        prost::encoding::encode_key(1000, prost::encoding::WireType::LengthDelimited, &mut later);
        later.push(0);
        client.socket.write_all(&u32::try_from(later.len()).unwrap().to_le_bytes()).unwrap();
        client.socket.write_all(&later).unwrap();
        let Some(reply::Result::Error(error)) = client.reply().result else { panic!() };
        assert_eq!(error.code(), ErrorCode::Unsupported);
        client.write(&Request { id: 0, verb: Some(Verb::ListProcesses(ListProcesses {})) });
        let Some(reply::Result::Error(error)) = client.reply().result else { panic!() };
        assert_eq!(error.code(), ErrorCode::Invalid);
        // A stream verb on a connection that has been used otherwise.
        client.done(Verb::Subscribe(Subscribe {}));
        assert_eq!(client.refused(Verb::Connect(Connect { port: 1 })).0, ErrorCode::Invalid);
        client.ask(Verb::ListProcesses(ListProcesses {})).unwrap();
        let attach = Attach { container_id: "nobody".into(), stdout: true, ..Attach::default() };
        let mut client = pod.connect();
        client.ask(Verb::Hello(Hello { protocol_version: 1 })).unwrap();
        assert_eq!(client.refused(Verb::Attach(attach)).0, ErrorCode::NotFound);
        assert!(client.read_frame().is_none());
        unharmed(&mut pod);
    });
}

#[test]
fn who_does_not_read_replies_is_dropped() {
    run(|lab| {
        let mut pod = lab.pod();
        pod.run("c1", &Spec::waiting());
        let mut deaf = pod.connect();
        for n in 0..8 {
            let mut request = sync("c1", &format!("e{n}"), "head -c 16000000 /dev/zero");
            request.output_limit = 16 << 20;
            deaf.send(Verb::ExecSync(request));
        }
        let mut requests = 0;
        until("it is dropped", || {
            requests += 1;
            let mut bytes = Vec::new();
            let list = Request { id: 1000 + requests, verb: Some(Verb::ListProcesses(ListProcesses {})) };
            bytes.extend(u32::try_from(list.encoded_len()).unwrap().to_le_bytes());
            list.encode(&mut bytes).unwrap();
            deaf.socket.write_all(&bytes).is_err()
        });
        pod.delete("c1");
        until("the memory is given back", || private_memory(pod.child.id()) < 4 << 20);
        unharmed(&mut pod);
    });
}

/// A pod with a network namespace of its own, `/run/netns/pod`.
fn networked(lab: &Lab) -> Pod {
    let ip = |arguments: &str| {
        assert!(Command::new("ip").args(arguments.split(' ')).status().unwrap().success(), "ip {arguments}");
    };
    ip("netns add pod");
    ip("-n pod link set lo up");
    lab.pod_with(lab.directory.join("run"), "/run/netns/pod")
}

/// Listens inside the pod's namespace.
fn listen_inside(address: &'static str) -> TcpListener {
    let listen = move || {
        let namespace = std::fs::File::open("/run/netns/pod").unwrap();
        let kind = rustix::thread::LinkNameSpaceType::Network;
        rustix::thread::move_into_link_name_space(std::os::fd::AsFd::as_fd(&namespace), Some(kind)).unwrap();
        TcpListener::bind(address).unwrap()
    };
    std::thread::spawn(listen).join().unwrap()
}

#[test]
fn ports_of_the_pod() {
    run(|lab| {
        let mut pod = networked(lab);
        for (address, port) in [("127.0.0.1:8080", 8080), ("[::1]:8081", 8081)] {
            let listener = listen_inside(address);
            let mut stream = connected(&mut pod.connect(), port);
            let (mut accepted, _) = listener.accept().unwrap();
            accepted.write_all(b"hello").unwrap();
            drop(accepted);
            let mut text = String::new();
            stream.read_to_string(&mut text).unwrap();
            assert_eq!(text, "hello");
        }
        // The node's own ports are not the pod's.
        let _outside = TcpListener::bind("127.0.0.1:8082").unwrap();
        let mut client = pod.connect();
        let (code, error) = client.refused(Verb::Connect(Connect { port: 8082 }));
        assert_eq!(code, ErrorCode::System);
        assert!(error.detail.contains("127.0.0.1:8082: Connection refused"), "{error:?}");
        assert!(error.detail.contains("[::1]:8082: Connection refused"), "{error:?}");
        assert!(client.read_frame().is_none());
        for port in [0, 65_536] {
            assert_eq!(pod.connect().refused(Verb::Connect(Connect { port })).0, ErrorCode::Invalid);
        }
        unharmed(&mut pod);
    });
}
