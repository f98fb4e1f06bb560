//! Pods on gVisor's kernel: an OCI runtime that keeps a pod's containers in one process. Run by `make test-gvisor`.

use anyhow::{Context, Result, ensure};
use podvisor_critest::node::Options;
use podvisor_proto::cri::{NamespaceMode, PodSandboxState};
use podvisor_tests::{Fixture, ask, eventually};
use rustix::process::{Pid, Signal, kill_process};

use super::Tests;

/// Building gVisor takes minutes.
const WHY: &str = "needs runsc: make test-gvisor";

pub(crate) fn add(tests: &mut Tests) {
    let options = || Options { handler: "runsc".to_owned(), ..Options::default() };
    tests.add_optional("gvisor::has_a_kernel_of_its_own", WHY, options(), has_a_kernel_of_its_own);
    tests.add_optional("gvisor::says_how_containers_ended", WHY, options(), says_how_containers_ended);
    tests.add_optional(
        "gvisor::shares_pid_namespaces_as_asked",
        WHY,
        options(),
        shares_pid_namespaces_as_asked,
    );
    tests.add_optional("gvisor::ends_with_its_sandbox", WHY, options(), ends_with_its_sandbox);
    tests.add_optional("gvisor::ends_with_its_monitor", WHY, options(), ends_with_its_monitor);
    tests.add_optional("gvisor::does_not_notice_the_daemon", WHY, options(), does_not_notice_the_daemon);
    tests.add_optional("gvisor::ends_what_takes_too_long", WHY, options(), ends_what_takes_too_long);
    tests.add_optional("gvisor::refuses_the_host", WHY, options(), refuses_the_host);
}

/// The processes that hold pods.
fn sandboxes() -> Result<Vec<Pid>> {
    let mut found = Vec::new();
    for entry in std::fs::read_dir("/proc")? {
        let name = entry?.file_name();
        let Some(pid) = name.to_str().and_then(|name| name.parse().ok()).and_then(Pid::from_raw) else {
            continue;
        };
        let command = std::fs::read(format!("/proc/{}/cmdline", pid.as_raw_pid())).unwrap_or_default();
        if command.starts_with(b"runsc-sandbox\0") {
            found.push(pid);
        }
    }
    Ok(found)
}

async fn has_a_kernel_of_its_own(f: &mut Fixture) -> Result<()> {
    let (pod, first) = f.running("pod", &ask::waiting("first")).await?;
    let second = pod.start(&ask::waiting("second")).await?;
    for container in [&first, &second] {
        let kernel = f.cri.output(container, &["uname", "-r"]).await?;
        ensure!(kernel.contains("gvisor"), "{kernel}");
        ensure!(f.cri.output(container, &["hostname"]).await? == "pod\n");
    }
    ensure!(sandboxes()?.len() == 1, "one process holds both");
    // One network stack: what the one listens on the other reaches on the loopback.
    f.cri.output(&first, &["sh", "-c", "echo hello | nc -l -p 4000 >/dev/null 2>&1 &"]).await?;
    let said = f.cri.output(&second, &["sh", "-c", "sleep 1; nc 127.0.0.1 4000 </dev/null"]).await?;
    ensure!(said == "hello\n", "{said:?}");
    let (text, code) = pod.script("third", "echo out; echo err >&2; exit 4").await?;
    ensure!(text == "out\n" && code == 4, "{text:?} {code}");
    ensure!(pod.log("third.log")?.stderr() == "err\n");
    Ok(())
}

async fn says_how_containers_ended(f: &mut Fixture) -> Result<()> {
    let (pod, obeys) =
        f.running("pod", &ask::script("obeys", "trap 'exit 3' TERM; sleep 1000 & wait")).await?;
    f.cri.stop(&obeys, 20).await?;
    ensure!(f.cri.status(&obeys).await?.exit_code == 3);
    let stubborn = pod.start(&ask::script("stubborn", "trap '' TERM; while :; do sleep 1; done")).await?;
    f.cri.stop(&stubborn, 1).await?;
    ensure!(f.cri.status(&stubborn).await?.exit_code == 137);
    let unborn = pod.create(&ask::waiting("unborn")).await?;
    f.cri.stop(&unborn, 1).await?;
    ensure!(f.cri.status(&unborn).await?.exit_code == 137);
    for container in [&obeys, &stubborn, &unborn] {
        f.cri.remove(container).await?;
    }
    ensure!(f.cri.pod_status(&pod.id).await?.state() == PodSandboxState::SandboxReady);
    Ok(())
}

async fn shares_pid_namespaces_as_asked(f: &mut Fixture) -> Result<()> {
    f.cri.pull(podvisor_tests::images::BUSYBOX).await?;
    let mut config = f.ask_pod("pod");
    ask::pod_namespaces(&mut config).pid = NamespaceMode::Pod.into();
    let pod = f.run(config).await?;
    let mut shared = ask::waiting("shared");
    ask::container_namespaces(&mut shared).pid = NamespaceMode::Pod.into();
    let shared = pod.start(&shared).await?;
    let own = pod.start(&ask::waiting("own")).await?;
    let first = ["sh", "-c", "tr '\\0' ' ' </proc/1/cmdline"];
    ensure!(f.cri.output(&shared, &first).await?.trim() == "/pause");
    ensure!(f.cri.output(&own, &first).await?.starts_with("sh -c"));
    Ok(())
}

async fn ends_with_its_sandbox(f: &mut Fixture) -> Result<()> {
    ends_with(f, Ok).await
}

async fn ends_with_its_monitor(f: &mut Fixture) -> Result<()> {
    let parent = |sandbox: Pid| {
        let stat = std::fs::read_to_string(format!("/proc/{}/stat", sandbox.as_raw_pid()))?;
        let fields = stat.rsplit(')').next().context("no name")?;
        let parent = fields.split_ascii_whitespace().nth(1).context("no parent")?.parse()?;
        Pid::from_raw(parent).context("no parent")
    };
    ends_with(f, parent).await
}

/// Kills what `victim` makes of the pod's sandbox process.
async fn ends_with(f: &mut Fixture, victim: impl Fn(Pid) -> Result<Pid>) -> Result<()> {
    let (pod, container) = f.running("pod", &ask::waiting("c")).await?;
    let [sandbox] = sandboxes()?[..] else { anyhow::bail!("there is not one sandbox: {:?}", sandboxes()?) };
    kill_process(victim(sandbox)?, Signal::KILL)?;
    let status = f.cri.wait_exited(&container).await?;
    ensure!(status.exit_code == 137, "{status:?}");
    eventually("the pod is not ready", || async {
        let state = f.cri.pod_status(&pod.id).await?.state();
        ensure!(state == PodSandboxState::SandboxNotready, "it is {state:?}");
        Ok(())
    })
    .await
}

async fn does_not_notice_the_daemon(f: &mut Fixture) -> Result<()> {
    let (pod, stays) = f.running("pod", &ask::waiting("stays")).await?;
    let ends = pod.start(&ask::script("ends", "while [ ! -e /end ]; do sleep 0.1; done; exit 5")).await?;
    let created = pod.create(&ask::script("created", "echo later")).await?;
    f.cri.output(&ends, &["sh", "-c", "(sleep 2; touch /end) >/dev/null 2>&1 </dev/null &"]).await?;
    f.kill()?;
    f.start()?;
    ensure!(f.cri.pod_status(&pod.id).await?.state() == PodSandboxState::SandboxReady);
    ensure!(f.cri.output(&stays, &["echo", "here"]).await? == "here\n");
    ensure!(f.cri.wait_exited(&ends).await?.exit_code == 5);
    f.cri.start(&created).await?;
    f.cri.wait_exited(&created).await?;
    ensure!(pod.log("created.log")?.stdout() == "later\n");
    Ok(())
}

async fn ends_what_takes_too_long(f: &mut Fixture) -> Result<()> {
    let (_, container) = f.running("pod", &ask::waiting("c")).await?;
    let refused = f.cri.exec(&container, &["sleep", "4321"], 1).await.err().context("it came to an end")?;
    ensure!(refused.code() == tonic::Code::DeadlineExceeded, "{refused}");
    eventually("the process goes", || async {
        let processes = f.cri.output(&container, &["ps", "-o", "args"]).await?;
        ensure!(!processes.contains("sleep 4321"), "{processes}");
        Ok(())
    })
    .await
}

async fn refuses_the_host(f: &mut Fixture) -> Result<()> {
    let mut config = f.ask_pod("pod");
    ask::pod_namespaces(&mut config).network = NamespaceMode::Node.into();
    let refused = f.cri.run_pod(&config).await.err().context("it has the host's network")?;
    ensure!(refused.code() == tonic::Code::InvalidArgument, "{refused}");
    ensure!(refused.message().contains("runtime class"), "{refused}");
    // Nor can it be in a user namespace that others have made.
    let mut config = f.ask_pod("pod");
    ask::with_user_namespace(ask::pod_namespaces(&mut config));
    let refused = f.cri.run_pod(&config).await.err().context("it has a user namespace")?;
    ensure!(refused.message().contains("joins no user namespace"), "{refused}");
    Ok(())
}
