//! A pod's network namespace.

use std::process::Command;

/// A network namespace with a persistent tap.
pub struct Namespace(String);

impl Namespace {
    pub fn new(name: &str) -> Self {
        let namespace = Self(format!("podvisor-qemu-{name}-{}", std::process::id()));
        let status = Command::new("ip").args(["netns", "add", &namespace.0]).status().unwrap();
        assert!(status.success());
        namespace.run("ip tuntap add tap0 mode tap && ip addr add 10.77.0.1/24 dev tap0");
        namespace
    }

    pub fn path(&self) -> String {
        format!("/run/netns/{}", self.0)
    }

    pub fn run(&self, script: &str) {
        let status =
            Command::new("ip").args(["netns", "exec", &self.0, "sh", "-c", script]).status().unwrap();
        assert!(status.success(), "{script}");
    }
}

impl Drop for Namespace {
    fn drop(&mut self) {
        let _ = Command::new("ip").args(["netns", "del", &self.0]).status();
    }
}
