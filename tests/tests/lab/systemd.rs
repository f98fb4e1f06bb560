//! The daemon as a unit of systemd's, with the packaged unit file and the systemd cgroup driver. Run on the lab itself: in a sandbox systemd
//! would mean other processes by the same numbers.

use std::collections::BTreeSet;
use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::Arc;

use anyhow::{Context, Result, ensure};
use podvisor_critest::node::{Node, Options, VM, daemon_program};
use podvisor_critest::project_dir;
use podvisor_proto::cri::{CgroupDriver, NamespaceMode, RuntimeConfigRequest};
use podvisor_tests::cri::Cri;
use podvisor_tests::fixture::Pod;
use podvisor_tests::images::{BUSYBOX, HOST, TestImages};
use podvisor_tests::{ask, eventually};

/// Their slice as kubelet names it, and where that is.
const SLICE: &str = "kubepods-burstable-podunit.slice";
const SLICE_PATH: &str = "/kubepods.slice/kubepods-burstable.slice/kubepods-burstable-podunit.slice";

pub(crate) const UNIT: &str = "podvisor.service";
const CGROUPS: &str = "/sys/fs/cgroup";

#[test]
#[ignore = "runs in the lab: make test-lab"]
fn pods_outlive_the_unit() {
    with_unit(Options::default(), outlive);
}

#[test]
#[ignore = "runs in the lab: make test-lab"]
fn virtual_machines_outlive_the_unit() {
    with_unit(Options { handler: VM.to_owned(), ..Options::default() }, machines_outlive);
}

/// Runs a test of the daemon as a unit.
fn with_unit(options: Options, test: impl AsyncFnOnce(&Node) -> Result<()>) {
    crate::run(async {
        let images = Arc::new(TestImages::serve()?);
        let node = Node::new(&Options {
            mirrored: vec![HOST.to_owned()],
            mirror: Some(images.registry().address()),
            ..options
        })?;
        install(&node)?;
        let outcome = match systemctl(&["start", UNIT]) {
            Ok(_) => test(&node).await,
            Err(error) => Err(error),
        };
        let log = Command::new("journalctl").args(["--no-pager", "--lines=60", "--unit", UNIT]).output()?;
        outcome.with_context(|| {
            format!("the daemon's log ends with\n{}\n", String::from_utf8_lossy(&log.stdout))
        })
    });
}

/// The packaged unit, with nothing changed but the command.
fn install(node: &Node) -> Result<()> {
    let packaged = fs::read_to_string(project_dir().join("config/package/podvisor.service"))?;
    let command = format!(
        "ExecStart={} serve --config {}",
        daemon_program().display(),
        node.configuration_file().display()
    );
    let lines = packaged.lines().map(|line| if line.starts_with("ExecStart=") { &command } else { line });
    let unit: Vec<&str> = lines.collect();
    fs::write(Path::new("/run/systemd/system").join(UNIT), unit.join("\n") + "\n")?;
    systemctl(&["daemon-reload"]).map(drop)
}

pub(crate) fn systemctl(arguments: &[&str]) -> Result<String> {
    let output = Command::new("systemctl").args(arguments).output().context("running systemctl")?;
    let said = String::from_utf8_lossy(&output.stderr).into_owned();
    ensure!(output.status.success(), "systemctl {arguments:?}: {}: {said}", output.status);
    Ok(String::from_utf8_lossy(&output.stdout).trim().to_owned())
}

pub(crate) fn main_pid() -> Result<u32> {
    let pid: u32 = systemctl(&["show", "--property=MainPID", "--value", UNIT])?.parse()?;
    ensure!(pid != 0, "the unit has no process");
    Ok(pid)
}

fn cgroup_of(pid: u32) -> Result<String> {
    let text = fs::read_to_string(format!("/proc/{pid}/cgroup")).context("reading a process's cgroup")?;
    Ok(text.trim().trim_start_matches("0::").to_owned())
}

/// The only process of a cgroup, with when it was started.
pub(crate) fn process_in(cgroup: &str) -> Result<(u32, String)> {
    let path = PathBuf::from(format!("{CGROUPS}{cgroup}/cgroup.procs"));
    let text = fs::read_to_string(&path).with_context(|| format!("reading {}", path.display()))?;
    let first = text.lines().next().with_context(|| format!("no process in {cgroup}"))?;
    let pid: u32 = first.parse()?;
    let stat = fs::read_to_string(format!("/proc/{pid}/stat"))?;
    let fields = stat.rsplit_once(')').map(|(_, rest)| rest).unwrap_or_default();
    Ok((pid, fields.split_whitespace().nth(19).unwrap_or_default().to_owned()))
}

/// Monitors, by the scope that each is in.
pub(crate) fn monitors() -> Vec<String> {
    let entries = fs::read_dir(format!("{CGROUPS}/podvisor.slice")).into_iter().flatten().flatten();
    let names = entries.map(|entry| entry.file_name().display().to_string());
    names.filter(|name| name.starts_with("podvisor-monitor-")).collect()
}

async fn outlive(node: &Node) -> Result<()> {
    let cri = Cri::new(&node.socket())?;
    let told = cri.runtime.clone().runtime_config(RuntimeConfigRequest {}).await?.into_inner();
    ensure!(
        told.linux.is_some_and(|linux| linux.cgroup_driver() == CgroupDriver::Systemd),
        "kubelet is told another cgroup driver"
    );
    ensure!(cgroup_of(main_pid()?)? == format!("/system.slice/{UNIT}"), "the daemon left its unit");

    cri.pull(BUSYBOX).await.context("PullImage")?;
    let mut config = ask::pod("unit", &node.path("logs"));
    config.linux.get_or_insert_default().cgroup_parent = SLICE.to_owned();
    ask::pod_namespaces(&mut config).pid = NamespaceMode::Pod.into();
    fs::create_dir_all(&config.log_directory)?;
    let pod = Pod::known(&cri.run_pod(&config).await.context("RunPodSandbox")?, &config, &cri);
    let mut counting = ask::script("counting", "i=0; while :; do echo $i; i=$((i + 1)); sleep 0.2; done");
    ask::container_namespaces(&mut counting).pid = NamespaceMode::Pod.into();
    ask::resources(&mut counting).memory_limit_in_bytes = 64 << 20;
    let container = pod.start(&counting).await?;

    // The pod's processes below kubelet's slice, in a scope each; their monitor outside of it and of the unit.
    let [init, own] = [&pod.id, &container].map(|id| format!("{SLICE_PATH}/podvisor-{id}.scope"));
    ensure!(
        fs::read_to_string(format!("{CGROUPS}{own}/memory.max"))?.trim() == "67108864",
        "the limit did not reach the scope"
    );
    let running = [process_in(&init)?, process_in(&own)?];
    let monitor = monitor_of(running[0].0)?;
    let monitor_cgroup = cgroup_of(monitor)?;
    ensure!(
        monitor_cgroup.starts_with("/podvisor.slice/podvisor-monitor-"),
        "the pod's monitor is in {monitor_cgroup}"
    );

    for round in ROUNDS {
        unit_goes_through(&cri, &node.socket(), round).await?;
        ensure!([process_in(&init)?, process_in(&own)?] == running, "after {round} other processes run");
        ensure!(cgroup_of(monitor)? == monitor_cgroup, "after {round} the monitor is elsewhere");
        ensure!(cri.output(&container, &["echo", round]).await?.trim() == round);
    }
    let lines = pod.log("counting.log")?.stdout();
    let numbers: Vec<usize> = lines.lines().map(str::parse).collect::<Result<_, _>>()?;
    ensure!(numbers.iter().copied().eq(0..numbers.len()), "the log has a gap: {numbers:?}");

    // Units go with what they were for.
    cri.stop_pod(&pod.id).await.context("StopPodSandbox")?;
    cri.remove_pod(&pod.id).await.context("RemovePodSandbox")?;
    scopes_go().await?;
    ensure!(!Path::new(&format!("/proc/{monitor}")).exists(), "the pod's monitor goes on");
    unit_ends().await
}

/// Restarted, killed, and with systemd reading everything again: afterwards the same processes run in the same places.
const ROUNDS: [&str; 3] = ["restart", "kill", "daemon-reexec"];

async fn unit_goes_through(cri: &Cri, socket: &Path, round: &str) -> Result<()> {
    let before = main_pid()?;
    match round {
        "restart" => systemctl(&["restart", UNIT])?,
        "kill" => systemctl(&["kill", "--kill-who=main", "--signal=KILL", UNIT])?,
        _ => systemctl(&["daemon-reexec"])?,
    };
    if round == "daemon-reexec" {
        return Ok(());
    }
    if round == "kill" {
        // systemd has its socket: who comes before the next daemon does is served by that one.
        eventually("there is no daemon", || async {
            ensure!(systemctl(&["show", "--property=MainPID", "--value", UNIT])? == "0", "there is one");
            Ok(())
        })
        .await?;
        Cri::new(socket)?.version().await.context("asked while there was no daemon")?;
        ensure!(main_pid()? != before, "it is still process {before}");
        return Ok(());
    }
    eventually("the unit has a new process that serves", || async {
        ensure!(main_pid()? != before, "it is still process {before}");
        Ok(cri.version().await?)
    })
    .await
    .map(drop)
}

async fn scopes_go() -> Result<()> {
    eventually("the scopes go", || async {
        let left = systemctl(&["list-units", "--all", "--plain", "--no-legend", "podvisor-*.scope"])?;
        let left: Vec<&str> = left.lines().filter(|unit| !unit.starts_with("podvisor-monitor-")).collect();
        ensure!(left.is_empty(), "left: {left:?}");
        Ok(())
    })
    .await
}

async fn unit_ends() -> Result<()> {
    systemctl(&["stop", UNIT])?;
    eventually("the waiting monitors go", || async {
        let left = monitors();
        ensure!(left.is_empty(), "left: {left:?}");
        Ok(())
    })
    .await?;
    let failed = systemctl(&["list-units", "--failed", "--plain", "--no-legend"])?;
    ensure!(!failed.contains("podvisor"), "failed: {failed}");
    fs::remove_file(Path::new("/run/systemd/system").join(UNIT))?;
    systemctl(&["daemon-reload"]).map(drop)
}

/// The processes of a pod's machine, by what they are.
async fn machine(cri: &Cri, pod: &str) -> Result<BTreeSet<u32>> {
    let info: serde_json::Value = serde_json::from_str(&cri.pod_info(pod).await?)?;
    let machine = &info["virtualMachine"];
    let pids = [&info["pid"], &machine["hypervisorPid"], &machine["fileServerPid"]];
    let pids = pids.map(|pid| pid.as_u64().and_then(|pid| u32::try_from(pid).ok()));
    pids.into_iter().collect::<Option<_>>().with_context(|| format!("not all of them are in {info}"))
}

fn processes_in(cgroup: &str) -> Result<BTreeSet<u32>> {
    let path = format!("{CGROUPS}{cgroup}/cgroup.procs");
    let text = fs::read_to_string(&path).with_context(|| format!("reading {path}"))?;
    text.lines().map(|line| Ok(line.parse()?)).collect()
}

async fn machines_outlive(node: &Node) -> Result<()> {
    let cri = Cri::new(&node.socket())?;
    cri.pull(BUSYBOX).await.context("PullImage")?;
    let mut pods = Vec::new();
    // Where kubelet counts the machine to the pod it is below the pod's slice, else beside the monitors.
    for (name, overhead, slice) in [("counted", 256 << 20, SLICE_PATH), ("beside", 0, "/podvisor.slice")] {
        let mut config = ask::pod(name, &node.path("logs"));
        let linux = config.linux.get_or_insert_default();
        linux.cgroup_parent = SLICE.to_owned();
        linux.overhead.get_or_insert_default().memory_limit_in_bytes = overhead;
        fs::create_dir_all(&config.log_directory)?;
        let pod = Pod::known(&cri.run_pod_by(&config, VM).await.context("RunPodSandbox")?, &config, &cri);
        let container = pod.start(&ask::waiting("c")).await?;
        let scope = format!("{slice}/podvisor-{}.scope", pod.id);
        let running = machine(&cri, &pod.id).await?;
        ensure!(processes_in(&scope)? == running, "{scope} has not the processes {running:?}");
        pods.push((pod, container, scope, running));
    }
    for round in ROUNDS {
        unit_goes_through(&cri, &node.socket(), round).await?;
        for (pod, container, scope, running) in &pods {
            ensure!(processes_in(scope)? == *running, "after {round} other processes run in {scope}");
            ensure!(machine(&cri, &pod.id).await? == *running, "after {round} others are told");
            ensure!(cri.output(container, &["echo", round]).await?.trim() == round);
        }
    }
    for (pod, ..) in &pods {
        cri.stop_pod(&pod.id).await.context("StopPodSandbox")?;
        cri.remove_pod(&pod.id).await.context("RemovePodSandbox")?;
    }
    scopes_go().await?;
    for (.., running) in &pods {
        let left: Vec<_> = running.iter().filter(|pid| Path::new(&format!("/proc/{pid}")).exists()).collect();
        ensure!(left.is_empty(), "processes {left:?} go on");
    }
    unit_ends().await
}

/// The process that has started another one.
fn monitor_of(pid: u32) -> Result<u32> {
    let status = fs::read_to_string(format!("/proc/{pid}/status"))?;
    let parent = status.lines().find_map(|line| line.strip_prefix("PPid:")).context("no parent")?;
    Ok(parent.trim().parse()?)
}
