//! Programs that play what belongs to a machine: a hypervisor whose guest is a process of this host, and a file server that serves
//! nothing. The hypervisor is the test's own binary again, told by `Start.command_line` how to behave:
//!
//! - `agent=DIRECTORY`: connections to the guest's ports go to `control.sock` and `stream.sock` there, where the test listens;
//!   else podvisor-agent is the guest;
//! - `refuse`, `deaf`, `die`: Start is refused, not answered, the program's end;
//! - `stubborn`: it does not stop; `stranger`: it names a process that is not its own;
//! - `swallow`: connections to ports get no answer.

use std::collections::BTreeMap;
use std::fs;
use std::io::{Read, Write};
use std::net::Shutdown;
use std::os::fd::AsFd;
use std::os::unix::net::{UnixListener, UnixStream};
use std::os::unix::process::{CommandExt, ExitStatusExt};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::sync::{Arc, Mutex};

use podvisor_proto::agent::{CONTROL_PORT, STREAM_PORT};
use podvisor_proto::hypervisor::{
    Done, EndReason, Ended, Error, ErrorCode, Event, Reply, Request, Resized, Start, Started, event, reply,
    request::Verb,
};
use prost::Message;

use super::Lab;

/// Where this file is, beside the agent's sockets, the guest's kernel does not answer.
pub const DEAF: &str = "deaf";

const ROLE: &str = "PODVISOR_MONITOR_FAKE";

/// A file server: makes its socket, says that it listens, waits to be killed.
const FILES: &str = r#"#!/bin/bash
while [ $# -gt 0 ]; do
    case $1 in --socket-path) socket=$2;; --shared-dir) directory=$2;; --tag) tag=$2;; --ready-fd) fd=$2;; esac
    shift 2
done
cd "$directory" || exit 7
echo "$tag" > "$socket"
exec {fd}>&-
exec sleep 100000
"#;

impl Lab {
    /// The hypervisor's program.
    pub fn hypervisor(&self) -> String {
        let own = std::env::current_exe().expect("own path");
        // Its connection becomes its stdin: a descriptor that safe code can have.
        let text = format!(
            "#!/bin/bash\n{ROLE}=hypervisor exec {} --exact plays_a_program --nocapture --test-threads=1 <&$2 >/dev/null\n",
            own.display()
        );
        self.program("podvisor-fake", &text)
    }

    pub fn file_server(&self) -> String {
        self.program("fake-fs", FILES)
    }

    pub fn program(&self, name: &str, text: &str) -> String {
        use std::os::unix::fs::PermissionsExt;
        let path = self.directory.join(name);
        fs::write(&path, text).expect("write the program");
        fs::set_permissions(&path, fs::Permissions::from_mode(0o755)).expect("make it executable");
        path.display().to_string()
    }
}

/// What a test named `plays_a_program` does: nothing, unless this process is such a program.
pub fn play() {
    if std::env::var(ROLE).is_ok_and(|role| role == "hypervisor") {
        let socket = std::io::stdin().as_fd().try_clone_to_owned().expect("a copy of the connection");
        Hypervisor { socket: Arc::new(Mutex::new(UnixStream::from(socket.try_clone().expect("a copy")))) }
            .serve(&mut UnixStream::from(socket));
        std::process::exit(0);
    }
}

#[derive(Clone)]
struct Hypervisor {
    socket: Arc<Mutex<UnixStream>>,
}

impl Hypervisor {
    fn serve(&self, requests: &mut UnixStream) {
        let mut machine: Option<u32> = None;
        let mut words = BTreeMap::new();
        let mut limits = (0, 0);
        while let Some(request) = read_request(requests) {
            let result = match request.verb.expect("a verb") {
                Verb::Start(start) => {
                    for word in start.command_line.split_whitespace() {
                        let (key, value) = word.split_once('=').unwrap_or((word, ""));
                        words.insert(key.to_owned(), value.to_owned());
                    }
                    limits = (start.memory_limit, start.cpus_limit);
                    if words.contains_key("deaf") {
                        continue;
                    }
                    if words.contains_key("die") {
                        eprintln!("something is broken");
                        std::process::exit(9);
                    }
                    if words.contains_key("refuse") {
                        error(ErrorCode::Failed, "this machine cannot be made")
                    } else {
                        let child = Self::start(&start, &words);
                        let pid = child.id();
                        machine = Some(pid);
                        self.clone().watch(child, start.console_path);
                        let pid = if words.contains_key("stranger") {
                            1
                        } else {
                            i32::try_from(pid).expect("a pid")
                        };
                        reply::Result::Started(Started {
                            pid,
                            name: "fake".into(),
                            emulated: true,
                            ..Started::default()
                        })
                    }
                }
                Verb::Stop(_) if words.contains_key("stubborn") => continue,
                Verb::Stop(_) => {
                    if let Some(pid) = machine {
                        kill(pid);
                    }
                    self.write(&Reply { id: request.id, result: Some(reply::Result::Done(Done {})) });
                    std::process::exit(0);
                }
                Verb::SetMemory(wanted) if wanted.bytes > limits.0 => {
                    error(ErrorCode::Failed, "too much memory")
                }
                Verb::SetCpus(wanted) if wanted.count > limits.1 => error(ErrorCode::Failed, "too many CPUs"),
                Verb::SetMemory(wanted) if Path::new(super::machine::HOLD).exists() => {
                    reply::Result::Resized(Resized { memory: wanted.bytes + (64 << 20) })
                }
                Verb::SetMemory(wanted) => note(&words, &format!("memory {}", wanted.bytes)),
                Verb::SetCpus(wanted) => note(&words, &format!("cpus {}", wanted.count)),
                Verb::Check(_) => reply::Result::Done(Done {}),
                Verb::AddDisk(add) => {
                    let disk = add.disk.expect("a disk");
                    if disk.path == "/refused" {
                        error(ErrorCode::Failed, "open disk: no such device")
                    } else {
                        note(&words, &format!("plug {}", disk.serial))
                    }
                }
                Verb::RemoveDisk(remove) if Path::new(super::machine::HOLD).exists() => {
                    error(ErrorCode::Failed, &format!("unplug {}: the guest has not", remove.serial))
                }
                Verb::RemoveDisk(remove) => note(&words, &format!("unplug {}", remove.serial)),
                other => panic!("unexpected: {other:?}"),
            };
            self.write(&Reply { id: request.id, result: Some(result) });
        }
        // The monitor is gone.
        if let Some(pid) = machine {
            kill(pid);
        }
    }

    fn write(&self, reply: &Reply) {
        let mut bytes = u32::try_from(reply.encoded_len()).expect("short").to_le_bytes().to_vec();
        reply.encode(&mut bytes).expect("encode");
        let _ = self.socket.lock().expect("nobody panicked").write_all(&bytes);
    }

    /// Starts the guest, and lets its ports be reached.
    fn start(start: &Start, words: &BTreeMap<String, String>) -> Child {
        let files = start.shares.first().expect("the monitor adds the share");
        assert!(Path::new(&files.socket_path).exists(), "the file server listens before the machine starts");
        fs::write(&start.console_path, "booting\nguest is \u{1b}[1mup\u{1b}[0m\n")
            .expect("write the console");
        let directory =
            words.get("agent").map_or_else(|| Path::new(&start.run_dir).join("guest"), PathBuf::from);
        if !words.contains_key("agent") {
            // Of an earlier attempt.
            let _ = fs::remove_dir_all(&directory);
        }
        fs::create_dir_all(&directory).expect("make the directory");
        let listener = UnixListener::bind(&start.vsock_path).expect("listen for connections to ports");
        let swallow = words.contains_key("swallow");
        let target = directory.clone();
        std::thread::spawn(move || {
            for connection in listener.incoming().flatten() {
                let target = target.clone();
                if swallow {
                    std::mem::forget(connection);
                } else {
                    std::thread::spawn(move || join(connection, &target));
                }
            }
        });
        // A namespace of its own, so that everything in it ends at once, as a guest does.
        let mut command = Command::new("unshare");
        command.args(["--pid", "--fork", "--kill-child", "--mount-proc", "--propagation", "unchanged"]);
        match words.get("agent") {
            Some(_) => command.args(["sleep", "100000"]),
            None => command.args(["sh", "-c", "\"$0\" \"$@\" & wait"]).arg(super::agent_program()).args([
                "--listen".as_ref(),
                directory.as_os_str(),
                "--cgroups".as_ref(),
                super::machine::GUEST_CGROUP.as_ref(),
                "--share".as_ref(),
                format!("{}={}", super::machine::TAG, super::machine::SHARE).as_ref(),
            ]),
        };
        // And a group, because it may be ended before it has tied them together.
        command.process_group(0).stdin(Stdio::null()).spawn().expect("unshare (util-linux) runs")
    }

    /// Tells when the guest ends: by SIGUSR1 as if it had panicked, by SIGUSR2 as if it had switched itself off.
    fn watch(self, mut child: Child, console_path: String) {
        std::thread::spawn(move || {
            let status = child.wait().expect("wait for the guest");
            let reason = match status.signal() {
                Some(10) => EndReason::Panic,
                Some(12) => EndReason::PowerOff,
                Some(_) => EndReason::Killed,
                None => EndReason::Failure,
            };
            let console = fs::read_to_string(console_path).unwrap_or_default().replace('\u{1b}', "");
            let ended = Ended { reason: reason.into(), detail: format!("{status}"), console };
            let event = Event { kind: Some(event::Kind::Ended(ended)) };
            self.write(&Reply { id: 0, result: Some(reply::Result::Event(event)) });
            std::process::exit(0);
        });
    }
}

fn error(code: ErrorCode, detail: &str) -> reply::Result {
    reply::Result::Error(Error { code: code.into(), detail: detail.into() })
}

/// Appends a line to `sizes` where the test looks.
fn note(_words: &BTreeMap<String, String>, line: &str) -> reply::Result {
    let mut file = fs::File::options().append(true).create(true).open(super::machine::SIZES).expect("open");
    writeln!(file, "{line}").expect("write");
    reply::Result::Done(Done {})
}

fn kill(pid: u32) {
    let pid = i32::try_from(pid).ok().and_then(rustix::process::Pid::from_raw).expect("a pid");
    let _ = rustix::process::kill_process_group(pid, rustix::process::Signal::KILL);
}

fn read_request(socket: &mut UnixStream) -> Option<Request> {
    let mut header = [0; 4];
    socket.read_exact(&mut header).ok()?;
    let mut body = vec![0; u32::from_le_bytes(header) as usize];
    socket.read_exact(&mut body).ok()?;
    Some(Request::decode(&*body).expect("a request"))
}

/// Joins a connection with the port that it names.
fn join(mut ours: UnixStream, directory: &Path) {
    let mut line = Vec::new();
    let mut byte = [0];
    while ours.read_exact(&mut byte).is_ok() && byte != *b"\n" {
        line.push(byte[0]);
    }
    let line = String::from_utf8(line).expect("text");
    let port: u32 = line.strip_prefix("CONNECT ").expect("CONNECT").parse().expect("a port");
    let name = match port {
        CONTROL_PORT => "control.sock",
        STREAM_PORT => "stream.sock",
        // Nobody listens there.
        _ if !directory.join(DEAF).exists() => return,
        _ => return std::mem::forget(ours),
    };
    let Ok(theirs) = UnixStream::connect(directory.join(name)) else { return };
    if ours.write_all(b"OK 4711\n").is_err() {
        return;
    }
    let copies = (ours.try_clone().expect("a copy"), theirs.try_clone().expect("a copy"));
    std::thread::spawn(move || carry(copies.0, copies.1));
    carry(theirs, ours);
}

/// Carries one direction to its end; when the reader has gone, the writer is told.
fn carry(mut from: UnixStream, mut to: UnixStream) {
    let copied = std::io::copy(&mut from, &mut to);
    let _ = to.shutdown(Shutdown::Write);
    if copied.is_err() {
        let _ = from.shutdown(Shutdown::Both);
    }
}
