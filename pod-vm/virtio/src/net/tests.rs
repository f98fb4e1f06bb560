use std::fs::File;
use std::os::fd::OwnedFd;
use std::sync::{Arc, Mutex};

use rustix::net::{AddressFamily, SocketFlags, SocketType, socketpair};

use super::*;
use crate::device::Wake;
use crate::driver::{Driver, Part};

/// A device at one end of a socket that keeps packets apart, as a tap does; the other end, and the offloads that were set.
fn network(mask: u64) -> (Driver, OwnedFd, Arc<Mutex<Vec<Offloads>>>) {
    let (device, ours, set) = parts();
    (Driver::with(Box::new(device), mask), ours, set)
}

fn parts() -> (Network, OwnedFd, Arc<Mutex<Vec<Offloads>>>) {
    let flags = SocketFlags::NONBLOCK;
    let (ours, theirs) = socketpair(AddressFamily::UNIX, SocketType::SEQPACKET, flags, None).unwrap();
    let set = Arc::new(Mutex::new(Vec::new()));
    let seen = Arc::clone(&set);
    let device = Network::new(File::from(theirs), [2, 0, 0, 0, 0, 1], 1400, move |_, offloads| {
        seen.lock().unwrap().push(offloads);
        Ok(())
    });
    (device, ours, set)
}

fn packet(length: usize, content: u8) -> Vec<u8> {
    let mut bytes = vec![content; length];
    bytes[..HEADER].fill(0);
    bytes
}

const RECEIVE: Wake = Wake::Queue(0);

#[test]
fn packets_go_both_ways() {
    let (mut driver, wire, set) = network(u64::MAX);
    // Checksums, both segmentations, ECN.
    assert_eq!(*set.lock().unwrap(), [Offloads(15)]);
    driver.put(1, &[Part::Out(packet(100, 1)), Part::Out(vec![2; 50])]);
    driver.serve(Wake::Queue(1));
    let mut bytes = [0; 1000];
    assert_eq!(rustix::io::read(&wire, &mut bytes).unwrap(), 150);
    assert!(bytes[12..100].iter().all(|byte| *byte == 1) && bytes[100..150].iter().all(|byte| *byte == 2));
    assert_eq!(driver.used(1).len(), 1);

    // Over several buffers, none of which is used before there are enough.
    rustix::io::write(&wire, &packet(250, 3)).unwrap();
    driver.put(0, &[Part::In(100)]);
    assert!(!driver.serve(Wake::Source(0)));
    driver.put(0, &[Part::In(100)]);
    assert!(!driver.serve(RECEIVE), "nothing can be done before there are more buffers");
    assert_eq!(driver.used(0), []);
    driver.put(0, &[Part::In(100)]);
    driver.serve(RECEIVE);
    let used = driver.used(0);
    assert_eq!(used.iter().map(|(_, length, _)| *length).collect::<Vec<_>>(), [100, 100, 50]);
    assert_eq!(used[0].2[10..13], [3, 0, 3]);
    assert!(used[2].2[..50].iter().all(|byte| *byte == 3));
}

#[test]
fn without_merging_a_packet_has_one_buffer() {
    let (mut driver, wire, set) = network(!(1 << 15 | 1 << 1));
    assert_eq!(*set.lock().unwrap(), [Offloads(0)]);
    rustix::io::write(&wire, &packet(250, 3)).unwrap();
    rustix::io::write(&wire, &packet(20, 4)).unwrap();
    driver.put(0, &[Part::In(12), Part::In(100)]);
    driver.put(0, &[Part::In(12), Part::In(100)]);
    driver.serve(Wake::Source(0));
    let used = driver.used(0);
    assert_eq!([used[0].1, used[1].1], [112, 20]);
    assert_eq!(used[1].2[10..13], [1, 0, 4]);
}

#[test]
fn a_wire_that_is_full_loses_packets() {
    let (mut driver, wire, _) = network(u64::MAX);
    for _ in 0..1000 {
        driver.put(1, &[Part::Out(packet(60_000, 1))]);
        driver.serve(Wake::Queue(1));
        assert_eq!(driver.used(1).len(), 1);
        if rustix::io::ioctl_fionread(&wire).unwrap() > 100_000 {
            break;
        }
    }
    drop(wire);
    driver.put(1, &[Part::Out(packet(100, 1))]);
    driver.serve(Wake::Queue(1));
    assert_eq!((driver.used(1).len(), driver.endpoint.negotiated().misuses), (1, 0));
}

#[test]
fn nonsense_stops_the_device() {
    for part in
        [Part::Out(vec![0; 11]), Part::In(100), Part::Raw(0x10_0000, 1 << 20, 0), Part::Raw(1 << 40, 100, 0)]
    {
        let (mut driver, _wire, _) = network(u64::MAX);
        driver.put(1, std::slice::from_ref(&part));
        driver.serve(Wake::Queue(1));
        assert!(driver.is_broken(), "{part:?}");
    }
    for part in [Part::Out(vec![0; 100]), Part::Raw(1 << 40, 100, 2)] {
        let (mut driver, wire, _) = network(u64::MAX);
        rustix::io::write(&wire, &packet(50, 1)).unwrap();
        driver.put(0, std::slice::from_ref(&part));
        driver.serve(RECEIVE);
        assert!(driver.is_broken(), "{part:?}");
    }
}

#[test]
fn a_driver_goes_on() {
    let (mut driver, wire, _) = network(u64::MAX);
    rustix::io::write(&wire, &packet(250, 3)).unwrap();
    driver.put(0, &[Part::In(100)]);
    driver.serve(Wake::Source(0));
    assert_eq!(driver.used(0), []);
    drop(wire);
    // The packet that waits for buffers is not lost, and the tap learns again what the guest takes over.
    let (device, wire, set) = parts();
    let mut driver = driver.moved(Box::new(device));
    assert_eq!(*set.lock().unwrap(), [Offloads(15)]);
    driver.put(0, &[Part::In(200)]);
    driver.serve(RECEIVE);
    let used = driver.used(0);
    assert_eq!([used[0].1, used[1].1], [100, 150]);
    assert!(used[1].2[..150].iter().all(|byte| *byte == 3));
    rustix::io::write(&wire, &packet(60, 4)).unwrap();
    driver.put(0, &[Part::In(100)]);
    driver.serve(Wake::Source(0));
    assert_eq!(driver.used(0)[0].1, 60);
    driver.put(1, &[Part::Out(packet(100, 1))]);
    driver.serve(Wake::Queue(1));
    assert_eq!(rustix::io::read(&wire, &mut [0; 1000]).unwrap(), 100);
}

/// What is shorter than a header is no packet, whoever has put it into the tap.
#[test]
fn what_has_no_header_is_dropped() {
    let (mut driver, wire, _) = network(u64::MAX);
    rustix::io::write(&wire, &[1; 11]).unwrap();
    rustix::io::write(&wire, &packet(60, 4)).unwrap();
    driver.put(0, &[Part::In(100)]);
    driver.serve(Wake::Source(0));
    assert_eq!(driver.used(0)[0].1, 60);
}
