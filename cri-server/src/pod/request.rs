//! What a sandbox's configuration asks for: refused where it cannot be meant, read into the types of the crates that do it.

use std::collections::BTreeMap;
use std::net::IpAddr;
use std::path::Path;

use podvisor_network::namespace::{self, IdRange, UserMappings};
use podvisor_network::{PortMapping, Protocol, Sandbox};
use podvisor_proto::cri::{self, NamespaceMode};
use podvisor_spec::{Ids, UserNamespace};

use super::view::namespace_options;
use crate::error::PodError;
use crate::id::PodId;

/// Refuses what cannot become a sandbox.
pub(crate) fn validate(config: &cri::PodSandboxConfig) -> Result<(), PodError> {
    let Some(metadata) = &config.metadata else {
        return Err(PodError::invalid("config.metadata", "must be given"));
    };
    for (field, value, limit) in [
        ("config.metadata.name", &metadata.name, 253),
        ("config.metadata.namespace", &metadata.namespace, 253),
        ("config.metadata.uid", &metadata.uid, 128),
    ] {
        if value.is_empty() && field == "config.metadata.name" {
            return Err(PodError::invalid(field, "must not be empty"));
        }
        if value.len() > limit {
            return Err(PodError::invalid(field, format!("is longer than {limit} bytes")));
        }
        if value.contains(['\0', '/', '\n']) {
            return Err(PodError::invalid(field, "must not contain '/', a line end or NUL"));
        }
    }
    if config.hostname.len() > 64 {
        return Err(PodError::invalid("config.hostname", "is longer than 64 bytes, the kernel's limit"));
    }
    if config.hostname.contains(['\0', '\n', '/']) {
        return Err(PodError::invalid("config.hostname", "must not contain '/', a line end or NUL"));
    }
    if !config.log_directory.is_empty() && !clean_absolute(&config.log_directory) {
        return Err(PodError::invalid("config.log_directory", "must be an absolute path without '..'"));
    }
    for (map, field) in [(&config.labels, "config.labels"), (&config.annotations, "config.annotations")] {
        let size: usize = map.iter().map(|(key, value)| key.len() + value.len()).sum();
        // Kubernetes' own limit for annotations is 256 KiB.
        if size > 1 << 20 {
            return Err(PodError::invalid(field, "is larger than 1 MiB"));
        }
    }
    if let Some(dns) = &config.dns_config {
        for text in dns.servers.iter().chain(&dns.searches).chain(&dns.options) {
            if text.contains(['\n', '\0']) {
                return Err(PodError::invalid("config.dns_config", "must not contain line ends"));
            }
        }
        for server in &dns.servers {
            if server.parse::<IpAddr>().is_err() && !server.contains('%') {
                return Err(PodError::invalid(
                    "config.dns_config.servers",
                    format!("{server:?} is no IP address"),
                ));
            }
        }
    }
    let options = namespace_options(config);
    for (field, mode) in [("network", options.network), ("pid", options.pid), ("ipc", options.ipc)] {
        let known = NamespaceMode::try_from(mode).is_ok();
        let sensible = match field {
            "pid" => mode != NamespaceMode::Target as i32,
            _ => mode == NamespaceMode::Pod as i32 || mode == NamespaceMode::Node as i32,
        };
        if !known || !sensible {
            return Err(PodError::invalid(
                format!("config.linux.security_context.namespace_options.{field}"),
                format!("mode {mode} is not possible for a sandbox"),
            ));
        }
    }
    let security = config.linux.as_ref().and_then(|linux| linux.security_context.as_ref());
    if security.is_some_and(|security| security.run_as_group.is_some() && security.run_as_user.is_none()) {
        return Err(PodError::invalid("config.linux.security_context.run_as_group", "needs run_as_user"));
    }
    user_namespace(config)?;
    ports(config).map(drop)?;
    bandwidth(config, "kubernetes.io/ingress-bandwidth")?;
    bandwidth(config, "kubernetes.io/egress-bandwidth")?;
    Ok(())
}

fn clean_absolute(path: &str) -> bool {
    let path = Path::new(path);
    path.is_absolute() && !path.components().any(|part| part == std::path::Component::ParentDir)
}

pub(super) fn annotation<'a>(config: &'a cri::PodSandboxConfig, name: &str) -> Option<&'a str> {
    config.annotations.get(name).map(String::as_str)
}

pub(crate) fn cgroup_parent(config: &cri::PodSandboxConfig) -> String {
    config.linux.as_ref().map(|linux| linux.cgroup_parent.clone()).unwrap_or_default()
}

/// The name the pod's containers see.
pub(crate) fn hostname(config: &cri::PodSandboxConfig) -> String {
    if config.hostname.is_empty() || namespace_options(config).network == NamespaceMode::Node as i32 {
        rustix::system::uname().nodename().to_string_lossy().into_owned()
    } else {
        config.hostname.clone()
    }
}

/// The pod's user namespace; `None`: the node's.
pub(crate) fn user_namespace(config: &cri::PodSandboxConfig) -> Result<Option<UserNamespace>, PodError> {
    const FIELD: &str = "config.linux.security_context.namespace_options";
    let security = config.linux.as_ref().and_then(|linux| linux.security_context.as_ref());
    Ok(podvisor_spec::user_namespace(
        FIELD,
        security.and_then(|security| security.namespace_options.as_ref()),
    )?)
}

/// The namespaces that a sandbox gets of its own. With the host's network it keeps the host's name too.
pub(super) fn namespace_request(
    id: &PodId,
    config: &cri::PodSandboxConfig,
) -> Result<namespace::Request, PodError> {
    let options = namespace_options(config);
    let own = |mode: i32| mode != NamespaceMode::Node as i32;
    let sysctls = config.linux.as_ref().map(|linux| linux.sysctls.clone()).unwrap_or_default();
    let range = |ids: Ids| IdRange { inside: 0, outside: ids.first, length: ids.length };
    let user = user_namespace(config)?;
    Ok(namespace::Request {
        name: format!("podvisor-{id}"),
        user: user.map(|user| UserMappings { uids: range(user.uids), gids: range(user.gids) }),
        net: own(options.network),
        ipc: own(options.ipc),
        uts: own(options.network).then(|| hostname(config)),
        sysctls: sysctls.into_iter().collect::<BTreeMap<_, _>>(),
    })
}

pub(super) fn network_sandbox(
    id: &PodId,
    config: &cri::PodSandboxConfig,
    netns: &Path,
    cgroup_parent: String,
) -> Result<Sandbox, PodError> {
    let metadata = config.metadata.clone().unwrap_or_default();
    let dns = config.dns_config.clone().unwrap_or_default();
    Ok(Sandbox {
        id: id.to_string(),
        name: metadata.name,
        namespace: metadata.namespace,
        uid: metadata.uid,
        netns: netns.to_owned(),
        cgroup_parent,
        ports: ports(config)?,
        ingress_bandwidth: bandwidth(config, "kubernetes.io/ingress-bandwidth")?,
        egress_bandwidth: bandwidth(config, "kubernetes.io/egress-bandwidth")?,
        dns_servers: dns.servers,
        dns_searches: dns.searches,
        dns_options: dns.options,
    })
}

/// Host ports of a configuration; entries without one only document the container's port.
fn ports(config: &cri::PodSandboxConfig) -> Result<Vec<PortMapping>, PodError> {
    let mut ports = Vec::new();
    for (index, mapping) in config.port_mappings.iter().enumerate() {
        let field = |name: &str| format!("config.port_mappings[{index}].{name}");
        let number = |name: &str, value: i32| {
            u16::try_from(value)
                .map_err(|_| PodError::invalid(field(name), format!("{value} is no port (0 to 65535)")))
        };
        let (container_port, host_port) =
            (number("container_port", mapping.container_port)?, number("host_port", mapping.host_port)?);
        let protocol = match cri::Protocol::try_from(mapping.protocol) {
            Ok(cri::Protocol::Tcp) => Protocol::Tcp,
            Ok(cri::Protocol::Udp) => Protocol::Udp,
            Ok(cri::Protocol::Sctp) => Protocol::Sctp,
            Err(_) => {
                return Err(PodError::invalid(field("protocol"), "only TCP, UDP and SCTP are known"));
            }
        };
        let host_ip = match mapping.host_ip.as_str() {
            "" => None,
            text => Some(
                text.parse::<IpAddr>()
                    .map_err(|_| PodError::invalid(field("host_ip"), format!("{text:?} is no IP address")))?,
            )
            .filter(|address| !address.is_unspecified()),
        };
        if host_port != 0 {
            if container_port == 0 {
                return Err(PodError::invalid(field("container_port"), "must not be 0"));
            }
            ports.push(PortMapping { protocol, container_port, host_port, host_ip });
        }
    }
    Ok(ports)
}

/// A bandwidth annotation: a Kubernetes quantity of bits per second.
fn bandwidth(config: &cri::PodSandboxConfig, name: &str) -> Result<Option<u64>, PodError> {
    let Some(text) = annotation(config, name) else { return Ok(None) };
    let field = format!("config.annotations[{name:?}]");
    let digits = text.find(|c: char| !c.is_ascii_digit()).unwrap_or(text.len());
    let factor: u64 = match &text[digits..] {
        "" => 1,
        "k" => 1_000,
        "M" => 1_000_000,
        "G" => 1_000_000_000,
        "T" => 1_000_000_000_000,
        "Ki" => 1 << 10,
        "Mi" => 1 << 20,
        "Gi" => 1 << 30,
        "Ti" => 1 << 40,
        _ => return Err(PodError::invalid(field, format!("{text:?} is no quantity, write e.g. 10M"))),
    };
    text[..digits]
        .parse::<u64>()
        .ok()
        .and_then(|number| number.checked_mul(factor))
        .map(Some)
        .ok_or_else(|| PodError::invalid(field, format!("{text:?} is no quantity, write e.g. 10M")))
}

#[cfg(test)]
pub(super) mod tests {
    use super::*;

    pub(in crate::pod) fn config() -> cri::PodSandboxConfig {
        let metadata =
            cri::PodSandboxMetadata { name: "web".into(), namespace: "shop".into(), ..Default::default() };
        cri::PodSandboxConfig { metadata: Some(metadata), ..Default::default() }
    }

    #[test]
    fn a_bad_field_is_named() {
        type Break = fn(&mut cri::PodSandboxConfig);
        let broken: [(&str, Break); 7] = [
            ("config.metadata", |c| c.metadata = None),
            ("config.metadata.name", |c| c.metadata.as_mut().unwrap().name.clear()),
            ("config.hostname", |c| c.hostname = "x".repeat(65)),
            ("config.log_directory", |c| c.log_directory = "logs".into()),
            ("config.log_directory", |c| c.log_directory = "/var/../etc".into()),
            ("config.port_mappings[0].host_port", |c| {
                c.port_mappings = vec![cri::PortMapping { host_port: 70_000, ..Default::default() }];
            }),
            ("config.annotations[\"kubernetes.io/ingress-bandwidth\"]", |c| {
                c.annotations.insert("kubernetes.io/ingress-bandwidth".into(), "fast".into());
            }),
        ];
        assert!(validate(&config()).is_ok());
        for (field, break_it) in broken {
            let mut config = config();
            break_it(&mut config);
            let error = validate(&config).unwrap_err().to_string();
            assert!(error.starts_with(field), "{field}: {error}");
        }
    }

    #[test]
    fn quantities_of_bandwidth() {
        for (text, bits) in
            [("10M", Some(10_000_000)), ("1Ki", Some(1024)), ("8", Some(8)), ("", None), ("-1", None)]
        {
            let mut config = config();
            config.annotations.insert("kubernetes.io/egress-bandwidth".into(), text.into());
            assert_eq!(bandwidth(&config, "kubernetes.io/egress-bandwidth").ok().flatten(), bits, "{text}");
        }
    }
}
