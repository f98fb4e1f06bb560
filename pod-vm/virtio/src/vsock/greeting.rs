//! The line that a client begins with: `CONNECT <port>\n`, the port in decimal.

use std::os::fd::AsFd;

use rustix::io::Errno;
use rustix::net::{RecvFlags, recv};

/// `CONNECT 4294967295\n`
const LONGEST: usize = 19;

/// What there is of the line.
#[derive(Debug, PartialEq, Eq)]
pub(crate) enum Greeting {
    /// All of it.
    Port(u32),
    /// Not all yet.
    Incomplete,
    /// Something else, or the end.
    Wrong,
}

/// Takes the line from a client's socket, and nothing that follows it.
pub(crate) fn read(socket: impl AsFd) -> Greeting {
    let mut bytes = [0; LONGEST];
    let peeked = loop {
        match recv(&socket, &mut bytes, RecvFlags::PEEK | RecvFlags::DONTWAIT) {
            Ok((count, _)) => break count,
            Err(Errno::INTR) => {}
            Err(Errno::AGAIN) => return Greeting::Incomplete,
            Err(_) => return Greeting::Wrong,
        }
    };
    let seen = &bytes[..peeked];
    let Some(end) = seen.iter().position(|byte| *byte == b'\n') else {
        let can_become_one =
            (1..LONGEST).contains(&peeked) && b"CONNECT ".starts_with(&seen[..peeked.min(8)]);
        return if can_become_one { Greeting::Incomplete } else { Greeting::Wrong };
    };
    let port = parse(&seen[..end]);
    let taken = recv(&socket, &mut bytes[..=end], RecvFlags::DONTWAIT);
    match (port, taken) {
        (Some(port), Ok((count, _))) if count == end + 1 => Greeting::Port(port),
        _ => Greeting::Wrong,
    }
}

fn parse(line: &[u8]) -> Option<u32> {
    let number = line.strip_prefix(b"CONNECT ")?;
    // `parse` would take a sign.
    number.first()?.is_ascii_digit().then(|| std::str::from_utf8(number).ok()?.parse().ok())?
}

#[cfg(test)]
mod tests {
    use std::io::{Read, Write};
    use std::os::unix::net::UnixStream;

    use super::*;

    #[test]
    fn a_line_is_taken_and_what_follows_is_left() {
        let (mut client, mut socket) = UnixStream::pair().unwrap();
        for byte in b"CONNECT 1024" {
            client.write_all(&[*byte]).unwrap();
            assert_eq!(read(&socket), Greeting::Incomplete);
        }
        client.write_all(b"\nmore").unwrap();
        assert_eq!(read(&socket), Greeting::Port(1024));
        let mut rest = [0; 4];
        socket.read_exact(&mut rest).unwrap();
        assert_eq!(&rest, b"more");
    }

    #[test]
    fn anything_else_is_wrong() {
        let wrong: [&[u8]; 9] = [
            b"\n",
            b"GET / HTTP/1.1\r\n",
            b"CONNECT\n",
            b"CONNECT \n",
            b"CONNECT +1\n",
            b"CONNECT -1\n",
            b"CONNECT 4294967296\n",
            b"CONNECT 1 \n",
            b"CONNECT 00000000000000000000001\n",
        ];
        for line in wrong {
            let (mut client, socket) = UnixStream::pair().unwrap();
            client.write_all(line).unwrap();
            assert_eq!(read(&socket), Greeting::Wrong, "{line:?}");
        }
        let (client, socket) = UnixStream::pair().unwrap();
        drop(client);
        assert_eq!(read(&socket), Greeting::Wrong);
        let (mut client, socket) = UnixStream::pair().unwrap();
        client.write_all(b"CONNECT 4294967295\n").unwrap();
        assert_eq!(read(&socket), Greeting::Port(u32::MAX));
    }
}
