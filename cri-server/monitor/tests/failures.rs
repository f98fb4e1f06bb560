//! OCI runtimes that fail, hang or die, and daemons that go away.
#![allow(missing_docs)]

mod lab;

use std::fs;
use std::path::Path;
use std::process::Command;

use lab::client::{stream, sync};
use lab::{Pod, Spec, run, until};
use podvisor_proto::monitor::{
    DeleteContainer, Error, ErrorCode, KillContainer, ProcessState, StartContainer, reply, request::Verb,
};
use rustix::process::{Pid, Signal, kill_process};

fn create_refused(pod: &mut Pod, id: &str) -> (ErrorCode, Error) {
    let request = pod.container(id, &Spec::waiting());
    let refused = pod.daemon.refused(Verb::CreateContainer(request));
    assert!(pod.list().iter().all(|process| process.id != id));
    refused
}

fn delete(id: &str) -> Verb {
    Verb::DeleteContainer(DeleteContainer { container_id: id.into() })
}

/// What runc knows of.
fn known_to_runc() -> String {
    let output = Command::new("runc").args(["--root", "/run/lab/runc", "list", "-q"]).output().unwrap();
    String::from_utf8(output.stdout).unwrap()
}

fn alive(argument: &str) -> bool {
    fs::read_dir("/proc").unwrap().flatten().any(|entry| {
        fs::read(entry.path().join("cmdline"))
            .is_ok_and(|line| line.split(|&byte| byte == 0).any(|it| it == argument.as_bytes()))
    })
}

/// Passes every verb on to runc but one, for which it does something else; `$verb` is the verb.
const PASS_ON: &str = r#"for verb; do case "$verb" in create|start|delete|exec|update) break;; esac; done"#;

#[test]
fn a_runtime_that_is_not_there() {
    run(|lab| {
        let mut pod = lab.pod();
        fs::write(lab.directory.join("data"), "x").unwrap();
        let interpreter = lab.script("bad", "");
        fs::write(&interpreter, "#!/no/such/interpreter\n").unwrap();
        for path in
            ["/no/such/runc".to_owned(), lab.directory.join("data").display().to_string(), interpreter]
        {
            pod.runtime = path.clone();
            let (code, error) = create_refused(&mut pod, "c1");
            assert_eq!(code, ErrorCode::RuntimeMissing);
            assert!(error.detail.contains(&path), "{error:?}");
        }
        pod.runtime = "runc".into();
        assert_eq!(create_refused(&mut pod, "c1").0, ErrorCode::Invalid);
    });
}

#[test]
fn a_runtime_that_fails_is_quoted() {
    run(|lab| {
        let mut pod = lab.pod();
        let mut request = pod.container("c1", &Spec::waiting());
        fs::write(Path::new(&request.bundle).join("config.json"), "{").unwrap();
        let (code, error) = pod.daemon.refused(Verb::CreateContainer(request.clone()));
        assert_eq!(code, ErrorCode::RuntimeFailed);
        assert!(error.runtime_log.contains("unexpected EOF"), "{error:?}");
        request.bundle = "/no/such/bundle".into();
        let (_, error) = pod.daemon.refused(Verb::CreateContainer(request));
        assert!(error.runtime_log.contains("/no/such/bundle"), "{error:?}");
        let request = pod.container("c1", &Spec::new(&["no-such-program"]));
        let (_, error) = pod.daemon.refused(Verb::CreateContainer(request));
        assert!(error.runtime_log.contains("no-such-program"), "{error:?}");

        // One that knows no logs, and one that says too much.
        pod.runtime = lab.script("plain", "echo cannot >&2; exit 3");
        let (_, error) = create_refused(&mut pod, "c1");
        assert_eq!(error.runtime_log, "cannot");
        assert!(error.detail.contains("exited with 3"), "{error:?}");
        pod.runtime = lab.script("loud", "head -c 200000 /dev/zero | tr '\\0' x >&2; exit 3");
        let (_, error) = create_refused(&mut pod, "c1");
        assert_eq!(error.runtime_log.len(), 4096);
        // One that claims success.
        pod.runtime = lab.script("liar", "exit 0");
        let (code, error) = create_refused(&mut pod, "c1");
        assert_eq!(code, ErrorCode::System);
        assert!(error.detail.contains("c1.pid"), "{error:?}");
        // Somebody else's process is not ours to watch.
        pod.runtime = lab.script("thief", "while [ \"$1\" != --pid-file ]; do shift; done; echo 1 > $2");
        assert_eq!(create_refused(&mut pod, "c1").0, ErrorCode::RuntimeFailed);
        pod.runtime =
            lab.script("stranger", "while [ \"$1\" != --pid-file ]; do shift; done; echo $PPID > $2");
        assert_eq!(create_refused(&mut pod, "c1").0, ErrorCode::System);
        assert_eq!(known_to_runc(), "");
    });
}

#[test]
fn a_runtime_that_hangs_is_killed() {
    run(|lab| {
        let mut pod = lab.pod();
        let runc = pod.runtime.clone();
        pod.timeout_ms = 300;
        pod.runtime = lab.script(
            "hang",
            &format!("{PASS_ON}\nif [ $verb = create ]; then sleep 5555; fi; exec {runc} \"$@\""),
        );
        let (code, error) = create_refused(&mut pod, "c1");
        assert_eq!(code, ErrorCode::Timeout, "{error:?}");
        until("what it started is gone", || !alive("5555"));
        pod.timeout_ms = 0;
        let hanging = pod.runtime.clone();
        pod.runtime.clone_from(&runc);
        pod.create("c1", &Spec::waiting());

        // A delete does not wait for a create that hangs.
        pod.runtime = hanging;
        let request = pod.container("c2", &Spec::waiting());
        let create = pod.daemon.send(Verb::CreateContainer(request));
        until("it hangs", || alive("5555"));
        pod.connect().done(delete("c2"));
        assert_eq!(pod.daemon.result(create).unwrap_err().code(), ErrorCode::WrongState);
        until("what it started is gone", || !alive("5555"));

        // A start that hangs leaves the container as it was. The limit is for all calls, and those that do not hang need to keep to it.
        pod.runtime = lab.script(
            "hang2",
            &format!("{PASS_ON}\nif [ $verb = start ]; then sleep 6666; fi; exec {runc} \"$@\""),
        );
        pod.timeout_ms = 300;
        while let Err(error) = pod.daemon.ask(Verb::CreateContainer(pod.container("c3", &Spec::waiting()))) {
            assert_eq!(error.code(), ErrorCode::Timeout, "{error:?}");
            pod.timeout_ms *= 2;
        }
        let start = Verb::StartContainer(StartContainer { container_id: "c3".into() });
        assert_eq!(pod.daemon.refused(start).0, ErrorCode::Timeout);
        assert_eq!(pod.state("c3"), Some(ProcessState::Created));
        while let Err(error) = pod.daemon.ask(delete("c3")) {
            assert_eq!(error.code(), ErrorCode::Timeout, "{error:?}");
        }
        pod.delete("c1");
        assert_eq!(known_to_runc(), "");
    });
}

#[test]
fn a_start_that_hangs_ends_with_its_container() {
    run(|lab| {
        let mut pod = lab.pod();
        let runc = pod.runtime.clone();
        pod.runtime = lab.script(
            "hang",
            &format!("{PASS_ON}\nif [ $verb = start ]; then sleep 7777; fi; exec {runc} \"$@\""),
        );
        let kill = |id: &str, signal| {
            Verb::KillContainer(KillContainer { container_id: id.into(), signal, all: signal == 9 })
        };
        for id in ["killed", "deleted", "gone"] {
            let created = pod.create(id, &Spec::waiting());
            let start = pod.daemon.send(Verb::StartContainer(StartContainer { container_id: id.into() }));
            until("it hangs", || alive("7777"));
            let mut client = pod.connect();
            match id {
                "killed" => client.done(kill(id, 9)),
                "deleted" => client.done(delete(id)),
                _ => {
                    // Its process ended by itself: that alone does not end a start, which may have run a program.
                    kill_process(Pid::from_raw(created.pid).unwrap(), Signal::KILL).unwrap();
                    until("it is reaped", || !Path::new(&format!("/proc/{}", created.pid)).exists());
                    assert!(alive("7777"));
                    client.done(kill(id, 9));
                }
            }
            let error = pod.daemon.result(start).unwrap_err();
            assert_eq!(error.code(), ErrorCode::WrongState, "{error:?}");
            until("what hung is gone", || !alive("7777"));
            if id != "deleted" {
                assert_eq!(pod.exit(id).code, 137);
                let start = Verb::StartContainer(StartContainer { container_id: id.into() });
                assert_eq!(pod.daemon.refused(start).0, ErrorCode::WrongState);
                pod.delete(id);
            }
        }
        assert_eq!(pod.list(), []);
        assert_eq!(known_to_runc(), "");
    });
}

#[test]
fn a_runtime_that_dies_leaves_nothing() {
    run(|lab| {
        let mut pod = lab.pod();
        let runc = pod.runtime.clone();
        let dying = format!("{PASS_ON}\n{runc} \"$@\" || exit; if [ $verb = create ]; then kill -9 $$; fi");
        pod.runtime = lab.script("dying", &dying);
        let (code, error) = create_refused(&mut pod, "c1");
        assert_eq!(code, ErrorCode::RuntimeFailed);
        assert!(error.detail.contains("killed by signal 9"), "{error:?}");
        assert_eq!(known_to_runc(), "");
        assert!(!alive("init"), "runc's half-made container is gone");
        // In the middle of an exec.
        let dying = format!("{PASS_ON}\n{runc} \"$@\" || exit; if [ $verb = exec ]; then kill -9 $$; fi");
        pod.runtime = lab.script("dying2", &dying);
        pod.run("c2", &Spec::waiting());
        let error = pod.daemon.exec_sync(sync("c2", "e1", "sleep 8888")).unwrap_err();
        assert_eq!(error.code(), ErrorCode::RuntimeFailed);
        until("the process is gone", || !alive("8888"));
        let mut client = pod.connect();
        assert_eq!(client.refused(Verb::Exec(stream("c2", "e2", "sleep 8889"))).0, ErrorCode::RuntimeFailed);
        until("the process is gone", || !alive("8889"));
    });
}

#[test]
fn a_delete_that_fails_is_told_and_can_be_repeated() {
    run(|lab| {
        let mut pod = lab.pod();
        let runc = pod.runtime.clone();
        let marker = lab.directory.join("repaired");
        let script = format!(
            "{PASS_ON}\nif [ $verb = delete ] && [ ! -e {} ]; then echo broken >&2; exit 1; fi; exec {runc} \"$@\"",
            marker.display()
        );
        pod.runtime = lab.script("broken", &script);
        pod.run_to_end("c1", &Spec::new(&["true"]));
        let (code, error) = pod.daemon.refused(delete("c1"));
        assert_eq!((code, error.runtime_log.as_str()), (ErrorCode::RuntimeFailed, "broken"));
        assert_eq!(pod.state("c1"), Some(ProcessState::Exited));
        fs::write(marker, "").unwrap();
        pod.delete("c1");
        assert_eq!(pod.list(), []);
        assert_eq!(known_to_runc(), "");
    });
}

#[test]
fn a_daemon_that_dies_in_the_middle() {
    run(|lab| {
        let mut pod = lab.pod();
        // Nobody is left to be told, but the container is made, and the next daemon finds it.
        let mut dying = pod.connect();
        let request = pod.container("c1", &Spec::shell("echo out; exit 7"));
        dying.send(Verb::CreateContainer(request));
        drop(dying);
        until("it is created", || pod.state("c1") == Some(ProcessState::Created));
        let mut dying = pod.connect();
        dying.send(Verb::StartContainer(StartContainer { container_id: "c1".into() }));
        drop(dying);
        pod.daemon = pod.connect();
        assert_eq!(pod.exit("c1").code, 7);
        assert!(pod.state_dir.join("c1.exit.json").exists());
        assert_eq!(pod.log_lines("c1"), ["stdout F out"]);
        let mut dying = pod.connect();
        dying.send(delete("c1"));
        drop(dying);
        until("it is deleted", || pod.list().is_empty());
    });
}

#[test]
fn the_state_directory_is_gone() {
    run(|lab| {
        let mut pod = lab.pod();
        let mut events = pod.subscribe();
        fs::remove_dir_all(&pod.state_dir).unwrap();
        pod.run("c1", &Spec::shell("exit 7"));
        // The record is lost, which the monitor's log says; whoever listens still hears of the end.
        assert_eq!(events.exited().1.code, 7);
        assert!(fs::read_to_string(pod.run_dir.join("monitor.log")).unwrap().contains("exit record"));
        match pod.daemon.ask(delete("c1")) {
            Ok(reply::Result::Done(_)) => {}
            other => panic!("{other:?}"),
        }
    });
}
