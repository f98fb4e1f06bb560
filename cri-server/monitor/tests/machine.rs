//! A pod's virtual machine: its start, its end, and what is left of it.
#![allow(missing_docs)]

mod lab;

use lab::{POD, run, until};
use podvisor_proto::agent::AddInterface;
use podvisor_proto::monitor::{
    ErrorCode, ListProcesses, ProcessState, ResizeVm, Shutdown, StartInit, StartVm, VmStarted, reply,
    request::Verb,
};
use rustix::process::{Pid, Signal, kill_process};

/// Other tests' hypervisor.
#[test]
fn plays_a_program() {
    lab::fake::play();
}

/// It runs: one that has ended may be nobody's to reap in a test.
fn alive(pid: i32) -> bool {
    std::fs::read_to_string(format!("/proc/{pid}/stat")).is_ok_and(|stat| !stat.contains(") Z "))
}

fn signal(pid: i32, signal: Signal) {
    kill_process(Pid::from_raw(pid).unwrap(), signal).unwrap();
}

/// A start that fails: with VM_FAILED, the step, and without leaving anything.
fn failed(pod: &mut lab::Pod, request: StartVm) -> (String, String) {
    let error = pod.start_vm(request).expect_err("a failure");
    assert_eq!(error.code(), ErrorCode::VmFailed, "{error:?}");
    assert!(!error.detail.contains('\n'), "{error:?}");
    assert_eq!(pod.list(), []);
    nothing_left(pod);
    (error.detail, error.runtime_log)
}

/// The monitor has no child, and the run directory no socket of a machine's.
fn nothing_left(pod: &lab::Pod) {
    let children = format!("/proc/{0}/task/{0}/children", pod.child.id());
    // What a guest that is none leaves behind takes a moment to be reaped.
    until("the monitor has no children", || std::fs::read_to_string(&children).unwrap().is_empty());
    for name in ["vsock.sock", "fs.sock"] {
        assert!(!pod.run_dir.join(name).exists(), "{name}");
    }
}

#[test]
fn from_start_to_shutdown() {
    run(|lab| {
        let mut pod = lab.machine_pod();
        let mut events = pod.subscribe();
        let request = lab.start_vm(&pod, "");
        let started = pod.start_vm(request.clone()).unwrap();
        assert!(started.pid > 1 && started.start_time > 0);
        let machine = started.machine.clone().unwrap();
        assert_eq!((machine.pid, machine.name.as_str(), machine.emulated), (started.pid, "fake", true));
        assert!(started.agent.as_ref().unwrap().protocol_version > 0);
        let listed = pod.list();
        assert_eq!(
            (listed[0].id.as_str(), listed[0].state(), listed[0].pid),
            (POD, ProcessState::Running, started.pid)
        );
        assert_eq!(listed[0].start_time, started.start_time);
        // A daemon that was started again asks again.
        assert_eq!(
            pod.connect().ask(Verb::StartVm(request.clone())).unwrap(),
            pod.daemon.ask(Verb::StartVm(request)).unwrap()
        );
        assert_eq!(pod.daemon.refused(Verb::StartInit(StartInit::default())).0, ErrorCode::WrongState);

        pod.daemon.done(Verb::Shutdown(Shutdown {}));
        assert!(pod.child.wait().unwrap().success());
        for pid in [started.pid, started.hypervisor_pid, started.file_server_pid] {
            assert!(!alive(pid), "{pid}");
        }
        let (id, exit) = events.exited();
        assert_eq!((id.as_str(), exit.code), (POD, 0));
        let record = std::fs::read_to_string(pod.state_dir.join(format!("{POD}.exit.json"))).unwrap();
        assert!(record.contains("\"reason\":\"it was shut down"), "{record}");
    });
}

#[test]
fn a_start_that_fails_says_at_what_and_leaves_nothing() {
    run(|lab| {
        let mut pod = lab.machine_pod();
        let good = lab.start_vm(&pod, "");
        let mut request = good.clone();
        request.hypervisor = "/no/such/hypervisor".into();
        assert!(failed(&mut pod, request).0.contains("/no/such/hypervisor"));
        let mut request = good.clone();
        request.file_server.as_mut().unwrap().program = "/no/such/fs".into();
        let (detail, _) = failed(&mut pod, request);
        assert!(detail.contains("start the file server") && detail.contains("/no/such/fs"), "{detail}");
        let mut request = good.clone();
        request.file_server.as_mut().unwrap().directory = "/no/such/directory".into();
        let (detail, _) = failed(&mut pod, request);
        assert!(
            detail.contains("fake-fs exited with 7: ") && detail.contains("/no/such/directory"),
            "{detail}"
        );
        let mut request = good.clone();
        request.file_server.as_mut().unwrap().cgroup_procs = vec!["/run/none/cgroup.procs".into()];
        let (detail, _) = failed(&mut pod, request);
        assert!(detail.contains("/run/none/cgroup.procs"), "{detail}");

        let mut with = |words: &str, limit: u32| {
            let mut request = lab.start_vm(&pod, words);
            if limit > 0 {
                request.timeout_ms = limit;
            }
            failed(&mut pod, request)
        };
        let (detail, _) = with("refuse", 0);
        assert_eq!(
            detail,
            "the virtual machine could not be started: start the machine: this machine cannot be made"
        );
        let (detail, _) = with("die", 0);
        assert!(detail.ends_with("podvisor-fake exited with 9: something is broken"), "{detail}");
        let (detail, _) = with("stranger", 0);
        assert!(detail.contains("process 1, which is not its own"), "{detail}");
        let (detail, _) = with("deaf", 300);
        assert!(detail.ends_with("not enough time to start the machine"), "{detail}");
        // Nobody listens in the guest; connections to it are swallowed.
        for words in ["agent=/run/lab/nobody", "swallow"] {
            let (detail, console) = with(words, 300);
            assert!(detail.contains("reach the agent in the guest"), "{detail}");
            // What the guest said until then, as people may see it.
            assert_eq!(console, "booting\nguest is [1mup[0m");
        }
        // An interface that is not there.
        let mut request = good.clone();
        request.interfaces =
            vec![AddInterface { hardware_address: "02:00:00:00:00:01".into(), ..AddInterface::default() }];
        let (detail, _) = failed(&mut pod, request);
        assert!(detail.contains("configure a network interface in the guest"), "{detail}");
        for (field, break_it) in [
            ("machine", Box::new(|it: &mut StartVm| it.machine = None) as Box<dyn Fn(&mut StartVm)>),
            ("hypervisor", Box::new(|it| it.hypervisor = "qemu".into())),
            ("tag", Box::new(|it| it.file_server.as_mut().unwrap().tag.clear())),
            ("vsock_path", Box::new(|it| it.machine.as_mut().unwrap().vsock_path = "x".into())),
        ] {
            let mut request = good.clone();
            break_it(&mut request);
            let (code, error) = pod.daemon.refused(Verb::StartVm(request));
            assert!(code == ErrorCode::Invalid && error.detail.contains(field), "{error:?}");
        }
        // None of that is in the way of a good one.
        pod.start_vm(good).unwrap();
    });
}

type End = &'static dyn Fn(&VmStarted);

#[test]
fn how_it_ends_is_told() {
    run(|lab| {
        let console = "booting\nguest is [1mup[0m";
        let ends: [(&str, End, i32, &str); 5] = [
            (
                "killed",
                &|it| signal(it.pid, Signal::KILL),
                137,
                "the machine's process was killed: signal: 9",
            ),
            ("panicked", &|it| signal(it.pid, Signal::USR1), 137, "the guest's kernel panicked: signal: 10"),
            ("off", &|it| signal(it.pid, Signal::USR2), 0, "the guest switched itself off: signal: 12"),
            (
                "lost",
                &|it| signal(it.hypervisor_pid, Signal::KILL),
                137,
                "podvisor-fake was killed by signal 9",
            ),
            ("files", &|it| signal(it.file_server_pid, Signal::KILL), 137, "fake-fs was killed by signal 9"),
        ];
        for (name, end, code, reason) in ends {
            let mut pod = lab.machine_pod_in(name);
            let mut events = pod.subscribe();
            let started = lab.start(&mut pod, "");
            end(&started);
            let (id, exit_code, why) = events.end();
            assert_eq!((id.as_str(), exit_code), (POD, code), "{name}");
            let (first, rest) = why.split_once('\n').expect("the console");
            assert!(first.starts_with(reason), "{name}: {first}");
            assert_eq!(rest, console, "{name}");
            let listed = pod.list().remove(0);
            assert_eq!(
                (listed.state(), listed.pid, listed.reason),
                (ProcessState::Exited, started.pid, why),
                "{name}"
            );
            nothing_left(&pod);
            for pid in [started.pid, started.hypervisor_pid, started.file_server_pid] {
                assert!(!alive(pid), "{name}");
            }
            // A machine runs once.
            let request = lab.start_vm(&pod, "");
            assert_eq!(pod.start_vm(request).unwrap_err().code(), ErrorCode::VmFailed);
            pod.daemon.done(Verb::Shutdown(Shutdown {}));
            assert!(pod.child.wait().unwrap().success());
        }
    });
}

#[test]
fn a_hypervisor_that_does_not_stop_is_killed() {
    run(|lab| {
        let mut pod = lab.machine_pod();
        let started = lab.start(&mut pod, "stubborn");
        pod.daemon.done(Verb::Shutdown(Shutdown {}));
        assert!(pod.child.wait().unwrap().success());
        // The machine too, which is no child of the monitor's.
        assert!(!alive(started.pid) && !alive(started.hypervisor_pid) && !alive(started.file_server_pid));
    });
}

#[test]
fn a_start_is_joined_and_cut_short() {
    run(|lab| {
        let mut pod = lab.machine_pod();
        let request = lab.start_vm(&pod, "deaf");
        let first = pod.daemon.send(Verb::StartVm(request.clone()));
        until("it is starting", || {
            let state = pod.connect().ask(Verb::ListProcesses(ListProcesses {}));
            matches!(state, Ok(reply::Result::Processes(it)) if it.processes.iter().any(|it| it.state() == ProcessState::Creating))
        });
        let mut second = pod.connect();
        let joined = second.send(Verb::StartVm(request));
        let mut create = pod.container("c1", &lab::Spec::waiting());
        create.log_path.clear();
        let mut third = pod.connect();
        assert_eq!(third.refused(Verb::CreateContainer(create)).0, ErrorCode::WrongState);
        let end = third.send(Verb::Shutdown(Shutdown {}));
        for (client, id) in [(&mut pod.daemon, first), (&mut second, joined)] {
            let error = client.result(id).unwrap_err();
            assert!(error.code() == ErrorCode::VmFailed && error.detail.contains("shut down"), "{error:?}");
        }
        third.result(end).unwrap();
        assert!(pod.child.wait().unwrap().success());
    });
}

#[test]
fn nothing_outlives_the_monitor() {
    run(|lab| {
        let mut pod = lab.machine_pod();
        let started = lab.start(&mut pod, "");
        pod.child.kill().unwrap();
        pod.child.wait().unwrap();
        for pid in [started.file_server_pid, started.pid, started.hypervisor_pid] {
            until("it is gone", || !alive(pid));
        }
    });
}

#[test]
fn sizes_change_together_or_not_at_all() {
    run(|lab| {
        let mut pod = lab.machine_pod();
        lab.start(&mut pod, "");
        let resize = |memory: u64, cpus: u32| Verb::ResizeVm(ResizeVm { memory, cpus, ..Default::default() });
        let sizes = || std::fs::read_to_string(lab::machine::SIZES).unwrap_or_default();
        let resized = |pod: &mut lab::Pod, memory, cpus| match pod.daemon.ask(resize(memory, cpus)) {
            Ok(reply::Result::Resized(is)) => (is.memory >> 20, is.cpus),
            other => panic!("ResizeVm answered {other:?}"),
        };
        assert_eq!(resized(&mut pod, 0, 0), (256, 1));
        assert_eq!(resized(&mut pod, 256 << 20, 1), (256, 1));
        assert_eq!(sizes(), "");
        assert_eq!(resized(&mut pod, 512 << 20, 2), (512, 2));
        assert_eq!(sizes(), "memory 536870912\ncpus 2\n");
        let (code, error) = pod.daemon.refused(resize(256 << 20, 3));
        assert!(code == ErrorCode::VmFailed && error.detail == "too many CPUs", "{error:?}");
        assert_eq!(sizes(), "memory 536870912\ncpus 2\nmemory 268435456\nmemory 536870912\n");
        assert_eq!(pod.daemon.refused(resize(1 << 40, 1)).1.detail, "too much memory");
        assert_eq!(resized(&mut pod, 0, 1), (512, 1));
        assert!(sizes().ends_with("\ncpus 1\n"));
        // A guest that does not give all of it back.
        std::fs::write(lab::machine::HOLD, "").unwrap();
        assert_eq!(resized(&mut pod, 256 << 20, 0), (320, 1));
        std::fs::remove_file(lab::machine::HOLD).unwrap();
        assert_eq!(resized(&mut pod, 256 << 20, 0), (256, 1));
        let mut host = lab.pod_with(lab.directory.join("host"), "");
        assert_eq!(host.daemon.refused(resize(1, 1)).0, ErrorCode::WrongState);
    });
}
