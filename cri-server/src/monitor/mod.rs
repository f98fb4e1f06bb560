//! The daemon's side of the monitors: [`Connection`] speaks the protocol, [`Pool`] keeps monitors ready so that a
//! pod's start waits for no process start, [`process`] tells whether one still lives.

pub(crate) mod connection;
pub(crate) mod pool;
pub(crate) mod process;
pub(crate) mod stream;

pub(crate) use connection::{Connection, MonitorError, Notice};
