//! After a start: records × what is observed → what to do, per pod, in parallel, time-limited. And what to do about a
//! monitor that dies while the daemon lives, which is the same question.
//!
//! | record | observed | action |
//! |---|---|---|
//! | sandbox `Creating` | anything | rolled back; it was never visible |
//! | sandbox `Ready` | monitor answers | taken over, containers compared |
//! | sandbox `Ready` | monitor is dead, or another boot | not ready, containers exited with that reason |
//! | sandbox `Stopped` | – | nothing |
//! | sandbox `Removing` | – | removal goes on |
//! | unreadable | – | not ready, with the reason; can be stopped and removed |
//! | container `Creating` | anything | rolled back |
//! | container `Created`, `Started` | monitor knows it | the monitor's word |
//! | container `Created`, `Started` | monitor does not know it | its exit record, else exited with that reason |
//! | container `Removing` | – | removal goes on |
//!
//! Until a pod has been observed, lists answer what its records say.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use podvisor_network::namespace::{IdRange, UserMappings};
use podvisor_proto::cri;
use podvisor_proto::monitor::reply::Result as Answer;
use podvisor_proto::monitor::request::Verb;
use podvisor_proto::monitor::{self as wire, ListProcesses, ProcessState, Shutdown, Subscribe};

use super::acquired::{Acquisition, release_all};
use super::dismantle::kill_orphan;
use super::image_volumes;
use super::record::{
    ContainerPhase, ContainerRecord, Engine, Phase, PinnedRuntime, PodRecord, ProcessIdentity, VERSION, Wire,
    exit_of,
};
use super::request::{cgroup_parent, network_sandbox};
use super::resize::Sizes;
use super::slot::Slot;
use super::state::{Effect, Event, Exit, State};
use super::task::{self, Beginning, Index, Task};
use super::view::Status;
use super::volumes::volumes;
use crate::id::{ContainerId, PodId};
use crate::monitor::connection::runtime_limit;
use crate::monitor::{Connection, MonitorError, process};
use crate::node::{Node, now};

/// Why nothing of a pod runs any more when the boot id is another one.
const REBOOTED: &str = "the machine was restarted";

/// How long a monitor may take to answer at a start. Lists do not wait for it, and whoever gives up kills the pod: so it is long, for
/// a machine that has more to do than it can.
const PATIENCE: Duration = Duration::from_secs(60);

/// A pod as its records say.
#[derive(Debug)]
pub(crate) struct Found {
    pub(crate) record: PodRecord,
    containers: Vec<(ContainerRecord, State)>,
}

impl Found {
    pub(super) fn status(&self) -> Status {
        match self.record.phase {
            Phase::Creating => Status::Creating,
            Phase::Ready => Status::Ready,
            Phase::Failed { .. } | Phase::Stopped | Phase::Removing => Status::NotReady,
        }
    }

    pub(super) fn slots(&self) -> BTreeMap<ContainerId, Slot> {
        self.containers
            .iter()
            .map(|(record, state)| (record.id.clone(), Slot::new(record.clone(), state.clone())))
            .collect()
    }
}

/// Reads all records and starts a task for each pod.
pub(crate) async fn recover(node: &Arc<Node>, index: &Index) -> std::io::Result<()> {
    let ids = node.records.pods()?;
    let mut sandboxes = Vec::new();
    let (mut containers, mut snapshots, mut cgroups) = (Vec::new(), Vec::new(), Vec::new());
    for id in &ids {
        let found = read(node, id);
        for acquisition in &found.record.acquired {
            match acquisition {
                Acquisition::Network { sandbox, .. } => sandboxes.push((**sandbox).clone()),
                Acquisition::Cgroup(path) => cgroups.push(path.clone()),
                _ => {}
            }
        }
        for (record, _) in &found.containers {
            containers.push(record.id.to_string());
            snapshots.extend(record.acquired.iter().filter_map(|acquisition| match acquisition {
                Acquisition::Snapshot(key) => Some(key.clone()),
                _ => None,
            }));
        }
        // Under the lock: a pod whose removal ends at once takes itself out again.
        let mut pods = index.write().expect("no panic under this lock");
        let pod = task::spawn(node.clone(), index.clone(), Beginning::Recover(Box::new(found)));
        pods.insert(id.clone(), pod);
    }
    tracing::info!(pods = ids.len(), "took over what an earlier daemon left");
    for key in node.images.snapshots() {
        if !snapshots.contains(&key)
            && let Err(error) = node.images.release(&key).await
        {
            tracing::warn!(
                key,
                error = crate::error::chain(&error),
                "cannot release a snapshot without a container"
            );
        }
    }
    node.monitors.sweep_found(&cgroups.iter().map(String::as_str).collect());
    retain_networks(node, sandboxes).await;
    let pods: Vec<_> = ids.iter().map(ToString::to_string).collect();
    sweep(&node.run.join("pods"), &pods);
    sweep(&node.run.join("containers"), &containers);
    Ok(())
}

/// Disconnects pods that are gone. A plugin that hangs holds up the start for a moment only, then it is waited for beside it: what
/// belongs to nobody has been listed by then, new pods are not among it.
async fn retain_networks(node: &Arc<Node>, sandboxes: Vec<podvisor_network::Sandbox>) {
    const MOMENT: Duration = Duration::from_secs(3);
    let node = node.clone();
    let retaining = tokio::spawn(async move {
        if let Err(error) = node.network.retain(&sandboxes).await {
            tracing::warn!(
                error = crate::error::chain(&error),
                "cannot clear the network of pods that are gone"
            );
        }
    });
    if tokio::time::timeout(MOMENT, retaining).await.is_err() {
        tracing::warn!("clearing the network of pods that are gone takes long");
    }
}

/// Directories of pods and containers without a record: only damage can leave them.
fn sweep(directory: &Path, known: &[String]) {
    let Ok(entries) = std::fs::read_dir(directory) else { return };
    for entry in entries.flatten() {
        let name = entry.file_name();
        if known.iter().any(|id| name == id.as_str()) {
            continue;
        }
        let mounts = std::fs::read_to_string("/proc/self/mountinfo").unwrap_or_default();
        let mut points: Vec<_> = mounts
            .lines()
            .filter_map(|line| line.split(' ').nth(4))
            .filter(|point| Path::new(point).starts_with(entry.path()))
            .collect();
        points.sort_unstable();
        for point in points.into_iter().rev() {
            let _ = rustix::mount::unmount(point, rustix::mount::UnmountFlags::DETACH);
        }
        if let Err(error) = std::fs::remove_dir_all(entry.path()) {
            tracing::warn!(path = %entry.path().display(), %error, "cannot remove a directory without a pod");
        }
    }
}

fn read(node: &Node, id: &PodId) -> Found {
    let mut record = node.records.read_pod(id).unwrap_or_else(|error| {
        let why = crate::error::chain(&error);
        tracing::error!(pod = %id, why, "a sandbox's record cannot be read: it can only be stopped and removed");
        unreadable(node, id, why)
    });
    if record.boot_id != node.boot_id && record.phase == Phase::Ready {
        record.phase = Phase::Failed { why: REBOOTED.into() };
        record.addresses.clear();
    }
    let mut containers = Vec::new();
    for container in node.records.containers(id) {
        match node.records.read_container(id, &container) {
            Ok(read) => {
                let state = recorded_state(node, &record, &read);
                containers.push((read, state));
            }
            Err(error) => {
                let why = crate::error::chain(&error);
                tracing::error!(%container, why, "a container's record cannot be read: it can only be stopped and removed");
                containers.push((unreadable_container(node, &record, container), State::Unknown { why }));
            }
        }
    }
    Found { record, containers }
}

/// What the record alone says of a container. After a restart of the machine nothing runs, whatever was recorded.
fn recorded_state(node: &Node, pod: &PodRecord, record: &ContainerRecord) -> State {
    let rebooted = pod.boot_id != node.boot_id;
    let ended =
        |otherwise| node.records.read_exit(&pod.id, record.id.as_str()).map_or(otherwise, State::Exited);
    match &record.phase {
        ContainerPhase::Creating => State::Creating,
        ContainerPhase::Created | ContainerPhase::Started if rebooted => ended(State::Exited(lost(REBOOTED))),
        // Its end could not be written down, and nothing of a stopped sandbox runs.
        ContainerPhase::Created | ContainerPhase::Started
            if matches!(pod.phase, Phase::Stopped | Phase::Removing) =>
        {
            ended(State::Exited(lost("it ended with its sandbox")))
        }
        ContainerPhase::Created => ended(State::Created),
        ContainerPhase::Started => ended(State::Running),
        ContainerPhase::Exited(exit) => State::Exited(exit.clone()),
        ContainerPhase::Removing => State::Exited(
            node.records
                .read_exit(&pod.id, record.id.as_str())
                .unwrap_or_else(|| lost("it was being removed")),
        ),
    }
}

fn lost(message: &str) -> Exit {
    Exit { code: 255, at: now(), reason: "Error".into(), message: message.into() }
}

/// For the name of a pin, which does not depend on them.
const ANY_IDS: UserMappings = {
    let range = IdRange { inside: 0, outside: 0, length: 0 };
    UserMappings { uids: range, gids: range }
};

/// A stand-in for a record that cannot be read, with everything that a pod of this id may hold on this node.
fn unreadable(node: &Node, id: &PodId, why: String) -> PodRecord {
    let directory = node.pod_directory(id);
    let request = podvisor_network::namespace::Request {
        name: format!("podvisor-{id}"),
        net: true,
        ipc: true,
        uts: Some(String::new()),
        user: Some(ANY_IDS),
        ..Default::default()
    };
    let namespaces = podvisor_network::namespace::Namespaces::planned(&request);
    let metadata = cri::PodSandboxMetadata {
        name: format!("unreadable-{id}"),
        uid: id.to_string(),
        namespace: "unknown".into(),
        attempt: 0,
    };
    let config = cri::PodSandboxConfig { metadata: Some(metadata), ..Default::default() };
    let mut acquired = vec![
        Acquisition::Directory(directory.clone()),
        Acquisition::Mount(directory.join("shm")),
        Acquisition::Namespaces(namespaces.clone()),
    ];
    if let Some(netns) = &namespaces.net
        && let Ok(sandbox) = network_sandbox(id, &config, netns, String::new())
    {
        acquired.push(Acquisition::Network { kind: node.network.kind(), sandbox: Box::new(sandbox) });
    }
    let handler = node.config().runtime.trusted_handler.clone();
    PodRecord {
        version: VERSION,
        id: id.clone(),
        boot_id: node.boot_id.clone(),
        created_at: now(),
        requested_handler: String::new(),
        // The likeliest: only asked where the monitor is gone too.
        runtime: node.engine(&handler).unwrap_or_else(|| {
            Engine::Oci(PinnedRuntime {
                path: PathBuf::from("runc"),
                root: PathBuf::from("/nonexistent"),
                arguments: Vec::new(),
                systemd_cgroup: false,
                sandbox_container: false,
                annotations: Vec::new(),
            })
        }),
        handler,
        config: Wire(config),
        phase: Phase::Failed { why },
        addresses: Vec::new(),
        cni_result: serde_json::Value::Null,
        monitor: None,
        init: None,
        machine: None,
        sizes: Sizes::default(),
        selinux: None,
        acquired,
    }
}

fn unreadable_container(node: &Node, pod: &PodRecord, id: ContainerId) -> ContainerRecord {
    let cgroup = node.driver.container_cgroup(&cgroup_parent(&pod.config.0), id.as_str());
    let bundle = node.bundle(&id);
    let metadata = cri::ContainerMetadata { name: format!("unreadable-{id}"), attempt: 0 };
    let mut acquired = vec![
        Acquisition::Directory(bundle.clone()),
        Acquisition::Cgroup(cgroup.clone()),
        Acquisition::Directory(volumes(node, pod, &id)),
        Acquisition::Snapshot(id.to_string()),
        Acquisition::Mount(bundle.join("rootfs")),
    ];
    acquired.extend(image_volumes::of_unreadable(node, &id));
    ContainerRecord {
        version: VERSION,
        config: Wire(cri::ContainerConfig { metadata: Some(metadata), ..Default::default() }),
        phase: ContainerPhase::Started,
        created_at: now(),
        started_at: 0,
        image_id: String::new(),
        image_ref: String::new(),
        image_volumes: Vec::new(),
        log_path: String::new(),
        stop_signal: 15,
        cgroup,
        process: None,
        user: None,
        resources: serde_json::Value::Null,
        acquired,
        id,
    }
}

fn socket(node: &Node, id: &PodId) -> PathBuf {
    node.monitor_socket(id)
}

/// Compares a recovered pod with what there is. First thing its task does.
pub(super) async fn observe(task: &mut Task) {
    let rebooted = task.record.boot_id != task.node.boot_id;
    match &task.record.phase {
        Phase::Creating => {
            task.roll_back("its creation was interrupted", Status::Removed).await;
            return;
        }
        Phase::Stopped | Phase::Removing => {}
        Phase::Ready | Phase::Failed { .. } if rebooted => return after_reboot(task).await,
        Phase::Ready | Phase::Failed { .. } => match reconnect(task).await {
            Ok(processes) => compare(task, &processes).await,
            Err(error) => {
                let why = format!("the pod's monitor is gone: {}", crate::error::chain(&error));
                abandon(task, &why).await;
            }
        },
    }
    // Half-made and half-removed containers.
    let unfinished: Vec<_> = task
        .containers
        .iter()
        .map(|(id, slot)| (id.clone(), slot.record.phase.clone()))
        .filter(|(_, phase)| matches!(phase, ContainerPhase::Creating | ContainerPhase::Removing))
        .collect();
    for (id, phase) in unfinished {
        let event = if phase == ContainerPhase::Creating { Event::CreateFailed } else { Event::Remove };
        task.advance(&id, event, None).await;
    }
}

/// Connects to the pod's monitor and asks what runs.
async fn reconnect(task: &mut Task) -> Result<Vec<wire::Process>, MonitorError> {
    let path = socket(&task.node, &task.record.id);
    let limit = runtime_limit(task.node.config().limits.runtime_timeout);
    let ask = async {
        let (connection, hello) = Connection::open(&path, limit, task.notices()).await?;
        if hello.pod_id != task.record.id.as_str() {
            return Err(MonitorError::Confused { verb: "hello" });
        }
        // News first, then the list: what happens in between comes twice, which is harmless, instead of never.
        connection.command(Verb::Subscribe(Subscribe {})).await?;
        match connection.call(Verb::ListProcesses(ListProcesses {})).await? {
            Answer::Processes(processes) => Ok((connection, hello.pid, processes.processes)),
            _ => Err(MonitorError::Confused { verb: "list processes" }),
        }
    };
    let (connection, pid, processes) = tokio::time::timeout(PATIENCE, ask)
        .await
        .unwrap_or(Err(MonitorError::Silent { verb: "hello", limit: PATIENCE }))?;
    task.monitor = Some(connection);
    task.record.monitor = process::identify(pid).or(task.record.monitor);
    hold_cgroup(task, pid);
    Ok(processes)
}

/// The cgroup of a process of the pod's own is given back with the pod, also where its record could not say so.
fn hold_cgroup(task: &mut Task, pid: i32) {
    let ours = task.node.processes.cgroup_of(std::process::id().cast_signed()).map(|cgroup| cgroup.path());
    let Ok(path) = task.node.processes.cgroup_of(pid).map(|cgroup| cgroup.path()) else { return };
    let held = Acquisition::Cgroup(path.clone());
    // Where leaves cannot be made a monitor stays in the daemon's.
    if path != "/" && ours.is_ok_and(|ours| ours != path) && !task.record.acquired.contains(&held) {
        task.record.acquired.push(held);
    }
}

/// What the process is called whose end is the sandbox's.
pub(super) fn init_name(record: &PodRecord) -> &'static str {
    if record.runtime.vm().is_some() { "the pod's virtual machine" } else { "the pod's init" }
}

/// The monitor's word about each container.
async fn compare(task: &mut Task, processes: &[wire::Process]) {
    let by_id: BTreeMap<&str, &wire::Process> = processes.iter().map(|p| (p.id.as_str(), p)).collect();
    if task.record.init.is_none()
        && let Some(init) = by_id.get(task.record.id.as_str())
    {
        task.record.init = Some(ProcessIdentity { pid: init.pid, start_time: init.start_time });
        hold_cgroup(task, init.pid);
    }
    if let Some(init) = task.record.init {
        match by_id.get(task.record.id.as_str()) {
            Some(found) if found.state() != ProcessState::Exited => {}
            Some(_) | None if process::lives(init) => {}
            Some(found) => {
                let exit = found.exit.unwrap_or_default();
                let id = found.id.clone();
                task.ended(&id, exit_of(exit.code, exit.finished_at, exit.oom_killed, &found.reason)).await;
            }
            None if matches!(task.record.phase, Phase::Ready) => {
                let what = init_name(&task.record);
                task.fail(format!("{what} ended while the daemon was away")).await;
            }
            None => {}
        }
    }
    let ids: Vec<_> = task.containers.keys().cloned().collect();
    for id in ids {
        let Some(slot) = task.containers.get_mut(&id) else { continue };
        if !slot.state.may_run() || slot.state == State::Creating {
            continue;
        }
        let Some(found) = by_id.get(id.as_str()) else {
            let exit = task
                .node
                .records
                .read_exit(&task.record.id, id.as_str())
                .unwrap_or_else(|| lost("the pod's monitor does not know it any more"));
            task.advance(&id, Event::Exited(exit), None).await;
            continue;
        };
        // A guest's pids are no business of the host's.
        if task.record.runtime.oci().is_some() {
            slot.record.process = Some(ProcessIdentity { pid: found.pid, start_time: found.start_time });
        }
        match found.state() {
            ProcessState::Running => slot.state = State::Running,
            // A start was asked for, and may be under way: it goes on (the monitor joins the two). Called off, the container could
            // still begin to run while kubelet, which was told of a failure, makes another one.
            ProcessState::Created if slot.record.phase == ContainerPhase::Started => {
                slot.state = State::Starting { stop: false };
                slot.resumed = true;
                task.perform(&id, Effect::Start);
            }
            ProcessState::Created => {
                slot.state = State::Created;
                slot.record.phase = ContainerPhase::Created;
                slot.record.started_at = 0;
            }
            ProcessState::Exited => {
                let exit = found.exit.unwrap_or_default();
                let exit = exit_of(exit.code, exit.finished_at, exit.oom_killed, &found.reason);
                task.advance(&id, Event::Exited(exit), None).await;
            }
            ProcessState::Creating | ProcessState::Unspecified => {
                slot.state = State::Unknown { why: "the OCI runtime has not finished with it".into() };
            }
        }
    }
}

/// Nothing of a pod survives its monitor or the machine's restart: what still runs is killed and everything reported.
async fn abandon(task: &mut Task, why: &str) {
    tracing::warn!(pod = %task.record.id, why, "a sandbox is not ready any more");
    if let Some(monitor) = task.record.monitor {
        process::kill(monitor);
    }
    if let Some(init) = task.record.init {
        process::kill(init);
    }
    task.monitor = None;
    let ids: Vec<_> = task.containers.keys().cloned().collect();
    for id in ids {
        let Some(slot) = task.containers.get(&id) else { continue };
        if !slot.state.may_run() || slot.state == State::Creating {
            continue;
        }
        let (node, record) = (task.node.clone(), slot.record.clone());
        let _ = tokio::task::spawn_blocking(move || kill_orphan(&node, &record)).await;
        let exit = task
            .node
            .records
            .read_exit(&task.record.id, id.as_str())
            .unwrap_or_else(|| Exit { code: 137, ..lost(why) });
        task.advance(&id, Event::Exited(exit), None).await;
    }
    if matches!(task.record.phase, Phase::Ready) {
        task.fail(why.to_owned()).await;
    }
}

/// Another boot: no process of the pod exists, its network's addresses must be given back at once, kubelet makes a new one.
async fn after_reboot(task: &mut Task) {
    // No identity of a process means anything any more.
    task.record.monitor = None;
    task.record.init = None;
    for slot in task.containers.values_mut() {
        slot.record.process = None;
    }
    abandon(task, REBOOTED).await;
    task.persist_containers().await;
    let mut acquired = std::mem::take(&mut task.record.acquired);
    match release_all(&task.node, &task.record.id, &mut acquired).await {
        Ok(()) => {
            task.record.addresses.clear();
            task.record.phase = Phase::Stopped;
        }
        Err(error) => {
            tracing::warn!(pod = %task.record.id, error = crate::error::chain(&error), "something of a sandbox from before the restart stays until it is removed");
        }
    }
    task.record.acquired = acquired;
    task.status = Status::NotReady;
    if let Err(error) = task.persist().await {
        tracing::error!(pod = %task.record.id, error = crate::error::chain(error.as_ref()), "cannot record a sandbox's state");
    }
    let ids: Vec<_> = task.containers.keys().cloned().collect();
    for id in ids {
        if task.containers[&id].record.phase == ContainerPhase::Creating {
            task.advance(&id, Event::CreateFailed, None).await;
        }
    }
}

/// The connection to the monitor broke while the daemon lives.
pub(super) async fn monitor_lost(task: &mut Task) {
    // A monitor that was told to end does so.
    if task.releasing
        || task.monitor.is_none()
        || matches!(task.record.phase, Phase::Stopped | Phase::Removing | Phase::Creating)
    {
        return;
    }
    task.monitor = None;
    task.node.telemetry.monitor_lost();
    let alive = task.record.monitor.is_some_and(process::lives);
    if alive && let Ok(processes) = reconnect(task).await {
        compare(task, &processes).await;
        return task.publish();
    }
    abandon(task, "the pod's monitor died").await;
    task.publish();
}

/// Ends the monitor of a pod that is rolled back.
pub(super) async fn end_monitor(task: &mut Task) {
    let ending = Ending::of(task);
    task.monitor = None;
    ending.end().await;
    task.record.monitor = None;
    task.record.init = None;
}

/// How a pod's monitor (and with it the pod's init) is brought to its end.
#[derive(Debug)]
pub(super) struct Ending {
    connection: Option<Connection>,
    socket: PathBuf,
    monitor: Option<ProcessIdentity>,
    init: Option<ProcessIdentity>,
    containers: Vec<String>,
    /// It holds the others, so it goes last.
    sandbox_container: Option<String>,
    runtime_limit: Duration,
}

impl Ending {
    pub(super) fn of(task: &Task) -> Self {
        Self {
            connection: task.monitor.clone(),
            socket: socket(&task.node, &task.record.id),
            monitor: task.record.monitor,
            init: task.record.init,
            containers: task.containers.keys().map(ToString::to_string).collect(),
            sandbox_container: task
                .record
                .runtime
                .has_sandbox_container()
                .then(|| task.record.id.to_string()),
            runtime_limit: runtime_limit(task.node.config().limits.runtime_timeout),
        }
    }

    pub(super) async fn end(self) {
        let connection = match self.connection {
            Some(connection) => Some(connection),
            // Not known to this daemon, but it may be there: the record was written before the monitor was adopted.
            None if self.socket.exists() => {
                Connection::open(&self.socket, self.runtime_limit, |_| {}).await.ok().map(|(c, _)| c)
            }
            None => None,
        };
        if let Some(connection) = connection {
            let connection = &connection;
            let delete = |container: String| async move {
                let verb = Verb::DeleteContainer(wire::DeleteContainer { container_id: container.clone() });
                if let Err(error) = connection.command(verb).await
                    && !error.is_not_found()
                {
                    tracing::warn!(%container, error = crate::error::chain(&error), "the monitor could not delete a container");
                }
            };
            // All at once: an OCI runtime that hangs is waited for only once.
            futures_util::future::join_all(self.containers.into_iter().map(delete)).await;
            if let Some(container) = self.sandbox_container {
                delete(container).await;
            }
            match connection.command(Verb::Shutdown(Shutdown {})).await {
                Ok(()) | Err(MonitorError::Gone) => return,
                Err(error) => {
                    tracing::warn!(
                        error = crate::error::chain(&error),
                        "a monitor does not shut down, it is killed"
                    );
                }
            }
        }
        if let Some(monitor) = self.monitor {
            process::kill(monitor);
        }
        if let Some(init) = self.init {
            process::kill(init);
        }
    }
}
