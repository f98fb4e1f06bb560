//! An agent that is a process of this machine.

use std::fs;
use std::ops::{Deref, DerefMut};
use std::path::PathBuf;
use std::process::{Child, Command, Stdio};
use std::time::Instant;

use podvisor_proto::agent::request::Verb;
use podvisor_proto::agent::{Personalise, UserNamespace};
use rustix::mount::{MountFlags, UnmountFlags, mount, unmount};

use super::monitor::{Dial, Monitor, PATIENCE};

/// The agent.
pub(crate) struct Guest {
    directory: tempfile::TempDir,
    agent: Child,
    monitor: Monitor,
}

impl Deref for Guest {
    type Target = Monitor;
    fn deref(&self) -> &Monitor {
        &self.monitor
    }
}

impl DerefMut for Guest {
    fn deref_mut(&mut self) -> &mut Monitor {
        &mut self.monitor
    }
}

impl Guest {
    pub(crate) fn new() -> Self {
        Self::started_by(&[], None)
    }

    /// Its agent has a network namespace of its own, and a /run; the pod has a user namespace.
    pub(crate) fn with_user_namespace() -> Self {
        let own_run = "mount -t tmpfs run /run && exec \"$@\"";
        Self::started_by(
            &["unshare", "--net", "--mount", "--propagation", "slave", "sh", "-c", own_run, "agent"],
            Some(UserNamespace { uid: 300_000, uids: 65_536, gid: 300_000, gids: 65_536 }),
        )
    }

    /// Makes a user of the host the owner of the root file system.
    pub(crate) fn give_root_to(&self, uid: u32) {
        let uid = uid.to_string();
        let status = Command::new("chown").args(["-hR", &uid]).arg(self.directory.path()).status();
        assert!(status.expect("chown runs").success());
    }

    /// Its agent has a network namespace of its own.
    pub(crate) fn with_network() -> Self {
        Self::started_by(&["unshare", "--net"], None)
    }

    /// Of the agent.
    pub(crate) fn pid(&self) -> u32 {
        self.agent.id()
    }

    fn started_by(words: &[&str], user_namespace: Option<UserNamespace>) -> Self {
        assert!(
            std::env::var_os(podvisor_critest::sandbox::MARK).is_some(),
            "run this in a sandbox: tests/scripts/cargo-test"
        );
        let directory = tempfile::tempdir().expect("a directory");
        let cgroups = directory.path().join("cgroup");
        fs::create_dir(&cgroups).expect("make a directory");
        mount("cgroup2", &cgroups, "cgroup2", MountFlags::empty(), c"").expect("mount cgroup2");
        let own = cgroups.join(format!("agent-{}", directory.path().file_name().unwrap().display()));
        fs::create_dir(&own).expect("make a cgroup");
        let rootfs = directory.path().join("rootfs");
        super::make_rootfs(&rootfs);
        let words = [words, &[env!("CARGO_BIN_EXE_podvisor-agent")]].concat();
        let agent = Command::new(words[0])
            .args(&words[1..])
            .arg("--listen")
            .arg(directory.path())
            .arg("--cgroups")
            .arg(&own)
            .stdin(Stdio::null())
            .spawn()
            .expect("the agent starts");
        let monitor = Monitor::dial(Dial::Process(directory.path().to_owned()), rootfs);
        let mut guest = Self { directory, agent, monitor };
        // The sysctls are a pod's alone, and set only where it has namespaces.
        let sysctls = [("net.ipv4.ip_default_ttl", "77"), ("kernel.shmmni", "33")];
        guest.done(Verb::Personalise(Personalise {
            seed: vec![7; 32],
            hostname: "the-pod".into(),
            sysctls: sysctls.map(|(name, value)| (name.into(), value.into())).into(),
            user_namespace,
            ..Default::default()
        }));
        guest
    }

    fn own_cgroup(&self) -> PathBuf {
        let name = self.directory.path().file_name().unwrap();
        self.directory.path().join("cgroup").join(format!("agent-{}", name.display()))
    }

    /// Names of the containers' cgroups.
    pub(crate) fn cgroups(&self) -> Vec<String> {
        let entries = fs::read_dir(self.own_cgroup().join("pod")).expect("the pod's cgroup").flatten();
        let directories = entries.filter(|entry| entry.path().is_dir());
        directories.map(|entry| entry.file_name().into_string().unwrap()).collect()
    }

    /// Kills one of its processes from outside.
    pub(crate) fn kill(pid: i32) {
        let pid = rustix::process::Pid::from_raw(pid).expect("a pid");
        rustix::process::kill_process(pid, rustix::process::Signal::KILL).expect("it is there");
    }

    /// Bytes of the agent's own memory. Pages of its program do not count: how many of those are there is for the kernel to decide, and a
    /// test's build has many.
    pub(crate) fn own_memory(&self) -> u64 {
        let status = fs::read_to_string(format!("/proc/{}/status", self.agent.id())).expect("its status");
        let line = status.lines().find_map(|line| line.strip_prefix("RssAnon:")).expect("RssAnon");
        line.split_whitespace().next().unwrap().parse::<u64>().unwrap() * 1024
    }
}

impl Drop for Guest {
    fn drop(&mut self) {
        // Everything below its cgroup, the agent's own children among them.
        let _ = fs::write(self.own_cgroup().join("cgroup.kill"), "1");
        let _ = self.agent.kill();
        let _ = self.agent.wait();
        let deadline = Instant::now() + PATIENCE;
        for directory in self
            .cgroups()
            .iter()
            .map(|name| self.own_cgroup().join("pod").join(name))
            .chain([self.own_cgroup().join("pod"), self.own_cgroup()])
        {
            while directory.exists() && fs::remove_dir(&directory).is_err() && Instant::now() < deadline {
                std::thread::yield_now();
            }
        }
        let _ = unmount(self.directory.path().join("cgroup"), UnmountFlags::DETACH);
    }
}
