//! Attach: a client beside the log.
//!
//! A client that reads slower than the container writes does not slow the container down: up to [`WINDOW`] bytes wait
//! for it, and then its stream ends with an error frame that says so. (The other choices: holding the container back
//! lets whoever runs `kubectl attach` and suspends it stop a service; leaving bytes out silently corrupts a
//! terminal.)

use podvisor_proto::monitor::{self as proto, Attach, StreamFrame, stream_frame::Frame};

use super::{Attached, Maker};
use crate::connection::Role;
use crate::failure::Failure;
use crate::monitor::Monitor;
use crate::verbs::{Answer, Answered, ReplyTo};

/// Bytes that may wait for an attached client.
const WINDOW: usize = 1024 * 1024;

impl Monitor {
    pub(crate) fn attach(&mut self, to: ReplyTo, request: &Attach) -> Answered {
        let id = &request.container_id;
        if !(request.stdin || request.stdout || request.stderr) {
            return Err(Failure::invalid("one of stdin, stdout and stderr must be asked for"));
        }
        let key = self.find_container(id).ok_or_else(|| Failure::no_container(id))?;
        let Some(container) = self.containers.get_mut(&key) else { return Err(Failure::no_container(id)) };
        let Some(child) = container.child() else { return Err(container.wrong_state("running")) };
        let started = proto::Started { pid: child.pid.as_raw_pid(), start_time: child.start_time };
        container.attached.push(Attached {
            connection: to.connection,
            stdout: request.stdout,
            stderr: request.stderr,
        });
        self.stream_opened(to, started, Role::Attach { container: key, stdin: request.stdin });
        Ok(Answer::Later)
    }

    /// What an attached client sends.
    pub(crate) fn attach_input(&mut self, key: u64, stdin: bool, frame: StreamFrame) {
        let Some(container) = self.containers.get_mut(&key) else { return };
        match frame.frame {
            Some(Frame::Resize(size)) => match container.maker {
                Maker::Runtime(_) => container.streams.resize(size.width, size.height),
                Maker::Guest(_) => self.resize_in_guest(key, size),
            },
            Some(Frame::Stdin(bytes)) if stdin => {
                let Some(input) = &mut container.streams.stdin else { return };
                if !bytes.is_empty() {
                    input.push(&bytes);
                } else if container.stdin_once {
                    input.finish();
                }
                self.flush_input(key);
            }
            _ => {}
        }
    }

    /// Writes what waits for a process's stdin, and lets its senders wait while that is too much.
    pub(crate) fn flush_input(&mut self, key: u64) {
        let streams = match (self.containers.get_mut(&key), self.execs.get_mut(&key)) {
            (Some(container), _) => &mut container.streams,
            (None, Some(exec)) => &mut exec.streams,
            (None, None) => return,
        };
        if let Some(input) = &mut streams.stdin
            && !input.flush(&self.poller)
            && let Some(input) = streams.stdin.take()
        {
            input.close(&self.poller);
        }
        let full = streams.stdin.as_ref().is_some_and(crate::stdio::Input::is_full);
        let senders: Vec<u64> = self
            .connections
            .iter()
            .filter(|(_, connection)| match connection.role {
                Role::Exec(exec) => exec == key,
                Role::Attach { container, stdin } => container == key && stdin,
                Role::Control | Role::Opening => false,
            })
            .map(|(sender, _)| *sender)
            .collect();
        for sender in senders {
            let Some(connection) = self.connections.get_mut(&sender) else { continue };
            let waited = connection.channel.pause(&self.poller, full);
            if waited && !full {
                self.process_frames(sender);
            }
        }
    }

    /// The container's input is gone: nobody needs to wait for it any more.
    pub(super) fn resume_attached(&mut self, key: u64) {
        self.flush_input(key);
    }

    /// Gives output to one attached client, or ends its stream when it does not keep up.
    pub(super) fn send_attached(&mut self, key: u64, connection: u64, frame: Frame) {
        let queued = self.connections.get(&connection).map_or(0, |it| it.channel.queued());
        if queued < WINDOW {
            return self.send_frame(connection, frame);
        }
        let detail = format!("the client does not keep up: {queued} bytes wait for it");
        self.send_frame(connection, Frame::Error(Failure::wrong_state(detail).into()));
        if let Some(connection) = self.connections.get_mut(&connection) {
            connection.channel.close(&self.poller);
        }
        if let Some(container) = self.containers.get_mut(&key) {
            container.attached.retain(|attached| attached.connection != connection);
        }
    }

    /// An attached client is gone. The container goes on.
    pub(crate) fn detach(&mut self, connection: u64, key: u64, stdin: bool) {
        let Some(container) = self.containers.get_mut(&key) else { return };
        container.attached.retain(|attached| attached.connection != connection);
        // `stdinOnce` of the Kubernetes API: the input is closed when the first client that had it disconnects.
        if stdin
            && container.stdin_once
            && let Some(input) = &mut container.streams.stdin
        {
            input.finish();
            self.flush_input(key);
        }
    }
}
