//! SPDY/3.1 as Kubernetes clients speak it: many streams over one upgraded connection.

mod connection;
mod decode;
mod dictionary;
mod frame;
mod header_block;
mod stream;
mod table;

pub(crate) use connection::Connection;
pub(crate) use frame::ResetStatus;
pub(crate) use stream::{Stream, StreamReceiver, StreamSender};

#[cfg(test)]
pub(crate) use decode::{Decoder, Event};
#[cfg(test)]
pub(crate) use header_block::HeaderCompressor;
