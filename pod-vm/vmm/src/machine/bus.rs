//! What processors reach besides memory: the devices' registers, and a handful of ports.

use std::sync::Arc;

use podvisor_proto::hypervisor::EndReason;

use super::console::Console;
use super::ending::Ending;
use super::transport::Transport;
use crate::boot::acpi::{RESET_VALUE, SLEEP_TYPE_OFF};
use crate::layout::{PANIC, RESET_PORT, SERIAL_PORT, SLEEP_CONTROL_PORT};

/// Of the sleep control register: go to sleep, and how deep.
const SLEEP_ENABLE: u8 = 1 << 5;
const SLEEP_TYPE: u32 = 2;
/// What the panic register says that it understands, and hears: a panic (qemu/docs/specs/pvpanic.rst).
const PANICKED: u8 = 1;

/// All of it.
pub(crate) struct Bus {
    transport: Arc<dyn Transport>,
    console: Console,
    ending: Arc<Ending>,
}

impl Bus {
    pub(crate) fn new(transport: Arc<dyn Transport>, console: Console, ending: Arc<Ending>) -> Self {
        Self { transport, console, ending }
    }

    /// A processor reads where no memory is. Nobody is there: all ones, as on a wire.
    pub(crate) fn read(&self, address: u64, bytes: &mut [u8]) {
        if self.transport.read(address, bytes) {
            return;
        }
        bytes.fill(0xff);
        if address == u64::from(PANIC) {
            bytes.fill(0);
            if let Some(first) = bytes.first_mut() {
                *first = PANICKED;
            }
        }
    }

    /// A processor writes where no memory is.
    pub(crate) fn write(&self, address: u64, bytes: &[u8]) {
        if self.transport.write(address, bytes) {
            return;
        }
        if address == u64::from(PANIC) && bytes.first().is_some_and(|byte| byte & PANICKED != 0) {
            self.ending.tell(EndReason::Panic, "the guest's kernel panicked");
        }
    }

    /// A processor reads from a port.
    pub(crate) fn input(&self, port: u16, bytes: &mut [u8]) {
        bytes.fill(0xff);
        match (serial(port), bytes) {
            (Some(register), [byte]) => *byte = self.console.read(register),
            // Nothing of sleep is ever pending.
            (None, [byte]) if port == SLEEP_CONTROL_PORT || port == SLEEP_CONTROL_PORT + 1 => *byte = 0,
            _ => {}
        }
    }

    /// A processor writes to a port.
    pub(crate) fn output(&self, port: u16, bytes: &[u8]) {
        let &[byte] = bytes else { return };
        match port {
            SLEEP_CONTROL_PORT if byte & SLEEP_ENABLE != 0 && byte >> SLEEP_TYPE & 7 == SLEEP_TYPE_OFF => {
                self.ending.tell(EndReason::PowerOff, "the guest switched itself off");
            }
            RESET_PORT if byte == RESET_VALUE => {
                self.ending.tell(EndReason::Reset, "the guest wanted to begin anew");
            }
            _ => {
                if let Some(register) = serial(port) {
                    self.console.write(register, byte);
                }
            }
        }
    }
}

/// The serial port's register behind a port.
fn serial(port: u16) -> Option<u8> {
    port.checked_sub(SERIAL_PORT).filter(|register| *register < 8).and_then(|it| u8::try_from(it).ok())
}
