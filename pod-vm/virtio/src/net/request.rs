//! What a packet is preceded by, and what a guest can be given.

use virtio_bindings::bindings::virtio_net::{
    VIRTIO_NET_F_GUEST_CSUM, VIRTIO_NET_F_GUEST_ECN, VIRTIO_NET_F_GUEST_TSO4, VIRTIO_NET_F_GUEST_TSO6,
};

/// Bytes of `struct virtio_net_hdr_v1`.
pub const HEADER: usize = 12;
/// Where the number of buffers stands in it.
pub(super) const BUFFERS: usize = 10;
/// The largest packet: what the kernel puts together of segments, and headers.
pub(super) const PACKET: usize = (64 << 10) + 4096;

/// What the guest takes over from the host, as the tap is told (TUNSETOFFLOAD, linux/if_tun.h).
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Offloads(pub u32);

impl Offloads {
    /// From the features that the guest's driver accepts.
    pub(super) fn from_features(features: u64) -> Self {
        // TUN_F_CSUM, TUN_F_TSO4, TUN_F_TSO6, TUN_F_TSO_ECN.
        let flags = [
            (VIRTIO_NET_F_GUEST_CSUM, 1),
            (VIRTIO_NET_F_GUEST_TSO4, 2),
            (VIRTIO_NET_F_GUEST_TSO6, 4),
            (VIRTIO_NET_F_GUEST_ECN, 8),
        ];
        let set = flags.into_iter().filter(|(bit, _)| features & 1 << bit != 0);
        let flags = set.map(|(_, flag)| flag).sum();
        // The others mean nothing without checksums.
        Self(if flags & 1 == 0 { 0 } else { flags })
    }
}
