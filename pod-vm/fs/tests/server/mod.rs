//! A tree that is shared, and the server that serves it.
#![allow(dead_code)] // each test program uses its part

use std::fs;
use std::io::Read;
use std::os::unix::fs::DirBuilderExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};

use rustix::mount::{
    MountFlags, MountPropagationFlags, UnmountFlags, mount, mount_bind, mount_change, unmount,
};
use tempfile::TempDir;

pub(crate) fn target() -> PathBuf {
    std::env::var_os("CARGO_TARGET_DIR")
        .map_or_else(|| Path::new(env!("CARGO_MANIFEST_DIR")).join("../../target"), PathBuf::from)
}

/// A directory that is a shared mount, as the daemon makes one for each virtual machine. On a disk, like the daemon's.
pub(crate) struct Tree {
    scratch: TempDir,
}

impl Tree {
    pub(crate) fn new() -> Self {
        assert!(
            std::env::var_os(podvisor_critest::sandbox::MARK).is_some(),
            "run this in a sandbox: tests/scripts/cargo-test"
        );
        let home = target().join("tmp");
        fs::create_dir_all(&home).unwrap();
        let tree = Self { scratch: tempfile::tempdir_in(home.canonicalize().unwrap()).unwrap() };
        fs::DirBuilder::new().mode(0o755).create(tree.path()).unwrap();
        mount_bind(tree.path(), tree.path()).unwrap();
        mount_change(tree.path(), MountPropagationFlags::SHARED).unwrap();
        tree
    }

    /// The shared directory.
    pub(crate) fn path(&self) -> PathBuf {
        self.scratch.path().join("tree")
    }

    /// A place beside it, on the same file system.
    pub(crate) fn beside(&self, name: &str) -> PathBuf {
        self.scratch.path().join(name)
    }

    /// Mounts an overlay at a directory below, as for a container's root, over `lower`.
    pub(crate) fn mount_overlay(&self, at: &str, lower: &Path) {
        let (upper, work) = (self.beside("upper"), self.beside("work"));
        for directory in [&upper, &work, &self.path().join(at)] {
            fs::create_dir_all(directory).unwrap();
        }
        let data =
            format!("lowerdir={},upperdir={},workdir={}", lower.display(), upper.display(), work.display());
        let data = std::ffi::CString::new(data).unwrap();
        mount("overlay", self.path().join(at), "overlay", MountFlags::empty(), data.as_c_str()).unwrap();
    }
}

impl Drop for Tree {
    fn drop(&mut self) {
        let _ = unmount(self.path(), UnmountFlags::DETACH);
    }
}

/// podvisor-fs.
pub(crate) struct Server {
    process: Child,
    socket: PathBuf,
}

impl Server {
    /// Starts it, and waits until it listens. It ends with this thread.
    pub(crate) fn start(tree: &Tree, options: &[&str]) -> Self {
        Self::start_program(Path::new(env!("CARGO_BIN_EXE_podvisor-fs")), tree, options)
    }

    /// The one that users run.
    pub(crate) fn start_release(tree: &Tree, options: &[&str]) -> Self {
        let program = target().join("release/podvisor-fs");
        assert!(program.exists(), "{}: `make build` makes it", program.display());
        Self::start_program(&program, tree, options)
    }

    fn start_program(program: &Path, tree: &Tree, options: &[&str]) -> Self {
        let socket = tree.beside("socket");
        let mut process = command(program, tree, &socket).args(options).spawn().unwrap();
        let mut said = String::new();
        // Its end is the closing of the descriptor, which the shell made of this pipe.
        process.stdout.take().unwrap().read_to_string(&mut said).unwrap();
        assert_eq!(said, "");
        assert!(socket.exists(), "it did not start: {:?}", process.wait());
        Self { process, socket }
    }

    pub(crate) fn socket(&self) -> &Path {
        &self.socket
    }

    pub(crate) fn id(&self) -> u32 {
        self.process.id()
    }

    fn proc(&self, name: &str) -> PathBuf {
        Path::new("/proc").join(self.process.id().to_string()).join(name)
    }

    /// The root as it sees it.
    pub(crate) fn root(&self) -> PathBuf {
        self.proc("root")
    }

    pub(crate) fn link(&self, name: &str) -> String {
        fs::read_link(self.proc(name)).unwrap().into_os_string().into_string().unwrap()
    }

    pub(crate) fn file(&self, name: &str) -> String {
        fs::read_to_string(self.proc(name)).unwrap()
    }

    /// A line of its status, without its name.
    pub(crate) fn status(&self, name: &str) -> String {
        let status = self.file("status");
        let line = status.lines().find_map(|line| line.strip_prefix(name)?.strip_prefix(':'));
        line.unwrap_or_else(|| panic!("no {name} in {status}")).trim().to_owned()
    }

    /// Its own memory in KiB: what is resident, without the guest's memory, which is counted as shared.
    pub(crate) fn own_kib(&self) -> u64 {
        let kib = |name: &str| self.status(name).strip_suffix(" kB").unwrap().parse::<u64>().unwrap();
        kib("RssAnon") + kib("RssFile")
    }

    /// How many descriptors it has open.
    pub(crate) fn descriptors(&self) -> usize {
        fs::read_dir(self.proc("fd")).unwrap().count()
    }

    /// What they are open on.
    pub(crate) fn open_files(&self) -> Vec<PathBuf> {
        let entries = fs::read_dir(self.proc("fd")).unwrap();
        entries.filter_map(|entry| fs::read_link(entry.ok()?.path()).ok()).collect()
    }

    /// Waits for its end.
    pub(crate) fn end(mut self) -> std::process::ExitStatus {
        self.process.wait().unwrap()
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        let _ = self.process.kill();
        let _ = self.process.wait();
    }
}

/// The server with a descriptor 3 that is its standard output, here a pipe; its real standard output is that for errors.
pub(crate) fn command(program: &Path, tree: &Tree, socket: &Path) -> Command {
    // All three programs are the same process.
    let mut command = Command::new("setpriv");
    command.args(["--pdeathsig", "KILL", "sh", "-c", "exec \"$0\" \"$@\" 3>&1 1>&2"]);
    command.arg(program).arg("--socket-path").arg(socket);
    command.arg("--shared-dir").arg(tree.path()).args(["--ready-fd", "3"]);
    command.stdin(Stdio::null()).stdout(Stdio::piped());
    command
}
