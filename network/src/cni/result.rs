//! What ADD answers (CNI specification 1.1.0, section 5): here only where the pod's addresses stand in it.

use std::net::IpAddr;

use serde::Deserialize;
use serde_json::{Map, Value};

#[derive(Deserialize)]
struct Shape {
    #[serde(default)]
    interfaces: Option<Vec<Interface>>,
    #[serde(default)]
    ips: Option<Vec<Address>>,
}

#[derive(Deserialize)]
struct Interface {
    name: String,
    #[serde(default)]
    sandbox: String,
}

#[derive(Deserialize)]
struct Address {
    /// With the length of its network.
    address: String,
    #[serde(default)]
    interface: Option<i64>,
}

/// The answer as an object, so that it can be handed to the next plugin.
pub(crate) fn parse(output: &[u8]) -> Result<Map<String, Value>, String> {
    match serde_json::from_slice(output) {
        Ok(Value::Object(result)) => Ok(result),
        Ok(_) => Err("not a JSON object".to_owned()),
        Err(error) => Err(error.to_string()),
    }
}

/// The addresses on the interface `name` inside the pod, in the order of the answer: the first is the pod's primary one.
/// An address that names no interface belongs to it too.
pub(crate) fn addresses(result: &Map<String, Value>, name: &str) -> Result<Vec<IpAddr>, String> {
    let shape = Shape::deserialize(result).map_err(|error| error.to_string())?;
    let interfaces = shape.interfaces.unwrap_or_default();
    let mut addresses = Vec::new();
    for Address { address, interface } in shape.ips.unwrap_or_default() {
        let text = address.split_once('/').map_or(address.as_str(), |(text, _)| text);
        let parsed: IpAddr = text.parse().map_err(|_| format!("{address:?} is no address"))?;
        // libcni writes -1 for "none" in results that it converted.
        let ours = match interface.filter(|index| *index >= 0) {
            None => true,
            Some(index) => {
                let found = usize::try_from(index).ok().and_then(|index| interfaces.get(index));
                let found = found.ok_or_else(|| {
                    format!("address {address} is on interface {index}, which is not there")
                })?;
                found.name == name && !found.sandbox.is_empty()
            }
        };
        if ours && !addresses.contains(&parsed) {
            addresses.push(parsed);
        }
    }
    Ok(addresses)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn found(text: &str) -> Result<Vec<String>, String> {
        let found = addresses(&parse(text.as_bytes())?, "eth0")?;
        Ok(found.iter().map(ToString::to_string).collect())
    }

    #[test]
    fn the_pod_s_addresses() {
        let text = r#"{"cniVersion":"1.0.0","interfaces":[{"name":"br0"},{"name":"veth1"},
            {"name":"eth0","sandbox":"/run/netns/x"},{"name":"eth0"}],
            "ips":[{"address":"10.9.9.1/24","interface":0},{"address":"fd00::2/64","interface":2},
            {"address":"10.0.0.2/24","interface":2,"gateway":"10.0.0.1"},{"address":"10.0.0.3/24","interface":3}]}"#;
        assert_eq!(found(text).unwrap(), ["fd00::2", "10.0.0.2"]);
        let old = r#"{"cniVersion":"0.3.1","ips":[{"version":"4","address":"10.0.0.2/24"},{"address":"10.0.0.2/24"}]}"#;
        assert_eq!(found(old).unwrap(), ["10.0.0.2"]);
        assert_eq!(found(r#"{"ips":null,"interfaces":null}"#).unwrap(), [""; 0]);
        assert_eq!(found(r#"{"ips":[{"address":"10.0.0.2/8","interface":-1}]}"#).unwrap(), ["10.0.0.2"]);
    }

    #[test]
    fn nonsense_is_named() {
        for (text, part) in [
            ("", "EOF"),
            ("[]", "not a JSON object"),
            (r#"{"ips":3}"#, "invalid type"),
            (r#"{"ips":[{"address":"x"}]}"#, "\"x\" is no address"),
            (r#"{"ips":[{"address":"10.0.0.2/8","interface":1}]}"#, "interface 1, which is not there"),
            (r#"{"ips":[{}]}"#, "missing field"),
        ] {
            assert!(found(text).unwrap_err().contains(part), "{text}: {:?}", found(text));
        }
    }
}
