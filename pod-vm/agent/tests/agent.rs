//! The agent as a process, driven over its two sockets as a pod's monitor would.

mod guest;

use guest::{Guest, Outcome, code, process, shell};
use podvisor_proto::agent::request::Verb;
use podvisor_proto::agent::{
    Acknowledge, AddShare, AddVolume, Attributes, Connect, CreateContainer, DeleteContainer, Directory,
    Entry, ErrorCode, Exec, KillContainer, KillExec, List, Open, ProcessState, RemoveVolume, Resize,
    Standard, StandardStream, StartContainer, StartInit, Stats, WriteVersion, entry::Kind, event,
    open::Stream, reply,
};

#[test]
fn a_container_from_its_creation_to_its_end() {
    let mut guest = Guest::new();
    guest.create("c1", &shell("echo out; echo err >&2; exit 3"), false);
    let stdout = guest.stream("c1", StandardStream::Stdout);
    let stderr = guest.stream("c1", StandardStream::Stderr);
    guest.done(Verb::StartContainer(StartContainer { container_id: "c1".into() }));
    assert_eq!((stdout.read_all(), stderr.read_all()), ("out\n".into(), "err\n".into()));
    assert_eq!(guest.exit_of("c1").code, 3);
    let reply::Result::Processes(processes) = guest.ask(Verb::List(List {})).unwrap() else { panic!() };
    assert_eq!(processes.processes[0].state, ProcessState::Exited as i32);
    guest.done(Verb::DeleteContainer(DeleteContainer { container_id: "c1".into() }));
    guest.done(Verb::DeleteContainer(DeleteContainer { container_id: "c1".into() }));
}

#[test]
fn input_reaches_the_program_and_its_end_too() {
    let mut guest = Guest::new();
    guest.create("c1", &shell("cat; echo done"), true);
    let stdout = guest.stream("c1", StandardStream::Stdout);
    let stdin = guest.stream("c1", StandardStream::Stdin);
    guest.start("c1");
    stdin.write(b"hello\n");
    stdin.close();
    assert_eq!(stdout.read_all(), "hello\ndone\n");
    assert_eq!(guest.exit_of("c1").code, 0);
}

#[test]
fn a_flood_waits_for_its_reader_and_loses_nothing() {
    let mut guest = Guest::new();
    guest.create("c1", &shell("seq 1 400000"), false);
    let stdout = guest.stream("c1", StandardStream::Stdout);
    guest.start("c1");
    // Other requests are answered while it waits.
    let before = guest.own_memory();
    for _ in 0..50 {
        guest.ask(Verb::List(List {})).unwrap();
    }
    assert!(guest.own_memory() < before + (2 << 20), "the agent keeps what nobody reads");
    let text = stdout.read_all();
    assert_eq!(text.lines().count(), 400_000);
    assert!(text.ends_with("399999\n400000\n"));
}

#[test]
fn an_output_whose_reader_went_waits_for_the_next() {
    let mut guest = Guest::new();
    guest.create("c1", &shell("read a; echo one; read b; echo two"), true);
    let stdin = guest.stream("c1", StandardStream::Stdin);
    let stdout = guest.stream("c1", StandardStream::Stdout);
    guest.start("c1");
    stdin.write(b"\n");
    assert_eq!(stdout.read_line(), "one\n");
    drop(stdout);
    stdin.write(b"\n");
    // What is written to a reader that is gone may be lost with it; the program must not be.
    assert_eq!(guest.exit_of("c1").code, 0);
}

#[test]
fn one_more_process_and_its_streams() {
    let mut guest = Guest::new();
    guest.running("c1", "sleep 1000");
    let answer = guest.execute("c1", "e1", &["sh", "-c", "echo here; hostname; exit 7"]);
    answer.unwrap();
    let stdout = guest.stream("e1", StandardStream::Stdout);
    assert!(stdout.read_all().starts_with("here\n"));
    assert_eq!(guest.exit_of("e1").code, 7);
    let error = guest.execute("c1", "e2", &["nothing-of-this-name"]).unwrap_err();
    assert_eq!(error.code, ErrorCode::Refused as i32);
    assert!(error.detail.contains("executable file not found in $PATH"), "{}", error.detail);
    guest.execute("c1", "e3", &["sleep", "1000"]).unwrap();
    guest.done(Verb::KillExec(KillExec { exec_id: "e3".into(), signal: 15, all: true }));
    assert_eq!(guest.exit_of("e3").code, 143);
    assert_eq!(code(guest.execute("c9", "e4", &["true"])), ErrorCode::NotFound);
}

#[test]
fn a_terminal_has_a_size_and_ends_with_its_program() {
    let mut guest = Guest::new();
    let mut spec = shell("read a; stty size; exit 4");
    spec["process"]["terminal"] = true.into();
    guest.create("c1", &spec, true);
    let terminal = guest.stream("c1", StandardStream::Stdout);
    guest.start("c1");
    guest.done(Verb::Resize(Resize { id: "c1".into(), columns: 100, rows: 30 }));
    terminal.write(b"\n");
    assert!(terminal.read_all().contains("30 100\r\n"));
    assert_eq!(guest.exit_of("c1").code, 4);
}

#[test]
fn exits_are_told_again_until_they_are_acknowledged() {
    let mut guest = Guest::new();
    guest.running("c1", "exit 5");
    assert_eq!(guest.exit_of("c1").code, 5);
    guest.reconnect();
    let sequence = guest.next_event().sequence;
    guest.done(Verb::Acknowledge(Acknowledge { sequence }));
    guest.reconnect();
    guest.running("c2", "exit 6");
    assert_eq!(guest.exit_of("c2").code, 6);
}

#[test]
fn signals_and_what_else_runs_in_the_container() {
    let mut guest = Guest::new();
    guest.running("c1", "trap 'exit 9' TERM; (setsid sleep 1000 &); while :; do sleep 1000 & wait; done");
    guest.signal_until_trapped("c1", 15);
    assert_eq!(guest.exit_of("c1").code, 9);
    guest.running("c2", "sleep 1000");
    guest.done(Verb::KillContainer(KillContainer { container_id: "c2".into(), signal: 9, all: true }));
    assert_eq!(guest.exit_of("c2").code, 137);
    guest.done(Verb::DeleteContainer(DeleteContainer { container_id: "c2".into() }));
    assert_eq!(guest.cgroups(), ["c1"]);
}

#[test]
fn ports_of_the_pod() {
    use std::io::{Read, Write};
    let guest = Guest::new();
    let listener = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
    let port = u32::from(listener.local_addr().unwrap().port());
    let echo = std::thread::spawn(move || {
        let (mut connection, _) = listener.accept().unwrap();
        let mut text = String::new();
        connection.read_to_string(&mut text).unwrap();
        connection.write_all(text.to_uppercase().as_bytes()).unwrap();
        // Closed alone it would go on as long as a process that another test is about to start has a copy.
        rustix::net::shutdown(&listener, rustix::net::Shutdown::Both).unwrap();
    });
    let stream = guest.open(&Open { stream: Some(Stream::Connect(Connect { port })) }).unwrap();
    stream.write(b"hello");
    stream.close();
    assert_eq!(stream.read_all(), "HELLO");
    echo.join().unwrap();
    let refused = guest.open(&Open { stream: Some(Stream::Connect(Connect { port })) });
    assert_eq!(code(refused.map(drop)), ErrorCode::System);
    let refused = guest.open(&Open { stream: Some(Stream::Connect(Connect { port: 65_536 })) });
    assert_eq!(code(refused.map(drop)), ErrorCode::Invalid);
}

#[test]
fn what_cannot_be_is_refused_with_a_reason() {
    let mut guest = Guest::new();
    let root = guest.rootfs.clone();
    let create = |id: &str, spec: &serde_json::Value| {
        let mut spec = spec.clone();
        if spec.is_object() {
            spec["root"]["path"] = serde_json::json!(root);
        }
        Verb::CreateContainer(CreateContainer {
            container_id: id.into(),
            spec: spec.to_string().into_bytes(),
            ..Default::default()
        })
    };
    for id in ["", "../up", "a/b", ".hidden", &"x".repeat(129)] {
        assert_eq!(code(guest.ask(create(id, &shell("true")))), ErrorCode::Invalid, "{id:?}");
    }
    assert_eq!(code(guest.ask(create("c1", &serde_json::json!("no spec")))), ErrorCode::Invalid);
    let mut spec = shell("true");
    spec["linux"]["personality"] = serde_json::json!({"domain": "LINUX"});
    let error = guest.ask(create("c1", &spec)).unwrap_err();
    assert!(error.detail.contains("linux.personality"), "{}", error.detail);
    let mut spec = shell("true");
    spec["mounts"].as_array_mut().unwrap().push(serde_json::json!({
        "destination": "/data", "source": "/not/there", "options": ["bind"],
    }));
    // Nothing is left of it, whether its last words or its end are heard of first: the same id can be used.
    for _ in 0..100 {
        let error = guest.ask(create("c1", &spec)).unwrap_err();
        assert_eq!(error.code, ErrorCode::Refused as i32);
        assert!(error.detail.contains("mount /not/there at /data"), "{}", error.detail);
    }
    guest.running("c1", "sleep 1000");
    assert_eq!(code(guest.ask(create("c1", &shell("true")))), ErrorCode::AlreadyExists);
    let start = Verb::StartContainer(StartContainer { container_id: "c1".into() });
    assert_eq!(code(guest.ask(start)), ErrorCode::WrongState);
    let share = Verb::AddShare(AddShare { tag: "no such tag".into(), read_only: false });
    assert_eq!(code(guest.ask(share)), ErrorCode::Invalid);
    let missing = Standard { id: "c9".into(), which: StandardStream::Stdout.into() };
    let missing = guest.open(&Open { stream: Some(Stream::Standard(missing)) });
    assert_eq!(code(missing.map(drop)), ErrorCode::NotFound);
}

#[test]
fn a_volume_is_written_as_kubelet_writes_it() {
    let mut guest = Guest::new();
    let attributes = |mode| Some(Attributes { mode, gid: 2000, ..Attributes::default() });
    let add = || AddVolume {
        name: "written".into(),
        size: 1 << 20,
        attributes: attributes(0o2755),
        ..AddVolume::default()
    };
    let file = |path: &str, content: &[u8]| Entry {
        path: path.into(),
        attributes: attributes(0o440),
        kind: Some(Kind::Content(content.to_vec())),
    };
    let part = |version: &str, first, last, entries| {
        Verb::WriteVersion(WriteVersion {
            name: "written".into(),
            version: version.into(),
            attributes: attributes(0o755),
            first,
            entries,
            last,
        })
    };
    assert_eq!(code(guest.ask(part("..1", true, true, vec![]))), ErrorCode::NotFound);
    for _ in 0..2 {
        guest.done(Verb::AddVolume(add()));
    }
    let directory = Entry {
        path: "sub".into(),
        attributes: attributes(0o755),
        kind: Some(Kind::Directory(Directory {})),
    };
    guest.done(part("..1", true, false, vec![file("value", b"on"), directory, file("sub/deep", b"deep\n")]));
    guest.done(part("..1", false, true, vec![file("value", b"e\n"), file("goes", b"")]));
    // What was told twice is there once.
    guest.done(part("..1", true, false, vec![file("value", b"again")]));
    let mut spec = shell("cd /v; ls; cat value sub/deep; stat -L -c '%a %g' value .; ls -A | wc -l");
    spec["mounts"].as_array_mut().unwrap().push(serde_json::json!({
        "destination": "/v", "source": "/run/podvisor/volumes/written", "options": ["bind", "ro"],
    }));
    let seen = |guest: &mut Guest, id: &str, spec: &serde_json::Value| {
        guest.create(id, spec, false);
        let stdout = guest.stream(id, StandardStream::Stdout);
        guest.start(id);
        let text = stdout.read_all();
        assert_eq!(guest.exit_of(id).code, 0, "{text}");
        text
    };
    // Its top: three links, ..data, and the version.
    assert_eq!(seen(&mut guest, "c1", &spec), "goes\nsub\nvalue\none\ndeep\n440 2000\n2755 2000\n5\n");
    // One that breaks off is begun anew, and nothing is left of it or of the one before.
    guest.done(part("..2", true, false, vec![file("value", b"broken off")]));
    guest.done(part("..2", true, true, vec![file("value", b"two\n")]));
    spec["process"]["args"] = shell("cd /v; ls; cat value; ls -A | wc -l")["process"]["args"].take();
    assert_eq!(seen(&mut guest, "c2", &spec), "value\ntwo\n3\n");
    assert_eq!(code(guest.ask(part("..3", true, false, vec![file("../value", b"")]))), ErrorCode::Invalid);
    for version in ["plain", "..", "../x", "..data", "..data_tmp"] {
        assert_eq!(code(guest.ask(part(version, true, true, vec![]))), ErrorCode::Invalid, "{version}");
    }
    for _ in 0..2 {
        guest.done(Verb::RemoveVolume(RemoveVolume { name: "written".into() }));
    }
    // Without a guest around it the agent has made its directory on this machine.
    for directory in ["/run/podvisor/volumes", "/run/podvisor"] {
        std::fs::remove_dir(directory).unwrap();
    }
}

#[test]
fn bad_messages_end_their_connection_and_nothing_else() {
    let mut guest = Guest::new();
    guest.running("c1", "sleep 1000");
    for bytes in [&[0xff; 64][..], &u32::MAX.to_le_bytes(), &[4, 0, 0, 0, 0xff, 0xff, 0xff, 0xff]] {
        guest.raw_control(bytes);
        guest.raw_stream(bytes);
    }
    guest.reconnect();
    let Outcome::Ok(reply::Result::Stats(stats)) = guest.ask(Verb::Stats(Stats::default())) else { panic!() };
    assert_eq!(stats.containers.len(), 1);
    assert!(stats.guest.unwrap().agent_rss > 0);
    assert!(guest.own_memory() < 1 << 20, "{} bytes", guest.own_memory());
}

#[test]
fn nothing_is_answered_before_hello() {
    let guest = Guest::new();
    let mut silent = guest.silent();
    assert_eq!(code(silent.ask(Verb::List(List {}))), ErrorCode::WrongState);
}

#[test]
fn an_exec_needs_a_running_container() {
    let mut guest = Guest::new();
    guest.create("c1", &shell("true"), false);
    let exec = Exec {
        container_id: "c1".into(),
        exec_id: "e1".into(),
        process: process(&["true"]).to_string().into_bytes(),
        ..Default::default()
    };
    assert_eq!(code(guest.ask(Verb::Exec(exec))), ErrorCode::WrongState);
}

#[test]
fn containers_share_a_pid_namespace_whose_init_reaps() {
    let mut guest = Guest::new();
    let spec = guest.spec(&shell(""));
    let shared = |id: &str, script: &str| {
        let mut spec = spec.clone();
        spec["process"]["args"][2] = script.into();
        let namespaces = spec["linux"]["namespaces"].as_array_mut().unwrap();
        namespaces.retain(|namespace| namespace["type"] != "pid");
        let all = serde_json::json!(["CAP_SYS_PTRACE", "CAP_SYS_ADMIN", "CAP_DAC_READ_SEARCH"]);
        spec["process"]["capabilities"] =
            serde_json::json!({"bounding": all, "effective": all, "permitted": all});
        let spec = spec.to_string().into_bytes();
        let create = CreateContainer { container_id: id.into(), spec, share_pid: true, ..Default::default() };
        Verb::CreateContainer(create)
    };
    assert_eq!(code(guest.ask(shared("c1", "true"))), ErrorCode::WrongState);
    let Outcome::Ok(reply::Result::Started(init)) = guest.ask(Verb::StartInit(StartInit {})) else {
        panic!()
    };
    assert_eq!(code(guest.ask(Verb::StartInit(StartInit {}))), ErrorCode::AlreadyExists);

    // An orphan ends, and nobody keeps it.
    guest.ask(shared("c1", "sh -c 'sleep 0 & :'; exec sleep 1000")).unwrap();
    guest.start("c1");
    let script = "cat /proc/1/comm; ls -A /proc/1/root/ /proc/1/fd/; \
        until pidof sleep > /dev/null; do :; done; \
        while grep -qs '^State:.*zombie' /proc/[0-9]*/status; do :; done; echo end";
    guest.ask(shared("c2", script)).unwrap();
    let stdout = guest.stream("c2", StandardStream::Stdout);
    guest.start("c2");
    assert_eq!(stdout.read_all(), "podvisor-init\n/proc/1/fd/:\n\n/proc/1/root/:\nend\n");
    assert_eq!(guest.exit_of("c2").code, 0);
    let target = CreateContainer {
        container_id: "c3".into(),
        spec: guest.spec(&shell("cat /proc/1/comm")).to_string().into_bytes(),
        target: "c1".into(),
        ..Default::default()
    };
    guest.ask(Verb::CreateContainer(target)).unwrap();
    let stdout = guest.stream("c3", StandardStream::Stdout);
    guest.start("c3");
    assert_eq!(stdout.read_all(), "podvisor-init\n");
    assert_eq!(guest.exit_of("c3").code, 0);

    let Outcome::Ok(reply::Result::Processes(list)) = guest.ask(Verb::List(List {})) else { panic!() };
    assert_eq!((list.processes[0].id.as_str(), list.processes[0].pid), ("init", init.pid));
    Guest::kill(init.pid);
    let ends = [guest.next_event(), guest.next_event()].map(|event| match event.kind {
        Some(event::Kind::Exited(exited)) => (exited.id, exited.exit.unwrap().code),
        other => panic!("{other:?}"),
    });
    assert!(ends.contains(&("init".into(), 137)) && ends.contains(&("c1".into(), 137)), "{ends:?}");
    assert_eq!(code(guest.ask(shared("c4", "true"))), ErrorCode::WrongState);
}
