//! Virtqueues as guests fill them, and as they should not.

use virtio_bindings::bindings::virtio_ring::{VRING_DESC_F_NEXT, VRING_DESC_F_WRITE};
use virtio_queue::desc::{RawDescriptor, split::Descriptor};
use virtio_queue::mock::MockSplitQueue;
use virtio_queue::{Queue, QueueT};
use vm_memory::{Address, Bytes, GuestAddress, GuestMemoryMmap};

use super::*;
use crate::vsock::{Filled, HEADER_LENGTH, Scratch, drain, fill};

const DATA: u64 = 0x10_0000;

fn memory() -> GuestMemoryMmap {
    GuestMemoryMmap::from_ranges(&[(GuestAddress(0), 0x20_0000)]).unwrap()
}

fn flags(next: bool, write: bool) -> u16 {
    let bit = |flag: u32, set: bool| if set { u16::try_from(flag).unwrap() } else { 0 };
    bit(VRING_DESC_F_NEXT, next) | bit(VRING_DESC_F_WRITE, write)
}

fn descriptor(address: u64, length: u32, next: Option<u16>, write: bool) -> RawDescriptor {
    RawDescriptor::from(Descriptor::new(address, length, flags(next.is_some(), write), next.unwrap_or(0)))
}

/// A queue of 16 places with one chain in it.
fn queue(memory: &GuestMemoryMmap, chain: &[RawDescriptor]) -> Queue {
    let mock = MockSplitQueue::new(memory, 16);
    mock.add_desc_chains(chain, 0).unwrap();
    mock.create_queue().unwrap()
}

fn write_packet(memory: &GuestMemoryMmap, header: Header, payload: &[u8]) {
    memory.write_slice(&header.encode(), GuestAddress(DATA)).unwrap();
    memory.write_slice(payload, GuestAddress(DATA + HEADER_LENGTH as u64)).unwrap();
}

#[test]
fn packets_are_taken_however_their_buffers_are_cut() {
    let mut lab = Lab::new();
    let (mut client, ports) = lab.open(65_536);
    let cuts: [&[u32]; 4] = [&[44, 5], &[49], &[10, 34, 2, 3], &[44, 4, 100]];
    for cut in cuts {
        let memory = memory();
        write_packet(&memory, Header { length: 5, ..header(ports, Operation::Data) }, b"hello");
        let mut address = DATA;
        let mut chain = Vec::new();
        for (index, length) in (1u16..).zip(cut) {
            let next = (usize::from(index) < cut.len()).then_some(index);
            chain.push(descriptor(address, *length, next, false));
            address += u64::from(*length);
        }
        let mut queue = queue(&memory, &chain);
        assert_eq!(drain(&mut queue, &memory, &mut lab.muxer, &mut Scratch::default()).unwrap(), 1);
        assert_eq!(available(&mut client), b"hello", "{cut:?}");
    }
    assert_eq!(lab.muxer.dropped(), 0);
}

#[test]
fn packets_that_are_none_are_given_back_and_dropped() {
    let header = header(Ports { host: 1, guest: 1 }, Operation::Data);
    let packet = |length: u32| Header { length, ..header };
    let read_only = |length| vec![descriptor(DATA, length, None, false)];
    let cases: [(Header, Vec<RawDescriptor>); 7] = [
        // Too short for a header, and without one.
        (packet(0), read_only(43)),
        (packet(0), read_only(0)),
        (packet(0), vec![descriptor(DATA, 44, None, true)]),
        // Shorter than they say.
        (packet(6), read_only(49)),
        // Longer than packets are.
        (packet(65_537), read_only(0x9_0000)),
        (packet(u32::MAX), read_only(u32::MAX)),
        // Outside of the memory.
        (packet(0), vec![descriptor(u64::MAX - 10, 44, None, false)]),
    ];
    for (header, chain) in cases {
        let mut lab = Lab::new();
        let memory = memory();
        write_packet(&memory, header, b"hello");
        let mut queue = queue(&memory, &chain);
        assert_eq!(drain(&mut queue, &memory, &mut lab.muxer, &mut Scratch::default()).unwrap(), 1);
        assert_eq!(lab.muxer.dropped(), 1, "{header:?} {chain:?}");
        assert!(lab.packets().is_empty());
    }
}

#[test]
fn a_chain_that_goes_in_circles_has_an_end() {
    let mut lab = Lab::new();
    let memory = memory();
    write_packet(
        &memory,
        Header { length: 60_000, ..header(Ports { host: 1, guest: 1 }, Operation::Data) },
        b"",
    );
    let mut queue =
        queue(&memory, &[descriptor(DATA, 44, Some(1), false), descriptor(DATA, 1, Some(0), false)]);
    assert_eq!(drain(&mut queue, &memory, &mut lab.muxer, &mut Scratch::default()).unwrap(), 1);
    assert_eq!(lab.muxer.dropped(), 1);
}

#[test]
fn buffers_get_a_header_and_what_fits_behind_it() {
    let mut lab = Lab::new();
    let (mut client, _) = lab.open(65_536);
    client.write_all(b"hello").unwrap();
    lab.advance();
    let memory = memory();
    let mut queue =
        queue(&memory, &[descriptor(DATA, 40, Some(1), true), descriptor(DATA + 40, 7, None, true)]);
    assert_eq!(
        fill(&mut queue, &memory, &mut lab.muxer, &mut Scratch::default()).unwrap(),
        // The rest of what the client sent has no buffer.
        Filled { buffers: 1, starved: true }
    );
    let mut bytes = [0; HEADER_LENGTH];
    memory.read_slice(&mut bytes, GuestAddress(DATA)).unwrap();
    assert_eq!(Header::decode(&bytes).length, 3);
    let rest = fill(&mut queue, &memory, &mut lab.muxer, &mut Scratch::default()).unwrap();
    assert_eq!(rest, Filled { buffers: 0, starved: true });
    let mut payload = [0; 4];
    memory.read_slice(&mut payload, GuestAddress(DATA + 44)).unwrap();
    assert_eq!(&payload, b"hel\0");
    assert_eq!(lab.packet().1, b"lo");
}

#[test]
fn buffers_that_are_none_are_given_back_and_a_packet_waits_for_a_good_one() {
    for length in [0, 43] {
        let mut lab = Lab::new();
        let _client = lab.client("CONNECT 1\n");
        lab.advance();
        let memory = memory();
        let mut queue = queue(&memory, &[descriptor(DATA, length, None, true)]);
        assert_eq!(
            fill(&mut queue, &memory, &mut lab.muxer, &mut Scratch::default()).unwrap(),
            Filled { buffers: 1, starved: true }
        );
        assert_eq!(lab.operations(), [Operation::Request]);
    }
}

#[test]
fn a_buffer_is_kept_while_there_is_nothing_for_it() {
    let mut lab = Lab::new();
    let (mut client, _) = lab.open(65_536);
    client.write_all(b"hello").unwrap();
    lab.advance();
    let memory = memory();
    // With room for a header only.
    let mut queue = queue(&memory, &[descriptor(DATA, 44, None, true)]);
    assert_eq!(
        fill(&mut queue, &memory, &mut lab.muxer, &mut Scratch::default()).unwrap(),
        Filled { buffers: 0, starved: false }
    );
    assert_eq!(queue.next_avail(), 0);
    client.shutdown(std::net::Shutdown::Both).unwrap();
    lab.packets();
    assert_eq!(
        fill(&mut queue, &memory, &mut lab.muxer, &mut Scratch::default()).unwrap(),
        Filled { buffers: 0, starved: false }
    );
}

#[test]
fn a_ring_that_lies_about_its_places_is_an_error() {
    let mut lab = Lab::new();
    let memory = memory();
    let mock = MockSplitQueue::new(&memory, 16);
    let mut queue: Queue = mock.create_queue().unwrap();
    // The index that the guest has come to, which is further than the ring is long.
    memory.write_obj(17u16, mock.avail_addr().unchecked_add(2)).unwrap();
    assert!(drain(&mut queue, &memory, &mut lab.muxer, &mut Scratch::default()).is_err());
    // A chain that begins beyond the table.
    memory.write_obj(1u16, mock.avail_addr().unchecked_add(2)).unwrap();
    memory.write_obj(500u16, mock.avail_addr().unchecked_add(4)).unwrap();
    assert!(drain(&mut queue, &memory, &mut lab.muxer, &mut Scratch::default()).is_err());
}
