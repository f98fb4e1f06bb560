//! An agent, a root file system for its containers, and a client that blocks.
#![allow(dead_code, unused_imports)] // not every test program uses all of it

mod machine;
mod monitor;
mod process;

use std::fs;
use std::path::Path;
use std::process::Command;

use podvisor_proto::agent::{Error, ErrorCode};
use serde_json::{Value, json};

pub(crate) use machine::{MEMORY, Machine, Suite, with_root};
pub(crate) use monitor::Outcome;
pub(crate) use process::Guest;

/// The code of a refusal.
pub(crate) fn code<T: std::fmt::Debug>(outcome: Result<T, Error>) -> ErrorCode {
    outcome.expect_err("it must be refused").code()
}

pub(crate) fn process(arguments: &[&str]) -> Value {
    json!({"args": arguments, "env": ["PATH=/bin"], "cwd": "/", "user": {"uid": 0, "gid": 0}})
}

/// A spec without its root.
pub(crate) fn shell(script: &str) -> Value {
    json!({
        "ociVersion": "1.0.2",
        "process": process(&["sh", "-c", script]),
        "root": {"path": ""},
        "mounts": [
            {"destination": "/proc", "type": "proc", "source": "proc", "options": ["nosuid", "noexec", "nodev"]},
            {"destination": "/dev", "type": "tmpfs", "source": "tmpfs", "options": ["nosuid", "mode=755"]},
            {"destination": "/dev/pts", "type": "devpts", "source": "devpts",
             "options": ["nosuid", "noexec", "newinstance", "ptmxmode=0666", "mode=0620"]},
        ],
        "linux": {"namespaces": [
            {"type": "mount"}, {"type": "pid"}, {"type": "ipc"}, {"type": "uts"}, {"type": "cgroup"},
        ]},
    })
}

/// A root file system around a static busybox.
fn make_rootfs(rootfs: &Path) {
    for name in ["bin", "proc", "dev", "tmp", "etc"] {
        fs::create_dir_all(rootfs.join(name)).expect("make the root");
    }
    let busybox = podvisor_critest::contents::busybox_program();
    fs::copy(&busybox, rootfs.join("bin/busybox")).expect("`make images` fetches busybox");
    let listed = Command::new(&busybox).arg("--list").output().expect("busybox runs");
    for name in String::from_utf8(listed.stdout).unwrap().lines().filter(|name| *name != "busybox") {
        std::os::unix::fs::symlink("busybox", rootfs.join("bin").join(name)).expect("link");
    }
}
