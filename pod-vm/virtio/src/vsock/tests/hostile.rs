//! Guests that lie.

use super::*;
use crate::vsock::CONNECTIONS;

#[test]
fn a_guest_opens_no_connection() {
    let mut lab = Lab::new();
    let ports = Ports { host: 22, guest: 5000 };
    lab.send(header(ports, Operation::Request), b"");
    let (packet, _) = lab.packet();
    assert_eq!(operation(&packet), Operation::Reset);
    assert_eq!((packet.source_port, packet.destination_port), (22, 5000));
    assert_eq!((packet.source_cid, packet.destination_cid), (HOST_CID, GUEST_CID));
}

#[test]
fn who_breaks_the_rules_loses_the_connection() {
    let violations: [fn(&mut Lab, Ports); 7] = [
        |lab, ports| lab.send(Header { operation: 0, ..header(ports, Operation::Data) }, b""),
        |lab, ports| lab.send(Header { operation: 8, ..header(ports, Operation::Data) }, b"x"),
        |lab, ports| lab.send(Header { operation: u16::MAX, ..header(ports, Operation::Data) }, b""),
        |lab, ports| lab.send(header(ports, Operation::Request), b""),
        |lab, ports| lab.send(header(ports, Operation::Response), b""),
        |lab, ports| {
            lab.shut(ports, SHUTDOWN_SEND);
            lab.send_data(ports, b"x");
        },
        // More than its credit, whose end is where neither the socket nor the backlog takes more.
        |lab, ports| {
            for _ in 0..100 {
                lab.send_data(ports, &vec![0; 65_536]);
            }
        },
    ];
    for (number, violation) in violations.into_iter().enumerate() {
        let mut lab = Lab::new();
        let (mut other, other_ports) = lab.open(65_536);
        let (mut client, ports) = lab.open(65_536);
        violation(&mut lab, ports);
        let operations = lab.operations();
        assert!(operations.contains(&Operation::Reset), "{number}: {operations:?}");
        rest(&mut client);
        assert_eq!(lab.muxer.connections(), 1, "{number}");
        lab.send_data(other_ports, b"fine");
        assert_eq!(available(&mut other), b"fine", "{number}");
    }
}

#[test]
fn data_before_the_answer_is_no_answer() {
    let mut lab = Lab::new();
    let mut client = lab.client("CONNECT 9\n");
    let (request, _) = lab.packet();
    lab.send_data(Ports { host: request.source_port, guest: 9 }, b"OK 1\n");
    assert_eq!(lab.operations(), [Operation::Reset]);
    assert_eq!(rest(&mut client), b"");
}

#[test]
fn a_connection_that_was_not_asked_for_cannot_be_answered() {
    let mut lab = Lab::new();
    let (_client, ports) = lab.open(65_536);
    // A client that waits, of whose port the guest can guess the number.
    let _waiting = lab.client("CONNECT 6\n");
    lab.advance();
    let guessed = Ports { host: ports.host + 1, guest: 6 };
    lab.send(header(guessed, Operation::Response), b"");
    assert_eq!(lab.operations(), [Operation::Reset, Operation::Request]);
    // Nor another's connection be answered from another port.
    lab.send(header(Ports { host: ports.host, guest: 1025 }, Operation::Data), b"");
    assert_eq!(lab.operations(), [Operation::Reset]);
    assert_eq!(lab.muxer.connections(), 2);
}

#[test]
fn what_makes_no_sense_is_dropped() {
    let mut lab = Lab::new();
    let (mut client, ports) = lab.open(65_536);
    let data = header(ports, Operation::Data);
    lab.send(Header { source_cid: 4, ..data }, b"x");
    lab.send(Header { source_cid: HOST_CID, ..data }, b"x");
    lab.send(Header { destination_cid: 1, ..data }, b"x");
    // Not what came with it.
    for length in [0, 2, 65_536, u32::MAX] {
        lab.muxer.receive(&Header { length, ..data }, b"x");
    }
    assert!(lab.packets().is_empty());
    assert_eq!(lab.muxer.dropped(), 7);
    // Another kind of socket is refused, not mistaken for this one.
    lab.send(Header { kind: 2, ..data }, b"x");
    let (packet, _) = lab.packet();
    assert_eq!((operation(&packet), packet.kind), (Operation::Reset, 2));
    assert_eq!(available(&mut client), b"");
}

#[test]
fn a_flood_stops_where_nobody_takes_the_answers() {
    let mut lab = Lab::new();
    let mut sent = 0;
    while lab.muxer.accepts() {
        lab.send(header(Ports { host: sent, guest: 1 }, Operation::Data), b"x");
        sent += 1;
        assert!(sent < 10_000);
    }
    assert_eq!(lab.operations().len(), sent as usize);
    assert!(lab.muxer.accepts());
    // Resets are answered by nothing.
    for host in 0..10_000 {
        lab.send(header(Ports { host, guest: 1 }, Operation::Reset), b"");
    }
    assert!(lab.packets().is_empty());
}

#[test]
fn lies_about_credit_harm_only_the_liar() {
    let mut lab = Lab::new();
    let (mut client, ports) = lab.open(100);
    client.write_all(&[5; 1000]).unwrap();
    lab.packets();
    // Less than it promised.
    lab.send(Header { buffer: 10, ..header(ports, Operation::CreditUpdate) }, b"");
    assert!(lab.packets().iter().all(|(packet, _)| operation(packet) != Operation::Data));
    // A buffer beyond all measure gets what the client has sent and no more.
    lab.send(Header { buffer: u32::MAX, forwarded: 100, ..header(ports, Operation::CreditUpdate) }, b"");
    let got: usize = lab.packets().iter().map(|(_, payload)| payload.len()).sum();
    assert_eq!(got, 900);

    // More taken than was ever sent, or less than before.
    for forwarded in [1001, 1 << 31, u32::MAX, 99] {
        let mut lab = Lab::new();
        let (mut client, ports) = lab.open(65_536);
        client.write_all(&[5; 1000]).unwrap();
        lab.packets();
        lab.send(Header { forwarded: 100, ..header(ports, Operation::CreditUpdate) }, b"");
        lab.send(Header { forwarded, ..header(ports, Operation::CreditUpdate) }, b"");
        assert_eq!(lab.operations(), [Operation::Reset], "{forwarded}");
    }
}

#[test]
fn more_clients_than_there_may_be_are_turned_away() {
    let mut lab = Lab::new();
    let mut clients = Vec::new();
    for _ in 0..CONNECTIONS {
        clients.push(lab.client("CONNECT 1\n"));
        lab.advance();
    }
    let mut turned_away = UnixStream::connect(lab.directory.path().join("vsock")).unwrap();
    lab.advance();
    assert_eq!(rest(&mut turned_away), b"");
    assert_eq!(lab.muxer.connections(), CONNECTIONS);
    clients.pop();
    lab.advance();
    let _next = lab.client("CONNECT 1\n");
    lab.advance();
    assert_eq!(lab.muxer.connections(), CONNECTIONS);
    // The guest is asked for each once.
    assert_eq!(lab.packets().len(), CONNECTIONS);
    assert!(lab.packets().is_empty());
}

#[test]
fn buffers_that_hold_no_data_do_not_hold_up_what_needs_none() {
    let mut lab = Lab::new();
    let (mut talker, _) = lab.open(65_536);
    let (_listener, ports) = lab.open(65_536);
    talker.write_all(b"data").unwrap();
    lab.advance();
    lab.send(header(ports, Operation::CreditRequest), b"");
    let packet = lab.muxer.next_packet(&mut []).unwrap();
    assert_eq!((operation(&packet), packet.source_port), (Operation::CreditUpdate, ports.host));
    assert_eq!(lab.muxer.next_packet(&mut []), None);
    assert!(lab.muxer.has_packet());
    assert_eq!(lab.packet().1, b"data");
}
