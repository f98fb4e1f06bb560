//! The device between a driver and a file server that are both played by the test.

use std::io::{Read, Write};
use std::mem::MaybeUninit;
use std::os::fd::OwnedFd;
use std::os::unix::net::UnixStream;

use rustix::io::{IoSliceMut, read as read_descriptor};
use rustix::net::{RecvAncillaryBuffer, RecvAncillaryMessage, RecvFlags, recvmsg};
use vm_memory::mmap::MmapRegion;
use vm_memory::{Bytes, FileOffset, GuestAddress, GuestRegionMmap};

use super::bounce::Places;
use super::request::PLACES;
use super::*;
use crate::device::{Memory, Wake};
use crate::driver::{Driver, Part};

/// Numbers of vhost-user's messages.
const GET_FEATURES: u32 = 1;
const SET_MEM_TABLE: u32 = 5;
const SET_VRING_KICK: u32 = 12;
const SET_VRING_CALL: u32 = 13;
const GET_PROTOCOL_FEATURES: u32 = 15;
const SET_VRING_ENABLE: u32 = 18;
/// VERSION_1 and PROTOCOL_FEATURES; then MQ and REPLY_ACK.
const FEATURES: u64 = 1 << 32 | 1 << 30;
const PROTOCOL: u64 = 1 | 1 << 3;

/// A file server: what it has been given.
struct Server {
    memory: Memory,
    kicks: Vec<OwnedFd>,
    calls: Vec<OwnedFd>,
    seen: [u16; 2],
    used: [u16; 2],
    _connection: UnixStream,
}

/// A request as the server finds it.
#[derive(Debug)]
struct Asked {
    head: u16,
    bytes: Vec<u8>,
    /// Where the answer goes, and how long it can be.
    answer: (u64, u32),
}

/// Takes the connection's messages until all is set up. `None`: the device has hung up.
fn set_up(mut socket: UnixStream, features: u64) -> Option<Server> {
    let (mut memory, mut kicks, mut calls) = (None, Vec::new(), Vec::new());
    loop {
        let mut header = [0; 12];
        let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(8))];
        let mut ancillary = RecvAncillaryBuffer::new(&mut space);
        let count = recvmsg(&socket, &mut [IoSliceMut::new(&mut header)], &mut ancillary, RecvFlags::WAITALL);
        if count.ok()?.bytes < header.len() {
            return None;
        }
        let mut descriptors: Vec<OwnedFd> = Vec::new();
        for message in ancillary.drain() {
            if let RecvAncillaryMessage::ScmRights(received) = message {
                descriptors.extend(received);
            }
        }
        let word = |at: usize| u32::from_le_bytes(header[at..at + 4].try_into().unwrap());
        let (request, flags, size) = (word(0), word(4), word(8));
        let mut payload = vec![0; size as usize];
        socket.read_exact(&mut payload).unwrap();
        let number = match request {
            GET_FEATURES => Some(features),
            GET_PROTOCOL_FEATURES => Some(PROTOCOL),
            _ if flags & 8 != 0 => Some(0),
            _ => None,
        };
        match request {
            SET_MEM_TABLE => {
                assert_eq!(payload[..4], 1u32.to_le_bytes());
                let file = FileOffset::new(descriptors.remove(0).into(), 0);
                let length = u64::from_le_bytes(payload[16..24].try_into().unwrap());
                let region = MmapRegion::from_file(file, usize::try_from(length).unwrap()).unwrap();
                let region = GuestRegionMmap::new(region, GuestAddress(0)).unwrap();
                memory = Some(Memory::from_regions(vec![region]).unwrap());
            }
            SET_VRING_KICK => kicks.append(&mut descriptors),
            SET_VRING_CALL => calls.append(&mut descriptors),
            _ => {}
        }
        if let Some(number) = number {
            let mut reply = header.to_vec();
            reply[4..8].copy_from_slice(&5u32.to_le_bytes());
            reply[8..12].copy_from_slice(&8u32.to_le_bytes());
            reply.extend(number.to_le_bytes());
            socket.write_all(&reply).unwrap();
        }
        if request == SET_VRING_ENABLE && payload[..4] == 1u32.to_le_bytes() {
            let memory = memory.unwrap();
            return Some(Server { memory, kicks, calls, seen: [0; 2], used: [0; 2], _connection: socket });
        }
    }
}

impl Server {
    /// What it has been asked since.
    fn asked(&mut self, queue: usize) -> Vec<Asked> {
        let places = Places::of(queue);
        let index: u16 = self.memory.read_obj(GuestAddress(places.available + 2)).unwrap();
        let mut all = Vec::new();
        while self.seen[queue] != index {
            let place = places.available + 4 + 2 * u64::from(self.seen[queue] % PLACES);
            let head: u16 = self.memory.read_obj(GuestAddress(place)).unwrap();
            let (mut bytes, mut answer, mut at) = (Vec::new(), (0, 0), head);
            loop {
                let descriptor = places.descriptors + 16 * u64::from(at);
                let address: u64 = self.memory.read_obj(GuestAddress(descriptor)).unwrap();
                let length: u32 = self.memory.read_obj(GuestAddress(descriptor + 8)).unwrap();
                let flags: u16 = self.memory.read_obj(GuestAddress(descriptor + 12)).unwrap();
                if flags & 2 == 0 {
                    bytes.resize(length as usize, 0);
                    self.memory.read_slice(&mut bytes, GuestAddress(address)).unwrap();
                } else {
                    answer = (address, length);
                }
                if flags & 1 == 0 {
                    break;
                }
                at = self.memory.read_obj(GuestAddress(descriptor + 14)).unwrap();
            }
            all.push(Asked { head, bytes, answer });
            self.seen[queue] = self.seen[queue].wrapping_add(1);
        }
        all
    }

    /// Puts an answer into the queue, without a look at what was asked.
    fn give_back(&mut self, queue: usize, head: u32, length: u32) {
        let places = Places::of(queue);
        let place = places.used + 4 + 8 * u64::from(self.used[queue] % PLACES);
        self.memory.write_obj(head, GuestAddress(place)).unwrap();
        self.memory.write_obj(length, GuestAddress(place + 4)).unwrap();
        self.used[queue] = self.used[queue].wrapping_add(1);
        self.memory.write_obj(self.used[queue], GuestAddress(places.used + 2)).unwrap();
        rustix::io::write(&self.calls[queue], &1u64.to_ne_bytes()).unwrap();
    }

    fn answer(&mut self, queue: usize, asked: &Asked, bytes: &[u8]) {
        self.memory.write_slice(bytes, GuestAddress(asked.answer.0)).unwrap();
        self.give_back(queue, asked.head.into(), u32::try_from(bytes.len()).unwrap());
    }

    fn is_kicked(&self, queue: usize) -> bool {
        read_descriptor(&self.kicks[queue], &mut [0; 8]).is_ok()
    }
}

fn parts() -> (Share, Server) {
    let (ours, theirs) = UnixStream::pair().unwrap();
    let server = std::thread::spawn(move || set_up(theirs, FEATURES));
    let share = Share::new(ours, "pod").unwrap();
    (share, server.join().unwrap().unwrap())
}

fn lab() -> (Driver, Server) {
    let (share, server) = parts();
    let driver = Driver::new(Box::new(share));
    assert_eq!(driver.endpoint.device().configuration()[..4], *b"pod\0");
    (driver, server)
}

#[test]
fn requests_go_there_and_back() {
    let (mut driver, mut server) = lab();
    let first =
        driver.put(1, &[Part::Out(vec![1; 40]), Part::Out(vec![2; 5000]), Part::In(16), Part::In(6000)]);
    let second = driver.put(0, &[Part::Out(vec![3; 48])]);
    assert!(!driver.serve(Wake::Queue(1)));
    assert!(!driver.serve(Wake::Queue(0)));
    assert!(server.is_kicked(1) && server.is_kicked(0) && !server.is_kicked(0));
    let asked = server.asked(1).remove(0);
    assert_eq!(asked.bytes, [vec![1; 40], vec![2; 5000]].concat());
    assert_eq!((asked.answer.0 % 4096, asked.answer.1), (0, 6016));
    let forgotten = server.asked(0).remove(0);
    assert_eq!((forgotten.bytes.len(), forgotten.answer.1), (48, 0));
    assert_eq!(driver.used(1), []);

    server.answer(1, &asked, &[vec![4; 16], vec![5; 100]].concat());
    server.give_back(0, forgotten.head.into(), 0);
    driver.serve(Wake::Source(1));
    driver.serve(Wake::Source(0));
    let used = driver.used(1);
    assert_eq!((used[0].0, used[0].1), (first, 116));
    assert_eq!(used[0].2[..116], [vec![4; 16], vec![5; 100]].concat());
    assert!(used[0].2[116..].iter().all(|byte| *byte == 0));
    assert_eq!(driver.used(0)[0].0, second);
}

/// More than there is room for waits, and goes on when an answer has made room.
#[test]
fn what_finds_no_room_waits() {
    let (mut driver, mut server) = lab();
    for number in 0..8u8 {
        driver.put(1, &[Part::Out(vec![number; 40]), Part::In(1 << 20)]);
    }
    driver.serve(Wake::Queue(1));
    let asked = server.asked(1);
    assert_eq!(asked.len(), 7);
    // The latest first.
    server.answer(1, &asked[6], &[9; 10]);
    driver.serve(Wake::Source(1));
    assert_eq!(driver.used(1).len(), 1);
    let last = server.asked(1).remove(0);
    assert_eq!(last.bytes, [7; 40]);
    for asked in asked[..6].iter().chain([&last]) {
        server.answer(1, asked, &[8; 10]);
    }
    driver.serve(Wake::Source(1));
    assert_eq!((driver.used(1).len(), driver.endpoint.negotiated().misuses), (7, 0));
}

/// A file server that was taken over reaches nothing but the device's own end.
#[test]
fn a_server_that_makes_nonsense_ends_the_device() {
    for (head, length) in [(2, 0), (1, 0), (0, 117), (u32::MAX, 0), (0, u32::MAX), (1000, 1)] {
        let (mut driver, mut server) = lab();
        driver.put(1, &[Part::Out(vec![1; 40]), Part::In(116)]);
        driver.serve(Wake::Queue(1));
        assert_eq!(server.asked(1).len(), 1);
        server.give_back(1, head, length);
        driver.serve(Wake::Source(1));
        assert!(driver.is_broken(), "{head} {length}");
        assert_eq!(driver.used(1), []);
    }
    // Twice the same.
    let (mut driver, mut server) = lab();
    driver.put(1, &[Part::Out(vec![1; 40]), Part::In(116)]);
    driver.serve(Wake::Queue(1));
    let asked = server.asked(1).remove(0);
    server.answer(1, &asked, &[1; 16]);
    server.give_back(1, asked.head.into(), 16);
    driver.serve(Wake::Source(1));
    assert!(driver.is_broken());
    assert_eq!(driver.used(1).len(), 1);
}

#[test]
fn nonsense_of_the_guests_reaches_no_server() {
    let parts: [&[Part]; 5] = [
        &[Part::In(100)],
        &[Part::Out(vec![]), Part::In(100)],
        &[Part::Raw(1 << 40, 100, 0)],
        &[Part::Raw(0x10_0000, 2 << 20, 0)],
        &[Part::In(100), Part::Out(vec![1; 40])],
    ];
    for parts in parts {
        let (mut driver, mut server) = lab();
        driver.put(1, parts);
        driver.serve(Wake::Queue(1));
        assert!(driver.is_broken(), "{parts:?}");
        assert!(server.asked(1).is_empty());
        // All room is there again.
        driver.endpoint.set_status(0, &driver.interrupt);
        assert_eq!(server.asked(1).remove(0).bytes.len(), 40);
    }
}

/// With the driver go the requests that it waited for, and what it had opened.
#[test]
fn a_driver_that_goes_is_forgotten() {
    let (mut driver, mut server) = lab();
    driver.put(1, &[Part::Out(vec![1; 40]), Part::In(116)]);
    driver.serve(Wake::Queue(1));
    let late = server.asked(1).remove(0);
    driver.endpoint.set_status(0, &driver.interrupt);
    let destroy = server.asked(1).remove(0);
    // FUSE_DESTROY: its length, then its number.
    assert_eq!((destroy.bytes.len(), destroy.bytes[0], destroy.bytes[4]), (40, 40, 38));
    server.answer(1, &late, &[7; 116]);
    server.answer(1, &destroy, &[0; 16]);
    driver.serve(Wake::Source(1));
    assert_eq!((driver.used(1).len(), driver.endpoint.negotiated().misuses), (0, 0));
    // Nothing had been begun since, so there is nothing to end.
    driver.endpoint.set_status(0, &driver.interrupt);
    assert!(server.asked(1).is_empty());
}

/// What the server has not answered is put to the next one.
#[test]
fn a_driver_goes_on() {
    let (mut driver, mut server) = lab();
    let heads = [1, 2, 3].map(|number| driver.put(1, &[Part::Out(vec![number; 40]), Part::In(116)]));
    driver.serve(Wake::Queue(1));
    let asked = server.asked(1);
    server.answer(1, &asked[1], &[7; 20]);
    driver.serve(Wake::Source(1));
    assert_eq!(driver.used(1)[0].0, heads[1]);
    driver.put(0, &[Part::Out(vec![4; 48])]);

    let (share, mut next) = parts();
    drop(server);
    let mut driver = driver.moved(Box::new(share));
    assert!(next.is_kicked(1) && next.is_kicked(0));
    assert_eq!(next.asked(0).remove(0).bytes, [4; 48]);
    let asked = next.asked(1);
    assert_eq!(asked.iter().map(|asked| asked.bytes[0]).collect::<Vec<_>>(), [1, 3]);
    for asked in asked.iter().rev() {
        next.answer(1, asked, &[asked.bytes[0]; 20]);
    }
    driver.serve(Wake::Source(1));
    let used = driver.used(1);
    assert_eq!(used.iter().map(|(head, ..)| *head).collect::<Vec<_>>(), [heads[2], heads[0]]);
    assert_eq!((used[0].2[0], used[1].2[0]), (3, 1));
    // The driver that goes still closes what it had opened.
    driver.endpoint.set_status(0, &driver.interrupt);
    assert_eq!(next.asked(1).remove(0).bytes[4], 38);
    assert_eq!(driver.endpoint.negotiated().misuses, 0);
}

#[test]
fn a_server_has_to_be_one() {
    for (features, expected) in [(0, "does not offer"), (1 << 32, "does not offer")] {
        let (ours, theirs) = UnixStream::pair().unwrap();
        let server = std::thread::spawn(move || set_up(theirs, features).is_none());
        let error = Share::new(ours, "pod").err().unwrap();
        assert!(error.to_string().contains(expected), "{error}");
        assert!(server.join().unwrap());
    }
    let (ours, theirs) = UnixStream::pair().unwrap();
    drop(theirs);
    assert!(matches!(Share::new(ours, "pod"), Err(ServerError::Speak(_))));
    // One that says nothing, until somebody has had enough of it.
    let (ours, _theirs) = UnixStream::pair().unwrap();
    let watched = ours.try_clone().unwrap();
    let waits = std::thread::spawn(move || Share::new(ours, "pod").map(drop));
    watched.shutdown(std::net::Shutdown::Both).unwrap();
    assert!(matches!(waits.join().unwrap(), Err(ServerError::Speak(_))));
}
