//! An agent that a test plays: it answers what it is asked, well or badly, and says what the test wants.

use std::io::{Read, Write};
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::PathBuf;
use std::sync::{Arc, Mutex, MutexGuard};

use podvisor_proto::agent::{
    Done, Event, Exit, HelloReply, Open, Opened, Process, ProcessExit, Processes, Reply, Request, Started,
    StatsReply, event, reply, request::Verb,
};
use prost::Message;

use super::{Lab, Pod, until};

/// What it knows and how it behaves.
#[derive(Default)]
pub struct State {
    /// Everything that it was asked, on all connections.
    pub asked: Vec<Verb>,
    /// The control connection, from the second one on with those before it.
    pub control: Option<UnixStream>,
    pub connections: usize,
    /// What it answers to List.
    pub processes: Vec<Process>,
    /// Stream connections that were opened and have not been taken by the test.
    pub streams: Vec<(Open, UnixStream)>,
    /// What it does instead of what is right.
    pub instead: Option<Answerer>,
    /// What it answers to Open.
    pub opened: Option<Vec<u8>>,
    sequence: u64,
}

type Answerer = Box<dyn FnMut(&Request) -> Option<Instead> + Send>;

pub enum Instead {
    Say(Vec<u8>),
    HangUp,
}

/// The agent.
pub struct Agent {
    pub directory: PathBuf,
    state: Arc<Mutex<State>>,
}

pub fn frame(message: &impl Message) -> Vec<u8> {
    let mut bytes = u32::try_from(message.encoded_len()).expect("short").to_le_bytes().to_vec();
    message.encode(&mut bytes).expect("encode");
    bytes
}

fn read<M: Message + Default>(socket: &mut UnixStream) -> Option<M> {
    let mut header = [0; 4];
    socket.read_exact(&mut header).ok()?;
    let mut body = vec![0; u32::from_le_bytes(header) as usize];
    socket.read_exact(&mut body).ok()?;
    Some(M::decode(&*body).expect("a message"))
}

impl Lab {
    /// Listens where the hypervisor joins the guest's ports.
    pub fn agent(&self, name: &str) -> Agent {
        let directory = self.directory.join(name);
        std::fs::create_dir_all(&directory).expect("make the directory");
        let state: Arc<Mutex<State>> = Arc::default();
        let control = UnixListener::bind(directory.join("control.sock")).expect("listen");
        let theirs = Arc::clone(&state);
        std::thread::spawn(move || {
            for socket in control.incoming().flatten() {
                let theirs = Arc::clone(&theirs);
                std::thread::spawn(move || serve(socket, &theirs));
            }
        });
        let stream = UnixListener::bind(directory.join("stream.sock")).expect("listen");
        let theirs = Arc::clone(&state);
        std::thread::spawn(move || {
            for mut socket in stream.incoming().flatten() {
                let Some(open) = read(&mut socket) else { continue };
                let mut state = theirs.lock().expect("nobody panicked");
                let opened = state.opened.clone().unwrap_or_else(|| frame(&Opened::default()));
                let _ = socket.write_all(&opened);
                state.streams.push((open, socket));
            }
        });
        Agent { directory, state }
    }

    /// A pod whose guest's agent the test plays.
    pub fn with_agent(&self, name: &str) -> (Pod, Agent) {
        let agent = self.agent(&format!("{name}-agent"));
        let mut pod = self.machine_pod_in(name);
        self.start(&mut pod, &agent.word());
        (pod, agent)
    }
}

fn serve(mut socket: UnixStream, state: &Mutex<State>) {
    {
        let mut state = state.lock().expect("nobody panicked");
        state.control = Some(socket.try_clone().expect("a copy"));
        state.connections += 1;
    }
    while let Some(request) = read::<Request>(&mut socket) {
        let mut state = state.lock().expect("nobody panicked");
        let verb = request.verb.clone().expect("a verb");
        state.asked.push(verb.clone());
        let processes = state.processes.clone();
        match state.instead.as_mut().and_then(|instead| instead(&request)) {
            None => {}
            Some(Instead::Say(bytes)) => {
                let _ = socket.write_all(&bytes);
                continue;
            }
            Some(Instead::HangUp) => {
                let _ = socket.shutdown(std::net::Shutdown::Both);
                return;
            }
        }
        let result = match verb {
            Verb::Hello(_) => reply::Result::Hello(HelloReply {
                protocol_version: 1,
                // It has been, when somebody comes back.
                personalised: state.connections > 1,
                ..HelloReply::default()
            }),
            Verb::CreateContainer(_) | Verb::Exec(_) | Verb::StartInit(_) => {
                reply::Result::Started(Started { pid: 7 })
            }
            Verb::List(_) => reply::Result::Processes(Processes { processes }),
            Verb::Stats(_) => reply::Result::Stats(StatsReply::default()),
            _ => reply::Result::Done(Done {}),
        };
        let _ = socket.write_all(&frame(&Reply { id: request.id, result: Some(result) }));
    }
}

impl Agent {
    /// What the hypervisor is told.
    pub fn word(&self) -> String {
        format!("agent={}", self.directory.display())
    }

    pub fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().expect("nobody panicked")
    }

    /// From now on it answers so, where the function says something.
    pub fn instead(&self, answerer: impl FnMut(&Request) -> Option<Instead> + Send + 'static) {
        self.state().instead = Some(Box::new(answerer));
    }

    /// Says something unasked; whether anybody takes it is not its concern.
    pub fn say(&self, bytes: &[u8]) {
        let socket = self.state().control.as_ref().expect("a connection").try_clone().expect("a copy");
        let _ = (&socket).write_all(bytes);
    }

    pub fn tell(&self, kind: event::Kind) -> u64 {
        let sequence = {
            let mut state = self.state();
            state.sequence += 1;
            state.sequence
        };
        self.say(&event_frame(sequence, kind));
        sequence
    }

    pub fn exited(&self, id: &str, code: i32) -> u64 {
        self.tell(event::Kind::Exited(exit(id, code)))
    }

    pub fn hang_up(&self) {
        if let Some(socket) = self.state().control.take() {
            let _ = socket.shutdown(std::net::Shutdown::Both);
        }
    }

    /// Waits until it has been asked for something.
    pub fn until_asked(&self, what: &str, wanted: impl Fn(&Verb) -> bool) {
        until(what, || self.state().asked.iter().any(&wanted));
    }

    /// The connections that carry streams, which the caller now has.
    pub fn take_streams(&self) -> Vec<(Open, UnixStream)> {
        std::mem::take(&mut self.state().streams)
    }
}

pub fn event_frame(sequence: u64, kind: event::Kind) -> Vec<u8> {
    let event = Event { sequence, kind: Some(kind) };
    frame(&Reply { id: 0, result: Some(reply::Result::Event(event)) })
}

pub fn exit(id: &str, code: i32) -> ProcessExit {
    ProcessExit { id: id.into(), exit: Some(Exit { code, finished_at: 0, oom_killed: false }) }
}
