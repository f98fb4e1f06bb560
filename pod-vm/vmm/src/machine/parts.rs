//! What a machine is made of: a request, and the descriptors that belong to it, in this order.

use std::fs::File;
use std::os::fd::OwnedFd;
use std::os::unix::net::{UnixListener, UnixStream};

use podvisor_proto::hypervisor::{Disk, Network, Share, Start};

/// Everything that was opened for a machine.
#[derive(Debug)]
pub(crate) struct Parts {
    pub(crate) kvm: OwnedFd,
    pub(crate) kernel: File,
    pub(crate) initramfs: File,
    pub(crate) console: OwnedFd,
    pub(crate) vsock: UnixListener,
    pub(crate) shares: Vec<(Share, UnixStream)>,
    pub(crate) disks: Vec<(Disk, File)>,
    pub(crate) networks: Vec<(Network, File)>,
}

impl Parts {
    /// As they are sent.
    pub(crate) fn into_descriptors(self) -> Vec<OwnedFd> {
        let mut all: Vec<OwnedFd> =
            vec![self.kvm, self.kernel.into(), self.initramfs.into(), self.console, self.vsock.into()];
        all.extend(self.shares.into_iter().map(|(_, socket)| OwnedFd::from(socket)));
        all.extend(self.disks.into_iter().map(|(_, file)| OwnedFd::from(file)));
        all.extend(self.networks.into_iter().map(|(_, tap)| OwnedFd::from(tap)));
        all
    }

    /// From what has come; `None`: it is not as much as the request names.
    pub(crate) fn from_descriptors(start: &Start, descriptors: Vec<OwnedFd>) -> Option<Self> {
        let mut rest = descriptors.into_iter();
        let mut next = || rest.next();
        let parts = Self {
            kvm: next()?,
            kernel: next()?.into(),
            initramfs: next()?.into(),
            console: next()?,
            vsock: next()?.into(),
            shares: start
                .shares
                .iter()
                .map(|share| Some((share.clone(), next()?.into())))
                .collect::<Option<_>>()?,
            disks: start
                .disks
                .iter()
                .map(|disk| Some((disk.clone(), next()?.into())))
                .collect::<Option<_>>()?,
            networks: start
                .networks
                .iter()
                .map(|network| Some((network.clone(), next()?.into())))
                .collect::<Option<_>>()?,
        };
        rest.next().is_none().then_some(parts)
    }
}
