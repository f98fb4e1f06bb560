//! Monitors are killed at random moments: each pod that has lost its monitor is reported at once, with the reason and events, and can
//! be stopped and removed; all others and the daemon go on.

use std::fs;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use podvisor_proto::cri::{
    ContainerEventType, ContainerState, GetEventsRequest, NamespaceMode, PodSandboxState,
};
use podvisor_tests::cri::Cri;
use podvisor_tests::images::BUSYBOX;
use podvisor_tests::random::Random;
use podvisor_tests::{Fixture, Tests, ask, eventually};
use rustix::process::{Pid, Signal, kill_process};

use crate::{dying_monitor, scale};

pub(crate) fn add(tests: &mut Tests) {
    tests.add("monitors::that_are_killed_are_missed_at_once", killed);
    tests.add("monitors::that_are_killed_while_they_work", killed_at_work);
    tests.add("monitors::that_are_killed_before_they_have_a_pod", killed_idle);
    tests.add("monitors::that_die_of_being_adopted", dying);
    tests.add("monitors::that_all_die_of_being_adopted", all_dying);
}

/// Processes of podvisor-monitor's program that do not only wait for a pod, or do.
fn monitors() -> Vec<(i32, String)> {
    let mut found = Vec::new();
    for entry in fs::read_dir("/proc").into_iter().flatten().flatten() {
        let Some(pid) = entry.file_name().to_str().and_then(|name| name.parse::<i32>().ok()) else {
            continue;
        };
        let name = fs::read_to_string(entry.path().join("comm")).unwrap_or_default();
        let arguments = fs::read(entry.path().join("cmdline")).unwrap_or_default();
        if !name.starts_with("podvisor-monit")
            || !String::from_utf8_lossy(&arguments).contains("--control-fd")
        {
            continue;
        }
        let descriptors = fs::read_dir(entry.path().join("fd")).into_iter().flatten().flatten();
        let open: Vec<String> = descriptors
            .filter_map(|descriptor| Some(fs::read_link(descriptor.path()).ok()?.display().to_string()))
            .collect();
        found.push((pid, open.join(" ")));
    }
    found
}

/// SIGKILL for a pod's monitor, which has its log open below a directory of the pod's name.
pub(crate) fn kill_monitor(pod: &str) -> Result<()> {
    let all = monitors();
    let (pid, _) = all.iter().find(|(_, open)| open.contains(pod)).context("the pod has no monitor")?;
    kill_process(Pid::from_raw(*pid).context("no pid")?, Signal::KILL)?;
    Ok(())
}

async fn killed(f: &mut Fixture) -> Result<()> {
    let kills = scale(10, 150);
    let mut random = Random::seeded("monitors");
    f.cri.pull(BUSYBOX).await?;
    let steady = f.pod("steady").await?;
    let running = steady.start(&ask::waiting("c")).await?;
    let mut events = f.cri.runtime.get_container_events(GetEventsRequest {}).await?.into_inner();
    let mut times = Vec::new();
    for number in 0..kills {
        let mut config = f.ask_pod(&format!("killed{number}"));
        if random.one_in(3) {
            ask::pod_namespaces(&mut config).pid = NamespaceMode::Pod.into();
        }
        let pod = f.run(config).await?;
        let mut containers = Vec::new();
        for container in 0..random.below(3) {
            let made = pod.create(&ask::waiting(&format!("c{container}"))).await?;
            if !random.one_in(4) {
                f.cri.start(&made).await?;
            }
            containers.push(made);
        }
        kill_monitor(&pod.id)?;
        let began = Instant::now();
        let mut stopped = Vec::new();
        while !stopped.contains(&pod.id) {
            let event = tokio::time::timeout(eventually::PATIENCE, events.message()).await;
            let event = event.context("no event")??.context("no more events")?;
            if event.container_event_type() == ContainerEventType::ContainerStoppedEvent {
                stopped.push(event.container_id);
            }
        }
        times.push(began.elapsed());
        let status = f.cri.pod_status(&pod.id).await?;
        ensure!(status.state() == PodSandboxState::SandboxNotready, "{status:?}");
        for container in &containers {
            ensure!(stopped.contains(container), "no event tells the end of a container");
            let status = f.cri.status(container).await?;
            ensure!(
                status.state() == ContainerState::ContainerExited
                    && status.exit_code == 137
                    && status.message.contains("monitor"),
                "{status:?}"
            );
        }
        if random.one_in(2) {
            f.cri.stop_pod(&pod.id).await?;
        }
        f.cri.remove_pod(&pod.id).await?;
        podvisor_tests::world::remove_pod_cgroups();
    }
    times.sort();
    println!(
        "monitors: a dead one is told after {:?}, at most {:?}",
        times[times.len() / 2],
        times[times.len() - 1]
    );
    ensure!(times[times.len() / 2] < Duration::from_secs(2), "too late: {times:?}");
    ensure!(f.cri.status(&running).await?.state() == ContainerState::ContainerRunning);
    Ok(())
}

/// At any moment of what it is asked for: requests may fail, but have an end, and everything is given back.
async fn killed_at_work(f: &mut Fixture) -> Result<()> {
    let rounds = scale(8, 50);
    let mut random = Random::seeded("monitors at work");
    f.cri.pull(BUSYBOX).await?;
    for round in 0..rounds {
        let config = f.ask_pod(&format!("work{round}"));
        fs::create_dir_all(&config.log_directory)?;
        let over = Arc::new(AtomicBool::new(false));
        let id = f.cri.run_pod(&config).await?;
        let work = {
            let (cri, over, id) = (f.cri.clone(), Arc::clone(&over), id.clone());
            tokio::spawn(async move { work(&cri, &id, &config, &over).await })
        };
        tokio::time::sleep(Duration::from_millis(random.below(300))).await;
        kill_monitor(&id)?;
        over.store(true, Ordering::SeqCst);
        tokio::time::timeout(Duration::from_secs(60), work).await.context("a request has no end")??;
        eventually("the pod is not ready", || async {
            let state = f.cri.pod_status(&id).await?.state();
            ensure!(state == PodSandboxState::SandboxNotready, "{state:?}");
            Ok(())
        })
        .await?;
        for container in f.cri.containers().await? {
            ensure!(container.state() == ContainerState::ContainerExited, "{container:?}");
        }
        f.cri.stop_pod(&id).await?;
        f.cri.remove_pod(&id).await?;
        podvisor_tests::world::remove_pod_cgroups();
    }
    Ok(())
}

/// Containers that come and go until something fails.
async fn work(cri: &Cri, pod: &str, config: &podvisor_proto::cri::PodSandboxConfig, over: &AtomicBool) {
    for number in 0.. {
        if over.load(Ordering::SeqCst) {
            return;
        }
        let Ok(id) = cri.create(pod, &ask::waiting(&format!("c{number}")), config).await else { return };
        let _ = cri.start(&id).await;
        let _ = cri.exec(&id, &["true"], 10).await;
        let _ = cri.stop(&id, 5).await;
        let _ = cri.remove(&id).await;
    }
}

/// Those that wait for a pod are replaced.
async fn killed_idle(f: &mut Fixture) -> Result<()> {
    for round in 0..scale(3, 10) {
        eventually("monitors wait", || async {
            ensure!(monitors().len() > 1);
            Ok(())
        })
        .await?;
        for (pid, _) in monitors() {
            kill_process(Pid::from_raw(pid).context("no pid")?, Signal::KILL)?;
        }
        let pod = f.pod(&format!("next{round}")).await?;
        f.cri.stop_pod(&pod.id).await?;
        f.cri.remove_pod(&pod.id).await?;
    }
    Ok(())
}

/// The next one takes the place of one that has answered that it is there, and then dies of being given a pod.
async fn dying(f: &mut Fixture) -> Result<()> {
    f.cri.pull(BUSYBOX).await?;
    let place = dying_monitor::install(f, 3)?;
    let mut config = f.ask_pod("adopted");
    ask::pod_namespaces(&mut config).pid = NamespaceMode::Pod.into();
    let pod = f.run(config).await?;
    ensure!(fs::read_dir(&place)?.count() == 1, "not all that were to die were started");
    let state = f.cri.pod_status(&pod.id).await?.state();
    ensure!(state == PodSandboxState::SandboxReady, "{state:?}");
    let container = pod.start(&ask::waiting("c")).await?;
    ensure!(f.cri.exec(&container, &["true"], 10).await?.exit_code == 0);
    let mut sockets = Vec::new();
    for entry in fs::read_dir(f.node.path("run/pods").join(&pod.id))? {
        let name = entry?.file_name().into_string().unwrap_or_default();
        if name.contains("monitor.sock") {
            sockets.push(name);
        }
    }
    ensure!(sockets == ["monitor.sock"], "{sockets:?}");
    // Its end is still told.
    kill_monitor(&pod.id)?;
    eventually("the pod is not ready", || async {
        let state = f.cri.pod_status(&pod.id).await?.state();
        ensure!(state == PodSandboxState::SandboxNotready, "{state:?}");
        Ok(())
    })
    .await?;
    f.cri.stop_pod(&pod.id).await?;
    f.cri.remove_pod(&pod.id).await?;
    podvisor_tests::world::remove_pod_cgroups();
    Ok(())
}

/// Where every one dies, RunPodSandbox has an end, and the next one works when they live again.
async fn all_dying(f: &mut Fixture) -> Result<()> {
    let place = dying_monitor::install(f, 100)?;
    let error = f.cri.run_pod(&f.ask_pod("refused")).await.expect_err("no monitor lives");
    ensure!(error.code() == tonic::Code::Unavailable && error.message().contains("monitor"), "{error:?}");
    ensure!(f.cri.pods().await?.is_empty(), "something of the pod is left");
    for entry in fs::read_dir(&place)? {
        let path = entry?.path();
        if path.extension().is_some() {
            // One that is just being started may be quicker.
            let _ = fs::remove_file(path);
        }
    }
    // Those that wait already are still of the other kind: no more than what is tried.
    f.pod("accepted").await?;
    Ok(())
}
