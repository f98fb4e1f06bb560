//! A pod in a virtual machine of its own: what cannot be asked for then, how large the machine is, and how it is started.
//!
//! The machine is a process of the pod as its init is: its end is the sandbox's, in a running daemon and after a recovery.

use std::os::fd::AsFd;
use std::os::unix::fs::FileTypeExt;
use std::path::{Path, PathBuf};

use oci_spec::runtime::{LinuxNamespaceType, LinuxSeccomp, Mount, MountBuilder, Spec};
use podvisor_cgroup::Driver;
use podvisor_cgroup::systemd::Scope;
use podvisor_network::tap::GuestInterface;
use podvisor_proto::agent::{self, AddInterface, AddRoot, Neighbour, Personalise, Route, Seccomp, add_root};
use podvisor_proto::cri::{self, NamespaceMode};
use podvisor_proto::hypervisor::{Network, Start};
use podvisor_proto::monitor::reply::Result as Answer;
use podvisor_proto::monitor::request::Verb;
use podvisor_proto::monitor::{FileServer, GuestContainer, GuestVolume, ResizeVm, StartVm, VmStarted};
use podvisor_seccomp::Compiled;
use podvisor_spec::{Ids, NamespacePaths, ResolvedMount, UserNamespace};

use super::acquired::Acquisition;
use super::guest_image::GuestImage;
use super::huge_pages::HugePages;
use super::record::{ContainerRecord, Machine, PinnedVm, PodRecord, ProcessIdentity};
use super::request::{cgroup_parent, hostname, user_namespace};
use super::view::namespace_options;
use super::{disks, guest_volumes, share, shared_volumes};
use crate::error::PodError;
use crate::id::{ContainerId, PodId};
use crate::monitor::process::identify;
use crate::monitor::{Connection, MonitorError};
use crate::mount_attr::Attributes;
use crate::mount_table;
use crate::node::Node;
use crate::timeline::timed;

const FIELD: &str = "config.linux.security_context.namespace_options";
const MIB: u64 = 1 << 20;

/// What a machine's memory is a multiple of (hypervisor.proto, `Start.memory`).
pub(super) const MEMORY_UNIT: u64 = 2 * MIB;

/// How long a guest may take to come up, ms: on a busy machine, and where the processor is translated.
const START_LIMIT: u32 = 60_000;
const EMULATED_START_LIMIT: u32 = 300_000;

/// Users that machines run as, one for each pod: beyond what kubelet gives to pods' user namespaces (KEP-127: 65536 for each of at most
/// some thousand pods, from 65536 on), below the kernel's reserved -1.
const FIRST_USER: u32 = 0xf000_0000;

/// Refuses a pod that wants of the host what a kernel of its own keeps from it.
pub(super) fn validate(handler: &str, config: &cri::PodSandboxConfig) -> Result<(), PodError> {
    let options = namespace_options(config);
    for (name, mode) in [("network", options.network), ("pid", options.pid), ("ipc", options.ipc)] {
        if mode == NamespaceMode::Node as i32 {
            let why = format!(
                "is NODE, but handler {handler:?} runs each pod in a virtual machine, which cannot use the host's namespaces; \
                 give the pod another runtime class"
            );
            return Err(PodError::invalid(format!("{FIELD}.{name}"), why));
        }
    }
    Ok(())
}

/// The same for a container.
pub(super) fn validate_container(config: &cri::ContainerConfig) -> Result<(), PodError> {
    if super::build::container_namespaces(config).pid == NamespaceMode::Node as i32 {
        let why = "is NODE, but the pod is a virtual machine, which cannot use the host's namespaces";
        return Err(PodError::invalid(format!("{FIELD}.pid"), why));
    }
    for (index, mount) in config.mounts.iter().enumerate() {
        if mount.propagation == cri::MountPropagation::PropagationBidirectional as i32 {
            let why = "is Bidirectional, but mounts of a virtual machine cannot get to the host";
            return Err(PodError::invalid(format!("config.mounts[{index}].propagation"), why));
        }
    }
    Ok(())
}

/// A container's root file system as the agent mounts it (agent.proto, `AddRoot`).
pub(super) fn root(container: &ContainerId) -> PathBuf {
    Path::new("/run/podvisor/roots").join(container.as_str())
}

/// What a container's mounts come to in a guest beside their sources.
#[derive(Debug, Default)]
pub(super) struct Sources {
    /// What is mounted below those that are read-only by themselves alone.
    pub(super) below: Vec<Mount>,
    /// Those that are in the guest's memory.
    pub(super) volumes: Vec<GuestVolume>,
}

/// Shows the sources of a container's mounts to the guest; `resolved` are its paths afterwards. Blocking.
pub(super) fn share_mounts(
    node: &Node,
    pod: &PodRecord,
    record: &ContainerRecord,
    mounts: &[cri::Mount],
    resolved: &mut [ResolvedMount],
) -> Result<Sources, PodError> {
    let user = match pod.namespaces().user {
        Some(path) => Some(std::fs::File::open(&path).map_err(|source| PodError::File {
            operation: "open user namespace",
            path,
            source,
        })?),
        None => None,
    };
    let range = user_namespace(&pod.config.0)?;
    let mut sources = Sources::default();
    for (index, (mount, resolved)) in mounts.iter().zip(resolved).enumerate() {
        let mapped = mapped(index, mount, range)?;
        let kind = std::fs::metadata(&resolved.source).map(|metadata| metadata.file_type());
        if let Ok(kind) = kind
            && !kind.is_dir()
            && !kind.is_file()
        {
            let what = if kind.is_socket() { "a socket" } else { "no file and no directory" };
            let why = format!(
                "{} is {what}: nothing behind it can be reached from a virtual machine",
                resolved.source.display()
            );
            return Err(PodError::invalid(format!("config.mounts[{index}].host_path"), why));
        }
        let attributes = Attributes {
            read_only: mount.readonly || mount.image.is_some(),
            recursive: mount.recursive_read_only || mount.image.is_some(),
            user: user.as_ref().filter(|_| mapped).map(|user| user.as_fd()),
        };
        let access = share::Access {
            attributes,
            follows: mount.propagation == cri::MountPropagation::PropagationHostToContainer as i32,
        };
        let host = std::mem::take(&mut resolved.source);
        if let Some(found) = guest_volumes::find(node, pod, mount, &host, range.filter(|_| mapped))? {
            resolved.source = found.source;
            sources.volumes.push(found.volume);
            continue;
        }
        let mounts_below = mounts_below(&host);
        resolved.source =
            shared_volumes::add(node, pod, &record.id, &host, access, !mounts_below.is_empty())?;
        if attributes.read_only && !attributes.recursive {
            sources.below.extend(writable_below(mounts_below, &resolved.source, &mount.container_path));
        }
    }
    Ok(sources)
}

/// Places below a path where something is mounted, relative to it.
fn mounts_below(path: &Path) -> Vec<PathBuf> {
    let mut below: Vec<PathBuf> = mount_table::read()
        .into_iter()
        .filter_map(|mounted| mounted.point.strip_prefix(path).ok().map(Path::to_owned))
        .filter(|relative| !relative.as_os_str().is_empty())
        .collect();
    below.sort();
    below.dedup();
    below
}

/// Mounts below a volume that is read-only itself. In a guest they would be found one by one as a program comes to them, and take over the
/// volume's attributes (kernel, `fs/fuse/dir.c`, `fuse_dentry_automount`); so each is mounted by name.
fn writable_below(below: Vec<PathBuf>, shared: &Path, container: &str) -> Vec<Mount> {
    let options = ["rbind", "rprivate", "rw"].map(str::to_owned);
    let mounts = below.into_iter().filter_map(|relative| {
        MountBuilder::default()
            .destination(Path::new(container).join(&relative))
            .typ("bind")
            .source(shared.join(&relative))
            .options(options.clone())
            .build()
            .ok()
    });
    mounts.collect()
}

/// Whether a volume's files are to have the ids of the pod's user namespace (KEP-127). Other ids than the pod's have no meaning in a guest.
fn mapped(index: usize, mount: &cri::Mount, range: Option<UserNamespace>) -> Result<bool, PodError> {
    if mount.image.is_some() || (mount.uid_mappings.is_empty() && mount.gid_mappings.is_empty()) {
        return Ok(false);
    }
    let is = |mappings: &[cri::IdMapping], ids: Ids| matches!(mappings, [only] if only.container_id == 0 && only.host_id == ids.first && only.length == ids.length);
    match range {
        Some(range) if is(&mount.uid_mappings, range.uids) && is(&mount.gid_mappings, range.gids) => Ok(true),
        _ => {
            let why = "are not those of the pod's user namespace, which is what a virtual machine can map";
            Err(PodError::invalid(format!("config.mounts[{index}].uidMappings"), why))
        }
    }
}

/// The namespaces of a pod with a user namespace, as its agent pins them (agent.proto, `Personalise`).
pub(super) fn namespace_paths(pod: &PodRecord, target: Option<PathBuf>) -> NamespacePaths {
    let pinned = |name: &str| {
        let has_user = pod.namespaces().user.is_some();
        has_user.then(|| Path::new("/run/podvisor/namespaces").join(name))
    };
    NamespacePaths {
        net: pinned("net"),
        ipc: pinned("ipc"),
        uts: pinned("uts"),
        user: pinned("user"),
        // Only that there is one; the agent finds it by the container's id.
        pid: target,
    }
}

/// A guest's kernel has no AppArmor of the host's: only a profile that was asked for by name is missed.
pub(super) fn apparmor(config: &cri::ContainerConfig) -> Result<Option<String>, PodError> {
    let security = config.linux.as_ref().and_then(|linux| linux.security_context.as_ref());
    let profile = security.and_then(|security| security.apparmor.as_ref());
    let localhost = cri::security_profile::ProfileType::Localhost as i32;
    match profile {
        Some(profile) if profile.profile_type == localhost => {
            let why = "is a profile of the host, and the guest of a virtual machine has none";
            Err(PodError::invalid("config.linux.security_context.apparmor", why))
        }
        _ => Ok(None),
    }
}

/// Makes a container's spec one for the guest: without a user namespace its network, host name and IPC are the guest's own; pid namespaces are
/// named in the request to the agent; volumes have their ids already.
pub(super) fn in_guest(spec: &mut Spec, device: Option<String>, below: Vec<Mount>) -> Result<(), PodError> {
    use LinuxNamespaceType as T;
    if let Some(device) = device {
        let why = format!("{device:?} is a device of the host, which a pod in a virtual machine cannot use");
        return Err(PodError::invalid("config.cdi_devices", why));
    }
    spec.set_hostname(None);
    let Some(namespaces) = spec.linux_mut().as_mut().and_then(|linux| linux.namespaces_mut().as_mut()) else {
        return Ok(());
    };
    namespaces.retain(|namespace| {
        namespace.path().is_some() || !matches!(namespace.typ(), T::Network | T::Uts | T::Ipc)
    });
    for namespace in namespaces.iter_mut().filter(|namespace| namespace.typ() == T::Pid) {
        namespace.set_path(None);
    }
    spec.mounts_mut().get_or_insert_default().extend(below);
    for mount in spec.mounts_mut().iter_mut().flatten() {
        mount.set_uid_mappings(None).set_gid_mappings(None);
    }
    Ok(())
}

/// A root file system that the host has joined.
fn shared_root(record: &ContainerRecord) -> AddRoot {
    let rootfs = format!("{}/{}/rootfs", share::TAG, record.id);
    AddRoot {
        container_id: record.id.to_string(),
        lower: Some(add_root::Lower::SharePath(rootfs.clone())),
        upper: Some(add_root::Upper::SharedUpper(rootfs)),
        format: false,
    }
}

/// What the agent is told of a container beside its spec.
pub(super) fn container(
    pod: &PodRecord,
    record: &ContainerRecord,
    spec: &Spec,
    seccomp: Option<&LinuxSeccomp>,
    volumes: Vec<GuestVolume>,
    image: Option<&GuestImage>,
) -> Result<GuestContainer, PodError> {
    let options = super::build::container_namespaces(&record.config.0);
    let shared = namespace_options(&pod.config.0).pid == NamespaceMode::Pod as i32;
    let compiled = seccomp.map(podvisor_seccomp::compile).transpose();
    let compiled = compiled.map_err(|error| {
        PodError::invalid("config.linux.security_context.seccomp", crate::error::chain(&error))
    })?;
    let (mut disks, block_devices) = disks::of(&record.config.0.devices, spec);
    disks.extend(image.and_then(GuestImage::disk));
    Ok(GuestContainer {
        disks,
        block_devices,
        image: image.map(GuestImage::image),
        root: Some(image.map_or_else(|| shared_root(record), |image| image.root(record))),
        seccomp: compiled.map(|Compiled { program, flags }| Seccomp { program, flags }),
        share_pid: shared && options.pid == NamespaceMode::Pod as i32,
        target: if options.pid == NamespaceMode::Target as i32 { options.target_id } else { String::new() },
        volumes,
    })
}

/// Whether the pod has declared what a machine costs beside its containers (RuntimeClass, `overhead`).
pub(super) fn declares_overhead(config: &cri::PodSandboxConfig) -> bool {
    let overhead = config.linux.as_ref().and_then(|linux| linux.overhead.as_ref());
    overhead.is_some_and(|overhead| {
        overhead.memory_limit_in_bytes > 0 || overhead.cpu_quota > 0 || overhead.cpu_shares > 0
    })
}

/// Where the machine's processes are: in the pod's cgroup where the pod has declared an overhead, for then its limit has room for them;
/// else with the monitors.
fn parent(node: &Node, config: &cri::PodSandboxConfig) -> String {
    if declares_overhead(config) {
        cgroup_parent(config)
    } else {
        node.config().runtime.monitor_cgroup.clone()
    }
}

/// Where the processes of the pod's machine are, hypervisor and file server: what they use is what the machine costs the node.
pub(crate) fn cgroup(node: &Node, record: &PodRecord) -> Option<String> {
    record.machine.as_ref()?;
    Some(node.driver.container_cgroup(&parent(node, &record.config.0), record.id.as_str()))
}

/// What is held for the machine.
pub(super) fn acquisitions(node: &Node, pod: &PodId, config: &cri::PodSandboxConfig) -> [Acquisition; 2] {
    [
        Acquisition::Cgroup(node.driver.container_cgroup(&parent(node, config), pod.as_str())),
        Acquisition::Mount(share::directory(node, pod)),
    ]
}

/// Bytes and virtual CPUs.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct Size {
    memory: u64,
    cpus: u32,
}

/// From here on a limit of memory is none, in bytes. A resize of a pod without one passes on what its cgroup shows (cgroup v1: the largest
/// number of whole pages, just below 2^63), less the pod's overhead.
const NO_LIMIT: u64 = 1 << 62;

/// What the containers may use together, as kubelet sums it up, with the guest's own part on top.
fn size(vm: &PinnedVm, resources: Option<&cri::LinuxContainerResources>) -> Size {
    let none = cri::LinuxContainerResources::default();
    let resources = resources.unwrap_or(&none);
    let containers = u64::try_from(resources.memory_limit_in_bytes).ok();
    let containers = containers.filter(|limit| (1..NO_LIMIT).contains(limit));
    let memory = containers.unwrap_or(vm.default_memory).saturating_add(vm.guest_reserve);
    let (quota, period) = (u64::try_from(resources.cpu_quota), u64::try_from(resources.cpu_period));
    let cpus = match (quota, period) {
        (Ok(quota @ 1..), Ok(period @ 1..)) => u32::try_from(quota.div_ceil(period)).unwrap_or(u32::MAX),
        _ => vm.default_cpus,
    };
    Size { memory: memory.next_multiple_of(MEMORY_UNIT), cpus: cpus.clamp(1, vm.max_cpus.max(1)) }
}

/// Whether the pod may be resized. One of class BestEffort has no resources, and a resize never changes the class (KEP-1287). kubelet
/// gives such a pod the fewest shares that there are, 2, in a cgroup of its class.
fn may_grow(config: &cri::PodSandboxConfig) -> bool {
    let Some(linux) = &config.linux else { return false };
    linux.resources.as_ref().is_some_and(|resources| {
        resources.memory_limit_in_bytes > 0
            || resources.cpu_quota > 0
            || resources.cpu_shares > 2
            || !linux.cgroup_parent.contains("besteffort")
    })
}

/// What a machine that begins like that can become while it runs. Processors that are not used cost the guest memory, and a translated one
/// time, so there are few.
fn limits(vm: &PinnedVm, size: Size) -> Size {
    const FEW: u32 = 4;
    let memory = if vm.plugs { vm.max_memory.saturating_add(vm.guest_reserve) } else { 0 };
    let cpus = size.cpus.next_power_of_two().max(FEW).min(vm.max_cpus);
    Size { memory: (memory / MEMORY_UNIT * MEMORY_UNIT).max(size.memory), cpus: cpus.max(size.cpus) }
}

/// Makes a running machine as large as its containers may become together, with `huge_pages` beside that; gives what it is then. Not changed,
/// and an error, where that cannot be done. Memory goes only as far as the guest gives it back, and never below what the machine began with:
/// limits of containers do what kubelet wants.
pub(super) async fn resize(
    vm: &PinnedVm,
    machine: &Machine,
    resources: Option<&cri::LinuxContainerResources>,
    huge_pages: &HugePages,
    monitor: Option<&Connection>,
) -> Result<Machine, PodError> {
    let wanted = size(vm, resources);
    // One that an earlier podvisor has made does not get smaller.
    let least = if machine.least_memory == 0 { machine.memory } else { machine.least_memory };
    let (memory, cpus) = (wanted.memory.max(least).saturating_add(huge_pages.memory()), wanted.cpus);
    if (memory, cpus) == (machine.memory, machine.cpus) && *huge_pages == machine.huge_pages {
        return Ok(machine.clone());
    }
    let request = ResizeVm { memory, cpus, huge_pages: huge_pages.wire() };
    let resized = match monitor {
        Some(monitor) => monitor.call(Verb::ResizeVm(request)).await,
        None => Err(MonitorError::Gone),
    };
    let machine = Machine { huge_pages: huge_pages.clone(), ..machine.clone() };
    match resized {
        Ok(Answer::Resized(is)) => Ok(Machine { memory: is.memory, cpus: is.cpus, ..machine }),
        Ok(Answer::Done(_)) => Ok(Machine { memory, cpus, ..machine }),
        Ok(_) => Err(MonitorError::Confused { verb: "resize the virtual machine" }.into()),
        Err(source) => {
            Err(PodError::CannotResize { memory: machine.memory / MIB, cpus: machine.cpus, source })
        }
    }
}

/// The user that a pod's machine runs as.
fn user(record: &PodRecord) -> u32 {
    let digits = record.id.as_str().get(..6).unwrap_or_default();
    FIRST_USER + u32::from_str_radix(digits, 16).unwrap_or_default()
}

/// Starts the machine. The pod's network must be there.
pub(super) async fn start(
    node: &Node,
    record: &PodRecord,
    vm: &PinnedVm,
    monitor: &Connection,
) -> Result<(ProcessIdentity, Machine), PodError> {
    let config = &record.config.0;
    let user = user(record);
    let interfaces = timed("taps", &record.id, interfaces(record, user)).await?;
    let resources = config.linux.as_ref().and_then(|linux| linux.resources.as_ref());
    let Size { memory, cpus } = size(vm, resources);
    let verb = request(node, record, vm, Size { memory, cpus }, user, &interfaces)?;
    let Answer::VmStarted(started) = timed("machine", &record.id, monitor.call(Verb::StartVm(verb))).await?
    else {
        return Err(MonitorError::Confused { verb: "start the virtual machine" }.into());
    };
    if node.driver == Driver::Systemd {
        place(node, record, &started).await?;
    }
    let machine = started.machine.unwrap_or_default();
    let agent = started.agent.unwrap_or_default();
    let process = ProcessIdentity { pid: started.pid, start_time: started.start_time };
    let machine = Machine {
        hypervisor: format!("{} {}", machine.name, machine.version),
        emulated: machine.emulated,
        kernel_release: shortened(agent.kernel_release),
        agent: shortened(agent.build),
        keeps_volumes: agent.volumes,
        memory,
        cpus,
        least_memory: memory,
        has_huge_pages: agent.huge_pages,
        huge_pages: HugePages::default(),
        adds_disks: machine.adds_disks && agent.block_devices,
        maps_images: machine.adds_images && agent.images,
        plugs_images: machine.adds_image_disks && agent.images && agent.block_devices,
        hypervisor_pid: started.hypervisor_pid,
        // Its parent, the monitor, has not reaped it.
        file_server: identify(started.file_server_pid).ok_or(MonitorError::Gone)?,
    };
    Ok((process, machine))
}

/// What a guest says about itself is kept and shown: not more than it can sensibly be.
fn shortened(mut text: String) -> String {
    text.retain(|c| c.is_ascii_graphic());
    text.truncate(128);
    text
}

/// Joins the pod's interfaces with taps.
async fn interfaces(record: &PodRecord, user: u32) -> Result<Vec<GuestInterface>, PodError> {
    let Some(netns) = record.namespaces().net else { return Ok(Vec::new()) };
    let joined = tokio::task::spawn_blocking(move || podvisor_network::tap::join(&netns, user)).await;
    joined.map_err(|_| PodError::TaskGone)?.map_err(PodError::Network)
}

fn request(
    node: &Node,
    record: &PodRecord,
    vm: &PinnedVm,
    size: Size,
    user: u32,
    interfaces: &[GuestInterface],
) -> Result<StartVm, PodError> {
    let config = &record.config.0;
    let text = |path: &Path| path.display().to_string();
    let directory = node.pod_directory(&record.id);
    // Short: a socket in it has a path of at most 107 bytes (unix(7)).
    let machine_directory = directory.join("m");
    std::fs::create_dir_all(&machine_directory).map_err(|source| PodError::File {
        operation: "make",
        path: machine_directory.clone(),
        source,
    })?;
    let netns = record.namespaces().net.unwrap_or_default();
    let networks = interfaces.iter().map(|interface| Network {
        namespace: text(&netns),
        tap: interface.tap.clone(),
        hardware_address: interface.hardware_address.clone(),
        mtu: interface.mtu,
    });
    let cgroup_procs = cgroup_procs(node, record)?;
    let limits = if may_grow(config) { limits(vm, size) } else { size };
    let machine = Start {
        kernel: text(&vm.kernel),
        initramfs: text(&vm.initramfs),
        memory: size.memory,
        memory_limit: limits.memory,
        cpus: size.cpus,
        cpus_limit: limits.cpus,
        networks: networks.collect(),
        vsock_path: text(&directory.join("vsock.sock")),
        run_dir: text(&machine_directory),
        console_path: text(&directory.join("console.log")),
        emulate: vm.emulate,
        cgroup_procs: cgroup_procs.clone(),
        program: text(&vm.machine),
        user,
        plugs: vm.plugs,
        ..Start::default()
    };
    let sysctls = config.linux.as_ref().map(|linux| linux.sysctls.clone()).unwrap_or_default();
    let options = namespace_options(config);
    Ok(StartVm {
        hypervisor: text(&vm.hypervisor),
        machine: Some(machine),
        file_server: Some(FileServer {
            program: text(&vm.file_server),
            directory: text(&share::directory(node, &record.id)),
            tag: share::TAG.to_owned(),
            socket_path: text(&directory.join("fs.sock")),
            cgroup_procs,
        }),
        personalise: Some(Personalise {
            hostname: hostname(config),
            sysctls: sysctls.into_iter().collect(),
            reserve: vm.guest_reserve,
            user_namespace: user_namespace(config)?.map(|user| agent::UserNamespace {
                uid: user.uids.first,
                uids: user.uids.length,
                gid: user.gids.first,
                gids: user.gids.length,
            }),
            ..Personalise::default()
        }),
        interfaces: interfaces.iter().map(add_interface).collect(),
        init: options.pid == NamespaceMode::Pod as i32,
        timeout_ms: if vm.emulate { EMULATED_START_LIMIT } else { START_LIMIT },
    })
}

fn add_interface(interface: &GuestInterface) -> AddInterface {
    let text = |address: Option<&std::net::IpAddr>| address.map(ToString::to_string).unwrap_or_default();
    AddInterface {
        hardware_address: interface.hardware_address.clone(),
        name: interface.name.clone(),
        mtu: interface.mtu,
        addresses: interface.addresses.iter().map(ToString::to_string).collect(),
        routes: interface
            .routes
            .iter()
            .map(|route| Route {
                destination: route.destination.to_string(),
                gateway: text(route.gateway.as_ref()),
                source: text(route.source.as_ref()),
                scope: route.scope.into(),
                metric: route.metric,
                mtu: route.mtu,
                advertised_mss: route.advertised_mss,
                table: route.table,
            })
            .collect(),
        neighbours: interface
            .neighbours
            .iter()
            .map(|neighbour| Neighbour {
                address: neighbour.address.to_string(),
                hardware_address: neighbour.hardware_address.clone(),
            })
            .collect(),
        accepts_router_advertisements: interface.accepts_router_advertisements,
        rules: interface.rules.clone(),
    }
}

/// Where the machine's processes go. A scope is made around processes that are there: until then they are where their monitor is.
fn cgroup_procs(node: &Node, record: &PodRecord) -> Result<Vec<String>, PodError> {
    if node.driver == Driver::Systemd {
        return Ok(Vec::new());
    }
    let held = record.acquired.iter().find_map(|acquisition| match acquisition {
        Acquisition::Cgroup(path) => Some(path),
        _ => None,
    });
    let Some(path) = held else { return Ok(Vec::new()) };
    let cgroup = node.cgroups.cgroup(path);
    cgroup.create()?;
    Ok(cgroup.procs_files().iter().map(|path| path.display().to_string()).collect())
}

async fn place(node: &Node, record: &PodRecord, started: &VmStarted) -> Result<(), PodError> {
    let mut pids: Vec<u32> = [started.pid, started.hypervisor_pid, started.file_server_pid]
        .into_iter()
        .filter(|pid| *pid > 0)
        .map(i32::unsigned_abs)
        .collect();
    pids.dedup();
    let scope = Scope {
        name: Driver::scope_name(record.id.as_str()),
        slice: node.driver.parent(&parent(node, &record.config.0))?,
        description: format!("virtual machine of pod sandbox {}", record.id),
        pids,
    };
    Ok(node.systemd.start_scope(&scope).await?)
}

#[cfg(test)]
mod tests {
    use super::super::record::{RootfsForm, SharedPages};
    use super::*;
    use crate::pod::request::tests::config;

    fn vm() -> PinnedVm {
        PinnedVm {
            hypervisor: "/h".into(),
            machine: "/q".into(),
            file_server: "/f".into(),
            guest: String::new(),
            kernel: "/k".into(),
            initramfs: "/i".into(),
            kernel_release: String::new(),
            emulate: false,
            default_memory: 512 * MIB,
            guest_reserve: 128 * MIB,
            default_cpus: 1,
            max_cpus: 8,
            plugs: true,
            max_memory: 4096 * MIB,
            rootfs: RootfsForm::Auto,
            share_images: SharedPages::Node,
            writable_disk: 0,
        }
    }

    fn sized(memory: i64, quota: i64, period: i64) -> (u64, u32) {
        let resources = cri::LinuxContainerResources {
            memory_limit_in_bytes: memory,
            cpu_quota: quota,
            cpu_period: period,
            ..Default::default()
        };
        let size = size(&vm(), Some(&resources));
        (size.memory / MIB, size.cpus)
    }

    #[test]
    fn a_machine_is_as_large_as_its_containers_may_grow() {
        assert_eq!(sized(0, 0, 0), (640, 1));
        assert_eq!(sized(-1, -1, 100_000), (640, 1));
        // As cgroup v1 has it, and less an overhead.
        assert_eq!(sized(0x7fff_ffff_ffff_f000, -1, 100_000), (640, 1));
        assert_eq!(sized(0x7fff_ffff_ffff_f000 - (160 << 20), -1, 100_000), (640, 1));
        assert_eq!(sized(32 * (1 << 20) + 1, 50_000, 100_000), (162, 1));
        assert_eq!(sized(1 << 30, 250_000, 100_000), (1024 + 128, 3));
        assert_eq!(sized(1 << 30, 9_000_000, 100_000).1, 8);
        assert_eq!(size(&vm(), None), Size { memory: 640 * MIB, cpus: 1 });
    }

    #[test]
    fn who_has_nothing_never_grows() {
        let grows = |cgroup_parent: &str, resources: Option<cri::LinuxContainerResources>| {
            let linux = cri::LinuxPodSandboxConfig {
                cgroup_parent: cgroup_parent.to_owned(),
                resources,
                ..Default::default()
            };
            may_grow(&cri::PodSandboxConfig { linux: Some(linux), ..Default::default() })
        };
        let shares = |cpu_shares| Some(cri::LinuxContainerResources { cpu_shares, ..Default::default() });
        let memory =
            Some(cri::LinuxContainerResources { memory_limit_in_bytes: 1 << 28, ..Default::default() });
        for parent in ["/kubepods/besteffort/pod1", "kubepods-besteffort-pod1.slice"] {
            assert!(!grows(parent, shares(2)));
            assert!(!grows(parent, None));
        }
        // With a memory request alone there is nothing else to see it by.
        assert!(grows("/kubepods/burstable/pod1", shares(2)));
        assert!(grows("kubepods-burstable-pod1.slice", shares(102)));
        assert!(grows("", shares(102)));
        assert!(grows("", memory));
        assert!(!grows("", None));
        assert!(!may_grow(&cri::PodSandboxConfig::default()));
    }

    #[test]
    fn what_a_machine_can_become_is_limited() {
        let became = |vm: &PinnedVm, memory: u64, cpus| {
            let Size { memory, cpus } = limits(vm, Size { memory: memory * MIB, cpus });
            (memory / MIB, cpus)
        };
        assert_eq!(became(&vm(), 640, 1), (4096 + 128, 4));
        assert_eq!(became(&vm(), 640, 5), (4096 + 128, 8));
        // Never below what it begins with, however little the configuration gives.
        assert_eq!(became(&PinnedVm { max_cpus: 2, ..vm() }, 8192, 3), (8192, 3));
        assert_eq!(became(&PinnedVm { plugs: false, ..vm() }, 640, 1), (640, 4));
    }

    #[test]
    fn what_belongs_to_the_host_is_refused_by_name() {
        assert!(validate("vm", &config()).is_ok());
        let options = cri::NamespaceOption { network: NamespaceMode::Node.into(), ..Default::default() };
        let context =
            cri::LinuxSandboxSecurityContext { namespace_options: Some(options), ..Default::default() };
        let linux = cri::LinuxPodSandboxConfig { security_context: Some(context), ..Default::default() };
        let refused = validate("vm", &cri::PodSandboxConfig { linux: Some(linux), ..config() });
        assert!(refused.unwrap_err().to_string().contains("namespace_options.network"));
        let bidirectional = cri::Mount {
            propagation: cri::MountPropagation::PropagationBidirectional.into(),
            ..Default::default()
        };
        let container =
            cri::ContainerConfig { mounts: vec![cri::Mount::default(), bidirectional], ..Default::default() };
        assert!(validate_container(&container).unwrap_err().to_string().contains("mounts[1].propagation"));
        assert!(validate_container(&cri::ContainerConfig::default()).is_ok());
    }

    #[test]
    fn what_a_guest_says_is_bounded() {
        assert_eq!(shortened("6.1.0-44\n\u{1b}[31m".into()), "6.1.0-44[31m");
        assert_eq!(shortened("x".repeat(1000)).len(), 128);
    }
}
