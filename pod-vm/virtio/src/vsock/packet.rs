//! The header before every packet: `struct virtio_vsock_hdr`, virtio 1.3, section 5.10.6.

/// Bytes that a header takes in the guest's memory.
pub const HEADER_LENGTH: usize = 44;
/// The most that a packet carries (`VIRTIO_VSOCK_MAX_PKT_BUF_SIZE` in Linux).
pub(crate) const MAX_PAYLOAD: usize = 64 * 1024;
/// `VIRTIO_VSOCK_TYPE_STREAM`
pub(crate) const TYPE_STREAM: u16 = 1;
/// `VIRTIO_VSOCK_SHUTDOWN_F_RECEIVE`: its sender takes no more.
pub(crate) const SHUTDOWN_RECEIVE: u32 = 1;
/// `VIRTIO_VSOCK_SHUTDOWN_F_SEND`: its sender sends no more.
pub(crate) const SHUTDOWN_SEND: u32 = 2;

/// What a packet is for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[repr(u16)]
pub enum Operation {
    /// Asks for a connection.
    Request = 1,
    /// Grants it.
    Response = 2,
    /// Ends it, or refuses it.
    Reset = 3,
    /// Ends one of its directions, or both.
    Shutdown = 4,
    /// Carries bytes.
    Data = 5,
    /// Tells how much the sender can take.
    CreditUpdate = 6,
    /// Asks for such a packet.
    CreditRequest = 7,
}

impl Operation {
    /// The operation that a number in a header stands for.
    pub fn from_number(number: u16) -> Option<Self> {
        use Operation::{CreditRequest, CreditUpdate, Data, Request, Reset, Response, Shutdown};
        [Request, Response, Reset, Shutdown, Data, CreditUpdate, CreditRequest]
            .into_iter()
            .find(|operation| *operation as u16 == number)
    }
}

/// A header; numbers are as the sender wrote them and not yet believed.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Header {
    /// Who sends.
    pub source_cid: u64,
    /// Who is meant.
    pub destination_cid: u64,
    /// The sender's port.
    pub source_port: u32,
    /// The other's port.
    pub destination_port: u32,
    /// Bytes that follow the header.
    pub length: u32,
    /// Stream or something else.
    pub kind: u16,
    /// A number of [`Operation`].
    pub operation: u16,
    /// Of a shutdown: which directions.
    pub flags: u32,
    /// Bytes that the sender can buffer for this connection in all.
    pub buffer: u32,
    /// Bytes of this connection that the sender has passed on, modulo 2^32.
    pub forwarded: u32,
}

impl Header {
    /// Reads one out of the bytes that the guest wrote.
    pub fn decode(bytes: &[u8; HEADER_LENGTH]) -> Self {
        let mut rest = &bytes[..];
        Self {
            source_cid: u64::from_le_bytes(take(&mut rest)),
            destination_cid: u64::from_le_bytes(take(&mut rest)),
            source_port: u32::from_le_bytes(take(&mut rest)),
            destination_port: u32::from_le_bytes(take(&mut rest)),
            length: u32::from_le_bytes(take(&mut rest)),
            kind: u16::from_le_bytes(take(&mut rest)),
            operation: u16::from_le_bytes(take(&mut rest)),
            flags: u32::from_le_bytes(take(&mut rest)),
            buffer: u32::from_le_bytes(take(&mut rest)),
            forwarded: u32::from_le_bytes(take(&mut rest)),
        }
    }

    /// The bytes that the guest reads.
    pub fn encode(&self) -> [u8; HEADER_LENGTH] {
        let mut bytes = [0; HEADER_LENGTH];
        bytes[0..8].copy_from_slice(&self.source_cid.to_le_bytes());
        bytes[8..16].copy_from_slice(&self.destination_cid.to_le_bytes());
        bytes[16..20].copy_from_slice(&self.source_port.to_le_bytes());
        bytes[20..24].copy_from_slice(&self.destination_port.to_le_bytes());
        bytes[24..28].copy_from_slice(&self.length.to_le_bytes());
        bytes[28..30].copy_from_slice(&self.kind.to_le_bytes());
        bytes[30..32].copy_from_slice(&self.operation.to_le_bytes());
        bytes[32..36].copy_from_slice(&self.flags.to_le_bytes());
        bytes[36..40].copy_from_slice(&self.buffer.to_le_bytes());
        bytes[40..44].copy_from_slice(&self.forwarded.to_le_bytes());
        bytes
    }

    /// The packet that ends whatever this one belongs to.
    pub(crate) fn reset(&self) -> Self {
        Self {
            source_cid: self.destination_cid,
            destination_cid: self.source_cid,
            source_port: self.destination_port,
            destination_port: self.source_port,
            kind: self.kind,
            operation: Operation::Reset as u16,
            ..Self::default()
        }
    }
}

/// The next bytes of a header, which is as long as all of its fields.
fn take<const N: usize>(rest: &mut &[u8]) -> [u8; N] {
    let (first, others) = rest.split_first_chunk().unwrap_or((&[0; N], &[]));
    *rest = others;
    *first
}
