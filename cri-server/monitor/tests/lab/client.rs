//! The daemon's side of the monitor protocol, blocking.

use std::collections::VecDeque;
use std::io::{ErrorKind, IoSliceMut, Read, Write};
use std::mem::MaybeUninit;
use std::net::TcpStream;
use std::os::unix::net::UnixStream;

use podvisor_proto::monitor::{
    Connect, Error, ErrorCode, Event, Exec, ExecProcess, ExecSync, ExecSyncReply, Exit, ProcessExit, Reply,
    Request, Started, StreamFrame, TerminalSize, event, reply, request::Verb, stream_frame::Frame,
};
use prost::Message;
use rustix::net::{RecvAncillaryBuffer, RecvAncillaryMessage, RecvFlags, recvmsg};

use super::PATIENCE;
use super::bundle::process;

pub struct Client {
    pub socket: UnixStream,
    next_id: u64,
    events: VecDeque<Event>,
}

impl Client {
    pub fn new(socket: UnixStream) -> Self {
        socket.set_read_timeout(Some(PATIENCE)).expect("set the time limit");
        Self { socket, next_id: 0, events: VecDeque::new() }
    }

    pub fn write(&mut self, message: &impl Message) {
        let mut bytes = u32::try_from(message.encoded_len()).expect("short").to_le_bytes().to_vec();
        message.encode(&mut bytes).expect("encode");
        self.socket.write_all(&bytes).expect("the monitor takes the frame");
    }

    /// The next frame; `None` at the end.
    pub fn read_frame(&mut self) -> Option<Vec<u8>> {
        let mut header = [0; 4];
        match self.socket.read_exact(&mut header) {
            Ok(()) => {}
            Err(error) if matches!(error.kind(), ErrorKind::UnexpectedEof | ErrorKind::ConnectionReset) => {
                return None;
            }
            Err(error) => panic!("read a frame: {error}"),
        }
        let mut body = vec![0; u32::from_le_bytes(header) as usize];
        self.socket.read_exact(&mut body).expect("a whole frame");
        Some(body)
    }

    /// Sends a request and tells its id.
    pub fn send(&mut self, verb: Verb) -> u64 {
        self.next_id += 1;
        let id = self.next_id;
        self.write(&Request { id, verb: Some(verb) });
        id
    }

    /// The next reply that is no event.
    pub fn reply(&mut self) -> Reply {
        loop {
            let reply = Reply::decode(&*self.read_frame().expect("a reply")).expect("a message");
            match reply.result {
                Some(reply::Result::Event(event)) => self.events.push_back(event),
                _ => return reply,
            }
        }
    }

    pub fn result(&mut self, id: u64) -> Result<reply::Result, Error> {
        let reply = self.reply();
        assert_eq!(reply.id, id);
        match reply.result.expect("a result") {
            reply::Result::Error(error) => Err(error),
            other => Ok(other),
        }
    }

    pub fn ask(&mut self, verb: Verb) -> Result<reply::Result, Error> {
        let id = self.send(verb);
        self.result(id)
    }

    pub fn done(&mut self, verb: Verb) {
        match self.ask(verb) {
            Ok(reply::Result::Done(_)) => {}
            other => panic!("expected Done, got {other:?}"),
        }
    }

    /// Asks for what must fail.
    pub fn refused(&mut self, verb: Verb) -> (ErrorCode, Error) {
        let error = self.ask(verb).expect_err("a refusal");
        assert!(!error.detail.is_empty() && !error.detail.contains('\n'), "{error:?}");
        (error.code(), error)
    }

    pub fn event(&mut self) -> event::Kind {
        if let Some(event) = self.events.pop_front() {
            return event.kind.expect("a kind");
        }
        let reply = Reply::decode(&*self.read_frame().expect("an event")).expect("a message");
        assert_eq!(reply.id, 0);
        match reply.result {
            Some(reply::Result::Event(event)) => event.kind.expect("a kind"),
            other => panic!("expected an event, got {other:?}"),
        }
    }

    /// The next event, which stays the next.
    pub fn peek(&mut self) -> event::Kind {
        let kind = self.event();
        self.events.push_front(Event { kind: Some(kind.clone()) });
        kind
    }

    pub fn exited(&mut self) -> (String, Exit) {
        match self.event() {
            event::Kind::Exited(ProcessExit { id, exit, .. }) => (id, exit.expect("an exit")),
            other @ event::Kind::Oom(_) => panic!("expected an exit, got {other:?}"),
        }
    }

    /// The next event, which must be an end: of whom, with which code, and why.
    pub fn end(&mut self) -> (String, i32, String) {
        match self.event() {
            event::Kind::Exited(ProcessExit { id, exit, reason }) => {
                (id, exit.expect("an exit").code, reason)
            }
            other @ event::Kind::Oom(_) => panic!("expected an exit, got {other:?}"),
        }
    }

    pub fn exec_sync(&mut self, request: ExecSync) -> Result<ExecSyncReply, Error> {
        self.ask(Verb::ExecSync(request)).map(|result| match result {
            reply::Result::ExecSync(reply) => reply,
            other => panic!("exec answered {other:?}"),
        })
    }

    /// Begins a stream.
    pub fn open(&mut self, verb: Verb) -> Started {
        match self.ask(verb).expect("the stream opens") {
            reply::Result::Started(started) => started,
            other => panic!("expected Started, got {other:?}"),
        }
    }

    pub fn stdin(&mut self, bytes: &[u8]) {
        self.write(&StreamFrame { frame: Some(Frame::Stdin(bytes.to_vec())) });
    }

    pub fn resize(&mut self, width: u32, height: u32) {
        self.write(&StreamFrame { frame: Some(Frame::Resize(TerminalSize { width, height })) });
    }

    pub fn stream_frame(&mut self) -> Option<Frame> {
        let body = self.read_frame()?;
        Some(StreamFrame::decode(&*body).expect("a message").frame.expect("a frame"))
    }

    /// Reads output until it holds `text`.
    pub fn stdout_until(&mut self, text: &str) -> String {
        let mut seen = String::new();
        while !seen.contains(text) {
            match self.stream_frame() {
                Some(Frame::Stdout(bytes)) => seen.push_str(&String::from_utf8_lossy(&bytes)),
                other => panic!("{other:?} before {text:?} came; so far {seen:?}"),
            }
        }
        seen
    }

    /// Reads a stream to its end.
    pub fn rest(&mut self) -> Rest {
        let mut rest = Rest::default();
        while let Some(frame) = self.stream_frame() {
            assert!(rest.exit.is_none() && rest.error.is_none(), "{frame:?} after the last frame");
            match frame {
                Frame::Stdout(bytes) => rest.stdout.extend(bytes),
                Frame::Stderr(bytes) => rest.stderr.extend(bytes),
                Frame::Exit(exit) => rest.exit = Some(exit),
                Frame::Error(error) => rest.error = Some(error),
                other => panic!("the monitor sent {other:?}"),
            }
        }
        rest
    }
}

/// What came until a stream's end.
#[derive(Debug, Default)]
pub struct Rest {
    pub stdout: Vec<u8>,
    pub stderr: Vec<u8>,
    pub exit: Option<Exit>,
    pub error: Option<Error>,
}

pub fn exec_process(container: &str, exec_id: &str, arguments: &[&str], terminal: bool) -> ExecProcess {
    ExecProcess {
        container_id: container.into(),
        exec_id: exec_id.into(),
        process: process(arguments, terminal).to_string().into(),
    }
}

pub fn sync(container: &str, exec_id: &str, script: &str) -> ExecSync {
    ExecSync {
        exec: Some(exec_process(container, exec_id, &["sh", "-c", script], false)),
        timeout_ms: 0,
        output_limit: 1 << 20,
    }
}

pub fn stream(container: &str, exec_id: &str, script: &str) -> Exec {
    Exec {
        exec: Some(exec_process(container, exec_id, &["sh", "-c", script], false)),
        stdin: true,
        stdout: true,
        stderr: true,
        terminal: false,
    }
}

pub fn terminal(container: &str, exec_id: &str, script: &str) -> Exec {
    Exec {
        exec: Some(exec_process(container, exec_id, &["sh", "-c", script], true)),
        stdin: true,
        stdout: true,
        stderr: false,
        terminal: true,
    }
}

/// Asks for a connection and takes it.
pub fn connected(client: &mut Client, port: u32) -> TcpStream {
    client.send(Verb::Connect(Connect { port }));
    let mut bytes = [0; 256];
    let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(1))];
    let mut control = RecvAncillaryBuffer::new(&mut space);
    let slices = &mut [IoSliceMut::new(&mut bytes)];
    let received = recvmsg(&client.socket, slices, &mut control, RecvFlags::CMSG_CLOEXEC).unwrap();
    let reply = Reply::decode(&bytes[4..received.bytes]).unwrap();
    assert!(matches!(reply.result, Some(reply::Result::Connected(_))), "{reply:?}");
    let descriptor = control.drain().find_map(|message| match message {
        RecvAncillaryMessage::ScmRights(mut descriptors) => descriptors.next(),
        _ => None,
    });
    assert!(client.read_frame().is_none(), "the connection ends");
    let stream = TcpStream::from(descriptor.expect("a descriptor"));
    stream.set_nonblocking(false).unwrap();
    stream
}
