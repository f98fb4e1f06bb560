//! The other end of an NRI socket, byte by byte: for what the client library of plugins cannot say.

use std::io::{Read, Write};
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::time::Duration;

use anyhow::{Result, bail, ensure};
use podvisor_proto::nri::{ConfigureResponse, Empty, RegisterPluginRequest, SynchronizeResponse};
use podvisor_proto::ttrpc::{Request, Response};
use prost::Message;

use crate::eventually::PATIENCE;

/// Who pretends to be a plugin.
#[derive(Debug)]
pub struct Peer {
    socket: UnixStream,
    stream: u32,
}

/// A ttRPC message: connection of the multiplexer, stream, type, body.
pub type Frame = (u32, u32, u8, Vec<u8>);

/// A message in one frame of the multiplexer.
pub fn frame((connection, stream, kind, body): &Frame) -> Vec<u8> {
    let length = u32::try_from(body.len()).unwrap_or(u32::MAX);
    let mut bytes = Vec::new();
    for number in [*connection, length + 10, length, *stream] {
        bytes.extend(number.to_be_bytes());
    }
    bytes.extend([*kind, 0]);
    bytes.extend(body);
    bytes
}

impl Peer {
    /// Connects, and says nothing.
    pub fn connect(socket: &Path) -> Result<Self> {
        let socket = UnixStream::connect(socket)?;
        socket.set_read_timeout(Some(PATIENCE))?;
        socket.set_write_timeout(Some(Duration::from_secs(5)))?;
        Ok(Self { socket, stream: 1 })
    }

    /// Connects and becomes a plugin with one subscription.
    pub fn join(socket: &Path, index: &str, events: i32) -> Result<Self> {
        let mut peer = Self::connect(socket)?;
        let request = RegisterPluginRequest {
            plugin_idx: index.into(),
            plugin_name: "peer".into(),
            ..Default::default()
        };
        peer.send_call("RegisterPlugin", &request.encode_to_vec())?;
        loop {
            match peer.receive()? {
                (1, stream, 1, body) => {
                    let method = Request::decode(body.as_slice())?.method;
                    let payload = match method.as_str() {
                        "Configure" => ConfigureResponse { events }.encode_to_vec(),
                        "Synchronize" => SynchronizeResponse::default().encode_to_vec(),
                        _ => Empty {}.encode_to_vec(),
                    };
                    let response = Response { payload, status: None };
                    peer.send(&frame(&(1, stream, 2, response.encode_to_vec())))?;
                    if method == "Synchronize" {
                        return Ok(peer);
                    }
                }
                (2, _, 2, body) => {
                    let status = Response::decode(body.as_slice())?.status.unwrap_or_default();
                    ensure!(status.code == 0, "{}", status.message);
                }
                other => bail!("a message that has no place here: {other:?}"),
            }
        }
    }

    /// Sends bytes.
    pub fn send(&mut self, bytes: &[u8]) -> Result<()> {
        Ok(self.socket.write_all(bytes)?)
    }

    /// Calls a method of the runtime service without waiting.
    pub fn send_call(&mut self, method: &str, payload: &[u8]) -> Result<()> {
        let service = "nri.pkg.api.v1alpha1.Runtime".to_owned();
        let request =
            Request { service, method: method.to_owned(), payload: payload.to_vec(), ..Default::default() };
        let stream = self.stream;
        self.stream += 2;
        self.send(&frame(&(2, stream, 1, request.encode_to_vec())))
    }

    /// Calls a method of the runtime service.
    pub fn call(&mut self, method: &str, payload: &[u8]) -> Result<Response> {
        let asked = self.stream;
        self.send_call(method, payload)?;
        loop {
            let (connection, stream, kind, body) = self.receive()?;
            ensure!((connection, kind) == (2, 2), "no answer, but {connection} {kind}");
            // The answer to RegisterPlugin may come after all that leads to it.
            if stream == asked {
                return Ok(Response::decode(body.as_slice())?);
            }
        }
    }

    /// The next message.
    pub fn receive(&mut self) -> Result<Frame> {
        let mut number = || -> Result<u32> {
            let mut bytes = [0; 4];
            self.socket.read_exact(&mut bytes)?;
            Ok(u32::from_be_bytes(bytes))
        };
        let (connection, length, body, stream) = (number()?, number()?, number()?, number()?);
        ensure!(length == body + 10, "a message in several frames");
        let mut rest = vec![0; body as usize + 2];
        self.socket.read_exact(&mut rest)?;
        Ok((connection, stream, rest[0], rest.split_off(2)))
    }

    /// Whether the other side has closed the connection, now or soon.
    pub fn is_closed(&mut self) -> bool {
        let mut rest = Vec::new();
        match self.socket.read_to_end(&mut rest) {
            Ok(_) => true,
            Err(error) => error.kind() == std::io::ErrorKind::ConnectionReset,
        }
    }
}
