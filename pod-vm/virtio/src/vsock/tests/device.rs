//! The device with its queues, between a driver and clients.

use std::io::{Read, Write};
use std::os::unix::net::{UnixListener, UnixStream};

use super::super::packet::{HEADER_LENGTH, Header, Operation, TYPE_STREAM};
use super::super::{GUEST_CID, HOST_CID, Muxer, Vsock};
use crate::device::Wake;
use crate::driver::{Driver, Part};

const RECEIVE: usize = 0;
const TRANSMIT: usize = 1;
const EVENTS: usize = 2;

fn parts() -> (Vsock, tempfile::TempDir) {
    let directory = tempfile::tempdir().unwrap();
    let listener = UnixListener::bind(directory.path().join("vsock")).unwrap();
    (Vsock::new(Muxer::new(listener).unwrap()), directory)
}

fn lab() -> (Driver, tempfile::TempDir) {
    let (device, directory) = parts();
    let driver = Driver::new(Box::new(device));
    assert_eq!(driver.endpoint.device().configuration(), GUEST_CID.to_le_bytes());
    (driver, directory)
}

fn client(directory: &tempfile::TempDir) -> UnixStream {
    let mut client = UnixStream::connect(directory.path().join("vsock")).unwrap();
    client.write_all(b"CONNECT 1024\n").unwrap();
    client
}

/// The header and the payload of what the device has put into the guest's next buffer.
fn received(driver: &mut Driver) -> (Header, Vec<u8>) {
    let (_, length, bytes) = driver.used(RECEIVE).remove(0);
    let header = Header::decode(bytes[..HEADER_LENGTH].try_into().unwrap());
    (header, bytes[HEADER_LENGTH..length as usize].to_vec())
}

fn packet(operation: Operation, ports: (u32, u32), length: usize) -> Header {
    Header {
        source_cid: GUEST_CID,
        destination_cid: HOST_CID,
        source_port: ports.0,
        destination_port: ports.1,
        length: u32::try_from(length).unwrap(),
        kind: TYPE_STREAM,
        operation: operation as u16,
        flags: 0,
        buffer: 1 << 16,
        forwarded: 0,
    }
}

#[test]
fn a_connection_through_the_queues() {
    let (mut driver, directory) = lab();
    let mut client = client(&directory);
    // Nothing is taken from the client before the guest has room for it.
    assert!(!driver.serve(Wake::Source(0)));
    assert_eq!(driver.used(RECEIVE), []);
    driver.put(RECEIVE, &[Part::In(4096)]);
    driver.serve(Wake::Queue(RECEIVE));
    let (request, _) = received(&mut driver);
    assert_eq!((request.operation, request.destination_port), (Operation::Request as u16, 1024));

    let ports = (1024, request.source_port);
    driver.put(TRANSMIT, &[Part::Out(packet(Operation::Response, ports, 0).encode().to_vec())]);
    let data = packet(Operation::Data, ports, 5).encode().to_vec();
    driver.put(TRANSMIT, &[Part::Out(data), Part::Out(b"hello".to_vec())]);
    driver.serve(Wake::Queue(TRANSMIT));
    assert_eq!(driver.used(TRANSMIT).len(), 2);
    let mut line = Vec::new();
    while !line.ends_with(b"hello") {
        let mut byte = [0];
        client.read_exact(&mut byte).unwrap();
        line.push(byte[0]);
    }
    assert!(line.starts_with(b"OK "), "{line:?}");

    client.write_all(b"and back").unwrap();
    driver.put(RECEIVE, &[Part::In(44), Part::In(3)]);
    driver.put(RECEIVE, &[Part::In(4096)]);
    driver.serve(Wake::Source(0));
    let mut used = driver.used(RECEIVE);
    let parts: Vec<Vec<u8>> =
        used.drain(..).map(|(_, length, bytes)| bytes[HEADER_LENGTH..length as usize].to_vec()).collect();
    assert_eq!(parts.concat(), b"and back");

    // A driver that begins anew knows of no connection: the client's ends.
    driver.endpoint.set_status(0, &driver.interrupt);
    assert_eq!(client.read(&mut [0]).unwrap(), 0);
    assert_eq!(driver.endpoint.negotiated().misuses, 0);
}

/// What is no packet is dropped, and what is no queue stops the device.
#[test]
fn nonsense() {
    let (mut driver, _directory) = lab();
    driver.put(TRANSMIT, &[Part::Out(vec![0; 10])]);
    driver.put(TRANSMIT, &[Part::Out(vec![0xff; 60])]);
    driver.put(TRANSMIT, &[Part::In(100)]);
    driver.put(TRANSMIT, &[Part::Raw(1 << 40, 100, 0)]);
    driver.serve(Wake::Queue(TRANSMIT));
    assert_eq!((driver.used(TRANSMIT).len(), driver.endpoint.negotiated().misuses), (4, 0));
    // More requests than the queue has places.
    driver.announce(TRANSMIT, 1000);
    driver.serve(Wake::Queue(TRANSMIT));
    assert!(driver.is_broken());
}

/// Clients are not kept with the state: the guest is told, once, that its connections are gone, and has others.
#[test]
fn a_driver_goes_on() {
    let (mut driver, directory) = lab();
    driver.put(EVENTS, &[Part::In(4)]);
    let mut old = client(&directory);
    driver.serve(Wake::Source(0));
    driver.put(RECEIVE, &[Part::In(4096)]);
    driver.serve(Wake::Source(0));
    let (request, _) = received(&mut driver);
    let ports = (1024, request.source_port);
    driver.put(TRANSMIT, &[Part::Out(packet(Operation::Response, ports, 0).encode().to_vec())]);
    driver.serve(Wake::Queue(TRANSMIT));
    assert_eq!((driver.used(TRANSMIT).len(), driver.used(EVENTS)), (1, vec![]));

    let (device, directory) = parts();
    let mut driver = driver.moved(Box::new(device));
    assert!(old.read_to_end(&mut Vec::new()).is_ok());
    let used = driver.used(EVENTS);
    assert_eq!((used.len(), used[0].1, &used[0].2[..]), (1, 4, &[0; 4][..]));
    driver.put(EVENTS, &[Part::In(4)]);
    driver.put(TRANSMIT, &[Part::Out(packet(Operation::Data, ports, 0).encode().to_vec())]);
    driver.put(RECEIVE, &[Part::In(4096)]);
    driver.serve(Wake::Queue(TRANSMIT));
    assert_eq!(received(&mut driver).0.operation, Operation::Reset as u16);
    let _new = client(&directory);
    driver.serve(Wake::Source(0));
    driver.put(RECEIVE, &[Part::In(4096)]);
    driver.serve(Wake::Source(0));
    let (request, _) = received(&mut driver);
    assert_eq!((request.operation, request.source_port), (Operation::Request as u16, ports.1 + 1));
    assert_eq!(driver.used(EVENTS), []);
}

/// A guest without a buffer for the event is told when it has one.
#[test]
fn a_guest_is_told_when_it_has_room() {
    let (driver, _directory) = lab();
    let (device, _directory) = parts();
    let mut driver = driver.moved(Box::new(device));
    assert_eq!(driver.used(EVENTS), []);
    driver.put(EVENTS, &[Part::In(4)]);
    driver.serve(Wake::Queue(EVENTS));
    assert_eq!(driver.used(EVENTS).len(), 1);
}
