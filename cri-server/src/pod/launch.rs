//! How a sandbox is made: everything it will hold is written down first, then acquired, as much as possible at once.

use std::collections::BTreeMap;
use std::fmt::Write as _;
use std::net::IpAddr;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use podvisor_config::trust;
use podvisor_network::namespace::{self, Namespaces};
use podvisor_network::{PortMapping, Protocol, Sandbox};
use podvisor_proto::cri::{self, NamespaceMode};
use podvisor_proto::monitor::reply::Result as Answer;
use podvisor_proto::monitor::request::Verb;
use podvisor_proto::monitor::{Adopt, Shutdown, StartInit, Subscribe};

use super::acquired::Acquisition;
use super::record::{Phase, PodRecord, ProcessIdentity, VERSION, Wire};
use super::view::namespace_options;
use crate::error::{Failure, PodError};
use crate::id::PodId;
use crate::monitor::pool::Idle;
use crate::monitor::{Connection, MonitorError};
use crate::node::{Node, now};

/// Size of a pod's /dev/shm: what every runtime gives since Docker, 64 MiB.
const SHM_SIZE: &str = "size=67108864";

/// What a successful launch adds to the record.
#[derive(Debug)]
pub(crate) struct Launched {
    pub(crate) monitor: Idle,
    pub(crate) init: Option<ProcessIdentity>,
    pub(crate) addresses: Vec<String>,
    pub(crate) cni_result: serde_json::Value,
}

/// Refuses what cannot become a sandbox.
pub(crate) fn validate(config: &cri::PodSandboxConfig) -> Result<(), PodError> {
    let Some(metadata) = &config.metadata else {
        return Err(PodError::invalid("config.metadata", "must be given"));
    };
    for (field, value, limit) in [
        ("config.metadata.name", &metadata.name, 253),
        ("config.metadata.namespace", &metadata.namespace, 253),
        ("config.metadata.uid", &metadata.uid, 128),
    ] {
        if value.is_empty() && field == "config.metadata.name" {
            return Err(PodError::invalid(field, "must not be empty"));
        }
        if value.len() > limit {
            return Err(PodError::invalid(field, format!("is longer than {limit} bytes")));
        }
        if value.contains(['\0', '/', '\n']) {
            return Err(PodError::invalid(field, "must not contain '/', a line end or NUL"));
        }
    }
    if config.hostname.len() > 64 {
        return Err(PodError::invalid("config.hostname", "is longer than 64 bytes, the kernel's limit"));
    }
    if config.hostname.contains(['\0', '\n', '/']) {
        return Err(PodError::invalid("config.hostname", "must not contain '/', a line end or NUL"));
    }
    if !config.log_directory.is_empty() && !clean_absolute(&config.log_directory) {
        return Err(PodError::invalid("config.log_directory", "must be an absolute path without '..'"));
    }
    for (map, field) in [(&config.labels, "config.labels"), (&config.annotations, "config.annotations")] {
        let size: usize = map.iter().map(|(key, value)| key.len() + value.len()).sum();
        // Kubernetes' own limit for annotations is 256 KiB.
        if size > 1 << 20 {
            return Err(PodError::invalid(field, "is larger than 1 MiB"));
        }
    }
    if let Some(dns) = &config.dns_config {
        for text in dns.servers.iter().chain(&dns.searches).chain(&dns.options) {
            if text.contains(['\n', '\0']) {
                return Err(PodError::invalid("config.dns_config", "must not contain line ends"));
            }
        }
        for server in &dns.servers {
            if server.parse::<IpAddr>().is_err() && !server.contains('%') {
                return Err(PodError::invalid(
                    "config.dns_config.servers",
                    format!("{server:?} is no IP address"),
                ));
            }
        }
    }
    let options = namespace_options(config);
    for (field, mode) in [("network", options.network), ("pid", options.pid), ("ipc", options.ipc)] {
        let known = NamespaceMode::try_from(mode).is_ok();
        let sensible = match field {
            "pid" => mode != NamespaceMode::Target as i32,
            _ => mode == NamespaceMode::Pod as i32 || mode == NamespaceMode::Node as i32,
        };
        if !known || !sensible {
            return Err(PodError::invalid(
                format!("config.linux.security_context.namespace_options.{field}"),
                format!("mode {mode} is not possible for a sandbox"),
            ));
        }
    }
    let security = config.linux.as_ref().and_then(|linux| linux.security_context.as_ref());
    if security.is_some_and(|security| security.run_as_group.is_some() && security.run_as_user.is_none()) {
        return Err(PodError::invalid("config.linux.security_context.run_as_group", "needs run_as_user"));
    }
    if let Some(user) = &options.userns_options {
        if user.mode == NamespaceMode::Pod as i32 {
            return Err(PodError::Unsupported(
                "config.linux.security_context.namespace_options.userns_options: \
                 podvisor does not make user namespaces yet; use mode NODE"
                    .into(),
            ));
        }
        if user.mode != NamespaceMode::Node as i32 {
            return Err(PodError::invalid(
                "config.linux.security_context.namespace_options.userns_options.mode",
                "only POD and NODE are possible",
            ));
        }
    }
    ports(config).map(drop)?;
    bandwidth(config, "kubernetes.io/ingress-bandwidth")?;
    bandwidth(config, "kubernetes.io/egress-bandwidth")?;
    Ok(())
}

fn clean_absolute(path: &str) -> bool {
    let path = Path::new(path);
    path.is_absolute() && !path.components().any(|part| part == std::path::Component::ParentDir)
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

fn annotation<'a>(config: &'a cri::PodSandboxConfig, name: &str) -> Option<&'a str> {
    config.annotations.get(name).map(String::as_str)
}

/// The record of a sandbox to be: every name in it is already decided.
pub(crate) fn plan(
    node: &Node,
    config: cri::PodSandboxConfig,
    requested_handler: String,
    handler: String,
) -> Result<PodRecord, PodError> {
    let runtime = node
        .pinned_runtime(&handler)
        .ok_or_else(|| PodError::invalid("runtime_handler", format!("{handler:?} is not configured")))?;
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
    if !host_ipc {
        acquired.push(Acquisition::Mount(directory.join("shm")));
    }
    let planned = Namespaces::planned(&namespace_request(&id, &config));
    if planned != Namespaces::default() {
        acquired.push(Acquisition::Namespaces(planned.clone()));
    }
    if let Some(netns) = &planned.net {
        let sandbox = Box::new(network_sandbox(&id, &config, netns, cgroup_parent.clone())?);
        acquired.push(Acquisition::Network { kind: node.network.kind(), sandbox });
    }
    if options.pid == NamespaceMode::Pod as i32 {
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
        acquired,
    })
}

pub(crate) fn cgroup_parent(config: &cri::PodSandboxConfig) -> String {
    config.linux.as_ref().map(|linux| linux.cgroup_parent.clone()).unwrap_or_default()
}

/// Acquires what the record names. On error the caller gives back whatever the record names.
pub(crate) async fn launch(
    node: &Arc<Node>,
    record: &PodRecord,
    notices: impl Fn(crate::monitor::Notice) + Send + Sync + 'static,
) -> Result<Launched, Failure> {
    let directory = node.pod_directory(&record.id);
    std::fs::create_dir_all(&directory).map_err(|source| PodError::File {
        operation: "make",
        path: directory.clone(),
        source,
    })?;

    // All to their end, also when one fails: what is half-way cannot be given back.
    let (made, adopted, attachment) = tokio::join!(
        async { files(record, &directory) },
        adopt(node, record, &directory, notices),
        connect(node, record),
    );
    let (monitor, init) = match (made, adopted) {
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
    let (addresses, cni_result) = match attachment {
        Some(attachment) => {
            (attachment.addresses.iter().map(ToString::to_string).collect(), attachment.cni_result)
        }
        None => (Vec::new(), serde_json::Value::Null),
    };
    Ok(Launched { monitor, init, addresses, cni_result })
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

/// Namespaces, then the network into them.
async fn connect(
    node: &Arc<Node>,
    record: &PodRecord,
) -> Result<Option<podvisor_network::Attachment>, PodError> {
    let request = namespace_request(&record.id, &record.config.0);
    if request.net || request.ipc || request.uts.is_some() || !request.sysctls.is_empty() {
        tokio::task::spawn_blocking(move || namespace::create(&request))
            .await
            .map_err(|_| PodError::TaskGone)?
            .map_err(refused)?;
    }
    for acquisition in &record.acquired {
        if let Acquisition::Network { sandbox, .. } = acquisition {
            return node.network.setup(sandbox).await.map(Some).map_err(PodError::Network);
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

/// Takes a monitor from the pool and lets it start the pod's init where the pid namespace is shared.
async fn adopt(
    node: &Arc<Node>,
    record: &PodRecord,
    directory: &Path,
    notices: impl Fn(crate::monitor::Notice) + Send + Sync + 'static,
) -> Result<(Idle, Option<ProcessIdentity>), PodError> {
    let monitor = node.monitors.take().await?;
    let cgroup = monitor.cgroup.clone();
    let (process, connection) = (monitor.process, monitor.connection.clone());
    match prepare(node, record, directory, monitor, notices).await {
        Ok(ready) => Ok(ready),
        Err(error) => {
            let (_closed, notices) = tokio::sync::mpsc::unbounded_channel();
            dismiss(node, &Idle { connection, notices, process, cgroup }).await;
            Err(error)
        }
    }
}

async fn prepare(
    node: &Arc<Node>,
    record: &PodRecord,
    directory: &Path,
    mut monitor: Idle,
    notices: impl Fn(crate::monitor::Notice) + Send + Sync + 'static,
) -> Result<(Idle, Option<ProcessIdentity>), PodError> {
    let connection = monitor.connection.clone();
    let (_closed, unused) = tokio::sync::mpsc::unbounded_channel();
    let mut news = std::mem::replace(&mut monitor.notices, unused);
    tokio::spawn(async move {
        while let Some(notice) = news.recv().await {
            notices(notice);
        }
    });
    let netns = record.acquired.iter().find_map(|acquisition| match acquisition {
        Acquisition::Namespaces(namespaces) => namespaces.net.clone(),
        _ => None,
    });
    connection
        .command(Verb::Adopt(Adopt {
            pod_id: record.id.to_string(),
            run_dir: directory.display().to_string(),
            state_dir: node.records.exits(&record.id).display().to_string(),
            network_namespace: netns.map(|path| path.display().to_string()).unwrap_or_default(),
        }))
        .await?;
    connection.command(Verb::Subscribe(Subscribe {})).await?;
    let init_cgroup = record.acquired.iter().find_map(|acquisition| match acquisition {
        Acquisition::Cgroup(path) => Some(path),
        _ => None,
    });
    let init = match init_cgroup {
        Some(path) => Some(start_init(node, &connection, path).await?),
        None => None,
    };
    Ok((monitor, init))
}

async fn start_init(
    node: &Arc<Node>,
    connection: &Connection,
    cgroup: &str,
) -> Result<ProcessIdentity, PodError> {
    let cgroup = node.cgroups.cgroup(cgroup);
    cgroup.create()?;
    let verb = Verb::StartInit(StartInit {
        cgroup_procs: cgroup.procs_files().iter().map(|path| path.display().to_string()).collect(),
        // As kubelet's own pause containers have it: the last to go of an ordinary pod.
        oom_score_adj: -998.max(node.host.oom_score_adj_floor.unwrap_or(-998)),
        join_namespaces: Vec::new(),
    });
    match connection.call(verb).await? {
        Answer::Started(started) => Ok(ProcessIdentity { pid: started.pid, start_time: started.start_time }),
        _ => Err(MonitorError::Confused { verb: "start init" }.into()),
    }
}

/// Host name, hosts and resolv.conf for containers whose configuration mounts none, and the pod's shared memory.
fn files(record: &PodRecord, directory: &Path) -> Result<(), PodError> {
    let config = &record.config.0;
    let write = |name: &str, text: String| {
        let path = directory.join(name);
        std::fs::write(&path, text).map_err(|source| PodError::File { operation: "write", path, source })
    };
    let hostname = hostname(config);
    write("hostname", format!("{hostname}\n"))?;
    write("hosts", hosts(&hostname))?;
    write("resolv.conf", resolv_conf(config))?;
    if !config.log_directory.is_empty() {
        let path = PathBuf::from(&config.log_directory);
        std::fs::create_dir_all(&path).map_err(|source| PodError::File {
            operation: "make log directory",
            path,
            source,
        })?;
    }
    let shm = directory.join("shm");
    if record.acquired.contains(&Acquisition::Mount(shm.clone())) {
        use rustix::mount::MountFlags;
        std::fs::create_dir_all(&shm).map_err(|source| PodError::File {
            operation: "make",
            path: shm.clone(),
            source,
        })?;
        let data = std::ffi::CString::new(format!("mode=1777,{SHM_SIZE}")).expect("no NUL in it");
        let flags = MountFlags::NOSUID | MountFlags::NODEV | MountFlags::NOEXEC;
        rustix::mount::mount("shm", &shm, "tmpfs", flags, data.as_c_str()).map_err(|error| {
            PodError::File { operation: "mount shared memory at", path: shm.clone(), source: error.into() }
        })?;
    }
    Ok(())
}

/// The host's own hosts file where there is one (kubelet mounts a better one for every pod it makes).
fn hosts(hostname: &str) -> String {
    std::fs::read_to_string("/etc/hosts")
        .unwrap_or_else(|_| format!("127.0.0.1\tlocalhost\n::1\tlocalhost\n127.0.1.1\t{hostname}\n"))
}

fn resolv_conf(config: &cri::PodSandboxConfig) -> String {
    let Some(dns) = &config.dns_config else {
        return std::fs::read_to_string("/etc/resolv.conf").unwrap_or_default();
    };
    let mut text = String::new();
    // In the order in which resolv.conf(5) has them and kubelet compares them.
    if !dns.searches.is_empty() {
        let _ = writeln!(text, "search {}", dns.searches.join(" "));
    }
    for server in &dns.servers {
        let _ = writeln!(text, "nameserver {server}");
    }
    if !dns.options.is_empty() {
        let _ = writeln!(text, "options {}", dns.options.join(" "));
    }
    text
}

/// The name the pod's containers see.
pub(crate) fn hostname(config: &cri::PodSandboxConfig) -> String {
    if config.hostname.is_empty() || namespace_options(config).network == NamespaceMode::Node as i32 {
        rustix::system::uname().nodename().to_string_lossy().into_owned()
    } else {
        config.hostname.clone()
    }
}

/// The namespaces that a sandbox gets of its own. With the host's network it keeps the host's name too.
fn namespace_request(id: &PodId, config: &cri::PodSandboxConfig) -> namespace::Request {
    let options = namespace_options(config);
    let own = |mode: i32| mode != NamespaceMode::Node as i32;
    let sysctls = config.linux.as_ref().map(|linux| linux.sysctls.clone()).unwrap_or_default();
    namespace::Request {
        name: format!("podvisor-{id}"),
        net: own(options.network),
        ipc: own(options.ipc),
        uts: own(options.network).then(|| hostname(config)),
        sysctls: sysctls.into_iter().collect::<BTreeMap<_, _>>(),
    }
}

fn network_sandbox(
    id: &PodId,
    config: &cri::PodSandboxConfig,
    netns: &Path,
    cgroup_parent: String,
) -> Result<Sandbox, PodError> {
    let metadata = config.metadata.clone().unwrap_or_default();
    let dns = config.dns_config.clone().unwrap_or_default();
    Ok(Sandbox {
        id: id.to_string(),
        name: metadata.name,
        namespace: metadata.namespace,
        uid: metadata.uid,
        netns: netns.to_owned(),
        cgroup_parent,
        ports: ports(config)?,
        ingress_bandwidth: bandwidth(config, "kubernetes.io/ingress-bandwidth")?,
        egress_bandwidth: bandwidth(config, "kubernetes.io/egress-bandwidth")?,
        dns_servers: dns.servers,
        dns_searches: dns.searches,
        dns_options: dns.options,
    })
}

/// Host ports of a configuration; entries without one only document the container's port.
fn ports(config: &cri::PodSandboxConfig) -> Result<Vec<PortMapping>, PodError> {
    let mut ports = Vec::new();
    for (index, mapping) in config.port_mappings.iter().enumerate() {
        let field = |name: &str| format!("config.port_mappings[{index}].{name}");
        let number = |name: &str, value: i32| {
            u16::try_from(value)
                .map_err(|_| PodError::invalid(field(name), format!("{value} is no port (0 to 65535)")))
        };
        let (container_port, host_port) =
            (number("container_port", mapping.container_port)?, number("host_port", mapping.host_port)?);
        let protocol = match cri::Protocol::try_from(mapping.protocol) {
            Ok(cri::Protocol::Tcp) => Protocol::Tcp,
            Ok(cri::Protocol::Udp) => Protocol::Udp,
            Ok(cri::Protocol::Sctp) => Protocol::Sctp,
            Err(_) => {
                return Err(PodError::invalid(field("protocol"), "only TCP, UDP and SCTP are known"));
            }
        };
        let host_ip = match mapping.host_ip.as_str() {
            "" => None,
            text => Some(
                text.parse::<IpAddr>()
                    .map_err(|_| PodError::invalid(field("host_ip"), format!("{text:?} is no IP address")))?,
            )
            .filter(|address| !address.is_unspecified()),
        };
        if host_port != 0 {
            if container_port == 0 {
                return Err(PodError::invalid(field("container_port"), "must not be 0"));
            }
            ports.push(PortMapping { protocol, container_port, host_port, host_ip });
        }
    }
    Ok(ports)
}

/// A bandwidth annotation: a Kubernetes quantity of bits per second.
fn bandwidth(config: &cri::PodSandboxConfig, name: &str) -> Result<Option<u64>, PodError> {
    let Some(text) = annotation(config, name) else { return Ok(None) };
    let field = format!("config.annotations[{name:?}]");
    let digits = text.find(|c: char| !c.is_ascii_digit()).unwrap_or(text.len());
    let factor: u64 = match &text[digits..] {
        "" => 1,
        "k" => 1_000,
        "M" => 1_000_000,
        "G" => 1_000_000_000,
        "T" => 1_000_000_000_000,
        "Ki" => 1 << 10,
        "Mi" => 1 << 20,
        "Gi" => 1 << 30,
        "Ti" => 1 << 40,
        _ => return Err(PodError::invalid(field, format!("{text:?} is no quantity, write e.g. 10M"))),
    };
    text[..digits]
        .parse::<u64>()
        .ok()
        .and_then(|number| number.checked_mul(factor))
        .map(Some)
        .ok_or_else(|| PodError::invalid(field, format!("{text:?} is no quantity, write e.g. 10M")))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn config() -> cri::PodSandboxConfig {
        let metadata =
            cri::PodSandboxMetadata { name: "web".into(), namespace: "shop".into(), ..Default::default() };
        cri::PodSandboxConfig { metadata: Some(metadata), ..Default::default() }
    }

    #[test]
    fn a_bad_field_is_named() {
        type Break = fn(&mut cri::PodSandboxConfig);
        let broken: [(&str, Break); 7] = [
            ("config.metadata", |c| c.metadata = None),
            ("config.metadata.name", |c| c.metadata.as_mut().unwrap().name.clear()),
            ("config.hostname", |c| c.hostname = "x".repeat(65)),
            ("config.log_directory", |c| c.log_directory = "logs".into()),
            ("config.log_directory", |c| c.log_directory = "/var/../etc".into()),
            ("config.port_mappings[0].host_port", |c| {
                c.port_mappings = vec![cri::PortMapping { host_port: 70_000, ..Default::default() }];
            }),
            ("config.annotations[\"kubernetes.io/ingress-bandwidth\"]", |c| {
                c.annotations.insert("kubernetes.io/ingress-bandwidth".into(), "fast".into());
            }),
        ];
        assert!(validate(&config()).is_ok());
        for (field, break_it) in broken {
            let mut config = config();
            break_it(&mut config);
            let error = validate(&config).unwrap_err().to_string();
            assert!(error.starts_with(field), "{field}: {error}");
        }
    }

    #[test]
    fn resolv_conf_is_written_in_the_order_of_the_manual() {
        let mut config = config();
        config.dns_config = Some(cri::DnsConfig {
            servers: vec!["10.96.0.10".into(), "fd00::10".into()],
            searches: vec!["shop.svc.cluster.local".into(), "svc.cluster.local".into()],
            options: vec!["ndots:5".into()],
        });
        assert_eq!(
            resolv_conf(&config),
            "search shop.svc.cluster.local svc.cluster.local\nnameserver 10.96.0.10\nnameserver fd00::10\noptions ndots:5\n"
        );
    }

    #[test]
    fn quantities_of_bandwidth() {
        for (text, bits) in
            [("10M", Some(10_000_000)), ("1Ki", Some(1024)), ("8", Some(8)), ("", None), ("-1", None)]
        {
            let mut config = config();
            config.annotations.insert("kubernetes.io/egress-bandwidth".into(), text.into());
            assert_eq!(bandwidth(&config, "kubernetes.io/egress-bandwidth").ok().flatten(), bits, "{text}");
        }
    }
}
