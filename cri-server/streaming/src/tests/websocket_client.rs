//! A WebSocket client with one buffer per channel.

use std::collections::HashMap;

use base64::Engine as _;
use base64::engine::general_purpose::STANDARD;
use bytes::{BufMut as _, Bytes, BytesMut};
use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};

use super::{Answer, Io, patiently, request};
use crate::websocket::{Decoder, Frame, Role, accept_key};

const KEY: &str = "AAECAwQFBgcICQoLDA0ODw==";

pub(super) const TEXT: u8 = 1;
pub(super) const BINARY: u8 = 2;
pub(super) const CLOSE: u8 = 8;
pub(super) const PING: u8 = 9;

pub(super) struct WebSocketClient {
    pub(super) io: Box<dyn Io>,
    decoder: Decoder,
    buffer: BytesMut,
    base64: bool,
    message: Vec<u8>,
    /// By channel, and how many messages there were.
    pub(super) channels: HashMap<u8, Vec<u8>>,
    pub(super) messages: usize,
    pub(super) pongs: usize,
    pub(super) close_received: bool,
    pub(super) closed: bool,
}

pub(super) async fn handshake(url: &str, protocol: Option<&str>) -> Answer {
    let mut headers = vec![
        ("Connection", "Upgrade"),
        ("Upgrade", "websocket"),
        ("Sec-WebSocket-Version", "13"),
        ("Sec-WebSocket-Key", KEY),
    ];
    headers.extend(protocol.map(|protocol| ("Sec-WebSocket-Protocol", protocol)));
    request(url, "GET", &headers).await
}

impl WebSocketClient {
    pub(super) async fn connect(url: &str, protocol: Option<&str>) -> Self {
        let answer = handshake(url, protocol).await;
        assert_eq!(answer.status, 101, "{}", answer.head);
        assert_eq!(answer.header("sec-websocket-protocol"), protocol);
        assert_eq!(answer.header("sec-websocket-accept"), accept_key(KEY).as_deref());
        Self {
            io: answer.io,
            decoder: Decoder::new(Role::Client),
            buffer: BytesMut::new(),
            base64: protocol.is_some_and(|protocol| protocol.contains("base64")),
            message: Vec::new(),
            channels: HashMap::new(),
            messages: 0,
            pongs: 0,
            close_received: false,
            closed: false,
        }
    }

    pub(super) async fn frame(&mut self, opcode: u8, fin: bool, payload: &[u8]) {
        self.io.write_all(&frame(opcode, fin, payload)).await.unwrap();
    }

    pub(super) async fn send(&mut self, channel: u8, bytes: &[u8]) {
        if self.base64 {
            let text = format!("{}{}", char::from(b'0' + channel), STANDARD.encode(bytes));
            self.frame(TEXT, true, text.as_bytes()).await;
        } else {
            self.frame(BINARY, true, &[&[channel], bytes].concat()).await;
        }
    }

    pub(super) async fn until(&mut self, mut condition: impl FnMut(&Self) -> bool) {
        while !condition(self) {
            assert!(!self.closed, "the server closed the connection: {:?}", self.channels);
            self.read().await;
        }
    }

    /// Reads until the server has closed, and answers its close frame.
    pub(super) async fn until_closed(&mut self) {
        self.until(|client| client.close_received || client.closed).await;
        if !self.closed {
            self.frame(CLOSE, true, &1000_u16.to_be_bytes()).await;
        }
        while !self.closed {
            self.read().await;
        }
    }

    pub(super) async fn read(&mut self) {
        self.closed = patiently(self.io.read_buf(&mut self.buffer)).await.unwrap() == 0;
        while let Some(frame) = self.decoder.next(&mut self.buffer).unwrap() {
            match frame {
                Frame::Data { first, last, bytes } => self.take(first, last, &bytes),
                Frame::Ping(_) => panic!("the server pings"),
                Frame::Pong => self.pongs += 1,
                Frame::Close => self.close_received = true,
            }
        }
    }

    fn take(&mut self, first: bool, last: bool, bytes: &Bytes) {
        assert_eq!(first, self.message.is_empty());
        self.message.extend_from_slice(bytes);
        if !last {
            return;
        }
        let message = std::mem::take(&mut self.message);
        let (channel, payload) = message.split_first().unwrap();
        self.messages += 1;
        if self.base64 {
            self.channels.entry(channel - b'0').or_default().extend(STANDARD.decode(payload).unwrap());
        } else {
            self.channels.entry(*channel).or_default().extend_from_slice(payload);
        }
    }

    pub(super) fn text(&self, channel: u8) -> &str {
        self.channels.get(&channel).map_or("", |bytes| std::str::from_utf8(bytes).unwrap())
    }
}

/// A masked frame.
pub(super) fn frame(opcode: u8, fin: bool, payload: &[u8]) -> Vec<u8> {
    let mask = [0x11, 0x22, 0x33, 0x44];
    let mut frame = vec![u8::from(fin) << 7 | opcode];
    match payload.len() {
        length @ 0..=125 => frame.put_u8(0x80 | u8::try_from(length).unwrap()),
        length @ 126..=0xffff => {
            frame.put_u8(0xfe);
            frame.put_u16(u16::try_from(length).unwrap());
        }
        length => {
            frame.put_u8(0xff);
            frame.put_u64(length as u64);
        }
    }
    frame.extend_from_slice(&mask);
    frame.extend(payload.iter().zip(mask.iter().cycle()).map(|(byte, key)| byte ^ key));
    frame
}
