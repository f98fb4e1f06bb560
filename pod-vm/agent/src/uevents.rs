//! News of devices from the kernel (lib/kobject_uevent.c): a device that appears gets its driver.

use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};

use rustix::net::netlink::{KOBJECT_UEVENT, SocketAddrNetlink};
use rustix::net::{
    AddressFamily, RecvFlags, SocketAddrAny, SocketFlags, SocketType, bind, recvfrom, socket_with,
};

use crate::modules;

/// Longest message: UEVENT_BUFFER_SIZE of linux/kobject.h, and the header.
const LONGEST: usize = 4096;

/// The kernel's multicast group; udev's is another.
const KERNEL: u32 = 1;

/// A socket that hears of every device.
#[derive(Debug)]
pub(crate) struct Uevents(OwnedFd);

impl Uevents {
    pub(crate) fn open() -> io::Result<Self> {
        let flags = SocketFlags::CLOEXEC | SocketFlags::NONBLOCK;
        let socket = socket_with(AddressFamily::NETLINK, SocketType::DGRAM, flags, Some(KOBJECT_UEVENT))?;
        bind(&socket, &SocketAddrNetlink::new(0, KERNEL))?;
        Ok(Self(socket))
    }

    pub(crate) fn descriptor(&self) -> BorrowedFd<'_> {
        self.0.as_fd()
    }

    /// Loads the drivers of the devices that have appeared.
    pub(crate) fn read(&self) {
        let mut bytes = [0; LONGEST];
        loop {
            match recvfrom(&self.0, &mut bytes, RecvFlags::empty()) {
                Ok((received, _, from)) if from.as_ref().is_some_and(is_kernel) => {
                    let message = bytes.get(..received).unwrap_or_default();
                    if let Some(alias) = added(message) {
                        modules::demand_quietly(alias);
                    }
                }
                Ok(_) | Err(rustix::io::Errno::INTR) => {}
                // More came than the socket holds.
                Err(rustix::io::Errno::NOBUFS) => modules::demand_by_devices(),
                Err(_) => return,
            }
        }
    }
}

/// A container with a network of its own could send such a message too.
fn is_kernel(address: &SocketAddrAny) -> bool {
    SocketAddrNetlink::try_from(address.clone()).is_ok_and(|address| address.pid() == 0)
}

/// The alias of the driver that a device which was added asks for.
fn added(message: &[u8]) -> Option<&str> {
    let text = std::str::from_utf8(message).ok()?;
    let mut alias = None;
    let mut is_new = false;
    for field in text.split('\0') {
        is_new |= field == "ACTION=add";
        alias = field.strip_prefix("MODALIAS=").or(alias);
    }
    alias.filter(|_| is_new)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn devices_that_are_added_name_their_driver() {
        let message = |action: &str| {
            format!(
                "{action}@/devices/x/virtio3\0ACTION={action}\0SUBSYSTEM=virtio\0MODALIAS=virtio:d5v1AF4\0SEQNUM=9\0"
            )
        };
        assert_eq!(added(message("add").as_bytes()), Some("virtio:d5v1AF4"));
        assert_eq!(added(message("remove").as_bytes()), None);
        assert_eq!(added(b"add@/devices/x\0ACTION=add\0SUBSYSTEM=net\0"), None);
        assert_eq!(added(&[0xff; 10]), None);
    }
}
