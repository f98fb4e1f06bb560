//! Pods that are virtual machines: the request, and the containers in them.

use std::fs;
use std::path::Path;

use podvisor_proto::agent::{AddRoot, Personalise, TmpfsUpper, add_root};
use podvisor_proto::hypervisor;
use podvisor_proto::monitor::{Error, FileServer, GuestContainer, StartVm, VmStarted, reply, request::Verb};

use super::{Lab, PATIENCE, Pod};

pub const TAG: &str = "files";
/// What the guest sees as the share.
pub const SHARE: &str = "/run/lab/share";
/// Where the guest's agent makes cgroups.
pub const GUEST_CGROUP: &str = "/run/lab/cgroup/guest";
/// Where the hypervisor writes what it was resized to.
pub const SIZES: &str = "/run/lab/sizes";
/// While this is there its guest lets go of no disk, and keeps 64 MiB more than it is to.
pub const HOLD: &str = "/run/lab/hold";

impl Lab {
    /// A pod whose machine has not been started.
    pub fn machine_pod(&self) -> Pod {
        self.machine_pod_in("run")
    }

    pub fn machine_pod_in(&self, directory: &str) -> Pod {
        let mut pod = self.pod_with(self.directory.join(directory), "");
        pod.guest = true;
        pod
    }

    /// A pod whose machine runs.
    pub fn machine(&self) -> Pod {
        let mut pod = self.machine_pod();
        self.start(&mut pod, "");
        pod
    }

    pub fn start(&self, pod: &mut Pod, words: &str) -> VmStarted {
        let request = self.start_vm(pod, words);
        pod.start_vm(request).expect("the machine starts")
    }

    /// What starts a machine whose hypervisor behaves as `words` say.
    pub fn start_vm(&self, pod: &Pod, words: &str) -> StartVm {
        self.prepare_guest();
        let path = |name: &str| pod.run_dir.join(name).display().to_string();
        let run_dir = path("machine");
        fs::create_dir_all(&run_dir).expect("make the directory");
        let real = std::env::var("PODVISOR_GUEST").ok().filter(|_| words.is_empty());
        let request = StartVm {
            hypervisor: self.hypervisor(),
            machine: Some(hypervisor::Start {
                command_line: words.into(),
                memory: 256 << 20,
                memory_limit: 512 << 20,
                cpus: 1,
                cpus_limit: 2,
                vsock_path: path("vsock.sock"),
                run_dir,
                console_path: path("console"),
                ..hypervisor::Start::default()
            }),
            file_server: Some(FileServer {
                program: self.file_server(),
                directory: SHARE.into(),
                tag: TAG.into(),
                socket_path: path("fs.sock"),
                cgroup_procs: Vec::new(),
            }),
            personalise: Some(Personalise { hostname: "pod".into(), ..Personalise::default() }),
            interfaces: Vec::new(),
            init: false,
            timeout_ms: u32::try_from(PATIENCE.as_millis()).expect("short"),
        };
        match real {
            Some(guest) => Self::real(request, &guest),
            None => request,
        }
    }

    /// The same with QEMU and podvisor-fs.
    fn real(mut request: StartVm, guest: &str) -> StartVm {
        let programs = std::env::var("PODVISOR_PROGRAMS").expect("where podvisor-qemu and podvisor-fs are");
        request.hypervisor = format!("{programs}/podvisor-qemu");
        request.file_server.as_mut().expect("there").program = format!("{programs}/podvisor-fs");
        let machine = request.machine.as_mut().expect("there");
        machine.kernel = format!("{guest}/kernel");
        machine.initramfs = format!("{guest}/initramfs");
        (machine.memory_limit, machine.cpus_limit) = (0, 0);
        machine.emulate = true;
        request
    }

    /// A share with the root file system, and a cgroup for what runs in the guest.
    fn prepare_guest(&self) {
        use rustix::mount::{MountFlags, mount, mount_bind};
        let root = Path::new(SHARE).join("rootfs");
        if root.exists() {
            return;
        }
        fs::create_dir_all(SHARE).expect("make the share");
        mount_bind(SHARE, SHARE).expect("make the share a mount");
        super::bundle::make_rootfs(&root);
        let cgroups = Path::new("/run/lab/all-cgroups");
        fs::create_dir_all(cgroups).expect("make a directory");
        mount("cgroup2", cgroups, "cgroup2", MountFlags::empty(), c"").expect("mount cgroup2");
        // Named so that what is left of it is removed with the lab.
        let own = cgroups.join(&self.cgroup);
        fs::create_dir_all(&own).expect("make a cgroup");
        fs::create_dir_all("/run/lab/cgroup").expect("make a directory");
        std::os::unix::fs::symlink(own, GUEST_CGROUP).expect("name the cgroup");
    }
}

impl Pod {
    pub fn start_vm(&mut self, request: StartVm) -> Result<VmStarted, Error> {
        self.daemon.ask(Verb::StartVm(request)).map(|result| match result {
            reply::Result::VmStarted(started) => started,
            other => panic!("StartVm answered {other:?}"),
        })
    }
}

/// Where a container's parts are in the guest.
pub fn guest_container(id: &str) -> GuestContainer {
    GuestContainer {
        root: Some(AddRoot {
            container_id: id.into(),
            lower: Some(add_root::Lower::SharePath(format!("{TAG}/rootfs"))),
            upper: Some(add_root::Upper::Tmpfs(TmpfsUpper { size: 16 << 20 })),
            format: false,
        }),
        seccomp: None,
        share_pid: false,
        target: String::new(),
        volumes: Vec::new(),
        disks: Vec::new(),
        block_devices: Vec::new(),
        image: None,
    }
}
