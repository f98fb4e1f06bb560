//! An OCI runtime that fails, hangs or dies: each request gets an answer that says so within our time limit, everybody else goes on,
//! and nothing is left.

use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use podvisor_proto::cri::{ContainerState, LinuxContainerResources, NamespaceMode, PodSandboxState};
use podvisor_tests::fixture::Pod;
use podvisor_tests::images::BUSYBOX;
use podvisor_tests::wrapper::{Fault, Wrapper};
use podvisor_tests::{Fixture, Tests, ask, eventually};
use tonic::{Code, Status};

use crate::is_full;

/// Nothing may take longer: two calls of two seconds each, and much patience with a busy machine.
const BOUND: Duration = Duration::from_secs(30);

pub(crate) fn add(tests: &mut Tests) {
    tests.add("runtimes::that_fail_at_create", at_create);
    tests.add("runtimes::that_fail_at_start", at_start);
    tests.add("runtimes::that_fail_at_exec", at_exec);
    tests.add("runtimes::that_fail_at_update", at_update);
    tests.add("runtimes::that_fail_at_delete", at_delete);
    tests.add("runtimes::that_never_delete_keep_no_pod", never_delete);
    tests.add("runtimes::that_hang_hold_up_nobody_else", hold_up_nobody);
    tests.add("runtimes::that_hang_keep_no_sandbox", hanging_create_is_cancelled);
    tests.add("runtimes::that_hang_at_start_keep_no_container", hanging_start_is_cancelled);
}

/// What can go wrong with one call. Hanging costs the time limit, so the short form has it in two tests of its own.
fn faults() -> Vec<Fault> {
    let mut faults = vec![Fault::Fail, Fault::Die, Fault::DieAfter];
    if is_full() {
        faults.push(Fault::Hang);
    }
    faults
}

/// The answer of a request whose runtime went wrong says how.
fn says(fault: Fault, verb: &str, error: &Status) -> Result<()> {
    let (code, word) = match fault {
        Fault::Fail => (Code::Internal, "told to fail"),
        Fault::Hang => (Code::DeadlineExceeded, "did not end within 2000 ms"),
        _ => (Code::Internal, "was killed by signal 9"),
    };
    let text = error.message();
    ensure!(
        error.code() == code && text.contains(word) && text.contains(verb),
        "the answer to {fault:?} is {error:?}"
    );
    Ok(())
}

async fn bounded<T>(what: &str, call: impl Future<Output = T>) -> Result<T> {
    tokio::time::timeout(BOUND, call).await.with_context(|| format!("{what} has no end"))
}

/// A pod of the handler that is told what to fail.
async fn pod(f: &mut Fixture, name: &str) -> Result<(Wrapper, Pod)> {
    let wrapper = f.faulty_runtime()?;
    f.cri.pull(BUSYBOX).await?;
    let config = f.ask_pod(name);
    std::fs::create_dir_all(&config.log_directory)?;
    let id = f.cri.run_pod_by(&config, "faulty").await?;
    Ok((wrapper, Pod::known(&id, &config, &f.cri)))
}

async fn at_create(f: &mut Fixture) -> Result<()> {
    let (wrapper, pod) = pod(f, "create").await?;
    for fault in faults() {
        wrapper.plan("create", 1, fault)?;
        let config = ask::waiting(&format!("{fault:?}").to_lowercase());
        let error = bounded("CreateContainer", f.cri.create(&pod.id, &config, &pod.config)).await?;
        says(fault, "create", &error.err().context("a container in spite of its runtime")?)?;
        ensure!(f.cri.containers().await?.is_empty(), "it is listed after {fault:?}");
        // The second call is not told to fail, and the name is free.
        let id = pod.start(&config).await?;
        f.cri.stop(&id, 0).await?;
        f.cri.remove(&id).await?;
    }
    Ok(())
}

async fn at_start(f: &mut Fixture) -> Result<()> {
    let (wrapper, pod) = pod(f, "start").await?;
    for fault in faults() {
        wrapper.plan("start", 1, fault)?;
        let id = pod.create(&ask::waiting(&format!("{fault:?}").to_lowercase())).await?;
        let error = bounded("StartContainer", f.cri.start(&id)).await?;
        says(fault, "start", &error.err().context("a start in spite of the runtime")?)?;
        let status = f.cri.status(&id).await?;
        ensure!(
            status.state() == ContainerState::ContainerExited
                && status.reason == "StartError"
                && status.exit_code == 128,
            "{status:?}"
        );
        ensure!(f.cri.start(&id).await.is_err(), "an exited container was started");
        f.cri.remove(&id).await?;
    }
    Ok(())
}

async fn at_exec(f: &mut Fixture) -> Result<()> {
    let (wrapper, pod) = pod(f, "exec").await?;
    let id = pod.start(&ask::waiting("c")).await?;
    for fault in faults() {
        wrapper.plan("exec", 1, fault)?;
        let answer = bounded("ExecSync", f.cri.exec(&id, &["sleep", "777"], 20)).await?;
        says(fault, "exec", &answer.err().context("an exec in spite of the runtime")?)?;
        ensure!(f.cri.output(&id, &["echo", "there"]).await? == "there\n");
        let left = f.cri.exec(&id, &["pgrep", "-f", "sleep 777$"], 20).await?;
        ensure!(left.stdout.is_empty(), "after {fault:?} the command runs");
    }
    Ok(())
}

async fn at_update(f: &mut Fixture) -> Result<()> {
    let (wrapper, pod) = pod(f, "update").await?;
    let id = pod.start(&ask::waiting("c")).await?;
    let shares = |cpu_shares| LinuxContainerResources { cpu_shares, ..LinuxContainerResources::default() };
    f.cri.update(&id, shares(300)).await?;
    for fault in faults() {
        wrapper.plan("update", 1, fault)?;
        let answer = bounded("UpdateContainerResources", f.cri.update(&id, shares(400))).await?;
        says(fault, "update", &answer.err().context("an update in spite of the runtime")?)?;
        let now = f.cri.status(&id).await?.resources.and_then(|all| all.linux).context("no resources")?;
        ensure!(now.cpu_shares == 300, "a change that failed is reported as made: {now:?}");
    }
    // Changes at the same time are made one after the other, each over what the one before has made.
    wrapper.plan("update", 1, Fault::Slow)?;
    let memory =
        LinuxContainerResources { memory_limit_in_bytes: 64 << 20, ..LinuxContainerResources::default() };
    let (first, second) = tokio::join!(f.cri.update(&id, shares(500)), f.cri.update(&id, memory));
    first?;
    second?;
    let now = f.cri.status(&id).await?.resources.and_then(|all| all.linux).context("no resources")?;
    ensure!(now.cpu_shares == 500 && now.memory_limit_in_bytes == 64 << 20, "{now:?}");
    Ok(())
}

async fn at_delete(f: &mut Fixture) -> Result<()> {
    let (wrapper, pod) = pod(f, "delete").await?;
    for fault in faults() {
        let id = pod.start(&ask::waiting(&format!("{fault:?}").to_lowercase())).await?;
        wrapper.plan("delete", 0, fault)?;
        f.cri.stop(&id, 0).await?;
        let answer = bounded("RemoveContainer", f.cri.remove(&id)).await?;
        // After `DieAfter` a further delete finds nothing any more, which may be an error of the runtime's or not.
        if let Err(error) = &answer
            && fault != Fault::DieAfter
        {
            says(fault, "delete", error)?;
        }
        ensure!(answer.is_err() || fault == Fault::DieAfter, "removed in spite of the runtime");
        wrapper.behave()?;
        f.cri.remove(&id).await?;
        ensure!(f.cri.containers().await?.is_empty(), "it is still listed");
    }
    // Neither is ever called: signals go to the processes themselves, and what a container does the monitor knows.
    ensure!(
        wrapper.calls("kill") + wrapper.calls("state") == 0,
        "the runtime was asked to kill or about a state"
    );
    Ok(())
}

/// A runtime that never deletes anything: containers stay, with the reason; a pod can go nevertheless.
async fn never_delete(f: &mut Fixture) -> Result<()> {
    let (wrapper, pod) = pod(f, "never").await?;
    let fault = if is_full() { Fault::Hang } else { Fault::Fail };
    for name in ["one", "two", "three"] {
        pod.start(&ask::waiting(name)).await?;
    }
    wrapper.plan("delete", 0, fault)?;
    bounded("StopPodSandbox", f.cri.stop_pod(&pod.id)).await??;
    ensure!(f.cri.pod_status(&pod.id).await?.state() == PodSandboxState::SandboxNotready);
    for container in f.cri.containers().await? {
        ensure!(container.state() == ContainerState::ContainerExited, "{container:?}");
    }
    tokio::time::timeout(Duration::from_secs(120), f.cri.remove_pod(&pod.id))
        .await
        .context("RemovePodSandbox has no end")??;
    let state = f.node.path("run/faulty");
    let left: Vec<_> = std::fs::read_dir(&state)?.flatten().map(|entry| entry.file_name()).collect();
    ensure!(left.is_empty(), "the runtime's state is left: {left:?}");
    Ok(())
}

/// While one pod's runtime hangs, lists answer at once, other pods work, and so do other containers of the same pod.
async fn hold_up_nobody(f: &mut Fixture) -> Result<()> {
    let (wrapper, pod) = pod(f, "hanging").await?;
    let beside = pod.start(&ask::waiting("beside")).await?;
    let other = f.pod("other").await?;
    wrapper.plan("create", 1, Fault::Hang)?;
    let hanging = {
        let (cri, pod) = (f.cri.clone(), pod.clone());
        tokio::spawn(async move { cri.create(&pod.id, &ask::waiting("hanging"), &pod.config).await })
    };
    eventually("the runtime hangs", || async {
        ensure!(wrapper.calls("create") == 1);
        Ok(())
    })
    .await?;
    let began = Instant::now();
    f.cri.pods().await?;
    f.cri.containers().await?;
    f.cri.pod_status(&pod.id).await?;
    ensure!(f.cri.output(&beside, &["echo", "there"]).await? == "there\n");
    let id = other.start(&ask::waiting("c")).await?;
    f.cri.stop(&id, 0).await?;
    f.cri.stop(&beside, 0).await?;
    println!("beside a runtime that hangs: {:?}", began.elapsed());
    let error = bounded("CreateContainer", hanging).await??.err().context("created in spite of it")?;
    says(Fault::Hang, "create", &error)?;
    Ok(())
}

/// A sandbox that is to stop does not wait for the time limit of a creation.
async fn hanging_create_is_cancelled(f: &mut Fixture) -> Result<()> {
    let (wrapper, pod) = pod(f, "cancelled").await?;
    wrapper.plan("create", 0, Fault::Hang)?;
    f.configure("limit", "[limits]\nruntime_timeout = 600\n")?;
    let hanging = {
        let (cri, pod) = (f.cri.clone(), pod.clone());
        tokio::spawn(async move { cri.create(&pod.id, &ask::waiting("hanging"), &pod.config).await })
    };
    eventually("the runtime hangs", || async {
        ensure!(wrapper.calls("create") == 1);
        Ok(())
    })
    .await?;
    bounded("StopPodSandbox", f.cri.stop_pod(&pod.id)).await??;
    let error = bounded("CreateContainer", hanging).await??.err().context("created in spite of it")?;
    ensure!(error.message().contains("cancelled"), "{error:?}");
    Ok(())
}

/// A container that is to stop has its own time for it, and one that is to go has none: neither waits for the time limit of a start.
async fn hanging_start_is_cancelled(f: &mut Fixture) -> Result<()> {
    let (wrapper, pod) = pod(f, "start-cancelled").await?;
    f.configure("limit", "[limits]\nruntime_timeout = 600\n")?;
    for how in ["stop", "stop-now", "remove", "stop-pod"] {
        let id = pod.create(&ask::waiting(how)).await?;
        wrapper.plan("start", 0, Fault::Hang)?;
        let hanging = {
            let (cri, id) = (f.cri.clone(), id.clone());
            tokio::spawn(async move { cri.start(&id).await })
        };
        eventually("the runtime hangs", || async {
            ensure!(wrapper.calls("start") == 1);
            Ok(())
        })
        .await?;
        match how {
            "stop" => bounded("StopContainer", f.cri.stop(&id, 1)).await??,
            "stop-now" => bounded("StopContainer", f.cri.stop(&id, 0)).await??,
            "remove" => bounded("RemoveContainer", f.cri.remove(&id)).await??,
            _ => bounded("StopPodSandbox", f.cri.stop_pod(&pod.id)).await??,
        }
        let error = bounded("StartContainer", hanging).await??.err().context("started in spite of it")?;
        ensure!(error.message().contains("cancelled"), "{error:?}");
        if how == "remove" {
            ensure!(f.cri.status(&id).await.is_err_and(|error| error.code() == Code::NotFound));
        } else {
            let status = f.cri.status(&id).await?;
            let ended = status.state() == ContainerState::ContainerExited && status.exit_code == 137;
            ensure!(ended, "after {how}: {status:?}");
        }
    }
    // A stop that comes during a start that takes its time is as polite as any. (SIGTERM is lost on a namespace's first process.)
    let mut config = f.ask_pod("polite");
    ask::pod_namespaces(&mut config).pid = NamespaceMode::Pod.into();
    std::fs::create_dir_all(&config.log_directory)?;
    let pod = Pod::known(&f.cri.run_pod_by(&config, "faulty").await?, &config, &f.cri);
    let mut config = ask::container("polite", &["sleep", "1000"]);
    ask::container_namespaces(&mut config).pid = NamespaceMode::Pod.into();
    let id = pod.create(&config).await?;
    wrapper.plan("start", 1, Fault::Slow)?;
    let slow = {
        let (cri, id) = (f.cri.clone(), id.clone());
        tokio::spawn(async move { cri.start(&id).await })
    };
    eventually("the runtime takes its time", || async {
        ensure!(wrapper.calls("start") == 1);
        Ok(())
    })
    .await?;
    bounded("StopContainer", f.cri.stop(&id, 60)).await??;
    bounded("StartContainer", slow).await???;
    let status = f.cri.status(&id).await?;
    ensure!(status.state() == ContainerState::ContainerExited && status.exit_code == 143, "{status:?}");
    Ok(())
}
