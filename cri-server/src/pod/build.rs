//! How a container is made: root file system, spec, bundle, and the OCI runtime's create through the monitor.

use std::collections::BTreeMap;
use std::os::fd::AsFd;
use std::os::unix::fs::{OpenOptionsExt, PermissionsExt};
use std::path::{Path, PathBuf};
use std::sync::Arc;

use oci_spec::runtime::{LinuxResources, Spec};
use podvisor_image_store::{Image, ImageError, Rootfs};
use podvisor_proto::cri::{self, NamespaceMode};
use podvisor_proto::monitor::reply::Result as Answer;
use podvisor_proto::monitor::request::Verb;
use podvisor_proto::monitor::{CreateContainer, Place, Runtime};
use podvisor_proto::nri::Event;
use podvisor_spec::selinux::Confinement;
use tokio::sync::{mpsc, oneshot};

use super::acquired::Acquisition;
use super::guest_image::{self, GuestImage};
use super::record::{
    ContainerPhase, ContainerRecord, PinnedRuntime, PodRecord, ProcessIdentity, VERSION, Wire,
};
use super::request::cgroup_parent;
use super::signal::stop_signal;
use super::slot::Slot;
use super::specify::{Specified, specify};
use super::state::State;
use super::task::Command;
use super::volumes::volumes;
use super::{image_volumes, share};
use crate::error::PodError;
use crate::hooks::Subject;
use crate::id::ContainerId;
use crate::monitor::{Connection, MonitorError};
use crate::node::{Node, now};
use crate::timeline::{timed, timed_here};

/// A container to be: its record and what was looked up for it.
#[derive(Debug)]
pub(crate) struct Plan {
    pub(crate) record: ContainerRecord,
    image: Image,
    /// Whose pid namespace it joins, for mode TARGET.
    pub(crate) target: Result<Option<PathBuf>, String>,
    /// Nothing in a guest, where there is no policy.
    selinux: Confinement,
    /// What the pod's machine has room for.
    pub(crate) room: guest_image::Room,
}

/// What the making of a container found out.
#[derive(Debug)]
pub(crate) struct Built {
    /// `None`: it is in a guest.
    process: Option<ProcessIdentity>,
    user: (u32, u32, Vec<u32>),
    resources: serde_json::Value,
}

impl Built {
    pub(crate) fn apply(self, record: &mut ContainerRecord) {
        record.process = self.process;
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
    if pod.runtime.has_sandbox_container() {
        super::sandbox_container::validate_container(&config)?;
    }
    if pod.runtime.vm().is_some() {
        super::vm::validate_container(&config)?;
        super::disks::validate(pod, &config.devices)?;
    }
    let selinux = if pod.runtime.vm().is_some() {
        Confinement::default()
    } else {
        node.selinux.of_container(pod.selinux.as_ref(), &pod.config.0, &config)?
    };
    let log_path = log_path(&pod.config.0.log_directory, &config.log_path)?;
    let name = config.image.as_ref().map(|image| image.image.as_str()).unwrap_or_default();
    if name.is_empty() {
        return Err(PodError::invalid("config.image.image", "must not be empty"));
    }
    let image = node.images.get(name).ok_or_else(|| PodError::NoSuchImage(name.to_owned()))?;
    if let Some(kind) = &image.artifact {
        let why = format!(
            "{name:?} is an OCI artifact of type {kind:?}: it can be mounted as a volume (mounts[].image), and holds no program"
        );
        return Err(PodError::invalid("config.image.image", why));
    }
    crate::cdi::asked(&config)?;
    let volumes_of_images = image_volumes::plan(node, &config.mounts)?;

    let id = ContainerId::random();
    let parent = cgroup_parent(&pod.config.0);
    let bundle = node.bundle(&id);
    let cgroup = node.driver.container_cgroup(&parent, id.as_str());
    let mut acquired = vec![
        Acquisition::Directory(bundle.clone()),
        // The runtime's to make and remove, but it may be killed in between.
        Acquisition::Cgroup(cgroup.clone()),
        Acquisition::Directory(volumes(node, pod, &id)),
        Acquisition::Snapshot(id.to_string()),
        Acquisition::Mount(bundle.join("rootfs")),
    ];
    acquired.extend(share::acquisition(pod, &id));
    acquired.extend(volumes_of_images.iter().flat_map(|volume| volume.acquisitions(&id, &bundle)));
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
        image_volumes: volumes_of_images,
        log_path,
        stop_signal,
        process: None,
        user: None,
        resources: serde_json::Value::Null,
        acquired,
    };
    Ok(Plan { record, image, target: Ok(None), selinux, room: guest_image::Room::default() })
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

/// The pid namespace that a container with mode TARGET joins. In a guest the agent finds it by the container's id.
pub(super) fn target_process(
    config: &cri::ContainerConfig,
    containers: &BTreeMap<ContainerId, Slot>,
) -> Result<Option<PathBuf>, String> {
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
        .map(|slot| match slot.record.process {
            Some(process) => PathBuf::from(format!("/proc/{}/ns/pid", process.pid)),
            None => PathBuf::from(slot.record.id.as_str()),
        });
    target.map(Some).ok_or_else(|| {
        format!(
            "container {:?} is not running in this pod: its pid namespace cannot be joined",
            options.target_id
        )
    })
}

pub(super) fn container_namespaces(config: &cri::ContainerConfig) -> cri::NamespaceOption {
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
    subject: Option<Subject>,
    mailbox: &mpsc::UnboundedSender<Command>,
) -> Result<Built, PodError> {
    let Plan { record, image, target, selinux, room } = plan;
    let config = &record.config.0;
    let target = target
        .map_err(|why| PodError::invalid("config.linux.security_context.namespace_options.target_id", why))?;
    let monitor = monitor.ok_or(PodError::Monitor(MonitorError::Gone))?;
    let bundle = node.bundle(&record.id);
    let rootfs = bundle.join("rootfs");

    let snapshot = node.images.prepare(record.id.as_str(), &image.id, false);
    let snapshot = timed("snapshot", &record.id, snapshot).await.map_err(PodError::Image)?;
    let in_memory = guest_image::find(node, pod, &record, &snapshot, room).await?;
    let prepared = image_volumes::prepare(node, &record.id, &record.image_volumes).await?;
    podvisor_fault::point("create.snapshot");
    // What the guest joins itself, the host only looks at.
    let (joins, changes) = (in_memory.is_some(), in_memory.as_ref().and_then(GuestImage::shared));
    let Specified { spec, user, volumes } = {
        let (node, pod, record, image, bundle, rootfs) =
            (node.clone(), pod.clone(), record.clone(), image.clone(), bundle.clone(), rootfs.clone());
        tokio::task::spawn_blocking(move || {
            make_bundle(&bundle, &rootfs)?;
            let label = selinux.files.as_ref().map(ToString::to_string);
            let shown = if joins { snapshot.without_changes() } else { snapshot };
            timed_here("mount", &record.id, || mount(&node, &pod, &shown, &rootfs, label.as_deref()))
                .map_err(PodError::Image)?;
            image_volumes::mount(&node, &pod, &record, &prepared, label.as_deref())?;
            if pod.runtime.vm().is_some() {
                let shared = match &changes {
                    Some(changes) => Some(("changes", changes)),
                    None => (!joins).then_some(("rootfs", &rootfs)),
                };
                shared
                    .map(|(name, source)| share::add_container(&pod, &record.id, name, source))
                    .transpose()?;
            }
            podvisor_fault::point("create.mounted");
            timed_here("specification", &record.id, || {
                let specified = specify(&node, &pod, &record, &image, rootfs, target, selinux)?;
                write_spec(&bundle, &specified.spec)?;
                Ok::<_, PodError>(specified)
            })
        })
        .await
        .map_err(|_| PodError::TaskGone)??
    };
    let mut resources = None;
    let mut seccomp = spec.linux().as_ref().and_then(|linux| linux.seccomp().clone());
    if let Some(subject) = &subject
        && !node.hooks.pass_creation(subject)
        && let Some(adjusted) = Box::pin(node.hooks.create(node, subject, &spec)).await?
    {
        resources = Some(adjusted["linux"]["resources"].clone());
        seccomp = serde_json::from_value(adjusted["linux"]["seccomp"].clone()).unwrap_or(seccomp);
        Box::pin(take_over(node, &record, &spec, adjusted, mailbox)).await?;
    }

    podvisor_fault::point("create.specified");
    let guest = match pod.runtime.vm() {
        Some(_) => {
            Some(super::vm::container(pod, &record, &spec, seccomp.as_ref(), volumes, in_memory.as_ref())?)
        }
        None => None,
    };
    let verb = Verb::CreateContainer(CreateContainer {
        container_id: record.id.to_string(),
        runtime: pod.runtime.oci().map(|pinned| runtime(pinned, node.config().limits.runtime_timeout)),
        bundle: bundle.display().to_string(),
        terminal: config.tty,
        stdin: config.stdin,
        stdin_once: config.stdin_once,
        log_path: record.log_path.clone(),
        log_line: node.config().limits.log_line,
        place: if pod.runtime.has_sandbox_container() { Place::Inside } else { Place::Own }.into(),
        guest,
    });
    let answer = timed("create", &record.id, monitor.call(verb)).await?;
    podvisor_fault::point("create.called");
    let Answer::Started(started) = answer else {
        return Err(MonitorError::Confused { verb: "create container" }.into());
    };
    if let Some(subject) = &subject {
        let pid = started.pid.cast_unsigned();
        node.hooks.done(node, Event::PostCreateContainer, subject, |container| container.pid = pid).await;
    }
    let resources = resources.unwrap_or_else(|| {
        let resources = spec.linux().as_ref().and_then(|linux| linux.resources().as_ref());
        serde_json::to_value(resources).unwrap_or_default()
    });
    Ok(Built {
        process: pod
            .runtime
            .oci()
            .map(|_| ProcessIdentity { pid: started.pid, start_time: started.start_time }),
        user: (user.uid, user.gid, user.supplemental_groups),
        resources,
    })
}

/// Directories that the root of a user namespace can pass, and nobody can list.
fn make_bundle(bundle: &Path, rootfs: &Path) -> Result<(), PodError> {
    std::fs::create_dir_all(rootfs)
        .and_then(|()| std::fs::set_permissions(bundle, std::fs::Permissions::from_mode(0o711)))
        .map_err(|source| PodError::File { operation: "make", path: rootfs.to_owned(), source })
}

/// The environment in a spec may hold secrets.
fn write_private(path: &Path, text: &[u8]) -> std::io::Result<()> {
    use std::io::Write;
    let mut options = std::fs::File::options();
    options.write(true).create(true).truncate(true).mode(0o600).open(path)?.write_all(text)
}

/// Mounts a snapshot, with the ids of the pod's user namespace where it has one and an SELinux label.
pub(super) fn mount(
    node: &Node,
    pod: &PodRecord,
    snapshot: &Rootfs,
    target: &Path,
    label: Option<&str>,
) -> Result<(), ImageError> {
    let Some(path) = pod.namespaces().user else { return node.images.mount(snapshot, target, label) };
    let user = std::fs::File::open(&path).map_err(|source| ImageError::Io {
        operation: "open user namespace",
        path,
        source,
    })?;
    node.images.mount_with_ids(snapshot, target, label, user.as_fd())
}

fn write_spec(bundle: &Path, spec: &impl serde::Serialize) -> Result<(), PodError> {
    let path = bundle.join("config.json");
    let text = serde_json::to_vec(spec).map_err(|error| PodError::File {
        operation: "encode",
        path: path.clone(),
        source: error.into(),
    })?;
    write_private(&path, &text).map_err(|source| PodError::File { operation: "write", path, source })
}

/// Writes the spec as plugins want it; where it names another cgroup, that is recorded before it is made.
async fn take_over(
    node: &Arc<Node>,
    record: &ContainerRecord,
    before: &Spec,
    spec: serde_json::Value,
    mailbox: &mpsc::UnboundedSender<Command>,
) -> Result<(), PodError> {
    let path = spec["linux"]["cgroupsPath"].as_str().unwrap_or_default();
    let present = before.linux().as_ref().and_then(|linux| linux.cgroups_path().as_ref());
    if present.is_none_or(|present| present != Path::new(path)) {
        let cgroup = node.driver.cgroup_of(path)?;
        let (reply, recorded) = oneshot::channel();
        let container = record.id.clone();
        let _ = mailbox.send(Command::Moved { container, cgroup, reply });
        recorded.await.map_err(|_| PodError::TaskGone)?.map_err(|_| PodError::TaskGone)?;
    }
    let bundle = node.bundle(&record.id);
    tokio::task::spawn_blocking(move || write_spec(&bundle, &spec)).await.map_err(|_| PodError::TaskGone)?
}

pub(super) fn runtime(pinned: &PinnedRuntime, seconds: u32) -> Runtime {
    Runtime {
        path: pinned.path.display().to_string(),
        root: pinned.root.display().to_string(),
        arguments: pinned.arguments.clone(),
        systemd_cgroup: pinned.systemd_cgroup,
        timeout_ms: seconds.saturating_mul(1000),
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

/// Resources that undo an update to `refused`, as OCI JSON.
pub(crate) fn resources_taken_back(
    record: &ContainerRecord,
    refused: &serde_json::Value,
) -> Result<serde_json::Value, serde_json::Error> {
    let current: LinuxResources = serde_json::from_value(record.resources.clone())?;
    let refused: LinuxResources = serde_json::from_value(refused.clone())?;
    serde_json::to_value(podvisor_spec::taken_back(&current, &refused))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_log_stays_below_its_directory() {
        assert_eq!(log_path("/var/log/pods/x", "a/0.log").unwrap(), "/var/log/pods/x/a/0.log");
        assert_eq!(log_path("", "a").unwrap(), "");
        for bad in ["../x", "/etc/passwd", "a/../../b"] {
            assert!(log_path("/var/log", bad).is_err(), "{bad}");
        }
    }
}
