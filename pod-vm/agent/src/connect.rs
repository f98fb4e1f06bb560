//! Connections to ports of the pod, 127.0.0.1 first, then ::1. A program that does not accept keeps only its own client waiting.

use std::collections::BTreeMap;
use std::io;
use std::net::{Ipv4Addr, Ipv6Addr, SocketAddr};
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::time::{Duration, Instant};

use rustix::io::Errno;
use rustix::net::{AddressFamily, SocketFlags, SocketType, connect, socket_with, sockopt::socket_error};

use crate::agent::Agent;
use crate::failure::Failure;
use crate::streams::Pump;

/// How long a program of the pod may take to accept a connection: it is on the same machine.
const PATIENCE: Duration = Duration::from_secs(5);
/// Connections that are being made at once.
const MOST: usize = 64;

/// Those that are being made.
#[derive(Debug, Default)]
pub(crate) struct Connecting {
    under_way: BTreeMap<u64, Attempt>,
    count: u64,
}

#[derive(Debug)]
struct Attempt {
    /// Who wants it.
    client: OwnedFd,
    port: u16,
    socket: OwnedFd,
    /// Tried next.
    then: Option<SocketAddr>,
    deadline: Instant,
}

impl Connecting {
    /// What becomes writable when an attempt has come to its end.
    pub(crate) fn watched(&self) -> impl Iterator<Item = (u64, BorrowedFd<'_>)> {
        self.under_way.iter().map(|(key, attempt)| (*key, attempt.socket.as_fd()))
    }

    /// How long until one has taken too long.
    pub(crate) fn limit(&self) -> Option<Duration> {
        let first = self.under_way.values().map(|attempt| attempt.deadline).min()?;
        Some(first.saturating_duration_since(Instant::now()))
    }
}

impl Agent {
    /// Begins to connect a client to a port.
    pub(crate) fn connect(&mut self, client: OwnedFd, port: u32) {
        let port = u16::try_from(port).ok().filter(|port| *port != 0);
        let Some(port) = port else {
            return self.streams.carry(client, Err(Failure::invalid("a port is 1 to 65535")));
        };
        if self.connecting.under_way.len() >= MOST {
            let why = "too many connections wait to be accepted";
            return self.streams.carry(client, Err(Failure::state(why)));
        }
        let first = SocketAddr::from((Ipv4Addr::LOCALHOST, port));
        let then = SocketAddr::from((Ipv6Addr::LOCALHOST, port));
        self.try_to_connect(client, port, first, Some(then), Instant::now() + PATIENCE);
    }

    fn try_to_connect(
        &mut self,
        client: OwnedFd,
        port: u16,
        address: SocketAddr,
        then: Option<SocketAddr>,
        deadline: Instant,
    ) {
        match self.pod.inside(|| begin(&address)) {
            Ok(Ok(socket)) => {
                self.connecting.count += 1;
                let attempt = Attempt { client, port, socket, then, deadline };
                self.connecting.under_way.insert(self.connecting.count, attempt);
            }
            Ok(Err(error)) => self.connect_failed(client, port, then, deadline, error),
            Err(failure) => self.streams.carry(client, Err(failure)),
        }
    }

    fn connect_failed(
        &mut self,
        client: OwnedFd,
        port: u16,
        then: Option<SocketAddr>,
        deadline: Instant,
        error: io::Error,
    ) {
        if let Some(address) = then {
            return self.try_to_connect(client, port, address, None, deadline);
        }
        let failure = Failure::system(&format!("connect to port {port}"), error);
        self.streams.carry(client, Err(failure));
    }

    /// An attempt has come to its end.
    pub(crate) fn connected(&mut self, key: u64) {
        let Some(attempt) = self.connecting.under_way.remove(&key) else { return };
        let Attempt { client, port, socket, then, deadline } = attempt;
        match socket_error(&socket).and_then(|outcome| outcome) {
            Ok(()) => self.streams.carry(client, Ok(Pump::connection(socket))),
            Err(error) => self.connect_failed(client, port, then, deadline, error.into()),
        }
    }

    /// Gives up those whose time is over.
    pub(crate) fn give_up_connecting(&mut self) {
        let now = Instant::now();
        let late: Vec<u64> = self
            .connecting
            .under_way
            .iter()
            .filter(|(_, attempt)| attempt.deadline <= now)
            .map(|(key, _)| *key)
            .collect();
        for key in late {
            if let Some(Attempt { client, port, .. }) = self.connecting.under_way.remove(&key) {
                let why = format!("nobody accepted at port {port} within {} s", PATIENCE.as_secs());
                self.streams.carry(client, Err(Failure::timeout(why)));
            }
        }
    }
}

fn begin(address: &SocketAddr) -> io::Result<OwnedFd> {
    let family = if address.is_ipv4() { AddressFamily::INET } else { AddressFamily::INET6 };
    let flags = SocketFlags::CLOEXEC | SocketFlags::NONBLOCK;
    let socket = socket_with(family, SocketType::STREAM, flags, None)?;
    match connect(&socket, address) {
        Ok(()) | Err(Errno::INPROGRESS) => Ok(socket),
        Err(error) => Err(error.into()),
    }
}
