//! A client of the streaming server, as small as it can be: one WebSocket (RFC 6455) with Kubernetes' channels, the first byte of
//! each message.

use anyhow::{Context, Result, bail, ensure};
use tokio::io::{AsyncReadExt, AsyncWriteExt, BufReader};
use tokio::net::TcpStream;

/// Channel of what the process reads from its standard input.
pub const STDIN: u8 = 0;
/// Channel of what the process writes to its standard output.
pub const STDOUT: u8 = 1;
/// Channel of the outcome: a Kubernetes Status as JSON.
pub const OUTCOME: u8 = 3;

/// A session that is open.
#[derive(Debug)]
pub struct Session {
    stream: BufReader<TcpStream>,
}

impl Session {
    /// Connects to a URL of Exec or Attach.
    pub async fn open(url: &str) -> Result<Self> {
        let rest = url.strip_prefix("http://").context("no http URL")?;
        let (address, path) = rest.split_once('/').context("no path in the URL")?;
        let stream = TcpStream::connect(address).await?;
        stream.set_nodelay(true)?;
        let mut stream = BufReader::with_capacity(64 << 10, stream);
        let request = format!(
            "GET /{path} HTTP/1.1\r\nHost: {address}\r\nConnection: Upgrade\r\nUpgrade: websocket\r\n\
             Sec-WebSocket-Version: 13\r\nSec-WebSocket-Key: MDEyMzQ1Njc4OWFiY2RlZg==\r\n\
             Sec-WebSocket-Protocol: v4.channel.k8s.io\r\n\r\n"
        );
        stream.write_all(request.as_bytes()).await?;
        let mut head = Vec::new();
        while !head.ends_with(b"\r\n\r\n") {
            head.push(stream.read_u8().await?);
        }
        let head = String::from_utf8_lossy(&head).into_owned();
        ensure!(head.starts_with("HTTP/1.1 101"), "no upgrade: {head}");
        Ok(Self { stream })
    }

    /// Sends bytes on a channel.
    pub async fn send(&mut self, channel: u8, bytes: &[u8]) -> Result<()> {
        let length = u8::try_from(bytes.len() + 1).ok().filter(|length| *length < 126);
        // Final and binary; masked, as a client's frames have to be, with zeros, which changes nothing.
        let head = [0x82, 0x80 | length.context("a long message")?, 0, 0, 0, 0, channel];
        Ok(self.stream.write_all(&[&head, bytes].concat()).await?)
    }

    /// The next message's channel and bytes; `None` at the end, also a sudden one.
    pub async fn next(&mut self) -> Result<Option<(u8, Vec<u8>)>> {
        loop {
            let Ok(first) = self.stream.read_u8().await else { return Ok(None) };
            let length = match self.stream.read_u8().await? & 0x7f {
                126 => usize::from(self.stream.read_u16().await?),
                127 => usize::try_from(self.stream.read_u64().await?)?,
                short => usize::from(short),
            };
            let mut message = vec![0; length];
            self.stream.read_exact(&mut message).await?;
            match first & 0x0f {
                // Binary and text.
                1 | 2 if !message.is_empty() => return Ok(Some((message[0], message.split_off(1)))),
                1 | 2 | 9 | 10 => {}
                8 => return Ok(None),
                other => bail!("a frame of kind {other}"),
            }
        }
    }

    /// Everything to the end: standard output and the outcome, which is empty when the stream was cut.
    pub async fn whole(mut self) -> Result<(String, String)> {
        let (mut stdout, mut outcome) = (Vec::new(), Vec::new());
        while let Ok(Some((channel, bytes))) = self.next().await {
            match channel {
                STDOUT => stdout.extend(bytes),
                OUTCOME => outcome.extend(bytes),
                _ => {}
            }
        }
        Ok((String::from_utf8(stdout)?, String::from_utf8(outcome)?))
    }
}
