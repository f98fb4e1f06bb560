//! The guest's console: a serial port (16550A), which the kernel has a driver for built in and can write to from its first line on. Nobody types.
//!
//! virtio's console would come with a module, after everything that a console is needed for.

use std::io::{self, Write};
use std::os::fd::OwnedFd;
use std::sync::{Arc, Mutex, PoisonError};

use rustix::net::{SendFlags, send};
use vm_superio::serial::NoEvents;
use vm_superio::{Serial, Trigger};
use vmm_sys_util::eventfd::EventFd;

/// Bytes that are sent at once, if no line ends before.
const AT_ONCE: usize = 256;

/// The interrupt.
#[derive(Debug)]
struct Interrupt(EventFd);

impl Trigger for Interrupt {
    type E = io::Error;

    fn trigger(&self) -> io::Result<()> {
        self.0.write(1)
    }
}

/// What was written and not sent yet.
#[derive(Debug)]
struct Output {
    socket: OwnedFd,
    line: Vec<u8>,
}

impl Output {
    fn send(&mut self) {
        let mut rest = self.line.as_slice();
        while !rest.is_empty() {
            match send(&self.socket, rest, SendFlags::NOSIGNAL) {
                Ok(count) => rest = rest.get(count..).unwrap_or_default(),
                Err(rustix::io::Errno::INTR) => {}
                // Who reads it has gone.
                Err(_) => break,
            }
        }
        self.line.clear();
    }
}

impl Write for Output {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        self.line.extend_from_slice(bytes);
        if bytes.contains(&b'\n') || self.line.len() >= AT_ONCE {
            self.send();
        }
        Ok(bytes.len())
    }

    /// The port asks for it after each byte.
    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

/// The port, for all processors.
#[derive(Debug, Clone)]
pub(crate) struct Console(Arc<Mutex<Serial<Interrupt, NoEvents, Output>>>);

impl Console {
    /// Writes to `socket`, and interrupts by `interrupt`.
    pub(crate) fn new(socket: OwnedFd, interrupt: EventFd) -> Self {
        let output = Output { socket, line: Vec::new() };
        Self(Arc::new(Mutex::new(Serial::new(Interrupt(interrupt), output))))
    }

    pub(crate) fn read(&self, register: u8) -> u8 {
        self.0.lock().unwrap_or_else(PoisonError::into_inner).read(register)
    }

    pub(crate) fn write(&self, register: u8, byte: u8) {
        // An interrupt that cannot be raised is raised already.
        let _ = self.0.lock().unwrap_or_else(PoisonError::into_inner).write(register, byte);
    }

    /// Sends the line that has no end yet.
    pub(crate) fn flush(&self) {
        self.0.lock().unwrap_or_else(PoisonError::into_inner).writer_mut().send();
    }
}

#[cfg(test)]
mod tests {
    use std::io::Read;
    use std::os::unix::net::UnixStream;

    use super::*;

    #[test]
    fn lines_are_sent_as_they_end() {
        let (mut host, guest) = UnixStream::pair().unwrap();
        let console = Console::new(guest.into(), EventFd::new(0).unwrap());
        for byte in b"one\ntwo" {
            // The transmitter is always empty.
            assert_eq!(console.read(5) & 0x60, 0x60);
            console.write(0, *byte);
        }
        let mut line = [0; 16];
        assert_eq!(host.read(&mut line).unwrap(), 4);
        console.flush();
        assert_eq!(host.read(&mut line).unwrap(), 3);
        for _ in 0..AT_ONCE {
            console.write(0, b'x');
        }
        let mut long = [0; 2 * AT_ONCE];
        assert_eq!(host.read(&mut long).unwrap(), AT_ONCE);
        drop(host);
        console.write(0, b'\n');
    }
}
