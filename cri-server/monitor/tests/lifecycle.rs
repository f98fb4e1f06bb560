//! Containers from their creation to their end, and what is left of them.
#![allow(missing_docs)]

mod lab;

use std::collections::BTreeSet;
use std::path::PathBuf;

use lab::{Spec, run, until};
use podvisor_proto::monitor::{
    DeleteContainer, ErrorCode, KillContainer, ProcessState, Shutdown, StartContainer, UpdateContainer,
    event, request::Verb,
};

fn kill(id: &str, signal: i32, all: bool) -> Verb {
    Verb::KillContainer(KillContainer { container_id: id.into(), signal, all })
}

fn record(pod: &lab::Pod, id: &str) -> serde_json::Value {
    let text = std::fs::read(pod.state_dir.join(format!("{id}.exit.json"))).expect("an exit record");
    serde_json::from_slice(&text).expect("JSON")
}

/// Directories of a container in every hierarchy.
fn cgroups(pod: &lab::Pod, id: &str) -> Vec<PathBuf> {
    let below = PathBuf::from(&pod.cgroup).join(id);
    std::fs::read_dir("/sys/fs/cgroup")
        .expect("cgroups")
        .flatten()
        .map(|entry| entry.path().join(&below))
        .chain([PathBuf::from("/sys/fs/cgroup").join(&below)])
        .filter(|path| path.exists())
        .collect()
}

#[test]
fn from_create_to_delete() {
    run(|lab| {
        let mut pod = lab.pod();
        let mut events = pod.subscribe();
        let started = pod.create("c1", &Spec::shell("echo out; echo err >&2; exit 7"));
        assert_eq!(pod.state("c1"), Some(ProcessState::Created));
        assert!(started.pid > 1 && started.start_time > 0);
        assert!(!cgroups(&pod, "c1").is_empty());
        let pid_file = pod.run_dir.join("c1.pid");
        assert_eq!(std::fs::read_to_string(&pid_file).unwrap(), started.pid.to_string());

        pod.start("c1");
        let (id, exit) = events.exited();
        assert_eq!((id.as_str(), exit.code, exit.oom_killed), ("c1", 7, false));
        // Both are complete when the event comes.
        assert_eq!(record(&pod, "c1")["code"], 7);
        assert_eq!(record(&pod, "c1")["version"], 1);
        assert_eq!(record(&pod, "c1")["finished_at"], exit.finished_at);
        let lines: BTreeSet<String> = pod.log_lines("c1").into_iter().collect();
        assert_eq!(lines, BTreeSet::from(["stdout F out".to_owned(), "stderr F err".to_owned()]));
        let listed = pod.containers();
        assert_eq!((listed[0].state(), listed[0].pid), (ProcessState::Exited, started.pid));
        assert_eq!(listed[0].exit, Some(exit));
        // Its cgroup goes without anybody asking.
        until("the cgroup is gone", || cgroups(&pod, "c1").is_empty());

        pod.delete("c1");
        assert_eq!(pod.containers(), []);
        assert!(!pid_file.exists());
        pod.delete("c1");
        pod.delete("never-there");
        let left: Vec<_> =
            std::fs::read_dir(&pod.run_dir).unwrap().flatten().map(|entry| entry.file_name()).collect();
        let left: BTreeSet<_> = left.iter().filter_map(|name| name.to_str()).collect();
        assert_eq!(left, BTreeSet::from(["monitor.log", "monitor.sock"]));
    });
}

fn signals_and_their_exit_codes(lab: &mut lab::Lab) {
    let mut pod = lab.pod();
    pod.run("term", &Spec::waiting());
    until("the trap is set", || !pod.log_lines("term").is_empty());
    pod.daemon.done(kill("term", 15, false));
    assert_eq!(pod.exit("term").code, 0);
    pod.run("kill", &Spec::waiting());
    pod.daemon.done(kill("kill", 9, false));
    assert_eq!(pod.exit("kill").code, 137);
    pod.run("all", &Spec::shell("sleep 1000 & wait"));
    pod.daemon.done(kill("all", 9, true));
    assert_eq!(pod.exit("all").code, 137);
    // What it is to reach is reached already.
    pod.daemon.done(kill("kill", 9, false));
    pod.daemon.done(kill("kill", 15, true));
    assert_eq!(pod.daemon.refused(kill("nobody", 9, false)).0, ErrorCode::NotFound);
    assert_eq!(pod.daemon.refused(kill("kill", 0, false)).0, ErrorCode::Invalid);
    // A daemon that was started again repeats a start that has been done, also when the container has ended since.
    pod.daemon.done(Verb::StartContainer(StartContainer { container_id: "kill".into() }));
}

fn a_container_that_was_never_started(lab: &mut lab::Lab) {
    let mut pod = lab.pod();
    let mut events = pod.subscribe();
    pod.create("killed", &Spec::waiting());
    pod.daemon.done(kill("killed", 9, false));
    assert_eq!(events.exited().1.code, 137);
    let start = Verb::StartContainer(StartContainer { container_id: "killed".into() });
    assert_eq!(pod.daemon.refused(start).0, ErrorCode::WrongState);
    pod.create("deleted", &Spec::waiting());
    pod.delete("deleted");
    assert_eq!(events.exited().0, "deleted");
    pod.delete("killed");
    assert_eq!(pod.containers(), []);
}

fn deleting_a_running_container_ends_everything_of_it(lab: &mut lab::Lab) {
    let mut pod = lab.pod();
    pod.run("c1", &Spec::shell("trap '' TERM; sleep 1000 & sleep 1000"));
    let mut second = pod.connect();
    // Two at once, both answered.
    let delete = || Verb::DeleteContainer(DeleteContainer { container_id: "c1".into() });
    let first_id = pod.daemon.send(delete());
    let second_id = second.send(delete());
    pod.daemon.result(first_id).unwrap();
    second.result(second_id).unwrap();
    assert_eq!(pod.containers(), []);
    assert_eq!(cgroups(&pod, "c1"), Vec::<PathBuf>::new());
    assert_eq!(record(&pod, "c1")["code"], 137);
    // The name is free again.
    assert_eq!(pod.run_to_end("c1", &Spec::new(&["true"])).code, 0);
}

/// A set of no signals, as /proc shows it.
const NONE: &str = "0000000000000000";

#[test]
fn a_container_inherits_nothing_of_the_monitor() {
    run(|lab| {
        let mut pod = lab.pod();
        let script = "umask; echo /proc/self/fd/*; exec busybox grep -E '^Sig(Blk|Ign)' /proc/self/status";
        pod.run_to_end("c1", &Spec::shell(script));
        let expected = [
            "stdout F 0022".to_owned(),
            // The last is the directory that the shell reads.
            "stdout F /proc/self/fd/0 /proc/self/fd/1 /proc/self/fd/2 /proc/self/fd/3".to_owned(),
            format!("stdout F SigBlk:\t{NONE}"),
            format!("stdout F SigIgn:\t{NONE}"),
        ];
        // glibc's posix_spawn leaves its own cancellation signal (32) ignored; nobody else uses that.
        let lines: Vec<String> =
            pod.log_lines("c1").into_iter().map(|line| line.replace("0000000080000000", NONE)).collect();
        assert_eq!(lines, expected);
    });
}

fn the_quickest_containers_are_not_lost(lab: &mut lab::Lab) {
    let mut pod = lab.pod();
    let open = |pod: &lab::Pod| std::fs::read_dir(format!("/proc/{}/fd", pod.child.id())).unwrap().count();
    let before = open(&pod);
    for round in 0..10 {
        let id = format!("quick{round}");
        let exit = pod.run_to_end(&id, &Spec::shell(&format!("echo {round}; exit {round}")));
        assert_eq!(exit.code, round);
        assert_eq!(pod.log_lines(&id), [format!("stdout F {round}")]);
        pod.delete(&id);
    }
    assert_eq!(open(&pod), before, "descriptors are given back");
}

#[test]
fn another_runtime() {
    run(|lab| {
        // crun refuses a version 2 hierarchy with controllers beside version 1.
        let unified = PathBuf::from("/sys/fs/cgroup/unified");
        if unified.exists() {
            rustix::mount::unmount(&unified, rustix::mount::UnmountFlags::DETACH).unwrap();
            // It makes directories there nevertheless: not in the host's.
            rustix::mount::mount("tmpfs", &unified, "tmpfs", rustix::mount::MountFlags::empty(), None)
                .unwrap();
        }
        let mut pod = lab.pod();
        pod.runtime = "/usr/bin/crun".into();
        let mut events = pod.subscribe();
        pod.run("c1", &Spec::waiting().memory(64 << 20));
        until("the trap is set", || !pod.log_lines("c1").is_empty());
        let reply = pod.daemon.exec_sync(lab::client::sync("c1", "e1", "echo out; exit 3")).unwrap();
        assert_eq!((reply.exit_code, &*reply.stdout), (3, &b"out\n"[..]));
        let missing = lab::client::exec_process("c1", "e2", &["no-such-program"], false);
        let request = podvisor_proto::monitor::ExecSync { exec: Some(missing), ..Default::default() };
        let error = pod.daemon.exec_sync(request).unwrap_err();
        assert!(error.runtime_log.contains("no-such-program"), "{error:?}");
        let mut client = pod.connect();
        client.open(Verb::Exec(lab::client::terminal("c1", "e3", "read x; stty size")));
        client.resize(80, 24);
        client.stdin(b"go\n");
        client.stdout_until("24 80\r\n");
        assert_eq!(client.rest().exit.unwrap().code, 0);
        pod.daemon.done(kill("c1", 15, false));
        assert_eq!(events.exited().1.code, 0);
        assert_eq!(pod.run_to_end("c2", &Spec::shell("echo out; exit 4").terminal()).code, 4);
        assert_eq!(pod.log_lines("c2"), ["stdout F out\r"]);
        for id in ["c1", "c2"] {
            pod.delete(id);
        }
        assert!(cgroups(&pod, "c1").iter().all(|path| path.starts_with(&unified)));
    });
}

fn several_are_created_at_once(lab: &mut lab::Lab) {
    let mut pod = lab.pod();
    let mut events = pod.subscribe();
    let ids: Vec<String> = (0..4).map(|n| format!("c{n}")).collect();
    for id in &ids {
        let request = pod.container(id, &Spec::shell(&format!("echo {id}")));
        pod.daemon.send(Verb::CreateContainer(request));
    }
    // The loop goes on meanwhile.
    assert_eq!(pod.connect().refused(kill("nobody", 9, false)).0, ErrorCode::NotFound);
    let answered: BTreeSet<u64> = ids.iter().map(|_| pod.daemon.reply().id).collect();
    assert_eq!(answered.len(), ids.len());
    for id in &ids {
        pod.start(id);
    }
    let ended: BTreeSet<String> = ids.iter().map(|_| events.exited().0).collect();
    assert_eq!(ended, ids.iter().cloned().collect());
    for id in &ids {
        assert_eq!(pod.log_lines(id), [format!("stdout F {id}")]);
    }
    let request = pod.container("c0", &Spec::new(&["true"]));
    let (code, _) = pod.daemon.refused(Verb::CreateContainer(request));
    assert_eq!(code, ErrorCode::AlreadyExists);
}

#[test]
fn out_of_memory_is_told() {
    run(|lab| {
        let mut pod = lab.pod();
        let mut events = pod.subscribe();
        // tail keeps what it reads from a device without lines.
        let hungry = Spec::new(&["busybox", "tail", "/dev/zero"]).memory(16 << 20);
        pod.run("hungry", &hungry);
        match events.event() {
            event::Kind::Oom(oom) => assert_eq!(oom.container_id, "hungry"),
            other @ event::Kind::Exited(_) => panic!("expected the OOM kill first, got {other:?}"),
        }
        let (_, exit) = events.exited();
        assert_eq!((exit.code, exit.oom_killed), (137, true));
        assert_eq!(record(&pod, "hungry")["oom_killed"], true);

        // A child that is killed is told while the container goes on.
        let parent = Spec::shell(
            "busybox tail /dev/zero; trap 'exit 3' TERM; echo survived; while :; do sleep 1000 & wait; done",
        );
        pod.run("parent", &parent.memory(16 << 20));
        assert!(matches!(events.event(), event::Kind::Oom(oom) if oom.container_id == "parent"));
        until("the parent goes on", || pod.log_lines("parent").contains(&"stdout F survived".to_owned()));
        pod.daemon.done(kill("parent", 15, false));
        let (_, exit) = events.exited();
        assert_eq!((exit.code, exit.oom_killed), (3, true));
    });
}

#[test]
fn resources_are_updated() {
    run(|lab| {
        let mut pod = lab.pod();
        pod.run("c1", &Spec::waiting().memory(64 << 20));
        let update = |resources: &str| {
            Verb::UpdateContainer(UpdateContainer { container_id: "c1".into(), resources: resources.into() })
        };
        pod.daemon.done(update(r#"{"memory":{"limit":33554432,"swap":33554432}}"#));
        let limit = cgroups(&pod, "c1")
            .into_iter()
            .find_map(|path| {
                ["memory.limit_in_bytes", "memory.max"]
                    .iter()
                    .find_map(|f| std::fs::read_to_string(path.join(f)).ok())
            })
            .expect("a memory limit");
        assert_eq!(limit.trim(), "33554432");
        let (code, error) = pod.daemon.refused(update("{not json"));
        assert_eq!(code, ErrorCode::RuntimeFailed);
        assert!(!error.runtime_log.is_empty());
        assert_eq!(pod.daemon.refused(update("")).0, ErrorCode::Invalid);
    });
}

fn the_monitor_outlives_the_daemon_and_ends_when_it_is_told(lab: &mut lab::Lab) {
    use std::os::unix::fs::PermissionsExt;
    let mut pod = lab.pod();
    pod.run("c1", &Spec::waiting());
    until("the trap is set", || !pod.log_lines("c1").is_empty());
    let socket = std::fs::metadata(pod.run_dir.join("monitor.sock")).unwrap();
    assert_eq!(socket.permissions().mode() & 0o777, 0o600);
    // The old daemon goes, and stray signals come.
    pod.daemon = pod.connect();
    for signal in ["TERM", "HUP", "INT", "PIPE"] {
        let pid = pod.child.id().to_string();
        assert!(std::process::Command::new("kill").args(["-s", signal, &pid]).status().unwrap().success());
    }
    assert_eq!(pod.state("c1"), Some(ProcessState::Running));
    // Signals of the monitor's own are not handed down to containers.
    assert_eq!(pod.daemon.refused(Verb::Shutdown(Shutdown {})).0, ErrorCode::WrongState);
    pod.daemon.done(kill("c1", 15, false));
    assert_eq!(pod.exit("c1").code, 0);
    pod.delete("c1");
    pod.daemon.done(Verb::Shutdown(Shutdown {}));
    assert!(pod.child.wait().unwrap().success());
    assert!(!pod.run_dir.join("monitor.sock").exists());
}

#[test]
fn a_monitor_of_the_pool_ends_with_its_daemon() {
    run(|_| {
        let (mut child, daemon) = lab::unadopted();
        drop(daemon);
        assert!(child.wait().unwrap().success());
        let (mut child, mut daemon) = lab::unadopted();
        let (code, _) = daemon.refused(Verb::ListProcesses(podvisor_proto::monitor::ListProcesses {}));
        assert_eq!(code, ErrorCode::WrongState);
        daemon.done(Verb::Shutdown(Shutdown {}));
        assert!(child.wait().unwrap().success());
    });
}

crate::on_both! {
    signals_and_their_exit_codes
    a_container_that_was_never_started
    deleting_a_running_container_ends_everything_of_it
    the_quickest_containers_are_not_lost
    several_are_created_at_once
    the_monitor_outlives_the_daemon_and_ends_when_it_is_told
}
