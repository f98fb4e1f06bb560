//! As much of an HTTP client as pushing to a registry on loopback needs.
//!
//! Requests say HTTP/1.0, so that every answer ends with its connection and none is chunked.

use std::fmt::Write as _;
use std::io::{Read, Write};
use std::net::{SocketAddr, TcpStream};
use std::time::Duration;

use anyhow::{Context, Result, bail};

/// How long a registry on loopback may be silent.
const SILENCE: Duration = Duration::from_secs(60);

/// A server's answer.
#[derive(Debug)]
pub struct Answer {
    /// The status code.
    pub status: u16,
    /// Header names in lower case with their values.
    pub headers: Vec<(String, String)>,
    /// The body, whole.
    pub body: Vec<u8>,
}

impl Answer {
    /// The first header of that name (lower case).
    pub fn header(&self, name: &str) -> Option<&str> {
        self.headers.iter().find(|(have, _)| have == name).map(|(_, value)| value.as_str())
    }

    /// Turns any status but `wanted` into an error that shows the answer.
    pub fn expect(self, wanted: u16) -> Result<Self> {
        if self.status != wanted {
            bail!(
                "the registry answered {} instead of {wanted}: {}",
                self.status,
                String::from_utf8_lossy(&self.body).trim_end()
            );
        }
        Ok(self)
    }
}

/// Sends one request and reads the answer. `target` is the path with its query.
pub fn request(
    server: SocketAddr,
    method: &str,
    target: &str,
    headers: &[(&str, &str)],
    body: &[u8],
) -> Result<Answer> {
    exchange(server, method, target, headers, body)
        .with_context(|| format!("{method} http://{server}{target}"))
}

fn exchange(
    server: SocketAddr,
    method: &str,
    target: &str,
    headers: &[(&str, &str)],
    body: &[u8],
) -> Result<Answer> {
    let mut stream = TcpStream::connect_timeout(&server, SILENCE)?;
    stream.set_read_timeout(Some(SILENCE))?;
    stream.set_write_timeout(Some(SILENCE))?;
    let mut head =
        format!("{method} {target} HTTP/1.0\r\nHost: {server}\r\nContent-Length: {}\r\n", body.len());
    for (name, value) in headers {
        write!(head, "{name}: {value}\r\n")?;
    }
    head.push_str("\r\n");
    stream.write_all(head.as_bytes())?;
    stream.write_all(body)?;
    let mut answer = Vec::new();
    stream.read_to_end(&mut answer)?;
    parse(&answer)
}

fn parse(bytes: &[u8]) -> Result<Answer> {
    let end = bytes.windows(4).position(|w| w == b"\r\n\r\n").context("the answer has no end of headers")?;
    let head = std::str::from_utf8(&bytes[..end]).context("the answer's headers are no text")?;
    let mut lines = head.split("\r\n");
    let status = lines.next().and_then(|line| line.split(' ').nth(1)).and_then(|code| code.parse().ok());
    let status = status.context("the answer has no status line")?;
    let headers = lines
        .filter_map(|line| line.split_once(':'))
        .map(|(name, value)| (name.to_ascii_lowercase(), value.trim().to_owned()))
        .collect();
    Ok(Answer { status, headers, body: bytes[end + 4..].to_vec() })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_answer_is_read_with_status_headers_and_body() {
        let answer =
            parse(b"HTTP/1.0 202 Accepted\r\nLocation: /v2/x\r\nA: b: c\r\n\r\nbody\r\n\r\n").unwrap();
        assert_eq!(answer.status, 202);
        assert_eq!(answer.header("location"), Some("/v2/x"));
        assert_eq!(answer.header("a"), Some("b: c"));
        assert_eq!(answer.body, b"body\r\n\r\n");
    }

    #[test]
    fn half_an_answer_is_an_error() {
        for bad in [&b""[..], b"HTTP/1.0 200 OK\r\n", b"nonsense\r\n\r\n"] {
            assert!(parse(bad).is_err(), "{}", String::from_utf8_lossy(bad));
        }
    }
}
