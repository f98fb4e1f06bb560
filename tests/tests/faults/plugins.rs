//! A CNI plugin that hangs, fails, dies or prints garbage: an answer that names it within the time limit, nothing half connected
//! that nobody knows of, and once it behaves everything can be given back.

use std::time::Duration;

use anyhow::{Context, Result, ensure};
use podvisor_proto::cri::PodSandboxState;
use podvisor_tests::images::BUSYBOX;
use podvisor_tests::wrapper::{Fault, Wrapper, quoted};
use podvisor_tests::{Fixture, Tests, ask, eventually};
use tonic::Status;

/// Two calls of two seconds each, a release that tries again, and much patience with a busy machine.
const BOUND: Duration = Duration::from_secs(30);

const FAULTS: [Fault; 4] = [Fault::Fail, Fault::Hang, Fault::Die, Fault::Garbage];

pub(crate) fn add(tests: &mut Tests) {
    tests.add("plugins::that_do_not_connect", that_do_not_connect);
    tests.add("plugins::that_do_not_disconnect", that_do_not_disconnect);
    tests.add("plugins::that_do_neither_leave_a_pod_to_remove", that_do_neither);
    tests.add("plugins::that_hang_do_not_hold_up_the_start", that_hang_at_the_start);
    tests.add("plugins::that_find_a_pod_unconnected", that_find_a_pod_unconnected);
}

fn plugin(f: &mut Fixture) -> Result<Wrapper> {
    let place = f.node.path("plugins");
    let wrapper = Wrapper::plugin(&place, "told")?;
    let networks = f.node.path("cni/net.d");
    std::fs::create_dir_all(&networks)?;
    std::fs::write(
        networks.join("10-told.conflist"),
        r#"{"cniVersion": "1.0.0", "name": "told", "plugins": [{"type": "told"}]}"#,
    )?;
    f.configure(
        "cni",
        &format!("[network]\nmode = \"cni\"\ncni_timeout = 2\ncni_bin_dirs = [{}]\n", quoted(&place)),
    )?;
    Ok(wrapper)
}

async fn bounded<T>(what: &str, call: impl Future<Output = T>) -> Result<T> {
    tokio::time::timeout(BOUND, call).await.with_context(|| format!("{what} has no end"))
}

fn says(fault: Fault, command: &str, error: &Status) -> Result<()> {
    let word = match fault {
        Fault::Fail => "told to fail",
        Fault::Hang => "did not answer",
        Fault::Garbage => "unintelligibly",
        _ => "signal 9",
    };
    let text = error.message();
    ensure!(
        text.contains("told") && text.contains(command) && text.contains(word),
        "the answer to {fault:?} is {error:?}"
    );
    Ok(())
}

async fn that_do_not_connect(f: &mut Fixture) -> Result<()> {
    let wrapper = plugin(f)?;
    for fault in FAULTS {
        wrapper.plan("ADD", 1, fault)?;
        wrapper.plan("DEL", 9, fault)?;
        let config = f.ask_pod("unconnected");
        let running = {
            let (cri, config) = (f.cri.clone(), config.clone());
            tokio::spawn(async move { cri.run_pod(&config).await })
        };
        eventually("the plugin is called", || async {
            ensure!(wrapper.calls("ADD") == 1);
            Ok(())
        })
        .await?;
        ensure!(f.cri.pods().await?.is_empty(), "a pod without a network is listed");
        let error = bounded("RunPodSandbox", running).await??.err().context("a pod without a network")?;
        says(fault, "ADD", &error)?;
        ensure!(wrapper.calls("DEL") > 0, "after a failed ADD the plugin was not told to undo it");
        ensure!(f.cri.pods().await?.is_empty(), "a pod that could not be made is listed");
        // Asked again, by the same name, it works.
        let pod = f.run(config).await?;
        ensure!(f.cri.pod_status(&pod.id).await?.network.context("no network")?.ip == "10.123.0.5");
        f.cri.stop_pod(&pod.id).await?;
        f.cri.remove_pod(&pod.id).await?;
    }
    Ok(())
}

async fn that_do_not_disconnect(f: &mut Fixture) -> Result<()> {
    let wrapper = plugin(f)?;
    f.cri.pull(BUSYBOX).await?;
    // What a plugin answers to DEL is not read.
    for fault in [Fault::Fail, Fault::Hang, Fault::Die] {
        let pod = f.pod("connected").await?;
        let id = pod.start(&ask::waiting("c")).await?;
        wrapper.plan("DEL", 0, fault)?;
        let error = bounded("StopPodSandbox", f.cri.stop_pod(&pod.id)).await?;
        says(fault, "DEL", &error.err().context("stopped in spite of the plugin")?)?;
        let status = f.cri.pod_status(&pod.id).await?;
        ensure!(status.state() == PodSandboxState::SandboxNotready, "{status:?}");
        ensure!(f.cri.status(&id).await?.exit_code == 137);
        let error = bounded("RemovePodSandbox", f.cri.remove_pod(&pod.id)).await?;
        says(fault, "DEL", &error.err().context("removed in spite of the plugin")?)?;
        // Also a daemon that is started again knows what is still to be done.
        f.kill()?;
        f.start()?;
        ensure!(f.cri.pods().await?.len() == 1, "the pod is not listed any more");
        wrapper.behave()?;
        f.cri.stop_pod(&pod.id).await?;
        f.cri.remove_pod(&pod.id).await?;
        ensure!(f.cri.pods().await?.is_empty(), "still listed");
    }
    Ok(())
}

/// Neither connected nor disconnected: the pod is there, not ready, so that kubelet stops and removes it, and makes its next attempt.
async fn that_do_neither(f: &mut Fixture) -> Result<()> {
    let wrapper = plugin(f)?;
    for fault in [Fault::Fail, Fault::Hang] {
        wrapper.plan("ADD", 0, fault)?;
        wrapper.plan("DEL", 0, fault)?;
        let mut config = f.ask_pod("stuck");
        let error = bounded("RunPodSandbox", f.cri.run_pod(&config)).await?;
        says(fault, "ADD", &error.err().context("a pod without a network")?)?;
        f.kill()?;
        f.start()?;
        let listed = f.cri.pods().await?;
        ensure!(
            listed.len() == 1 && listed[0].state() == PodSandboxState::SandboxNotready,
            "what is left of the pod is not listed as not ready: {listed:?}"
        );
        wrapper.behave()?;
        config.metadata.as_mut().context("no metadata")?.attempt = 1;
        let next = f.run(config).await?;
        for id in [&listed[0].id, &next.id] {
            f.cri.stop_pod(id).await?;
            f.cri.remove_pod(id).await?;
        }
    }
    let cached = f.node.path("cni/cache/results");
    let left: Vec<_> = std::fs::read_dir(cached)?.flatten().map(|entry| entry.file_name()).collect();
    ensure!(left.is_empty(), "cached results are left: {left:?}");
    Ok(())
}

/// Attachments of pods that are gone: the daemon serves although the plugin does not answer.
async fn that_hang_at_the_start(f: &mut Fixture) -> Result<()> {
    let wrapper = plugin(f)?;
    f.configure("slow", "[network]\ncni_timeout = 600\n")?;
    let pod = f.pod("here").await?;
    f.kill()?;
    let results = f.node.path("cni/cache/results");
    let entry = std::fs::read_dir(&results)?.flatten().next().context("no cached result")?.path();
    let lost = "f".repeat(64);
    let text = std::fs::read_to_string(&entry)?.replace(&pod.id, &lost);
    std::fs::write(results.join(format!("told-{lost}-eth0")), text)?;
    wrapper.plan("DEL", 1, Fault::Hang)?;
    f.start()?;
    eventually("the plugin is asked", || async {
        ensure!(wrapper.calls("DEL") == 1);
        Ok(())
    })
    .await?;
    ensure!(f.cri.pods().await?.len() == 1);
    let another = f.pod("another").await?;
    f.cri.stop_pod(&another.id).await?;
    // What was not done is done by the next start. Not killed: that would leave the plugin, which hangs for ever.
    f.stop()?;
    wrapper.behave()?;
    f.start()?;
    eventually("the lost attachment goes", || async {
        ensure!(!results.join(format!("told-{lost}-eth0")).exists());
        Ok(())
    })
    .await
}

/// What a plugin answers to CHECK is for people, and changes nothing.
async fn that_find_a_pod_unconnected(f: &mut Fixture) -> Result<()> {
    let wrapper = plugin(f)?;
    let pod = f.pod("connected").await?;
    ensure!(wrapper.calls("CHECK") == 0, "nobody has asked");
    for (fault, words) in [
        (None, "as it was made"),
        (
            Some(Fault::Fail),
            "CNI plugin told failed at CHECK with exit status 1: \"told to fail at CHECK\\n\"",
        ),
        (Some(Fault::Hang), "CNI plugin told did not answer CHECK within 2 s and was killed"),
    ] {
        if let Some(fault) = fault {
            wrapper.plan("CHECK", 0, fault)?;
        }
        let info: serde_json::Value =
            serde_json::from_str(&bounded("PodSandboxStatus", f.cri.pod_info(&pod.id)).await??)?;
        ensure!(info["networkCheck"] == words, "with {fault:?}: {}", info["networkCheck"]);
        ensure!(f.cri.pod_status(&pod.id).await?.state() == PodSandboxState::SandboxReady);
    }
    Ok(())
}
