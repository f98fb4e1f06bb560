//! A hypervisor with the test in the place of the monitor, and a guest whose first process does what the tests tell it.
#![allow(dead_code, missing_docs, unreachable_pub, unused_imports)]

mod file_server;
mod guest;
mod namespace;

use std::io::{ErrorKind, Read, Write};
use std::net::Shutdown;
use std::os::fd::AsRawFd;
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, ExitStatus, Stdio};
use std::time::{Duration, Instant};

use podvisor_proto::hypervisor::{
    Ended, Error, ErrorCode, Reply, Request, Start, Started, event, reply, request::Verb,
};
use prost::Message;

pub use file_server::{FileServer, built};
pub use guest::{Guest, Suite, guest, target, with_agent};
pub use namespace::Namespace;

/// How long anything may take on a busy machine before a test gives up.
pub const PATIENCE: Duration = Duration::from_secs(60);

/// A hypervisor, and where it has its files.
pub struct Hypervisor {
    pub control: Option<UnixStream>,
    pub process: Child,
    pub directory: tempfile::TempDir,
    last: u64,
    waiting: Vec<Reply>,
}

impl Hypervisor {
    pub fn new(arguments: &[&str]) -> Self {
        Self::of(Path::new(crate::PROGRAM), arguments)
    }

    /// Of another program than the one under test.
    pub fn of(program: &Path, arguments: &[&str]) -> Self {
        let (control, theirs) = UnixStream::pair().unwrap();
        control.set_read_timeout(Some(PATIENCE)).unwrap();
        // Another descriptor of the same socket, which the program inherits.
        let theirs = rustix::io::dup(theirs).unwrap();
        let process = Command::new(program)
            .args(["--control-fd", &theirs.as_raw_fd().to_string()])
            .args(arguments)
            .stdin(Stdio::null())
            .spawn()
            .unwrap();
        let directory = tempfile::tempdir().unwrap();
        std::fs::create_dir(directory.path().join("run")).unwrap();
        Self { control: Some(control), process, directory, last: 0, waiting: Vec::new() }
    }

    /// With a machine that runs.
    pub fn started(suite: Suite) -> Self {
        let mut hypervisor = Self::new(&[]);
        let start = hypervisor.start(suite);
        hypervisor.begin(start);
        hypervisor
    }

    pub fn path(&self, name: &str) -> PathBuf {
        self.directory.path().join(name)
    }

    fn text(&self, name: &str) -> String {
        self.path(name).to_str().unwrap().to_owned()
    }

    /// What the tests start with.
    pub fn start(&self, suite: Suite) -> Start {
        let guest = guest(suite);
        let user = std::env::var("PODVISOR_TEST_USER").map_or(65_534, |user| user.parse().unwrap());
        Start {
            kernel: guest.kernel.to_str().unwrap().into(),
            initramfs: guest.initramfs.to_str().unwrap().into(),
            memory: 256 << 20,
            cpus: 1,
            vsock_path: self.text("vsock"),
            run_dir: self.text("run"),
            console_path: self.text("console.log"),
            emulate: kvm().is_none(),
            user,
            ..Start::default()
        }
    }

    pub fn send(&mut self, verb: Verb) -> u64 {
        self.last += 1;
        let request = Request { id: self.last, verb: Some(verb) };
        let mut bytes = u32::try_from(request.encoded_len()).unwrap().to_le_bytes().to_vec();
        request.encode(&mut bytes).unwrap();
        self.write(&bytes);
        self.last
    }

    pub fn write(&mut self, bytes: &[u8]) {
        self.control.as_mut().unwrap().write_all(bytes).unwrap();
    }

    /// The next message; `None` at the end.
    fn next(&mut self) -> Option<Reply> {
        let control = self.control.as_mut().unwrap();
        let mut header = [0; 4];
        match control.read_exact(&mut header) {
            Ok(()) => {}
            Err(error)
                if error.kind() == ErrorKind::UnexpectedEof || error.kind() == ErrorKind::ConnectionReset =>
            {
                return None;
            }
            Err(error) => panic!("read a message: {error}"),
        }
        let mut body = vec![0; u32::from_le_bytes(header) as usize];
        control.read_exact(&mut body).unwrap();
        Some(Reply::decode(&*body).unwrap())
    }

    pub fn answer(&mut self, id: u64) -> Result<reply::Result, Error> {
        if let Some(at) = self.waiting.iter().position(|reply| reply.id == id) {
            return outcome(self.waiting.remove(at));
        }
        loop {
            let reply = self.next().expect("an answer");
            if reply.id == id {
                return outcome(reply);
            }
            self.waiting.push(reply);
        }
    }

    pub fn ask(&mut self, verb: Verb) -> Result<reply::Result, Error> {
        let id = self.send(verb);
        self.answer(id)
    }

    pub fn refused(&mut self, verb: Verb) -> (ErrorCode, String) {
        let error = self.ask(verb).expect_err("a refusal");
        assert!(!error.detail.is_empty() && !error.detail.contains('\n'), "{error:?}");
        (error.code(), error.detail)
    }

    pub fn done(&mut self, verb: Verb) {
        match self.ask(verb) {
            Ok(reply::Result::Done(_)) => {}
            other => panic!("expected Done, got {other:?}"),
        }
    }

    pub fn begin(&mut self, start: Start) -> Started {
        match self.ask(Verb::Start(start)) {
            Ok(reply::Result::Started(started)) => started,
            other => panic!("expected Started, got {other:?}"),
        }
    }

    pub fn ended(&mut self) -> Ended {
        let reply = self.waiting.pop().or_else(|| self.next()).expect("an event");
        match reply.result {
            Some(reply::Result::Event(event)) => match event.kind {
                Some(event::Kind::Ended(ended)) => ended,
                other => panic!("{other:?}"),
            },
            other => panic!("expected an event, got {other:?}"),
        }
    }

    /// One connection to a port of the guest, or its end.
    pub fn connect(&self, port: u32) -> Option<UnixStream> {
        let mut socket = UnixStream::connect(self.path("vsock")).expect("connect to the hypervisor's socket");
        socket.set_read_timeout(Some(PATIENCE)).unwrap();
        writeln!(socket, "CONNECT {port}").unwrap();
        let mut line = Vec::new();
        let mut byte = [0];
        while socket.read(&mut byte).expect("read the line") == 1 {
            line.push(byte[0]);
            if byte[0] == b'\n' {
                assert!(line.starts_with(b"OK "), "{line:?}");
                return Some(socket);
            }
        }
        assert!(line.is_empty(), "{line:?}");
        None
    }

    /// A connection to the guest's first process, as soon as it listens.
    pub fn guest(&self, command: &str) -> UnixStream {
        let deadline = Instant::now() + PATIENCE;
        loop {
            if let Some(mut socket) = self.connect(1024) {
                writeln!(socket, "{command}").unwrap();
                return socket;
            }
            assert!(Instant::now() < deadline, "the guest does not listen: {}", self.console());
            std::thread::sleep(Duration::from_millis(5));
        }
    }

    /// What the guest's first process answers to a command.
    pub fn tell(&self, command: &str) -> String {
        let mut socket = self.guest(command);
        socket.shutdown(Shutdown::Write).unwrap();
        let mut text = String::new();
        socket.read_to_string(&mut text).unwrap();
        text.trim_end().to_owned()
    }

    pub fn console(&self) -> String {
        String::from_utf8_lossy(&std::fs::read(self.path("console.log")).unwrap_or_default()).into_owned()
    }

    /// The program's end, and that nothing is left of it.
    pub fn finish(mut self, machine: i32) -> ExitStatus {
        let status = self.wait();
        assert!(!Path::new(&format!("/proc/{machine}")).exists(), "QEMU is still there");
        assert!(!self.path("vsock").exists(), "its socket is still there");
        assert_eq!(
            std::fs::read_dir(self.path("run")).unwrap().count(),
            0,
            "files are left in its directory"
        );
        status
    }

    pub fn wait(&mut self) -> ExitStatus {
        let deadline = Instant::now() + PATIENCE;
        loop {
            if let Some(status) = self.process.try_wait().unwrap() {
                return status;
            }
            assert!(Instant::now() < deadline, "the hypervisor does not end");
            std::thread::sleep(Duration::from_millis(5));
        }
    }
}

impl Drop for Hypervisor {
    fn drop(&mut self) {
        if std::thread::panicking() {
            // What it may have said of it.
            if let Some(control) = &mut self.control {
                let mut words = Vec::new();
                let _ = control.set_read_timeout(Some(Duration::from_millis(500)));
                let _ = control.read_to_end(&mut words);
                eprintln!("unread: {:?}", String::from_utf8_lossy(&words));
            }
            eprintln!("console: {}", self.console());
        }
        // It ends with its control connection; killed it is in case that a test has found it does not.
        self.control = None;
        if std::thread::panicking() {
            let _ = self.process.kill();
        }
        let _ = self.process.wait();
    }
}

fn outcome(reply: Reply) -> Result<reply::Result, Error> {
    match reply.result.expect("a result") {
        reply::Result::Error(error) => Err(error),
        other => Ok(other),
    }
}

/// Set where the tests are to run with KVM (`tests/lab/run`), as they can be told by hand.
pub fn kvm() -> Option<std::ffi::OsString> {
    std::env::var_os("PODVISOR_TEST_KVM")
}

/// Waits until something is so.
pub fn eventually(what: &str, mut holds: impl FnMut() -> bool) {
    let deadline = Instant::now() + PATIENCE;
    while !holds() {
        assert!(Instant::now() < deadline, "never: {what}");
        std::thread::sleep(Duration::from_millis(10));
    }
}
