//! What the daemon knows about the machine it runs on and holds for all pods: facts are found out once at the start,
//! the configuration can be replaced while running.

use std::collections::BTreeMap;
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::sync::{Arc, RwLock};
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use oci_spec::runtime::LinuxSeccomp;
use podvisor_cgroup::systemd::Systemd;
use podvisor_cgroup::{Driver, Layout, Processes};
use podvisor_config::{CgroupDriver, Config, Handler, HandlerKind, Vm};
use podvisor_guest::{Guest, Guests};
use podvisor_image_store::ImageStore;
use podvisor_network::Network;
use podvisor_proto::cri;
use podvisor_spec::{HostFacts, ResolvedDevice};

use crate::apparmor::AppArmor;
use crate::events::Events;
use crate::features::Kernel;
use crate::hooks::Hooks;
use crate::hypervisor::{self, Choice, Kvm, Virtualizer};
use crate::id::{ContainerId, PodId};
use crate::monitor::pool::Pool;
use crate::pod::record::{Engine, PinnedRuntime, PinnedVm, Records, RootfsForm, SharedPages};
use crate::selinux::SeLinux;
use crate::telemetry::Telemetry;

/// Everything that pods share. One per daemon.
#[derive(Debug)]
pub(crate) struct Node {
    config: RwLock<Arc<Config>>,
    handlers: RwLock<Arc<Handlers>>,
    kernel: Kernel,
    pub(crate) images: ImageStore,
    pub(crate) network: Network,
    pub(crate) records: Records,
    pub(crate) monitors: Pool,
    pub(crate) events: Events,
    pub(crate) cdi: crate::cdi::Registry,
    pub(crate) telemetry: Telemetry,
    /// Told of every request that is not just a look.
    pub(crate) changes: tokio::sync::Notify,
    pub(crate) hooks: Hooks,
    pub(crate) cgroups: Layout,
    /// Which cgroup a process is in.
    pub(crate) processes: Processes,
    pub(crate) driver: Driver,
    /// Asked by the systemd driver only.
    pub(crate) systemd: Arc<Systemd>,
    pub(crate) host: HostFacts,
    /// What a guest offers its containers.
    pub(crate) guest: HostFacts,
    pub(crate) apparmor: AppArmor,
    pub(crate) selinux: SeLinux,
    /// Identity of this boot of the machine.
    pub(crate) boot_id: String,
    /// Volatile directory.
    pub(crate) run: PathBuf,
}

/// Parts of a [`Node`] that are opened by the start-up code.
#[derive(Debug)]
pub(crate) struct Parts {
    pub(crate) config: Config,
    pub(crate) images: ImageStore,
    pub(crate) network: Network,
    pub(crate) monitors: Pool,
    pub(crate) cgroups: Layout,
    pub(crate) driver: Driver,
    pub(crate) systemd: Arc<Systemd>,
}

/// Which handlers there are, and what each was found to be.
#[derive(Debug, Clone, Default)]
pub(crate) struct Handlers {
    pub(crate) configured: BTreeMap<String, Handler>,
    /// Why a handler cannot be used right now.
    pub(crate) unusable: BTreeMap<String, String>,
    /// First line of `--version`.
    pub(crate) versions: BTreeMap<String, String>,
    /// What each can do beyond the ordinary.
    pub(crate) features: BTreeMap<String, cri::RuntimeHandlerFeatures>,
    /// Why a handler cannot run pods with a user namespace.
    pub(crate) without_user_namespaces: BTreeMap<String, String>,
    /// Why a handler's containers cannot be checkpointed.
    pub(crate) without_checkpoints: BTreeMap<String, String>,
    /// What the machines of handlers of type `vm` run on.
    pub(crate) hypervisors: BTreeMap<String, Choice>,
    /// Where the link to the current guest led when they were looked at.
    pub(crate) current_guest: Option<PathBuf>,
}

impl Node {
    pub(crate) fn new(parts: Parts) -> std::io::Result<Arc<Self>> {
        let host = host_facts(&parts.cgroups);
        let kernel = Kernel::probe(&parts.images);
        let handlers = Handlers::probe(&parts.config, &kernel);
        let records = Records::new(parts.config.root.join("pods"));
        let run = parts.config.run.clone();
        for directory in ["pods", "containers"] {
            let directory = run.join(directory);
            std::fs::create_dir_all(&directory)?;
            // The root of a pod's user namespace passes through to its root file system. It need not know who else is there.
            std::fs::set_permissions(&directory, std::fs::Permissions::from_mode(0o711))?;
        }
        Ok(Arc::new(Self {
            handlers: RwLock::new(Arc::new(handlers)),
            kernel,
            images: parts.images,
            network: parts.network,
            records,
            monitors: parts.monitors,
            events: Events::default(),
            cdi: crate::cdi::Registry::default(),
            telemetry: Telemetry::default(),
            changes: tokio::sync::Notify::new(),
            hooks: Hooks::new(&parts.config.nri, &host),
            processes: parts.cgroups.processes().map_err(std::io::Error::other)?,
            cgroups: parts.cgroups,
            driver: parts.driver,
            systemd: parts.systemd,
            host,
            guest: guest_facts(),
            apparmor: AppArmor::open(&run),
            selinux: SeLinux::open(),
            boot_id: boot_id()?,
            run,
            config: RwLock::new(Arc::new(parts.config)),
        }))
    }

    /// Volatile directory of a pod, until it is stopped: files that its containers share, its monitor's socket.
    pub(crate) fn pod_directory(&self, pod: &PodId) -> PathBuf {
        self.run.join("pods").join(pod.as_str())
    }

    /// Where a pod's monitor listens.
    pub(crate) fn monitor_socket(&self, pod: &PodId) -> PathBuf {
        self.pod_directory(pod).join("monitor.sock")
    }

    /// The OCI bundle of a container, until it is removed: `config.json` and the mount point `rootfs`. Not below the pod's
    /// directory, which goes earlier.
    pub(crate) fn bundle(&self, container: &ContainerId) -> PathBuf {
        self.run.join("containers").join(container.as_str())
    }

    /// The configuration in force.
    pub(crate) fn config(&self) -> Arc<Config> {
        self.config.read().expect("no panic under this lock").clone()
    }

    /// The handlers as they are: an operator may have installed or chosen another guest since they were asked for last.
    pub(crate) fn handlers(&self) -> Arc<Handlers> {
        let handlers = self.handlers.read().expect("no panic under this lock").clone();
        let config = self.config();
        if current_guest(&config) == handlers.current_guest {
            return handlers;
        }
        let mut handlers = (*handlers).clone();
        handlers.look_at_guests(&config, &self.kernel);
        let handlers = Arc::new(handlers);
        *self.handlers.write().expect("no panic under this lock") = handlers.clone();
        handlers
    }

    /// Takes over what of `new` can change while running; names the rest.
    pub(crate) fn reload(&self, new: Config) -> Vec<String> {
        let (config, left) = self.config().reload(new);
        let handlers = Handlers::probe(&config, &self.kernel);
        *self.handlers.write().expect("no panic under this lock") = Arc::new(handlers);
        *self.config.write().expect("no panic under this lock") = Arc::new(config);
        left
    }

    /// The runtime that a new sandbox of `handler` is pinned to.
    pub(crate) fn engine(&self, handler: &str) -> Option<Engine> {
        let handlers = self.handlers();
        let found = handlers.configured.get(handler)?;
        match &found.kind {
            HandlerKind::Oci { path, root, arguments, sandbox_container } => {
                Some(Engine::Oci(PinnedRuntime {
                    path: find_program(path).unwrap_or_else(|| path.clone()),
                    root: root.clone(),
                    arguments: arguments.clone(),
                    systemd_cgroup: self.driver == Driver::Systemd,
                    sandbox_container: *sandbox_container,
                    annotations: found.annotations.clone(),
                }))
            }
            HandlerKind::Vm(vm) => {
                let choice = handlers.hypervisors.get(handler)?;
                let guest = guest_of(vm, &self.config().root).ok()?;
                Some(Engine::Vm(pinned_vm(vm, choice, &guest)))
            }
        }
    }

    /// The seccomp profile of a container that asks for `profile`.
    pub(crate) fn seccomp(
        &self,
        profile: &podvisor_spec::SecurityProfile,
        capabilities: &[String],
    ) -> Result<Option<LinuxSeccomp>, crate::error::PodError> {
        use crate::error::PodError;
        use podvisor_spec::SecurityProfile as P;
        let path = match profile {
            P::Unconfined => return Ok(None),
            P::RuntimeDefault => match &self.config().runtime.seccomp_profile {
                None => return Ok(Some(podvisor_spec::default_seccomp(capabilities))),
                Some(path) => path.clone(),
            },
            P::Localhost(name) => {
                let path = Path::new(name);
                if path.is_absolute() {
                    path.to_owned()
                } else {
                    self.config().runtime.seccomp_root.join(path)
                }
            }
        };
        let text = std::fs::read_to_string(&path).map_err(|source| PodError::File {
            operation: "read seccomp profile",
            path,
            source,
        })?;
        Ok(Some(podvisor_spec::seccomp_profile(&text, capabilities, kernel_version())?))
    }
}

impl Handlers {
    /// Calls each handler's program once: blocking, some tens of milliseconds each.
    fn probe(config: &Config, kernel: &Kernel) -> Self {
        let mut found = Self { configured: config.named_handlers(), ..Self::default() };
        found.look_at_guests(config, kernel);
        for (name, handler) in &found.configured {
            let HandlerKind::Oci { path, sandbox_container, .. } = &handler.kind else { continue };
            if *sandbox_container && crate::pause_program::program().is_none() {
                let why = "sandbox_container needs the built-in pause, which is written for x86_64 only";
                found.unusable.insert(name.clone(), why.to_owned());
                continue;
            }
            let Some(program) = find_program(path) else {
                found
                    .unusable
                    .insert(name.clone(), format!("{} is not installed (looked in PATH)", path.display()));
                continue;
            };
            let version = match output(&program, "--version") {
                Ok(version) => {
                    let line = version.lines().next().unwrap_or_default().to_owned();
                    found.versions.insert(name.clone(), line);
                    version
                }
                Err(why) => {
                    found.unusable.insert(name.clone(), format!("{} --version: {why}", program.display()));
                    continue;
                }
            };
            let can = crate::features::of_program(&program, &version, *sandbox_container, kernel);
            found.features.insert(name.clone(), can.features);
            found.without_checkpoints.extend(can.without_checkpoints.map(|why| (name.clone(), why)));
            found.without_user_namespaces.extend(can.without_user_namespaces.map(|why| (name.clone(), why)));
        }
        found
    }

    /// What handlers of type `vm` can do right now. Blocking, but for a few files only.
    fn look_at_guests(&mut self, config: &Config, kernel: &Kernel) {
        self.current_guest = current_guest(config);
        let kvm = Kvm::probe();
        for (name, handler) in &self.configured {
            let HandlerKind::Vm(vm) = &handler.kind else { continue };
            for known in [&mut self.unusable, &mut self.versions, &mut self.without_user_namespaces] {
                known.remove(name);
            }
            self.hypervisors.remove(name);
            let looked =
                hypervisor::choose(vm, &kvm).and_then(|choice| Ok((choice, guest_of(vm, &config.root)?)));
            match looked {
                Ok((choice, guest)) => {
                    let how = choice.virtualizer.words();
                    self.versions
                        .insert(name.clone(), format!("{how}; guest kernel {}", guest.kernel_release()));
                    self.hypervisors.insert(name.clone(), choice);
                    self.features.insert(name.clone(), crate::features::of_guest(kernel));
                    match &kernel.user_namespaces() {
                        Ok(()) => {}
                        Err(why) => drop(self.without_user_namespaces.insert(name.clone(), why.clone())),
                    }
                }
                Err(why) => {
                    self.features.remove(name);
                    self.unusable.insert(name.clone(), why);
                }
            }
        }
    }
}

fn current_guest(config: &Config) -> Option<PathBuf> {
    std::fs::read_link(config.root.join("guests/current")).ok()
}

/// The guest that a handler's new pods get.
pub(crate) fn guest_of(vm: &Vm, root: &Path) -> Result<Guest, String> {
    let guests = Guests::open(root);
    let guest = if vm.guest.is_empty() {
        guests.current().map_err(|error| crate::error::chain(&error))?
    } else {
        let id = vm.guest.parse().map_err(|error| crate::error::chain(&error))?;
        Some(guests.get(&id).map_err(|error| crate::error::chain(&error))?)
    };
    let guest = guest.ok_or(
        "no guest is installed: build one with `podvisor guest build --debian`, or from another distribution's kernel (--kernel, --modules)",
    )?;
    if guest.protocol() != podvisor_proto::agent::PROTOCOL_VERSION {
        return Err(format!(
            "guest {} has an agent of protocol version {}, this podvisor speaks {}: build it anew with `podvisor guest build`",
            guest.id(),
            guest.protocol(),
            podvisor_proto::agent::PROTOCOL_VERSION
        ));
    }
    Ok(guest)
}

fn pinned_vm(vm: &Vm, choice: &Choice, guest: &Guest) -> PinnedVm {
    const MIB: u64 = 1 << 20;
    PinnedVm {
        hypervisor: choice.program.clone(),
        machine: choice.machine.clone(),
        file_server: choice.file_server.clone(),
        guest: guest.id().to_string(),
        kernel: guest.kernel(),
        initramfs: guest.initramfs(),
        kernel_release: guest.kernel_release().to_owned(),
        emulate: choice.virtualizer == Virtualizer::Emulation,
        default_memory: u64::from(vm.default_memory) * MIB,
        guest_reserve: u64::from(vm.guest_reserve) * MIB,
        default_cpus: vm.default_cpus,
        max_cpus: vm.max_cpus,
        max_memory: match vm.max_memory {
            0 => node_memory(),
            limit => u64::from(limit) * MIB,
        },
        plugs: vm.machine != podvisor_config::Machine::Microvm,
        rootfs: match vm.rootfs {
            podvisor_config::Rootfs::Auto => RootfsForm::Auto,
            podvisor_config::Rootfs::Pmem => RootfsForm::Pmem,
            podvisor_config::Rootfs::Block => RootfsForm::Block,
            podvisor_config::Rootfs::Fs => RootfsForm::Fs,
        },
        share_images: match vm.share_images {
            podvisor_config::ShareImages::Node => SharedPages::Node,
            podvisor_config::ShareImages::Namespace => SharedPages::Namespace,
            podvisor_config::ShareImages::Pod => SharedPages::Pod,
        },
        writable_disk: match vm.writable {
            podvisor_config::Writable::Disk => u64::from(vm.writable_size) * MIB,
            podvisor_config::Writable::Fs => 0,
        },
    }
}

/// Bytes; 0 where the kernel does not say.
fn node_memory() -> u64 {
    let text = std::fs::read_to_string("/proc/meminfo").unwrap_or_default();
    let total = text.lines().find_map(|line| line.strip_prefix("MemTotal:"));
    let kilobytes = total.and_then(|total| total.trim().strip_suffix("kB")?.trim().parse::<u64>().ok());
    kilobytes.unwrap_or_default() * 1024
}

/// What a program answers to one argument. One that hangs is killed, and is not to hold up the start of the daemon.
pub(crate) fn output(program: &Path, argument: &str) -> Result<String, String> {
    use std::os::unix::process::CommandExt;
    use std::process::{Command, Stdio};
    const LIMIT: Duration = Duration::from_secs(10);
    let child = Command::new(program)
        .arg(argument)
        .stdin(Stdio::null())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .process_group(0)
        .spawn()
        .map_err(|error| error.to_string())?;
    let group = rustix::process::Pid::from_child(&child);
    let (sender, receiver) = std::sync::mpsc::channel();
    std::thread::spawn(move || sender.send(child.wait_with_output()));
    let Ok(output) = receiver.recv_timeout(LIMIT) else {
        let _ = rustix::process::kill_process_group(group, rustix::process::Signal::KILL);
        return Err(format!("it did not end within {LIMIT:?}"));
    };
    let output = output.map_err(|error| error.to_string())?;
    if output.status.success() {
        Ok(String::from_utf8_lossy(&output.stdout).into_owned())
    } else {
        Err(format!("{}: {}", output.status, String::from_utf8_lossy(&output.stderr).trim()))
    }
}

/// Looks a bare name up in PATH; `None` when there is no such executable.
pub(crate) fn find_program(path: &Path) -> Option<PathBuf> {
    use rustix::fs::{Access, access};
    let executable = |path: &Path| path.is_file() && access(path, Access::EXEC_OK).is_ok();
    if path.components().count() > 1 {
        return executable(path).then(|| path.to_owned());
    }
    let search = std::env::var_os("PATH").unwrap_or_else(|| "/usr/sbin:/usr/bin:/sbin:/bin".into());
    std::env::split_paths(&search).map(|directory| directory.join(path)).find(|path| executable(path))
}

/// The driver that the configuration means on this machine.
pub(crate) fn cgroup_driver(configured: CgroupDriver) -> Driver {
    match configured {
        CgroupDriver::Auto => Driver::detect(),
        CgroupDriver::Cgroupfs => Driver::Cgroupfs,
        CgroupDriver::Systemd => Driver::Systemd,
    }
}

/// Identity of this boot. `PODVISOR_BOOT_ID_FILE` names another file to read it from, so that a reboot can be rehearsed.
pub(crate) fn boot_id() -> std::io::Result<String> {
    let path =
        std::env::var_os("PODVISOR_BOOT_ID_FILE").unwrap_or_else(|| "/proc/sys/kernel/random/boot_id".into());
    Ok(std::fs::read_to_string(path)?.trim().to_owned())
}

/// ns since the epoch.
pub(crate) fn now() -> i64 {
    let since = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or(Duration::ZERO);
    i64::try_from(since.as_nanos()).unwrap_or(i64::MAX)
}

/// Major and minor version of the running kernel.
pub(crate) fn kernel_version() -> (u32, u32) {
    let release = rustix::system::uname().release().to_string_lossy().into_owned();
    let mut numbers = release.split(['.', '-']).map(|part| part.parse().unwrap_or(0));
    (numbers.next().unwrap_or(0), numbers.next().unwrap_or(0))
}

/// The agent is root with every capability, on cgroup version 2 with nothing of the host in it.
fn guest_facts() -> HostFacts {
    HostFacts {
        // Up to CAP_CHECKPOINT_RESTORE, of Linux 5.9.
        capabilities: podvisor_spec::capability_names((1 << 41) - 1),
        cgroup_v2: true,
        oom_score_adj_floor: None,
        devices: Vec::new(),
        swap: false,
        hugetlb: true,
        hugepage_sizes: vec!["2MB".to_owned(), "1GB".to_owned()],
        last_cpu: None,
        last_memory_node: None,
    }
}

fn host_facts(cgroups: &Layout) -> HostFacts {
    let status = std::fs::read_to_string("/proc/self/status").unwrap_or_default();
    let bounding = status
        .lines()
        .find_map(|line| line.strip_prefix("CapBnd:"))
        .and_then(|hex| u64::from_str_radix(hex.trim(), 16).ok())
        .unwrap_or_default();
    let capabilities = podvisor_spec::capability_names(bounding);
    // Without CAP_SYS_RESOURCE nothing below the present value can be set, proc_pid_oom_score_adj(5).
    let floor = if capabilities.iter().any(|name| name == "CAP_SYS_RESOURCE") {
        None
    } else {
        std::fs::read_to_string("/proc/self/oom_score_adj").ok().and_then(|text| text.trim().parse().ok())
    };
    let cgroup_v2 = cgroups.is_v2();
    let swap = match cgroups {
        // Swap accounting can be off in version 1; in version 2 the file is missing at the root but there in any child.
        Layout::V1 { controllers } => {
            controllers.get("memory").is_some_and(|mount| mount.join("memory.memsw.limit_in_bytes").exists())
        }
        Layout::V2 { mount } => swap_is_limited(mount, "/proc/self/cgroup"),
    };
    HostFacts {
        capabilities,
        cgroup_v2,
        oom_score_adj_floor: floor,
        devices: host_devices(),
        swap,
        hugetlb: cgroups.has("hugetlb"),
        hugepage_sizes: hugepage_sizes(Path::new("/sys/kernel/mm/hugepages")),
        last_cpu: last_number(Path::new("/sys/devices/system/cpu/possible")),
        last_memory_node: last_number(Path::new("/sys/devices/system/node/possible")),
    }
}

/// Whether version 2 limits swap: not where it was switched off (`swapaccount=0`, no CONFIG_SWAP). The file is in every cgroup but the
/// root, where the daemon may be in a container of its own: then any child tells.
fn swap_is_limited(mount: &Path, own: &str) -> bool {
    let limited = |cgroup: &Path| cgroup.join("memory.swap.max").exists();
    let own = std::fs::read_to_string(own).unwrap_or_default();
    let own = own.lines().find_map(|line| line.strip_prefix("0::/")).unwrap_or_default();
    limited(&mount.join(own))
        || std::fs::read_dir(mount).into_iter().flatten().flatten().any(|child| limited(&child.path()))
}

/// Sizes of huge pages, from the kernel's directories (`hugepages-2048kB`), written as the hugetlb controller's files have them
/// (`mm/hugetlb_cgroup.c`, `mem_fmt`).
fn hugepage_sizes(directory: &Path) -> Vec<String> {
    let mut sizes: Vec<u64> = std::fs::read_dir(directory)
        .into_iter()
        .flatten()
        .flatten()
        .filter_map(|entry| {
            entry.file_name().to_str()?.strip_prefix("hugepages-")?.strip_suffix("kB")?.parse().ok()
        })
        .collect();
    sizes.sort_unstable();
    let name = |kilobytes: u64| match kilobytes {
        gigabytes if gigabytes >= 1 << 20 => format!("{}GB", gigabytes >> 20),
        megabytes if megabytes >= 1 << 10 => format!("{}MB", megabytes >> 10),
        kilobytes => format!("{kilobytes}KB"),
    };
    sizes.into_iter().map(name).collect()
}

/// The highest number of a list such as `0-7` (Documentation/admin-guide/cputopology.rst): what the kernel can have never changes.
fn last_number(file: &Path) -> Option<u32> {
    std::fs::read_to_string(file).ok()?.trim().rsplit([',', '-']).next()?.parse().ok()
}

/// Device nodes below /dev, for privileged containers. What belongs to terminals, queues and other mounts in /dev is left out.
fn host_devices() -> Vec<ResolvedDevice> {
    let mut devices = Vec::new();
    let mut directories = vec![PathBuf::from("/dev")];
    while let Some(directory) = directories.pop() {
        let Ok(entries) = std::fs::read_dir(&directory) else { continue };
        for entry in entries.flatten() {
            let path = entry.path();
            let Ok(kind) = entry.file_type() else { continue };
            let skipped = ["pts", "shm", "mqueue", "fd", ".lxc", ".lxd-mounts", ".udev", "console"];
            if kind.is_dir() && !skipped.iter().any(|name| entry.file_name() == *name) {
                directories.push(path);
            } else if let Some(device) = crate::pod::devices::node(&path, &path)
                && entry.file_name() != "console"
            {
                devices.push(device);
            }
        }
    }
    devices
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sizes_of_huge_pages_are_named_as_the_kernel_does() {
        let directory = tempfile::tempdir().unwrap();
        for name in ["hugepages-1048576kB", "hugepages-2048kB", "hugepages-64kB", "other"] {
            std::fs::create_dir(directory.path().join(name)).unwrap();
        }
        assert_eq!(hugepage_sizes(directory.path()), ["64KB", "2MB", "1GB"]);
        assert!(hugepage_sizes(Path::new("/never-there")).is_empty());
        let list = directory.path().join("possible");
        for (text, last) in [("0\n", Some(0)), ("0-63\n", Some(63)), ("0,2-5\n", Some(5)), ("\n", None)] {
            std::fs::write(&list, text).unwrap();
            assert_eq!(last_number(&list), last);
        }
    }

    #[test]
    fn swap_is_limited_where_the_kernel_has_the_file() {
        let mount = tempfile::tempdir().unwrap();
        let own = mount.path().join("own");
        std::fs::create_dir_all(mount.path().join("system.slice/podvisor.service")).unwrap();
        for text in ["0::/system.slice/podvisor.service\n", "0::/\n", ""] {
            std::fs::write(&own, text).unwrap();
            assert!(!swap_is_limited(mount.path(), own.to_str().unwrap()), "{text}");
        }
        std::fs::write(mount.path().join("system.slice/podvisor.service/memory.swap.max"), "max").unwrap();
        std::fs::write(&own, "0::/system.slice/podvisor.service\n").unwrap();
        assert!(swap_is_limited(mount.path(), own.to_str().unwrap()));
        std::fs::write(mount.path().join("system.slice/memory.swap.max"), "max").unwrap();
        std::fs::write(&own, "0::/\n").unwrap();
        assert!(swap_is_limited(mount.path(), own.to_str().unwrap()));
    }
}
