//! A range of addresses that pods get theirs from.

use std::fmt;
use std::net::IpAddr;
use std::str::FromStr;

/// Why a range cannot be used.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[allow(missing_docs)] // the messages say it
pub enum RangeError {
    #[error("{text:?} is not a range: ADDRESS/LENGTH is, for example 10.88.0.0/16")]
    Syntax { text: String },
    #[error("{range} has bits set beyond its length: {network} is meant")]
    HostBits { range: String, network: String },
    #[error("{range} cannot hold pods: the length is {lowest} to {highest} for this family")]
    Length { range: String, lowest: u8, highest: u8 },
    #[error("{range} is reserved by the Internet protocols")]
    Reserved { range: String },
    #[error("{first} and {second} are of one family: at most one IPv4 and one IPv6 range")]
    SameFamily { first: String, second: String },
    #[error("no range in {text:?}")]
    None { text: String },
}

/// A network with at least one address beside the gateway's.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Range {
    network: IpAddr,
    length: u8,
}

fn bits(address: IpAddr) -> u128 {
    match address {
        IpAddr::V4(address) => u128::from(u32::from(address)),
        IpAddr::V6(address) => u128::from(address),
    }
}

impl Range {
    pub(crate) fn new(network: IpAddr, length: u8) -> Result<Self, RangeError> {
        let range = Self { network, length };
        let (lowest, highest) = if network.is_ipv4() { (8, 30) } else { (16, 126) };
        if !(lowest..=highest).contains(&length) {
            return Err(RangeError::Length { range: range.to_string(), lowest, highest });
        }
        if bits(network) & range.host_mask() != 0 {
            let network = Self { network: range.address(bits(network) & !range.host_mask()), length };
            return Err(RangeError::HostBits { range: range.to_string(), network: network.to_string() });
        }
        let reserved = match network {
            IpAddr::V4(address) => {
                address.octets()[0] == 0
                    || address.is_loopback()
                    || address.octets()[0] >= 224
                    || address.is_link_local()
            }
            IpAddr::V6(address) => {
                address.is_multicast() || address.is_unicast_link_local() || address.octets()[0] == 0
            }
        };
        if reserved {
            return Err(RangeError::Reserved { range: range.to_string() });
        }
        Ok(range)
    }

    /// Comma-separated, at most one of each family: kubelet's PodCIDR, the primary one first.
    pub(crate) fn parse_list(text: &str) -> Result<Vec<Self>, RangeError> {
        let parts = text.split(',').map(str::trim).filter(|part| !part.is_empty());
        let ranges = parts.map(str::parse).collect::<Result<Vec<Self>, _>>()?;
        if ranges.is_empty() {
            return Err(RangeError::None { text: text.to_owned() });
        }
        Self::check_families(&ranges)?;
        Ok(ranges)
    }

    pub(crate) fn check_families(ranges: &[Self]) -> Result<(), RangeError> {
        for (index, first) in ranges.iter().enumerate() {
            if let Some(second) =
                ranges[index + 1..].iter().find(|second| second.is_ipv4() == first.is_ipv4())
            {
                return Err(RangeError::SameFamily { first: first.to_string(), second: second.to_string() });
            }
        }
        Ok(())
    }

    pub(crate) fn is_ipv4(self) -> bool {
        self.network.is_ipv4()
    }

    pub(crate) fn length(self) -> u8 {
        self.length
    }

    /// The bridge's address in this range: the first after the network's.
    pub(crate) fn gateway(self) -> IpAddr {
        self.address(bits(self.network) + 1)
    }

    pub(crate) fn contains(self, address: IpAddr) -> bool {
        address.is_ipv4() == self.is_ipv4() && bits(address) & !self.host_mask() == bits(self.network)
    }

    /// The network of which `address` is the gateway in a range of `length`; `None` when it is no gateway.
    pub(crate) fn of_gateway(address: IpAddr, length: u8) -> Option<Self> {
        let network = match address {
            IpAddr::V4(address) => IpAddr::V4((u32::from(address).checked_sub(1)?).into()),
            IpAddr::V6(address) => IpAddr::V6((u128::from(address).checked_sub(1)?).into()),
        };
        Self::new(network, length).ok()
    }

    /// The address after `previous` that a pod may have, in a circle without network, gateway and broadcast addresses.
    /// Without `previous`, or when that is not of this range, the first one.
    pub(crate) fn after(self, previous: Option<IpAddr>) -> IpAddr {
        let first = bits(self.network) + 2;
        let last = (bits(self.network) | self.host_mask()) - u128::from(self.is_ipv4());
        match previous.filter(|address| self.contains(*address)).map(bits) {
            Some(previous) if previous >= first && previous < last => self.address(previous + 1),
            _ => self.address(first),
        }
    }

    fn host_mask(self) -> u128 {
        let width: u32 = if self.is_ipv4() { 32 } else { 128 };
        // The length is at least 8, so the shift is never by the type's width.
        (1_u128 << (width - u32::from(self.length).min(width)).min(127)) - 1
    }

    /// `bits` come from arithmetic inside the range, so those of an IPv4 range fit.
    fn address(self, bits: u128) -> IpAddr {
        if self.is_ipv4() {
            IpAddr::V4(u32::try_from(bits).unwrap_or(u32::MAX).into())
        } else {
            IpAddr::V6(bits.into())
        }
    }
}

impl FromStr for Range {
    type Err = RangeError;

    fn from_str(text: &str) -> Result<Self, RangeError> {
        let parse = || {
            let (address, length) = text.split_once('/')?;
            Some((address.parse().ok()?, length.parse().ok()?))
        };
        let (network, length) = parse().ok_or_else(|| RangeError::Syntax { text: text.to_owned() })?;
        Self::new(network, length)
    }
}

impl fmt::Display for Range {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(formatter, "{}/{}", self.network, self.length)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_circle_leaves_out_network_gateway_and_broadcast() {
        let range: Range = "10.0.0.0/29".parse().unwrap();
        assert_eq!(range.gateway().to_string(), "10.0.0.1");
        let mut address = None;
        let mut seen = Vec::new();
        for _ in 0..7 {
            address = Some(range.after(address));
            seen.extend(address.map(|address| address.to_string()));
        }
        assert_eq!(
            seen,
            ["10.0.0.2", "10.0.0.3", "10.0.0.4", "10.0.0.5", "10.0.0.6", "10.0.0.2", "10.0.0.3"]
        );
        assert_eq!(range.after(Some("192.168.0.1".parse().unwrap())).to_string(), "10.0.0.2");
        let six: Range = "fd00::/126".parse().unwrap();
        assert_eq!(six.after(None).to_string(), "fd00::2");
        assert_eq!(six.after(Some("fd00::2".parse().unwrap())).to_string(), "fd00::3");
        assert_eq!(six.after(Some("fd00::3".parse().unwrap())).to_string(), "fd00::2");
        let high: Range = "ffff:ffff::/64".parse::<Range>().map_err(|error| error.to_string()).unwrap_or(six);
        assert_eq!(high, six, "multicast");
    }

    #[test]
    fn what_is_refused_and_why() {
        for (text, part) in [
            ("10.0.0.0", "is not a range"),
            ("10.0.0.0/x", "is not a range"),
            ("10.0.0.0/300", "is not a range"),
            ("", "no range"),
            (" , ", "no range"),
            ("10.0.0.5/24", "10.0.0.0/24 is meant"),
            ("fd00::5/64", "fd00::/64 is meant"),
            ("10.0.0.0/31", "8 to 30"),
            ("0.0.0.0/0", "8 to 30"),
            ("fd00::/127", "16 to 126"),
            ("::/0", "16 to 126"),
            ("127.0.0.0/8", "reserved"),
            ("0.0.0.0/8", "reserved"),
            ("224.0.0.0/8", "reserved"),
            ("255.255.255.0/24", "reserved"),
            ("169.254.0.0/16", "reserved"),
            ("fe80::/64", "reserved"),
            ("::/64", "reserved"),
            ("10.0.0.0/24,10.1.0.0/24", "one family"),
            ("10.0.0.0/24,fd00::/64,fd01::/64", "one family"),
        ] {
            let error = Range::parse_list(text).unwrap_err().to_string();
            assert!(error.contains(part), "{text}: {error}");
        }
        let both = Range::parse_list(" fd00:1::/64 , 10.1.2.0/24 ").unwrap();
        assert_eq!(both.iter().map(ToString::to_string).collect::<Vec<_>>(), ["fd00:1::/64", "10.1.2.0/24"]);
    }

    #[test]
    fn a_gateway_tells_its_range() {
        let range: Range = "10.1.2.0/24".parse().unwrap();
        assert_eq!(Range::of_gateway(range.gateway(), 24), Some(range));
        assert_eq!(Range::of_gateway("10.1.2.7".parse().unwrap(), 24), None);
        assert_eq!(Range::of_gateway("0.0.0.0".parse().unwrap(), 24), None);
    }
}
