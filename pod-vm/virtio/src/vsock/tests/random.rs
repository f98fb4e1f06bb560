//! Random guests and random clients: nothing panics, nothing grows, and what arrives is what was sent.

use std::collections::BTreeMap;

use proptest::prelude::*;

use super::*;

#[derive(Debug, Clone)]
enum Step {
    Client {
        port: u8,
        bytes: u16,
    },
    Write {
        client: u8,
        bytes: u16,
    },
    Read {
        client: u8,
    },
    HalfClose {
        client: u8,
    },
    Close {
        client: u8,
    },
    /// Takes so many packets, into buffers of so many bytes.
    Take {
        packets: u8,
        room: u16,
    },
    /// Sends a packet for a connection that was asked for, or near it.
    Guest {
        connection: u8,
        operation: u16,
        flags: u32,
        payload: u16,
        buffer: u32,
        forwarded: u32,
        kind: u16,
    },
    Reset,
}

fn step() -> impl Strategy<Value = Step> {
    let operation = prop_oneof![8 => 1..8u16, 1 => any::<u16>()];
    let kind = prop_oneof![20 => Just(TYPE_STREAM), 1 => any::<u16>()];
    let number = prop_oneof![3 => 0..100_000u32, 1 => any::<u32>()];
    prop_oneof![
        3 => (any::<u8>(), any::<u16>()).prop_map(|(port, bytes)| Step::Client { port, bytes }),
        3 => (any::<u8>(), any::<u16>()).prop_map(|(client, bytes)| Step::Write { client, bytes }),
        3 => any::<u8>().prop_map(|client| Step::Read { client }),
        1 => any::<u8>().prop_map(|client| Step::HalfClose { client }),
        1 => any::<u8>().prop_map(|client| Step::Close { client }),
        6 => (any::<u8>(), 0..9000u16).prop_map(|(packets, room)| Step::Take { packets, room }),
        12 => (any::<u8>(), operation, 0..4u32, any::<u16>(), number.clone(), number, kind).prop_map(
            |(connection, operation, flags, payload, buffer, forwarded, kind)| {
                Step::Guest { connection, operation, flags, payload, buffer, forwarded, kind }
            }
        ),
        1 => Just(Step::Reset),
    ]
}

/// What the guest has been sent on one connection, and what it said of its buffer.
#[derive(Debug, Default)]
struct Known {
    guest: u32,
    sent: u64,
    allowed: u64,
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 200, failure_persistence: None, ..ProptestConfig::default() })]

    #[test]
    fn nothing_gets_out_of_bounds(steps in prop::collection::vec(step(), 1..150)) {
        let mut lab = Lab::new();
        let mut clients: Vec<UnixStream> = Vec::new();
        let mut known: BTreeMap<u32, Known> = BTreeMap::new();
        for step in steps {
            match step {
                Step::Client { port, bytes } if clients.len() < 100 => {
                    let mut client = lab.client(&format!("CONNECT {port}\n"));
                    client.set_nonblocking(true).unwrap();
                    let _ = client.write(&vec![3; bytes.into()]);
                    clients.push(client);
                }
                Step::Write { client, bytes } if !clients.is_empty() => {
                    let index = usize::from(client) % clients.len();
                    let _ = clients[index].write(&vec![3; bytes.into()]);
                }
                Step::Read { client } if !clients.is_empty() => {
                    let index = usize::from(client) % clients.len();
                    let _ = clients[index].read(&mut [0; 4096]);
                }
                Step::HalfClose { client } if !clients.is_empty() => {
                    let index = usize::from(client) % clients.len();
                    let _ = clients[index].shutdown(std::net::Shutdown::Write);
                }
                Step::Close { client } if !clients.is_empty() => {
                    clients.remove(usize::from(client) % clients.len());
                }
                Step::Take { packets, room } => {
                    let mut room = vec![0; room.into()];
                    for _ in 0..packets {
                        let Some(packet) = lab.muxer.next_packet(&mut room) else { break };
                        let length = packet.length as usize;
                        prop_assert!(length <= room.len());
                        prop_assert!(room[..length].iter().all(|byte| *byte == 3));
                        match operation(&packet) {
                            Operation::Request => {
                                let fresh = Known { guest: packet.destination_port, ..Known::default() };
                                prop_assert!(known.insert(packet.source_port, fresh).is_none());
                            }
                            Operation::Data => {
                                let connection = known.get_mut(&packet.source_port).expect("one that was asked for");
                                connection.sent += u64::from(packet.length);
                                prop_assert!(connection.sent <= connection.allowed);
                            }
                            Operation::Response => prop_assert!(false, "the guest has asked for nothing"),
                            _ => {}
                        }
                    }
                }
                Step::Guest { connection, operation, flags, payload, buffer, forwarded, kind } => {
                    if !lab.muxer.accepts() {
                        continue;
                    }
                    let index = usize::from(connection) % (known.len() + 1);
                    let Some((host, connection)) = known.iter_mut().nth(index) else {
                        let ports = Ports { host: forwarded, guest: buffer };
                        lab.send(Header { kind, operation, flags, ..header(ports, Operation::Data) }, b"");
                        continue;
                    };
                    // Where it does not lie, it has room for so much in all.
                    if u64::from(forwarded) <= connection.sent {
                        connection.allowed = connection.allowed.max(u64::from(forwarded) + u64::from(buffer));
                    }
                    let ports = Ports { host: *host, guest: connection.guest };
                    let header = header(ports, Operation::Data);
                    lab.send(Header { kind, operation, flags, buffer, forwarded, ..header }, &vec![9; payload.into()]);
                }
                Step::Reset => lab.muxer.reset(),
                _ => {}
            }
            lab.advance();
            prop_assert!(lab.muxer.connections() <= clients.len() + known.len());
            prop_assert!(lab.muxer.backlog() <= lab.muxer.connections() * BUFFER as usize);
        }
    }
}
