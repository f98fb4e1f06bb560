//! A process of the machine: what it was started as, and its last words.

use std::io;
use std::os::fd::OwnedFd;
use std::os::unix::process::CommandExt;
use std::path::Path;
use std::process::{Command, Stdio};

use rustix::process::{Pid, Signal, WaitStatus};

use crate::poll::{Interest, Poller, Token, Watch};
use crate::runtime::unprotect;

/// Of what it writes to stderr so much is kept: the end.
const WORDS: usize = 2048;

/// A child of the monitor that belongs to the machine.
#[derive(Debug)]
pub(super) struct Program {
    name: String,
    pid: Pid,
    stderr: Option<OwnedFd>,
    watch: Watch,
    words: Vec<u8>,
    /// How it ended; it is reaped then.
    ended: Option<WaitStatus>,
}

impl Program {
    /// Starts `command`, which is or becomes `path`. `key` is what ready events of its stderr carry.
    pub(super) fn spawn(key: u64, path: &str, command: &mut Command, poller: &Poller) -> io::Result<Self> {
        let name = Path::new(path).file_name().map_or(path.into(), |name| name.to_string_lossy());
        let invalid = || io::Error::from(io::ErrorKind::InvalidData);
        // A group of its own, so that what it started goes with it.
        command.process_group(0).stdin(Stdio::null()).stdout(Stdio::null()).stderr(Stdio::piped());
        let mut child = command.spawn()?;
        let pid = i32::try_from(child.id()).ok().and_then(Pid::from_raw).ok_or_else(invalid)?;
        unprotect(pid);
        let stderr = OwnedFd::from(child.stderr.take().ok_or_else(invalid)?);
        let mut program = Self {
            name: name.into_owned(),
            pid,
            stderr: None,
            watch: Watch::new(Token::Words(key)),
            words: Vec::new(),
            ended: None,
        };
        crate::stdio::set_nonblocking(&stderr)?;
        program.watch.set(poller, &stderr, Some(Interest::READ))?;
        program.stderr = Some(stderr);
        Ok(program)
    }

    pub(super) fn pid(&self) -> Pid {
        self.pid
    }

    /// It is this process, which has not been reaped.
    pub(super) fn is(&self, pid: Pid) -> bool {
        self.pid == pid && self.ended.is_none()
    }

    pub(super) fn has_ended(&self) -> bool {
        self.ended.is_some()
    }

    /// Kills it and what it started.
    pub(super) fn kill(&self) {
        // The group exists as long as its leader, which has not been reaped.
        if self.ended.is_none() {
            let _ = rustix::process::kill_process_group(self.pid, Signal::KILL);
        }
    }

    /// It has been reaped.
    pub(super) fn end(&mut self, status: WaitStatus, poller: &Poller) {
        self.ended = Some(status);
        self.listen(poller);
        self.deafen(poller);
    }

    /// Reads what it has to say.
    pub(super) fn listen(&mut self, poller: &Poller) {
        /// Reads in a row, so that one that talks without an end does not keep the others waiting.
        const TURNS: usize = 8;
        let mut buffer = [0; 1024];
        for _ in 0..TURNS {
            let Some(stderr) = &self.stderr else { return };
            match rustix::io::read(stderr, &mut buffer) {
                Ok(0) => return self.deafen(poller),
                Ok(count) => {
                    self.words.extend_from_slice(&buffer[..count]);
                    let beyond = self.words.len().saturating_sub(WORDS);
                    self.words.drain(..beyond);
                }
                Err(rustix::io::Errno::AGAIN | rustix::io::Errno::INTR) => return,
                Err(_) => return self.deafen(poller),
            }
        }
    }

    pub(super) fn deafen(&mut self, poller: &Poller) {
        if let Some(stderr) = self.stderr.take() {
            let _ = self.watch.set(poller, &stderr, None);
        }
    }

    /// In one line: how it ended, or that it has not, and the last that it said.
    pub(super) fn fate(&self) -> String {
        let end = match self.ended.map(|status| (status.exit_status(), status.terminating_signal())) {
            Some((Some(code), _)) => format!("exited with {code}"),
            Some((None, Some(signal))) => format!("was killed by signal {signal}"),
            Some((None, None)) => "ended in an unknown way".to_owned(),
            None => "gave up".to_owned(),
        };
        let words = super::bounds::plain_end(&String::from_utf8_lossy(&self.words), 512);
        match words.lines().rev().find(|line| !line.trim().is_empty()) {
            Some(line) => format!("{} {end}: {}", self.name, line.trim()),
            None => format!("{} {end}", self.name),
        }
    }
}
