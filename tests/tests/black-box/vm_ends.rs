//! Pods in virtual machines that come to no good: how that is told, and that the pods beside them notice nothing.

use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use podvisor_critest::node::{Options, VM};
use podvisor_proto::cri::{ContainerState, PodSandboxConfig, PodSandboxState};
use podvisor_tests::fixture::Pod;
use podvisor_tests::images::BUSYBOX;
use podvisor_tests::{Fixture, ask, eventually};
use rustix::process::{Signal, kill_process};

use super::Tests;
use super::vm::{info, process};

/// A neighbour whose container must be there as it was.
struct Neighbour {
    pod: Pod,
    container: String,
}

impl Neighbour {
    async fn new(f: &Fixture) -> Result<Self> {
        let (pod, container) = f.running("neighbour", &ask::waiting("c")).await?;
        Ok(Self { pod, container })
    }

    async fn has_noticed_nothing(&self, f: &Fixture) -> Result<()> {
        ensure!(f.cri.output(&self.container, &["echo", "here"]).await? == "here\n");
        ensure!(f.cri.pod_status(&self.pod.id).await?.state() == PodSandboxState::SandboxReady);
        ensure!(f.cri.status(&self.container).await?.state() == ContainerState::ContainerRunning);
        Ok(())
    }
}

pub(crate) fn add(tests: &mut Tests) {
    let options = || Options { handler: VM.to_owned(), ..Options::default() };
    tests.add_with("vm_ends::panics_and_hangs_are_told", options(), panics_and_hangs_are_told);
    tests.add_with("vm_ends::who_works_is_not_called_hung", options(), who_works_is_not_called_hung);
    tests.add_with("vm_ends::memory_that_is_used_up_costs_a_container", options(), memory_costs_a_container);
    tests.add_with("vm_ends::bombs_and_floods_stay_inside", options(), bombs_and_floods_stay_inside);
    tests.add_with("vm_ends::silence_holds_nothing_up", options(), silence_holds_nothing_up);
    tests.add_with("vm_ends::keeps_the_hosts_time", options(), keeps_the_hosts_time);
}

/// A pod that may do everything in its guest.
async fn privileged(f: &Fixture, name: &str) -> Result<(Pod, String)> {
    f.cri.pull(BUSYBOX).await?;
    let mut config = f.ask_pod(name);
    ask::pod_context(&mut config).privileged = true;
    std::fs::create_dir_all(&config.log_directory)?;
    let id = f.cri.run_pod_by(&config, VM).await?;
    let pod = Pod::known(&id, &config, &f.cri);
    let mut container = ask::waiting("c");
    ask::context(&mut container).privileged = true;
    let container = pod.start(&container).await?;
    Ok((pod, container))
}

async fn panics_and_hangs_are_told(f: &mut Fixture) -> Result<()> {
    let neighbour = Neighbour::new(f).await?;
    let ends = [
        (
            "echo c >/proc/sysrq-trigger",
            "the guest's kernel panicked: Kernel panic - not syncing: sysrq triggered crash",
            "Kernel panic - not syncing",
        ),
        // Its processor runs one program and nothing else, not even the kernel's own. (The second line: kernels of 6.12 and later.)
        (
            "echo h >/proc/sysrq-trigger; echo -1 >/proc/sys/kernel/sched_rt_runtime_us
             mkdir /d; mount -t debugfs d /d; for cpu in /d/sched/fair_server/cpu*; do echo 0 >$cpu/runtime; done
             exec chrt -f 99 sh -c 'while :; do :; done'",
            "the guest hangs: neither its kernel nor its agent has answered",
            "sysrq: HELP",
        ),
        // Its processor is halted, and no interrupt wakes it. Only in the first namespaces of the guest does that mean the guest: there a
        // program is started for whoever dumps core.
        (
            "echo h >/proc/sysrq-trigger; echo '|/proc/%P/root/bin/busybox halt -f -n' >/proc/sys/kernel/core_pattern
             ulimit -c unlimited; sh -c 'kill -SEGV $$'",
            "the guest stands still: neither its kernel nor its agent answers",
            "sysrq: HELP",
        ),
    ];
    for (number, (script, reason, console)) in ends.into_iter().enumerate() {
        let (pod, container) = privileged(f, &format!("pod{number}")).await?;
        let later = format!("(sleep 0.5; {script}) >/dev/null 2>&1 </dev/null &");
        f.cri.output(&container, &["sh", "-c", &later]).await?;
        let status = f.cri.wait_exited(&container).await.with_context(|| script.to_owned())?;
        ensure!(status.exit_code == 137 && status.reason == "Error", "{status:?}");
        // What kubelet shows of the container, and crictl of the pod.
        ensure!(status.message.contains(reason) && status.message.contains(console), "{status:?}");
        eventually("the pod is not ready", || async {
            let state = f.cri.pod_status(&pod.id).await?.state();
            ensure!(state == PodSandboxState::SandboxNotready, "it is {state:?}");
            Ok(())
        })
        .await?;
        let told = info(f, &pod.id).await?;
        let why = told["why"].as_str().unwrap_or_default();
        ensure!(why.starts_with(&format!("the pod's virtual machine ended: {reason}")), "{why}");
        ensure!(why.contains(console), "{why}");
        f.cri.stop_pod(&pod.id).await?;
        f.cri.remove_pod(&pod.id).await?;
        neighbour.has_noticed_nothing(f).await?;
    }
    Ok(())
}

/// A guest whose processor a program has for itself as far as the kernel allows it, one with more to do than it can, and one that waits for
/// the processor behind them.
async fn who_works_is_not_called_hung(f: &mut Fixture) -> Result<()> {
    let neighbour = Neighbour::new(f).await?;
    let mut pods = Vec::new();
    for (name, script) in [
        ("real-time", "exec chrt -f 99 sh -c 'while :; do :; done'"),
        ("busy", "for i in $(seq 200); do while :; do :; done & done; wait"),
    ] {
        let (pod, container) = privileged(f, name).await?;
        let later = format!("(sleep 0.5; {script}) >/dev/null 2>&1 </dev/null &");
        f.cri.output(&container, &["sh", "-c", &later]).await?;
        pods.push((pod, container));
    }
    // Longer than any silence that means an end.
    let began = Instant::now();
    while began.elapsed() < Duration::from_secs(10) {
        for (pod, container) in &pods {
            let answer = f.cri.exec(container, &["echo", "here"], 60).await?;
            ensure!((answer.stdout.as_slice(), answer.exit_code) == (b"here\n".as_slice(), 0), "{answer:?}");
            let told = info(f, &pod.id).await?;
            ensure!(f.cri.pod_status(&pod.id).await?.state() == PodSandboxState::SandboxReady, "{told}");
        }
        ensure!(f.cri.exec(&neighbour.container, &["true"], 60).await?.exit_code == 0);
        ensure!(f.cri.pod_status(&neighbour.pod.id).await?.state() == PodSandboxState::SandboxReady);
    }
    Ok(())
}

/// A pod whose containers may use so much together, as kubelet says it. Nothing is declared for the machine.
fn sized(f: &Fixture, name: &str, memory: i64) -> PodSandboxConfig {
    let mut config = f.ask_pod(name);
    let resources = config.linux.get_or_insert_default().resources.get_or_insert_default();
    resources.memory_limit_in_bytes = memory;
    config
}

async fn memory_costs_a_container(f: &mut Fixture) -> Result<()> {
    f.cri.pull(BUSYBOX).await?;
    for memory in [32 << 20, 160 << 20] {
        let name = format!("pod{}", memory >> 20);
        let pod = f.run(sized(f, &name, memory)).await?;
        let beside = pod.start(&ask::waiting("beside")).await?;
        // One within a limit of its own; one without, which fills all that the pod has.
        for (name, limit) in [("limited", memory / 2), ("unlimited", 0), ("again", 0)] {
            let mut hungry = ask::script(name, "x=0123456789abcdef; while :; do x=$x$x; done");
            ask::resources(&mut hungry).memory_limit_in_bytes = limit;
            let id = pod.start(&hungry).await?;
            let status = f.cri.wait_exited(&id).await?;
            ensure!(status.exit_code == 137 && status.reason == "OOMKilled", "{memory} {name}: {status:?}");
        }
        ensure!(f.cri.pod_status(&pod.id).await?.state() == PodSandboxState::SandboxReady);
        ensure!(f.cri.status(&beside).await?.state() == ContainerState::ContainerRunning);
        ensure!(f.cri.output(&beside, &["echo", "here"]).await? == "here\n");
    }
    Ok(())
}

async fn bombs_and_floods_stay_inside(f: &mut Fixture) -> Result<()> {
    let neighbour = Neighbour::new(f).await?;
    let pod = f.pod("pod").await?;
    let mut bomb = ask::script("bomb", "f() { f | f & }; f; while :; do sleep 1; done");
    ask::resources(&mut bomb).memory_limit_in_bytes = 128 << 20;
    pod.start(&bomb).await?;
    let flood = pod.start(&ask::script("flood", "exec yes 0123456789abcdef")).await?;
    let beside = pod.start(&ask::waiting("beside")).await?;
    eventually("much is written", || async {
        let log = std::path::Path::new(&pod.config.log_directory).join("flood.log");
        let length = std::fs::metadata(log)?.len();
        ensure!(length > 4 << 20, "{length}");
        Ok(())
    })
    .await?;
    neighbour.has_noticed_nothing(f).await?;
    ensure!(f.cri.pod_status(&pod.id).await?.state() == PodSandboxState::SandboxReady);
    f.cri.stop(&beside, 5).await?;
    f.cri.stop(&flood, 0).await?;
    let status = f.cri.status(&flood).await?;
    ensure!(status.exit_code == 137, "{status:?}");
    f.cri.stop_pod(&pod.id).await?;
    f.cri.remove_pod(&pod.id).await?;
    neighbour.has_noticed_nothing(f).await
}

/// StopPodSandbox and RemovePodSandbox have two minutes in kubelet (`--runtime-request-timeout`).
const KUBELETS_PATIENCE: Duration = Duration::from_secs(120);

async fn silence_holds_nothing_up(f: &mut Fixture) -> Result<()> {
    let neighbour = Neighbour::new(f).await?;
    let (pod, container) = f.running("pod", &ask::waiting("c")).await?;
    // The whole machine stands, which nobody takes for the guest's fault.
    kill_process(process(f, &pod.id, "pid").await?, Signal::STOP)?;
    neighbour.has_noticed_nothing(f).await?;
    // Somebody waits for it in vain.
    let vain = tokio::time::timeout(Duration::from_secs(1), f.cri.exec(&container, &["true"], 1)).await;
    ensure!(vain.is_err(), "{vain:?}");
    ensure!(f.cri.pod_status(&pod.id).await?.state() == PodSandboxState::SandboxReady);
    let began = Instant::now();
    f.cri.stop_pod(&pod.id).await?;
    f.cri.remove_pod(&pod.id).await?;
    ensure!(began.elapsed() < KUBELETS_PATIENCE, "{:?}", began.elapsed());
    neighbour.has_noticed_nothing(f).await
}

/// How far a guest's clock may be from the host's, beside what a measurement takes: more than `pod-vm/README.md` says, as a machine that runs
/// tests may be late with everything.
const CLOCK_BOUND: i128 = 250_000_000;

/// By how many ns the guest's clock is outside of the time that it took to read it.
async fn clock_error(f: &Fixture, container: &str) -> Result<i128> {
    let host = || -> Result<i128> {
        let since = std::time::SystemTime::now().duration_since(std::time::UNIX_EPOCH)?;
        Ok(i128::try_from(since.as_nanos())?)
    };
    let before = host()?;
    let read = "touch /dev/shm/now; stat -c '%Y %y' /dev/shm/now";
    let said = f.cri.output(container, &["sh", "-c", read]).await?;
    let after = host()?;
    // 1700000000 2023-11-14 22:13:20.123456789 +0000
    let seconds: i128 = said.split(' ').next().context("no seconds")?.parse()?;
    let fraction = said.split('.').nth(1).and_then(|rest| rest.split(' ').next()).context("no fraction")?;
    let guest = seconds * 1_000_000_000 + fraction.parse::<i128>()?;
    // Times of files are those of the last tick, 4 ms at most.
    Ok((before - guest - 4_000_000).max(guest - after).max(0))
}

async fn keeps_the_hosts_time(f: &mut Fixture) -> Result<()> {
    let (pod, container) = privileged(f, "pod").await?;
    let comes_right = async |what: &str| {
        eventually(what, || async {
            let error = clock_error(f, &container).await?;
            ensure!(error < CLOCK_BOUND, "it is off by {} ms", error / 1_000_000);
            Ok(())
        })
        .await
    };
    comes_right("the clock is right at the start").await?;
    kill_process(process(f, &pod.id, "pid").await?, Signal::STOP)?;
    tokio::time::sleep(Duration::from_secs(3)).await;
    kill_process(process(f, &pod.id, "pid").await?, Signal::CONT)?;
    comes_right("the clock is right after a pause").await?;
    // One that is ahead is put back, too, but only when many words agree: `agent/src/clock.rs` tests that.
    f.cri.output(&container, &["sh", "-c", "date -s @$(($(date +%s) - 3600))"]).await?;
    comes_right("a clock that is behind is set").await?;
    Ok(())
}
