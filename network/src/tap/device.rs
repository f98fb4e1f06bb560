//! The tap itself. Devices of this kind are made by the ioctls of /dev/net/tun alone (Documentation/networking/tuntap.rst); rtnetlink
//! refuses to.
#![allow(unsafe_code)]

use std::fs::{self, File};
use std::io;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd};

use rtnetlink::LinkUnspec;
use rtnetlink::packet_route::RouteNetlinkMessage;

use super::TapError;
use crate::netlink::{Batch, Client};

const DEVICE: &str = "/dev/net/tun";

/// `struct ifreq` as TUNSETIFF reads it.
#[repr(C)]
struct Request {
    name: [u8; libc::IFNAMSIZ],
    flags: libc::c_short,
    rest: [u8; 22],
}

fn ioctl(tun: BorrowedFd<'_>, code: libc::c_ulong, argument: libc::c_ulong) -> io::Result<()> {
    // SAFETY: the callers below pass codes with the argument each takes: an integer, or the address of a `Request` that outlives the
    // call and has the size of `struct ifreq` (40 bytes).
    if unsafe { libc::ioctl(tun.as_raw_fd(), code, argument) } < 0 {
        Err(io::Error::last_os_error())
    } else {
        Ok(())
    }
}

/// Makes the tap, or takes the one there is (the pod's virtual machine may have it open); gives its index.
pub(super) fn make(client: &Client, name: &str, mtu: u32, owner: u32) -> Result<u32, TapError> {
    if client.index(name).is_err() {
        create(name, owner)?;
    }
    let index = client.index(name)?;
    // The namespace's stack has no business on it: no address of its own, so no router solicitations, no reports of groups.
    match fs::write(format!("/proc/sys/net/ipv6/conf/{name}/disable_ipv6"), "1") {
        Err(error) if error.kind() != io::ErrorKind::NotFound => {
            return Err(TapError::Device {
                name: name.to_owned(),
                step: "turn IPv6 off on it",
                source: error,
            });
        }
        _ => {}
    }
    let mut batch = Batch::default();
    let up = LinkUnspec::new_with_index(index).mtu(mtu).up().build();
    batch.route(format!("bringing tap {name} up"), RouteNetlinkMessage::SetLink(up), 0);
    client.run(&batch)?;
    Ok(index)
}

/// It is persistent from the last step on: before that it goes with the descriptor.
fn create(name: &str, owner: u32) -> Result<(), TapError> {
    let failed = |step| move |source| TapError::Device { name: name.to_owned(), step, source };
    let tun = File::options().read(true).write(true).open(DEVICE).map_err(failed("open /dev/net/tun"))?;
    let mut request = Request { name: [0; libc::IFNAMSIZ], flags: 0, rest: [0; 22] };
    // Shorter by its zero byte: it is made of `tap` and an index.
    for (to, from) in request.name.iter_mut().take(libc::IFNAMSIZ - 1).zip(name.bytes()) {
        *to = from;
    }
    let flags = libc::IFF_TAP | libc::IFF_NO_PI | libc::IFF_VNET_HDR | libc::IFF_TUN_EXCL;
    request.flags = i16::from_ne_bytes(u16::try_from(flags).unwrap_or_default().to_ne_bytes());
    ioctl(tun.as_fd(), libc::TUNSETIFF, (&raw mut request) as libc::c_ulong).map_err(failed("TUNSETIFF"))?;
    ioctl(tun.as_fd(), libc::TUNSETOWNER, owner.into()).map_err(failed("give it to its owner"))?;
    ioctl(tun.as_fd(), libc::TUNSETPERSIST, 1).map_err(failed("make it persistent"))
}
