//! The devices, and what is on the other side of each.

use std::fs::File;
use std::io::Write;
use std::os::linux::net::SocketAddrExt;
use std::os::unix::net::{SocketAddr, UnixListener, UnixStream};
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use podvisor_virtio::balloon::Balloon;
use podvisor_virtio::block::Disk;
use podvisor_virtio::entropy::Entropy;
use podvisor_virtio::fs::Share;
use podvisor_virtio::mem::{BLOCK, LARGE_BLOCK, Reserve, Size};
use podvisor_virtio::net::Network;
use podvisor_virtio::vsock::{Muxer, Vsock};
use rustix::fs::{MemfdFlags, memfd_create};
use rustix::net::{AddressFamily, SocketFlags, SocketType, socketpair};
use vmm_sys_util::eventfd::EventFd;

use crate::guest::Guest;
use crate::input::Input;
use crate::server;

/// A guest that tells of memory that it does not use.
pub(crate) fn balloon(bytes: &[u8]) {
    let mut input = Input::new(bytes);
    Guest::new(Box::new(Balloon::default()), &mut input, &[]).act(&mut input, |_| {});
}

/// A guest with a disk of 64 KiB, which may be read-only.
pub(crate) fn block(bytes: &[u8]) {
    let mut input = Input::new(bytes);
    let file = File::from(memfd_create("disk", MemfdFlags::CLOEXEC).expect("a file in memory"));
    file.set_len(1 << 16).expect("room");
    let length = file.metadata().expect("a length").len();
    let disk = Disk::new(file.try_clone().expect("a descriptor"), "serial", input.byte() & 1 != 0);
    Guest::new(Box::new(disk.expect("a disk")), &mut input, &[]).act(&mut input, |_| {});
    assert_eq!(file.metadata().expect("a length").len(), length, "a guest changes the size of its disk");
}

/// A guest that wants random bytes.
pub(crate) fn entropy(bytes: &[u8]) {
    let mut input = Input::new(bytes);
    Guest::new(Box::new(Entropy), &mut input, &[]).act(&mut input, |_| {});
}

/// A guest with an interface, and packets from the wire.
pub(crate) fn net(bytes: &[u8]) {
    let mut input = Input::new(bytes);
    let (ours, theirs) =
        socketpair(AddressFamily::UNIX, SocketType::SEQPACKET, SocketFlags::NONBLOCK, None).expect("a wire");
    let mtu = input.short();
    let device = Network::new(File::from(theirs), [2, 0, 0, 0, 0, 1], mtu, |_, _| Ok(()));
    Guest::new(Box::new(device), &mut input, &[]).act(&mut input, |input| {
        let length = usize::from(input.short());
        let mut packet = input.bytes(64).to_vec();
        packet.resize(length.max(1), 0);
        // A wire that is full loses it.
        let _ = rustix::io::write(&ours, &packet);
        let _ = rustix::io::read(&ours, &mut [0; 4096]);
    });
}

/// A guest with a region of two of Linux' blocks, of which the first two blocks of the device's can be reached.
pub(crate) fn mem(bytes: &[u8]) {
    const BEGIN: u64 = 1 << 30;
    let mut input = Input::new(bytes);
    let told = EventFd::new(0).expect("an event");
    let size = Arc::new(Size::new(told).expect("an event"));
    let device = Reserve::new(BEGIN, 2 * LARGE_BLOCK, Arc::clone(&size));
    let reached = (BEGIN, usize::try_from(2 * BLOCK).expect("a small number"));
    let mut most = 0;
    Guest::new(Box::new(device), &mut input, &[reached]).act(&mut input, |input| {
        let wanted = BLOCK * u64::from(input.byte());
        most = most.max(wanted);
        size.want(wanted);
    });
    assert!(size.has() <= most, "a guest has more memory than was ever wanted");
}

/// A guest and clients of its ports.
pub(crate) fn vsock(bytes: &[u8]) {
    static COUNT: AtomicU64 = AtomicU64::new(0);
    let mut input = Input::new(bytes);
    let name = format!("podvisor-fuzz-{}-{}", std::process::id(), COUNT.fetch_add(1, Ordering::Relaxed));
    let address = SocketAddr::from_abstract_name(name).expect("a name");
    let muxer = Muxer::new(UnixListener::bind_addr(&address).expect("a socket")).expect("a muxer");
    let mut clients: Vec<UnixStream> = Vec::new();
    Guest::new(Box::new(Vsock::new(muxer)), &mut input, &[]).act(&mut input, |input| {
        let number = usize::from(input.byte());
        match (input.byte() % 4, clients.len()) {
            (0, ..16) | (_, 0) => {
                let client = UnixStream::connect_addr(&address).expect("a client");
                client.set_nonblocking(true).expect("a client that does not wait");
                let _ = (&client).write_all(b"CONNECT 1024\n");
                clients.push(client);
            }
            (1, count) => drop(clients.swap_remove(number % count)),
            (2, count) => {
                let _ = rustix::io::read(&clients[number % count], &mut [0; 4096]);
            }
            (_, count) => {
                let _ = (&clients[number % count]).write(input.bytes(number));
            }
        }
    });
}

/// A guest and a file server, either of which says anything.
pub(crate) fn fs(bytes: &[u8]) {
    let mut input = Input::new(bytes);
    let (ours, theirs) = UnixStream::pair().expect("a connection");
    let server = std::thread::spawn(move || server::set_up(theirs));
    let share = Share::new(ours, "pod").expect("a share");
    let server = server.join().expect("a thread").expect("a server");
    Guest::new(Box::new(share), &mut input, &[]).act(&mut input, |input| server.act(input));
}
