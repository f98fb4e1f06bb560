//! A SPDY client that does what client-go does: no flow control, one stream after the other.

use std::collections::HashMap;

use bytes::{BufMut as _, BytesMut};
use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};

use super::{Io, patiently, request};
use crate::spdy::{Decoder, Event, HeaderCompressor};

/// What came on a stream.
#[derive(Debug, Default, Clone, PartialEq, Eq)]
pub(super) struct Received {
    pub(super) accepted: bool,
    pub(super) bytes: Vec<u8>,
    pub(super) ended: bool,
    pub(super) reset: Option<u32>,
}

pub(super) struct SpdyClient {
    pub(super) io: Box<dyn Io>,
    headers: HeaderCompressor,
    decoder: Decoder,
    buffer: BytesMut,
    next: u32,
    pub(super) streams: HashMap<u32, Received>,
    /// WINDOW_UPDATEs by stream, in bytes.
    pub(super) opened: HashMap<u32, u64>,
    pub(super) pings: Vec<u32>,
    pub(super) gone_away: bool,
    pub(super) closed: bool,
}

impl SpdyClient {
    pub(super) async fn connect(url: &str, protocols: &str) -> Self {
        let headers =
            [("Connection", "Upgrade"), ("Upgrade", "SPDY/3.1"), ("X-Stream-Protocol-Version", protocols)];
        let answer = request(url, "POST", &headers).await;
        assert_eq!(answer.status, 101, "{}", answer.head);
        assert_eq!(answer.header("upgrade"), Some("SPDY/3.1"));
        Self::on(answer.io)
    }

    pub(super) fn on(io: Box<dyn Io>) -> Self {
        Self {
            io,
            headers: HeaderCompressor::new(),
            decoder: Decoder::new(),
            buffer: BytesMut::new(),
            next: 1,
            streams: HashMap::new(),
            opened: HashMap::new(),
            pings: Vec::new(),
            gone_away: false,
            closed: false,
        }
    }

    pub(super) fn syn_stream(&mut self, headers: &[(&str, &str)]) -> (u32, Vec<u8>) {
        let id = self.next;
        self.next += 2;
        self.streams.insert(id, Received::default());
        (id, syn_stream(id, &self.headers.write(headers)))
    }

    /// Opens a stream, and waits until it is accepted or not.
    pub(super) async fn open(&mut self, headers: &[(&str, &str)]) -> u32 {
        let (id, frame) = self.syn_stream(headers);
        self.io.write_all(&frame).await.unwrap();
        self.until(|client| client.streams[&id].accepted || client.streams[&id].reset.is_some()).await;
        id
    }

    pub(super) async fn open_type(&mut self, kind: &str) -> u32 {
        self.open(&[("streamtype", kind)]).await
    }

    pub(super) async fn send(&mut self, stream: u32, bytes: &[u8], fin: bool) {
        self.io.write_all(&data(stream, bytes, fin)).await.unwrap();
    }

    pub(super) async fn control(&mut self, kind: u16, fields: &[u32]) {
        self.io.write_all(&control(kind, fields)).await.unwrap();
    }

    /// Reads until the condition holds.
    pub(super) async fn until(&mut self, mut condition: impl FnMut(&Self) -> bool) {
        while !condition(self) {
            assert!(!self.closed, "the server closed the connection: {:?}", self.streams);
            self.read().await;
        }
    }

    /// Reads until the server has closed the connection.
    pub(super) async fn until_closed(&mut self) {
        while !self.closed {
            self.read().await;
        }
    }

    pub(super) async fn read(&mut self) {
        // An error is a reset, which must not happen either: it may cost output.
        self.closed = patiently(self.io.read_buf(&mut self.buffer)).await.unwrap() == 0;
        while let Some(event) = self.decoder.next(&mut self.buffer).unwrap() {
            match event {
                Event::SynReply { stream, .. } => self.streams.get_mut(&stream).unwrap().accepted = true,
                Event::Data { stream, bytes, fin } => {
                    let received = self.streams.get_mut(&stream).unwrap();
                    assert!(received.accepted && !received.ended && received.reset.is_none());
                    received.bytes.extend_from_slice(&bytes);
                    received.ended = fin;
                }
                Event::Reset { stream, status } => {
                    self.streams.entry(stream).or_default().reset = Some(status);
                }
                Event::Ping(id) => self.pings.push(id),
                Event::GoAway => self.gone_away = true,
                Event::WindowUpdate { stream, delta } => {
                    *self.opened.entry(stream).or_default() += u64::from(delta);
                }
                other => panic!("a server does not send {other:?}"),
            }
        }
    }

    pub(super) fn text(&self, stream: u32) -> &str {
        std::str::from_utf8(&self.streams[&stream].bytes).unwrap()
    }
}

pub(super) fn data(stream: u32, bytes: &[u8], fin: bool) -> Vec<u8> {
    let mut frame = Vec::with_capacity(8 + bytes.len());
    frame.put_u32(stream);
    frame.put_u32(u32::from(fin) << 24 | u32::try_from(bytes.len()).unwrap());
    frame.put_slice(bytes);
    frame
}

pub(super) fn control(kind: u16, fields: &[u32]) -> Vec<u8> {
    let mut frame = Vec::new();
    frame.put_u16(0x8003);
    frame.put_u16(kind);
    frame.put_u32(4 * u32::try_from(fields.len()).unwrap());
    for field in fields {
        frame.put_u32(*field);
    }
    frame
}

pub(super) fn syn_stream(id: u32, block: &[u8]) -> Vec<u8> {
    let mut frame = Vec::new();
    frame.put_u32(0x8003_0001);
    frame.put_u32(10 + u32::try_from(block.len()).unwrap());
    frame.put_u32(id);
    frame.put_u32(0);
    frame.put_u16(0);
    frame.put_slice(block);
    frame
}
