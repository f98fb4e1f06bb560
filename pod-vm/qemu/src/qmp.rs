//! QEMU Machine Protocol: lines of JSON, commands there, answers and events back.
//!
//! QEMU is not trusted more than the guest in it: a line has a limit, and one that is no message ends the machine.

use std::collections::BTreeMap;
use std::io;
use std::mem::MaybeUninit;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};

use rustix::io::Errno;
use rustix::net::{RecvFlags, SendAncillaryBuffer, SendAncillaryMessage, SendFlags, recv, sendmsg};
use serde::Deserialize;
use serde_json::{Value, json};

/// Far more than any answer to what is asked here.
const LONGEST_LINE: usize = 1 << 20;

/// What QEMU says.
#[derive(Debug, Clone, PartialEq)]
pub(crate) enum Message {
    /// It is there, in this version.
    Greeting(String),
    /// The answer to the command of that number.
    Answer(u64, Result<Value, String>),
    Event(String, Value),
}

#[derive(Deserialize)]
struct Line {
    #[serde(rename = "QMP")]
    greeting: Option<Greeting>,
    id: Option<u64>,
    #[serde(rename = "return")]
    result: Option<Value>,
    error: Option<Refusal>,
    event: Option<String>,
    #[serde(default)]
    data: Value,
}

#[derive(Deserialize)]
struct Greeting {
    version: Version,
}

#[derive(Deserialize)]
struct Version {
    qemu: BTreeMap<String, u32>,
}

#[derive(Deserialize)]
struct Refusal {
    desc: String,
}

/// The connection.
#[derive(Debug)]
pub(crate) struct Qmp {
    socket: Option<OwnedFd>,
    incoming: Vec<u8>,
    last: u64,
}

impl Qmp {
    pub(crate) fn new(socket: OwnedFd) -> Self {
        Self { socket: Some(socket), incoming: Vec::new(), last: 0 }
    }

    /// What to watch for reading, until its end.
    pub(crate) fn descriptor(&self) -> Option<BorrowedFd<'_>> {
        self.socket.as_ref().map(AsFd::as_fd)
    }

    /// Sends a command, perhaps with a descriptor; gives its number.
    pub(crate) fn execute(
        &mut self,
        command: &str,
        arguments: Value,
        descriptor: Option<BorrowedFd<'_>>,
    ) -> io::Result<u64> {
        self.last += 1;
        let mut line = json!({ "execute": command, "id": self.last });
        if !arguments.is_null() {
            line["arguments"] = arguments;
        }
        let line = format!("{line}\n");
        let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(1))];
        let mut control = SendAncillaryBuffer::new(&mut space);
        let descriptors: Vec<BorrowedFd<'_>> = descriptor.into_iter().collect();
        if !descriptors.is_empty() {
            control.push(SendAncillaryMessage::ScmRights(&descriptors));
        }
        let socket = self.socket.as_ref().ok_or(io::ErrorKind::BrokenPipe)?;
        // A command waits for the answer to the one before it, so there is room for it.
        let flags = SendFlags::NOSIGNAL | SendFlags::DONTWAIT;
        let sent = sendmsg(socket, &[io::IoSlice::new(line.as_bytes())], &mut control, flags)?;
        if sent == line.len() { Ok(self.last) } else { Err(io::ErrorKind::WouldBlock.into()) }
    }

    /// Reads once; gives whole messages. `None` when there is nothing more just now, or ever.
    pub(crate) fn read(&mut self) -> io::Result<Option<Vec<Message>>> {
        let Some(socket) = &self.socket else { return Ok(None) };
        let mut bytes = [0; 4096];
        match recv(socket, &mut bytes, RecvFlags::DONTWAIT) {
            Ok((count @ 1.., _)) => self.incoming.extend_from_slice(&bytes[..count]),
            Err(Errno::INTR) => {}
            Err(Errno::AGAIN) => return Ok(None),
            Ok((0, _)) | Err(_) => {
                self.socket = None;
                return Ok(None);
            }
        }
        let mut messages = Vec::new();
        while let Some(end) = self.incoming.iter().position(|byte| *byte == b'\n') {
            let line: Vec<u8> = self.incoming.drain(..=end).collect();
            messages.extend(parse(&line)?);
        }
        if self.incoming.len() > LONGEST_LINE {
            return Err(io::ErrorKind::InvalidData.into());
        }
        Ok(Some(messages))
    }
}

fn parse(line: &[u8]) -> io::Result<Option<Message>> {
    let line: Line = serde_json::from_slice(line)?;
    Ok(if let Some(greeting) = line.greeting {
        let part = |name| greeting.version.qemu.get(name).copied().unwrap_or_default();
        Some(Message::Greeting(format!("{}.{}.{}", part("major"), part("minor"), part("micro"))))
    } else if let Some(event) = line.event {
        Some(Message::Event(event, line.data))
    } else {
        match (line.id, line.result, line.error) {
            (Some(id), Some(result), _) => Some(Message::Answer(id, Ok(result))),
            (Some(id), _, Some(error)) => Some(Message::Answer(id, Err(error.desc))),
            // An error without a number is one about a line that was no command.
            _ => None,
        }
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn one(line: &str) -> Option<Message> {
        parse(line.as_bytes()).unwrap()
    }

    #[test]
    fn lines_become_messages() {
        let greeting = r#"{"QMP": {"version": {"qemu": {"micro": 22, "minor": 2, "major": 7}, "package": "Debian"}, "capabilities": ["oob"]}}"#;
        assert_eq!(one(greeting), Some(Message::Greeting("7.2.22".into())));
        assert_eq!(one(r#"{"return": {}, "id": 3}"#), Some(Message::Answer(3, Ok(json!({})))));
        let error = r#"{"id": 4, "error": {"class": "GenericError", "desc": "no such device"}}"#;
        assert_eq!(one(error), Some(Message::Answer(4, Err("no such device".into()))));
        let event = r#"{"timestamp": {"seconds": 1, "microseconds": 2}, "event": "SHUTDOWN", "data": {"guest": true, "reason": "guest-reset"}}"#;
        let data = json!({ "guest": true, "reason": "guest-reset" });
        assert_eq!(one(event), Some(Message::Event("SHUTDOWN".into(), data)));
        assert_eq!(one(r#"{"event": "STOP"}"#), Some(Message::Event("STOP".into(), Value::Null)));
        assert_eq!(one("{}"), None);
        for wrong in ["", "x", "[1]", r#"{"event": 5}"#, r#"{"return": {}, "id": "x"}"#] {
            assert!(parse(wrong.as_bytes()).is_err(), "{wrong}");
        }
    }
}
