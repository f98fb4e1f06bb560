//! podvisor's own network: a bridge, addresses from a range, rules for what leaves the node and for host ports.
//!
//! | module | idea |
//! |---|---|
//! | [`range`] | ranges and their arithmetic |
//! | [`lease`] | which sandbox has which address |
//! | [`port`] | which sandbox has which host port |
//! | [`link`] | the bridge and the pods' interfaces |
//! | [`ruleset`], [`element`], [`conntrack`] | nftables: the table, elements of its maps, flows to forget |
//!
//! What the kernel holds for a sandbox is always recorded in a file before and until after, so [`Builtin::disconnect`] needs
//! nothing but the sandbox's id. Everything here blocks (a setup about a millisecond) and runs in tokio's blocking threads.
//! Lock order: `rules` (held while nftables changes, which takes milliseconds), then `state` (held for files). Neither is held
//! while links are made or removed, and a sandbox without host ports needs only the second.

mod conntrack;
mod element;
mod lease;
mod link;
mod port;
mod range;
mod ruleset;

use std::collections::HashSet;
use std::fs;
use std::io;
use std::net::IpAddr;
use std::path::{Path, PathBuf};
use std::sync::{Mutex, MutexGuard, PoisonError};

pub use self::port::PortError;
use self::range::Range;
pub use self::range::RangeError;
use crate::namespace::{self, NamespaceError};
use crate::netlink::{Client, Refusal};
use crate::{BuiltinOptions, Sandbox};

/// Why the built-in network did not do what was asked.
#[derive(Debug, thiserror::Error)]
#[allow(missing_docs)] // the messages say it
pub enum BuiltinError {
    #[error("bridge name {name:?} is not 1 to 15 letters, digits, `_`, `-` or dots")]
    BridgeName { name: String },
    #[error("sandbox id {id:?} cannot be a file name")]
    Id { id: String },
    #[error(transparent)]
    Range(#[from] RangeError),
    #[error("reading {}", .path.display())]
    Read { path: PathBuf, source: io::Error },
    #[error("writing {}", .path.display())]
    Write { path: PathBuf, source: io::Error },
    #[error("removing {}", .path.display())]
    Remove { path: PathBuf, source: io::Error },
    #[error("no range for pods: none is configured and kubelet has not sent a PodCIDR")]
    NoRange,
    #[error("all addresses of {range} are in use")]
    Exhausted { range: String },
    #[error(transparent)]
    Port(#[from] PortError),
    #[error("sandbox {id} is connected already")]
    Connected { id: String },
    #[error("sandbox {id} is not connected")]
    NotConnected { id: String },
    #[error("{what}")]
    Kernel { what: String, source: io::Error },
    #[error("writing the nftables rules with nft")]
    Rules { source: io::Error },
    #[error(transparent)]
    Namespace(#[from] NamespaceError),
}

impl From<Refusal> for BuiltinError {
    fn from(refusal: Refusal) -> Self {
        Self::Kernel { what: refusal.to_string(), source: refusal.source }
    }
}

/// The built-in network.
#[derive(Debug)]
pub(crate) struct Builtin {
    bridge: String,
    state_dir: PathBuf,
    /// The rules in the kernel are what `state.ports` says, as long as this is not held.
    rules: Mutex<()>,
    state: Mutex<State>,
}

#[derive(Debug)]
struct State {
    /// For new pods, the primary family first.
    ranges: Vec<Range>,
    /// `ranges` and those that older pods are in.
    in_effect: Vec<Range>,
    leases: lease::Leases,
    ports: port::Ports,
}

impl State {
    fn write_rules(&self, bridge: &str) -> Result<(), BuiltinError> {
        let forwards: Vec<_> = self.ports.all().collect();
        ruleset::write(bridge, &self.in_effect, &forwards).map_err(|source| BuiltinError::Rules { source })
    }
}

fn well_formed(name: &str, limit: usize) -> bool {
    (1..=limit).contains(&name.len())
        && name.starts_with(|first: char| first.is_ascii_alphanumeric())
        && name.bytes().all(|byte| byte.is_ascii_alphanumeric() || b"_-.".contains(&byte))
}

impl Builtin {
    /// Reads what is recorded; the kernel is not asked. Enough for [`Builtin::disconnect`] and [`Builtin::retain`].
    pub(crate) fn load(options: &BuiltinOptions) -> Result<Self, BuiltinError> {
        let BuiltinOptions { bridge, subnets, state_dir } = options;
        if !well_formed(bridge, 15) {
            return Err(BuiltinError::BridgeName { name: bridge.clone() });
        }
        let mut ranges = subnets
            .iter()
            .map(|(network, length)| Range::new(*network, *length))
            .collect::<Result<Vec<_>, _>>()?;
        Range::check_families(&ranges)?;
        // kubelet sends its PodCIDR when it learns it, not again when this daemon starts anew.
        let path = pod_cidr_file(state_dir);
        match fs::read_to_string(&path) {
            Ok(text) => match Range::parse_list(&text) {
                Ok(sent) => ranges = sent,
                Err(error) => tracing::warn!(path = %path.display(), %error, "recorded PodCIDR ignored"),
            },
            Err(error) if error.kind() == io::ErrorKind::NotFound => {}
            Err(source) => return Err(BuiltinError::Read { path, source }),
        }
        let leases = lease::Leases::open(state_dir.join("leases"))?;
        let ports = port::Ports::open(state_dir.join("ports"))?;
        let state = State { ranges, in_effect: Vec::new(), leases, ports };
        Ok(Self {
            bridge: bridge.clone(),
            state_dir: state_dir.clone(),
            rules: Mutex::new(()),
            state: Mutex::new(state),
        })
    }

    /// Makes or completes what all pods share: bridge, gateways, forwarding, rules.
    pub(crate) fn prepare(&self) -> Result<(), BuiltinError> {
        let _rules = self.rules();
        let mut state = self.state();
        let ranges = state.ranges.clone();
        self.put_in_effect(&mut state, ranges)
    }

    fn put_in_effect(&self, state: &mut State, mut ranges: Vec<Range>) -> Result<(), BuiltinError> {
        if !link::has_ipv6() && ranges.iter().any(|range| !range.is_ipv4()) {
            tracing::info!("the node has no IPv6: pods get IPv4 addresses only");
            ranges.retain(|range| range.is_ipv4());
        }
        let used = |range: Range| state.leases.holders().any(|(address, _)| range.contains(address));
        state.in_effect = link::prepare(&self.bridge, &ranges, used)?;
        state.write_rules(&self.bridge)?;
        state.ranges = ranges;
        Ok(())
    }

    /// Why no pod can be connected.
    pub(crate) fn ready(&self) -> Result<(), BuiltinError> {
        if self.state().ranges.is_empty() { Err(BuiltinError::NoRange) } else { Ok(()) }
    }

    /// Whether bridge and rules are there. `nft flush ruleset`, which reloading a firewall does, takes the rules of all.
    pub(crate) fn is_intact(&self) -> bool {
        let intact = || {
            Client::route()?.index(&self.bridge)?;
            element::has_table(&Client::netfilter()?)
        };
        intact().unwrap_or(false)
    }

    /// Connects a sandbox. On error nothing of it is left.
    pub(crate) fn connect(&self, sandbox: &Sandbox) -> Result<Vec<IpAddr>, BuiltinError> {
        let id = &sandbox.id;
        if !well_formed(id, 128) {
            return Err(BuiltinError::Id { id: id.clone() });
        }
        if !self.is_intact() {
            tracing::warn!(bridge = self.bridge, "bridge or rules have vanished and are made again");
            self.prepare()?;
        }
        let ranges = {
            let state = self.state();
            if !state.leases.of(id).is_empty() {
                return Err(BuiltinError::Connected { id: id.clone() });
            }
            state.ranges.clone()
        };
        if ranges.is_empty() {
            return Err(BuiltinError::NoRange);
        }
        let outcome = self.acquire(sandbox, &ranges);
        if outcome.is_err()
            && let Err(error) = self.disconnect(id).and_then(|()| Self::sweep(id))
        {
            tracing::warn!(
                sandbox = id,
                error = &error as &dyn std::error::Error,
                "roll-back of the network failed"
            );
        }
        outcome
    }

    /// Everything that [`Builtin::disconnect`] undoes.
    fn acquire(&self, sandbox: &Sandbox, ranges: &[Range]) -> Result<Vec<IpAddr>, BuiltinError> {
        let id = &sandbox.id;
        let mut addresses = Vec::with_capacity(ranges.len());
        for range in ranges {
            addresses.push((self.state().leases.take(*range, id)?, *range));
        }
        let host_end = link::host_end(id);
        let interface = link::Interface {
            bridge: &self.bridge,
            host_end: &host_end,
            netns: &sandbox.netns,
            addresses: &addresses,
        };
        let client = Client::route()?;
        interface.connect(&client)?;
        let set = namespace::enter(&sandbox.netns, || interface.configure())??;
        // The bridge too: without ports it was not connected.
        for link in [&host_end, &self.bridge] {
            link::settle(&client, link);
        }
        for (address, _) in addresses.iter().filter(|(address, _)| !set.contains(address)) {
            self.state().leases.release(*address)?;
        }
        let forwards = port::resolve(&sandbox.ports, &set)?;
        if !forwards.is_empty() {
            let _rules = self.rules();
            self.state().ports.take(id, &forwards)?;
            let client = Client::netfilter()?;
            element::add(&client, &forwards)?;
            forget_flows(&client, &forwards);
        }
        Ok(set)
    }

    /// Whether a sandbox has an address and an interface.
    pub(crate) fn check(&self, id: &str) -> Result<(), BuiltinError> {
        if self.state().leases.of(id).is_empty() {
            return Err(BuiltinError::NotConnected { id: id.to_owned() });
        }
        Client::route()?.index(&link::host_end(id))?;
        Ok(())
    }

    /// Takes back everything a sandbox has, except that its interface, which leads nowhere then, stays for [`Builtin::sweep`].
    /// Idempotent. Every step is tried; the first failure is reported.
    pub(crate) fn disconnect(&self, id: &str) -> Result<(), BuiltinError> {
        let ports = self.release_ports(id);
        // An address is free when nobody can use it any more.
        let links = link::detach(&link::host_end(id)).map_err(BuiltinError::from).and_then(|()| {
            let mut state = self.state();
            state.leases.of(id).into_iter().try_for_each(|address| state.leases.release(address))
        });
        ports.and(links)
    }

    /// Deletes the interface of a disconnected sandbox: tens of milliseconds for which nobody has to wait.
    pub(crate) fn sweep(id: &str) -> Result<(), BuiltinError> {
        Ok(link::sweep(&link::host_end(id))?)
    }

    fn release_ports(&self, id: &str) -> Result<(), BuiltinError> {
        if self.state().ports.of(id).is_empty() {
            return Ok(());
        }
        let _rules = self.rules();
        let forwards = self.state().ports.of(id).to_owned();
        let client = Client::netfilter()?;
        element::remove(&client, &forwards)?;
        forget_flows(&client, &forwards);
        self.state().ports.release(id)
    }

    /// Disconnects every sandbox but these.
    pub(crate) fn retain(&self, ids: &HashSet<&str>) -> Result<(), BuiltinError> {
        let strangers: HashSet<String> = {
            let state = self.state();
            let holders = state.leases.holders().map(|(_, id)| id).chain(state.ports.holders());
            holders.filter(|id| !ids.contains(id)).map(str::to_owned).collect()
        };
        let mut outcome = Ok(());
        for id in strangers {
            tracing::info!(sandbox = id, "network of an unknown sandbox is removed");
            outcome = outcome.and(self.disconnect(&id));
        }
        let known: HashSet<String> = ids.iter().map(|id| link::host_end(id)).collect();
        for name in link::host_ends(&self.bridge)?.into_iter().filter(|name| !known.contains(name)) {
            outcome = outcome.and(link::delete(&name).map_err(BuiltinError::from));
        }
        outcome
    }

    /// New ranges for new pods.
    pub(crate) fn set_pod_cidr(&self, cidr: &str) -> Result<(), BuiltinError> {
        let ranges = Range::parse_list(cidr)?;
        let _rules = self.rules();
        let mut state = self.state();
        if state.ranges == ranges
            && fs::read_to_string(pod_cidr_file(&self.state_dir)).is_ok_and(|old| old == cidr)
        {
            return Ok(());
        }
        self.put_in_effect(&mut state, ranges)?;
        let path = pod_cidr_file(&self.state_dir);
        fs::create_dir_all(&self.state_dir)
            .and_then(|()| fs::write(&path, cidr))
            .map_err(|source| BuiltinError::Write { path, source })
    }

    fn rules(&self) -> MutexGuard<'_, ()> {
        self.rules.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn state(&self) -> MutexGuard<'_, State> {
        // A panic elsewhere leaves at most a lease too many, which `retain` removes.
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// A kernel without connection tracking's netlink interface has worse than this; no pod fails for it.
fn forget_flows(client: &Client, forwards: &[port::Forward]) {
    if let Err(error) = conntrack::forget(client, forwards) {
        let error = &error as &dyn std::error::Error;
        tracing::warn!(error, "old UDP flows of host ports may go astray");
    }
}

fn pod_cidr_file(state_dir: &Path) -> PathBuf {
    state_dir.join("pod-cidr")
}
