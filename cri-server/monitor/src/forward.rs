//! Connect, where the pod's network stack is the runtime's own (gVisor): what listens inside does so in no namespace of the
//! host. The runtime opens the connection and copies it to a unix socket that it is told; the daemon gets the other end.

use std::os::fd::AsFd;

use podvisor_proto::monitor::Place;
use rustix::net::{SocketFlags, accept_with};

use crate::console::ListeningSocket;
use crate::failure::Failure;
use crate::monitor::Monitor;
use crate::runtime::Purpose;
use crate::verbs::{Answer, Answered, ReplyTo};

/// A connection that the runtime is making.
#[derive(Debug)]
pub(crate) struct Forward {
    to: ReplyTo,
    number: u16,
    listening: ListeningSocket,
}

impl Monitor {
    /// Lets the runtime connect to a port inside.
    pub(crate) fn forward(&mut self, to: ReplyTo, number: u16) -> Answered {
        let sandbox = self.containers.values().find(|it| it.maker.place() == Some(Place::Sandbox));
        let host = sandbox.and_then(|sandbox| sandbox.maker.on_host());
        let (Some(sandbox), Some(host), Some(pod)) = (sandbox, host, &self.pod) else {
            return Err(Failure::wrong_state("the pod's sandbox container is gone"));
        };
        let (runtime, id, run_dir) = (host.runtime.clone(), sandbox.id.clone(), pod.run_dir.clone());
        let key = self.new_key();
        let listening = ListeningSocket::bind(&run_dir, &format!("port{key}.sock"))
            .map_err(|error| Failure::system(format!("connect to port {number} in the pod"), error))?;
        let arguments =
            ["--stream".into(), listening.path.clone().into(), id.into(), number.to_string().into()];
        let called = self.call(&runtime, "port-forward", &arguments, None, Purpose::Forward(key));
        if called.is_err() {
            let _ = std::fs::remove_file(&listening.path);
        }
        called?;
        self.forwards.insert(key, Forward { to, number, listening });
        Ok(Answer::Later)
    }

    /// The runtime's `port-forward` has ended: the connection is there, or was refused.
    pub(crate) fn forwarded(&mut self, key: u64, outcome: Result<(), Failure>) {
        let Some(Forward { to, number, listening }) = self.forwards.remove(&key) else { return };
        let _ = std::fs::remove_file(&listening.path);
        let flags = SocketFlags::CLOEXEC | SocketFlags::NONBLOCK;
        let connected = outcome.and_then(|()| {
            accept_with(&listening.socket, flags)
                .map_err(|error| Failure::system(format!("connect to port {number} in the pod"), error))
        });
        match connected {
            // Whoever asked may be gone by now: the socket's end is then the connection's.
            Ok(socket) => self.hand_over(to, socket.as_fd()),
            Err(failure) => self.reply(to, Err(failure)),
        }
    }
}
