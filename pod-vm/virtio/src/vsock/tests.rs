//! The muxer against guests that keep the rules, and against those that do not.

mod device;
mod hostile;
mod queues;
mod random;

use std::io::{Read, Write};
use std::os::unix::net::{UnixListener, UnixStream};

use rustix::event::{PollFd, PollFlags, Timespec, poll};

use super::packet::{Header, Operation, SHUTDOWN_RECEIVE, SHUTDOWN_SEND, TYPE_STREAM};
use super::{BUFFER, GUEST_CID, HOST_CID, Muxer};

/// A muxer, and the guest's side of it played by the test.
struct Lab {
    muxer: Muxer,
    directory: tempfile::TempDir,
}

/// A connection as the guest knows it.
#[derive(Debug, Clone, Copy)]
struct Ports {
    host: u32,
    guest: u32,
}

const BOTH: u32 = SHUTDOWN_RECEIVE | SHUTDOWN_SEND;

impl Lab {
    fn new() -> Self {
        let directory = tempfile::tempdir().unwrap();
        let listener = UnixListener::bind(directory.path().join("vsock")).unwrap();
        Self { muxer: Muxer::new(listener).unwrap(), directory }
    }

    /// Whether the muxer wants to be called.
    fn is_woken(&self) -> bool {
        let mut watched = [PollFd::new(&self.muxer, PollFlags::IN)];
        poll(&mut watched, Some(&Timespec { tv_sec: 0, tv_nsec: 0 })).unwrap() > 0
    }

    /// Lets it handle all that has happened on the clients' side.
    fn advance(&mut self) {
        let mut rounds = 0;
        while self.is_woken() {
            self.muxer.advance().unwrap();
            rounds += 1;
            assert!(rounds < 1000, "it is woken again and again for nothing");
        }
    }

    /// All that it has for the guest, at most `limit` packets.
    fn packets(&mut self) -> Vec<(Header, Vec<u8>)> {
        self.advance();
        let mut packets = Vec::new();
        let mut room = [0; 4096];
        while let Some(header) = self.muxer.next_packet(&mut room) {
            packets.push((header, room[..header.length as usize].to_vec()));
            assert!(packets.len() < 10_000, "there is no end of packets");
        }
        packets
    }

    /// The only packet that it has.
    fn packet(&mut self) -> (Header, Vec<u8>) {
        let mut packets = self.packets();
        assert_eq!(packets.len(), 1, "{packets:?}");
        packets.remove(0)
    }

    fn operations(&mut self) -> Vec<Operation> {
        self.packets().iter().map(|(header, _)| operation(header)).collect()
    }

    fn client(&mut self, line: &str) -> UnixStream {
        let mut client = UnixStream::connect(self.directory.path().join("vsock")).unwrap();
        client.write_all(line.as_bytes()).unwrap();
        client
    }

    /// A client that is connected with the guest's port 1024.
    fn open(&mut self, guest_buffer: u32) -> (UnixStream, Ports) {
        let mut client = self.client("CONNECT 1024\n");
        let (request, _) = self.packet();
        assert_eq!(operation(&request), Operation::Request);
        assert_eq!((request.source_cid, request.destination_cid), (HOST_CID, GUEST_CID));
        assert_eq!((request.destination_port, request.kind, request.buffer), (1024, TYPE_STREAM, BUFFER));
        let ports = Ports { host: request.source_port, guest: 1024 };
        self.send(Header { buffer: guest_buffer, ..header(ports, Operation::Response) }, b"");
        let line = format!("OK {}\n", ports.host);
        let mut answer = vec![0; line.len()];
        client.read_exact(&mut answer).unwrap();
        assert_eq!(String::from_utf8(answer).unwrap(), line);
        (client, ports)
    }

    fn send(&mut self, header: Header, payload: &[u8]) {
        self.muxer.receive(&Header { length: u32::try_from(payload.len()).unwrap(), ..header }, payload);
    }

    fn send_data(&mut self, ports: Ports, payload: &[u8]) {
        self.send(header(ports, Operation::Data), payload);
    }

    fn shut(&mut self, ports: Ports, flags: u32) {
        self.send(Header { flags, ..header(ports, Operation::Shutdown) }, b"");
    }
}

fn operation(header: &Header) -> Operation {
    Operation::from_number(header.operation).unwrap()
}

/// A packet of a guest that can take 64 KiB and has taken nothing.
fn header(ports: Ports, operation: Operation) -> Header {
    Header {
        source_cid: GUEST_CID,
        destination_cid: HOST_CID,
        source_port: ports.guest,
        destination_port: ports.host,
        kind: TYPE_STREAM,
        operation: operation as u16,
        buffer: 65_536,
        ..Header::default()
    }
}

/// What the client gets until the end.
fn rest(client: &mut UnixStream) -> Vec<u8> {
    let mut bytes = Vec::new();
    client.read_to_end(&mut bytes).expect("an end, not an error");
    bytes
}

/// What the client can take just now.
fn available(client: &mut UnixStream) -> Vec<u8> {
    let mut bytes = Vec::new();
    client.set_nonblocking(true).unwrap();
    let _ = client.read_to_end(&mut bytes);
    client.set_nonblocking(false).unwrap();
    bytes
}

#[test]
fn headers_lie_in_memory_as_the_specification_says() {
    let header = Header {
        source_cid: 1,
        destination_cid: 2,
        source_port: 3,
        destination_port: 4,
        length: 5,
        kind: 6,
        operation: 7,
        flags: 8,
        buffer: 9,
        forwarded: 10,
    };
    let expected = [
        1, 0, 0, 0, 0, 0, 0, 0, 2, 0, 0, 0, 0, 0, 0, 0, 3, 0, 0, 0, 4, 0, 0, 0, 5, 0, 0, 0, 6, 0, 7, 0, 8, 0,
        0, 0, 9, 0, 0, 0, 10, 0, 0, 0,
    ];
    assert_eq!(header.encode(), expected);
    assert_eq!(Header::decode(&expected), header);
}

#[test]
fn bytes_go_both_ways_and_both_directions_end() {
    let mut lab = Lab::new();
    let (mut client, ports) = lab.open(65_536);
    client.write_all(b"question").unwrap();
    let (packet, payload) = lab.packet();
    assert_eq!((operation(&packet), &payload[..]), (Operation::Data, &b"question"[..]));

    client.shutdown(std::net::Shutdown::Write).unwrap();
    let (packet, _) = lab.packet();
    assert_eq!((operation(&packet), packet.flags), (Operation::Shutdown, SHUTDOWN_SEND));

    lab.send_data(ports, b"answer");
    lab.shut(ports, BOTH);
    assert_eq!(rest(&mut client), b"answer");
    assert_eq!(lab.operations(), [Operation::Reset]);
    assert_eq!(lab.muxer.connections(), 0);
}

#[test]
fn what_the_client_sends_with_its_line_comes_after_the_answer() {
    let mut lab = Lab::new();
    let client = lab.client("CONNECT 7\nearly");
    let (request, _) = lab.packet();
    let ports = Ports { host: request.source_port, guest: 7 };
    lab.send(header(ports, Operation::Response), b"");
    assert_eq!(lab.packet().1, b"early");
    drop(client);
}

#[test]
fn a_port_where_nobody_listens_is_an_end_without_a_line() {
    let mut lab = Lab::new();
    let mut client = lab.client("CONNECT 1\n");
    let (request, _) = lab.packet();
    lab.send(header(Ports { host: request.source_port, guest: 1 }, Operation::Reset), b"");
    assert_eq!(rest(&mut client), b"");
    assert_eq!((lab.muxer.connections(), lab.packets().len()), (0, 0));
}

#[test]
fn a_line_that_is_none_is_an_end_too() {
    let mut lab = Lab::new();
    let mut client = lab.client("GET / HTTP/1.1\r\n\r\n");
    assert!(lab.packets().is_empty());
    assert_eq!(rest(&mut client), b"");
    let client = lab.client("CONN");
    lab.advance();
    assert_eq!(lab.muxer.connections(), 1);
    drop(client);
    lab.advance();
    assert_eq!(lab.muxer.connections(), 0);
}

#[test]
fn a_client_that_leaves_before_the_answer_takes_its_request_back() {
    let mut lab = Lab::new();
    let client = lab.client("CONNECT 1\n");
    lab.packet();
    drop(client);
    assert_eq!(lab.operations(), [Operation::Reset]);
    // And one whose request the guest has never seen leaves nothing.
    let client = lab.client("CONNECT 1\n");
    lab.advance();
    drop(client);
    assert!(lab.packets().is_empty());
    assert_eq!(lab.muxer.connections(), 0);
}

#[test]
fn the_guest_gets_what_it_has_room_for() {
    let mut lab = Lab::new();
    let (mut client, ports) = lab.open(10);
    client.write_all(b"0123456789abcdefghij").unwrap();
    let packets = lab.packets();
    assert_eq!(packets[0].1, b"0123456789");
    assert_eq!(operation(&packets[1].0), Operation::CreditRequest);
    assert_eq!(packets.len(), 2);
    // It answers that it has no room: it is not asked again.
    lab.send(Header { buffer: 10, ..header(ports, Operation::CreditUpdate) }, b"");
    assert!(lab.packets().is_empty());
    lab.send(Header { buffer: 10, forwarded: 4, ..header(ports, Operation::CreditUpdate) }, b"");
    assert_eq!(lab.packets()[0].1, b"abcd");
    lab.send(Header { buffer: 30, forwarded: 14, ..header(ports, Operation::CreditUpdate) }, b"");
    assert_eq!(lab.packet().1, b"efghij");
}

#[test]
fn the_guest_learns_of_new_room_when_a_slow_client_has_read() {
    let mut lab = Lab::new();
    let (mut client, ports) = lab.open(65_536);
    let chunk = vec![7; 16 * 1024];
    let mut sent = 0usize;
    let mut known = 0usize;
    // Until the socket's own buffer and ours are full.
    while sent + chunk.len() - known <= BUFFER as usize {
        lab.send_data(ports, &chunk);
        sent += chunk.len();
        for (packet, _) in lab.packets() {
            assert_eq!(operation(&packet), Operation::CreditUpdate);
            known = packet.forwarded as usize;
        }
    }
    assert!(sent > BUFFER as usize);
    let mut got = 0;
    while got < sent {
        got += available(&mut client).len();
        lab.advance();
    }
    assert_eq!(got, sent);
    let (packet, _) = lab.packet();
    assert_eq!((operation(&packet), packet.forwarded as usize), (Operation::CreditUpdate, sent));
    lab.send(header(ports, Operation::CreditRequest), b"");
    assert_eq!(lab.operations(), [Operation::CreditUpdate]);
}

#[test]
fn a_slow_client_gets_all_that_was_sent_before_the_guest_closed() {
    for end in [Operation::Shutdown, Operation::Reset] {
        let mut lab = Lab::new();
        let (mut client, ports) = lab.open(65_536);
        let mut sent = 0;
        let mut known = 0;
        while sent + 1024 - known <= BUFFER {
            lab.send_data(ports, &[1; 1024]);
            sent += 1024;
            known = lab.packets().last().map_or(known, |(packet, _)| packet.forwarded);
        }
        lab.send(Header { flags: BOTH, ..header(ports, end) }, b"");
        assert!(lab.packets().is_empty(), "the client has not taken it all");
        let mut got = 0;
        while lab.muxer.connections() > 0 {
            got += available(&mut client).len();
            lab.advance();
            let answer = lab.packets();
            assert!(answer.is_empty() || end == Operation::Shutdown);
        }
        got += rest(&mut client).len();
        assert_eq!(got, sent as usize);
    }
}

#[test]
fn a_client_that_closes_ends_both_directions_after_its_last_byte() {
    let mut lab = Lab::new();
    let (mut client, ports) = lab.open(3);
    client.write_all(b"abcdef").unwrap();
    drop(client);
    assert_eq!(lab.operations(), [Operation::Data, Operation::CreditRequest]);
    assert!(!lab.is_woken(), "a closed socket must not wake it for ever");
    lab.send(Header { buffer: 3, forwarded: 3, ..header(ports, Operation::CreditUpdate) }, b"");
    let packets = lab.packets();
    assert_eq!(packets[0].1, b"def");
    // Without credit it is not known yet that there was the last byte.
    lab.send(Header { buffer: 3, forwarded: 6, ..header(ports, Operation::CreditUpdate) }, b"");
    let (packet, _) = lab.packet();
    assert_eq!((operation(&packet), packet.flags), (Operation::Shutdown, BOTH));
    assert_eq!(lab.muxer.connections(), 0);
    // What the guest still says of it is answered by a reset, its own reset by nothing.
    lab.shut(ports, BOTH);
    assert_eq!(lab.operations(), [Operation::Reset]);
    lab.send(header(ports, Operation::Reset), b"");
    assert!(lab.packets().is_empty());
}

#[test]
fn a_guest_that_sends_to_a_closed_client_learns_of_it() {
    let mut lab = Lab::new();
    let (mut client, ports) = lab.open(1);
    client.write_all(b"ab").unwrap();
    drop(client);
    lab.packets();
    lab.send(Header { buffer: 1, ..header(ports, Operation::Data) }, b"x");
    let (packet, _) = lab.packet();
    assert_eq!((operation(&packet), packet.flags), (Operation::Shutdown, SHUTDOWN_RECEIVE));
}

#[test]
fn half_closed_by_the_guest() {
    let mut lab = Lab::new();
    let (mut client, ports) = lab.open(65_536);
    lab.send_data(ports, b"last");
    lab.shut(ports, SHUTDOWN_SEND);
    assert_eq!(rest(&mut client), b"last");
    client.write_all(b"still here").unwrap();
    assert_eq!(lab.packet().1, b"still here");
    lab.shut(ports, SHUTDOWN_RECEIVE);
    assert_eq!(lab.operations(), [Operation::Reset]);
    assert_eq!(client.write(b"x").unwrap_err().kind(), std::io::ErrorKind::BrokenPipe);

    let (mut client, ports) = lab.open(65_536);
    lab.shut(ports, SHUTDOWN_RECEIVE);
    lab.packets();
    assert_eq!(client.write(b"x").unwrap_err().kind(), std::io::ErrorKind::BrokenPipe);
    lab.send_data(ports, b"more");
    assert_eq!(available(&mut client), b"more");
}

#[test]
fn clients_take_turns() {
    let mut lab = Lab::new();
    let (mut first, one) = lab.open(65_536);
    let (mut second, two) = lab.open(65_536);
    first.write_all(&vec![1; 20_000]).unwrap();
    second.write_all(&vec![2; 20_000]).unwrap();
    let order: Vec<u32> = lab.packets().iter().map(|(packet, _)| packet.source_port).collect();
    assert!(order[..6].windows(2).all(|pair| pair[0] != pair[1]), "{order:?}");
    assert!(order.contains(&one.host) && order.contains(&two.host));
}

#[test]
fn a_driver_that_begins_anew_ends_what_it_does_not_know() {
    let mut lab = Lab::new();
    let (mut old, _) = lab.open(65_536);
    let mut asked = lab.client("CONNECT 5\n");
    lab.packet();
    let _waiting = lab.client("CONNECT 6\n");
    lab.advance();
    lab.muxer.reset();
    assert_eq!((rest(&mut old), rest(&mut asked)), (Vec::new(), Vec::new()));
    let (packet, _) = lab.packet();
    assert_eq!((operation(&packet), packet.destination_port), (Operation::Request, 6));
}
