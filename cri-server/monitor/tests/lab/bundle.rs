//! OCI bundles around a static busybox.

use std::fs;
use std::path::Path;

use serde_json::{Value, json};

pub fn make_rootfs(rootfs: &Path) {
    for directory in ["bin", "proc", "dev", "sys", "tmp", "etc"] {
        fs::create_dir_all(rootfs.join(directory)).expect("make the root directory");
    }
    let busybox = podvisor_critest::contents::busybox_program();
    fs::copy(busybox, rootfs.join("bin/busybox")).expect("`make images` has fetched busybox");
    for name in [
        "sh", "cat", "sleep", "true", "false", "seq", "echo", "printf", "kill", "dd", "yes", "stty", "head",
        "ps", "nc", "test", "touch",
    ] {
        std::os::unix::fs::symlink("busybox", rootfs.join("bin").join(name)).expect("link");
    }
}

/// What a container is to be.
#[derive(Clone)]
pub struct Spec {
    pub arguments: Vec<String>,
    pub terminal: bool,
    pub stdin: bool,
    pub stdin_once: bool,
    pub memory: Option<i64>,
    /// Joined instead of a new one.
    pub pid_namespace: Option<String>,
}

impl Spec {
    pub fn new(arguments: &[&str]) -> Self {
        Self {
            arguments: arguments.iter().map(|&argument| argument.to_owned()).collect(),
            terminal: false,
            stdin: false,
            stdin_once: false,
            memory: None,
            pid_namespace: None,
        }
    }

    pub fn shell(script: &str) -> Self {
        Self::new(&["sh", "-c", script])
    }

    /// Ends at SIGTERM, as PID 1 too.
    pub fn waiting() -> Self {
        Self::shell("trap 'exit 0' TERM; echo ready; while :; do sleep 1000 & wait $!; done")
    }

    pub fn terminal(mut self) -> Self {
        self.terminal = true;
        self
    }

    pub fn stdin(mut self, once: bool) -> Self {
        self.stdin = true;
        self.stdin_once = once;
        self
    }

    pub fn memory(mut self, bytes: i64) -> Self {
        self.memory = Some(bytes);
        self
    }

    pub fn pid_namespace(mut self, path: &str) -> Self {
        self.pid_namespace = Some(path.into());
        self
    }

    pub fn write(&self, bundle: &Path, rootfs: &Path, cgroup: &str) {
        let mut pid = json!({"type": "pid"});
        if let Some(path) = &self.pid_namespace {
            pid["path"] = json!(path);
        }
        let mut resources = json!({});
        if let Some(memory) = self.memory {
            resources["memory"] = json!({"limit": memory, "swap": memory});
        }
        let arguments: Vec<&str> = self.arguments.iter().map(String::as_str).collect();
        let config = json!({
            "ociVersion": "1.0.2",
            "process": process(&arguments, self.terminal),
            "root": {"path": rootfs, "readonly": false},
            "hostname": "lab",
            "mounts": [
                {"destination": "/proc", "type": "proc", "source": "proc"},
                {"destination": "/dev", "type": "tmpfs", "source": "tmpfs", "options": ["nosuid", "mode=755"]},
                {"destination": "/dev/pts", "type": "devpts", "source": "devpts",
                 "options": ["newinstance", "ptmxmode=0666", "mode=0620"]},
            ],
            "linux": {
                "namespaces": [pid, {"type": "ipc"}, {"type": "uts"}, {"type": "mount"}],
                "cgroupsPath": cgroup,
                "resources": resources,
            },
        });
        fs::create_dir_all(bundle).expect("make the bundle");
        fs::write(bundle.join("config.json"), config.to_string()).expect("write the configuration");
    }
}

/// The `process` of a configuration, which exec takes too.
pub fn process(arguments: &[&str], terminal: bool) -> Value {
    json!({
        "terminal": terminal,
        "user": {"uid": 0, "gid": 0},
        "args": arguments,
        "env": ["PATH=/bin"],
        "cwd": "/",
        "capabilities": {"bounding": ["CAP_KILL"], "effective": ["CAP_KILL"], "permitted": ["CAP_KILL"]},
        "noNewPrivileges": true,
        "oomScoreAdj": 0,
    })
}
