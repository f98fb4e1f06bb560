//! In the place of a pod's monitor: a control connection, streams, and the verbs that tests use often.

use std::collections::{BTreeMap, VecDeque};
use std::io::{BufRead, BufReader, Read, Write};
use std::net::Shutdown;
use std::os::unix::net::UnixStream;
use std::path::PathBuf;
use std::time::{Duration, Instant};

use podvisor_proto::agent::request::Verb;
use podvisor_proto::agent::{
    CONTROL_PORT, CreateContainer, Error, Event, Exec, Exit, Hello, HelloReply, KillContainer, Open, Opened,
    Reply, Request, STREAM_PORT, Standard, StandardStream, StartContainer, event, open, reply,
};
use prost::Message;
use serde_json::Value;

use super::process;

pub(crate) const PATIENCE: Duration = Duration::from_secs(60);

/// What a request came to.
pub(crate) type Outcome = Result<reply::Result, Error>;

/// Where the agent is.
#[derive(Debug, Clone)]
pub(crate) enum Dial {
    /// A directory with a socket for each port.
    Process(PathBuf),
    /// The socket of a hypervisor (hypervisor.proto).
    Machine(PathBuf),
}

/// A control connection.
pub(crate) struct Client {
    socket: UnixStream,
    count: u64,
    answers: BTreeMap<u64, Outcome>,
    events: VecDeque<Event>,
}

/// A stream connection.
pub(crate) struct Bytes(UnixStream);

/// Who asks the agent.
pub(crate) struct Monitor {
    dial: Dial,
    client: Client,
    pub(crate) hello: HelloReply,
    /// Where containers have their root file systems, in the agent's eyes.
    pub(crate) rootfs: PathBuf,
}

impl Dial {
    /// A connection, as soon as somebody listens.
    fn connect(&self, port: u32) -> UnixStream {
        let deadline = Instant::now() + PATIENCE;
        loop {
            match self.try_connect(port) {
                Ok(socket) => {
                    socket.set_read_timeout(Some(PATIENCE)).expect("set a time limit");
                    return socket;
                }
                Err(error) => assert!(Instant::now() < deadline, "the agent does not listen: {error}"),
            }
            std::thread::sleep(Duration::from_millis(2));
        }
    }

    fn try_connect(&self, port: u32) -> std::io::Result<UnixStream> {
        match self {
            Self::Process(directory) => {
                let name = if port == CONTROL_PORT { "control.sock" } else { "stream.sock" };
                UnixStream::connect(directory.join(name))
            }
            Self::Machine(path) => {
                let mut socket = UnixStream::connect(path)?;
                writeln!(socket, "CONNECT {port}")?;
                let mut byte = [0];
                let mut line = String::new();
                while !line.ends_with('\n') {
                    socket.read_exact(&mut byte)?;
                    line.push(char::from(byte[0]));
                }
                assert!(line.starts_with("OK "), "{line}");
                Ok(socket)
            }
        }
    }
}

impl Monitor {
    pub(crate) fn dial(dial: Dial, rootfs: PathBuf) -> Self {
        let (client, hello) = Client::hello(&dial);
        Self { dial, client, hello, rootfs }
    }

    pub(crate) fn ask(&mut self, verb: Verb) -> Outcome {
        self.client.ask(verb)
    }

    /// Asks and does not wait; the answer is [`Self::answer`]'s.
    pub(crate) fn send(&mut self, verb: Verb) -> u64 {
        self.client.send(verb)
    }

    pub(crate) fn answer(&mut self, request: u64) -> Outcome {
        self.client.answer(request)
    }

    pub(crate) fn done(&mut self, verb: Verb) {
        let shown = format!("{verb:?}");
        match self.ask(verb) {
            Ok(reply::Result::Done(_)) => {}
            other => panic!("{shown}: {other:?}"),
        }
    }

    /// The spec with its root.
    pub(crate) fn spec(&self, spec: &Value) -> Value {
        let mut spec = spec.clone();
        if spec["root"]["path"] == "" {
            spec["root"]["path"] = self.rootfs.to_str().into();
        }
        spec
    }

    pub(crate) fn create(&mut self, id: &str, spec: &Value, stdin: bool) {
        let spec = self.spec(spec);
        let create = CreateContainer {
            container_id: id.into(),
            spec: spec.to_string().into_bytes(),
            stdin,
            ..Default::default()
        };
        match self.ask(Verb::CreateContainer(create)) {
            Ok(reply::Result::Started(_)) => {}
            other => panic!("{other:?}"),
        }
    }

    pub(crate) fn start(&mut self, id: &str) {
        self.done(Verb::StartContainer(StartContainer { container_id: id.into() }));
    }

    pub(crate) fn running(&mut self, id: &str, script: &str) {
        self.create(id, &super::shell(script), false);
        self.start(id);
    }

    /// What a container writes, and its exit.
    pub(crate) fn run(&mut self, id: &str, spec: &Value) -> (String, Exit) {
        self.create(id, spec, false);
        let stdout = self.stream(id, StandardStream::Stdout);
        self.start(id);
        (stdout.read_all(), self.exit_of(id))
    }

    pub(crate) fn execute(&mut self, container: &str, id: &str, arguments: &[&str]) -> Outcome {
        self.ask(Verb::Exec(Exec {
            container_id: container.into(),
            exec_id: id.into(),
            process: process(arguments).to_string().into_bytes(),
            ..Default::default()
        }))
    }

    /// A shell sets its trap some time after it was started: until then PID 1 of a namespace ignores the signal.
    pub(crate) fn signal_until_trapped(&mut self, id: &str, signal: i32) {
        let deadline = Instant::now() + PATIENCE;
        while self.client.events.is_empty() {
            assert!(Instant::now() < deadline, "the signal is not obeyed");
            self.done(Verb::KillContainer(KillContainer { container_id: id.into(), signal, all: false }));
        }
    }

    pub(crate) fn stream(&self, id: &str, which: StandardStream) -> Bytes {
        let standard = Standard { id: id.into(), which: which.into() };
        self.open(&Open { stream: Some(open::Stream::Standard(standard)) }).expect("the stream opens")
    }

    pub(crate) fn open(&self, open: &Open) -> Result<Bytes, Error> {
        let mut socket = self.dial.connect(STREAM_PORT);
        send(&mut socket, open);
        match receive::<Opened>(&mut socket).error {
            None => Ok(Bytes(socket)),
            Some(error) => Err(error),
        }
    }

    pub(crate) fn exit_of(&mut self, id: &str) -> Exit {
        loop {
            if let Some(event::Kind::Exited(exited)) = self.next_event().kind
                && exited.id == id
            {
                return exited.exit.expect("an exit");
            }
        }
    }

    pub(crate) fn next_event(&mut self) -> Event {
        self.client.next_event()
    }

    pub(crate) fn reconnect(&mut self) {
        (self.client, self.hello) = Client::hello(&self.dial);
    }

    /// A control connection that has not said Hello.
    pub(crate) fn silent(&self) -> Client {
        Client::new(&self.dial)
    }

    pub(crate) fn raw_control(&self, bytes: &[u8]) {
        write_and_see_the_end(self.dial.connect(CONTROL_PORT), bytes);
    }

    pub(crate) fn raw_stream(&self, bytes: &[u8]) {
        write_and_see_the_end(self.dial.connect(STREAM_PORT), bytes);
    }
}

fn write_and_see_the_end(mut socket: UnixStream, bytes: &[u8]) {
    socket.write_all(bytes).expect("write");
    // A reset is an end too.
    let _ = socket.shutdown(Shutdown::Write);
    let _ = socket.read_to_end(&mut Vec::new());
}

fn send(socket: &mut UnixStream, message: &impl Message) {
    let body = message.encode_to_vec();
    let length = u32::try_from(body.len()).unwrap();
    socket.write_all(&[&length.to_le_bytes()[..], &body].concat()).expect("send");
}

fn receive<M: Message + Default>(socket: &mut UnixStream) -> M {
    let mut length = [0; 4];
    socket.read_exact(&mut length).expect("an answer");
    let mut body = vec![0; usize::try_from(u32::from_le_bytes(length)).unwrap()];
    socket.read_exact(&mut body).expect("a whole answer");
    M::decode(body.as_slice()).expect("a message")
}

impl Client {
    fn new(dial: &Dial) -> Self {
        let socket = dial.connect(CONTROL_PORT);
        Self { socket, count: 0, answers: BTreeMap::new(), events: VecDeque::new() }
    }

    fn hello(dial: &Dial) -> (Self, HelloReply) {
        let mut client = Self::new(dial);
        let reply::Result::Hello(hello) = client.ask(Verb::Hello(Hello { protocol_version: 1 })).unwrap()
        else {
            panic!("no Hello")
        };
        assert_eq!(hello.protocol_version, 1);
        (client, hello)
    }

    pub(crate) fn ask(&mut self, verb: Verb) -> Outcome {
        let request = self.send(verb);
        self.answer(request)
    }

    fn send(&mut self, verb: Verb) -> u64 {
        self.count += 1;
        send(&mut self.socket, &Request { id: self.count, verb: Some(verb) });
        self.count
    }

    fn answer(&mut self, request: u64) -> Outcome {
        loop {
            if let Some(answer) = self.answers.remove(&request) {
                return answer;
            }
            let reply: Reply = receive(&mut self.socket);
            match reply.result.expect("a result") {
                reply::Result::Event(event) => self.events.push_back(event),
                other if reply.id == 0 => panic!("an answer to nothing: {other:?}"),
                reply::Result::Error(error) => drop(self.answers.insert(reply.id, Err(error))),
                result => drop(self.answers.insert(reply.id, Ok(result))),
            }
        }
    }

    fn next_event(&mut self) -> Event {
        if let Some(event) = self.events.pop_front() {
            return event;
        }
        let reply: Reply = receive(&mut self.socket);
        match reply.result {
            Some(reply::Result::Event(event)) => event,
            other => panic!("no event: {other:?}"),
        }
    }
}

impl Bytes {
    pub(crate) fn write(&self, bytes: &[u8]) {
        (&self.0).write_all(bytes).expect("write to the stream");
    }

    pub(crate) fn close(&self) {
        self.0.shutdown(Shutdown::Write).expect("close the stream");
    }

    pub(crate) fn read_line(&self) -> String {
        let mut line = String::new();
        BufReader::with_capacity(1, &self.0).read_line(&mut line).expect("a line");
        line
    }

    pub(crate) fn read_all(&self) -> String {
        let mut bytes = Vec::new();
        (&self.0).read_to_end(&mut bytes).expect("read the stream");
        String::from_utf8(bytes).expect("text")
    }
}
