//! The daemon ends, well or badly, and starts again: no pod notices, and nobody who asks sees a pod missing.

use std::time::Duration;

use anyhow::{Context, Result, ensure};
use podvisor_proto::cri::{ContainerState, PodSandboxState};
use podvisor_tests::fixture::numbered;
use podvisor_tests::images::BUSYBOX;
use podvisor_tests::{Fixture, ask, eventually};

use super::Tests;

pub(crate) fn add(tests: &mut Tests) {
    tests.add("recovery::finds_everything_after_a_kill", finds_everything_after_a_kill);
    tests.add("recovery::loses_no_log_line", loses_no_log_line);
    tests.add("recovery::knows_what_ended_meanwhile", knows_what_ended_meanwhile);
    tests.add("recovery::finishes_what_was_stopped", finishes_what_was_stopped);
    tests.add("recovery::drains_after_sigterm", drains_after_sigterm);
    tests.add("recovery::refuses_a_second_daemon", refuses_a_second_daemon);
    tests.add("recovery::cleans_up_after_a_reboot", cleans_up_after_a_reboot);
    tests.add("recovery::keeps_a_shared_pid_namespace", keeps_a_shared_pid_namespace);
}

async fn finds_everything_after_a_kill(f: &mut Fixture) -> Result<()> {
    f.cri.pull(BUSYBOX).await?;
    let pod = f.pod("running").await?;
    let running = pod.start(&ask::waiting("running")).await?;
    let created = pod.create(&ask::script("created", "echo started later")).await?;
    let exited = pod.start(&ask::script("exited", "exit 9")).await?;
    f.cri.wait_exited(&exited).await?;
    let stopped = f.pod("stopped").await?;
    f.cri.stop_pod(&stopped.id).await?;
    let all = async |f: &Fixture| -> Result<_> {
        let mut pods = Vec::new();
        for pod in [&pod, &stopped] {
            pods.push(f.cri.pod_status(&pod.id).await?);
        }
        let mut containers = Vec::new();
        for container in [&running, &created, &exited] {
            containers.push(f.cri.status(container).await?);
        }
        let mut listed = (f.cri.pods().await?, f.cri.containers().await?);
        listed.0.sort_by(|a, b| a.id.cmp(&b.id));
        listed.1.sort_by(|a, b| a.id.cmp(&b.id));
        Ok((pods, containers, listed))
    };
    let before = all(f).await?;
    for _ in 0..3 {
        f.kill()?;
        f.start()?;
        let after = all(f).await?;
        ensure!(after == before, "{}", difference(&before, &after));
    }
    // And everything still works.
    ensure!(f.cri.output(&running, &["echo", "here"]).await? == "here\n");
    f.cri.start(&created).await?;
    f.cri.wait_exited(&created).await?;
    ensure!(pod.log("created.log")?.stdout() == "started later\n");
    f.cri.stop(&running, 10).await?;
    ensure!(f.cri.status(&running).await?.exit_code == 0);
    let next = pod.start(&ask::waiting("next")).await?;
    ensure!(f.cri.status(&next).await?.state() == ContainerState::ContainerRunning);
    Ok(())
}

/// The lines in which two values differ.
fn difference(before: &impl std::fmt::Debug, after: &impl std::fmt::Debug) -> String {
    let (before, after) = (format!("{before:#?}"), format!("{after:#?}"));
    let pairs = before.lines().zip(after.lines()).filter(|(before, after)| before != after);
    pairs
        .map(|(before, after)| format!("{} is now {}\n", before.trim(), after.trim()))
        .collect::<Vec<_>>()
        .concat()
}

async fn loses_no_log_line(f: &mut Fixture) -> Result<()> {
    let counting =
        ask::script("c", "trap 'exit 0' TERM; i=0; while :; do echo $i; i=$((i+1)); sleep 0.002; done");
    let (pod, id) = f.running("counting", &counting).await?;
    for _ in 0..5 {
        let before = pod.log("c.log")?.stdout().lines().count();
        f.kill()?;
        eventually("the log grows without the daemon", || async {
            ensure!(pod.log("c.log")?.stdout().lines().count() > before + 20);
            Ok(())
        })
        .await?;
        f.start()?;
    }
    f.cri.stop(&id, 10).await?;
    let all = pod.log("c.log")?.stdout();
    let expected = numbered("", 0..all.lines().count());
    ensure!(all == expected, "lines are lost or doubled");
    Ok(())
}

async fn knows_what_ended_meanwhile(f: &mut Fixture) -> Result<()> {
    let flag = f.node.path("flag");
    std::fs::create_dir(&flag)?;
    let mut config =
        ask::script("c", "until [ -e /flag/now ]; do sleep 0.01; done; echo last words; exit 42");
    config.mounts = vec![podvisor_proto::cri::Mount {
        container_path: "/flag".to_owned(),
        host_path: flag.display().to_string(),
        ..Default::default()
    }];
    let (pod, id) = f.running("meanwhile", &config).await?;
    f.kill()?;
    std::fs::write(flag.join("now"), "")?;
    eventually("the container ends", || async {
        ensure!(pod.log("c.log")?.stdout() == "last words\n");
        Ok(())
    })
    .await?;
    f.start()?;
    let status = f.cri.wait_exited(&id).await?;
    ensure!(status.exit_code == 42 && status.finished_at > status.started_at, "{status:?}");
    ensure!(f.cri.pod_status(&pod.id).await?.state() == PodSandboxState::SandboxReady);
    Ok(())
}

/// A daemon that dies while it stops a pod: kubelet asks again, and then the pod is gone whole.
async fn finishes_what_was_stopped(f: &mut Fixture) -> Result<()> {
    let slow = ask::script(
        "c",
        "trap 'echo told; sleep 2; exit 0' TERM; echo set; while :; do sleep 1000 & wait; done",
    );
    let (pod, id) = f.running("stopping", &slow).await?;
    eventually("the trap is set", || async {
        ensure!(pod.log("c.log")?.stdout() == "set\n");
        Ok(())
    })
    .await?;
    let stop = {
        let (cri, id) = (f.cri.clone(), id.clone());
        tokio::spawn(async move { cri.stop(&id, 30).await })
    };
    eventually("the container is told", || async {
        ensure!(pod.log("c.log")?.stdout() == "set\ntold\n");
        Ok(())
    })
    .await?;
    f.kill()?;
    ensure!(stop.await?.is_err(), "an answer from a daemon that was killed");
    f.start()?;
    f.cri.stop_pod(&pod.id).await?;
    let status = f.cri.status(&id).await?;
    ensure!(status.state() == ContainerState::ContainerExited, "{status:?}");
    Ok(())
}

/// kubelet runs probes and lifecycle hooks as ExecSync; cut off, a hook kills its container.
async fn drains_after_sigterm(f: &mut Fixture) -> Result<()> {
    let (pod, id) = f.running("drained", &ask::waiting("c")).await?;
    let exec = {
        let (cri, id) = (f.cri.clone(), id.clone());
        tokio::spawn(async move {
            cri.exec(&id, &["sh", "-c", "echo begun >/begun; sleep 1; echo whole"], 30).await
        })
    };
    eventually("the command has begun", || async { f.cri.output(&id, &["cat", "/begun"]).await }).await?;
    f.stop()?;
    let answer = exec.await?.context("ExecSync was cut off")?;
    ensure!(answer.stdout == b"whole\n" && answer.exit_code == 0, "{answer:?}");
    f.start()?;
    ensure!(f.cri.status(&id).await?.state() == ContainerState::ContainerRunning);
    ensure!(f.cri.pod_status(&pod.id).await?.state() == PodSandboxState::SandboxReady);
    Ok(())
}

async fn refuses_a_second_daemon(f: &mut Fixture) -> Result<()> {
    let (mut second, _notifications) = f.node.spawn()?;
    let status = second.wait(Duration::from_secs(20))?;
    ensure!(!status.success(), "two daemons on the same directories");
    let log = f.node.log_tail(5);
    let root = f.node.path("root").display().to_string();
    let run = f.node.path("run").display().to_string();
    ensure!(log.contains(&root) || log.contains(&run), "its last words do not name the directory:\n{log}");
    // The first one is as it was, socket included.
    f.cri.version().await?;
    f.pod("still").await?;
    Ok(())
}

async fn cleans_up_after_a_reboot(f: &mut Fixture) -> Result<()> {
    let (pod, id) = f.running("rebooted", &ask::waiting("c")).await?;
    let created = pod.create(&ask::waiting("created")).await?;
    f.reboot()?;
    let status = f.cri.pod_status(&pod.id).await?;
    ensure!(status.state() == PodSandboxState::SandboxNotready, "{status:?}");
    ensure!(status.network.is_none_or(|network| network.ip.is_empty()), "an address after a reboot");
    let status = f.cri.status(&id).await?;
    ensure!(status.state() == ContainerState::ContainerExited && !status.reason.is_empty(), "{status:?}");
    let status = f.cri.status(&created).await?;
    ensure!(
        matches!(status.state(), ContainerState::ContainerExited | ContainerState::ContainerCreated),
        "{status:?}"
    );
    // Images are still there, and the pod's name is free for its next attempt.
    let mut config = pod.config.clone();
    config.metadata.as_mut().context("no metadata")?.attempt = 1;
    let next = f.run(config).await?;
    next.start(&ask::waiting("c")).await?;
    f.cri.stop_pod(&pod.id).await?;
    f.cri.remove_pod(&pod.id).await?;
    Ok(())
}

async fn keeps_a_shared_pid_namespace(f: &mut Fixture) -> Result<()> {
    f.cri.pull(BUSYBOX).await?;
    let mut config = f.ask_pod("shared");
    ask::pod_namespaces(&mut config).pid = podvisor_proto::cri::NamespaceMode::Pod.into();
    let pod = f.run(config).await?;
    let mut container = ask::waiting("c");
    ask::container_namespaces(&mut container).pid = podvisor_proto::cri::NamespaceMode::Pod.into();
    let first = pod.start(&container).await?;
    let namespace = f.cri.output(&first, &["readlink", "/proc/self/ns/pid"]).await?;
    // Without any container PID 1 alone keeps it.
    f.cri.stop(&first, 10).await?;
    f.cri.remove(&first).await?;
    f.kill()?;
    f.start()?;
    ensure!(f.cri.pod_status(&pod.id).await?.state() == PodSandboxState::SandboxReady);
    let second = pod.start(&container).await?;
    ensure!(f.cri.output(&second, &["readlink", "/proc/self/ns/pid"]).await? == namespace);
    Ok(())
}
