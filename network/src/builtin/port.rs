//! Host ports in use: one file for each sandbox that has some, named by its id.
//!
//! The file says where the sandbox's ports lead, so they can be removed, and put back into the rules after a restart,
//! without anybody remembering the sandbox. It is written before the kernel is told and removed after.

use std::collections::BTreeMap;
use std::fs;
use std::io;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};
use std::path::PathBuf;

use serde::{Deserialize, Serialize};

use super::BuiltinError;
use crate::{PortMapping, Protocol};

/// One port of the host, in one family.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct Forward {
    pub(crate) protocol: Protocol,
    /// The address of the host; `None`: all of `to`'s family.
    pub(crate) host_ip: Option<IpAddr>,
    pub(crate) host_port: u16,
    /// Into the pod.
    pub(crate) to: SocketAddr,
}

impl Forward {
    /// Whether one packet could match both.
    fn collides(&self, other: &Self) -> bool {
        self.protocol == other.protocol
            && self.host_port == other.host_port
            && self.to.is_ipv4() == other.to.is_ipv4()
            && (self.host_ip.is_none() || other.host_ip.is_none() || self.host_ip == other.host_ip)
    }

    fn place(&self) -> String {
        let address = self.host_ip.unwrap_or(if self.to.is_ipv4() {
            Ipv4Addr::UNSPECIFIED.into()
        } else {
            Ipv6Addr::UNSPECIFIED.into()
        });
        format!("{} {}", SocketAddr::new(address, self.host_port), self.protocol.name())
    }
}

/// Why a sandbox cannot have its host ports.
#[derive(Debug, thiserror::Error)]
#[allow(missing_docs)] // the messages say it
pub enum PortError {
    #[error("host port {place} is taken by sandbox {holder}")]
    Taken { place: String, holder: String },
    #[error("host port {place} is asked for twice, for container ports {first} and {second}")]
    Twice { place: String, first: u16, second: u16 },
    #[error("host port 0 or container port 0 is asked for ({host_port} to {container_port})")]
    Zero { host_port: u16, container_port: u16 },
    #[error("host port {host_port} is asked for on {host_ip}, but the pod has no address of that family")]
    Family { host_port: u16, host_ip: IpAddr },
    #[error("host port {host_port} is asked for on ::1, from where Linux forwards nothing")]
    Loopback { host_port: u16 },
}

/// The forwards that `mappings` mean for a pod with `addresses`.
pub(crate) fn resolve(mappings: &[PortMapping], addresses: &[IpAddr]) -> Result<Vec<Forward>, PortError> {
    let mut forwards: Vec<Forward> = Vec::new();
    for mapping in mappings {
        let PortMapping { protocol, container_port, host_port, host_ip } = *mapping;
        if host_port == 0 || container_port == 0 {
            return Err(PortError::Zero { host_port, container_port });
        }
        if host_ip == Some(Ipv6Addr::LOCALHOST.into()) {
            return Err(PortError::Loopback { host_port });
        }
        let before = forwards.len();
        for address in addresses {
            if host_ip.is_some_and(|host_ip| host_ip.is_ipv4() != address.is_ipv4()) {
                continue;
            }
            let host_ip = host_ip.filter(|host_ip| !host_ip.is_unspecified());
            let forward =
                Forward { protocol, host_ip, host_port, to: SocketAddr::new(*address, container_port) };
            match forwards.iter().position(|other| forward.collides(other)) {
                None => forwards.push(forward),
                // Two containers may name the same pair; the pod needs it once.
                Some(index) if index >= before || forwards[index] == forward => {}
                Some(index) => {
                    let (first, second) = (forwards[index].to.port(), container_port);
                    return Err(PortError::Twice { place: forward.place(), first, second });
                }
            }
        }
        let reached =
            |host_ip: IpAddr| addresses.iter().any(|address| address.is_ipv4() == host_ip.is_ipv4());
        if let Some(host_ip) = host_ip.filter(|host_ip| !reached(*host_ip)) {
            return Err(PortError::Family { host_port, host_ip });
        }
    }
    Ok(forwards)
}

/// All host ports of the built-in network.
#[derive(Debug)]
pub(crate) struct Ports {
    directory: PathBuf,
    held: BTreeMap<String, Vec<Forward>>,
}

impl Ports {
    /// Reads what earlier processes left. A file that cannot be understood is nobody's: it is removed, its ports are not in
    /// the rules that the same process is about to write.
    pub(crate) fn open(directory: PathBuf) -> Result<Self, BuiltinError> {
        let mut held = BTreeMap::new();
        let failed = |path: &PathBuf, source| BuiltinError::Read { path: path.clone(), source };
        match fs::read_dir(&directory) {
            Err(error) if error.kind() == io::ErrorKind::NotFound => {}
            Err(source) => return Err(failed(&directory, source)),
            Ok(entries) => {
                for entry in entries {
                    let path = entry.map_err(|source| failed(&directory, source))?.path();
                    let text = fs::read(&path).map_err(|source| failed(&path, source))?;
                    let name = path.file_name().unwrap_or_default().to_string_lossy().into_owned();
                    match serde_json::from_slice(&text) {
                        Ok(forwards) if !name.starts_with('.') => {
                            held.insert(name, forwards);
                        }
                        _ => {
                            tracing::warn!(path = %path.display(), "unreadable host port record removed");
                            fs::remove_file(&path).map_err(|source| BuiltinError::Remove { path, source })?;
                        }
                    }
                }
            }
        }
        Ok(Self { directory, held })
    }

    /// Records `forwards` as `id`'s unless another has one of them.
    pub(crate) fn take(&mut self, id: &str, forwards: &[Forward]) -> Result<(), BuiltinError> {
        for forward in forwards {
            let holder =
                self.held.iter().find(|(_, taken)| taken.iter().any(|other| other.collides(forward)));
            if let Some((holder, _)) = holder {
                return Err(PortError::Taken { place: forward.place(), holder: holder.clone() }.into());
            }
        }
        if forwards.is_empty() {
            return Ok(());
        }
        let path = self.directory.join(id);
        let temporary = self.directory.join(format!(".{id}"));
        let text = serde_json::to_vec(forwards).unwrap_or_default();
        fs::create_dir_all(&self.directory)
            .and_then(|()| fs::write(&temporary, text))
            .and_then(|()| fs::rename(&temporary, &path))
            .map_err(|source| {
                let _ = fs::remove_file(&temporary);
                BuiltinError::Write { path, source }
            })?;
        self.held.insert(id.to_owned(), forwards.to_owned());
        Ok(())
    }

    pub(crate) fn of(&self, id: &str) -> &[Forward] {
        self.held.get(id).map_or(&[], Vec::as_slice)
    }

    pub(crate) fn release(&mut self, id: &str) -> Result<(), BuiltinError> {
        if self.held.contains_key(id) {
            let path = self.directory.join(id);
            match fs::remove_file(&path) {
                Err(error) if error.kind() != io::ErrorKind::NotFound => {
                    return Err(BuiltinError::Remove { path, source: error });
                }
                _ => self.held.remove(id),
            };
        }
        Ok(())
    }

    pub(crate) fn holders(&self) -> impl Iterator<Item = &str> {
        self.held.keys().map(String::as_str)
    }

    pub(crate) fn all(&self) -> impl Iterator<Item = &Forward> {
        self.held.values().flatten()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn mapping(
        protocol: Protocol,
        host_ip: Option<&str>,
        host_port: u16,
        container_port: u16,
    ) -> PortMapping {
        PortMapping { protocol, container_port, host_port, host_ip: host_ip.map(|ip| ip.parse().unwrap()) }
    }

    fn dual() -> Vec<IpAddr> {
        vec!["10.0.0.2".parse().unwrap(), "fd00::2".parse().unwrap()]
    }

    #[test]
    fn a_mapping_means_one_forward_in_each_family_it_covers() {
        let count = |host_ip| resolve(&[mapping(Protocol::Tcp, host_ip, 80, 8080)], &dual()).unwrap().len();
        assert_eq!(count(None), 2);
        assert_eq!(count(Some("0.0.0.0")), 1);
        assert_eq!(count(Some("::")), 1);
        assert_eq!(count(Some("127.0.0.1")), 1);
        let one = resolve(&[mapping(Protocol::Tcp, Some("0.0.0.0"), 80, 8080)], &dual()).unwrap();
        assert_eq!(one[0].host_ip, None);
        let twice = [mapping(Protocol::Udp, None, 80, 8080), mapping(Protocol::Udp, None, 80, 8080)];
        assert_eq!(resolve(&twice, &dual()).unwrap().len(), 2);
    }

    #[test]
    fn impossible_mappings_are_refused() {
        let error = |mappings: &[PortMapping]| resolve(mappings, &dual()[..1]).unwrap_err().to_string();
        assert!(error(&[mapping(Protocol::Tcp, None, 0, 1)]).contains("port 0"));
        assert!(
            error(&[mapping(Protocol::Tcp, Some("fd00::1"), 80, 1)]).contains("no address of that family")
        );
        assert!(error(&[mapping(Protocol::Tcp, Some("::1"), 80, 1)]).contains("on ::1"));
        let twice = [mapping(Protocol::Tcp, None, 80, 1), mapping(Protocol::Tcp, Some("10.9.9.9"), 80, 2)];
        assert_eq!(
            error(&twice),
            "host port 10.9.9.9:80 tcp is asked for twice, for container ports 1 and 2"
        );
    }

    #[test]
    fn taken_ports_survive_a_restart_and_half_written_ones_do_not() {
        let root = tempfile::tempdir().unwrap();
        let mut ports = Ports::open(root.path().to_owned()).unwrap();
        let forwards =
            |mappings: &[PortMapping], ip: &str| resolve(mappings, &[ip.parse().unwrap()]).unwrap();
        let first = forwards(&[mapping(Protocol::Tcp, None, 80, 8080)], "10.0.0.2");
        ports.take("a", &first).unwrap();
        fs::write(root.path().join(".b"), "[").unwrap();
        fs::write(root.path().join("c"), "{}").unwrap();

        let mut ports = Ports::open(root.path().to_owned()).unwrap();
        assert_eq!(ports.of("a"), first);
        assert_eq!(ports.holders().collect::<Vec<_>>(), ["a"]);
        let second = forwards(&[mapping(Protocol::Tcp, Some("192.0.2.1"), 80, 1)], "10.0.0.3");
        let error = ports.take("b", &second).unwrap_err();
        assert_eq!(error.to_string(), "host port 192.0.2.1:80 tcp is taken by sandbox a");
        ports.take("u", &forwards(&[mapping(Protocol::Udp, None, 80, 1)], "10.0.0.3")).unwrap();
        ports.take("six", &forwards(&[mapping(Protocol::Tcp, None, 80, 1)], "fd00::3")).unwrap();
        ports.release("a").unwrap();
        ports.release("a").unwrap();
        ports.take("b", &second).unwrap();
        let third = forwards(&[mapping(Protocol::Tcp, Some("192.0.2.2"), 80, 1)], "10.0.0.4");
        ports.take("d", &third).unwrap();
    }
}
