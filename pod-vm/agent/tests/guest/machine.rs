//! An agent that is the first process of a virtual machine: QEMU's translator, Debian's kernels, a file server.

use std::fs;
use std::io::{Read, Write};
use std::ops::{Deref, DerefMut};
use std::os::fd::AsRawFd;
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::sync::OnceLock;
use std::time::{Instant, SystemTime};

use podvisor_guest::{Inputs, build};
use podvisor_proto::agent::add_root::{Lower, Upper};
use podvisor_proto::agent::request::Verb;
use podvisor_proto::agent::{AddRoot, AddShare, Exit, Personalise, TmpfsUpper};
use podvisor_proto::hypervisor::{self, Disk, Ended, Network, Share, Start, event, reply};
use prost::Message;
use rustix::mount::{MountPropagationFlags, UnmountFlags, mount_bind, mount_change, unmount};
use serde_json::Value;

use super::monitor::{Dial, Monitor, PATIENCE};

/// What the tests' machines have, bytes.
pub(crate) const MEMORY: u64 = 256 << 20;

/// Which of Debian's kernels.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Suite {
    /// 6.1
    Bookworm,
    /// 6.12
    Backports,
}

fn target() -> PathBuf {
    std::env::var_os("CARGO_TARGET_DIR")
        .map_or_else(|| Path::new(env!("CARGO_MANIFEST_DIR")).join("../../target"), PathBuf::from)
        .canonicalize()
        .expect("the target directory")
}

fn program(name: &str) -> PathBuf {
    let path = target().join("release").join(name);
    assert!(path.exists(), "{} is missing: `make build` makes it", path.display());
    path
}

/// Kernel and initramfs, built once for a test program.
fn guest(suite: Suite) -> &'static [PathBuf; 2] {
    static GUESTS: [OnceLock<[PathBuf; 2]>; 2] = [OnceLock::new(), OnceLock::new()];
    GUESTS[suite as usize].get_or_init(|| {
        let name = if suite == Suite::Bookworm { "bookworm" } else { "bookworm-backports" };
        let package = target().join("kernels").join(name).join("package");
        let only = |directory: PathBuf, prefix: &str| {
            let entries = fs::read_dir(&directory).unwrap_or_else(|error| {
                panic!("{}: {error}; `make kernels` fetches it", directory.display())
            });
            let mut paths = entries.map(|entry| entry.unwrap().path());
            paths.find(|path| path.file_name().unwrap().to_string_lossy().starts_with(prefix)).unwrap()
        };
        let inputs = Inputs {
            vmlinuz: only(package.join("boot"), "vmlinuz-"),
            modules: only(package.join("lib/modules"), ""),
            agent: program("podvisor-agent"),
            extra_modules: Vec::new(),
            package: None,
            shell: None,
        };
        let built = build(&inputs, &mut |_| {}).expect("the guest is built");
        let directory = target().join("tmp/guests").join(format!("agent-{name}"));
        fs::create_dir_all(&directory).unwrap();
        [("kernel", built.kernel()), ("initramfs", built.initramfs())].map(|(name, content)| {
            // Whole or not at all, whatever runs at the same time.
            let mut file = tempfile::NamedTempFile::new_in(&directory).unwrap();
            file.write_all(content).unwrap();
            file.persist(directory.join(name)).unwrap();
            directory.join(name)
        })
    })
}

/// A machine whose pod is personalised and has its share.
pub(crate) struct Machine {
    monitor: Monitor,
    control: UnixStream,
    hypervisor: Child,
    files: Child,
    directory: tempfile::TempDir,
    /// From the hypervisor's start until the agent has answered.
    pub(crate) took: std::time::Duration,
}

impl Deref for Machine {
    type Target = Monitor;
    fn deref(&self) -> &Monitor {
        &self.monitor
    }
}

impl DerefMut for Machine {
    fn deref_mut(&mut self) -> &mut Monitor {
        &mut self.monitor
    }
}

impl Machine {
    pub(crate) fn new(suite: Suite) -> Self {
        let mut machine = Self::bare(suite, Vec::new());
        machine.become_pod(Personalise::default());
        machine
    }

    /// One that nobody has asked anything.
    pub(crate) fn bare(suite: Suite, networks: Vec<Network>) -> Self {
        Self::with_disks(suite, networks, |_| Vec::new())
    }

    /// The same with disks, which are made from the root file system of its share.
    pub(crate) fn with_disks(
        suite: Suite,
        networks: Vec<Network>,
        disks: impl FnOnce(&Path) -> Vec<Disk>,
    ) -> Self {
        assert!(
            std::env::var_os(podvisor_critest::sandbox::MARK).is_some(),
            "run this in a sandbox: tests/scripts/cargo-test"
        );
        let [kernel, initramfs] = guest(suite);
        let home = target().join("tmp");
        fs::create_dir_all(&home).unwrap();
        let directory = tempfile::tempdir_in(home).expect("a directory");
        let path = |name: &str| directory.path().join(name);
        let text = |path: &Path| path.to_str().expect("text").to_owned();
        // What the guest sees: a shared mount, as the file server wants it.
        fs::create_dir_all(path("share")).unwrap();
        fs::create_dir(path("run")).unwrap();
        mount_bind(path("share"), path("share")).unwrap();
        mount_change(path("share"), MountPropagationFlags::SHARED).unwrap();
        super::make_rootfs(&path("share/rootfs"));
        let disks = disks(directory.path());
        let files = serve_files(&path("share"), &path("fs"));

        let (mut control, theirs) = UnixStream::pair().unwrap();
        let theirs = rustix::io::dup(theirs).unwrap();
        let began = Instant::now();
        let hypervisor = Command::new(program("podvisor-qemu"))
            .args(["--control-fd", &theirs.as_raw_fd().to_string()])
            .stdin(Stdio::null())
            .spawn()
            .expect("the hypervisor starts");
        drop(theirs);
        let start = Start {
            kernel: text(kernel),
            initramfs: text(initramfs),
            memory: MEMORY,
            cpus: 1,
            shares: vec![Share { tag: "pod".into(), socket_path: text(&path("fs")) }],
            networks,
            disks,
            vsock_path: text(&path("vsock")),
            run_dir: text(&path("run")),
            console_path: text(&path("console")),
            emulate: true,
            ..Start::default()
        };
        let request = hypervisor::Request { id: 1, verb: Some(hypervisor::request::Verb::Start(start)) };
        let body = request.encode_to_vec();
        let length = u32::try_from(body.len()).unwrap();
        control.write_all(&[&length.to_le_bytes()[..], &body].concat()).unwrap();
        match receive(&mut control).result {
            Some(reply::Result::Started(_)) => {}
            other => panic!("{other:?}"),
        }
        let monitor = Monitor::dial(Dial::Machine(path("vsock")), PathBuf::new());
        let took = began.elapsed();
        Self { monitor, control, hypervisor, files, directory, took }
    }

    pub(crate) fn become_pod(&mut self, wanted: Personalise) {
        let since = SystemTime::now().duration_since(SystemTime::UNIX_EPOCH).unwrap();
        self.done(Verb::Personalise(Personalise {
            seed: vec![7; 64],
            time_ns: i64::try_from(since.as_nanos()).unwrap(),
            reserve: if wanted.reserve == 0 { 64 << 20 } else { wanted.reserve },
            ..wanted
        }));
        self.done(Verb::AddShare(AddShare { tag: "pod".into(), read_only: false }));
    }

    /// A container with a root file system of its own, in the guest's memory: what it writes, and its exit.
    pub(crate) fn run_on_root(&mut self, id: &str, spec: &Value) -> (String, Exit) {
        self.add_root(id);
        self.run(id, &with_root(id, spec))
    }

    pub(crate) fn running_on_root(&mut self, id: &str, spec: &Value) {
        self.add_root(id);
        self.create(id, &with_root(id, spec), false);
        self.start(id);
    }

    pub(crate) fn add_root(&mut self, id: &str) {
        self.done(Verb::AddRoot(AddRoot {
            container_id: id.into(),
            lower: Some(Lower::SharePath("pod/rootfs".into())),
            upper: Some(Upper::Tmpfs(TmpfsUpper { size: 16 << 20 })),
            format: false,
        }));
    }

    /// The directory that the guest sees as its share.
    pub(crate) fn share(&self) -> PathBuf {
        self.directory.path().join("share")
    }

    pub(crate) fn console(&self) -> String {
        String::from_utf8_lossy(&fs::read(self.directory.path().join("console")).unwrap_or_default())
            .into_owned()
    }

    /// How the machine ends.
    pub(crate) fn ended(&mut self) -> Ended {
        match receive(&mut self.control).result {
            Some(reply::Result::Event(hypervisor::Event { kind: Some(event::Kind::Ended(ended)) })) => ended,
            other => panic!("{other:?}"),
        }
    }
}

/// The spec on the root that [`Machine::add_root`] makes.
pub(crate) fn with_root(id: &str, spec: &Value) -> Value {
    let mut spec = spec.clone();
    spec["root"]["path"] = format!("/run/podvisor/roots/{id}").into();
    spec
}

fn receive(control: &mut UnixStream) -> hypervisor::Reply {
    control.set_read_timeout(Some(PATIENCE)).unwrap();
    let mut length = [0; 4];
    control.read_exact(&mut length).expect("the hypervisor answers");
    let mut body = vec![0; usize::try_from(u32::from_le_bytes(length)).unwrap()];
    control.read_exact(&mut body).expect("a whole answer");
    hypervisor::Reply::decode(body.as_slice()).expect("a message")
}

/// Starts podvisor-fs, and waits until it listens. It goes with this thread.
fn serve_files(tree: &Path, socket: &Path) -> Child {
    let mut command = Command::new("setpriv");
    command.args(["--pdeathsig", "KILL", "sh", "-c", "exec \"$0\" \"$@\" 3>&1 1>&2"]);
    command.arg(program("podvisor-fs")).arg("--socket-path").arg(socket);
    command.arg("--shared-dir").arg(tree).args(["--ready-fd", "3"]);
    let mut files =
        command.stdin(Stdio::null()).stdout(Stdio::piped()).spawn().expect("the file server starts");
    // Its end is the closing of the descriptor, which the shell made of this pipe.
    files.stdout.take().unwrap().read_to_end(&mut Vec::new()).unwrap();
    files
}

impl Drop for Machine {
    fn drop(&mut self) {
        if std::thread::panicking() {
            eprintln!("the guest's console:\n{}", self.console());
        }
        // The machine goes with its control connection.
        let _ = self.control.shutdown(std::net::Shutdown::Both);
        let _ = self.hypervisor.wait();
        let _ = self.files.kill();
        let _ = self.files.wait();
        let _ = unmount(self.share(), UnmountFlags::DETACH);
    }
}
