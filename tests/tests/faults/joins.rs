//! A request with the name of one that still runs joins it: at the same time, after the client's time was over, and across a
//! restart of the daemon.

use std::time::Duration;

use anyhow::{Context, Result, ensure};
use podvisor_proto::cri::ContainerState;
use podvisor_tests::fixture::Pod;
use podvisor_tests::images::BUSYBOX;
use podvisor_tests::wrapper::{Fault, Wrapper};
use podvisor_tests::{Fixture, Tests, ask, eventually};

pub(crate) fn add(tests: &mut Tests) {
    tests.add("joins::sandboxes_of_one_name", sandboxes);
    tests.add("joins::containers_of_one_name", containers);
    tests.add("joins::after_the_clients_time", after_the_clients_time);
    tests.add("joins::across_a_restart", across_a_restart);
}

async fn sandboxes(f: &mut Fixture) -> Result<()> {
    for round in 0..5 {
        let config = f.ask_pod(&format!("joined{round}"));
        let calls = (0..8).map(|_| f.cri.run_pod(&config));
        let ids = futures_util::future::try_join_all(calls).await?;
        ensure!(ids.iter().all(|id| *id == ids[0]), "one name, several sandboxes: {ids:?}");
        ensure!(f.cri.pods().await?.len() == 1 + round, "several sandboxes are listed");
        let mut other = config.clone();
        other.hostname = "other".into();
        ensure!(f.cri.run_pod(&other).await.is_err(), "another configuration of the same name");
    }
    for pod in f.cri.pods().await? {
        let stops = (0..4).map(|_| f.cri.stop_pod(&pod.id));
        futures_util::future::try_join_all(stops).await?;
        let removals = (0..4).map(|_| f.cri.remove_pod(&pod.id));
        futures_util::future::try_join_all(removals).await?;
    }
    Ok(())
}

async fn pod(f: &mut Fixture, name: &str) -> Result<(Wrapper, Pod)> {
    let wrapper = f.faulty_runtime()?;
    f.cri.pull(BUSYBOX).await?;
    let config = f.ask_pod(name);
    std::fs::create_dir_all(&config.log_directory)?;
    let id = f.cri.run_pod_by(&config, "faulty").await?;
    Ok((wrapper, Pod::known(&id, &config, &f.cri)))
}

async fn containers(f: &mut Fixture) -> Result<()> {
    let (wrapper, pod) = pod(f, "containers").await?;
    let config = ask::script("c", "trap 'exit 0' TERM; echo ready; while :; do sleep 1000 & wait; done");
    wrapper.plan("create", 1, Fault::Slow)?;
    let creations = (0..8).map(|_| f.cri.create(&pod.id, &config, &pod.config));
    let ids = futures_util::future::try_join_all(creations).await?;
    ensure!(ids.iter().all(|id| *id == ids[0]), "one name, several containers: {ids:?}");
    ensure!(wrapper.calls("create") == 1, "the runtime created {} times", wrapper.calls("create"));
    wrapper.plan("start", 1, Fault::Slow)?;
    futures_util::future::try_join_all((0..8).map(|_| f.cri.start(&ids[0]))).await?;
    ensure!(wrapper.calls("start") == 1, "the runtime started {} times", wrapper.calls("start"));
    eventually("it can be told to end", || async {
        ensure!(pod.log("c.log")?.stdout() == "ready\n");
        Ok(())
    })
    .await?;
    futures_util::future::try_join_all((0..8).map(|_| f.cri.stop(&ids[0], 10))).await?;
    ensure!(f.cri.status(&ids[0]).await?.exit_code == 0);
    futures_util::future::try_join_all((0..8).map(|_| f.cri.remove(&ids[0]))).await?;
    ensure!(f.cri.containers().await?.is_empty());
    Ok(())
}

/// Lets a request be given up by its client when `begun` says that it has begun.
async fn given_up<T>(call: impl Future<Output = T>, begun: impl Fn() -> bool) -> Result<()> {
    let begun = eventually("it has begun", || async {
        ensure!(begun());
        Ok(())
    });
    tokio::select! {
        _ = call => anyhow::bail!("it had an end before it was given up"),
        begun = begun => begun,
    }
}

async fn after_the_clients_time(f: &mut Fixture) -> Result<()> {
    let (wrapper, pod) = pod(f, "patient").await?;
    let config = ask::waiting("c");
    wrapper.plan("create", 1, Fault::Slow)?;
    given_up(f.cri.create(&pod.id, &config, &pod.config), || wrapper.calls("create") == 1).await?;
    let id = f.cri.create(&pod.id, &config, &pod.config).await?;
    ensure!(wrapper.calls("create") == 1, "the retry did the work again");
    wrapper.plan("start", 1, Fault::Slow)?;
    given_up(f.cri.start(&id), || wrapper.calls("start") == 1).await?;
    f.cri.start(&id).await?;
    ensure!(wrapper.calls("start") == 1, "the retry did the work again");
    ensure!(f.cri.status(&id).await?.state() == ContainerState::ContainerRunning);
    ensure!(f.cri.containers().await?.len() == 1);
    Ok(())
}

async fn across_a_restart(f: &mut Fixture) -> Result<()> {
    let (wrapper, pod) = pod(f, "restarted").await?;
    let config = ask::waiting("c");
    // A creation that was cut is undone, and the retry waits for that and makes it.
    wrapper.plan("create", 1, Fault::Slow)?;
    given_up(f.cri.create(&pod.id, &config, &pod.config), || wrapper.calls("create") == 1).await?;
    f.kill()?;
    f.start()?;
    let id = f.cri.create(&pod.id, &config, &pod.config).await?;
    let listed = f.cri.containers().await?;
    ensure!(listed.len() == 1 && listed[0].id == id, "{listed:?}");
    // A start that was cut goes on: who asks again joins it.
    wrapper.plan("start", 1, Fault::Slow)?;
    given_up(f.cri.start(&id), || wrapper.calls("start") == 1).await?;
    f.kill()?;
    f.start()?;
    match tokio::time::timeout(Duration::from_secs(30), f.cri.start(&id)).await.context("no answer")? {
        Ok(()) => {}
        // It was over before it was asked again.
        Err(error) => ensure!(error.message().contains("running"), "{error:?}"),
    }
    ensure!(wrapper.calls("start") == 1, "started {} times", wrapper.calls("start"));
    ensure!(f.cri.status(&id).await?.state() == ContainerState::ContainerRunning);
    ensure!(f.cri.output(&id, &["echo", "there"]).await? == "there\n");
    Ok(())
}
