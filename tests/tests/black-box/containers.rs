//! Containers: their life, exit codes, logs, exec, users, mounts, limits.

use std::fs;
use std::path::Path;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use podvisor_critest::node::{Options, VM};
use podvisor_proto::cri::{
    Capability, ContainerFilter, ContainerState, ContainerStateValue, Int64Value, KeyValue,
    ListContainersRequest, Mount, MountPropagation, ReopenContainerLogRequest, SecurityProfile, Signal,
    UpdateContainerResourcesRequest, security_profile::ProfileType,
};
use podvisor_tests::cri::spec;
use podvisor_tests::fixture::numbered;
use podvisor_tests::images::{BUSYBOX, CONFIGURED};
use podvisor_tests::stream::Session;
use podvisor_tests::{Fixture, ask, eventually};
use tonic::Code;

use super::Tests;

pub(crate) fn add(tests: &mut Tests) {
    tests.add("containers::run_log_stop_and_go", run_log_stop_and_go);
    tests.add("containers::keep_their_attributes", keep_their_attributes);
    tests.add("containers::report_how_they_ended", report_how_they_ended);
    tests.add("containers::are_filtered", are_filtered);
    tests.add("containers::of_the_same_name_are_one", of_the_same_name_are_one);
    tests.add("containers::that_cannot_start_say_why", that_cannot_start_say_why);
    tests.add("containers::combine_image_and_request", combine_image_and_request);
    tests.add("containers::get_their_stop_signal_and_their_time", stop_signal_and_time);
    tests.add("containers::log_streams_lines_and_parts", log_streams_lines_and_parts);
    let short = Options { more: "[limits]\nlog_line = 256\n".to_owned(), ..Options::default() };
    tests.add_with("containers::log_lines_as_long_as_configured", short, log_lines_as_long_as_configured);
    tests.add("containers::reopen_their_log", reopen_their_log);
    tests.add("containers::log_to_the_last_line", log_to_the_last_line);
    tests.add("containers::exec_with_output_exit_code_and_time_limit", exec_sync);
    tests.add("containers::exec_takes_with_it_what_it_started", exec_takes_with_it_what_it_started);
    let machine = Options { handler: VM.to_owned(), ..Options::default() };
    tests.add_with("vm::exec_takes_with_it_what_it_started", machine, exec_takes_with_it_what_it_started);
    tests.add("containers::run_as_the_user_asked_for", run_as_the_user_asked_for);
    tests.add("containers::have_the_capabilities_asked_for", capabilities);
    tests.add("containers::are_confined", are_confined);
    tests.add("containers::mount_volumes", mount_volumes);
    tests.add("containers::keep_to_their_limits", keep_to_their_limits);
    tests.add("containers::are_reported_out_of_memory", out_of_memory);
    tests.add("containers::change_limits_while_they_run", change_limits);
    tests.add("containers::clamp_the_oom_score", clamp_the_oom_score);
}

async fn run_log_stop_and_go(f: &mut Fixture) -> Result<()> {
    f.cri.pull(BUSYBOX).await?;
    let pod = f.pod("life").await?;
    let id = pod
        .create(&ask::script(
            "c",
            "echo out; echo err >&2; trap 'exit 5' TERM; while :; do sleep 1000 & wait; done",
        ))
        .await?;
    let created = f.cri.status(&id).await?;
    ensure!(created.state() == ContainerState::ContainerCreated && created.created_at > 0, "{created:?}");
    ensure!(created.started_at == 0 && created.finished_at == 0, "{created:?}");
    f.cri.start(&id).await?;
    let running = f.cri.status(&id).await?;
    ensure!(running.state() == ContainerState::ContainerRunning, "{running:?}");
    ensure!(running.started_at >= running.created_at && running.finished_at == 0, "{running:?}");
    let log = eventually("both lines are in the log", || async {
        let log = pod.log("c.log")?;
        ensure!(log.stdout() == "out\n" && log.stderr() == "err\n", "{log:?}");
        Ok(log)
    })
    .await?;
    ensure!(log.parts() == 0, "{log:?}");
    ensure!(running.log_path == Path::new(&pod.config.log_directory).join("c.log").display().to_string());
    let again = f.cri.start(&id).await.err().context("a running container was started again")?;
    ensure!(again.code() == Code::FailedPrecondition, "{again:?}");
    for _ in 0..2 {
        f.cri.stop(&id, 10).await?;
    }
    let stopped = f.cri.status(&id).await?;
    ensure!(stopped.state() == ContainerState::ContainerExited && stopped.exit_code == 5, "{stopped:?}");
    ensure!(stopped.finished_at >= stopped.started_at && stopped.reason == "Error", "{stopped:?}");
    for _ in 0..2 {
        f.cri.remove(&id).await?;
    }
    let gone = f.cri.status(&id).await.err().context("a removed container has a status")?;
    ensure!(gone.code() == Code::NotFound, "{gone:?}");
    Ok(())
}

async fn keep_their_attributes(f: &mut Fixture) -> Result<()> {
    f.cri.pull(BUSYBOX).await?;
    let pod = f.pod("attributes").await?;
    let mut config = ask::waiting("c");
    config.metadata.as_mut().context("no metadata")?.attempt = 3;
    let id = pod.start(&config).await?;
    ensure!(id.len() == 64 && id != pod.id, "{id}");
    let status = f.cri.status(&id).await?;
    ensure!(status.metadata == config.metadata, "{status:?}");
    ensure!(status.labels == config.labels && status.annotations == config.annotations, "{status:?}");
    let listed = f.cri.containers().await?;
    ensure!(listed.len() == 1 && listed[0].id == id && listed[0].pod_sandbox_id == pod.id, "{listed:?}");
    ensure!(listed[0].metadata == config.metadata && listed[0].labels == config.labels, "{listed:?}");
    ensure!(listed[0].created_at == status.created_at, "{listed:?}");
    Ok(())
}

async fn report_how_they_ended(f: &mut Fixture) -> Result<()> {
    f.cri.pull(BUSYBOX).await?;
    let pod = f.pod("exits").await?;
    for (name, text, code, reason) in [
        ("ok", "exit 0", 0, "Completed"),
        ("one", "exit 1", 1, "Error"),
        ("big", "exit 255", 255, "Error"),
        // A process that a signal ends; PID 1 of a namespace cannot do that to itself.
        ("killed", "sh -c 'kill -KILL $$'; exit $?", 137, "Error"),
    ] {
        let id = pod.start(&ask::script(name, text)).await?;
        let status = f.cri.wait_exited(&id).await?;
        ensure!(status.exit_code == code && status.reason == reason, "{name}: {status:?}");
        ensure!(status.finished_at >= status.started_at && status.started_at > 0, "{name}: {status:?}");
    }
    // One that never ran.
    let id = pod.create(&ask::waiting("never")).await?;
    f.cri.stop(&id, 1).await?;
    f.cri.remove(&id).await?;
    Ok(())
}

async fn are_filtered(f: &mut Fixture) -> Result<()> {
    f.cri.pull(BUSYBOX).await?;
    let (first, second) = (f.pod("a").await?, f.pod("b").await?);
    let a = first.start(&ask::waiting("a")).await?;
    let b = second.create(&ask::waiting("b")).await?;
    let state = |state: ContainerState| Some(ContainerStateValue { state: state.into() });
    let cases = [
        (ContainerFilter::default(), vec![&a, &b]),
        (ContainerFilter { id: b.clone(), ..Default::default() }, vec![&b]),
        (ContainerFilter { id: b[..10].to_owned(), ..Default::default() }, vec![&b]),
        (ContainerFilter { pod_sandbox_id: first.id.clone(), ..Default::default() }, vec![&a]),
        (ContainerFilter { state: state(ContainerState::ContainerCreated), ..Default::default() }, vec![&b]),
        (ContainerFilter { state: state(ContainerState::ContainerRunning), ..Default::default() }, vec![&a]),
        (
            ContainerFilter {
                label_selector: [("container".to_owned(), "a".to_owned())].into(),
                ..Default::default()
            },
            vec![&a],
        ),
        (ContainerFilter { id: a.clone(), pod_sandbox_id: second.id.clone(), ..Default::default() }, vec![]),
    ];
    for (filter, mut expected) in cases {
        let request = ListContainersRequest { filter: Some(filter.clone()) };
        let found = f.cri.runtime.list_containers(request).await?.into_inner().containers;
        let mut found: Vec<&String> = found.iter().map(|container| &container.id).collect();
        found.sort();
        expected.sort();
        ensure!(found == expected, "{filter:?}: {found:?}");
    }
    Ok(())
}

async fn of_the_same_name_are_one(f: &mut Fixture) -> Result<()> {
    f.cri.pull(BUSYBOX).await?;
    let pod = f.pod("same").await?;
    let config = ask::waiting("c");
    let (first, second) = tokio::join!(
        f.cri.create(&pod.id, &config, &pod.config),
        f.cri.create(&pod.id, &config, &pod.config)
    );
    let ids: Vec<String> = [first, second].into_iter().flatten().collect();
    ensure!(!ids.is_empty() && ids.iter().all(|id| *id == ids[0]), "{ids:?}");
    ensure!(f.cri.containers().await?.len() == 1, "two containers of one name");
    Ok(())
}

async fn that_cannot_start_say_why(f: &mut Fixture) -> Result<()> {
    f.cri.pull(BUSYBOX).await?;
    let pod = f.pod("cannot").await?;
    let config = ask::container("c", &["/no/such/program"]);
    // Some runtimes find out when they create, some when they start.
    let message = match f.cri.create(&pod.id, &config, &pod.config).await {
        Err(error) => error.message().to_owned(),
        Ok(id) => {
            let error = f.cri.start(&id).await.err().context("a missing program was started")?;
            let status = f.cri.status(&id).await?;
            ensure!(status.state() == ContainerState::ContainerExited, "{status:?}");
            ensure!(status.exit_code != 0 && !status.reason.is_empty(), "{status:?}");
            error.message().to_owned()
        }
    };
    ensure!(message.contains("/no/such/program"), "{message}");
    // The pod is as it was.
    let (output, code) = pod.script("next", "echo fine").await?;
    ensure!(code == 0 && output == "fine\n", "{output}");
    Ok(())
}

/// Kubernetes' rules: `command` replaces the entrypoint and drops the image's arguments; `args` replace those.
async fn combine_image_and_request(f: &mut Fixture) -> Result<()> {
    f.cri.pull(CONFIGURED).await?;
    let pod = f.pod("combine").await?;
    let words = |words: &[&str]| words.iter().map(ToString::to_string).collect::<Vec<_>>();
    for (name, command, args, expected) in [
        ("neither", vec![], vec![], "from-entrypoint from-command\n"),
        ("args", vec![], words(&["asked"]), "from-entrypoint asked\n"),
        ("command", words(&["echo", "instead"]), vec![], "instead\n"),
        ("both", words(&["echo", "instead"]), words(&["asked"]), "instead asked\n"),
    ] {
        let mut config = ask::container(name, &[]);
        (config.command, config.args, config.image) = (command, args, Some(spec(CONFIGURED)));
        let id = pod.start(&config).await?;
        f.cri.wait_exited(&id).await?;
        let output = pod.log(&format!("{name}.log"))?.stdout();
        ensure!(output == expected, "{name}: {output}");
    }
    let mut config = ask::script("rest", "id -u; id -g; pwd; echo $IMAGE $BOTH $ASKED");
    config.image = Some(spec(CONFIGURED));
    let variable = |key: &str, value: &str| KeyValue { key: key.to_owned(), value: value.into() };
    config.envs = vec![variable("BOTH", "asked"), variable("ASKED", "1")];
    let id = pod.start(&config).await?;
    f.cri.wait_exited(&id).await?;
    let output = pod.log("rest.log")?.stdout();
    ensure!(output == "1000\n2000\n/home\nyes asked 1\n", "{output}");
    let mut config = ask::script("directory", "pwd");
    (config.image, config.working_dir) = (Some(spec(CONFIGURED)), "/tmp/made/for/it".to_owned());
    let id = pod.start(&config).await?;
    f.cri.wait_exited(&id).await?;
    ensure!(pod.log("directory.log")?.stdout() == "/tmp/made/for/it\n");
    Ok(())
}

async fn stop_signal_and_time(f: &mut Fixture) -> Result<()> {
    f.cri.pull(BUSYBOX).await?;
    f.cri.pull(CONFIGURED).await?;
    let pod = f.pod("signals").await?;
    let traps = "trap 'exit 11' TERM; trap 'exit 12' USR1; trap 'exit 13' QUIT; trap 'exit 14' 37; trap 'exit 15' 62; echo set; while :; do sleep 1000 & wait; done";
    let set = async |name: &str| {
        eventually("its traps are set", || async {
            ensure!(pod.log(&format!("{name}.log"))?.stdout() == "set\n");
            Ok(())
        })
        .await
    };
    for (name, image, signal, code, reported) in [
        ("default", BUSYBOX, None, 11, Signal::Sigterm),
        ("image", CONFIGURED, None, 12, Signal::Sigusr1),
        ("request", CONFIGURED, Some(Signal::Sigquit), 13, Signal::Sigquit),
        // The C library keeps the first two for itself, so SIGRTMIN is 34 (signal(7)).
        ("rtmin", BUSYBOX, Some(Signal::Sigrtminplus3), 14, Signal::Sigrtminplus3),
        ("rtmax", BUSYBOX, Some(Signal::Sigrtmaxminus2), 15, Signal::Sigrtmaxminus2),
    ] {
        let mut config = ask::script(name, traps);
        config.image = Some(spec(image));
        config.stop_signal = signal.map_or(0, Into::into);
        let id = pod.start(&config).await?;
        set(name).await?;
        let status = f.cri.status(&id).await?;
        ensure!(status.stop_signal() == reported, "{name}: {status:?}");
        f.cri.stop(&id, 20).await?;
        let status = f.cri.status(&id).await?;
        ensure!(status.exit_code == code && status.stop_signal() == reported, "{name}: {status:?}");
    }
    let mut config = ask::waiting("unknown");
    config.stop_signal = 4711;
    let refused = pod.create(&config).await.err().context("signal 4711 was accepted")?;
    ensure!(format!("{refused:#}").contains("config.stop_signal"), "{refused:#}");
    // One that does not listen is killed when its time is up, and at once when it has none.
    for (name, seconds) in [("deaf", 1), ("at-once", 0)] {
        let id = pod
            .start(&ask::script(name, "trap '' TERM; echo set; while :; do sleep 1000 & wait; done"))
            .await?;
        set(name).await?;
        let began = Instant::now();
        f.cri.stop(&id, seconds).await?;
        ensure!(began.elapsed() >= Duration::from_secs(seconds.unsigned_abs()), "{name}: too early");
        ensure!(f.cri.status(&id).await?.exit_code == 137, "{name}");
    }
    Ok(())
}

async fn log_streams_lines_and_parts(f: &mut Fixture) -> Result<()> {
    f.cri.pull(BUSYBOX).await?;
    let pod = f.pod("log").await?;
    let text = "head -c 50000 /dev/zero | tr '\\0' x; echo; printf 'no end'";
    let (output, _) = pod.script("long", text).await?;
    let log = pod.log("long.log")?;
    ensure!(
        output == format!("{}\nno end", "x".repeat(50_000))
            || output == format!("{}\nno end\n", "x".repeat(50_000)),
        "{} bytes",
        output.len()
    );
    // Longest line before it is written in parts: 16384 bytes.
    ensure!(log.parts() >= 3, "{} parts", log.parts());
    let text = "for i in $(seq 2000); do echo out$i; echo err$i >&2; done";
    pod.script("many", text).await?;
    let log = pod.log("many.log")?;
    for (stream, name) in [(log.stdout(), "out"), (log.stderr(), "err")] {
        let expected = numbered(name, 1..2001);
        ensure!(stream == expected, "{name}: {} bytes instead of {}", stream.len(), expected.len());
    }
    Ok(())
}

async fn log_lines_as_long_as_configured(f: &mut Fixture) -> Result<()> {
    f.cri.pull(BUSYBOX).await?;
    let pod = f.pod("log-line").await?;
    let (output, _) = pod.script("c", "head -c 1000 /dev/zero | tr '\\0' x; echo; echo short").await?;
    ensure!(output == format!("{}\nshort\n", "x".repeat(1000)), "{output}");
    // 256 bytes each but the last.
    ensure!(pod.log("c.log")?.parts() == 3, "{:?}", pod.log("c.log")?);
    Ok(())
}

async fn reopen_their_log(f: &mut Fixture) -> Result<()> {
    let counting =
        ask::script("c", "trap 'exit 0' TERM; i=0; while :; do echo $i; i=$((i+1)); sleep 0.01; done");
    let (pod, id) = f.running("rotate", &counting).await?;
    let directory = Path::new(&pod.config.log_directory);
    for number in 0..5 {
        eventually("something is logged", || async {
            ensure!(!pod.log("c.log")?.stdout().is_empty());
            Ok(())
        })
        .await?;
        // As kubelet rotates: rename, then ask for a new file.
        fs::rename(directory.join("c.log"), directory.join(format!("c.log.{number}")))?;
        f.cri.runtime.reopen_container_log(ReopenContainerLogRequest { container_id: id.clone() }).await?;
        ensure!(directory.join("c.log").exists(), "no new file when the call returns");
    }
    f.cri.stop(&id, 10).await?;
    let mut all = String::new();
    for number in 0..5 {
        all.push_str(&pod.log(&format!("c.log.{number}"))?.stdout());
    }
    all.push_str(&pod.log("c.log")?.stdout());
    let expected = numbered("", 0..all.lines().count());
    ensure!(all == expected, "lines are lost or doubled");
    let error = f.cri.runtime.reopen_container_log(ReopenContainerLogRequest { container_id: id }).await;
    ensure!(error.is_err(), "the log of a container that has ended was reopened");
    Ok(())
}

/// What a container wrote just before its end is in the log when its status says that it has ended.
async fn log_to_the_last_line(f: &mut Fixture) -> Result<()> {
    f.cri.pull(BUSYBOX).await?;
    let pod = f.pod("last").await?;
    for number in 0..20 {
        let name = format!("c{number}");
        let (output, _) = pod.script(&name, "seq 3000").await?;
        let expected = numbered("", 1..3001);
        ensure!(output == expected, "run {number}: {} of {} bytes", output.len(), expected.len());
    }
    Ok(())
}

/// One that is cut short, by its time limit or by its client, leaves nothing behind: not what left its process group and session either.
async fn exec_takes_with_it_what_it_started(f: &mut Fixture) -> Result<()> {
    const STARTS: &str =
        "(sleep 5001 & sleep 5002) & setsid sh -c 'setsid sleep 5003 & sleep 5004' & sleep 5005";
    let (_, id) = f.running("exec", &ask::waiting("c")).await?;
    let running = async || -> Result<usize> {
        let found = f.cri.exec(&id, &["pgrep", "-f", "^sleep 500[1-5]$"], 60).await?;
        Ok(String::from_utf8_lossy(&found.stdout).lines().count())
    };
    let gone = async || {
        eventually("nothing of it is left", || async {
            let left = running().await?;
            ensure!(left == 0, "{left} of its processes");
            Ok(())
        })
        .await
    };
    let error = f.cri.exec(&id, &["sh", "-c", STARTS], 2).await.err().context("no time limit")?;
    ensure!(error.code() == Code::DeadlineExceeded, "{error:?}");
    gone().await?;

    let url = f.cri.exec_url(&id, &["sh", "-c", STARTS]).await?;
    let session = Session::open(&url).await?;
    eventually("all of it runs", || async {
        let there = running().await?;
        ensure!(there == 5, "{there} of its processes");
        Ok(())
    })
    .await?;
    drop(session);
    gone().await?;
    ensure!(f.cri.status(&id).await?.state() == ContainerState::ContainerRunning);
    Ok(())
}

async fn exec_sync(f: &mut Fixture) -> Result<()> {
    let (_, id) = f.running("exec", &ask::waiting("c")).await?;
    let answer = f.cri.exec(&id, &["sh", "-c", "echo out; echo err >&2; exit 3"], 10).await?;
    ensure!((answer.stdout, answer.stderr, answer.exit_code) == (b"out\n".into(), b"err\n".into(), 3));
    let big = f.cri.exec(&id, &["head", "-c", "1000000", "/dev/zero"], 10).await?;
    ensure!(big.stdout.len() == 1_000_000, "{} bytes", big.stdout.len());
    // Its input is empty, not a terminal that waits.
    ensure!(f.cri.output(&id, &["cat"]).await?.is_empty());
    let killed = f.cri.exec(&id, &["sh", "-c", "kill -KILL $$"], 10).await?;
    ensure!(killed.exit_code == 137, "{}", killed.exit_code);

    let began = Instant::now();
    let error = f.cri.exec(&id, &["sleep", "1000"], 1).await.err().context("no time limit")?;
    ensure!(error.code() == Code::DeadlineExceeded, "{error:?}");
    ensure!(began.elapsed() < Duration::from_secs(60), "the time limit came late");
    eventually("the command is gone", || async {
        let found = f.cri.exec(&id, &["pgrep", "-f", "sleep 1000$"], 10).await?;
        // The container's own `sleep 1000` stays: one.
        ensure!(String::from_utf8_lossy(&found.stdout).lines().count() == 1, "{found:?}");
        Ok(())
    })
    .await?;

    let missing = f.cri.exec(&id, &["/no/such/program"], 10).await;
    match missing {
        Err(error) => ensure!(error.message().contains("/no/such/program"), "{error:?}"),
        Ok(answer) => ensure!(answer.exit_code != 0, "{answer:?}"),
    }
    // A background child that holds the output open must not hold the answer for ever.
    let answer = f.cri.exec(&id, &["sh", "-c", "sleep 5 & echo done"], 60).await?;
    ensure!(answer.stdout == b"done\n" && answer.exit_code == 0, "{answer:?}");
    f.cri.stop(&id, 0).await?;
    let error = f.cri.exec(&id, &["true"], 10).await.err().context("exec in a container that has ended")?;
    ensure!(error.code() == Code::FailedPrecondition, "{error:?}");
    Ok(())
}

async fn run_as_the_user_asked_for(f: &mut Fixture) -> Result<()> {
    f.cri.pull(BUSYBOX).await?;
    let pod = f.pod("users").await?;
    let number = |value| Some(Int64Value { value });
    let mut config = ask::script("numbers", "id -u; id -g; id -G");
    let context = ask::context(&mut config);
    (context.run_as_user, context.run_as_group) = (number(1234), number(4321));
    context.supplemental_groups = vec![77, 88];
    let id = pod.start(&config).await?;
    f.cri.wait_exited(&id).await?;
    let output = pod.log("numbers.log")?.stdout();
    ensure!(output == "1234\n4321\n4321 77 88\n", "{output}");
    let mut config = ask::script("name", "id -un; id -gn");
    ask::context(&mut config).run_as_username = "www-data".to_owned();
    let id = pod.start(&config).await?;
    f.cri.wait_exited(&id).await?;
    let output = pod.log("name.log")?.stdout();
    ensure!(output == "www-data\nwww-data\n", "{output}");
    let user = f.cri.status(&id).await?.user.and_then(|user| user.linux).context("no user in the status")?;
    ensure!(user.uid == 33 && user.gid == 33, "{user:?}");
    let mut config = ask::waiting("nobody-here");
    ask::context(&mut config).run_as_username = "nobody-here".to_owned();
    let error =
        f.cri.create(&pod.id, &config, &pod.config).await.err().context("a user that does not exist")?;
    ensure!(error.message().contains("nobody-here"), "{error:?}");
    Ok(())
}

async fn capabilities(f: &mut Fixture) -> Result<()> {
    f.cri.pull(BUSYBOX).await?;
    let pod = f.pod("capabilities").await?;
    let script = "grep -E 'CapEff|CapBnd' /proc/self/status | cut -f2";
    let names = |names: &[&str]| names.iter().map(ToString::to_string).collect::<Vec<_>>();
    let mut seen = Vec::new();
    for (name, add, drop) in [
        ("default", names(&[]), names(&[])),
        ("added", names(&["NET_ADMIN", "CAP_SYS_TIME"]), names(&[])),
        ("dropped", names(&[]), names(&["CHOWN"])),
        ("none", names(&[]), names(&["ALL"])),
        ("only", names(&["NET_RAW"]), names(&["ALL"])),
        ("all", names(&["ALL"]), names(&[])),
    ] {
        let mut config = ask::script(name, script);
        ask::context(&mut config).capabilities =
            Some(Capability { add_capabilities: add, drop_capabilities: drop, ..Capability::default() });
        let id = pod.start(&config).await?;
        f.cri.wait_exited(&id).await?;
        let output = pod.log(&format!("{name}.log"))?.stdout();
        let sets: Vec<u64> = output.lines().filter_map(|line| u64::from_str_radix(line, 16).ok()).collect();
        ensure!(sets.len() == 2 && sets[0] == sets[1], "{name}: {output}");
        seen.push(sets[0]);
    }
    // capability.h: CHOWN 0, NET_ADMIN 12, NET_RAW 13, SYS_TIME 25.
    let [default, added, dropped, none, only, all] = seen[..] else { unreachable!("six cases") };
    ensure!(added == default | 1 << 12 | 1 << 25, "{seen:x?}");
    ensure!(dropped == default & !1 && default & 1 == 1, "{seen:x?}");
    ensure!(none == 0 && only == 1 << 13, "{seen:x?}");
    let own = fs::read_to_string("/proc/self/status")?;
    let bounding = own.lines().find_map(|line| line.strip_prefix("CapBnd:\t")).context("no CapBnd")?;
    ensure!(all == u64::from_str_radix(bounding, 16)?, "all that there are: {seen:x?}, {bounding}");
    Ok(())
}

async fn are_confined(f: &mut Fixture) -> Result<()> {
    f.cri.pull(BUSYBOX).await?;
    let pod = f.pod("confined").await?;
    let mut config = ask::script(
        "c",
        "grep -E 'NoNewPrivs|^Seccomp:' /proc/self/status | cut -f2; cat /masked/secret; touch /x; echo x >/proc/sys/kernel/hostname; ls /proc/acpi",
    );
    let context = ask::context(&mut config);
    context.no_new_privs = true;
    context.readonly_rootfs = true;
    context.masked_paths = vec!["/etc/passwd".to_owned(), "/proc/acpi".to_owned()];
    context.readonly_paths = vec!["/proc/sys".to_owned()];
    context.seccomp = Some(SecurityProfile {
        profile_type: ProfileType::RuntimeDefault.into(),
        ..SecurityProfile::default()
    });
    let id = pod.start(&config).await?;
    f.cri.wait_exited(&id).await?;
    let log = pod.log("c.log")?;
    ensure!(log.stdout() == "1\n2\n", "{log:?}");
    let read_only = log.stderr().lines().filter(|line| line.contains("Read-only file system")).count();
    ensure!(read_only == 2, "{log:?}");
    Ok(())
}

async fn mount_volumes(f: &mut Fixture) -> Result<()> {
    f.cri.pull(BUSYBOX).await?;
    let pod = f.pod("volumes").await?;
    let host = f.node.path("volume");
    fs::create_dir_all(host.join("sub"))?;
    fs::write(host.join("file"), "from the host\n")?;
    std::os::unix::fs::symlink(&host, f.node.path("link"))?;
    let mount = |container: &str, from: &Path| Mount {
        container_path: container.to_owned(),
        host_path: from.display().to_string(),
        ..Mount::default()
    };
    let mut config = ask::script(
        "c",
        "cat /data/file /link/file; echo back >/data/new; touch /fixed/x; cat /one; ls -d /made",
    );
    config.mounts = vec![
        mount("/data", &host),
        Mount { readonly: true, ..mount("/fixed", &host) },
        mount("/link", &f.node.path("link")),
        Mount { readonly: true, ..mount("/one", &host.join("file")) },
        // A directory that is missing on the host is made, as docker did and kubelet relies on.
        mount("/made", &f.node.path("made")),
        Mount { propagation: MountPropagation::PropagationHostToContainer.into(), ..mount("/slave", &host) },
    ];
    let id = pod.start(&config).await?;
    let status = f.cri.wait_exited(&id).await?;
    let log = pod.log("c.log")?;
    ensure!(log.stdout() == "from the host\nfrom the host\nfrom the host\n/made\n", "{log:?}");
    ensure!(log.stderr().contains("Read-only file system"), "{log:?}");
    ensure!(fs::read_to_string(host.join("new"))? == "back\n");
    ensure!(f.node.path("made").is_dir());
    for wanted in &config.mounts {
        let found = status.mounts.iter().find(|mount| mount.container_path == wanted.container_path);
        let found = found.with_context(|| format!("{} is not in the status", wanted.container_path))?;
        ensure!(found.readonly == wanted.readonly && found.propagation == wanted.propagation, "{found:?}");
    }
    Ok(())
}

async fn keep_to_their_limits(f: &mut Fixture) -> Result<()> {
    let mut config = ask::waiting("c");
    let resources = ask::resources(&mut config);
    (resources.cpu_period, resources.cpu_quota, resources.cpu_shares) = (100_000, 50_000, 512);
    resources.memory_limit_in_bytes = 64 << 20;
    resources.oom_score_adj = 500;
    let (_, id) = f.running("limits", &config).await?;
    let text = "cat /proc/self/oom_score_adj; cd /sys/fs/cgroup; cat cpu.max 2>/dev/null || echo $(cat cpu/cpu.cfs_quota_us cpu/cpu.cfs_period_us); cat memory.max 2>/dev/null || cat memory/memory.limit_in_bytes";
    let output = f.cri.output(&id, &["sh", "-c", text]).await?;
    ensure!(output == format!("500\n50000 100000\n{}\n", 64 << 20), "{output}");
    let status =
        f.cri.status(&id).await?.resources.and_then(|resources| resources.linux).context("no resources")?;
    ensure!(status.memory_limit_in_bytes == 64 << 20 && status.cpu_quota == 50_000, "{status:?}");
    ensure!(status.cpu_shares == 512 && status.cpu_period == 100_000, "{status:?}");
    Ok(())
}

async fn out_of_memory(f: &mut Fixture) -> Result<()> {
    f.cri.pull(BUSYBOX).await?;
    let pod = f.pod("oom").await?;
    let mut config = ask::script("c", "dd if=/dev/zero of=/dev/null bs=200M count=10");
    ask::resources(&mut config).memory_limit_in_bytes = 20 << 20;
    let id = pod.start(&config).await?;
    let status = f.cri.wait_exited(&id).await?;
    ensure!(status.reason == "OOMKilled" && status.exit_code == 137, "{status:?}");
    Ok(())
}

async fn change_limits(f: &mut Fixture) -> Result<()> {
    let mut config = ask::waiting("c");
    ask::resources(&mut config).memory_limit_in_bytes = 64 << 20;
    let (_, id) = f.running("change", &config).await?;
    let mut wanted = ask::resources(&mut config).clone();
    wanted.memory_limit_in_bytes = 128 << 20;
    (wanted.cpu_period, wanted.cpu_quota) = (100_000, 70_000);
    let request = UpdateContainerResourcesRequest {
        container_id: id.clone(),
        linux: Some(wanted),
        ..UpdateContainerResourcesRequest::default()
    };
    f.cri.runtime.update_container_resources(request).await?;
    let text = "cd /sys/fs/cgroup; cat cpu.max 2>/dev/null || echo $(cat cpu/cpu.cfs_quota_us cpu/cpu.cfs_period_us); cat memory.max 2>/dev/null || cat memory/memory.limit_in_bytes";
    let output = f.cri.output(&id, &["sh", "-c", text]).await?;
    ensure!(output == format!("70000 100000\n{}\n", 128 << 20), "{output}");
    let status =
        f.cri.status(&id).await?.resources.and_then(|resources| resources.linux).context("no resources")?;
    ensure!(status.memory_limit_in_bytes == 128 << 20 && status.cpu_quota == 70_000, "{status:?}");
    Ok(())
}

/// kubelet asks -997 for critical pods; a node that lacks CAP_SYS_RESOURCE cannot go below its own score.
async fn clamp_the_oom_score(f: &mut Fixture) -> Result<()> {
    let mut config = ask::waiting("c");
    ask::resources(&mut config).oom_score_adj = -997;
    let (_, id) = f.running("critical", &config).await?;
    let score: i32 = f.cri.output(&id, &["cat", "/proc/1/oom_score_adj"]).await?.trim().parse()?;
    ensure!((-997..=0).contains(&score), "{score}");
    Ok(())
}
