//! A small blocking netlink client.
//!
//! The kernel works on a request inside `sendmsg`, so when that returns the answers already lie in the socket's queue:
//! one datagram of many requests costs two system calls, no task switch and no waiting, and works in a thread that is in
//! another network namespace. Messages come from rtnetlink's builders or, for nfnetlink, from [`crate::builtin`].

use std::io;
use std::os::fd::AsFd;

use rtnetlink::packet_core::{NLM_F_ACK, NLM_F_DUMP, NLM_F_REQUEST, NetlinkMessage, NetlinkPayload};
use rtnetlink::packet_route::RouteNetlinkMessage;
use rtnetlink::sys::Socket;
use rtnetlink::sys::protocols::{NETLINK_NETFILTER, NETLINK_ROUTE};
use rustix::net::{RecvFlags, SendFlags};

/// Marks an attribute whose value is attributes.
pub(crate) const NLA_F_NESTED: u16 = 0x8000;

/// `struct nlmsghdr`.
pub(crate) const HEADER: usize = 16;
const NLMSG_ERROR: u16 = 2;
const NLMSG_DONE: u16 = 3;
/// The error message is followed by attributes.
const NLM_F_ACK_TLVS: u16 = 0x200;
/// The error message does not repeat the request's payload.
const NLM_F_CAPPED: u16 = 0x100;
const NLMSGERR_ATTR_MSG: u16 = 1;

/// What the kernel said to one request of a batch.
#[derive(Debug, thiserror::Error)]
#[error("{what}{}", .hint.as_ref().map(|hint| format!(" (the kernel says: {hint})")).unwrap_or_default())]
pub(crate) struct Refusal {
    /// What the request was to do.
    pub(crate) what: String,
    /// The kernel's extended error text.
    pub(crate) hint: Option<String>,
    /// The error number.
    #[source]
    pub(crate) source: io::Error,
}

impl Refusal {
    pub(crate) fn new(what: impl Into<String>, source: impl Into<io::Error>) -> Self {
        Self { what: what.into(), hint: None, source: source.into() }
    }

    /// Whether the kernel answered with this error number.
    pub(crate) fn is(&self, errno: rustix::io::Errno) -> bool {
        self.source.raw_os_error() == Some(errno.raw_os_error())
    }
}

/// Requests that go out together and are carried out in order. One that fails does not stop the next.
#[derive(Debug, Default)]
pub(crate) struct Batch {
    bytes: Vec<u8>,
    /// What each request that is acknowledged does; its sequence number is its index plus one.
    what: Vec<String>,
}

impl Batch {
    /// Adds a route request; `flags` beside REQUEST and ACK.
    pub(crate) fn route(&mut self, what: impl Into<String>, message: RouteNetlinkMessage, flags: u16) {
        self.what.push(what.into());
        let mut message = NetlinkMessage::from(message);
        message.header.flags = NLM_F_REQUEST | NLM_F_ACK | flags;
        message.header.sequence_number = u32::try_from(self.what.len()).unwrap_or(u32::MAX);
        message.finalize();
        let start = self.bytes.len();
        self.bytes.resize(start + message.buffer_len().next_multiple_of(4), 0);
        message.serialize(&mut self.bytes[start..]);
    }

    /// Adds a request of any kind: `payload` without header. With `what` it is acknowledged.
    pub(crate) fn raw(&mut self, what: Option<String>, kind: u16, flags: u16, payload: &[u8]) {
        let acknowledge = if what.is_some() { NLM_F_ACK } else { 0 };
        let sequence = if let Some(what) = what {
            self.what.push(what);
            u32::try_from(self.what.len()).unwrap_or(u32::MAX)
        } else {
            0
        };
        let length = HEADER + payload.len();
        self.bytes.extend_from_slice(&u32::try_from(length).unwrap_or(u32::MAX).to_ne_bytes());
        self.bytes.extend_from_slice(&kind.to_ne_bytes());
        self.bytes.extend_from_slice(&(NLM_F_REQUEST | acknowledge | flags).to_ne_bytes());
        self.bytes.extend_from_slice(&sequence.to_ne_bytes());
        self.bytes.extend_from_slice(&[0; 4]);
        self.bytes.extend_from_slice(payload);
        self.bytes.resize(self.bytes.len().next_multiple_of(4), 0);
    }
}

/// A netlink socket of the namespace that the opening thread was in.
#[derive(Debug)]
pub(crate) struct Client(Socket);

impl Client {
    /// Links, addresses, routes.
    pub(crate) fn route() -> Result<Self, Refusal> {
        Self::open(NETLINK_ROUTE)
    }

    /// nftables and connection tracking.
    pub(crate) fn netfilter() -> Result<Self, Refusal> {
        Self::open(NETLINK_NETFILTER)
    }

    fn open(protocol: isize) -> Result<Self, Refusal> {
        let open = || {
            let socket = Socket::new(protocol)?;
            socket.set_ext_ack(true)?;
            socket.set_cap_ack(true)?;
            Ok(socket)
        };
        open().map(Self).map_err(|error: io::Error| Refusal::new("opening a netlink socket", error))
    }

    /// Sends the batch; the outcomes of the acknowledged requests in their order.
    pub(crate) fn outcomes(&self, batch: &Batch) -> Result<Vec<Result<(), Refusal>>, Refusal> {
        let mut outcomes: Vec<Option<Result<(), Refusal>>> = Vec::new();
        outcomes.resize_with(batch.what.len(), || None);
        if batch.bytes.is_empty() {
            return Ok(Vec::new());
        }
        self.send(&batch.bytes)?;
        while outcomes.iter().any(Option::is_none) {
            for answer in Answers(&self.receive()?) {
                let (sequence, kind, flags, payload) = answer?;
                let index = (sequence as usize).wrapping_sub(1);
                if kind == NLMSG_ERROR {
                    let (code, hint) = error_answer(flags, payload)?;
                    // A refusal of what frames an nfnetlink batch carries no number of ours: it is about all of it.
                    let Some(outcome) = outcomes.get_mut(index) else {
                        if code == 0 {
                            continue;
                        }
                        let what = batch.what.first().cloned().unwrap_or_default();
                        return Err(Refusal { what, hint, source: io::Error::from_raw_os_error(code) });
                    };
                    *outcome = Some(if code == 0 {
                        Ok(())
                    } else {
                        Err(Refusal {
                            what: batch.what[index].clone(),
                            hint,
                            source: io::Error::from_raw_os_error(code),
                        })
                    });
                }
            }
        }
        Ok(outcomes.into_iter().flatten().collect())
    }

    /// Sends the batch; the first refusal, if there is one.
    pub(crate) fn run(&self, batch: &Batch) -> Result<(), Refusal> {
        self.outcomes(batch)?.into_iter().collect()
    }

    /// One route request that answers with messages; all of a listing with `dump`.
    pub(crate) fn query(
        &self,
        what: &str,
        message: RouteNetlinkMessage,
        dump: bool,
    ) -> Result<Vec<RouteNetlinkMessage>, Refusal> {
        let mut message = NetlinkMessage::from(message);
        message.header.flags = NLM_F_REQUEST | if dump { NLM_F_DUMP } else { NLM_F_ACK };
        message.header.sequence_number = 1;
        message.finalize();
        let mut bytes = vec![0; message.buffer_len()];
        message.serialize(&mut bytes);
        let mut found = Vec::new();
        self.collect(what, &bytes, |whole, _, _| {
            if let Ok(NetlinkMessage { payload: NetlinkPayload::InnerMessage(message), .. }) =
                NetlinkMessage::<RouteNetlinkMessage>::deserialize(whole)
            {
                found.push(message);
            }
        })?;
        Ok(found)
    }

    /// Sends `request` (one message) and calls `each` with every answer: the whole message, its type, its payload.
    pub(crate) fn collect(
        &self,
        what: &str,
        request: &[u8],
        mut each: impl FnMut(&[u8], u16, &[u8]),
    ) -> Result<(), Refusal> {
        self.send(request)?;
        loop {
            let bytes = self.receive()?;
            let mut rest = &bytes[..];
            for answer in Answers(&bytes) {
                let (_, kind, flags, payload) = answer?;
                let length = HEADER + payload.len();
                let whole = &rest[..length];
                rest = &rest[length.next_multiple_of(4).min(rest.len())..];
                match kind {
                    // A listing that broke off ends with the error number.
                    NLMSG_DONE => {
                        return match u32_at(payload, 0).map(u32::cast_signed) {
                            Some(code) if code < 0 => {
                                Err(Refusal::new(what, io::Error::from_raw_os_error(code.wrapping_neg())))
                            }
                            _ => Ok(()),
                        };
                    }
                    NLMSG_ERROR => {
                        let (code, hint) = error_answer(flags, payload)?;
                        if code == 0 {
                            return Ok(());
                        }
                        let source = io::Error::from_raw_os_error(code);
                        return Err(Refusal { what: what.to_owned(), hint, source });
                    }
                    _ => each(whole, kind, payload),
                }
            }
        }
    }

    /// The index of a link in the socket's namespace.
    pub(crate) fn index(&self, name: &str) -> Result<u32, Refusal> {
        rustix::net::netdevice::name_to_index(self.0.as_fd(), name)
            .map_err(|errno| Refusal::new(format!("looking up link {name}"), errno))
    }

    fn send(&self, bytes: &[u8]) -> Result<(), Refusal> {
        rustix::net::send(self.0.as_fd(), bytes, SendFlags::empty())
            .map(drop)
            .map_err(|errno| Refusal::new("sending to the kernel", errno))
    }

    fn receive(&self) -> Result<Vec<u8>, Refusal> {
        // NETLINK dumps come in datagrams of at most 32 KiB (`netlink_dump`).
        let mut bytes = vec![0; 64 << 10];
        let (length, _) = rustix::net::recv(self.0.as_fd(), &mut bytes[..], RecvFlags::DONTWAIT)
            .map_err(|errno| Refusal::new("receiving the kernel's answer", errno))?;
        bytes.truncate(length);
        Ok(bytes)
    }
}

/// The messages of one datagram: sequence number, type, flags, payload.
struct Answers<'a>(&'a [u8]);

impl<'a> Iterator for Answers<'a> {
    type Item = Result<(u32, u16, u16, &'a [u8]), Refusal>;

    fn next(&mut self) -> Option<Self::Item> {
        if self.0.is_empty() {
            return None;
        }
        let bytes = std::mem::take(&mut self.0);
        let header = || {
            let length = usize::try_from(u32_at(bytes, 0)?).ok()?;
            let payload = bytes.get(HEADER..length)?;
            let rest = bytes.get(length.next_multiple_of(4)..).unwrap_or_default();
            Some((u32_at(bytes, 8)?, u16_at(bytes, 4)?, u16_at(bytes, 6)?, payload, rest))
        };
        Some(match header() {
            Some((sequence, kind, flags, payload, rest)) => {
                self.0 = rest;
                Ok((sequence, kind, flags, payload))
            }
            None => Err(malformed()),
        })
    }
}

/// Error number (positive) and the kernel's explanation of an NLMSG_ERROR.
fn error_answer(flags: u16, payload: &[u8]) -> Result<(i32, Option<String>), Refusal> {
    let code = u32_at(payload, 0).ok_or_else(malformed)?.cast_signed().wrapping_neg();
    let mut hint = None;
    if flags & NLM_F_ACK_TLVS != 0 && flags & NLM_F_CAPPED != 0 {
        for (kind, value) in Attributes(payload.get(4 + HEADER..).unwrap_or_default()) {
            if kind == NLMSGERR_ATTR_MSG {
                hint = Some(String::from_utf8_lossy(value).trim_end_matches('\0').to_owned());
            }
        }
    }
    Ok((code, hint))
}

/// The attributes (`struct nlattr`) of a message or of a nested attribute.
pub(crate) struct Attributes<'a>(pub(crate) &'a [u8]);

impl<'a> Iterator for Attributes<'a> {
    /// Type without its flag bits, value.
    type Item = (u16, &'a [u8]);

    fn next(&mut self) -> Option<Self::Item> {
        let bytes = self.0;
        let length = usize::from(u16_at(bytes, 0)?);
        let value = bytes.get(4..length)?;
        self.0 = bytes.get(length.next_multiple_of(4)..).unwrap_or_default();
        Some((u16_at(bytes, 2)? & 0x3fff, value))
    }
}

/// Appends a `struct nlattr` with its value.
pub(crate) fn attribute(kind: u16, value: &[u8], to: &mut Vec<u8>) {
    to.extend_from_slice(&u16::try_from(4 + value.len()).unwrap_or(u16::MAX).to_ne_bytes());
    to.extend_from_slice(&kind.to_ne_bytes());
    to.extend_from_slice(value);
    to.resize(to.len().next_multiple_of(4), 0);
}

/// Appends an attribute that consists of those which `fill` appends.
pub(crate) fn nested(kind: u16, to: &mut Vec<u8>, fill: impl FnOnce(&mut Vec<u8>)) {
    let mut value = Vec::new();
    fill(&mut value);
    attribute(kind | NLA_F_NESTED, &value, to);
}

fn u32_at(bytes: &[u8], at: usize) -> Option<u32> {
    Some(u32::from_ne_bytes(bytes.get(at..at + 4)?.try_into().ok()?))
}

fn u16_at(bytes: &[u8], at: usize) -> Option<u16> {
    Some(u16::from_ne_bytes(bytes.get(at..at + 2)?.try_into().ok()?))
}

fn malformed() -> Refusal {
    Refusal::new("reading the kernel's answer", io::Error::from(io::ErrorKind::InvalidData))
}
