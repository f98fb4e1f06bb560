//! The pod's init, and containers that share its pid namespace.
#![allow(missing_docs)]

mod lab;

use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use lab::{POD, Pod, Spec, run, until};
use podvisor_proto::monitor::{
    ErrorCode, KillContainer, ProcessState, Shutdown, StartInit, Started, reply, request::Verb,
};

fn start_init(pod: &mut Pod, request: StartInit) -> Started {
    match pod.daemon.ask(Verb::StartInit(request)).expect("an init") {
        reply::Result::Started(started) => started,
        other => panic!("{other:?}"),
    }
}

/// A line of /proc/PID/status.
fn status(pid: i32, key: &str) -> String {
    let text = fs::read_to_string(format!("/proc/{pid}/status")).unwrap();
    let line = text.lines().find(|line| line.starts_with(&format!("{key}:"))).unwrap();
    line.split_once(':').unwrap().1.trim().to_owned()
}

/// `cgroup.procs` of a new cgroup in two hierarchies, or in the only one.
fn cgroup_procs(name: &str) -> Vec<String> {
    let unified = Path::new("/sys/fs/cgroup/cgroup.procs").exists();
    let hierarchies = if unified { vec![""] } else { vec!["memory", "pids"] };
    let procs = |hierarchy: &str| {
        let directory = PathBuf::from("/sys/fs/cgroup").join(hierarchy).join(name).join("init");
        fs::create_dir_all(&directory).unwrap();
        directory.join("cgroup.procs").display().to_string()
    };
    hierarchies.into_iter().map(procs).collect()
}

/// A process that holds namespaces of its own, until the test's pid namespace ends.
fn namespaces(flags: &[&str]) -> u32 {
    #[allow(clippy::zombie_processes)] // it lives as long as the namespace that this process is PID 1 of
    let child =
        Command::new("unshare").args(flags).args(["sleep", "1000"]).stdin(Stdio::null()).spawn().unwrap();
    until("it has execed", || {
        fs::read_to_string(format!("/proc/{}/comm", child.id())).is_ok_and(|name| name == "sleep\n")
    });
    child.id()
}

fn namespace(pid: impl std::fmt::Display, kind: &str) -> PathBuf {
    fs::read_link(format!("/proc/{pid}/ns/{kind}")).unwrap()
}

#[test]
fn an_init_holds_nothing() {
    run(|lab| {
        let mut pod = lab.pod();
        let owner = namespaces(&["--uts", "--ipc", "--net"]);
        let procs = cgroup_procs(&lab.cgroup);
        let started = start_init(
            &mut pod,
            StartInit {
                cgroup_procs: procs.clone(),
                oom_score_adj: 500,
                join_namespaces: ["uts", "ipc", "net"].map(|kind| format!("/proc/{owner}/ns/{kind}")).into(),
            },
        );
        let pid = started.pid;
        assert_eq!(status(pid, "Name"), "podvisor-init");
        assert!(status(pid, "NSpid").ends_with("\t1"));
        assert_eq!(status(pid, "PPid"), pod.child.id().to_string());
        for set in ["CapInh", "CapPrm", "CapEff", "CapBnd", "CapAmb"] {
            assert_eq!(u64::from_str_radix(&status(pid, set), 16), Ok(0), "{set}");
        }
        assert_eq!(status(pid, "NoNewPrivs"), "1");
        assert_eq!(fs::read_dir(format!("/proc/{pid}/fd")).unwrap().count(), 0);
        assert_eq!(fs::read_dir(format!("/proc/{pid}/root")).unwrap().count(), 0, "an empty root directory");
        assert_eq!(fs::read_to_string(format!("/proc/{pid}/oom_score_adj")).unwrap(), "500\n");
        for kind in ["uts", "ipc", "net"] {
            assert_eq!(namespace(pid, kind), namespace(owner, kind));
        }
        for file in procs {
            assert_eq!(fs::read_to_string(file).unwrap(), format!("{pid}\n"));
        }
        let listed = &pod.list()[0];
        assert_eq!((listed.id.as_str(), listed.state(), listed.pid), (POD, ProcessState::Running, pid));
        assert_eq!(listed.start_time, started.start_time);
        assert_eq!(pod.daemon.refused(Verb::StartInit(StartInit::default())).0, ErrorCode::AlreadyExists);
        pod.daemon.done(Verb::Shutdown(Shutdown {}));
        assert!(pod.child.wait().unwrap().success());
        assert!(!Path::new(&format!("/proc/{pid}")).exists());
    });
}

#[test]
fn an_init_in_a_user_namespace() {
    run(|lab| {
        let mut pod = lab.pod();
        let owner = namespaces(&["--user", "--map-root-user", "--uts", "--net"]);
        let started = start_init(
            &mut pod,
            StartInit {
                join_namespaces: ["user", "net", "uts"].map(|kind| format!("/proc/{owner}/ns/{kind}")).into(),
                // Lower than this process may set: clamped.
                oom_score_adj: -999,
                ..StartInit::default()
            },
        );
        for kind in ["user", "uts", "net"] {
            assert_eq!(namespace(started.pid, kind), namespace(owner, kind));
        }
        assert!(status(started.pid, "NSpid").ends_with("\t1"));
        assert_eq!(u64::from_str_radix(&status(started.pid, "CapEff"), 16), Ok(0));
    });
}

#[test]
fn what_an_init_cannot_join_or_enter_is_told() {
    run(|lab| {
        let mut pod = lab.pod();
        let refused = |pod: &mut Pod, request: StartInit| {
            let (code, error) = pod.daemon.refused(Verb::StartInit(request));
            assert_eq!(pod.list(), []);
            (code, error.detail)
        };
        let joining = |path: &str| StartInit { join_namespaces: vec![path.into()], ..StartInit::default() };
        let (code, detail) = refused(&mut pod, joining("/run/no-such-namespace"));
        assert!(code == ErrorCode::System && detail.contains("/run/no-such-namespace"), "{detail}");
        let (code, detail) = refused(&mut pod, joining("/etc/passwd"));
        assert!(code == ErrorCode::System && detail.contains("/etc/passwd"), "{detail}");
        assert_eq!(refused(&mut pod, joining("/proc/self/ns/pid")).0, ErrorCode::System);
        assert_eq!(refused(&mut pod, joining("relative")).0, ErrorCode::Invalid);
        let entering =
            StartInit { cgroup_procs: vec!["/run/none/cgroup.procs".into()], ..StartInit::default() };
        let (code, detail) = refused(&mut pod, entering);
        assert!(code == ErrorCode::System && detail.contains("/run/none/cgroup.procs"), "{detail}");
        // None of that is in the way of a good one.
        start_init(&mut pod, StartInit::default());
    });
}

#[test]
fn containers_share_its_namespace_and_it_reaps() {
    run(|lab| {
        let mut pod = lab.pod();
        let mut events = pod.subscribe();
        let init = start_init(&mut pod, StartInit::default());
        let path = format!("/proc/{}/ns/pid", init.pid);
        let sharing = |script: &str| Spec::shell(script).pid_namespace(&path);

        // The shell's orphan becomes the init's, ends, and leaves no zombie.
        let started = pod.run(
            "c1",
            &sharing(
                "(sleep 0.05 &); trap 'exit 0' TERM; echo ready; while :; do sleep 1000 & wait $!; done",
            ),
        );
        assert_eq!(namespace(started.pid, "pid"), namespace(init.pid, "pid"));
        until("it is ready", || !pod.log_lines("c1").is_empty());
        until("the orphan is reaped", || {
            fs::read_to_string(format!("/proc/{0}/task/{0}/children", init.pid)).unwrap().trim().is_empty()
        });
        // A container sees the others and cannot end the init.
        let exit = pod
            .run_to_end("c2", &sharing("ps | grep -q podvisor-init && ! kill -9 1 2>/dev/null; kill -0 1"));
        assert_eq!(exit.code, 0);
        assert_eq!(events.exited().0, "c2");

        // What a container leaves behind goes with it, and does not hold its end up.
        let exit = pod.run_to_end("c3", &sharing("sleep 7777 & echo out; exit 5"));
        assert_eq!(exit.code, 5);
        assert_eq!(events.exited().0, "c3");
        assert_eq!(pod.log_lines("c3"), ["stdout F out"]);
        let sleeping = || {
            fs::read_dir("/proc").unwrap().flatten().any(|entry| {
                fs::read(entry.path().join("cmdline")).is_ok_and(|line| line == b"sleep\x007777\0")
            })
        };
        until("the rest is gone", || !sleeping());

        // Its end is an event, and takes the containers along.
        assert!(Command::new("kill").args(["-9", &init.pid.to_string()]).status().unwrap().success());
        let ended = [events.exited(), events.exited()];
        let codes: Vec<_> = ended.iter().map(|(id, exit)| (id.as_str(), exit.code)).collect();
        assert!(codes.contains(&(POD, 137)) && codes.contains(&("c1", 137)), "{codes:?}");
        assert!(pod.state_dir.join(format!("{POD}.exit.json")).exists());
        assert_eq!(pod.state(POD), Some(ProcessState::Exited));
        for id in ["c1", "c2", "c3"] {
            let kill = KillContainer { container_id: id.into(), signal: 15, all: false };
            pod.daemon.done(Verb::KillContainer(kill));
            pod.delete(id);
        }
        pod.daemon.done(Verb::Shutdown(Shutdown {}));
        assert!(pod.child.wait().unwrap().success());
    });
}
