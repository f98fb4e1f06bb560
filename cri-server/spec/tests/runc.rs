//! A generated spec, run by a real runc: what the specification says is what a process in the container sees.

use std::collections::BTreeMap;
use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Command, Output, Stdio};

use oci_spec::image::ImageConfiguration;
use oci_spec::runtime::Spec;
use podvisor_proto::cri;
use podvisor_spec::{HostFacts, Input, NamespacePaths, PodFiles, ResolvedMount};

/// A bundle with its own runc state; container and cgroups go with it.
struct Bundle {
    directory: tempfile::TempDir,
    id: String,
    cgroup: String,
}

impl Bundle {
    fn new() -> Self {
        let directory = tempfile::tempdir().unwrap();
        let bin = directory.path().join("rootfs/bin");
        fs::create_dir_all(&bin).unwrap();
        fs::copy(podvisor_critest::contents::busybox_program(), bin.join("busybox")).unwrap();
        for name in ["sh", "id", "cat", "grep", "unshare", "touch", "sleep", "hostname", "pwd", "tr", "true"]
        {
            std::os::unix::fs::symlink("busybox", bin.join(name)).unwrap();
        }
        fs::write(directory.path().join("hosts"), "10.0.0.1 pod\n").unwrap();
        fs::create_dir_all(directory.path().join("sub")).unwrap();
        // Under a read-only volume nobody can make the place for the inner one.
        fs::create_dir_all(directory.path().join("volume/inner")).unwrap();
        let id = format!("podvisor-spec-test-{}", std::process::id());
        Self { cgroup: format!("/{id}"), id, directory }
    }

    fn path(&self, name: &str) -> PathBuf {
        self.directory.path().join(name)
    }

    fn runc(&self, arguments: &[&str]) -> Output {
        Command::new("runc")
            .arg("--root")
            .arg(self.path("state"))
            .args(arguments)
            .stdin(Stdio::null())
            .output()
            .unwrap()
    }

    fn write(&self, spec: &Spec) {
        spec.save(self.path("config.json")).unwrap();
    }
}

impl Drop for Bundle {
    fn drop(&mut self) {
        self.runc(&["delete", "--force", &self.id]);
        for controller in fs::read_dir("/sys/fs/cgroup").into_iter().flatten().flatten() {
            let _ = fs::remove_dir(controller.path().join(&self.cgroup[1..]));
        }
        let _ = fs::remove_dir(Path::new("/sys/fs/cgroup").join(&self.cgroup[1..]));
    }
}

fn bounding() -> Vec<String> {
    let status = fs::read_to_string("/proc/self/status").unwrap();
    let mask = status.lines().find_map(|line| line.strip_prefix("CapBnd:")).unwrap();
    podvisor_spec::capability_names(u64::from_str_radix(mask.trim(), 16).unwrap())
}

fn strings(list: &[&str]) -> Vec<String> {
    list.iter().map(|text| (*text).to_owned()).collect()
}

fn spec(bundle: &Bundle, command: &[&str]) -> Spec {
    let volume = |container: &str, host: &str, readonly| cri::Mount {
        container_path: container.to_owned(),
        host_path: bundle.path(host).display().to_string(),
        readonly,
        ..Default::default()
    };
    let config = cri::ContainerConfig {
        metadata: Some(cri::ContainerMetadata { name: "web".to_owned(), attempt: 0 }),
        command: strings(command),
        working_dir: "/bin".to_owned(),
        mounts: vec![volume("/volume/inner", "sub", false), volume("/volume", "volume", true)],
        linux: Some(cri::LinuxContainerConfig {
            resources: Some(cri::LinuxContainerResources {
                memory_limit_in_bytes: 64 << 20,
                cpu_shares: 1,
                oom_score_adj: 500,
                ..Default::default()
            }),
            security_context: Some(cri::LinuxContainerSecurityContext {
                run_as_username: "app".to_owned(),
                supplemental_groups: vec![70],
                no_new_privs: true,
                readonly_rootfs: true,
                masked_paths: strings(&["/proc/meminfo"]),
                readonly_paths: strings(&["/proc/sys"]),
                namespace_options: Some(cri::NamespaceOption {
                    pid: cri::NamespaceMode::Container.into(),
                    ..Default::default()
                }),
                ..Default::default()
            }),
        }),
        ..Default::default()
    };
    let sandbox = cri::PodSandboxConfig {
        metadata: Some(cri::PodSandboxMetadata::default()),
        hostname: "pod-host".to_owned(),
        ..Default::default()
    };
    let host = HostFacts {
        capabilities: bounding(),
        cgroup_v2: Path::new("/sys/fs/cgroup/cgroup.controllers").exists(),
        oom_score_adj_floor: Some(0),
        devices: Vec::new(),
        swap: false,
        hugetlb: false,
        hugepage_sizes: Vec::new(),
        last_cpu: None,
        last_memory_node: None,
    };
    let capabilities = podvisor_spec::capabilities(&config, &host).unwrap();
    podvisor_spec::container(&Input {
        container_id: &bundle.id,
        sandbox_id: "sandbox",
        mounts: config
            .mounts
            .iter()
            .map(|mount| ResolvedMount { source: mount.host_path.clone().into() })
            .collect(),
        config: &config,
        sandbox: &sandbox,
        image: &ImageConfiguration::default(),
        image_name: "image",
        rootfs: bundle.path("rootfs"),
        namespaces: NamespacePaths::default(),
        pod_files: PodFiles {
            hostname: None,
            hosts: Some(bundle.path("hosts")),
            resolv_conf: None,
            shm: None,
        },
        devices: Vec::new(),
        passwd: "app:x:1000:1001::/home:/bin/sh\n",
        group: "video:x:44:app\n",
        host: &host,
        cgroups_path: format!("{}/container", bundle.cgroup),
        seccomp: Some(&podvisor_spec::default_seccomp(&capabilities)),
        apparmor: None,
        selinux: podvisor_spec::selinux::Confinement::default(),
        annotations: BTreeMap::new(),
        default_pids: Some(100),
    })
    .unwrap()
}

fn text(output: &Output) -> String {
    let error = String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success(), "{}: {error}", output.status);
    String::from_utf8_lossy(&output.stdout).into_owned()
}

#[test]
fn a_process_sees_what_was_asked_for() {
    let bundle = Bundle::new();
    let script = "
        id; pwd; hostname; cat /etc/hosts; cat /proc/self/oom_score_adj
        grep -E '^(CapBnd|CapEff|NoNewPrivs|Seccomp):' /proc/self/status
        tr '\\0' '\\n' </proc/1/environ
        touch /x 2>/dev/null || echo root is read-only
        touch /volume/x 2>/dev/null || echo volume is read-only
        grep -c . /proc/meminfo
        grep ' /volume' /proc/self/mountinfo
        unshare -U true 2>/dev/null || echo no new namespaces
        cat /sys/fs/cgroup/memory/memory.limit_in_bytes /sys/fs/cgroup/memory.max 2>/dev/null
        cat /sys/fs/cgroup/cpu/cpu.shares 2>/dev/null || echo 2
        cat /sys/fs/cgroup/pids/pids.max /sys/fs/cgroup/pids.max 2>/dev/null; true
    ";
    bundle.write(&spec(&bundle, &["/bin/sh", "-c", script]));
    let output = bundle.runc(&["run", "--bundle", bundle.directory.path().to_str().unwrap(), &bundle.id]);
    let seen = text(&output);
    for expected in [
        "uid=1000 gid=1001 groups=44,70,1001\n",
        "\n/bin\n",
        "\npod-host\n",
        "10.0.0.1 pod\n",
        "\n500\n",
        "CapBnd:\t00000000a80425fb\n",
        "CapEff:\t0000000000000000\n",
        "NoNewPrivs:\t1\n",
        "Seccomp:\t2\n",
        "HOSTNAME=pod-host\n",
        "root is read-only\n",
        "volume is read-only\n",
        "\n0\n",
        " /volume/inner rw,",
        "no new namespaces\n",
        "\n67108864\n",
        "\n2\n",
        "\n100\n",
    ] {
        // busybox prints groups in the order they were set; the primary one is among them.
        let sorted = seen.replace("groups=1001,44,70", "groups=44,70,1001");
        assert!(sorted.contains(expected), "{expected:?} is missing in:\n{seen}");
    }
}

#[test]
fn exec_in_a_running_container() {
    let mut bundle = Bundle::new();
    bundle.id.push_str("-exec");
    bundle.cgroup.push_str("-exec");
    let spec = spec(&bundle, &["/bin/sleep", "1000"]);
    bundle.write(&spec);
    let directory = bundle.directory.path().to_str().unwrap();
    let started = Command::new("runc")
        .arg("--root")
        .arg(bundle.path("state"))
        .args(["run", "--detach", "--bundle", directory, &bundle.id])
        .stdin(Stdio::null())
        .stdout(Stdio::null())
        .stderr(Stdio::null())
        .status()
        .unwrap();
    assert!(started.success());
    let process = podvisor_spec::exec(
        &spec,
        &strings(&["/bin/sh", "-c", "id -u; grep Seccomp: /proc/self/status"]),
        false,
    );
    fs::write(bundle.path("process.json"), serde_json::to_vec(&process.unwrap()).unwrap()).unwrap();
    let file = bundle.path("process.json");
    let output = bundle.runc(&["exec", "--process", file.to_str().unwrap(), &bundle.id]);
    assert_eq!(text(&output), "1000\nSeccomp:\t2\n");
}
