//! A container's OCI spec: everything on the host that it refers to is looked up or made here, the rules are in `podvisor-spec`.

use std::os::fd::OwnedFd;
use std::path::{Path, PathBuf};

use oci_spec::runtime::Spec;
use podvisor_image_store::Image;
use podvisor_proto::cri::{self, NamespaceMode};
use podvisor_proto::monitor::GuestVolume;
use podvisor_spec::selinux::Confinement;
use podvisor_spec::{Input, NamespacePaths, PodFiles, ResolvedMount};

use super::acquired::Acquisition;
use super::build::container_namespaces;
use super::devices;
use super::record::{ContainerRecord, PodRecord, ProcessIdentity};
use super::request::cgroup_parent;
use super::view::namespace_options;
use super::volumes::{anonymous_volumes, resolve_mounts};
use super::{sandbox_container, share, vm};
use crate::cdi;
use crate::error::PodError;
use crate::node::Node;
use crate::selinux::{LabelError, relabel};

/// A container's spec, and what comes with it.
#[derive(Debug)]
pub(super) struct Specified {
    pub(super) spec: Spec,
    pub(super) user: podvisor_spec::User,
    /// In the memory of the pod's guest.
    pub(super) volumes: Vec<GuestVolume>,
}

/// The OCI spec, with everything on the host that it refers to looked up or made. Blocking.
pub(super) fn specify(
    node: &Node,
    pod: &PodRecord,
    record: &ContainerRecord,
    image: &Image,
    rootfs: PathBuf,
    target: Option<PathBuf>,
    selinux: Confinement,
) -> Result<Specified, PodError> {
    let config = &record.config.0;
    let sandbox = &pod.config.0;
    let directory = node.pod_directory(&pod.id);
    let passwd = read_inside(&rootfs, "etc/passwd");
    let group = read_inside(&rootfs, "etc/group");

    let mut config = config.clone();
    anonymous_volumes(node, pod, record, image, &rootfs, &mut config)?;
    let mut mounts = resolve_mounts(&config.mounts, &record.image_volumes, &node.bundle(&record.id))?;
    relabel_volumes(&config.mounts, &mounts, &selinux)?;
    recursive_read_only(node, pod, &config.mounts)?;
    let devices = devices::resolve(&config.devices)?;

    let in_vm = pod.runtime.vm().is_some();
    let sources = if in_vm {
        vm::share_mounts(node, pod, record, &config.mounts, &mut mounts)?
    } else {
        vm::Sources::default()
    };
    let host = if in_vm { &node.guest } else { &node.host };
    let held = |name: &str| pod.acquired.contains(&Acquisition::Mount(directory.join(name)));
    let shm = if held("shm") { directory.join("shm") } else { PathBuf::from("/dev/shm") };
    let files = if in_vm { share::in_guest("files") } else { directory };
    let parent = cgroup_parent(sandbox);
    let handler_annotations =
        sandbox_container::passed_on(&pod.runtime, sandbox.annotations.iter().chain(&config.annotations));
    let profile = podvisor_spec::seccomp_request(&config)?;
    let capabilities = podvisor_spec::capabilities(&config, host)?;
    let apparmor = if in_vm { vm::apparmor(&config)? } else { node.apparmor.profile(&config)? };
    let seccomp = node.seccomp(&profile, &capabilities)?;
    let limit = node.config().limits.pids;
    let input = Input {
        container_id: record.id.as_str(),
        sandbox_id: pod.id.as_str(),
        config: &config,
        sandbox,
        image: &image.config,
        image_name: config.image.as_ref().map(|image| image.image.as_str()).unwrap_or_default(),
        rootfs: if in_vm { vm::root(&record.id) } else { rootfs },
        namespaces: if in_vm {
            vm::namespace_paths(pod, target)
        } else {
            namespace_paths(pod, &config, target)
        },
        pod_files: PodFiles {
            hostname: Some(files.join("hostname")),
            hosts: Some(files.join("hosts")),
            resolv_conf: Some(files.join("resolv.conf")),
            shm: Some(shm),
        },
        mounts,
        devices,
        passwd: &passwd,
        group: &group,
        host,
        cgroups_path: node.driver.container_path(&parent, record.id.as_str())?,
        seccomp: seccomp.as_ref(),
        apparmor,
        selinux,
        annotations: handler_annotations,
        default_pids: (limit > 0).then_some(limit),
    };
    let mut spec = podvisor_spec::container(&input)?;
    let asked = cdi::asked(&config)?;
    if in_vm {
        vm::in_guest(&mut spec, asked.first().map(ToString::to_string), sources.below)?;
    } else {
        cdi::inject(node, &mut spec, &asked)?;
    }
    if pod.runtime.has_sandbox_container() {
        sandbox_container::share_pid_namespace(pod, &config, &mut spec);
    }
    let user = podvisor_spec::User::of(&spec).unwrap_or(podvisor_spec::User {
        uid: 0,
        gid: 0,
        supplemental_groups: Vec::new(),
    });
    Ok(Specified { spec, user, volumes: sources.volumes })
}

/// Gives volumes that ask for it the label of the container's files. Images are mounted with it.
fn relabel_volumes(
    mounts: &[cri::Mount],
    resolved: &[ResolvedMount],
    selinux: &Confinement,
) -> Result<(), PodError> {
    let (Some(label), true) = (&selinux.files, selinux.relabels()) else { return Ok(()) };
    for (index, (mount, resolved)) in mounts.iter().zip(resolved).enumerate() {
        if mount.selinux_relabel && mount.image.is_none() {
            relabel(&resolved.source, &label.to_string()).map_err(|error| match error {
                LabelError::OfTheMachine(_) => {
                    PodError::invalid(format!("config.mounts[{index}].selinux_relabel"), error.to_string())
                }
                error @ LabelError::Set { .. } => error.into(),
            })?;
        }
    }
    Ok(())
}

/// Refused where kernel or OCI runtime cannot make it (KEP-3857): what is mounted below would be writable.
fn recursive_read_only(node: &Node, pod: &PodRecord, mounts: &[cri::Mount]) -> Result<(), PodError> {
    let Some(index) = mounts.iter().position(|mount| mount.recursive_read_only) else { return Ok(()) };
    match node.handlers().features.get(&pod.handler) {
        Some(features) if features.recursive_read_only_mounts => Ok(()),
        _ => Err(PodError::Unsupported(format!(
            "config.mounts[{index}].recursive_read_only: needs Linux 5.12 and an OCI runtime that lists rro among its features, \
             which handler {} does not",
            pod.handler
        ))),
    }
}

fn namespace_paths(
    pod: &PodRecord,
    config: &cri::ContainerConfig,
    target: Option<PathBuf>,
) -> NamespacePaths {
    let pinned = pod.namespaces();
    let of = |process: ProcessIdentity| PathBuf::from(format!("/proc/{}/ns/pid", process.pid));
    let shared = namespace_options(&pod.config.0).pid == NamespaceMode::Pod as i32;
    let mode = container_namespaces(config).pid;
    let pid = if mode == NamespaceMode::Target as i32 {
        target
    } else if mode == NamespaceMode::Pod as i32 && shared {
        pod.init.map(of)
    } else {
        None
    };
    NamespacePaths { net: pinned.net, ipc: pinned.ipc, uts: pinned.uts, pid, user: pinned.user }
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
