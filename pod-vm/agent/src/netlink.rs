//! As much of rtnetlink(7) as an interface takes. The kernel carries a request out inside `send`, so its answer is there when that returns,
//! and nothing here waits.

use std::io;
use std::os::fd::OwnedFd;

use rustix::net::netlink::SocketAddrNetlink;
use rustix::net::{
    AddressFamily, RecvFlags, SendFlags, SocketFlags, SocketType, connect, recv, send, socket_with,
};

/// Requests (linux/rtnetlink.h).
pub(crate) mod request {
    pub(crate) const GET_LINK: u16 = 18;
    pub(crate) const SET_LINK: u16 = 19;
    pub(crate) const NEW_ADDRESS: u16 = 20;
    pub(crate) const DELETE_ADDRESS: u16 = 21;
    pub(crate) const NEW_ROUTE: u16 = 24;
    pub(crate) const NEW_NEIGHBOUR: u16 = 28;
    pub(crate) const NEW_RULE: u16 = 32;
}

/// Flags of requests (linux/netlink.h).
pub(crate) mod flag {
    pub(crate) const REPLACE: u16 = 0x100;
    pub(crate) const EXCLUDE: u16 = 0x200;
    pub(crate) const CREATE: u16 = 0x400;
    pub(crate) const APPEND: u16 = 0x800;
}

const REQUEST: u16 = 1;
const ACKNOWLEDGE: u16 = 4;
const DUMP: u16 = 0x300;
/// `struct nlmsghdr`.
const HEADER: usize = 16;
const ERROR: u16 = 2;
const DONE: u16 = 3;
/// A dump comes in datagrams of at most 32 KiB (`netlink_dump`).
const DATAGRAM: usize = 32 << 10;

/// One request: a family's header, then attributes.
#[derive(Debug, Clone)]
pub(crate) struct Message {
    kind: u16,
    flags: u16,
    body: Vec<u8>,
}

impl Message {
    /// `header` is the family's own struct: ifinfomsg, ifaddrmsg, rtmsg, ndmsg.
    pub(crate) fn new(kind: u16, flags: u16, header: &[u8]) -> Self {
        Self { kind, flags, body: header.to_vec() }
    }

    pub(crate) fn with(mut self, kind: u16, value: &[u8]) -> Self {
        append(kind, value, &mut self.body);
        self
    }

    pub(crate) fn with_number(self, kind: u16, value: u32) -> Self {
        self.with(kind, &value.to_ne_bytes())
    }

    fn encode(&self, more: u16) -> Vec<u8> {
        let length = u32::try_from(HEADER + self.body.len()).unwrap_or(u32::MAX);
        let mut bytes = length.to_ne_bytes().to_vec();
        bytes.extend(self.kind.to_ne_bytes());
        bytes.extend((REQUEST | self.flags | more).to_ne_bytes());
        // Sequence number and port: one request at a time on a socket of its own.
        bytes.extend([0; 8]);
        bytes.extend(&self.body);
        bytes
    }
}

/// Appends a `struct nlattr` with its value.
pub(crate) fn append(kind: u16, value: &[u8], to: &mut Vec<u8>) {
    to.extend(u16::try_from(4 + value.len()).unwrap_or(u16::MAX).to_ne_bytes());
    to.extend(kind.to_ne_bytes());
    to.extend(value);
    to.resize(to.len().next_multiple_of(4), 0);
}

/// The attributes of a message.
pub(crate) struct Attributes<'a>(pub(crate) &'a [u8]);

impl<'a> Iterator for Attributes<'a> {
    type Item = (u16, &'a [u8]);

    fn next(&mut self) -> Option<Self::Item> {
        let bytes = self.0;
        let length = usize::from(u16_at(bytes, 0)?);
        let value = bytes.get(4..length)?;
        self.0 = bytes.get(length.next_multiple_of(4)..).unwrap_or_default();
        Some((u16_at(bytes, 2)? & 0x3fff, value))
    }
}

/// A socket.
#[derive(Debug)]
pub(crate) struct Netlink(OwnedFd);

impl Netlink {
    pub(crate) fn open() -> io::Result<Self> {
        // NETLINK_ROUTE is protocol 0, the default.
        let socket = socket_with(AddressFamily::NETLINK, SocketType::RAW, SocketFlags::CLOEXEC, None)?;
        connect(&socket, &SocketAddrNetlink::new(0, 0))?;
        Ok(Self(socket))
    }

    /// Does what the message says.
    pub(crate) fn run(&self, message: &Message) -> io::Result<()> {
        send(&self.0, &message.encode(ACKNOWLEDGE), SendFlags::empty())?;
        let mut bytes = vec![0; DATAGRAM];
        let (length, _) = recv(&self.0, &mut bytes[..], RecvFlags::DONTWAIT)?;
        match u16_at(&bytes[..length], 4) {
            Some(ERROR) => refusal(&bytes[HEADER..length]),
            _ => Err(io::ErrorKind::InvalidData.into()),
        }
    }

    /// Lists what the message asks for: calls `each` with every answer's header and attributes.
    pub(crate) fn list(&self, message: &Message, mut each: impl FnMut(&[u8])) -> io::Result<()> {
        send(&self.0, &message.encode(DUMP), SendFlags::empty())?;
        let mut bytes = vec![0; DATAGRAM];
        loop {
            let (length, _) = recv(&self.0, &mut bytes[..], RecvFlags::DONTWAIT)?;
            let mut rest = &bytes[..length];
            while let Some(kind) = u16_at(rest, 4) {
                let length = u32_at(rest, 0).and_then(|length| usize::try_from(length).ok()).unwrap_or(0);
                let body = rest.get(HEADER..length).ok_or(io::ErrorKind::InvalidData)?;
                match kind {
                    DONE => return Ok(()),
                    ERROR => return refusal(body),
                    _ => each(body),
                }
                rest = rest.get(length.next_multiple_of(4)..).unwrap_or_default();
            }
        }
    }
}

/// What an acknowledgement says: the negative of an error number.
fn refusal(body: &[u8]) -> io::Result<()> {
    match u32_at(body, 0).map(u32::cast_signed) {
        Some(0) => Ok(()),
        Some(code) => Err(io::Error::from_raw_os_error(code.wrapping_neg())),
        None => Err(io::ErrorKind::InvalidData.into()),
    }
}

pub(crate) fn u16_at(bytes: &[u8], at: usize) -> Option<u16> {
    Some(u16::from_ne_bytes(bytes.get(at..at + 2)?.try_into().ok()?))
}

pub(crate) fn u32_at(bytes: &[u8], at: usize) -> Option<u32> {
    Some(u32::from_ne_bytes(bytes.get(at..at + 4)?.try_into().ok()?))
}
