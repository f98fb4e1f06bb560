//! How a sandbox is made: everything it will hold is written down first, then acquired, as much as possible at once.

use std::path::Path;
use std::sync::Arc;

use podvisor_cgroup::Driver;
use podvisor_cgroup::systemd::Scope;
use podvisor_config::trust;
use podvisor_network::namespace::{self, Namespaces};
use podvisor_proto::cri::{self, NamespaceMode};
use podvisor_proto::monitor::reply::Result as Answer;
use podvisor_proto::monitor::request::Verb;
use podvisor_proto::monitor::{Adopt, Shutdown, StartInit, Subscribe};

use super::acquired::Acquisition;
use super::files::files;
use super::record::{Engine, Machine, Phase, PodRecord, ProcessIdentity, VERSION, Wire};
use super::request::{annotation, cgroup_parent, namespace_request, network_sandbox};
use super::resize::Sizes;
use super::sandbox_container;
use super::view::namespace_options;
use super::{share, vm};
use crate::error::{Failure, PodError};
use crate::hooks::told::Told;
use crate::id::PodId;
use crate::monitor::pool::Idle;
use crate::monitor::{Connection, MonitorError};
use crate::node::{Node, now};
use crate::timeline::timed;

/// What a successful launch adds to the record.
#[derive(Debug)]
pub(crate) struct Launched {
    pub(crate) monitor: Idle,
    pub(crate) init: Option<ProcessIdentity>,
    pub(crate) machine: Option<Machine>,
    pub(crate) addresses: Vec<String>,
    pub(crate) cni_result: serde_json::Value,
}

/// The handler for a pod, and the error that says what there is when it gets none.
pub(crate) fn select_handler(
    node: &Node,
    config: &cri::PodSandboxConfig,
    requested: &str,
) -> Result<String, PodError> {
    let options = namespace_options(config);
    let host = NamespaceMode::Node as i32;
    let mut host_namespaces = Vec::new();
    for (name, mode) in [("network", options.network), ("pid", options.pid), ("ipc", options.ipc)] {
        if mode == host {
            host_namespaces.push(name);
        }
    }
    let configuration = node.config();
    let handlers = node.handlers();
    let pod = trust::Pod {
        handler: requested,
        untrusted_workload: annotation(config, "io.kubernetes.cri.untrusted-workload"),
        trusted_sandbox: annotation(config, "io.kubernetes.cri-o.TrustedSandbox"),
        host_namespaces,
        privileged: config
            .linux
            .as_ref()
            .and_then(|linux| linux.security_context.as_ref())
            .is_some_and(|context| context.privileged),
    };
    let offered = trust::Node {
        handlers: &handlers.configured,
        unusable: &handlers.unusable,
        trusted: &configuration.runtime.trusted_handler,
        untrusted: configuration.runtime.untrusted_handler.as_deref(),
        default_trust: configuration.runtime.default_workload_trust,
    };
    Ok(trust::select(&pod, &offered)?.to_owned())
}

/// The record of a sandbox to be: every name in it is already decided.
pub(crate) fn plan(
    node: &Node,
    config: cri::PodSandboxConfig,
    requested_handler: String,
    handler: String,
) -> Result<PodRecord, PodError> {
    let runtime = node
        .engine(&handler)
        .ok_or_else(|| PodError::invalid("runtime_handler", format!("{handler:?} is not configured")))?;
    if runtime.has_sandbox_container() {
        sandbox_container::validate(&handler, &config)?;
    }
    if runtime.vm().is_some() {
        vm::validate(&handler, &config)?;
    }
    // A guest's kernel has no policy, and no process of the host is a container's.
    let selinux = if runtime.vm().is_some() { None } else { node.selinux.of_pod(&config)? };
    let id = PodId::random();
    let options = namespace_options(&config);
    let host_network = options.network == NamespaceMode::Node as i32;
    let host_ipc = options.ipc == NamespaceMode::Node as i32;
    if !host_network {
        node.network.ready().map_err(PodError::NetworkNotReady)?;
    }
    let cgroup_parent = cgroup_parent(&config);
    node.driver.parent(&cgroup_parent)?;

    let directory = node.pod_directory(&id);
    let mut acquired = vec![Acquisition::Directory(directory.clone())];
    if !host_ipc && runtime.vm().is_none() {
        acquired.push(Acquisition::Mount(directory.join("shm")));
    }
    let request = namespaces_of(&runtime, &id, &config)?;
    if request.user.is_some()
        && let Some(why) = node.handlers().without_user_namespaces.get(&handler)
    {
        return Err(PodError::Unsupported(format!(
            "config.linux.security_context.namespace_options.userns_options: \
             handler {handler} cannot run pods with a user namespace: {why}"
        )));
    }
    let planned = Namespaces::planned(&request);
    if planned != Namespaces::default() {
        acquired.push(Acquisition::Namespaces(planned.clone()));
    }
    if let Some(netns) = &planned.net {
        let sandbox = Box::new(network_sandbox(&id, &config, netns, cgroup_parent.clone())?);
        acquired.push(Acquisition::Network { kind: node.network.kind(), sandbox });
    }
    if runtime.vm().is_some() {
        acquired.extend(vm::acquisitions(node, &id, &config));
    } else if let Some(oci) = runtime.oci()
        && oci.sandbox_container
    {
        acquired.extend(sandbox_container::acquisitions(node, oci, id.as_str(), &cgroup_parent));
    } else if options.pid == NamespaceMode::Pod as i32 {
        acquired.push(Acquisition::Cgroup(node.driver.container_cgroup(&cgroup_parent, id.as_str())));
    }
    Ok(PodRecord {
        version: VERSION,
        id,
        boot_id: node.boot_id.clone(),
        created_at: now(),
        requested_handler,
        handler,
        runtime,
        config: Wire(config),
        phase: Phase::Creating,
        addresses: Vec::new(),
        cni_result: serde_json::Value::Null,
        monitor: None,
        init: None,
        machine: None,
        sizes: Sizes::default(),
        selinux,
        acquired,
    })
}

/// The namespaces on the host. A guest has those of its kernel: only what connects it is the host's.
fn namespaces_of(
    engine: &Engine,
    id: &PodId,
    config: &cri::PodSandboxConfig,
) -> Result<namespace::Request, PodError> {
    let mut request = namespace_request(id, config)?;
    if engine.vm().is_some() {
        request.ipc = false;
        request.uts = None;
        request.sysctls.clear();
    }
    Ok(request)
}

/// Acquires what the record names. On error the caller gives back whatever the record names.
pub(crate) async fn launch(
    node: &Arc<Node>,
    record: &PodRecord,
    notices: impl Fn(crate::monitor::Notice) + Send + Sync + 'static,
    told: &Told,
) -> Result<Launched, Failure> {
    let directory = node.pod_directory(&record.id);
    std::fs::create_dir_all(&directory).map_err(|source| PodError::File {
        operation: "make",
        path: directory.clone(),
        source,
    })?;

    let request = namespaces_of(&record.runtime, &record.id, &record.config.0)?;
    let user = request.user;
    let mut request = Some(request);
    // The pod's init is in the pod's user namespace; nothing else has to wait for namespaces.
    if user.is_some() {
        namespaces(request.take()).await?;
    }
    // All to their end, also when one fails: what is half-way cannot be given back.
    let (made, adopted, attachment) = tokio::join!(
        timed("files", &record.id, async {
            let made = match record.runtime.vm() {
                Some(_) => share::make(node, &record.id)
                    .and_then(|()| files(record, &share::files(node, &record.id), user)),
                None => files(record, &directory, user),
            };
            podvisor_fault::point("run.files");
            made
        }),
        adopt(node, record, &directory, notices),
        async {
            timed("namespaces", &record.id, namespaces(request)).await?;
            timed("network", &record.id, connect(node, record)).await
        },
    );
    let (monitor, mut init) = match (made, adopted) {
        (Ok(()), Ok(adopted)) if attachment.is_ok() => adopted,
        (made, adopted) => {
            let error = made.err().or(attachment.err());
            let error = match adopted {
                Ok((monitor, _)) => {
                    dismiss(node, &monitor).await;
                    error
                }
                Err(refused) => error.or(Some(refused)),
            };
            return Err(Arc::new(error.unwrap_or(PodError::TaskGone)));
        }
    };
    let attachment = attachment?;
    let (addresses, cni_result): (Vec<String>, _) = match attachment {
        Some(attachment) => {
            (attachment.addresses.iter().map(ToString::to_string).collect(), attachment.cni_result)
        }
        None => (Vec::new(), serde_json::Value::Null),
    };
    let made = || PodRecord { addresses: addresses.clone(), init, ..record.clone() };
    if let Err(refused) = node.hooks.run_pod(told, made).await {
        dismiss(node, &monitor).await;
        return Err(Arc::new(refused));
    }
    let mut machine = None;
    if let Some(pinned) = record.runtime.vm() {
        match vm::start(node, record, pinned, &monitor.connection).await {
            Ok((process, started)) => (init, machine) = (Some(process), Some(started)),
            Err(error) => {
                dismiss(node, &monitor).await;
                return Err(Arc::new(error));
            }
        }
    }
    if record.runtime.has_sandbox_container() {
        match sandbox_container::start(node, record, &monitor.connection).await {
            Ok(process) => init = Some(process),
            Err(error) => {
                dismiss(node, &monitor).await;
                return Err(Arc::new(error));
            }
        }
    }
    Ok(Launched { monitor, init, machine, addresses, cni_result })
}

/// Ends a monitor that will have no pod after all.
async fn dismiss(node: &Arc<Node>, monitor: &Idle) {
    if let Err(error) = monitor.connection.command(Verb::Shutdown(Shutdown {})).await {
        tracing::debug!(error = crate::error::chain(&error), "a monitor did not shut down by itself");
        crate::monitor::process::kill(monitor.process);
    }
    if let Err(error) = Acquisition::Cgroup(monitor.cgroup.clone()).release(node).await {
        tracing::warn!(error = crate::error::chain(&error), "a monitor's cgroup stays");
    }
}

/// Makes the pod's namespaces, if they are not made yet.
async fn namespaces(request: Option<namespace::Request>) -> Result<(), PodError> {
    let Some(request) = request else { return Ok(()) };
    if request.net || request.ipc || request.uts.is_some() || !request.sysctls.is_empty() {
        tokio::task::spawn_blocking(move || namespace::create(&request))
            .await
            .map_err(|_| PodError::TaskGone)?
            .map_err(refused)?;
        podvisor_fault::point("run.namespaces");
    }
    Ok(())
}

async fn connect(
    node: &Arc<Node>,
    record: &PodRecord,
) -> Result<Option<podvisor_network::Attachment>, PodError> {
    for acquisition in &record.acquired {
        if let Acquisition::Network { sandbox, .. } = acquisition {
            let attached = node.network.setup(sandbox).await.map(Some).map_err(PodError::Network);
            podvisor_fault::point("run.network");
            return attached;
        }
    }
    Ok(None)
}

/// A request for namespaces that cannot be fulfilled is told by the field it came from.
fn refused(error: namespace::NamespaceError) -> PodError {
    use namespace::NamespaceError as E;
    let field = match &error {
        E::SysctlRefused { .. } | E::Sysctl { .. } => "config.linux.sysctls",
        E::HostNameTooLong { .. } | E::HostName { .. } => "config.hostname",
        _ => return PodError::Namespaces(error),
    };
    PodError::invalid(field, crate::error::chain(&error))
}

/// Takes a monitor from the pool, makes it the pod's, and lets it start the pod's init where the pid namespace is shared.
async fn adopt(
    node: &Arc<Node>,
    record: &PodRecord,
    directory: &Path,
    notices: impl Fn(crate::monitor::Notice) + Send + Sync + 'static,
) -> Result<(Idle, Option<ProcessIdentity>), PodError> {
    let mut monitor = timed("monitor", &record.id, living(node, record, directory)).await?;
    // What it has told meanwhile waits here. Of one that has died before, the pod's task hears nothing: it never was the pod's.
    let (_closed, unused) = tokio::sync::mpsc::unbounded_channel();
    let mut news = std::mem::replace(&mut monitor.notices, unused);
    tokio::spawn(async move {
        while let Some(notice) = news.recv().await {
            notices(notice);
        }
    });
    match timed("init", &record.id, init(node, record, &monitor.connection)).await {
        Ok(init) => Ok((monitor, init)),
        Err(error) => {
            dismiss(node, &monitor).await;
            Err(error)
        }
    }
}

/// A monitor that has answered that it is the pod's. Until then it holds nothing of the pod, so that the next one takes the place of one
/// that dies: that it answered a moment ago says nothing about now.
async fn living(node: &Arc<Node>, record: &PodRecord, directory: &Path) -> Result<Idle, PodError> {
    /// A monitor that dies of what it is asked would never end this.
    const DEATHS: u32 = 3;
    let mut deaths = 0;
    loop {
        let monitor = node.monitors.take().await?;
        podvisor_fault::point("run.monitor-taken");
        let Err(error) = claim(node, record, directory, &monitor.connection).await else {
            return Ok(monitor);
        };
        dismiss(node, &monitor).await;
        if !matches!(error, MonitorError::Gone) || deaths == DEATHS {
            return Err(error.into());
        }
        deaths += 1;
        tracing::info!(pod = %record.id, pid = monitor.process.pid, "a monitor has died before it was the pod's: the next one takes its place");
        let socket = node.monitor_socket(&record.id);
        // The socket under its name, and under the one that it has before it can be connected to.
        let unfinished = socket.with_file_name(format!(".monitor.sock.{}", monitor.process.pid));
        for left in [socket, unfinished] {
            let _ = std::fs::remove_file(left);
        }
    }
}

async fn claim(
    node: &Arc<Node>,
    record: &PodRecord,
    directory: &Path,
    connection: &Connection,
) -> Result<(), MonitorError> {
    let netns = record.namespaces().net;
    connection
        .command(Verb::Adopt(Adopt {
            pod_id: record.id.to_string(),
            run_dir: directory.display().to_string(),
            state_dir: node.records.exits(&record.id).display().to_string(),
            network_namespace: netns.map(|path| path.display().to_string()).unwrap_or_default(),
        }))
        .await?;
    podvisor_fault::point("run.adopted");
    connection.command(Verb::Subscribe(Subscribe {})).await
}

async fn init(
    node: &Arc<Node>,
    record: &PodRecord,
    connection: &Connection,
) -> Result<Option<ProcessIdentity>, PodError> {
    let cgroup = record.acquired.iter().find_map(|acquisition| match acquisition {
        Acquisition::Cgroup(path)
            if record.runtime.oci().is_some_and(|runtime| !runtime.sandbox_container) =>
        {
            Some(path)
        }
        _ => None,
    });
    let Some(cgroup) = cgroup else { return Ok(None) };
    let init = start_init(node, record, connection, cgroup).await?;
    podvisor_fault::point("run.init");
    Ok(Some(init))
}

async fn start_init(
    node: &Arc<Node>,
    record: &PodRecord,
    connection: &Connection,
    cgroup: &str,
) -> Result<ProcessIdentity, PodError> {
    let cgroup = node.cgroups.cgroup(cgroup);
    let cgroup_procs = match node.driver {
        Driver::Cgroupfs => {
            cgroup.create()?;
            cgroup.procs_files().iter().map(|path| path.display().to_string()).collect()
        }
        // A scope is made around a process that is there: until then it is where its monitor is, and dies with it.
        Driver::Systemd => Vec::new(),
    };
    let verb = Verb::StartInit(StartInit {
        cgroup_procs,
        // As kubelet's own pause containers have it: the last to go of an ordinary pod.
        oom_score_adj: -998.max(node.host.oom_score_adj_floor.unwrap_or(-998)),
        // Its pid namespace then belongs to the pod's user namespace.
        join_namespaces: record.namespaces().user.iter().map(|path| path.display().to_string()).collect(),
    });
    match connection.call(verb).await? {
        Answer::Started(started) => {
            if node.driver == Driver::Systemd {
                let scope = Scope {
                    name: Driver::scope_name(record.id.as_str()),
                    slice: node.driver.parent(&cgroup_parent(&record.config.0))?,
                    description: format!("init of pod sandbox {}", record.id),
                    pids: vec![started.pid.unsigned_abs()],
                };
                node.systemd.start_scope(&scope).await?;
            }
            Ok(ProcessIdentity { pid: started.pid, start_time: started.start_time })
        }
        _ => Err(MonitorError::Confused { verb: "start init" }.into()),
    }
}
