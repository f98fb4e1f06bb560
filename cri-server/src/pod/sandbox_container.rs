//! The sandbox container: for OCI runtimes that have a kernel of their own and keep all containers of a pod in one process
//! (gVisor). It comes first, has the pod's id, and runs the built-in pause from a directory that all pods share; annotations
//! tell the runtime which container is which. Where a pod shares its pid namespace the pause is PID 1 of it.
//!
//! Its process is recorded as the pod's init is: its end is the sandbox's, in a running daemon and after a recovery.

use std::collections::BTreeMap;
use std::fs;
use std::os::unix::fs::PermissionsExt;
use std::path::Path;

use oci_spec::runtime::{LinuxNamespaceType, Spec};
use podvisor_proto::cri::{self, NamespaceMode};
use podvisor_proto::monitor::reply::Result as Answer;
use podvisor_proto::monitor::request::Verb;
use podvisor_proto::monitor::{CreateContainer, DeleteContainer, Place, StartContainer};
use serde_json::json;

use super::acquired::Acquisition;
use super::record::{Engine, PinnedRuntime, PodRecord, ProcessIdentity};
use super::request::cgroup_parent;
use super::view::namespace_options;
use crate::error::PodError;
use crate::id::PodId;
use crate::monitor::{Connection, MonitorError};
use crate::node::Node;

const FIELD: &str = "config.linux.security_context.namespace_options";

/// Refuses a pod that wants of the host what the runtime's own kernel keeps from it.
pub(super) fn validate(handler: &str, config: &cri::PodSandboxConfig) -> Result<(), PodError> {
    let options = namespace_options(config);
    for (name, mode) in [("network", options.network), ("pid", options.pid), ("ipc", options.ipc)] {
        if mode == NamespaceMode::Node as i32 {
            let why = format!(
                "is NODE, but handler {handler:?} runs pods on a kernel of its own (sandbox_container), which cannot \
                 use the host's; give the pod another runtime class"
            );
            return Err(PodError::invalid(format!("{FIELD}.{name}"), why));
        }
    }
    if config.linux.as_ref().is_some_and(|linux| !linux.sysctls.is_empty()) {
        let why = format!(
            "cannot be set with handler {handler:?}, which runs pods on a kernel of its own (sandbox_container); give the \
             pod another runtime class"
        );
        return Err(PodError::invalid("config.linux.sysctls", why));
    }
    Ok(())
}

/// The same for a container's pid namespace.
pub(super) fn validate_container(config: &cri::ContainerConfig) -> Result<(), PodError> {
    let mode = super::build::container_namespaces(config).pid;
    let what = if mode == NamespaceMode::Node as i32 {
        "NODE, but the pod runs on a kernel of its own"
    } else if mode == NamespaceMode::Target as i32 {
        "TARGET, but the pod's OCI runtime can join only a pid namespace that the whole pod shares"
    } else {
        return Ok(());
    };
    Err(PodError::invalid(format!("{FIELD}.pid"), format!("is {what}")))
}

/// What is held for it.
pub(super) fn acquisitions(node: &Node, runtime: &PinnedRuntime, id: &str, parent: &str) -> [Acquisition; 2] {
    [
        Acquisition::Cgroup(node.driver.container_cgroup(parent, id)),
        Acquisition::SandboxContainer { runtime: Box::new(runtime.clone()), id: id.to_owned() },
    ]
}

/// Makes and starts it. The pod's network must be there: the runtime takes it over as it finds it.
pub(super) async fn start(
    node: &Node,
    record: &PodRecord,
    monitor: &Connection,
) -> Result<ProcessIdentity, PodError> {
    let bundle = node.pod_directory(&record.id).join("sandbox");
    let rootfs = node.run.join("pause");
    let failed = |path: &Path| {
        let path = path.to_owned();
        |source| PodError::File { operation: "make", path, source }
    };
    place_program(&rootfs, &record.id).map_err(failed(&rootfs))?;
    let spec = specification(node, record, &rootfs)?;
    fs::create_dir_all(&bundle).map_err(failed(&bundle))?;
    let file = bundle.join("config.json");
    fs::write(&file, spec.to_string()).map_err(failed(&file))?;

    let id = record.id.to_string();
    let create = Verb::CreateContainer(CreateContainer {
        container_id: id.clone(),
        runtime: record
            .runtime
            .oci()
            .map(|runtime| super::build::runtime(runtime, node.config().limits.runtime_timeout)),
        bundle: bundle.display().to_string(),
        place: Place::Sandbox.into(),
        guest: None,
        ..CreateContainer::default()
    });
    let Answer::Started(started) = monitor.call(create).await? else {
        return Err(MonitorError::Confused { verb: "create container" }.into());
    };
    let start = Verb::StartContainer(StartContainer { container_id: id.clone() });
    if let Err(error) = monitor.command(start).await {
        // What it leaves undone the release of the acquisition does.
        let delete = Verb::DeleteContainer(DeleteContainer { container_id: id });
        if let Err(further) = monitor.command(delete).await {
            tracing::debug!(
                error = crate::error::chain(&further),
                "a failed sandbox container stays for now"
            );
        }
        return Err(error.into());
    }
    Ok(ProcessIdentity { pid: started.pid, start_time: started.start_time })
}

/// The directory with the pause, which no pod can write to.
fn place_program(rootfs: &Path, pod: &PodId) -> std::io::Result<()> {
    let program = rootfs.join("pause");
    if program.exists() {
        return Ok(());
    }
    let bytes = crate::pause_program::program().ok_or_else(|| {
        std::io::Error::new(std::io::ErrorKind::Unsupported, "the built-in pause is written for x86_64 only")
    })?;
    for directory in ["proc", "dev"] {
        fs::create_dir_all(rootfs.join(directory))?;
    }
    // Several pods may be the first at once: whole or not at all, and the last one wins.
    let part = rootfs.join(format!(".{pod}"));
    fs::write(&part, bytes)?;
    fs::set_permissions(&part, fs::Permissions::from_mode(0o555))?;
    fs::rename(&part, &program)
}

/// Its OCI spec: nobody's user with no rights in a pod's namespaces. The limits are the pod's cgroup's.
fn specification(node: &Node, record: &PodRecord, rootfs: &Path) -> Result<serde_json::Value, PodError> {
    let config = &record.config.0;
    let id = record.id.as_str();
    let mut namespaces = vec![json!({"type": "pid"}), json!({"type": "mount"})];
    let pinned = record.acquired.iter().find_map(|acquisition| match acquisition {
        Acquisition::Namespaces(namespaces) => Some(namespaces),
        _ => None,
    });
    if let Some(pinned) = pinned {
        for (kind, path) in [("network", &pinned.net), ("ipc", &pinned.ipc), ("uts", &pinned.uts)] {
            if let Some(path) = path {
                namespaces.push(json!({"type": kind, "path": path}));
            }
        }
    }
    let metadata = config.metadata.clone().unwrap_or_default();
    let mut annotations = passed_on(&record.runtime, config.annotations.iter());
    for (key, value) in [
        ("container-type", "sandbox"),
        ("sandbox-id", id),
        ("sandbox-name", &metadata.name),
        ("sandbox-namespace", &metadata.namespace),
        ("sandbox-uid", &metadata.uid),
    ] {
        annotations.insert(format!("io.kubernetes.cri.{key}"), value.to_owned());
    }
    let nothing: [&str; 0] = [];
    Ok(json!({
        "ociVersion": "1.0.2",
        "process": {
            "user": {"uid": 65535, "gid": 65535},
            "args": ["/pause"],
            "env": nothing,
            "cwd": "/",
            "noNewPrivileges": true,
            "capabilities": {"bounding": nothing, "effective": nothing, "permitted": nothing},
        },
        "root": {"path": rootfs, "readonly": true},
        "hostname": config.hostname,
        "mounts": [
            {"destination": "/proc", "type": "proc", "source": "proc", "options": ["nosuid", "noexec", "nodev"]},
            {"destination": "/dev", "type": "tmpfs", "source": "tmpfs", "options": ["nosuid", "mode=755"]},
        ],
        "annotations": annotations,
        "linux": {
            "namespaces": namespaces,
            "cgroupsPath": node.driver.container_path(&cgroup_parent(config), id)?,
        },
    }))
}

/// A path means nothing to a kernel that is not the host's: containers that are to share the pod's pid namespace share the
/// sandbox's by having none in their spec.
pub(super) fn share_pid_namespace(pod: &PodRecord, config: &cri::ContainerConfig, spec: &mut Spec) {
    let shared = |options: &cri::NamespaceOption| options.pid == NamespaceMode::Pod as i32;
    if shared(&namespace_options(&pod.config.0))
        && shared(&super::build::container_namespaces(config))
        && let Some(linux) = spec.linux_mut()
        && let Some(namespaces) = linux.namespaces_mut()
    {
        namespaces.retain(|namespace| namespace.typ() != LinuxNamespaceType::Pid);
    }
}

/// The annotations that the handler lets through to its runtime.
pub(super) fn passed_on<'a>(
    runtime: &Engine,
    annotations: impl Iterator<Item = (&'a String, &'a String)>,
) -> BTreeMap<String, String> {
    annotations
        .filter(|(name, _)| {
            runtime.oci().into_iter().flat_map(|runtime| &runtime.annotations).any(|pattern| {
                match pattern.strip_suffix('*') {
                    Some(prefix) => name.starts_with(prefix),
                    None => *name == pattern,
                }
            })
        })
        .map(|(name, value)| (name.clone(), value.clone()))
        .collect()
}
