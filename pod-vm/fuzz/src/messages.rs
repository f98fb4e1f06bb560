//! Registers, packets, protocols, the manifest.

use std::io::Write;
use std::os::linux::net::SocketAddrExt;
use std::os::unix::net::{SocketAddr, UnixListener, UnixStream};
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use podvisor_guest::Manifest;
use podvisor_hypervisor::control::Control;
use podvisor_hypervisor::request;
use podvisor_proto::agent;
use podvisor_proto::hypervisor::request::Verb;
use podvisor_virtio::device::{Memory, Wake};
use podvisor_virtio::endpoint::Endpoint;
use podvisor_virtio::entropy::Entropy;
use podvisor_virtio::transport::Attached;
use podvisor_virtio::transport::mmio::{Line, Registers, read_empty};
use podvisor_virtio::vsock::{Header, Muxer};
use prost::Message;
use vm_memory::GuestAddress;
use vmm_sys_util::eventfd::EventFd;

use crate::input::Input;

/// A guest's accesses to the registers of a device, which leaves now and then, and to those of a place without one.
pub(crate) fn mmio(bytes: &[u8]) {
    let mut input = Input::new(bytes);
    let memory = Memory::from_ranges(&[(GuestAddress(0), 1 << 16)]).expect("memory");
    // EFD_NONBLOCK
    let line = Arc::new(Line::new(EventFd::new(0o4000).expect("an event")));
    let endpoint = Endpoint::new(Box::new(Entropy), memory).expect("queues");
    let attached = Attached::new(endpoint, line.clone()).expect("events");
    let mut registers = Registers::new(attached.clone(), line);
    while !input.is_empty() {
        let kind = input.byte();
        let offset = u64::from(input.short() % 0x200);
        let mut room = [0; 8];
        let length = if kind & 0x70 == 0 { usize::from(kind >> 4 & 7) + 1 } else { 4 };
        match kind % 8 {
            0..=3 => registers.write(offset & !3, &input.word().to_le_bytes()),
            4 => registers.write(offset, input.bytes(length)),
            5 => registers.read(offset, &mut room[..length]),
            6 => {
                registers.leave(kind & 8 != 0);
                read_empty(offset, &mut room[..length]);
                assert!(registers.is_unused().is_some(), "somebody holds the device");
            }
            _ => attached.serve(Wake::Queue(0)),
        }
    }
}

/// A guest's vsock packets, with clients that say something and go.
pub(crate) fn packets(bytes: &[u8]) {
    static COUNT: AtomicU64 = AtomicU64::new(0);
    let mut input = Input::new(bytes);
    let name = format!("podvisor-packets-{}-{}", std::process::id(), COUNT.fetch_add(1, Ordering::Relaxed));
    let address = SocketAddr::from_abstract_name(name).expect("a name");
    let mut muxer = Muxer::new(UnixListener::bind_addr(&address).expect("a socket")).expect("a muxer");
    let mut clients = Vec::new();
    let mut room = [0; 4096];
    // What the guest knows of connections: the host's ports.
    let mut ports = vec![0];
    while !input.is_empty() {
        match input.byte() % 4 {
            0 if clients.len() < 8 => {
                let client = UnixStream::connect_addr(&address).expect("a client");
                client.set_nonblocking(true).expect("a client that does not wait");
                let _ = (&client).write_all(b"CONNECT 7\n");
                clients.push(client);
            }
            1 => {
                let number = input.below(clients.len() + 1);
                if number < clients.len() {
                    drop(clients.swap_remove(number));
                }
            }
            _ => {
                let payload = input.bytes(16);
                let port = ports[input.below(ports.len())];
                let header = Header {
                    source_cid: if input.byte() == 255 { input.long() } else { 3 },
                    destination_cid: if input.byte() == 255 { input.long() } else { 2 },
                    source_port: if input.byte() == 255 { input.word() } else { 7 },
                    destination_port: port,
                    length: if input.byte() == 255 { input.word() } else { 16 },
                    kind: if input.byte() == 255 { input.short() } else { 1 },
                    operation: u16::from(input.byte() % 9),
                    flags: input.byte().into(),
                    buffer: input.word(),
                    forwarded: input.word(),
                };
                if muxer.accepts() {
                    muxer.receive(&header, payload);
                }
            }
        }
        let _ = muxer.advance();
        let most = input.below(4);
        for _ in 0..most {
            let Some(header) = muxer.next_packet(&mut room) else { break };
            assert!(header.length as usize <= room.len(), "a packet is longer than its room");
            if ports.len() < 8 {
                ports.push(header.source_port);
            }
        }
        assert!(muxer.connections() <= clients.len() + 512, "connections are not given up");
    }
}

/// What a monitor may say to a hypervisor.
pub(crate) fn hypervisor(bytes: &[u8]) {
    let (mut ours, theirs) = UnixStream::pair().expect("a connection");
    let mut control = Control::new(theirs.into());
    for part in bytes.chunks(1 << 12) {
        ours.write_all(part).expect("room");
        for request in control.read() {
            if let Some(Verb::Start(mut start)) = request.verb {
                // Complete or refused.
                let _ = request::complete(&mut start);
            }
        }
        if control.is_over() {
            return;
        }
    }
}

/// What either side of the agent protocol may say: what is understood is said again in the same way.
pub(crate) fn agent(bytes: &[u8]) {
    if let Ok(request) = agent::Request::decode(bytes) {
        assert_eq!(agent::Request::decode(&*request.encode_to_vec()).as_ref(), Ok(&request));
    }
    if let Ok(reply) = agent::Reply::decode(bytes) {
        assert_eq!(agent::Reply::decode(&*reply.encode_to_vec()).as_ref(), Ok(&reply));
    }
}

/// A guest's manifest.
pub(crate) fn manifest(bytes: &[u8]) {
    let Ok(manifest) = serde_json::from_slice::<Manifest>(bytes) else { return };
    let again = serde_json::to_vec(&manifest).expect("a manifest that was read can be written");
    assert!(serde_json::from_slice::<Manifest>(&again).is_ok(), "what was written can be read");
}
