//! Exec, ExecSync and Attach.
#![allow(missing_docs)]

mod lab;

use std::io::Write;
use std::path::PathBuf;
use std::time::Instant;

use lab::client::{exec_process, stream, sync, terminal};
use lab::{Pod, Spec, private_memory, until};
use podvisor_proto::monitor::{
    Attach, ErrorCode, Exec, ExecSync, KillContainer, ProcessState, StreamFrame, request::Verb,
    stream_frame::Frame,
};
use prost::Message;

fn running(lab: &lab::Lab) -> Pod {
    let mut pod = lab.pod();
    pod.run("c1", &Spec::waiting());
    until("the container is ready", || !pod.log_lines("c1").is_empty());
    pod
}

fn attach(stdin: bool) -> Verb {
    Verb::Attach(Attach { container_id: "c1".into(), stdin, stdout: true, stderr: true })
}

/// Whether a process whose command line holds `marker` is there.
fn alive(marker: &str) -> bool {
    process_with(|argument| argument == marker.as_bytes()).is_some()
}

/// A process one of whose arguments is wanted.
fn process_with(wanted: impl Fn(&[u8]) -> bool) -> Option<PathBuf> {
    let has_it = |process: &PathBuf| {
        std::fs::read(process.join("cmdline")).is_ok_and(|line| line.split(|&byte| byte == 0).any(&wanted))
    };
    std::fs::read_dir("/proc").unwrap().flatten().map(|entry| entry.path()).find(has_it)
}

fn exec_sync_gives_output_and_code(lab: &mut lab::Lab) {
    let mut pod = running(lab);
    let files = |pod: &Pod| std::fs::read_dir(&pod.run_dir).unwrap().flatten().count();
    let before = files(&pod);
    let reply = pod.daemon.exec_sync(sync("c1", "e1", "echo out; echo err >&2; exit 3")).unwrap();
    assert_eq!((reply.exit_code, reply.timed_out), (3, false));
    assert_eq!((&*reply.stdout, &*reply.stderr), (&b"out\n"[..], &b"err\n"[..]));
    // Quick ones, several under way at once.
    let ids: Vec<u64> = (0..8)
        .map(|n| pod.daemon.send(Verb::ExecSync(sync("c1", &format!("q{n}"), &format!("exit {n}")))))
        .collect();
    for _ in &ids {
        let reply = pod.daemon.reply();
        let Some(podvisor_proto::monitor::reply::Result::ExecSync(result)) = reply.result else { panic!() };
        assert_eq!(u64::try_from(result.exit_code).unwrap(), reply.id - ids[0]);
    }
    // Nothing of them stays.
    assert_eq!(files(&pod), before);
    assert!(pod.guest || before == 3, "monitor.log, monitor.sock, c1.pid");
}

fn exec_sync_caps_each_stream(lab: &mut lab::Lab) {
    let mut pod = running(lab);
    let mut request =
        sync("c1", "e1", "head -c 3000000 /dev/zero; head -c 3000000 /dev/zero >&2; echo end >&2");
    request.output_limit = 1000;
    let reply = pod.daemon.exec_sync(request).unwrap();
    assert_eq!((reply.exit_code, reply.stdout.len(), reply.stderr.len()), (0, 1000, 1000));
    let mut request = sync("c1", "e2", "head -c 16777216 /dev/zero");
    request.output_limit = 16 << 20;
    assert_eq!(pod.daemon.exec_sync(request).unwrap().stdout.len(), 16 << 20);
    until("the buffers are given back", || private_memory(pod.child.id()) < 4 << 20);
}

fn exec_sync_ends_with_its_time_and_everything_it_started(lab: &mut lab::Lab) {
    let mut pod = running(lab);
    let script = "echo early; (sleep 4321 & sleep 4322) & busybox setsid sleep 4323 & sleep 4324";
    let mut request = sync("c1", "e1", script);
    request.timeout_ms = 300;
    let reply = pod.daemon.exec_sync(request).unwrap();
    assert!(reply.timed_out);
    assert_eq!(reply.stdout, b"early\n");
    for marker in ["4321", "4322", "4323", "4324"] {
        until("it is gone", || !alive(marker));
    }
    assert_eq!(pod.state("c1"), Some(ProcessState::Running));
}

fn an_exec_does_not_wait_for_its_background_children(lab: &mut lab::Lab) {
    let mut pod = running(lab);
    let started = Instant::now();
    let reply = pod.daemon.exec_sync(sync("c1", "e1", "sleep 1000 & echo done")).unwrap();
    assert_eq!(reply.stdout, b"done\n");
    let mut client = pod.connect();
    client.open(Verb::Exec(stream("c1", "e2", "yes & echo done >&2; exit 5")));
    let rest = client.rest();
    assert_eq!((rest.exit.unwrap().code, rest.stderr), (5, b"done\n".to_vec()));
    assert!(started.elapsed() < lab::PATIENCE);
}

fn what_cannot_be_executed_is_told_in_the_runtimes_words(lab: &mut lab::Lab) {
    let mut pod = running(lab);
    let missing = |id: &str| Some(exec_process("c1", id, &["no-such-program"], false));
    let request = ExecSync { exec: missing("e1"), timeout_ms: 0, output_limit: 100 };
    let error = pod.daemon.exec_sync(request).unwrap_err();
    assert_eq!(error.code(), ErrorCode::RuntimeFailed);
    assert!(error.runtime_log.contains("no-such-program"), "{error:?}");
    let mut client = pod.connect();
    let (code, error) =
        client.refused(Verb::Exec(Exec { exec: missing("e2"), stdout: true, ..Exec::default() }));
    assert_eq!(code, ErrorCode::RuntimeFailed);
    assert!(error.runtime_log.contains("no-such-program"), "{error:?}");
    assert!(client.read_frame().is_none(), "the connection ends");

    pod.create("c2", &Spec::waiting());
    assert_eq!(pod.daemon.exec_sync(sync("c2", "e3", "true")).unwrap_err().code(), ErrorCode::WrongState);
    assert_eq!(pod.daemon.exec_sync(sync("c3", "e3", "true")).unwrap_err().code(), ErrorCode::NotFound);
    assert_eq!(pod.daemon.exec_sync(sync("c1", "../e", "true")).unwrap_err().code(), ErrorCode::Invalid);
    let both = Exec { stderr: true, ..terminal("c1", "e4", "true") };
    assert_eq!(pod.connect().refused(Verb::Exec(both)).0, ErrorCode::Invalid);
}

fn a_stream_carries_everything_both_ways(lab: &mut lab::Lab) {
    let pod = running(lab);
    let mut client = pod.connect();
    client.open(Verb::Exec(stream("c1", "e1", "cat; echo end >&2; exit 6")));
    let mut writer = lab::Client::new(client.socket.try_clone().unwrap());
    let sender = std::thread::spawn(move || {
        for round in 0..300_u32 {
            writer.stdin(&round.to_le_bytes().repeat(8192));
        }
        writer.stdin(b"");
    });
    let rest = client.rest();
    sender.join().unwrap();
    assert_eq!(rest.exit.unwrap().code, 6);
    assert_eq!(rest.stderr, b"end\n");
    let expected: Vec<u8> = (0..300_u32).flat_map(|round| round.to_le_bytes().repeat(8192)).collect();
    assert!(rest.stdout == expected, "{} bytes of {}", rest.stdout.len(), expected.len());
}

fn a_client_that_does_not_read_makes_its_process_wait(lab: &mut lab::Lab) {
    let pod = running(lab);
    let mut client = pod.connect();
    let script = "exec head -c 30000000 /dev/zero";
    client.open(Verb::Exec(stream("c1", "e1", script)));
    until("the process waits for its reader", || {
        // The shell may do it itself.
        let process = process_with(|argument| argument == script.as_bytes() || argument == b"30000000");
        let wchan = process.and_then(|process| std::fs::read_to_string(process.join("wchan")).ok());
        wchan.is_some_and(|wchan| wchan.contains("pipe"))
    });
    assert!(private_memory(pod.child.id()) < 4 << 20);
    let rest = client.rest();
    assert_eq!((rest.stdout.len(), rest.exit.unwrap().code), (30_000_000, 0));

    // Nor does input pile up for a process that does not read.
    let mut client = pod.connect();
    client.open(Verb::Exec(stream("c1", "e2", "sleep 1000")));
    client.socket.set_nonblocking(true).unwrap();
    let frame = StreamFrame { frame: Some(Frame::Stdin(vec![b'x'; 65_000])) };
    let mut bytes = u32::try_from(frame.encoded_len()).unwrap().to_le_bytes().to_vec();
    frame.encode(&mut bytes).unwrap();
    let mut accepted = 0;
    until("the monitor takes no more", || match client.socket.write(&bytes) {
        Ok(count) => {
            accepted += count;
            false
        }
        Err(error) => error.kind() == std::io::ErrorKind::WouldBlock,
    });
    assert!(accepted < 4 << 20, "{accepted}");
    assert!(private_memory(pod.child.id()) < 4 << 20);
}

fn a_terminal_has_a_size_and_an_end(lab: &mut lab::Lab) {
    let pod = running(lab);
    let mut client = pod.connect();
    client.open(Verb::Exec(terminal("c1", "e1", "echo ready; read x; stty size; cat; exit 9")));
    client.stdout_until("ready\r\n");
    client.resize(123, 45);
    client.stdin(b"go\n");
    client.stdout_until("45 123\r\n");
    client.stdin(b"echoed\n");
    client.stdout_until("echoed\r\nechoed\r\n");
    // The end of the input is what Control-D is to a terminal.
    client.stdin(b"");
    let rest = client.rest();
    assert_eq!(rest.exit.unwrap().code, 9);
    // Much output right before the end is complete.
    let mut client = pod.connect();
    client.open(Verb::Exec(terminal("c1", "e2", "seq 20000")));
    let rest = client.rest();
    let numbers: Vec<String> = (1..=20_000).map(|n| n.to_string()).collect();
    let expected = numbers.join("\r\n") + "\r\n";
    assert!(rest.stdout == expected.as_bytes(), "{} of {}", rest.stdout.len(), expected.len());
    // A background process on the terminal does not hold the end up.
    let mut client = pod.connect();
    client.open(Verb::Exec(terminal("c1", "e3", "trap '' HUP; sleep 1000 & echo done")));
    assert_eq!(client.rest().exit.unwrap().code, 0);
}

fn an_exec_ends_with_its_client(lab: &mut lab::Lab) {
    let mut pod = running(lab);
    let mut client = pod.connect();
    client.open(Verb::Exec(stream("c1", "e1", "sleep 5431 & sleep 5432")));
    until("it runs", || alive("5431") && alive("5432"));
    drop(client);
    until("both are gone", || !alive("5431") && !alive("5432"));
    // While the runtime still starts it.
    let mut client = pod.connect();
    client.send(Verb::ExecSync(sync("c1", "e2", "sleep 5433 & sleep 5434")));
    drop(client);
    until("its name is free", || pod.daemon.exec_sync(sync("c1", "e2", "true")).is_ok());
    until("it is gone", || !alive("5433") && !alive("5434"));
    let mut client = pod.connect();
    client.send(Verb::ExecSync(sync("c1", "e3", "sleep 5435")));
    until("it runs", || alive("5435"));
    drop(client);
    until("it is gone", || !alive("5435"));
    assert_eq!(pod.state("c1"), Some(ProcessState::Running));
}

fn several_attach_and_all_see_the_end(lab: &mut lab::Lab) {
    let mut pod = lab.pod();
    pod.run(
        "c1",
        &Spec::shell("while read x; do echo \"got $x\"; echo \"err $x\" >&2; done; echo end; exit 8")
            .stdin(true),
    );
    // In a guest each stream comes its own way, so who wants to see an order sees one of them.
    let mut first = pod.connect();
    first.open(Verb::Attach(Attach {
        container_id: "c1".into(),
        stdin: true,
        stdout: true,
        ..Attach::default()
    }));
    let mut second = pod.connect();
    second.open(attach(false));
    let mut third = pod.connect();
    third.open(Verb::Attach(Attach { container_id: "c1".into(), stderr: true, ..Attach::default() }));
    first.stdin(b"one\n");
    first.stdout_until("got one\n");
    // Whoever has not asked for it has no say in the input.
    second.stdin(b"ignored\n");
    second.stdin(b"");
    first.stdin(b"two\n");
    // With stdin_once the end of the first client's input is the end of the container's.
    first.stdin(b"");
    let rest = first.rest();
    assert!(rest.stdout.ends_with(b"got two\nend\n"), "{rest:?}");
    assert_eq!(rest.exit.unwrap().code, 8);
    let rest = second.rest();
    assert_eq!(rest.stdout, b"got one\ngot two\nend\n");
    assert_eq!((rest.stderr, rest.exit.unwrap().code), (b"err one\nerr two\n".to_vec(), 8));
    let rest = third.rest();
    assert_eq!((rest.stdout, rest.stderr), (Vec::new(), b"err one\nerr two\n".to_vec()));
    assert_eq!(pod.connect().refused(attach(true)).0, ErrorCode::WrongState);
    assert_eq!(pod.log_lines("c1").iter().filter(|line| line.starts_with("stdout")).count(), 3);
}

fn stdin_stays_open_without_stdin_once_and_closes_with_it(lab: &mut lab::Lab) {
    let mut pod = lab.pod();
    pod.run("c1", &Spec::shell("while read x; do echo \"got $x\"; done; echo end").stdin(false));
    for word in ["one", "two"] {
        let mut client = pod.connect();
        client.open(attach(true));
        client.stdin(format!("{word}\n").as_bytes());
        client.stdin(b"");
        client.stdout_until(&format!("got {word}\n"));
    }
    assert_eq!(pod.state("c1"), Some(ProcessState::Running));
    pod.delete("c1");

    pod.run("c1", &Spec::shell("while read x; do echo \"got $x\"; done; echo end").stdin(true));
    let mut client = pod.connect();
    client.open(attach(true));
    client.stdin(b"three\n");
    // No end of input, only an end of the connection.
    drop(client);
    assert_eq!(pod.exit("c1").code, 0);
    assert_eq!(
        pod.log_lines("c1"),
        ["stdout F got one", "stdout F got two", "stdout F got three", "stdout F end"]
    );
}

fn attach_to_a_terminal(lab: &mut lab::Lab) {
    let mut pod = lab.pod();
    pod.run("c1", &Spec::shell("while read x; do stty size; done").terminal().stdin(false));
    let mut client = pod.connect();
    client.open(attach(true));
    client.resize(77, 11);
    client.stdin(b"go\n");
    client.stdout_until("11 77\r\n");
    let mut other = pod.connect();
    other.open(attach(true));
    other.resize(88, 22);
    other.stdin(b"go\n");
    client.stdout_until("22 88\r\n");
    other.stdout_until("22 88\r\n");
    let kill = KillContainer { container_id: "c1".into(), signal: 9, all: false };
    pod.daemon.done(Verb::KillContainer(kill));
    assert_eq!(client.rest().exit.unwrap().code, 137);
    assert_eq!(other.rest().exit.unwrap().code, 137);
}

fn a_slow_attach_is_let_go_and_the_log_is_complete(lab: &mut lab::Lab) {
    let mut pod = lab.pod();
    pod.run("c1", &Spec::shell("read x; seq 600000; echo end").stdin(false));
    let mut slow = pod.connect();
    slow.open(attach(true));
    slow.stdin(b"go\n");
    assert_eq!(pod.exit("c1").code, 0);
    let lines = pod.log_lines("c1");
    assert_eq!((lines.len(), lines.last().map(String::as_str)), (600_001, Some("stdout F end")));
    let rest = slow.rest();
    assert!(rest.stdout.starts_with(b"1\n2\n3\n") && rest.stdout.len() > 1 << 20);
    assert!(rest.error.unwrap().detail.contains("does not keep up"));
}

crate::on_both! {
    exec_sync_gives_output_and_code
    exec_sync_caps_each_stream
    exec_sync_ends_with_its_time_and_everything_it_started
    an_exec_does_not_wait_for_its_background_children
    what_cannot_be_executed_is_told_in_the_runtimes_words
    a_stream_carries_everything_both_ways
    a_client_that_does_not_read_makes_its_process_wait
    a_terminal_has_a_size_and_an_end
    an_exec_ends_with_its_client
    several_attach_and_all_see_the_end
    stdin_stays_open_without_stdin_once_and_closes_with_it
    attach_to_a_terminal
    a_slow_attach_is_let_go_and_the_log_is_complete
}
