//! Bytes between programs and stream connections. A program's pipe waits until somebody opens its stream; then bytes go as fast as the
//! slower side, and nobody keeps more than one buffer.

use std::collections::BTreeMap;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};

use podvisor_proto::agent::{Open, Opened, StandardStream, open::Stream};
use prost::Message;
use rustix::io::Errno;
use rustix::net::{RecvFlags, SendFlags, Shutdown, recv, send, shutdown};
use rustix::termios::{LocalModes, SpecialCodeIndex, tcgetattr};

use crate::control::{put_frame, take_frame};
use crate::failure::Failure;

/// Connections that have not said yet what they are for.
const OPENING: usize = 64;
/// Bytes moved at once.
const CHUNK: usize = 64 * 1024;
/// The first frame of a stream connection is small.
const OPEN_LIMIT: usize = 4096;

/// The ends of a process's standard streams that nobody has opened yet, and those that are in use.
#[derive(Debug, Default)]
pub(crate) struct Standard {
    pub(crate) stdin: Option<OwnedFd>,
    pub(crate) stdout: Option<OwnedFd>,
    pub(crate) stderr: Option<OwnedFd>,
    /// In place of the three. Kept here for its size; streams get copies.
    pub(crate) terminal: Option<OwnedFd>,
}

impl Standard {
    /// Takes the end of a stream.
    fn take(&mut self, id: &str, which: StandardStream) -> Result<Pump, Failure> {
        let missing = || Failure::state("this stream is not there, or somebody has it open");
        if let Some(terminal) = &self.terminal {
            let copy = terminal.try_clone().map_err(|error| Failure::system("copy the terminal", error))?;
            return match which {
                StandardStream::Stdin => Ok(Pump::inward(copy)),
                StandardStream::Stdout => Ok(Pump::both(copy, Kind::Terminal)),
                _ => Err(missing()),
            };
        }
        match which {
            StandardStream::Stdin => self.stdin.take().map(Pump::inward),
            StandardStream::Stdout => self.stdout.take().map(|end| Pump::output(end, id, which)),
            StandardStream::Stderr => self.stderr.take().map(|end| Pump::output(end, id, which)),
            StandardStream::Unspecified => None,
        }
        .ok_or_else(missing)
    }
}

/// One direction: bytes that were read and are not written yet.
#[derive(Debug, Default)]
struct Direction {
    buffer: Vec<u8>,
    written: usize,
    /// The source has ended, or there is none.
    ended: bool,
    /// The end has been passed on.
    closed: bool,
}

impl Direction {
    fn none() -> Self {
        Self { ended: true, closed: true, ..Self::default() }
    }

    fn is_empty(&self) -> bool {
        self.written == self.buffer.len()
    }

    fn wants_to_read(&self) -> bool {
        !self.ended && self.is_empty()
    }

    fn wants_to_write(&self) -> bool {
        !self.is_empty()
    }
}

/// What a program's descriptor is.
#[derive(Debug)]
enum Kind {
    Input,
    /// An output of `id`. When its reader goes away before the program does, it waits for the next.
    Output {
        id: String,
        which: StandardStream,
    },
    /// Over with the program's side: nobody is there any more to read what is typed.
    Terminal,
    /// Each side can be closed alone.
    Socket,
}

/// A program's descriptor and what goes in and out of it.
#[derive(Debug)]
pub(crate) struct Pump {
    program: OwnedFd,
    inward: Direction,
    outward: Direction,
    kind: Kind,
}

impl Pump {
    fn inward(program: OwnedFd) -> Self {
        Self { program, inward: Direction::default(), outward: Direction::none(), kind: Kind::Input }
    }
    fn output(program: OwnedFd, id: &str, which: StandardStream) -> Self {
        let kind = Kind::Output { id: id.to_owned(), which };
        Self { program, inward: Direction::none(), outward: Direction::default(), kind }
    }
    fn both(program: OwnedFd, kind: Kind) -> Self {
        Self { program, inward: Direction::default(), outward: Direction::default(), kind }
    }
    /// A terminal that belongs to this stream alone.
    pub(crate) fn terminal(controller: OwnedFd) -> Self {
        Self::both(controller, Kind::Terminal)
    }
    /// A connection inside the guest.
    pub(crate) fn connection(program: OwnedFd) -> Self {
        Self::both(program, Kind::Socket)
    }
}

/// An output that lost its reader.
#[derive(Debug)]
pub(crate) struct Abandoned {
    pub(crate) id: String,
    pub(crate) which: StandardStream,
    pub(crate) end: OwnedFd,
}

/// A connection that carries a stream.
#[derive(Debug)]
struct Carried {
    connection: OwnedFd,
    pump: Pump,
    /// Its reader has gone.
    abandoned: bool,
}

/// All stream connections.
#[derive(Debug, Default)]
pub(crate) struct Streams {
    opening: BTreeMap<u64, (OwnedFd, Vec<u8>)>,
    carried: BTreeMap<u64, Carried>,
    count: u64,
}

/// A descriptor to watch.
#[derive(Debug)]
pub(crate) struct Wanted<'a> {
    pub(crate) key: u64,
    pub(crate) descriptor: BorrowedFd<'a>,
    pub(crate) read: bool,
    pub(crate) write: bool,
}

impl Streams {
    /// A new connection, which will say what it is for.
    pub(crate) fn accept(&mut self, connection: OwnedFd) {
        if self.opening.len() >= OPENING {
            return;
        }
        self.count += 1;
        self.opening.insert(self.count, (connection, Vec::new()));
    }

    pub(crate) fn wanted(&self) -> Vec<Wanted<'_>> {
        let mut wanted: Vec<_> = self
            .opening
            .iter()
            .map(|(key, (connection, _))| Wanted {
                key: *key,
                descriptor: connection.as_fd(),
                read: true,
                write: false,
            })
            .collect();
        for (key, carried) in &self.carried {
            let Pump { program, inward, outward, .. } = &carried.pump;
            let mut add = |descriptor, read, write| {
                if read || write {
                    wanted.push(Wanted { key: *key, descriptor, read, write });
                }
            };
            // The connection's end is noticed also when nothing is to be read from it: poll(2) reports a hang-up for what is watched at all.
            add(carried.connection.as_fd(), inward.wants_to_read(), outward.wants_to_write());
            add(program.as_fd(), outward.wants_to_read(), inward.wants_to_write());
        }
        wanted
    }

    /// Reads what a new connection is for; gives it back when it has said so.
    pub(crate) fn opened(&mut self, key: u64) -> Option<(OwnedFd, Stream)> {
        let (connection, bytes) = self.opening.get_mut(&key)?;
        // No byte behind the frame may be taken: it belongs to the stream.
        let wanted = match bytes.first_chunk::<4>() {
            None => 4 - bytes.len(),
            Some(header) => {
                usize::try_from(u32::from_le_bytes(*header)).unwrap_or(usize::MAX) + 4 - bytes.len()
            }
        };
        let mut chunk = [0; OPEN_LIMIT];
        let frame = if wanted > OPEN_LIMIT {
            Err(())
        } else {
            match recv(&*connection, &mut chunk[..wanted], RecvFlags::DONTWAIT) {
                Ok((0, _)) => Err(()),
                Ok((length, _)) => {
                    bytes.extend_from_slice(&chunk[..length]);
                    take_frame(bytes).map_err(drop)
                }
                Err(Errno::AGAIN | Errno::INTR) => Ok(None),
                Err(_) => Err(()),
            }
        };
        let open = match frame {
            Ok(None) => return None,
            Ok(Some(frame)) => Open::decode(frame.as_slice()).ok().and_then(|open| open.stream),
            Err(()) => None,
        };
        let (connection, _) = self.opening.remove(&key)?;
        open.map(|open| (connection, open))
    }

    /// Answers a connection, and carries its stream from now on.
    pub(crate) fn carry(&mut self, connection: OwnedFd, pump: Result<Pump, Failure>) {
        let (pump, error) = match pump {
            Ok(pump) => (Some(pump), None),
            Err(failure) => (None, Some(failure.into_message())),
        };
        let mut answer = Vec::new();
        put_frame(&mut answer, &Opened { error });
        // It is the first that is sent, and small: it fits the socket's buffer or the client is gone.
        let sent = send(&connection, &answer, SendFlags::NOSIGNAL | SendFlags::DONTWAIT);
        if let (Some(pump), Ok(length)) = (pump, sent)
            && length == answer.len()
        {
            self.count += 1;
            self.carried.insert(self.count, Carried { connection, pump, abandoned: false });
        }
    }

    /// Moves bytes of a stream as far as they go; returns an output whose reader has gone.
    pub(crate) fn advance(&mut self, key: u64, buffer: &mut [u8]) -> Option<Abandoned> {
        let carried = self.carried.get_mut(&key)?;
        carried.advance(buffer);
        if !carried.is_over() {
            return None;
        }
        let Carried { pump, abandoned, .. } = self.carried.remove(&key)?;
        match pump.kind {
            Kind::Output { id, which } if abandoned => Some(Abandoned { id, which, end: pump.program }),
            _ => None,
        }
    }
}

/// Gives a stream of `standard` to a connection.
pub(crate) fn standard(standard: Option<&mut Standard>, id: &str, which: i32) -> Result<Pump, Failure> {
    let which = StandardStream::try_from(which).unwrap_or(StandardStream::Unspecified);
    standard.ok_or_else(|| Failure::not_found(format!("no container or exec {id:?}")))?.take(id, which)
}

/// A buffer for [`Streams::advance`].
pub(crate) fn buffer() -> Vec<u8> {
    vec![0; CHUNK]
}

impl Carried {
    fn is_over(&self) -> bool {
        let Pump { inward, outward, kind, .. } = &self.pump;
        self.abandoned || outward.closed && (inward.closed || matches!(kind, Kind::Terminal))
    }

    fn advance(&mut self, buffer: &mut [u8]) {
        let Pump { program, inward, outward, kind } = &mut self.pump;
        // Outward: program → connection. EIO is how a terminal ends.
        fill(outward, buffer, |bytes| match rustix::io::read(&*program, bytes) {
            Err(Errno::IO) => Ok(0),
            read => read,
        });
        let connection = &self.connection;
        if !drain(outward, |bytes| send(connection, bytes, SendFlags::NOSIGNAL | SendFlags::DONTWAIT)) {
            self.abandoned = true;
        }
        if outward.ended && outward.is_empty() && !outward.closed {
            outward.closed = true;
            let _ = shutdown(connection, Shutdown::Write);
        }
        // Inward: connection → program.
        fill(inward, buffer, |bytes| recv(connection, bytes, RecvFlags::DONTWAIT).map(|(length, _)| length));
        if !drain(inward, |bytes| rustix::io::write(&*program, bytes)) {
            // The program has closed its input: what comes for it is thrown away, as a closed pipe does.
            inward.buffer.clear();
            (inward.written, inward.ended) = (0, true);
        }
        if inward.ended && inward.is_empty() && !inward.closed {
            inward.closed = true;
            match kind {
                Kind::Socket => drop(shutdown(&*program, Shutdown::Write)),
                Kind::Terminal => end_of_file(program),
                Kind::Input | Kind::Output { .. } => {}
            }
        }
    }
}

/// A terminal cannot be half-closed; a program that reads whole lines from it sees the end by this character.
fn end_of_file(terminal: &OwnedFd) {
    if let Ok(settings) = tcgetattr(terminal)
        && settings.local_modes.contains(LocalModes::ICANON)
    {
        let _ = rustix::io::write(terminal, &[settings.special_codes[SpecialCodeIndex::VEOF]]);
    }
}

/// Reads once when the direction has room.
fn fill(direction: &mut Direction, buffer: &mut [u8], read: impl FnOnce(&mut [u8]) -> Result<usize, Errno>) {
    if !direction.wants_to_read() {
        return;
    }
    match read(buffer) {
        Ok(0) => direction.ended = true,
        Ok(length) => {
            direction.buffer.clear();
            direction.buffer.extend_from_slice(&buffer[..length]);
            direction.written = 0;
        }
        Err(Errno::AGAIN | Errno::INTR) => {}
        Err(_) => direction.ended = true,
    }
}

/// Writes what waits; false when the other side takes nothing any more.
fn drain(direction: &mut Direction, mut write: impl FnMut(&[u8]) -> Result<usize, Errno>) -> bool {
    while direction.wants_to_write() {
        match write(&direction.buffer[direction.written..]) {
            Ok(length) => direction.written += length,
            Err(Errno::INTR) => {}
            Err(Errno::AGAIN) => return true,
            Err(_) => return false,
        }
    }
    if direction.is_empty() && !direction.buffer.is_empty() {
        // An idle stream keeps no buffer.
        (direction.buffer, direction.written) = (Vec::new(), 0);
    }
    true
}
