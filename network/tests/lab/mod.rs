//! A place of its own for each test: a thread in new mount, network, IPC and UTS namespaces with an empty `/run`. What
//! the test leaves there ends with the thread. Processes and threads started from it live there too.
#![allow(dead_code)] // not every test binary uses all of it

pub(crate) mod guest;

use std::net::TcpListener;
use std::path::Path;
use std::process::Command;
use std::time::{Duration, Instant};

use podvisor_network::namespace::{self, Namespaces};
use podvisor_network::{PortMapping, Protocol, Sandbox};
use rustix::mount::{MountFlags, MountPropagationFlags};
use rustix::thread::UnshareFlags;

/// Runs `test` in a thread of its own place.
pub(crate) fn isolated<T: Send + 'static>(test: impl FnOnce() -> T + Send + 'static) -> T {
    let thread = std::thread::Builder::new().spawn(move || {
        unshare(UnshareFlags::NEWNS | UnshareFlags::NEWNET | UnshareFlags::NEWIPC | UnshareFlags::NEWUTS);
        let private = MountPropagationFlags::PRIVATE | MountPropagationFlags::REC;
        rustix::mount::mount_change("/", private).unwrap();
        rustix::mount::mount("run", "/run", "tmpfs", MountFlags::empty(), None).unwrap();
        run("ip", &["link", "set", "lo", "up"]);
        test()
    });
    thread.unwrap().join().unwrap_or_else(|panic| std::panic::resume_unwind(panic))
}

#[allow(unsafe_code)]
fn unshare(flags: UnshareFlags) {
    // SAFETY: CLONE_FILES, which makes this call unsafe, is not among the flags that the function above passes.
    unsafe { rustix::thread::unshare_unsafe(flags) }.expect("these tests need root");
}

/// A program's standard output; panics with its standard error when it fails.
pub(crate) fn run(program: &str, arguments: &[&str]) -> String {
    let output =
        Command::new(program).args(arguments).output().unwrap_or_else(|error| panic!("{program}: {error}"));
    let (out, err) = (String::from_utf8_lossy(&output.stdout), String::from_utf8_lossy(&output.stderr));
    assert!(output.status.success(), "{program} {arguments:?}: {}: {out}{err}", output.status);
    out.into_owned()
}

/// Polls until `condition` holds; panics after a minute.
pub(crate) fn eventually(what: &str, mut condition: impl FnMut() -> bool) {
    let deadline = Instant::now() + Duration::from_secs(60);
    while !condition() {
        assert!(Instant::now() < deadline, "{what}: not within a minute");
        std::thread::sleep(Duration::from_millis(5));
    }
}

/// Names in a directory, sorted; empty when there is none.
pub(crate) fn names(directory: impl AsRef<Path>) -> Vec<String> {
    let Ok(entries) = std::fs::read_dir(directory) else { return Vec::new() };
    let mut names: Vec<_> = entries.map(|entry| entry.unwrap().file_name().into_string().unwrap()).collect();
    names.sort();
    names
}

/// A tokio runtime whose threads live where the calling thread does.
pub(crate) fn wait<T>(future: impl Future<Output = T>) -> T {
    thread_local! {
        static RUNTIME: tokio::runtime::Runtime =
            tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
    }
    RUNTIME.with(|runtime| runtime.block_on(future))
}

/// A pod's network namespace and what the network is told of it.
pub(crate) struct Pod {
    pub(crate) sandbox: Sandbox,
    pub(crate) namespaces: Namespaces,
}

impl Pod {
    pub(crate) fn new(id: &str) -> Self {
        Self::with_sysctls(id, &[])
    }

    pub(crate) fn with_sysctls(id: &str, sysctls: &[(&str, &str)]) -> Self {
        let sysctls = sysctls.iter().map(|(name, value)| ((*name).to_owned(), (*value).to_owned())).collect();
        let request = namespace::Request { name: id.into(), net: true, sysctls, ..Default::default() };
        let namespaces = namespace::create(&request).unwrap();
        let sandbox = Sandbox {
            id: id.into(),
            name: format!("name-{id}"),
            namespace: "default".into(),
            uid: format!("uid-{id}"),
            netns: namespaces.net.clone().unwrap(),
            cgroup_parent: format!("/kubepods/{id}"),
            ports: Vec::new(),
            ingress_bandwidth: None,
            egress_bandwidth: None,
            dns_servers: Vec::new(),
            dns_searches: Vec::new(),
            dns_options: Vec::new(),
        };
        Self { sandbox, namespaces }
    }

    pub(crate) fn port(
        mut self,
        protocol: Protocol,
        host_ip: Option<&str>,
        host_port: u16,
        container_port: u16,
    ) -> Self {
        let host_ip = host_ip.map(|address| address.parse().unwrap());
        self.sandbox.ports.push(PortMapping { protocol, container_port, host_port, host_ip });
        self
    }

    /// Runs `f` in the pod's network.
    pub(crate) fn inside<T: Send>(&self, f: impl FnOnce() -> T + Send) -> T {
        namespace::enter(&self.sandbox.netns, f).unwrap()
    }
}

/// A listener in the calling thread's network. The one before it at the same address may live a moment longer: a process
/// that another thread is just starting holds a copy until it is executed.
pub(crate) fn listen(address: &str) -> TcpListener {
    let mut listener = None;
    eventually("the address is free", || match TcpListener::bind(address) {
        Err(error) if error.kind() == std::io::ErrorKind::AddrInUse => false,
        bound => {
            listener = Some(bound.unwrap());
            true
        }
    });
    listener.unwrap()
}

/// `ip -n world …` and the like, with the words of `line`.
pub(crate) fn ip(line: &str) -> String {
    run("ip", &line.split_whitespace().collect::<Vec<_>>())
}
