//! How a container is made and unmade: root file system, spec, bundle, and the OCI runtime's create through the monitor.

use std::collections::BTreeMap;
use std::os::fd::OwnedFd;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use oci_spec::image::ImageConfiguration;
use oci_spec::runtime::{LinuxResources, Spec};
use podvisor_image_store::Image;
use podvisor_proto::cri::{self, NamespaceMode};
use podvisor_proto::monitor::reply::Result as Answer;
use podvisor_proto::monitor::request::Verb;
use podvisor_proto::monitor::{CreateContainer, DeleteContainer, Runtime};
use podvisor_spec::{Input, NamespacePaths, PodFiles, ResolvedMount};

use super::acquired::{Acquisition, release_all};
use super::launch::cgroup_parent;
use super::record::{
    ContainerPhase, ContainerRecord, PinnedRuntime, PodRecord, ProcessIdentity, VERSION, Wire,
};
use super::slot::Slot;
use super::state::State;
use super::view::namespace_options;
use super::{devices, record};
use crate::error::PodError;
use crate::id::ContainerId;
use crate::monitor::{Connection, MonitorError};
use crate::node::{Node, now};

/// A container to be: its record and what was looked up for it.
#[derive(Debug)]
pub(crate) struct Plan {
    pub(crate) record: ContainerRecord,
    image: Image,
    /// Whose pid namespace it joins, for mode TARGET.
    pub(crate) target: Result<Option<ProcessIdentity>, String>,
}

/// What the making of a container found out.
#[derive(Debug)]
pub(crate) struct Built {
    process: ProcessIdentity,
    user: (u32, u32, Vec<u32>),
    resources: serde_json::Value,
}

impl Built {
    pub(crate) fn apply(self, record: &mut ContainerRecord) {
        record.process = Some(self.process);
        record.user = Some(self.user);
        record.resources = self.resources;
    }
}

/// Refuses what cannot become a container, and decides every name in its record.
pub(crate) fn plan(node: &Node, pod: &PodRecord, config: cri::ContainerConfig) -> Result<Plan, PodError> {
    let Some(metadata) = &config.metadata else {
        return Err(PodError::invalid("config.metadata", "must be given"));
    };
    if metadata.name.is_empty() || metadata.name.len() > 253 {
        return Err(PodError::invalid("config.metadata.name", "must have 1 to 253 bytes"));
    }
    for (map, field) in [(&config.labels, "config.labels"), (&config.annotations, "config.annotations")] {
        if map.iter().map(|(key, value)| key.len() + value.len()).sum::<usize>() > 1 << 20 {
            return Err(PodError::invalid(field, "is larger than 1 MiB"));
        }
    }
    let log_path = log_path(&pod.config.0.log_directory, &config.log_path)?;
    let name = config.image.as_ref().map(|image| image.image.as_str()).unwrap_or_default();
    if name.is_empty() {
        return Err(PodError::invalid("config.image.image", "must not be empty"));
    }
    let image = node.images.get(name).ok_or_else(|| PodError::NoSuchImage(name.to_owned()))?;

    let id = ContainerId::random();
    let parent = cgroup_parent(&pod.config.0);
    let bundle = node.bundle(&id);
    let cgroup = node.driver.container_cgroup(&parent, id.as_str());
    let acquired = vec![
        Acquisition::Directory(bundle.clone()),
        // The runtime's to make and remove, but it may be killed in between.
        Acquisition::Cgroup(cgroup.clone()),
        Acquisition::Directory(volumes(node, pod, &id)),
        Acquisition::Snapshot(id.to_string()),
        Acquisition::Mount(bundle.join("rootfs")),
    ];
    let stop_signal = stop_signal(&config, &image.config)?;
    let image_ref = image.repo_digests.first().cloned().unwrap_or_else(|| image.id.clone());
    let record = ContainerRecord {
        version: VERSION,
        cgroup,
        id,
        config: Wire(config),
        phase: ContainerPhase::Creating,
        created_at: now(),
        started_at: 0,
        image_id: image.id.clone(),
        image_ref,
        log_path,
        stop_signal,
        process: None,
        user: None,
        resources: serde_json::Value::Null,
        acquired,
    };
    Ok(Plan { record, image, target: Ok(None) })
}

/// Where anonymous volumes (`VOLUME` of the image) of a container live.
fn volumes(node: &Node, pod: &PodRecord, container: &ContainerId) -> PathBuf {
    node.records.pod_dir(&pod.id).join("volumes").join(container.as_str())
}

fn log_path(directory: &str, path: &str) -> Result<String, PodError> {
    if path.is_empty() || directory.is_empty() {
        return Ok(String::new());
    }
    let relative = Path::new(path);
    let plain = relative.components().all(|part| matches!(part, std::path::Component::Normal(_)));
    if !plain {
        return Err(PodError::invalid(
            "config.log_path",
            "must be relative to the sandbox's log directory, without '..'",
        ));
    }
    Ok(Path::new(directory).join(relative).display().to_string())
}

/// The process whose pid namespace a container with mode TARGET joins.
pub(super) fn target_process(
    config: &cri::ContainerConfig,
    containers: &BTreeMap<ContainerId, Slot>,
) -> Result<Option<ProcessIdentity>, String> {
    let options = container_namespaces(config);
    if options.pid != NamespaceMode::Target as i32 {
        return Ok(None);
    }
    let target = options
        .target_id
        .parse::<ContainerId>()
        .ok()
        .and_then(|id| containers.get(&id))
        .filter(|slot| matches!(slot.state, State::Created | State::Running | State::Stopping { .. }))
        .and_then(|slot| slot.record.process);
    target.map(Some).ok_or_else(|| {
        format!(
            "container {:?} is not running in this pod: its pid namespace cannot be joined",
            options.target_id
        )
    })
}

fn container_namespaces(config: &cri::ContainerConfig) -> cri::NamespaceOption {
    config
        .linux
        .as_ref()
        .and_then(|linux| linux.security_context.as_ref())
        .and_then(|context| context.namespace_options.clone())
        .unwrap_or_default()
}

/// Makes the container. On error the caller gives back what the record names.
pub(crate) async fn build(
    node: &Arc<Node>,
    pod: &PodRecord,
    plan: Plan,
    monitor: Option<Connection>,
) -> Result<Built, PodError> {
    let Plan { record, image, target } = plan;
    let config = &record.config.0;
    let target = target
        .map_err(|why| PodError::invalid("config.linux.security_context.namespace_options.target_id", why))?;
    let monitor = monitor.ok_or(PodError::Monitor(MonitorError::Gone))?;
    let bundle = node.bundle(&record.id);
    let rootfs = bundle.join("rootfs");

    let snapshot =
        node.images.prepare(record.id.as_str(), &image.id, false).await.map_err(PodError::Image)?;
    let (spec, user) = {
        let (node, pod, record, image, bundle, rootfs) =
            (node.clone(), pod.clone(), record.clone(), image.clone(), bundle.clone(), rootfs.clone());
        tokio::task::spawn_blocking(move || {
            std::fs::create_dir_all(&rootfs).map_err(|source| PodError::File {
                operation: "make",
                path: rootfs.clone(),
                source,
            })?;
            node.images.mount(&snapshot, &rootfs).map_err(PodError::Image)?;
            let (spec, user) = specify(&node, &pod, &record, &image, rootfs, target)?;
            let path = bundle.join("config.json");
            let text = serde_json::to_vec(&spec).map_err(|error| PodError::File {
                operation: "encode",
                path: path.clone(),
                source: error.into(),
            })?;
            std::fs::write(&path, text).map_err(|source| PodError::File {
                operation: "write",
                path,
                source,
            })?;
            Ok::<_, PodError>((spec, user))
        })
        .await
        .map_err(|_| PodError::TaskGone)??
    };

    let verb = Verb::CreateContainer(CreateContainer {
        container_id: record.id.to_string(),
        runtime: Some(runtime(&pod.runtime)),
        bundle: bundle.display().to_string(),
        terminal: config.tty,
        stdin: config.stdin,
        stdin_once: config.stdin_once,
        log_path: record.log_path.clone(),
    });
    let Answer::Started(started) = monitor.call(verb).await? else {
        return Err(MonitorError::Confused { verb: "create container" }.into());
    };
    let resources = spec.linux().as_ref().and_then(|linux| linux.resources().as_ref());
    Ok(Built {
        process: ProcessIdentity { pid: started.pid, start_time: started.start_time },
        user: (user.uid, user.gid, user.supplemental_groups),
        resources: serde_json::to_value(resources).unwrap_or_default(),
    })
}

fn runtime(pinned: &PinnedRuntime) -> Runtime {
    Runtime {
        path: pinned.path.display().to_string(),
        root: pinned.root.display().to_string(),
        arguments: pinned.arguments.clone(),
        systemd_cgroup: pinned.systemd_cgroup,
        timeout_ms: 0,
    }
}

/// The OCI spec, with everything on the host that it refers to looked up or made. Blocking.
fn specify(
    node: &Node,
    pod: &PodRecord,
    record: &ContainerRecord,
    image: &Image,
    rootfs: PathBuf,
    target: Option<ProcessIdentity>,
) -> Result<(Spec, podvisor_spec::User), PodError> {
    let config = &record.config.0;
    let sandbox = &pod.config.0;
    let directory = node.pod_directory(&pod.id);
    let passwd = read_inside(&rootfs, "etc/passwd");
    let group = read_inside(&rootfs, "etc/group");

    let mut config = config.clone();
    anonymous_volumes(node, pod, record, image, &rootfs, &mut config)?;
    let mounts = resolve_mounts(&config.mounts)?;
    let devices = devices::resolve(&config.devices)?;

    let held = |name: &str| pod.acquired.contains(&Acquisition::Mount(directory.join(name)));
    let shm = if held("shm") { directory.join("shm") } else { PathBuf::from("/dev/shm") };
    let parent = cgroup_parent(sandbox);
    let handler_annotations = sandbox
        .annotations
        .iter()
        .chain(&config.annotations)
        .filter(|(name, _)| {
            pod.runtime.annotations.iter().any(|pattern| match pattern.strip_suffix('*') {
                Some(prefix) => name.starts_with(prefix),
                None => *name == pattern,
            })
        })
        .map(|(name, value)| (name.clone(), value.clone()))
        .collect();
    let profile = podvisor_spec::seccomp_request(&config)?;
    let capabilities = podvisor_spec::capabilities(&config, &node.host)?;
    apparmor(&config)?;
    let seccomp = node.seccomp(&profile, &capabilities)?;
    let limit = node.config().limits.pids;
    let input = Input {
        container_id: record.id.as_str(),
        sandbox_id: pod.id.as_str(),
        config: &config,
        sandbox,
        image: &image.config,
        image_name: config.image.as_ref().map(|image| image.image.as_str()).unwrap_or_default(),
        rootfs,
        namespaces: namespace_paths(pod, &config, target),
        pod_files: PodFiles {
            hostname: Some(directory.join("hostname")),
            hosts: Some(directory.join("hosts")),
            resolv_conf: Some(directory.join("resolv.conf")),
            shm: Some(shm),
        },
        mounts,
        devices,
        passwd: &passwd,
        group: &group,
        host: &node.host,
        cgroups_path: node.driver.container_path(&parent, record.id.as_str())?,
        seccomp: seccomp.as_ref(),
        annotations: handler_annotations,
        default_pids: (limit > 0).then_some(limit),
    };
    let spec = podvisor_spec::container(&input)?;
    let user = podvisor_spec::User::of(&spec).unwrap_or(podvisor_spec::User {
        uid: 0,
        gid: 0,
        supplemental_groups: Vec::new(),
    });
    Ok((spec, user))
}

/// A profile that cannot be enforced is refused, never left out.
fn apparmor(config: &cri::ContainerConfig) -> Result<(), PodError> {
    if let podvisor_spec::SecurityProfile::Localhost(name) = podvisor_spec::apparmor_request(config)? {
        let enabled = std::fs::read_to_string("/sys/module/apparmor/parameters/enabled");
        if !enabled.is_ok_and(|text| text.starts_with('Y')) {
            return Err(PodError::invalid(
                "config.linux.security_context.apparmor",
                format!("profile {name:?} cannot be enforced: this node's kernel has no AppArmor"),
            ));
        }
    }
    Ok(())
}

fn namespace_paths(
    pod: &PodRecord,
    config: &cri::ContainerConfig,
    target: Option<ProcessIdentity>,
) -> NamespacePaths {
    let pinned = pod.acquired.iter().find_map(|acquisition| match acquisition {
        Acquisition::Namespaces(namespaces) => Some(namespaces.clone()),
        _ => None,
    });
    let pinned = pinned.unwrap_or_default();
    let of = |process: ProcessIdentity| PathBuf::from(format!("/proc/{}/ns/pid", process.pid));
    let shared = namespace_options(&pod.config.0).pid == NamespaceMode::Pod as i32;
    let mode = container_namespaces(config).pid;
    let pid = if mode == NamespaceMode::Target as i32 {
        target.map(of)
    } else if mode == NamespaceMode::Pod as i32 && shared {
        pod.init.map(of)
    } else {
        None
    };
    NamespacePaths { net: pinned.net, ipc: pinned.ipc, uts: pinned.uts, pid }
}

/// A small text file of the image, by a path that cannot leave it. Missing or too large: empty.
fn read_inside(rootfs: &Path, path: &str) -> String {
    use rustix::fs::{Mode, OFlags, ResolveFlags, open, openat2};
    use std::io::Read;
    let Ok(root) = open(rootfs, OFlags::PATH | OFlags::DIRECTORY | OFlags::CLOEXEC, Mode::empty()) else {
        return String::new();
    };
    // Not blocking on a fifo that a hostile image has put there.
    let flags = OFlags::RDONLY | OFlags::NONBLOCK | OFlags::CLOEXEC | OFlags::NOCTTY;
    let opened: Result<OwnedFd, _> =
        openat2(&root, path, flags, Mode::empty(), ResolveFlags::IN_ROOT | ResolveFlags::NO_MAGICLINKS);
    let Ok(file) = opened.map(std::fs::File::from) else { return String::new() };
    if !file.metadata().is_ok_and(|metadata| metadata.is_file()) {
        return String::new();
    }
    let mut bytes = Vec::new();
    let _ = file.take(4 << 20).read_to_end(&mut bytes);
    String::from_utf8_lossy(&bytes).into_owned()
}

/// Sources of the mounts: links resolved, missing directories made (as every runtime does for kubelet's hostPath without type).
fn resolve_mounts(mounts: &[cri::Mount]) -> Result<Vec<ResolvedMount>, PodError> {
    let mut resolved = Vec::with_capacity(mounts.len());
    for (index, mount) in mounts.iter().enumerate() {
        let field = format!("config.mounts[{index}].host_path");
        if mount.image.is_some() {
            return Err(PodError::Unsupported(format!(
                "config.mounts[{index}].image: podvisor does not mount images as volumes yet"
            )));
        }
        let path = Path::new(&mount.host_path);
        if !path.is_absolute() {
            return Err(PodError::invalid(field, format!("{:?} is no absolute path", mount.host_path)));
        }
        let source = match path.canonicalize() {
            Ok(source) => source,
            Err(error) if error.kind() == std::io::ErrorKind::NotFound => {
                std::fs::create_dir_all(path).and_then(|()| path.canonicalize()).map_err(|error| {
                    PodError::invalid(&field, format!("cannot make {}: {error}", path.display()))
                })?
            }
            Err(error) => return Err(PodError::invalid(field, format!("{}: {error}", path.display()))),
        };
        resolved.push(ResolvedMount { source });
    }
    Ok(resolved)
}

/// `VOLUME` of the image: a directory of the container's own with the image's content, unless the request mounts something there.
fn anonymous_volumes(
    node: &Node,
    pod: &PodRecord,
    record: &ContainerRecord,
    image: &Image,
    rootfs: &Path,
    config: &mut cri::ContainerConfig,
) -> Result<(), PodError> {
    let declared = image.config.config().as_ref().and_then(|config| config.volumes().clone());
    for (index, path) in declared.unwrap_or_default().iter().enumerate() {
        let wanted = Path::new(path);
        let usable = wanted.is_absolute()
            && !wanted.components().any(|part| part == std::path::Component::ParentDir)
            && wanted.parent().is_some();
        if !usable || config.mounts.iter().any(|mount| Path::new(&mount.container_path) == wanted) {
            continue;
        }
        let directory = volumes(node, pod, &record.id).join(index.to_string());
        let failed = |source| PodError::File { operation: "make volume", path: directory.clone(), source };
        std::fs::create_dir_all(&directory).map_err(failed)?;
        copy_inside(rootfs, wanted, &directory).map_err(failed)?;
        config.mounts.push(cri::Mount {
            container_path: path.clone(),
            host_path: directory.display().to_string(),
            ..Default::default()
        });
    }
    Ok(())
}

/// Copies owner and mode of the image's directory; its content comes with it as far as it is plain files and directories.
fn copy_inside(rootfs: &Path, wanted: &Path, to: &Path) -> std::io::Result<()> {
    use rustix::fs::{Mode, OFlags, ResolveFlags, open, openat2};
    use std::os::unix::fs::{MetadataExt, PermissionsExt};
    let root = open(rootfs, OFlags::PATH | OFlags::DIRECTORY | OFlags::CLOEXEC, Mode::empty())?;
    let flags = OFlags::RDONLY | OFlags::DIRECTORY | OFlags::CLOEXEC;
    let resolve = ResolveFlags::IN_ROOT | ResolveFlags::NO_MAGICLINKS;
    let Ok(from) = openat2(&root, wanted.strip_prefix("/").unwrap_or(wanted), flags, Mode::empty(), resolve)
    else {
        return Ok(());
    };
    let mut pending = vec![(std::fs::File::from(from), to.to_owned())];
    while let Some((from, to)) = pending.pop() {
        let metadata = from.metadata()?;
        std::fs::set_permissions(&to, std::fs::Permissions::from_mode(metadata.mode() & 0o7777))?;
        std::os::unix::fs::chown(&to, Some(metadata.uid()), Some(metadata.gid()))?;
        for entry in rustix::fs::Dir::read_from(&from)?.flatten() {
            let name = entry.file_name();
            if matches!(name.to_bytes(), b"." | b"..") {
                continue;
            }
            let target = to.join(std::ffi::OsStr::new(name.to_str().unwrap_or_default()));
            let flags = OFlags::RDONLY | OFlags::NOFOLLOW | OFlags::NONBLOCK | OFlags::CLOEXEC;
            let Ok(opened) = rustix::fs::openat(&from, name, flags, Mode::empty()) else { continue };
            let mut file = std::fs::File::from(opened);
            let metadata = file.metadata()?;
            if metadata.is_dir() {
                std::fs::create_dir_all(&target)?;
                pending.push((file, target));
            } else if metadata.is_file() {
                std::io::copy(&mut file, &mut std::fs::File::create(&target)?)?;
                std::fs::set_permissions(&target, std::fs::Permissions::from_mode(metadata.mode() & 0o7777))?;
                std::os::unix::fs::chown(&target, Some(metadata.uid()), Some(metadata.gid()))?;
            }
        }
    }
    Ok(())
}

/// The signal that stops the container: of the request, else of the image, else SIGTERM.
fn stop_signal(config: &cri::ContainerConfig, image: &ImageConfiguration) -> Result<i32, PodError> {
    // Values of the CRI's enumeration are not the kernel's numbers; its names are.
    let asked = cri::Signal::try_from(config.stop_signal).map_err(|_| {
        PodError::invalid("config.stop_signal", format!("{} is no signal", config.stop_signal))
    })?;
    if asked != cri::Signal::RuntimeDefault {
        return signal_number(asked.as_str_name())
            .ok_or_else(|| PodError::invalid("config.stop_signal", "no such signal on Linux"));
    }
    let named = image.config().as_ref().and_then(|config| config.stop_signal().clone());
    Ok(named.and_then(|name| signal_number(&name)).unwrap_or(15))
}

/// `SIGTERM`, `TERM`, `15`, `SIGRTMIN+3`.
pub(crate) fn signal_number(name: &str) -> Option<i32> {
    const NAMES: [&str; 31] = [
        "HUP", "INT", "QUIT", "ILL", "TRAP", "ABRT", "BUS", "FPE", "KILL", "USR1", "SEGV", "USR2", "PIPE",
        "ALRM", "TERM", "STKFLT", "CHLD", "CONT", "STOP", "TSTP", "TTIN", "TTOU", "URG", "XCPU", "XFSZ",
        "VTALRM", "PROF", "WINCH", "IO", "PWR", "SYS",
    ];
    // signal(7): glibc keeps 32 and 33 for itself.
    const RTMIN: i32 = 34;
    const RTMAX: i32 = 64;
    if let Ok(number) = name.parse::<i32>() {
        return (1..=RTMAX).contains(&number).then_some(number);
    }
    let name = name.to_ascii_uppercase();
    // The CRI's names begin with SIGNAL_.
    let name = name.strip_prefix("SIGNAL_").unwrap_or(&name);
    let name = name.strip_prefix("SIG").unwrap_or(name);
    let realtime = |offset: Option<&str>, base: i32, sign: i32| {
        let offset = offset?;
        let offset =
            if offset.is_empty() { 0 } else { offset.trim_start_matches(['+', '-']).parse().ok()? };
        Some(base + sign * offset).filter(|number| (RTMIN..=RTMAX).contains(number))
    };
    match name {
        "CLD" => Some(17),
        "POLL" => Some(29),
        "IOT" => Some(6),
        _ => NAMES
            .iter()
            .position(|known| *known == name)
            .and_then(|index| i32::try_from(index + 1).ok())
            .or_else(|| realtime(name.strip_prefix("RTMINPLUS").or(name.strip_prefix("RTMIN")), RTMIN, 1))
            .or_else(|| realtime(name.strip_prefix("RTMAXMINUS").or(name.strip_prefix("RTMAX")), RTMAX, -1)),
    }
}

/// The container's resources with `update` merged over them, as OCI JSON.
pub(crate) fn merge_resources(
    node: &Node,
    record: &ContainerRecord,
    update: &cri::LinuxContainerResources,
) -> Result<serde_json::Value, PodError> {
    let current: LinuxResources = serde_json::from_value(record.resources.clone()).unwrap_or_default();
    let merged = podvisor_spec::resources(&current, update, &node.host)?;
    Ok(serde_json::to_value(merged).unwrap_or_default())
}

/// What it takes to unmake a container.
#[derive(Debug)]
pub(crate) struct Dismantling {
    id: ContainerId,
    runtime: PinnedRuntime,
    cgroup: String,
    process: Option<ProcessIdentity>,
    acquired: Vec<Acquisition>,
    pod: crate::id::PodId,
}

impl Dismantling {
    pub(crate) fn of(pod: &PodRecord, container: &ContainerRecord) -> Self {
        Self {
            id: container.id.clone(),
            runtime: pod.runtime.clone(),
            cgroup: container.cgroup.clone(),
            process: container.process,
            acquired: container.acquired.clone(),
            pod: pod.id.clone(),
        }
    }

    /// Kills what runs, deletes it in the runtime, gives everything back, forgets the record. Idempotent.
    pub(crate) async fn run(mut self, node: &Arc<Node>, monitor: Option<Connection>) -> Result<(), PodError> {
        let asked = match &monitor {
            Some(monitor) => {
                let verb = Verb::DeleteContainer(DeleteContainer { container_id: self.id.to_string() });
                monitor.command(verb).await
            }
            None => Err(MonitorError::Gone),
        };
        match asked {
            Ok(()) => {}
            Err(error) if error.is_not_found() => {}
            Err(MonitorError::Gone | MonitorError::Connect { .. }) => self.without_monitor(node).await?,
            Err(error) => return Err(error.into()),
        }
        release_all(node, &mut self.acquired).await?;
        let records = node.records.clone();
        tokio::task::spawn_blocking(move || records.remove_container(&self.pod, &self.id))
            .await
            .map_err(|_| PodError::TaskGone)??;
        Ok(())
    }

    /// There is nobody left to ask: kill by cgroup and identity, and let the runtime forget its state.
    async fn without_monitor(&self, node: &Arc<Node>) -> Result<(), PodError> {
        if let Some(process) = self.process {
            crate::monitor::process::kill(process);
        }
        let cgroup = node.cgroups.cgroup(&self.cgroup);
        if cgroup.exists() {
            tokio::task::spawn_blocking(move || cgroup.kill()).await.map_err(|_| PodError::TaskGone)??;
        }
        let state = self.runtime.root.join(self.id.as_str());
        if state.exists() {
            let mut command = tokio::process::Command::new(&self.runtime.path);
            command.args(&self.runtime.arguments).arg("--root").arg(&self.runtime.root);
            if self.runtime.systemd_cgroup {
                command.arg("--systemd-cgroup");
            }
            command.args(["delete", "--force", self.id.as_str()]).stdin(std::process::Stdio::null());
            command.kill_on_drop(true);
            let limit = std::time::Duration::from_secs(30);
            match tokio::time::timeout(limit, command.output()).await {
                Ok(Ok(output)) if output.status.success() || !state.exists() => {}
                Ok(Ok(output)) => {
                    let text = String::from_utf8_lossy(&output.stderr);
                    tracing::warn!(container = %self.id, error = %text.trim(), "the runtime could not delete a container");
                }
                Ok(Err(error)) => {
                    tracing::warn!(container = %self.id, %error, "the runtime cannot be called");
                }
                Err(_) => {
                    tracing::warn!(container = %self.id, "the runtime hangs while deleting a container");
                }
            }
        }
        // What the runtime could not remove.
        let cgroup = node.cgroups.cgroup(&self.cgroup);
        if cgroup.exists() {
            tokio::task::spawn_blocking(move || cgroup.remove()).await.map_err(|_| PodError::TaskGone)??;
        }
        Ok(())
    }
}

/// Kills whatever a container left running although its monitor is gone.
pub(crate) fn kill_orphan(node: &Node, record: &record::ContainerRecord) {
    if let Some(process) = record.process {
        crate::monitor::process::kill(process);
    }
    let cgroup = node.cgroups.cgroup(&record.cgroup);
    if cgroup.exists()
        && let Err(error) = cgroup.kill()
    {
        tracing::warn!(container = %record.id, error = crate::error::chain(&error), "cannot kill an orphaned container");
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn signals_by_name_and_number() {
        for (name, number) in [
            ("SIGTERM", Some(15)),
            ("quit", Some(3)),
            ("9", Some(9)),
            ("SIGRTMIN+3", Some(37)),
            ("SIGRTMAX-1", Some(63)),
            ("SIGRTMINPLUS3", Some(37)),
            ("SIGRTMIN", Some(34)),
            ("0", None),
            ("65", None),
            ("SIGNOTHING", None),
            ("SIGRTMIN+31", None),
        ] {
            assert_eq!(signal_number(name), number, "{name}");
        }
    }

    #[test]
    fn every_signal_of_the_cri_has_a_number() {
        for value in 1..80 {
            if let Ok(signal) = cri::Signal::try_from(value) {
                assert!(signal_number(signal.as_str_name()).is_some(), "{}", signal.as_str_name());
            }
        }
    }

    #[test]
    fn a_log_stays_below_its_directory() {
        assert_eq!(log_path("/var/log/pods/x", "a/0.log").unwrap(), "/var/log/pods/x/a/0.log");
        assert_eq!(log_path("", "a").unwrap(), "");
        for bad in ["../x", "/etc/passwd", "a/../../b"] {
            assert!(log_path("/var/log", bad).is_err(), "{bad}");
        }
    }
}
