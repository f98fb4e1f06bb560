//! Calls of the OCI runtime: how the command line is made, and what came of it.

use std::ffi::OsString;
use std::fs::{File, OpenOptions};
use std::io::{self, Read, Seek, SeekFrom};
use std::os::unix::fs::OpenOptionsExt;
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::time::Duration;

use podvisor_proto::monitor as proto;
use rustix::process::{Pid, Signal, WaitStatus};

use crate::failure::{Failure, check_absolute};
use crate::poll::TimerId;
use crate::stdio::TheirEnds;
use crate::verbs::ReplyTo;

/// For a runtime that asks for none.
const DEFAULT_TIMEOUT: Duration = Duration::from_secs(120);
/// What the protocol passes on of the runtime's words.
pub(crate) const LOG_LIMIT: usize = 4096;

/// An OCI runtime program, checked.
#[derive(Debug, Clone)]
pub(crate) struct Runtime(proto::Runtime);

impl Runtime {
    pub(crate) fn parse(runtime: Option<proto::Runtime>) -> Result<Self, Failure> {
        let runtime = runtime.ok_or_else(|| Failure::invalid("runtime is missing"))?;
        check_absolute("runtime.path", &runtime.path)?;
        check_absolute("runtime.root", &runtime.root)?;
        if runtime.arguments.iter().any(|argument| argument.contains('\0')) {
            return Err(Failure::invalid("runtime.arguments must not hold a zero byte"));
        }
        Ok(Self(runtime))
    }

    pub(crate) fn timeout(&self) -> Duration {
        match self.0.timeout_ms {
            0 => DEFAULT_TIMEOUT,
            limit => Duration::from_millis(limit.into()),
        }
    }

    /// Starts `runtime [global arguments] verb arguments…` and comes back as soon as it is executing.
    pub(crate) fn spawn(
        &self,
        verb: &str,
        arguments: &[OsString],
        ends: Option<TheirEnds>,
        log: &Path,
    ) -> Result<Pid, Failure> {
        let mut command = Command::new(&self.0.path);
        command.args(&self.0.arguments).arg("--root").arg(&self.0.root);
        command.arg("--log").arg(log).args(["--log-format", "json"]);
        if self.0.systemd_cgroup {
            command.arg("--systemd-cgroup");
        }
        command.arg(verb).args(arguments);
        // A group of its own, so that at its deadline what it started goes with it.
        command.process_group(0);
        let ends = match ends {
            Some(ends) => ends,
            // Some runtimes write to stderr what belongs into the log.
            None => TheirEnds {
                stdin: Stdio::null(),
                stdout: Stdio::null(),
                stderr: append_to(log).map_or_else(|_| Stdio::null(), Stdio::from),
            },
        };
        command.stdin(ends.stdin).stdout(ends.stdout).stderr(ends.stderr);
        let child = command.spawn().map_err(|error| self.not_started(&error))?;
        let pid = i32::try_from(child.id()).ok().and_then(Pid::from_raw);
        let pid = pid.ok_or_else(|| Failure::system("start the OCI runtime", "it got no pid"))?;
        unprotect(pid);
        Ok(pid)
    }

    fn not_started(&self, error: &io::Error) -> Failure {
        let path = &self.0.path;
        match error.kind() {
            io::ErrorKind::NotFound | io::ErrorKind::PermissionDenied | io::ErrorKind::NotADirectory => {
                Failure::runtime_missing(format!("execute the OCI runtime {path}: {error}"))
            }
            _ if error.raw_os_error() == Some(libc::ENOEXEC) => {
                Failure::runtime_missing(format!("execute the OCI runtime {path}: {error}"))
            }
            _ => Failure::system(format!("start the OCI runtime {path}"), error),
        }
    }

    /// What became of a call, in the words that the daemon gets.
    pub(crate) fn outcome(&self, call: &Call, status: WaitStatus) -> Result<(), Failure> {
        let words = || last_words(&call.log).unwrap_or_default();
        let what = format!("{} {}", self.0.path, call.verb);
        match call.stopped {
            Some(Stopped::Late) => {
                let limit = self.timeout().as_millis();
                Err(Failure::timeout(format!("{what} did not end within {limit} ms"), words()))
            }
            Some(Stopped::Cancelled) => {
                Err(Failure::wrong_state(format!("{what} was cancelled: its container is to be killed")))
            }
            None if status.exit_status() == Some(0) => Ok(()),
            None => {
                let end = match (status.exit_status(), status.terminating_signal()) {
                    (Some(code), _) => format!("exited with {code}"),
                    (None, Some(signal)) => format!("was killed by signal {signal}"),
                    (None, None) => "ended in an unknown way".to_owned(),
                };
                Err(Failure::runtime(format!("{what} {end}"), words()))
            }
        }
    }
}

/// The monitor's own OOM score is protected; what it starts must not be. OCI runtimes set the score that the
/// container's configuration has, and pass their own on where it has none.
pub(crate) fn unprotect(pid: Pid) {
    let protected = std::fs::read_to_string("/proc/self/oom_score_adj")
        .ok()
        .and_then(|score| score.trim().parse::<i32>().ok())
        .is_some_and(|score| score < 0);
    if protected {
        let _ = std::fs::write(format!("/proc/{}/oom_score_adj", pid.as_raw_pid()), "0");
    }
}

fn append_to(path: &Path) -> io::Result<File> {
    OpenOptions::new().append(true).create(true).mode(0o600).open(path)
}

/// Why a call was ended by us.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Stopped {
    /// Its time was over.
    Late,
    /// Its container is to be deleted or killed.
    Cancelled,
}

/// What a call is made for, that is, what goes on when it ends. Numbers are containers or execs.
#[derive(Debug)]
pub(crate) enum Purpose {
    Create(u64),
    Start(u64, ReplyTo),
    Update(ReplyTo, PathBuf),
    /// `delete` after the container has ended.
    Delete(u64),
    /// `wait`, which ends with the container; its answer is in the file.
    Wait(u64, PathBuf),
    /// `kill` of something in a container; who is answered.
    Kill(u64, Option<ReplyTo>),
    /// `port-forward`.
    Forward(u64),
    /// `delete` after its creation has failed.
    CleanUp(u64),
    Exec(u64),
    /// `pause`, `checkpoint` or `resume`.
    Checkpoint(u64),
}

/// A running call.
#[derive(Debug)]
pub(crate) struct Call {
    pub(crate) pid: Pid,
    pub(crate) runtime: Runtime,
    pub(crate) verb: &'static str,
    pub(crate) log: PathBuf,
    /// `None`: it may take as long as it likes.
    pub(crate) deadline: Option<TimerId>,
    pub(crate) purpose: Purpose,
    pub(crate) stopped: Option<Stopped>,
}

impl Call {
    /// Kills it and what it started, once.
    pub(crate) fn stop(&mut self, why: Stopped) {
        if self.stopped.is_none() {
            self.stopped = Some(why);
            // The group exists as long as its leader, which is not reaped while the call is in the table.
            let _ = rustix::process::kill_process_group(self.pid, Signal::KILL);
        }
    }
}

/// The runtime's error message: the last error of its JSON log (`{"level":"error","msg":"…"}`), else the last line that
/// is no JSON.
fn last_words(log: &Path) -> Option<String> {
    #[derive(serde::Deserialize)]
    struct Entry {
        #[serde(default)]
        level: String,
        msg: String,
    }
    let text = tail(log).ok()?;
    let mut other = None;
    for line in text.lines().rev().filter(|line| !line.trim().is_empty()) {
        match serde_json::from_str::<Entry>(line) {
            Ok(entry) if matches!(entry.level.as_str(), "error" | "fatal" | "panic") => {
                return Some(shorten(entry.msg));
            }
            Ok(entry) => drop(other.get_or_insert(entry.msg)),
            Err(_) => drop(other.get_or_insert_with(|| line.to_owned())),
        }
    }
    other.map(shorten)
}

fn tail(path: &Path) -> io::Result<String> {
    const ENOUGH: u64 = 64 * 1024;
    let mut file = File::open(path)?;
    let length = file.metadata()?.len();
    file.seek(SeekFrom::Start(length.saturating_sub(ENOUGH)))?;
    let mut bytes = Vec::new();
    file.take(ENOUGH).read_to_end(&mut bytes)?;
    Ok(String::from_utf8_lossy(&bytes).into_owned())
}

/// Keeps the beginning: OCI runtimes wrap causes from left to right, but Go stack traces follow at the end.
pub(crate) fn shorten(mut text: String) -> String {
    if text.len() > LOG_LIMIT {
        let end = (0..=LOG_LIMIT).rev().find(|&end| text.is_char_boundary(end)).unwrap_or(0);
        text.truncate(end);
    }
    text
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_last_error_of_a_log_is_its_message() {
        let directory = tempfile::tempdir().unwrap();
        let log = directory.path().join("log");
        let words = |text: &str| {
            std::fs::write(&log, text).unwrap();
            last_words(&log)
        };
        let runc = "{\"level\":\"warning\",\"msg\":\"careful\",\"time\":\"t\"}\n\
                    {\"level\":\"error\",\"msg\":\"exec: \\\"nope\\\": not found\",\"time\":\"t\"}\nnope\n";
        assert_eq!(words(runc).unwrap(), "exec: \"nope\": not found");
        assert_eq!(words("{\"level\":\"warning\",\"msg\":\"careful\"}\n").unwrap(), "careful");
        assert_eq!(words("panic: no\n\n").unwrap(), "panic: no");
        assert_eq!(words(""), None);
        let long = words(&"ü".repeat(LOG_LIMIT)).unwrap();
        assert_eq!(long.len(), LOG_LIMIT);
        assert_eq!(last_words(&directory.path().join("missing")), None);
    }
}
