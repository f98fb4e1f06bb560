//! Requests: which verb goes where, and how answers go back.

use podvisor_proto::monitor::{
    self as proto, PROTOCOL_VERSION, Reply, Request, StreamFrame, reply, request::Verb, stream_frame,
};
use prost::Message;

use crate::adopt;
use crate::connection::Role;
use crate::failure::Failure;
use crate::frame::{Filled, frame};
use crate::monitor::Monitor;

/// Whom an answer goes to. The connection may be gone by then.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct ReplyTo {
    pub(crate) connection: u64,
    pub(crate) request: u64,
}

/// What a verb gives at once.
#[allow(clippy::large_enum_variant)] // it lives for one call
pub(crate) enum Answer {
    Now(reply::Result),
    /// The answer comes when the work is done.
    Later,
}

impl Answer {
    pub(crate) const DONE: Self = Self::Now(reply::Result::Done(proto::Done {}));
}

/// The answer of verbs that have nothing to tell.
pub(crate) fn done() -> reply::Result {
    reply::Result::Done(proto::Done {})
}

/// A verb's immediate result.
pub(crate) type Answered = Result<Answer, Failure>;

impl Monitor {
    /// Reads once from a client, and does what came.
    pub(crate) fn read_connection(&mut self, key: u64) {
        let Some(connection) = self.connections.get_mut(&key).filter(|connection| connection.channel.reads())
        else {
            return;
        };
        match connection.channel.incoming.fill(&connection.channel.socket) {
            Ok(Filled::More) => self.process_frames(key),
            Ok(Filled::Nothing) => {}
            Ok(Filled::End) | Err(_) => connection.channel.abort(),
        }
    }

    /// Does what has been read, until the client has to wait.
    pub(crate) fn process_frames(&mut self, key: u64) {
        loop {
            let Some(connection) =
                self.connections.get_mut(&key).filter(|connection| connection.channel.reads())
            else {
                return;
            };
            let body = match connection.channel.incoming.next() {
                Ok(Some(body)) => body,
                Ok(None) => return,
                Err(error) => {
                    connection.channel.abort();
                    return self.journal.note("a client sent no frame", "connection", &error);
                }
            };
            let processed = match connection.role {
                Role::Control | Role::Opening => {
                    Request::decode(body).map(|request| self.answer(key, request))
                }
                Role::Exec(exec) => StreamFrame::decode(body).map(|frame| self.exec_input(exec, frame)),
                Role::Attach { container, stdin } => {
                    StreamFrame::decode(body).map(|frame| self.attach_input(container, stdin, frame))
                }
            };
            if let Err(error) = processed {
                self.journal.note("a client sent no message", "connection", &error);
                if let Some(connection) = self.connections.get_mut(&key) {
                    connection.channel.abort();
                }
            }
        }
    }

    fn answer(&mut self, connection: u64, request: Request) {
        let to = ReplyTo { connection, request: request.id };
        let answered = if request.id == 0 {
            Err(Failure::invalid("id must not be 0"))
        } else if self.farewell {
            Err(Failure::wrong_state("the monitor is ending"))
        } else {
            match request.verb {
                Some(verb) => self.perform(to, verb),
                None => Err(Failure::unsupported("this monitor does not know the verb")),
            }
        };
        match answered {
            Ok(Answer::Later) => {}
            Ok(Answer::Now(result)) => self.reply(to, Ok(result)),
            Err(failure) => self.reply(to, Err(failure)),
        }
    }

    fn perform(&mut self, to: ReplyTo, verb: Verb) -> Answered {
        if self.pod.is_none() && !matches!(verb, Verb::Hello(_) | Verb::Adopt(_) | Verb::Shutdown(_)) {
            return Err(Failure::wrong_state("this monitor has no pod yet"));
        }
        if matches!(verb, Verb::Exec(_) | Verb::Attach(_) | Verb::Connect(_)) {
            let connection = self.connections.get_mut(&to.connection).filter(|connection| !connection.used);
            if connection.is_none() {
                return Err(Failure::invalid("a stream verb must be the first request of its connection"));
            }
        } else if !matches!(verb, Verb::Hello(_))
            && let Some(connection) = self.connections.get_mut(&to.connection)
        {
            connection.used = true;
        }
        match verb {
            Verb::Hello(hello) => self.hello(hello.protocol_version),
            Verb::Adopt(adopt) => adopt::adopt(self, adopt),
            Verb::Subscribe(proto::Subscribe {}) => {
                if let Some(connection) = self.connections.get_mut(&to.connection) {
                    connection.subscribed = true;
                }
                Ok(Answer::DONE)
            }
            Verb::ListProcesses(proto::ListProcesses {}) => {
                let processes = self.list_processes();
                Ok(Answer::Now(reply::Result::Processes(proto::Processes { processes })))
            }
            Verb::StartInit(request) => self.start_init(to, &request),
            Verb::CreateContainer(request) => self.create_container(to, request),
            Verb::StartContainer(request) => self.start_container(to, &request),
            Verb::KillContainer(request) => self.kill_container(to, &request),
            Verb::DeleteContainer(request) => Ok(self.delete_container(to, &request)),
            Verb::UpdateContainer(request) => self.update_container(to, &request),
            Verb::CheckpointContainer(request) => self.checkpoint_container(to, request),
            Verb::ResumeContainer(request) => self.resume_container(to, &request),
            Verb::ReopenLog(request) => self.reopen_log(to, &request),
            Verb::ExecSync(request) => self.exec_sync(to, request),
            Verb::Exec(request) => self.opening(to, |monitor| monitor.exec(to, request)),
            Verb::Attach(request) => self.opening(to, |monitor| monitor.attach(to, &request)),
            Verb::Connect(request) => self.opening(to, |monitor| monitor.connect(to, request.port)),
            Verb::StartVm(request) => self.start_vm(to, request),
            Verb::GuestStats(request) => self.guest_stats(to, request),
            Verb::ResizeVm(request) => self.resize_vm(to, &request),
            Verb::Shutdown(proto::Shutdown {}) => self.shutdown(to),
        }
    }

    /// A stream verb: what the client sends from now on waits for the answer.
    fn opening(&mut self, to: ReplyTo, verb: impl FnOnce(&mut Self) -> Answered) -> Answered {
        if let Some(connection) = self.connections.get_mut(&to.connection) {
            connection.role = Role::Opening;
            connection.channel.pause(&self.poller, true);
        }
        verb(self)
    }

    fn hello(&self, their_version: u32) -> Answered {
        if their_version == 0 {
            return Err(Failure::invalid("protocol_version is missing"));
        }
        Ok(Answer::Now(reply::Result::Hello(proto::HelloReply {
            protocol_version: PROTOCOL_VERSION,
            pod_id: self.pod.as_ref().map(|pod| pod.id.clone()).unwrap_or_default(),
            pid: i32::try_from(std::process::id()).unwrap_or_default(),
            build: env!("CARGO_PKG_VERSION").to_owned(),
        })))
    }

    /// Sends an answer. A stream connection whose verb failed ends with it.
    pub(crate) fn reply(&mut self, to: ReplyTo, result: Result<reply::Result, Failure>) {
        let Some(connection) = self.connections.get_mut(&to.connection) else { return };
        let failed = result.is_err();
        let result = result.unwrap_or_else(|failure| reply::Result::Error(failure.into()));
        connection.channel.send(&self.poller, frame(&Reply { id: to.request, result: Some(result) }));
        if failed && connection.role == Role::Opening {
            connection.channel.close(&self.poller);
        }
    }

    /// A stream verb has succeeded: the connection carries its stream from now on.
    pub(crate) fn stream_opened(&mut self, to: ReplyTo, started: proto::Started, role: Role) {
        self.reply(to, Ok(reply::Result::Started(started)));
        if let Some(connection) = self.connections.get_mut(&to.connection) {
            connection.role = role;
            connection.channel.pause(&self.poller, false);
        }
        // What the client sent right after its request.
        self.process_frames(to.connection);
    }

    pub(crate) fn send_frame(&mut self, connection: u64, frame_kind: stream_frame::Frame) {
        if let Some(connection) = self.connections.get_mut(&connection) {
            connection.channel.send(&self.poller, frame(&StreamFrame { frame: Some(frame_kind) }));
        }
    }

    /// Tells everybody who subscribed.
    pub(crate) fn broadcast(&mut self, kind: proto::event::Kind) {
        let event = reply::Result::Event(proto::Event { kind: Some(kind) });
        let bytes = frame(&Reply { id: 0, result: Some(event) });
        for connection in self.connections.values_mut().filter(|connection| connection.subscribed) {
            connection.channel.send(&self.poller, bytes.clone());
        }
    }
}
