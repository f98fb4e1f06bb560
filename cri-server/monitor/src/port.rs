//! Connect: a TCP connection to a port on the pod's loopback, handed to the daemon as a descriptor.
//!
//! The socket is made by a thread that has joined the pod's network namespace and ends at once; a socket belongs to the
//! namespace it was made in, so connecting and everything after it happens outside.

use std::fs::File;
use std::io;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::path::Path;
use std::time::Duration;

use podvisor_proto::monitor::{self as proto, Place, Reply, reply};
use rustix::io::Errno;
use rustix::net::{
    AddressFamily, SendAncillaryBuffer, SendAncillaryMessage, SendFlags, SocketFlags, SocketType, connect,
    sendmsg, socket_with, sockopt,
};
use rustix::thread::{LinkNameSpaceType, move_into_link_name_space};

use crate::failure::Failure;
use crate::frame::frame;
use crate::monitor::Monitor;
use crate::poll::{Interest, Timer, TimerId, Token, Watch};
use crate::verbs::{Answer, Answered, ReplyTo};

/// How long a connection on the loopback may take: a full accept queue answers nothing.
const TIMEOUT: Duration = Duration::from_secs(10);
/// Tried in this order.
const LOOPBACKS: [IpAddr; 2] = [IpAddr::V4(Ipv4Addr::LOCALHOST), IpAddr::V6(Ipv6Addr::LOCALHOST)];

/// A connection that is being made.
#[derive(Debug)]
pub(crate) struct Port {
    to: ReplyTo,
    number: u16,
    /// Index into [`LOOPBACKS`].
    attempt: usize,
    socket: OwnedFd,
    watch: Watch,
    timer: TimerId,
    /// What each address answered.
    refusals: Vec<String>,
}

impl Monitor {
    pub(crate) fn connect(&mut self, to: ReplyTo, port: u32) -> Answered {
        let port = u16::try_from(port).ok().filter(|port| *port != 0);
        let port = port.ok_or_else(|| Failure::invalid("port must be 1 to 65535"))?;
        if self.machine.is_some() {
            return self.connect_in_guest(to, port);
        }
        if self.containers.values().any(|container| container.maker.place() == Some(Place::Sandbox)) {
            return self.forward(to, port);
        }
        let key = self.new_key();
        let timer = self.timers.set(TIMEOUT, Timer::Port(key));
        self.try_address(key, to, port, 0, timer, Vec::new());
        Ok(Answer::Later)
    }

    /// Begins to connect to the address of this attempt, or to the first later one that can be tried.
    fn try_address(
        &mut self,
        key: u64,
        to: ReplyTo,
        port: u16,
        first: usize,
        timer: TimerId,
        mut refusals: Vec<String>,
    ) {
        let namespace = self.pod.as_ref().and_then(|pod| pod.network_namespace.clone());
        for (attempt, address) in LOOPBACKS.iter().enumerate().skip(first) {
            let address = SocketAddr::new(*address, port);
            let mut watch = Watch::new(Token::Port(key));
            let begun = socket_inside(namespace.as_deref(), address).and_then(|socket| {
                match connect(&socket, &address) {
                    Ok(()) | Err(Errno::INPROGRESS) => {}
                    Err(error) => return Err(error.into()),
                }
                watch.set(&self.poller, &socket, Some(Interest::WRITE))?;
                Ok(socket)
            });
            match begun {
                Ok(socket) => {
                    self.ports
                        .insert(key, Port { to, number: port, attempt, socket, watch, timer, refusals });
                    return;
                }
                Err(error) => refusals.push(format!("{address}: {error}")),
            }
        }
        self.timers.cancel(timer);
        self.reply(
            to,
            Err(Failure::system(format!("connect to port {port} in the pod"), refusals.join(", "))),
        );
    }

    /// A connection was made or refused.
    pub(crate) fn port_ready(&mut self, key: u64) {
        let Some(mut port) = self.ports.remove(&key) else { return };
        let _ = port.watch.set(&self.poller, &port.socket, None);
        match sockopt::socket_error(&port.socket) {
            Ok(Ok(())) => {
                self.timers.cancel(port.timer);
                self.hand_over(port.to, port.socket.as_fd());
            }
            Ok(Err(error)) | Err(error) => {
                let address = SocketAddr::new(LOOPBACKS[port.attempt], port.number);
                port.refusals.push(format!("{address}: {error}"));
                self.try_address(key, port.to, port.number, port.attempt + 1, port.timer, port.refusals);
            }
        }
    }

    /// Gives the daemon a connection.
    pub(crate) fn hand_over(&mut self, to: ReplyTo, socket: BorrowedFd<'_>) {
        let Some(connection) = self.connections.get_mut(&to.connection) else { return };
        let connected = Some(reply::Result::Connected(proto::Connected {}));
        let bytes = frame(&Reply { id: to.request, result: connected });
        let descriptors = [socket];
        let mut space = [std::mem::MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(1))];
        let mut control = SendAncillaryBuffer::new(&mut space);
        control.push(SendAncillaryMessage::ScmRights(&descriptors));
        // Nothing else is on its way on this connection, so a few bytes always fit.
        let sent = (connection.channel.queued() == 0).then(|| {
            let flags = SendFlags::NOSIGNAL | SendFlags::DONTWAIT;
            sendmsg(&connection.channel.socket, &[io::IoSlice::new(&bytes)], &mut control, flags)
        });
        if matches!(sent, Some(Ok(count)) if count == bytes.len()) {
            connection.channel.close(&self.poller);
        } else {
            connection.channel.abort();
        }
    }

    pub(crate) fn port_time_is_over(&mut self, key: u64) {
        let Some(mut port) = self.ports.remove(&key) else { return };
        let _ = port.watch.set(&self.poller, &port.socket, None);
        let address = SocketAddr::new(LOOPBACKS[port.attempt], port.number);
        port.refusals.push(format!("{address}: no answer within {} s", TIMEOUT.as_secs()));
        let attempt = format!("connect to port {} in the pod", port.number);
        self.reply(port.to, Err(Failure::system(attempt, port.refusals.join(", "))));
    }

    /// The client is gone.
    pub(crate) fn ports_abandoned(&mut self, connection: u64) {
        let Self { ports, timers, poller, .. } = self;
        ports.retain(|_, port| {
            let abandoned = port.to.connection == connection;
            if abandoned {
                timers.cancel(port.timer);
                let _ = port.watch.set(poller, &port.socket, None);
            }
            !abandoned
        });
    }
}

/// A TCP socket of the pod's network namespace.
fn socket_inside(namespace: Option<&Path>, address: SocketAddr) -> io::Result<OwnedFd> {
    let family = if address.is_ipv4() { AddressFamily::INET } else { AddressFamily::INET6 };
    let make = move || {
        let flags = SocketFlags::CLOEXEC | SocketFlags::NONBLOCK;
        Ok(socket_with(family, SocketType::STREAM, flags, None)?)
    };
    let Some(namespace) = namespace else { return make() };
    let namespace = File::open(namespace)?;
    let inside = move || {
        move_into_link_name_space(namespace.as_fd(), Some(LinkNameSpaceType::Network))?;
        make()
    };
    let thread = std::thread::Builder::new().stack_size(64 * 1024).spawn(inside)?;
    // A few system calls on no disk and no network: this is not waiting.
    thread
        .join()
        .unwrap_or_else(|_| Err(io::Error::other("the thread in the pod's network namespace panicked")))
}
