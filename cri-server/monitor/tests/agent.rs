//! Agents that break the rules, and connections to them that break: the pod ends or goes on, the monitor stays small.
#![allow(missing_docs)]

mod lab;

use std::collections::BTreeSet;
use std::io::Write;
use std::os::unix::net::UnixStream;
use std::time::Duration;

use lab::agent::{Agent, Instead, event_frame, exit, frame};
use lab::client::{stream, sync};
use lab::{POD, Pod, Spec, own_memory, run, until};
use podvisor_proto::agent::{
    self as wire, Acknowledge, ContainerStats, Error, ErrorCode as AgentCode, Opened, Process,
    ProcessState as AgentState, Reply, StatsReply, event, open, reply, request::Verb as Asked,
};
use podvisor_proto::monitor::{
    Attach, DeleteContainer, ErrorCode, GuestStats, KillContainer, ProcessState, Shutdown, StartContainer,
    event as news, request::Verb,
};
use rustix::process::{Pid, Signal, kill_process};

/// Other tests' hypervisor.
#[test]
fn plays_a_program() {
    lab::fake::play();
}

fn told(code: AgentCode, detail: &str, id: u64) -> Vec<u8> {
    let error = Error { code: code.into(), detail: detail.into() };
    frame(&Reply { id, result: Some(reply::Result::Error(error)) })
}

/// The machine ends for this reason, and everything in it.
fn distrusted(pod: &mut Pod, events: &mut lab::Client, reason: &str) {
    loop {
        let (id, code, why) = events.end();
        assert_eq!(code, 137, "{id}");
        if id == POD {
            assert!(why.starts_with(reason), "{why}");
            break;
        }
        // Everything that was in it has been told before, and for what reason it ended.
        assert!(why.starts_with(&format!("the pod's virtual machine has ended: {reason}")), "{why}");
    }
    assert!(pod.containers().iter().all(|it| it.state() == ProcessState::Exited));
    until("nothing of it is kept", || own_memory(pod.child.id()) < 1 << 20);
    for container in pod.containers() {
        pod.delete(&container.id);
    }
    pod.daemon.done(Verb::Shutdown(Shutdown {}));
    assert!(pod.child.wait().unwrap().success());
}

#[test]
fn bad_answers_at_the_start_fail_it() {
    run(|lab| {
        let mut pod = lab.machine_pod();
        let bad: [(&str, Vec<u8>, &str); 5] = [
            ("long", u32::MAX.to_le_bytes().to_vec(), "a frame of 4294967295 bytes is longer"),
            ("garbage", [&5_u32.to_le_bytes()[..], &[0xff; 5]].concat(), "it sent no message"),
            ("other", frame(&Reply { id: 4711, result: None }), "it answered what it was not asked"),
            ("refusal", told(AgentCode::System, "no \u{1b}[1mway", 1), "no [1mway"),
            ("mute", Vec::new(), "there was not enough time to greet the agent in the guest"),
        ];
        for (name, bytes, reason) in bad {
            let agent = lab.agent(name);
            agent.instead(move |_| Some(Instead::Say(bytes.clone())));
            let mut request = lab.start_vm(&pod, &agent.word());
            if name == "mute" {
                request.timeout_ms = 300;
            }
            let error = pod.start_vm(request).unwrap_err();
            assert_eq!(error.code(), ErrorCode::VmFailed);
            assert!(
                error.detail.contains("greet the agent in the guest") && error.detail.contains(reason),
                "{error:?}"
            );
            assert_eq!(pod.list(), []);
        }
        let agent = lab.agent("rude");
        agent.instead(|_| Some(Instead::HangUp));
        let request = lab.start_vm(&pod, &agent.word());
        let error = pod.start_vm(request).unwrap_err();
        assert!(error.detail.contains("the agent ended the connection"), "{error:?}");
    });
}

/// A container whose agent is the test.
fn created(pod: &mut Pod, agent: &Agent, id: &str) {
    pod.create(id, &Spec::waiting());
    pod.start(id);
    agent.until_asked(
        "it is started",
        |verb| matches!(verb, Asked::StartContainer(it) if it.container_id == id),
    );
}

#[test]
fn what_is_not_as_agreed_ends_the_machine_and_nothing_else() {
    run(|lab| {
        let oom = |id: &str| event::Kind::Oom(wire::OomKill { container_id: id.into() });
        let many: Vec<u8> = (1..20_000).flat_map(|sequence| event_frame(sequence, oom("c1"))).collect();
        let strangers: Vec<u8> = (1..20_000)
            .flat_map(|sequence| event_frame(sequence, event::Kind::Exited(exit("x", 0))))
            .collect();
        let endless =
            [&u32::try_from(wire::MAX_FRAME).unwrap().to_le_bytes()[..], &vec![0; wire::MAX_FRAME]].concat();
        let bad: [(&str, Vec<u8>, &str); 7] = [
            ("long", u32::MAX.to_le_bytes().to_vec(), "the agent does not keep to its protocol: a frame of"),
            ("garbage", endless, "the agent does not keep to its protocol: it sent no message"),
            (
                "other",
                frame(&Reply { id: 1 << 40, result: None }),
                "the agent does not keep to its protocol: it answered what",
            ),
            (
                "backwards",
                event_frame(0, oom("c1")),
                "the agent does not keep to its protocol: its news do not count",
            ),
            ("flood", many, "the agent does not keep to its protocol: it has more news"),
            ("strangers", strangers, "the agent does not keep to its protocol: it has more news"),
            (
                "init",
                event_frame(1, event::Kind::Exited(exit("init", 3))),
                "the pod's init in the guest ended with code 3",
            ),
        ];
        for (name, bytes, reason) in bad {
            let (mut pod, agent) = lab.with_agent(name);
            let mut events = pod.subscribe();
            created(&mut pod, &agent, "c1");
            let mut exec = pod.connect();
            exec.open(Verb::Exec(stream("c1", "e1", "sleep 1000")));
            let mut attached = pod.connect();
            attached.open(Verb::Attach(Attach {
                container_id: "c1".into(),
                stdout: true,
                ..Attach::default()
            }));
            agent.say(&bytes);
            assert_eq!(exec.rest().exit.unwrap().code, 137, "{name}");
            assert_eq!(attached.rest().exit.unwrap().code, 137, "{name}");
            // The daemon hears of memory no more often than it needs to.
            let mut told = 0;
            while name == "flood" && matches!(events.peek(), news::Kind::Oom(_)) {
                events.event();
                told += 1;
            }
            assert!(told <= 200, "{told}");
            distrusted(&mut pod, &mut events, reason);
        }
    });
}

#[test]
fn a_list_without_an_end_is_not_decoded() {
    run(|lab| {
        let (mut pod, agent) = lab.with_agent("list");
        let mut events = pod.subscribe();
        let containers = vec![ContainerStats { root_bytes: 1, ..ContainerStats::default() }; 900_000];
        let stats = reply::Result::Stats(StatsReply { containers, ..StatsReply::default() });
        agent.instead(move |request| {
            let reply = Reply { id: request.id, result: Some(stats.clone()) };
            matches!(request.verb, Some(Asked::Stats(_))).then(|| Instead::Say(frame(&reply)))
        });
        let error = pod.daemon.ask(Verb::GuestStats(GuestStats::default())).unwrap_err();
        assert_eq!(error.code(), ErrorCode::VmFailed);
        let peak = std::fs::read_to_string(format!("/proc/{}/status", pod.child.id())).unwrap();
        let peak =
            peak.lines().find_map(|line| line.strip_prefix("VmHWM:")).unwrap().trim_end_matches(" kB").trim();
        assert!(peak.parse::<u64>().unwrap() < 24 << 10, "{peak} kB");
        distrusted(
            &mut pod,
            &mut events,
            "the agent does not keep to its protocol: it sent a list of more than",
        );
    });
}

#[test]
fn refusals_are_passed_on_in_the_agents_words() {
    run(|lab| {
        let (mut pod, agent) = lab.with_agent("run");
        created(&mut pod, &agent, "c1");
        agent.instead(|request| {
            let refused = matches!(
                request.verb,
                Some(Asked::AddRoot(_) | Asked::KillContainer(_) | Asked::Exec(_) | Asked::Stats(_))
            );
            refused.then(|| Instead::Say(told(AgentCode::Refused, "not\ntoday", request.id)))
        });
        let request = pod.container("c2", &Spec::waiting());
        let (code, error) = pod.daemon.refused(Verb::CreateContainer(request));
        assert_eq!((code, error.runtime_log.as_str()), (ErrorCode::RuntimeFailed, "not today"));
        assert_eq!(error.detail, "the agent in the guest could not mount the container's root file system");
        // What there may have been of it is removed.
        agent.until_asked(
            "it is deleted",
            |verb| matches!(verb, Asked::DeleteContainer(it) if it.container_id == "c2"),
        );
        agent.until_asked(
            "its root is removed",
            |verb| matches!(verb, Asked::RemoveRoot(it) if it.container_id == "c2"),
        );
        assert_eq!(pod.containers().len(), 1);
        let kill = KillContainer { container_id: "c1".into(), signal: 15, all: false };
        assert_eq!(pod.daemon.refused(Verb::KillContainer(kill)).0, ErrorCode::RuntimeFailed);
        let error = pod.daemon.exec_sync(sync("c1", "e1", "true")).unwrap_err();
        assert_eq!((error.code(), error.runtime_log.as_str()), (ErrorCode::RuntimeFailed, "not today"));
        assert_eq!(pod.daemon.refused(Verb::GuestStats(GuestStats::default())).0, ErrorCode::RuntimeFailed);

        // A stream that cannot be opened.
        agent.state().instead = None;
        let closed = Error { code: AgentCode::WrongState.into(), detail: "somebody has it open".into() };
        for opened in
            [frame(&Opened { error: Some(closed) }), u32::MAX.to_le_bytes().to_vec(), vec![1, 0, 0, 0, 0xff]]
        {
            agent.state().opened = Some(opened);
            let request = pod.container("c3", &Spec::waiting());
            let (code, error) = pod.daemon.refused(Verb::CreateContainer(request));
            assert_eq!(code, ErrorCode::RuntimeFailed);
            assert!(error.detail.contains("could not open a standard stream"), "{error:?}");
            assert_eq!(pod.containers().len(), 1);
            let error = pod.daemon.exec_sync(sync("c1", "e2", "true")).unwrap_err();
            assert!(error.detail.contains("could not open a standard stream"), "{error:?}");
        }
        assert_eq!(pod.state(POD), Some(ProcessState::Running));
    });
}

#[test]
fn an_end_is_acknowledged_when_it_is_recorded() {
    run(|lab| {
        let (mut pod, agent) = lab.with_agent("run");
        let mut events = pod.subscribe();
        created(&mut pod, &agent, "c1");
        created(&mut pod, &agent, "c2");
        let mut streams = agent.take_streams();
        let acknowledged =
            |sequence: u64| agent.state().asked.contains(&Asked::Acknowledge(Acknowledge { sequence }));
        // Its output has not come to its end: c1 goes on ending while c2 ends.
        let first = agent.exited("c1", 5);
        let of = |open: &wire::Open, id: &str| matches!(&open.stream, Some(open::Stream::Standard(it)) if it.id == id);
        for (open, socket) in &mut streams {
            if of(open, "c2") {
                socket.write_all(b"last words\n").unwrap();
            }
        }
        streams.retain(|(open, _)| of(open, "c1"));
        let second = agent.exited("c2", 6);
        assert_eq!(events.end(), ("c2".into(), 6, String::new()));
        assert!(pod.log_lines("c2").contains(&"stdout F last words".to_owned()));
        assert!(!acknowledged(first) && !acknowledged(second));
        assert!(!pod.state_dir.join("c1.exit.json").exists());
        drop(streams);
        assert_eq!(events.end(), ("c1".into(), 5, String::new()));
        until("both are acknowledged", || acknowledged(second));
        assert!(pod.state_dir.join("c1.exit.json").exists());
        // The agent forgets a container that has ended without being asked.
        agent.until_asked(
            "its root is removed",
            |verb| matches!(verb, Asked::RemoveRoot(it) if it.container_id == "c1"),
        );
        pod.delete("c1");
    });
}

#[test]
fn output_that_does_not_end_does_not_hold_up_an_end() {
    run(|lab| {
        let (mut pod, agent) = lab.with_agent("run");
        let mut events = pod.subscribe();
        created(&mut pod, &agent, "silent");
        let silent = agent.take_streams();
        created(&mut pod, &agent, "flooding");
        let flooding = agent.take_streams();
        // It ends before its streams are open.
        agent.instead(move |request| match &request.verb {
            Some(Asked::CreateContainer(create)) if create.container_id == "early" => {
                let started =
                    Reply { id: request.id, result: Some(reply::Result::Started(wire::Started { pid: 1 })) };
                let ended = event_frame(1, event::Kind::Exited(exit("early", 9)));
                Some(Instead::Say([frame(&started), ended].concat()))
            }
            _ => None,
        });
        pod.create("early", &Spec::waiting());
        drop(agent.take_streams());
        assert_eq!(events.end(), ("early".into(), 9, String::new()));
        agent.say(&event_frame(2, event::Kind::Exited(exit("silent", 0))));
        agent.say(&event_frame(3, event::Kind::Exited(exit("flooding", 1))));
        let floods: Vec<_> = flooding
            .into_iter()
            .map(|(_, mut socket)| {
                std::thread::spawn(move || while socket.write_all(&[b'x'; 4096]).is_ok() {})
            })
            .collect();
        let ends: BTreeSet<(String, i32, String)> = [events.end(), events.end()].into();
        let expected =
            [("flooding", 1), ("silent", 0)].map(|(id, code)| (id.to_owned(), code, String::new()));
        assert_eq!(ends, expected.into());
        for flood in floods {
            flood.join().unwrap();
        }
        drop(silent);
        assert!(std::fs::metadata(pod.log("flooding")).unwrap().len() < 32 << 20);
        assert_eq!(pod.state(POD), Some(ProcessState::Running));
    });
}

#[test]
fn a_guest_that_is_kept_from_running_loses_no_output() {
    run(|lab| {
        let (mut pod, agent) = lab.with_agent("run");
        let mut events = pod.subscribe();
        created(&mut pod, &agent, "c1");
        let mut exec = pod.connect();
        exec.open(Verb::Exec(stream("c1", "e1", "true")));
        let of = |open: &wire::Open, exec: bool| match &open.stream {
            Some(open::Stream::Standard(it)) if it.id.starts_with("exec.") == exec => Some(it.id.clone()),
            _ => None,
        };
        let (of_exec, of_container): (Vec<_>, Vec<_>) =
            agent.take_streams().into_iter().partition(|(open, _)| of(open, true).is_some());
        let name = of(&of_exec[0].0, true).unwrap();
        let last_words = |streams: Vec<(wire::Open, UnixStream)>| {
            let stdout = streams.into_iter().find(|(open, _)| {
                matches!(&open.stream, Some(open::Stream::Standard(it)) if it.which() == wire::StandardStream::Stdout)
            });
            stdout.unwrap().1.write_all(b"last words\n").unwrap();
        };
        // It says that a process has ended, and then gets no processor for longer than output is waited for.
        agent.instead(|_| Some(Instead::Say(Vec::new())));
        agent.exited(&name, 4);
        std::thread::sleep(Duration::from_millis(800));
        last_words(of_exec);
        let output = exec.rest();
        assert_eq!((output.stdout.as_slice(), output.exit.unwrap().code), (b"last words\n".as_slice(), 4));
        agent.exited("c1", 5);
        std::thread::sleep(Duration::from_millis(2500));
        last_words(of_container);
        assert_eq!(events.end(), ("c1".into(), 5, String::new()));
        assert!(pod.log_lines("c1").contains(&"stdout F last words".to_owned()));
    });
}

#[test]
fn a_connection_that_was_lost_is_made_again() {
    run(|lab| {
        let (mut pod, agent) = lab.with_agent("run");
        let mut events = pod.subscribe();
        for id in ["there", "ended", "missing", "killed", "started"] {
            if id == "started" {
                pod.create(id, &Spec::waiting());
            } else {
                created(&mut pod, &agent, id);
            }
        }
        let mut exec = pod.connect();
        exec.open(Verb::Exec(stream("there", "e1", "sleep 1000")));
        // The end that is not acknowledged comes again; the other's streams are still open.
        let kept: Vec<_> = agent.take_streams();
        agent.exited("ended", 3);
        agent.instead(|request| {
            let lost = matches!(
                request.verb,
                Some(
                    Asked::KillContainer(_)
                        | Asked::StartContainer(_)
                        | Asked::AddRoot(_)
                        | Asked::UpdateContainer(_)
                )
            );
            lost.then(|| Instead::Say(Vec::new()))
        });
        let process = |id: &str, state: AgentState| Process {
            id: id.into(),
            state: state.into(),
            ..Process::default()
        };
        let execs: Vec<String> = kept
            .iter()
            .filter_map(|(open, _)| match &open.stream {
                Some(open::Stream::Standard(it)) if it.id.starts_with("exec.") => Some(it.id.clone()),
                _ => None,
            })
            .collect();
        assert!(!execs.is_empty());
        agent.state().processes = vec![
            process("there", AgentState::Running),
            process("ended", AgentState::Exited),
            process("killed", AgentState::Running),
            process("started", AgentState::Running),
            // The exec is not.
        ];
        let kill =
            |signal| Verb::KillContainer(KillContainer { container_id: "killed".into(), signal, all: true });
        let mut clients: Vec<lab::Client> = (0..4).map(|_| pod.connect()).collect();
        let request = pod.container("new", &Spec::waiting());
        let ids = [
            clients[0].send(kill(9)),
            clients[1].send(kill(15)),
            clients[2].send(Verb::StartContainer(StartContainer { container_id: "started".into() })),
            clients[3].send(Verb::CreateContainer(request)),
        ];
        agent.until_asked(
            "all is asked",
            |verb| matches!(verb, Asked::AddRoot(it) if it.container_id == "new"),
        );
        agent.until_asked("all is asked", |verb| matches!(verb, Asked::KillContainer(it) if it.signal == 15));
        agent.until_asked(
            "all is asked",
            |verb| matches!(verb, Asked::StartContainer(it) if it.container_id == "started"),
        );
        {
            let mut state = agent.state();
            state.asked.clear();
            state.instead = None;
        }
        agent.hang_up();
        // What can be done twice is done again; a start is decided by what there is; the rest has failed.
        clients[0].result(ids[0]).unwrap();
        assert_eq!(clients[1].result(ids[1]).unwrap_err().code(), ErrorCode::VmFailed);
        clients[2].result(ids[2]).unwrap();
        assert_eq!(clients[3].result(ids[3]).unwrap_err().code(), ErrorCode::VmFailed);
        agent.until_asked(
            "it is removed",
            |verb| matches!(verb, Asked::RemoveRoot(it) if it.container_id == "new"),
        );
        agent.until_asked("the clock is right", |verb| matches!(verb, Asked::SetTime(_)));
        assert_eq!(pod.state("started"), Some(ProcessState::Running));
        assert_eq!(pod.state("there"), Some(ProcessState::Running));
        // What is not there any more has ended.
        drop(kept);
        assert_eq!(exec.rest().exit.unwrap().code, 137);
        agent.say(&event_frame(1, event::Kind::Exited(exit("ended", 3))));
        let ends: BTreeSet<(String, i32)> =
            [events.end(), events.end()].into_iter().map(|(id, code, _)| (id, code)).collect();
        assert_eq!(ends, [("ended".to_owned(), 3), ("missing".to_owned(), 137)].into());
        // News that are known are acknowledged, not told twice.
        agent.exited("there", 0);
        assert_eq!(events.end().0, "there");
    });
}

#[test]
fn an_agent_that_does_not_come_back_ends_its_machine() {
    run(|lab| {
        let (mut pod, agent) = lab.with_agent("gone");
        let mut events = pod.subscribe();
        std::fs::remove_file(agent.directory.join("control.sock")).unwrap();
        agent.hang_up();
        // Until it is given up, requests wait.
        let mut waiting = pod.connect();
        let id = waiting.send(Verb::GuestStats(GuestStats::default()));
        assert_eq!(pod.state(POD), Some(ProcessState::Running));
        assert_eq!(waiting.result(id).unwrap_err().code(), ErrorCode::VmFailed);
        distrusted(
            &mut pod,
            &mut events,
            "the connection to the agent was lost and did not come back within 10 s",
        );

        let (mut pod, agent) = lab.with_agent("flapping");
        let mut events = pod.subscribe();
        agent.instead(|request| matches!(request.verb, Some(Asked::SetTime(_))).then_some(Instead::HangUp));
        agent.hang_up();
        distrusted(&mut pod, &mut events, "the agent ends one connection after the other");

        let (mut pod, agent) = lab.with_agent("forgetful");
        let mut events = pod.subscribe();
        agent.state().connections = 0;
        agent.hang_up();
        distrusted(
            &mut pod,
            &mut events,
            "the agent does not keep to its protocol: it does not know the pod any more",
        );
    });
}

#[test]
fn requests_that_wait_are_answered_when_the_machine_ends() {
    run(|lab| {
        let (mut pod, agent) = lab.with_agent("run");
        let mut events = pod.subscribe();
        created(&mut pod, &agent, "c1");
        created(&mut pod, &agent, "c2");
        agent.instead(|_| Some(Instead::Say(Vec::new())));
        let mut clients: Vec<lab::Client> = (0..6).map(|_| pod.connect()).collect();
        let request = pod.container("c3", &Spec::waiting());
        let delete = |id: &str| Verb::DeleteContainer(DeleteContainer { container_id: id.into() });
        let kill = KillContainer { container_id: "c1".into(), signal: 15, all: false };
        let ids = [
            clients[0].send(Verb::CreateContainer(request)),
            clients[1].send(Verb::KillContainer(kill)),
            clients[2].send(Verb::ExecSync(sync("c1", "e1", "true"))),
            clients[3].send(Verb::Exec(stream("c1", "e2", "true"))),
            clients[4].send(Verb::GuestStats(GuestStats::default())),
            clients[5].send(delete("c2")),
        ];
        agent.until_asked("all is asked", |verb| matches!(verb, Asked::Stats(_)));
        agent.until_asked(
            "all is asked",
            |verb| matches!(verb, Asked::KillContainer(it) if it.container_id == "c2"),
        );
        agent.say(&event_frame(0, event::Kind::Oom(wire::OomKill::default())));
        for (client, id) in clients.iter_mut().zip(ids).take(5) {
            assert_eq!(client.result(id).unwrap_err().code(), ErrorCode::VmFailed);
        }
        // What a delete wants is done with the machine.
        clients[5].result(ids[5]).unwrap();
        let error = pod.daemon.exec_sync(sync("c1", "e3", "true")).unwrap_err();
        assert!(matches!(error.code(), ErrorCode::VmFailed | ErrorCode::WrongState), "{error:?}");
        let request = pod.container("c4", &Spec::waiting());
        assert_eq!(pod.daemon.refused(Verb::CreateContainer(request)).0, ErrorCode::VmFailed);
        distrusted(&mut pod, &mut events, "the agent does not keep to its protocol");
    });
}

#[test]
fn a_guest_that_answers_nothing_holds_nothing_up() {
    run(|lab| {
        let (mut pod, agent) = lab.with_agent("run");
        let mut events = pod.subscribe();
        created(&mut pod, &agent, "c1");
        agent.instead(|_| Some(Instead::Say(Vec::new())));
        // Killing it goes unanswered, and then it ends with its machine.
        pod.delete("c1");
        let (id, code, why) = events.end();
        assert_eq!((id.as_str(), code), ("c1", 137));
        assert!(why.contains("the agent did not signal the container within 20 s"), "{why}");
        distrusted(&mut pod, &mut events, "the agent did not signal the container within 20 s");
    });
}

#[test]
fn a_guest_whose_kernel_is_silent_too_stands_still() {
    run(|lab| {
        let (mut pod, agent) = lab.with_agent("run");
        let mut events = pod.subscribe();
        created(&mut pod, &agent, "c1");
        std::fs::write(agent.directory.join(lab::fake::DEAF), "").unwrap();
        // As long as it says something its kernel is not asked.
        agent.until_asked("it is given the time", |verb| matches!(verb, Asked::SetTime(_)));
        agent.instead(|_| Some(Instead::Say(Vec::new())));
        distrusted(&mut pod, &mut events, "the guest stands still: neither its kernel nor its agent answers");
    });
}

#[test]
fn a_machine_that_is_kept_from_running_is_waited_for() {
    run(|lab| {
        let (mut pod, agent) = lab.with_agent("run");
        created(&mut pod, &agent, "c1");
        let machine = Pid::from_raw(pod.list()[0].pid).unwrap();
        std::fs::write(agent.directory.join(lab::fake::DEAF), "").unwrap();
        kill_process(machine, Signal::STOP).unwrap();
        agent.instead(|_| Some(Instead::Say(Vec::new())));
        let asked = |agent: &Agent| {
            let is_time = |verb: &&Asked| matches!(verb, Asked::SetTime(_));
            agent.state().asked.iter().filter(is_time).count()
        };
        let before = asked(&agent);
        until("it is given the time", || asked(&agent) > before);
        // Far longer than a silent guest would have.
        std::thread::sleep(Duration::from_secs(6));
        assert_eq!(pod.state(POD), Some(ProcessState::Running));
        std::fs::remove_file(agent.directory.join(lab::fake::DEAF)).unwrap();
        agent.state().instead = None;
        kill_process(machine, Signal::CONT).unwrap();
        agent.say(&event_frame(1, event::Kind::Oom(wire::OomKill { container_id: "c1".into() })));
        assert_eq!(pod.state("c1"), Some(ProcessState::Running));
    });
}

#[test]
fn want_of_memory_is_told() {
    run(|lab| {
        let (mut pod, agent) = lab.with_agent("run");
        let mut events = pod.subscribe();
        created(&mut pod, &agent, "c1");
        agent.tell(event::Kind::Oom(wire::OomKill { container_id: "c1".into() }));
        assert!(matches!(events.event(), news::Kind::Oom(oom) if oom.container_id == "c1"));
        drop(agent.take_streams());
        let mut killed = exit("c1", 137);
        killed.exit.as_mut().unwrap().oom_killed = true;
        agent.tell(event::Kind::Exited(killed));
        let (_, exit) = events.exited();
        assert_eq!((exit.code, exit.oom_killed), (137, true));
        // The end is stamped here: the guest said 0.
        assert!(exit.finished_at > 0);
    });
}
