//! Containers in a machine, made by the real agent: what is not the same as on the host. What is the same is tested with the host's.
#![allow(missing_docs)]

mod lab;

use std::collections::{BTreeMap, BTreeSet};
use std::io::{Read, Write};
use std::path::Path;

use lab::client::{connected, stream, sync};
use lab::{POD, Spec, private_memory, run, until};
use podvisor_proto::hypervisor::Disk;
use podvisor_proto::monitor::{
    Attach, Connect, DeleteContainer, ErrorCode, GuestStats, KillContainer, Place, ProcessState, Shutdown,
    StartContainer, UpdateContainer, reply, request::Verb,
};
use rustix::process::{Pid, Signal, kill_process};

/// Other tests' hypervisor.
#[test]
fn plays_a_program() {
    lab::fake::play();
}

#[test]
fn from_create_to_delete() {
    run(|lab| {
        let mut pod = lab.machine_pod();
        let machine = lab.start(&mut pod, "");
        let mut events = pod.subscribe();
        let files = |pod: &lab::Pod| {
            let entries = std::fs::read_dir(&pod.run_dir).unwrap().flatten();
            entries.map(|entry| entry.file_name().into_string().unwrap()).collect::<BTreeSet<_>>()
        };
        let before = files(&pod);
        let open =
            |pod: &lab::Pod| std::fs::read_dir(format!("/proc/{}/fd", pod.child.id())).unwrap().count();
        let descriptors = open(&pod);
        let started =
            pod.create("c1", &Spec::shell("echo out; echo err >&2; echo x > /written; cat /written; exit 7"));
        // On the host it is the machine.
        assert_eq!((started.pid, started.start_time), (machine.pid, machine.start_time));
        assert_eq!(pod.state("c1"), Some(ProcessState::Created));
        pod.start("c1");
        assert_eq!(events.end(), ("c1".into(), 7, String::new()));
        let record = std::fs::read_to_string(pod.state_dir.join("c1.exit.json")).unwrap();
        assert!(record.contains("\"code\":7") && !record.contains("reason"), "{record}");
        let lines: BTreeSet<String> = pod.log_lines("c1").into_iter().collect();
        assert_eq!(lines, ["stdout F out", "stdout F x", "stderr F err"].map(str::to_owned).into());
        // What it wrote went with it.
        assert!(!Path::new(lab::machine::SHARE).join("rootfs/written").exists());
        assert_eq!(pod.daemon.refused(Verb::Shutdown(Shutdown {})).0, ErrorCode::WrongState);
        pod.delete("c1");
        pod.delete("c1");
        assert_eq!(pod.containers(), []);
        assert_eq!(files(&pod), before);
        assert_eq!(open(&pod), descriptors, "descriptors are given back");
        // The name is free again, in the guest too.
        assert_eq!(pod.run_to_end("c1", &Spec::new(&["true"])).code, 0);
        pod.delete("c1");
        pod.daemon.done(Verb::Shutdown(Shutdown {}));
        assert!(pod.child.wait().unwrap().success());
    });
}

#[test]
fn what_contradicts_itself_is_refused() {
    run(|lab| {
        let mut pod = lab.machine_pod();
        let request = pod.container("c1", &Spec::waiting());
        assert_eq!(pod.daemon.refused(Verb::CreateContainer(request.clone())).0, ErrorCode::WrongState);
        lab.start(&mut pod, "");
        let mut wrong = request.clone();
        wrong.guest = None;
        assert_eq!(pod.daemon.refused(Verb::CreateContainer(wrong)).0, ErrorCode::Invalid);
        let mut wrong = request.clone();
        wrong.guest.as_mut().unwrap().root = None;
        assert_eq!(pod.daemon.refused(Verb::CreateContainer(wrong)).0, ErrorCode::Invalid);
        let mut wrong = request.clone();
        wrong.place = Place::Inside.into();
        assert_eq!(pod.daemon.refused(Verb::CreateContainer(wrong)).0, ErrorCode::Invalid);
        let mut wrong = request.clone();
        wrong.bundle = "/no/such/bundle".into();
        let (code, error) = pod.daemon.refused(Verb::CreateContainer(wrong));
        assert!(
            code == ErrorCode::System && error.detail.contains("/no/such/bundle/config.json"),
            "{error:?}"
        );
        let mut long = request.clone();
        long.guest.as_mut().unwrap().target = "x".repeat(5 << 20);
        assert_eq!(pod.daemon.refused(Verb::CreateContainer(long)).0, ErrorCode::Invalid);
        let missing = pod.container("c2", &Spec::new(&["no-such-program"]));
        let refused = match pod.daemon.ask(Verb::CreateContainer(missing)) {
            Err(error) => error,
            Ok(_) => pod
                .daemon
                .ask(Verb::StartContainer(StartContainer { container_id: "c2".into() }))
                .unwrap_err(),
        };
        assert_eq!(refused.code(), ErrorCode::RuntimeFailed);
        assert!(refused.runtime_log.contains("no-such-program"), "{refused:?}");
        // None of that is in the way of what is right.
        assert_eq!(pod.run_to_end("c1", &Spec::new(&["true"])).code, 0);
        // And on the host there is no guest.
        let mut host = lab.pod_with(lab.directory.join("host"), "");
        host.guest = true;
        let request = host.container("c1", &Spec::waiting());
        assert_eq!(host.daemon.refused(Verb::CreateContainer(request)).0, ErrorCode::WrongState);
    });
}

/// Disks come before the first container that has them, and go with the last.
#[test]
fn disks_come_and_go() {
    run(|lab| {
        let mut pod = lab.machine();
        let done = || std::fs::read_to_string(lab::machine::SIZES).unwrap_or_default();
        let with = |pod: &lab::Pod, id: &str, disks: &[(&str, &str)]| {
            let mut request = pod.container(id, &Spec::waiting());
            let disk = |(serial, path): &(&str, &str)| Disk {
                serial: (*serial).into(),
                path: (*path).into(),
                read_only: false,
            };
            request.guest.as_mut().unwrap().disks = disks.iter().map(disk).collect();
            Verb::CreateContainer(request)
        };
        let create = |pod: &mut lab::Pod, id: &str, disks: &[(&str, &str)]| {
            let verb = with(pod, id, disks);
            pod.daemon.ask(verb)
        };
        create(&mut pod, "c1", &[("a", "/a"), ("b", "/b")]).unwrap();
        create(&mut pod, "c2", &[("a", "/a")]).unwrap();
        assert_eq!(done(), "plug a\nplug b\n");
        pod.delete("c1");
        assert_eq!(done(), "plug a\nplug b\nunplug b\n");
        pod.delete("c2");
        assert_eq!(done(), "plug a\nplug b\nunplug b\nunplug a\n");

        // One that cannot be had: the others go again, and no container is there.
        std::fs::remove_file(lab::machine::SIZES).unwrap();
        let error = create(&mut pod, "c3", &[("a", "/a"), ("none", "/refused")]).unwrap_err();
        assert!(error.code() == ErrorCode::VmFailed && error.detail.contains("no such device"), "{error:?}");
        assert_eq!(done(), "plug a\nunplug a\n");
        assert_eq!(pod.containers(), []);

        // A guest that does not let go holds up nobody, and gives the disk to nobody else.
        std::fs::remove_file(lab::machine::SIZES).unwrap();
        create(&mut pod, "c4", &[("a", "/a")]).unwrap();
        std::fs::write(lab::machine::HOLD, "").unwrap();
        pod.delete("c4");
        let error = create(&mut pod, "c5", &[("a", "/a")]).unwrap_err();
        assert!(error.detail.contains("does not let go"), "{error:?}");
        std::fs::remove_file(lab::machine::HOLD).unwrap();
        create(&mut pod, "c6", &[("a", "/a")]).unwrap();
        pod.delete("c6");
        assert_eq!(done(), "plug a\nunplug a\nplug a\nunplug a\n");
        pod.daemon.done(Verb::Shutdown(Shutdown {}));
        assert!(pod.child.wait().unwrap().success());
    });
}

#[test]
fn ports_of_the_guest() {
    run(|lab| {
        let mut pod = lab.machine();
        // It answers what it is told, once.
        pod.run("c1", &Spec::shell("exec nc -l -p 4321 -e cat"));
        until("it listens", || {
            let check = sync("c1", "e1", "busybox grep -q :10E1 /proc/net/tcp /proc/net/tcp6");
            pod.daemon.exec_sync(check).is_ok_and(|it| it.exit_code == 0)
        });
        let mut stream = connected(&mut pod.connect(), 4321);
        let words = b"hello ".repeat(50_000);
        let mut writer = stream.try_clone().unwrap();
        let sent = words.clone();
        let sender = std::thread::spawn(move || {
            writer.write_all(&sent).unwrap();
            // The guest sees the end of this direction, and ends the other.
            rustix::net::shutdown(&writer, rustix::net::Shutdown::Write).unwrap();
        });
        let mut rest = Vec::new();
        stream.read_to_end(&mut rest).unwrap();
        sender.join().unwrap();
        assert!(rest == words, "{} of {}", rest.len(), words.len());
        assert_eq!(pod.exit("c1").code, 0);
        let mut client = pod.connect();
        let (code, error) = client.refused(Verb::Connect(Connect { port: 4321 }));
        assert_eq!(code, ErrorCode::System);
        assert!(error.detail.starts_with("connect to port 4321 in the pod: "), "{error:?}");
        assert!(error.detail.contains("Connection refused"), "{error:?}");
        assert!(client.read_frame().is_none());
        for port in [0, 65_536] {
            assert_eq!(pod.connect().refused(Verb::Connect(Connect { port })).0, ErrorCode::Invalid);
        }
        let mut host = lab.machine_pod_in("other");
        assert_eq!(host.daemon.refused(Verb::GuestStats(GuestStats::default())).0, ErrorCode::WrongState);
    });
}

#[test]
fn figures_and_limits_are_the_agents() {
    run(|lab| {
        let mut pod = lab.machine();
        pod.run("c1", &Spec::waiting());
        pod.run("c2", &Spec::waiting());
        let mut stats = |ids: &[&str]| {
            let container_ids = ids.iter().map(|&id| id.to_owned()).collect();
            match pod.daemon.ask(Verb::GuestStats(GuestStats { container_ids })).unwrap() {
                reply::Result::GuestStats(stats) => stats,
                other => panic!("{other:?}"),
            }
        };
        let all = stats(&[]);
        let ids: BTreeSet<&str> = all.containers.iter().map(|it| it.container_id.as_str()).collect();
        assert_eq!(ids, ["c1", "c2"].into());
        assert!(all.guest.unwrap().memory_total > 0);
        assert_eq!(stats(&["c2"]).containers.len(), 1);
        let update = |resources: &str| {
            Verb::UpdateContainer(UpdateContainer { container_id: "c1".into(), resources: resources.into() })
        };
        pod.daemon.done(update("{}"));
        let (code, error) = pod.daemon.refused(update("{not json"));
        assert_eq!(code, ErrorCode::RuntimeFailed);
        assert!(!error.runtime_log.is_empty());
    });
}

#[test]
fn everything_in_a_machine_ends_with_it() {
    run(|lab| {
        let mut pod = lab.machine_pod();
        let machine = lab.start(&mut pod, "");
        let mut events = pod.subscribe();
        pod.run("running", &Spec::shell("echo said; exec sleep 1000"));
        pod.create("created", &Spec::waiting());
        pod.run_to_end("ended", &Spec::shell("exit 3"));
        assert_eq!(events.end().0, "ended");
        until("it has spoken", || !pod.log_lines("running").is_empty());
        let mut exec = pod.connect();
        exec.open(Verb::Exec(stream("running", "e1", "echo here; sleep 1000")));
        exec.stdout_until("here\n");
        let mut waiting = pod.connect();
        let id = waiting.send(Verb::ExecSync(sync("running", "e2", "seq 20000; touch /read; sleep 1000")));
        let mut attached = pod.connect();
        attached.open(Verb::Attach(Attach {
            container_id: "running".into(),
            stdout: true,
            ..Attach::default()
        }));
        // More than a pipe holds, so somebody reads it.
        until("the other's output is read", || {
            pod.daemon.exec_sync(sync("running", "e3", "test -e /read")).is_ok_and(|it| it.exit_code == 0)
        });

        kill_process(Pid::from_raw(machine.pid).unwrap(), Signal::KILL).unwrap();
        let rest = exec.rest();
        assert_eq!(rest.exit.unwrap().code, 137);
        match waiting.result(id) {
            Ok(reply::Result::ExecSync(reply)) => {
                assert!(reply.exit_code == 137 && reply.stdout.starts_with(b"1\n2\n"), "{reply:?}");
            }
            other => panic!("{other:?}"),
        }
        assert_eq!(attached.rest().exit.unwrap().code, 137);
        let ends: Vec<(String, i32, String)> = (0..3).map(|_| events.end()).collect();
        let codes: BTreeMap<&str, i32> = ends.iter().map(|(id, code, _)| (id.as_str(), *code)).collect();
        assert_eq!(codes, [("running", 137), ("created", 137), (POD, 137)].into());
        assert_eq!(ends[2].0, POD, "the machine's is the last");
        assert!(
            pod.state_dir.join("running.exit.json").exists()
                && pod.state_dir.join("created.exit.json").exists()
        );
        assert_eq!(pod.log_lines("running"), ["stdout F said"]);
        assert_eq!(pod.exit("ended").code, 3);
        let kill = KillContainer { container_id: "running".into(), signal: 9, all: true };
        pod.daemon.done(Verb::KillContainer(kill));
        assert_eq!(
            pod.daemon.exec_sync(sync("running", "e4", "true")).unwrap_err().code(),
            ErrorCode::WrongState
        );
        for id in ["running", "created", "ended"] {
            pod.delete(id);
        }
        pod.daemon.done(Verb::Shutdown(Shutdown {}));
        assert!(pod.child.wait().unwrap().success());
    });
}

#[test]
fn a_machine_that_ends_at_any_moment_leaves_no_request_without_an_answer() {
    run(|lab| {
        for round in 0..12 {
            let mut pod = lab.machine_pod_in(&format!("round{round}"));
            let machine = lab.start(&mut pod, "");
            let mut events = pod.subscribe();
            pod.run(&format!("r{round}"), &Spec::waiting());
            let mut clients: Vec<lab::Client> = (0..6).map(|_| pod.connect()).collect();
            let mut ids = Vec::new();
            for (n, client) in clients.iter_mut().enumerate() {
                let request = pod.container(&format!("n{round}-{n}"), &Spec::shell("seq 1000"));
                ids.push(match n {
                    0..3 => client.send(Verb::CreateContainer(request)),
                    3 => client.send(Verb::ExecSync(sync(&format!("r{round}"), "e", "seq 1000; sleep 1000"))),
                    4 => client
                        .send(Verb::DeleteContainer(DeleteContainer { container_id: format!("n{round}-0") })),
                    _ => client.send(Verb::GuestStats(GuestStats::default())),
                });
            }
            // At another moment each time, by what has been answered until then.
            let mut answered: Vec<usize> = Vec::new();
            for n in (0..6).filter(|n| *n != 3).take(round % 6) {
                let _ = clients[n].result(ids[n]);
                answered.push(n);
            }
            kill_process(Pid::from_raw(machine.pid).unwrap(), Signal::KILL).unwrap();
            for n in (0..6).filter(|n| !answered.contains(n)) {
                let _ = clients[n].result(ids[n]);
            }
            while events.end().0 != POD {}
            assert!(
                pod.containers().iter().all(|it| it.state() == ProcessState::Exited),
                "{:?}",
                pod.containers()
            );
            for container in pod.containers() {
                pod.delete(&container.id);
            }
            pod.daemon.done(Verb::Shutdown(Shutdown {}));
            assert!(pod.child.wait().unwrap().success());
        }
    });
}

#[test]
fn a_container_that_is_deleted_while_it_is_created() {
    run(|lab| {
        let mut pod = lab.machine();
        let mut second = pod.connect();
        for round in 0..10 {
            let id = format!("c{round}");
            let request = pod.container(&id, &Spec::waiting());
            let create = pod.daemon.send(Verb::CreateContainer(request));
            let delete = second.send(Verb::DeleteContainer(DeleteContainer { container_id: id.clone() }));
            second.result(delete).unwrap();
            let created = pod.daemon.result(create);
            // Which of the two came first is open; in the end it is gone.
            assert!(created.is_ok() || created.unwrap_err().code() == ErrorCode::WrongState);
            pod.delete(&id);
            assert_eq!(pod.containers(), []);
        }
        assert_eq!(pod.run_to_end("after", &Spec::new(&["true"])).code, 0);
    });
}

#[test]
fn it_stays_small() {
    run(|lab| {
        let mut pod = lab.machine();
        pod.run("c1", &Spec::waiting());
        for n in 0..20 {
            pod.daemon.exec_sync(sync("c1", &format!("e{n}"), "seq 100000")).unwrap();
        }
        pod.run_to_end("c2", &Spec::shell("seq 500000"));
        assert_eq!(pod.log_lines("c2").len(), 500_000);
        assert!(private_memory(pod.child.id()) < 4 << 20, "{}", private_memory(pod.child.id()));
    });
}
