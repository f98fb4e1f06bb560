//! Hostile bytes: nothing may panic, and nothing may stay.
//!
//! The cases are seeded, so a failure repeats.

use std::sync::Arc;

use bytes::BytesMut;
use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
use tokio::net::TcpStream;

use super::spdy_client::{SpdyClient, control, data};
use super::websocket_client::{frame, handshake};
use super::{Fixture, patiently, request};
use crate::remote_command::Resizes;
use crate::spdy::Decoder;
use crate::websocket::{self, Codec, Demultiplexer, Role};

/// xorshift64*: enough to vary, the same everywhere.
struct Random(u64);

impl Random {
    fn new(seed: u64) -> Self {
        Self(seed.wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1)
    }

    fn next(&mut self) -> u64 {
        self.0 ^= self.0 >> 12;
        self.0 ^= self.0 << 25;
        self.0 ^= self.0 >> 27;
        self.0.wrapping_mul(0x2545_f491_4f6c_dd1d) >> 16
    }

    fn below(&mut self, limit: usize) -> usize {
        usize::try_from(self.next()).unwrap() % limit.max(1)
    }

    fn byte(&mut self) -> u8 {
        self.next().to_le_bytes()[0]
    }

    fn bytes(&mut self, length: usize) -> Vec<u8> {
        (0..length).map(|_| self.byte()).collect()
    }

    /// Changes, drops, doubles and inserts some bytes.
    fn mutate(&mut self, bytes: &mut Vec<u8>) {
        for _ in 0..=self.below(4) {
            let at = self.below(bytes.len());
            let length = self.below(20).min(bytes.len() - at);
            match self.below(6) {
                0 => bytes[at] ^= 1 << self.below(8),
                1 => bytes[at] = self.byte(),
                2 => drop(bytes.drain(at..at + length)),
                3 => {
                    let copy = bytes[at..at + length].to_vec();
                    bytes.splice(at..at, copy);
                }
                4 => {
                    let noise = self.bytes(length);
                    bytes.splice(at..at, noise);
                }
                _ => bytes[at] = [0, 1, 0x7f, 0x80, 0xff][self.below(5)],
            }
            if bytes.is_empty() {
                return;
            }
        }
    }

    /// Feeds the bytes in pieces of random size.
    fn in_pieces(&mut self, bytes: &[u8], mut feed: impl FnMut(&mut BytesMut) -> bool) {
        let mut buffer = BytesMut::new();
        let mut rest = bytes;
        while !rest.is_empty() {
            let size = 1 + self.below(40);
            let (piece, further) = rest.split_at(size.min(rest.len()));
            rest = further;
            buffer.extend_from_slice(piece);
            if !feed(&mut buffer) {
                return;
            }
        }
    }
}

/// An exec with everything that a client sends.
fn spdy_conversation() -> Vec<u8> {
    let mut client = SpdyClient::on(Box::new(tokio::io::empty()));
    let mut all = Vec::new();
    for kind in ["error", "stdin", "stdout", "stderr"] {
        all.extend(client.syn_stream(&[("streamtype", kind), ("port", "80"), ("requestid", "1")]).1);
    }
    all.extend(control(4, &[2, 7, 65_536, 4, 100]));
    all.extend(control(6, &[1]));
    all.extend(control(9, &[0, 100_000]));
    all.extend(control(9, &[5, 100_000]));
    all.extend(data(3, b"some input", false));
    all.extend(data(3, b"", true));
    all.extend(control(3, &[7, 5]));
    all.extend(control(7, &[0, 0]));
    all
}

fn websocket_conversation() -> Vec<u8> {
    let mut all = Vec::new();
    all.extend(frame(2, true, b"\x00some input"));
    all.extend(frame(2, false, b"\x00a message "));
    all.extend(frame(9, true, b"ping"));
    all.extend(frame(0, true, b"in two parts"));
    all.extend(frame(2, true, b"\x04{\"Width\":80,\"Height\":24}"));
    all.extend(frame(1, true, b"0Zm9vYmFy"));
    all.extend(frame(2, true, &[0; 300]));
    all.extend(frame(2, true, &[255, 0]));
    all.extend(frame(8, true, &1000_u16.to_be_bytes()));
    all
}

#[test]
fn the_spdy_parser_takes_anything() {
    let valid = spdy_conversation();
    for seed in 0..20_000 {
        let mut random = Random::new(seed);
        let mut bytes = valid.clone();
        if seed % 4 == 0 {
            let length = random.below(300);
            bytes = random.bytes(length);
        } else {
            random.mutate(&mut bytes);
        }
        let mut decoder = Decoder::new();
        random.in_pieces(&bytes, |buffer| {
            loop {
                match decoder.next(buffer) {
                    Ok(Some(_)) => {}
                    Ok(None) => return true,
                    Err(_) => return false,
                }
            }
        });
    }
}

#[test]
fn the_websocket_parsers_take_anything() {
    let valid = websocket_conversation();
    for seed in 0..20_000 {
        let mut random = Random::new(seed);
        let mut bytes = valid.clone();
        if seed % 4 == 0 {
            let length = random.below(300);
            bytes = random.bytes(length);
        } else {
            random.mutate(&mut bytes);
        }
        let codec = if seed % 2 == 0 { Codec::Binary } else { Codec::Base64 };
        let mut channels = Demultiplexer::new(codec, seed % 3 == 0);
        let mut decoder = websocket::Decoder::new(Role::Server);
        let mut resizes = Resizes::default();
        random.in_pieces(&bytes, |buffer| {
            loop {
                match decoder.next(buffer) {
                    Ok(Some(websocket::Frame::Data { first, last, bytes })) => {
                        let _ = resizes.take(&bytes);
                        if channels.take(websocket::MessagePart { first, last, bytes }).is_err() {
                            return false;
                        }
                    }
                    Ok(Some(_)) => {}
                    Ok(None) => return true,
                    Err(_) => return false,
                }
            }
        });
    }
}

/// Sends the bytes on an upgraded connection, and reads until the server closes or falls silent.
async fn throw(mut io: Box<dyn super::Io>, bytes: &[u8]) {
    // The server may close before it has taken everything.
    let _ = io.write_all(bytes).await;
    let _ = io.shutdown().await;
    let mut rest = Vec::new();
    let _ = patiently(io.read_to_end(&mut rest)).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn the_server_survives_broken_conversations() {
    let fixture = Arc::new(Fixture::start().await);
    let tasks = || tokio::runtime::Handle::current().metrics().num_alive_tasks();
    let tasks_before = tasks();
    let spdy = [("Connection", "Upgrade"), ("Upgrade", "SPDY/3.1")];
    for seed in 0..600 {
        let mut random = Random::new(seed);
        let forward = seed % 2 == 0;
        let url = if forward { fixture.forward(&[9]) } else { fixture.exec(&["cat"]) };
        let answer = if seed % 3 == 0 {
            handshake(&url, Some("v4.channel.k8s.io")).await
        } else {
            let protocol = if forward { "portforward.k8s.io" } else { "v4.channel.k8s.io" };
            request(&url, "POST", &[spdy[0], spdy[1], ("X-Stream-Protocol-Version", protocol)]).await
        };
        assert_eq!(answer.status, 101);
        let mut bytes = if seed % 3 == 0 { websocket_conversation() } else { spdy_conversation() };
        random.mutate(&mut bytes);
        throw(answer.io, &bytes).await;
    }
    // And before the upgrade.
    for seed in 0..200 {
        let mut random = Random::new(seed);
        let url = fixture.exec(&["cat"]);
        let (address, path) = super::split(&url);
        let mut bytes = format!(
            "POST {path} HTTP/1.1\r\nHost: x\r\nConnection: Upgrade\r\nUpgrade: SPDY/3.1\r\n\
             X-Stream-Protocol-Version: v4.channel.k8s.io\r\n\r\n"
        )
        .into_bytes();
        random.mutate(&mut bytes);
        throw(Box::new(TcpStream::connect(address).await.unwrap()), &bytes).await;
    }
    // Nothing of them is left.
    patiently(async {
        while tasks() > tasks_before {
            tokio::task::yield_now().await;
        }
    })
    .await;
    // And the server still works.
    let mut client = SpdyClient::connect(&fixture.exec(&["both", "0"]), "v4.channel.k8s.io").await;
    let error = client.open_type("error").await;
    for kind in ["stdin", "stdout", "stderr"] {
        client.open_type(kind).await;
    }
    client.until_closed().await;
    assert!(client.text(error).contains("Success"));
}
