//! Taps: how a virtual machine takes part in the network that was made for its pod.
//!
//! A CNI plugin, or [`crate::builtin`], has put interfaces into the pod's network namespace. [`join`] makes a tap for each Ethernet
//! among them, which the virtual machine monitor opens, and joins the two with tc: what comes in at the one goes out at the other. The guest's
//! interface takes the hardware address, addresses and routes of the interface in the namespace, so it *is* the pod to everybody
//! outside, and every plugin, policy and host port works as for any pod.
//!
//! ```text
//! node ── veth ──▶ eth0 ── ingress: redirect ──▶ tap2 ──▶ guest
//!                  eth0 ◀── redirect: ingress ── tap2 ◀── guest
//!                  eth0 ── egress: only from tap2
//! ```
//!
//! The namespace's own stack keeps its addresses, because CNI's CHECK looks at them, and hears and says nothing: what comes in is
//! redirected before the stack sees it, what it sends is dropped. So nothing is answered twice.
//!
//! Everything is part of the namespace and goes with it. [`join`] can be repeated.

mod device;
mod guest;
mod redirect;

use std::io;
use std::path::Path;

pub use self::guest::{GuestInterface, GuestNeighbour, GuestRoute, Prefix};
use crate::NetworkError;
use crate::namespace::{self, NamespaceError};
use crate::netlink::{Client, Refusal};

/// Why a namespace's interfaces could not be joined with taps.
#[derive(Debug, thiserror::Error)]
#[allow(missing_docs)] // the messages say it
pub enum TapError {
    #[error("entering the pod's network namespace")]
    Enter(#[source] NamespaceError),
    #[error("{what}")]
    Netlink { what: String, source: io::Error },
    #[error("interface {name} of the pod is no Ethernet, which is all that a virtual machine can be given")]
    NotEthernet { name: String },
    #[error("making tap {name}: {step}")]
    Device { name: String, step: &'static str, source: io::Error },
}

impl From<Refusal> for TapError {
    fn from(refusal: Refusal) -> Self {
        Self::Netlink { what: refusal.to_string(), source: refusal.source }
    }
}

/// Joins every interface of a pod's network namespace, but the loopback and those that are down, with a tap that the user `owner` may open
/// without any capability (with IFF_TAP, IFF_NO_PI, IFF_VNET_HDR; one queue). Returns what the guest needs to know of each.
/// Blocking, a few milliseconds.
pub fn join(netns: &Path, owner: u32) -> Result<Vec<GuestInterface>, NetworkError> {
    let joined = namespace::enter(netns, || join_here(owner)).map_err(TapError::Enter)?;
    Ok(joined?)
}

fn join_here(owner: u32) -> Result<Vec<GuestInterface>, TapError> {
    let client = Client::route()?;
    let interfaces = guest::interfaces(&client)?;
    for found in &interfaces {
        let tap = device::make(&client, &found.interface.tap, found.interface.mtu, owner)?;
        redirect::join(&client, (&found.interface.name, found.index), (&found.interface.tap, tap))?;
    }
    Ok(interfaces.into_iter().map(|found| found.interface).collect())
}
