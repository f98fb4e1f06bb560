//! What the tests of all modules start from: a small valid request, to be changed by each.

use std::collections::BTreeMap;

use oci_spec::image::{Config, ImageConfiguration};
use oci_spec::runtime::{LinuxSeccomp, Mount, Process, Spec};
use podvisor_proto::cri;

use crate::*;

pub(crate) struct Case {
    pub(crate) config: cri::ContainerConfig,
    pub(crate) sandbox: cri::PodSandboxConfig,
    pub(crate) image: Config,
    pub(crate) host: HostFacts,
    pub(crate) namespaces: NamespacePaths,
    pub(crate) pod_files: PodFiles,
    pub(crate) devices: Vec<ResolvedDevice>,
    pub(crate) seccomp: Option<LinuxSeccomp>,
    pub(crate) apparmor: Option<String>,
    pub(crate) selinux: selinux::Confinement,
    pub(crate) annotations: BTreeMap<String, String>,
    pub(crate) default_pids: Option<i64>,
}

pub(crate) const PASSWD: &str = "\
root:x:0:0:root:/root:/bin/sh
garbage
:x:9:9:::
app:x:1000:1001:App:/home/app:/bin/sh
1234:x:55:56::/:
huge:x:4294967295:0::/:
";

pub(crate) const GROUP: &str = "\
root:x:0:
app:x:1001:
video:x:44:other,app
render:x:108: app
audio:x:bad:app
staff:x:50:root
";

impl Default for Case {
    fn default() -> Self {
        let mut image = Config::default();
        image
            .set_entrypoint(Some(vec!["/entry".to_owned()]))
            .set_cmd(Some(vec!["default".to_owned()]))
            .set_env(Some(vec!["A=image".to_owned(), "B=image".to_owned()]));
        Self {
            config: cri::ContainerConfig {
                metadata: Some(cri::ContainerMetadata { name: "web".to_owned(), attempt: 0 }),
                linux: Some(cri::LinuxContainerConfig {
                    resources: Some(cri::LinuxContainerResources::default()),
                    security_context: Some(cri::LinuxContainerSecurityContext::default()),
                }),
                ..Default::default()
            },
            sandbox: cri::PodSandboxConfig {
                metadata: Some(cri::PodSandboxMetadata {
                    name: "pod".to_owned(),
                    uid: "uid-1".to_owned(),
                    namespace: "default".to_owned(),
                    attempt: 0,
                }),
                hostname: "pod-host".to_owned(),
                linux: Some(cri::LinuxPodSandboxConfig {
                    security_context: Some(cri::LinuxSandboxSecurityContext::default()),
                    ..Default::default()
                }),
                ..Default::default()
            },
            image,
            // Everything but CAP_SYS_RESOURCE (24), as on nodes that lack it.
            host: HostFacts {
                capabilities: capability_names(((1 << 41) - 1) & !(1 << 24)),
                cgroup_v2: true,
                oom_score_adj_floor: None,
                devices: vec![device("/dev/sda", 8, 0)],
                swap: true,
                hugetlb: true,
                hugepage_sizes: vec!["2MB".to_owned(), "1GB".to_owned()],
                last_cpu: Some(7),
                last_memory_node: Some(1),
            },
            namespaces: NamespacePaths {
                net: Some("/run/netns/pod".into()),
                ipc: Some("/run/ipcns/pod".into()),
                uts: Some("/run/utsns/pod".into()),
                pid: Some("/proc/77/ns/pid".into()),
                user: None,
            },
            pod_files: PodFiles {
                hostname: Some("/run/pod/hostname".into()),
                hosts: Some("/run/pod/hosts".into()),
                resolv_conf: Some("/run/pod/resolv.conf".into()),
                shm: Some("/run/pod/shm".into()),
            },
            devices: Vec::new(),
            seccomp: None,
            apparmor: None,
            selinux: selinux::Confinement::default(),
            annotations: BTreeMap::new(),
            default_pids: None,
        }
    }
}

impl Case {
    /// A case with a change.
    pub(crate) fn with(change: impl FnOnce(&mut Self)) -> Self {
        let mut case = Self::default();
        change(&mut case);
        case
    }

    pub(crate) fn security(&mut self) -> &mut cri::LinuxContainerSecurityContext {
        self.config.linux.as_mut().unwrap().security_context.as_mut().unwrap()
    }

    pub(crate) fn resources(&mut self) -> &mut cri::LinuxContainerResources {
        self.config.linux.as_mut().unwrap().resources.as_mut().unwrap()
    }

    pub(crate) fn sandbox_security(&mut self) -> &mut cri::LinuxSandboxSecurityContext {
        self.sandbox.linux.as_mut().unwrap().security_context.as_mut().unwrap()
    }

    pub(crate) fn privileged(&mut self) {
        self.sandbox_security().privileged = true;
        self.security().privileged = true;
    }

    /// Host paths count as resolved to themselves.
    pub(crate) fn build(&self) -> Result<Spec, SpecError> {
        let mut image = ImageConfiguration::default();
        image.set_config(Some(self.image.clone()));
        container(&Input {
            container_id: &"c".repeat(64),
            sandbox_id: &"5".repeat(64),
            config: &self.config,
            sandbox: &self.sandbox,
            image: &image,
            image_name: "registry/app:1",
            rootfs: "/run/rootfs".into(),
            namespaces: self.namespaces.clone(),
            pod_files: self.pod_files.clone(),
            mounts: self
                .config
                .mounts
                .iter()
                .map(|mount| ResolvedMount { source: mount.host_path.clone().into() })
                .collect(),
            devices: self.devices.clone(),
            passwd: PASSWD,
            group: GROUP,
            host: &self.host,
            cgroups_path: "/kubepods/pod/id".to_owned(),
            seccomp: self.seccomp.as_ref(),
            apparmor: self.apparmor.clone(),
            selinux: self.selinux.clone(),
            annotations: self.annotations.clone(),
            default_pids: self.default_pids,
        })
    }

    pub(crate) fn spec(&self) -> Spec {
        self.build().unwrap()
    }

    pub(crate) fn process(&self) -> Process {
        self.spec().process().clone().unwrap()
    }

    pub(crate) fn mounts(&self) -> Vec<Mount> {
        self.spec().mounts().clone().unwrap()
    }

    /// The field that is refused, and how.
    pub(crate) fn refused(&self) -> (ErrorKind, String) {
        let error = self.build().unwrap_err();
        (error.kind(), field_of(&error))
    }
}

pub(crate) fn field_of(error: &SpecError) -> String {
    match error {
        SpecError::Invalid { field, .. }
        | SpecError::Unsupported { field, .. }
        | SpecError::NotFound { field, .. } => field.clone(),
        SpecError::SeccompSyntax(_) => "seccomp profile".to_owned(),
    }
}

pub(crate) fn device(path: &str, major: i64, minor: i64) -> ResolvedDevice {
    ResolvedDevice {
        container_path: path.into(),
        kind: DeviceKind::Block,
        major,
        minor,
        mode: 0o660,
        uid: 0,
        gid: 6,
        access: "rw".to_owned(),
    }
}

pub(crate) fn strings(list: &[&str]) -> Vec<String> {
    list.iter().map(|text| (*text).to_owned()).collect()
}

pub(crate) fn int(value: i64) -> Option<cri::Int64Value> {
    Some(cri::Int64Value { value })
}
