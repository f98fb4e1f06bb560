//! The monitor's ends of a process's standard streams: pipes, a terminal, or connections to the agent in a guest.

use std::io;
use std::os::fd::{AsFd, OwnedFd};
use std::path::Path;
use std::process::Stdio;

use rustix::fs::OFlags;
use rustix::io::{Errno, ioctl_fionread};
use rustix::net::{Shutdown, shutdown};
use rustix::pipe::{PipeFlags, fcntl_setpipe_size, pipe_with};
use rustix::pty::{OpenptFlags, ioctl_tiocgptpeer};
use rustix::termios::{LocalModes, SpecialCodeIndex, Winsize, tcgetattr, tcsetwinsize};

use crate::console::ConsoleSocket;
use crate::output::lines::Stream;
use crate::output::pace;
use crate::poll::{Interest, Poller, Token, Watch};

/// Input that may wait for a process that does not read. Then its senders are not read either.
const INPUT_LIMIT: usize = 64 * 1024;
/// What may still come from a guest after a process there has ended: a pipe and the buffers of sockets on the way, with room to spare.
const ON_ITS_WAY: usize = 4 * 1024 * 1024;

/// Which streams a process gets.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Wanted {
    pub(crate) terminal: bool,
    pub(crate) stdin: bool,
    pub(crate) stdout: bool,
    pub(crate) stderr: bool,
}

impl Wanted {
    pub(crate) fn has(self, stream: Stream) -> bool {
        match stream {
            Stream::Stdout => self.stdout,
            Stream::Stderr => self.stderr,
        }
    }
}

/// The process's ends, to be handed to the OCI runtime.
#[derive(Debug)]
pub(crate) struct TheirEnds {
    pub(crate) stdin: Stdio,
    pub(crate) stdout: Stdio,
    pub(crate) stderr: Stdio,
}

/// Our ends.
#[derive(Debug, Default)]
pub(crate) struct Streams {
    pub(crate) stdin: Option<Input>,
    pub(crate) stdout: Option<Output>,
    pub(crate) stderr: Option<Output>,
    /// Until the runtime has sent the terminal.
    pub(crate) console: Option<ConsoleSocket>,
}

impl Streams {
    /// Makes what is wanted. `key` is what ready events of the streams carry.
    pub(crate) fn open(key: u64, wanted: Wanted, run_dir: &Path) -> io::Result<(Self, TheirEnds)> {
        let mut ours = Self::default();
        let mut theirs = TheirEnds { stdin: Stdio::null(), stdout: Stdio::null(), stderr: Stdio::null() };
        if wanted.terminal {
            ours.console = Some(ConsoleSocket::bind(run_dir, key)?);
            return Ok((ours, theirs));
        }
        if wanted.stdin {
            let (reader, writer) = pipe_with(PipeFlags::CLOEXEC)?;
            theirs.stdin = reader.into();
            ours.stdin = Some(Input::new(writer, Token::Stdin(key), Closing::Pipe)?);
        }
        if wanted.stdout {
            let (reader, writer) = pipe_with(PipeFlags::CLOEXEC)?;
            theirs.stdout = writer.into();
            ours.stdout = Some(Output::new(reader, Token::Stdout(key), None)?);
        }
        if wanted.stderr {
            let (reader, writer) = pipe_with(PipeFlags::CLOEXEC)?;
            theirs.stderr = writer.into();
            ours.stderr = Some(Output::new(reader, Token::Stderr(key), None)?);
        }
        Ok((ours, theirs))
    }

    /// Takes the terminal that the runtime has sent, when one was wanted.
    pub(crate) fn take_terminal(&mut self, key: u64, wanted: Wanted) -> io::Result<()> {
        let Some(console) = self.console.take() else { return Ok(()) };
        let terminal = console.receive()?;
        // A slave of our own keeps the master from reporting the end whenever the process has its terminal closed
        // for a moment; it is given up when the process has ended.
        let slave =
            ioctl_tiocgptpeer(&terminal, OpenptFlags::RDWR | OpenptFlags::NOCTTY | OpenptFlags::CLOEXEC)?;
        if wanted.stdin {
            let writer = rustix::io::fcntl_dupfd_cloexec(&terminal, 0)?;
            self.stdin = Some(Input::new(writer, Token::Stdin(key), Closing::Terminal)?);
        }
        // Read also when nobody wants it, or the process would wait for somebody to.
        self.stdout = Some(Output::new(terminal, Token::Stdout(key), Some(slave))?);
        Ok(())
    }

    /// Takes a connection that carries an output of a process in a guest; with `input` its terminal's input too.
    pub(crate) fn plug_output(
        &mut self,
        key: u64,
        which: Stream,
        socket: OwnedFd,
        input: bool,
    ) -> io::Result<()> {
        if input {
            let writer = rustix::io::fcntl_dupfd_cloexec(&socket, 0)?;
            self.stdin = Some(Input::new(writer, Token::Stdin(key), Closing::Half)?);
        }
        let (place, token) = match which {
            Stream::Stdout => (&mut self.stdout, Token::Stdout(key)),
            Stream::Stderr => (&mut self.stderr, Token::Stderr(key)),
        };
        *place = Some(Output::new(socket, token, None)?);
        Ok(())
    }

    /// Takes a connection that carries the input of a process in a guest.
    pub(crate) fn plug_input(&mut self, key: u64, socket: OwnedFd) -> io::Result<()> {
        self.stdin = Some(Input::new(socket, Token::Stdin(key), Closing::Pipe)?);
        Ok(())
    }

    pub(crate) fn outputs(&mut self) -> impl Iterator<Item = &mut Output> {
        [&mut self.stdout, &mut self.stderr].into_iter().flatten()
    }

    /// All output has been read to its end.
    pub(crate) fn drained(&self) -> bool {
        self.stdout.is_none() && self.stderr.is_none()
    }

    /// Sets the terminal's size, when it is one.
    pub(crate) fn resize(&self, columns: u32, rows: u32) {
        if let Some(Output { descriptor, slave: Some(_), .. }) = &self.stdout {
            let size = |value: u32| u16::try_from(value).unwrap_or(u16::MAX);
            let winsize = Winsize { ws_col: size(columns), ws_row: size(rows), ws_xpixel: 0, ws_ypixel: 0 };
            let _ = tcsetwinsize(descriptor, winsize);
        }
    }

    /// Closes everything.
    pub(crate) fn close(&mut self, poller: &Poller) {
        for output in [self.stdout.take(), self.stderr.take()].into_iter().flatten() {
            output.close(poller);
        }
        if let Some(input) = self.stdin.take() {
            input.close(poller);
        }
        self.console = None;
    }
}

/// What a read gave.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Chunk {
    Data(usize),
    /// Nothing just now.
    Blocked,
    /// Nothing ever more.
    End,
}

/// The reading end of stdout, stderr, or a terminal.
#[derive(Debug)]
pub(crate) struct Output {
    descriptor: OwnedFd,
    watch: Watch,
    /// For a terminal: its other side.
    slave: Option<OwnedFd>,
    until: Until,
    /// Something has come since that was asked last.
    progressed: bool,
    /// Whether it has become a pipe with room for a flood, once that was wanted.
    roomy: Option<bool>,
}

/// What is read of an output.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Until {
    /// Everything.
    End,
    /// The process has ended: this many bytes more, and no waiting for any.
    Present(usize),
    /// The process has ended in a guest, and what it wrote is on its way: until its end comes, but no more than this many bytes.
    Arrival(usize),
}

impl Output {
    fn new(descriptor: OwnedFd, token: Token, slave: Option<OwnedFd>) -> io::Result<Self> {
        set_nonblocking(&descriptor)?;
        Ok(Self {
            descriptor,
            watch: Watch::new(token),
            slave,
            until: Until::End,
            progressed: false,
            roomy: None,
        })
    }

    pub(crate) fn read(&mut self, into: &mut [u8]) -> Chunk {
        let room = match self.until {
            Until::End => into.len(),
            Until::Present(rest) | Until::Arrival(rest) => rest.min(into.len()),
        };
        if room == 0 {
            return Chunk::End;
        }
        match rustix::io::read(&self.descriptor, &mut into[..room]) {
            Ok(0) => Chunk::End,
            Ok(count) => {
                if let Until::Present(rest) | Until::Arrival(rest) = &mut self.until {
                    *rest -= count;
                }
                self.progressed = true;
                Chunk::Data(count)
            }
            Err(Errno::AGAIN | Errno::INTR) if matches!(self.until, Until::Present(_)) => Chunk::End,
            Err(Errno::AGAIN | Errno::INTR) => Chunk::Blocked,
            // The terminal was hung up (vhangup(2), or its session's leader ended) and may be opened again: until
            // the process has ended, that is no end.
            Err(Errno::IO) if self.slave.is_some() => {
                let flags = OpenptFlags::RDWR | OpenptFlags::NOCTTY | OpenptFlags::CLOEXEC;
                match ioctl_tiocgptpeer(&self.descriptor, flags) {
                    Ok(slave) => {
                        self.slave = Some(slave);
                        Chunk::Blocked
                    }
                    Err(_) => Chunk::End,
                }
            }
            Err(_) => Chunk::End,
        }
    }

    /// The process has ended: a terminal reports its end when nobody else has it open.
    pub(crate) fn give_up_slave(&mut self) {
        self.slave = None;
    }

    pub(crate) fn is_terminal(&self) -> bool {
        self.slave.is_some()
    }

    /// From now on only what is there already counts: others may hold the other end for ever.
    pub(crate) fn limit_to_present(&mut self) {
        let present = ioctl_fionread(&self.descriptor).unwrap_or(0);
        self.until = Until::Present(usize::try_from(present).unwrap_or(usize::MAX));
    }

    /// The process has ended in a guest.
    pub(crate) fn expect_arrival(&mut self) {
        self.until = Until::Arrival(ON_ITS_WAY);
        self.progressed = false;
    }

    /// More of what a process in a guest wrote has come since this was asked last, or could have, had it not been `held_back`.
    pub(crate) fn still_arrives(&mut self, held_back: bool) -> bool {
        let progressed = std::mem::take(&mut self.progressed);
        matches!(self.until, Until::Arrival(_)) && (progressed || held_back)
    }

    /// Makes room for what comes while nobody reads. `false`: there is none, as in a terminal or a connection.
    pub(crate) fn make_room(&mut self) -> bool {
        *self.roomy.get_or_insert_with(|| fcntl_setpipe_size(&self.descriptor, pace::ROOM).is_ok())
    }

    /// Watches for output, or not. Not watched it reports nothing at all, also no hang-up, which would be reported
    /// again and again.
    pub(crate) fn watch(&mut self, poller: &Poller, on: bool) {
        let _ = self.watch.set(poller, &self.descriptor, on.then_some(Interest::READ));
    }

    pub(crate) fn close(mut self, poller: &Poller) {
        self.watch(poller, false);
    }
}

/// The writing end of stdin, or a terminal.
#[derive(Debug)]
pub(crate) struct Input {
    descriptor: OwnedFd,
    watch: Watch,
    closing: Closing,
    waiting: Vec<u8>,
    ending: bool,
}

/// How an input is ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Closing {
    /// By closing it.
    Pipe,
    /// By the terminal's character for it.
    Terminal,
    /// By closing this direction of a connection that carries both.
    Half,
}

impl Input {
    fn new(descriptor: OwnedFd, token: Token, closing: Closing) -> io::Result<Self> {
        set_nonblocking(&descriptor)?;
        Ok(Self { descriptor, watch: Watch::new(token), closing, waiting: Vec::new(), ending: false })
    }

    /// Writes, now or when the process takes it.
    pub(crate) fn push(&mut self, bytes: &[u8]) {
        if !self.ending {
            self.waiting.extend_from_slice(bytes);
        }
    }

    /// The input ends after what was pushed.
    pub(crate) fn finish(&mut self) {
        if self.ending {
            return;
        }
        self.ending = true;
        // A terminal cannot be half-closed; a program that reads whole lines from it sees the end by this character.
        if self.closing == Closing::Terminal
            && let Ok(settings) = tcgetattr(&self.descriptor)
            && settings.local_modes.contains(LocalModes::ICANON)
        {
            self.waiting.push(settings.special_codes[SpecialCodeIndex::VEOF]);
        }
    }

    /// Too much waits: the senders must wait too.
    pub(crate) fn is_full(&self) -> bool {
        self.waiting.len() >= INPUT_LIMIT
    }

    /// Writes what waits. `false`: the input is over and can be closed.
    pub(crate) fn flush(&mut self, poller: &Poller) -> bool {
        let mut written = 0;
        let mut alive = true;
        while written < self.waiting.len() {
            match rustix::io::write(&self.descriptor, &self.waiting[written..]) {
                Ok(count) => written += count,
                Err(Errno::INTR) => {}
                Err(Errno::AGAIN) => break,
                // The process has closed its input or is gone.
                Err(_) => {
                    alive = false;
                    break;
                }
            }
        }
        self.waiting.drain(..written);
        if self.waiting.is_empty() {
            self.waiting = Vec::new();
        }
        alive &= !(self.ending && self.waiting.is_empty());
        let wanted = (alive && !self.waiting.is_empty()).then_some(Interest::WRITE);
        let _ = self.watch.set(poller, &self.descriptor, wanted);
        alive
    }

    pub(crate) fn close(mut self, poller: &Poller) {
        let _ = self.watch.set(poller, &self.descriptor, None);
        if self.closing == Closing::Half {
            let _ = shutdown(&self.descriptor, Shutdown::Write);
        }
    }
}

pub(crate) fn set_nonblocking(descriptor: impl AsFd) -> io::Result<()> {
    let flags = rustix::fs::fcntl_getfl(&descriptor)?;
    Ok(rustix::fs::fcntl_setfl(&descriptor, flags | OFlags::NONBLOCK)?)
}
