//! A pod's tap, opened in the pod's network namespace.
//!
//! A tap belongs to the namespace that it was made in; the descriptor works anywhere. A thread enters the namespace for the moment of
//! opening and ends with it.

use std::fs::{File, OpenOptions};
use std::io;
use std::os::fd::AsFd;

use podvisor_proto::hypervisor::Network;
use rustix::thread::{LinkNameSpaceType, move_into_link_name_space};

use crate::failure::Failure;
use crate::sys;

/// Opens the tap that `network` names.
pub fn open(network: &Network) -> Result<File, Failure> {
    let attempt = || format!("open tap {} in network namespace {}", network.tap, network.namespace);
    open_in(&network.namespace, &network.tap).map_err(|error| match error.raw_os_error() {
        // TUNSETIFF makes a tap that is not there, and may not.
        Some(libc::EBUSY) => Failure::failed(attempt(), "something else has it open"),
        _ => Failure::failed(attempt(), error),
    })
}

fn open_in(namespace: &str, tap: &str) -> io::Result<File> {
    let namespace = File::open(namespace)?;
    let tap = tap.to_owned();
    let inside = move || {
        move_into_link_name_space(namespace.as_fd(), Some(LinkNameSpaceType::Network))?;
        // A name that is not there would be made, and vanish with the machine.
        sys::interface_exists(&tap)?;
        let device = OpenOptions::new().read(true).write(true).open("/dev/net/tun")?;
        sys::attach_tap(device.as_fd(), &tap)?;
        Ok(device)
    };
    let thread = std::thread::Builder::new().stack_size(64 * 1024).spawn(inside)?;
    thread.join().unwrap_or_else(|_| Err(io::Error::other("the thread in the network namespace panicked")))
}
