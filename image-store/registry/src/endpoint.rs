//! Whom to ask for a reference, in which order.
//!
//! A `[[registry]]` of registries.conf that matches decides: its mirrors in order, then its location. Where it has
//! no mirrors, or nothing matches, hosts.toml of the location's host supplies the endpoints: its hosts in order,
//! then its server. A mirror of registries.conf is one endpoint; from hosts.toml of its host come only
//! certificates and headers.

use std::fmt::Write as _;
use std::path::Path;

use http::uri::Authority;
use http::{HeaderMap, Uri};

use crate::certs_dir::{BaseUrl, Capabilities, Host, HostDirectory};
use crate::connect::is_loopback;
use crate::credentials::canonical_host;
use crate::error::{ConfigurationError, RegistryError};
use crate::reference::{DOCKER_HUB, Reference, split_port};
use crate::registries_conf::{Location, RegistriesConf};
use crate::tls::TlsSettings;

/// Where Docker Hub's API really is.
const DOCKER_HUB_SERVER: &str = "registry-1.docker.io";

/// One repository at one host.
#[derive(Debug, Clone)]
pub(crate) struct Endpoint {
    pub(crate) scheme: Scheme,
    pub(crate) tls: TlsSettings,
    /// Configured headers, for this host alone.
    pub(crate) headers: HeaderMap,
    pub(crate) capabilities: Capabilities,
    /// Whose credentials apply (canonical).
    pub(crate) credential_host: String,
    pub(crate) repository: String,
    authority: Authority,
    root: String,
    /// Tells a mirror of many registries which one is meant (containerd's `ns` parameter).
    namespace: Option<String>,
}

/// How an endpoint may be spoken to.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Scheme {
    Https,
    /// hosts.toml says `http://`.
    Http,
    /// Insecure: https, and plain http when that fails.
    Either,
}

/// Which part of the API.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Kind {
    Manifests,
    Blobs,
}

impl Endpoint {
    /// The URL of a manifest (tag or digest) or blob (digest).
    pub(crate) fn url(&self, plain: bool, kind: Kind, version: &str) -> Result<Uri, String> {
        let scheme = if plain { "http" } else { "https" };
        let kind = match kind {
            Kind::Manifests => "manifests",
            Kind::Blobs => "blobs",
        };
        let (authority, root, repository) = (&self.authority, &self.root, &self.repository);
        let query = self.namespace.as_ref().map(|name| format!("?ns={}", encoded(name))).unwrap_or_default();
        let url = format!("{scheme}://{authority}{root}/{repository}/{kind}/{version}{query}");
        url.parse().map_err(|_| format!("{url} is no URL"))
    }

    /// Scheme and host: where tokens are valid.
    pub(crate) fn origin(&self, plain: bool) -> String {
        format!("{}://{}", if plain { "http" } else { "https" }, self.authority)
    }
}

/// The endpoints for `reference`, in the order to be tried.
pub(crate) fn plan(
    reference: &Reference,
    conf: &RegistriesConf,
    conf_path: &Path,
    certs_dir: &Path,
) -> Result<Vec<Endpoint>, RegistryError> {
    let Some(entry) = conf.find(reference) else {
        let place = Location {
            registry: reference.registry().to_owned(),
            repository: reference.repository().to_owned(),
        };
        return Ok(expand(&place, false, certs_dir)?);
    };
    if entry.blocked {
        let (reference, prefix) = (reference.to_string(), entry.prefix.clone());
        return Err(RegistryError::Blocked { reference, prefix });
    }
    let problem = |problem: String| ConfigurationError { path: conf_path.to_owned(), problem };
    let primary = entry.primary(reference).map_err(problem)?;
    if entry.mirrors.is_empty() {
        return Ok(expand(&primary, entry.insecure, certs_dir)?);
    }
    let mut endpoints = Vec::with_capacity(entry.mirrors.len() + 1);
    for mirror in entry.mirrors.iter().filter(|mirror| mirror.serves(reference)) {
        let place = entry.mirrored(mirror, reference).map_err(problem)?;
        endpoints.push(single(&place, mirror.insecure, certs_dir)?);
    }
    endpoints.push(single(&primary, entry.insecure, certs_dir)?);
    Ok(endpoints)
}

/// What hosts.toml says about a place: other hosts first, then the server.
fn expand(place: &Location, insecure: bool, certs_dir: &Path) -> Result<Vec<Endpoint>, ConfigurationError> {
    let directory = HostDirectory::read(certs_dir, &place.registry)?;
    let mut endpoints: Vec<Endpoint> = Vec::with_capacity(directory.hosts.len() + 1);
    for host in &directory.hosts {
        if let Some(base) = &host.base {
            endpoints.push(configured(place, host, base));
        }
    }
    match &directory.server.base {
        Some(base) => {
            let mut endpoint = configured(place, &directory.server, base);
            if !directory.is_default {
                // It is declared to be this registry, not another one that mirrors it.
                endpoint.credential_host = canonical_host(&place.registry);
            }
            endpoints.push(endpoint);
        }
        None => endpoints.push(registry_itself(place, insecure, directory.server, certs_dir)?),
    }
    Ok(endpoints)
}

/// A place that registries.conf names, with what `certs.d` has for talking to its host.
fn single(place: &Location, insecure: bool, certs_dir: &Path) -> Result<Endpoint, ConfigurationError> {
    let directory = HostDirectory::read(certs_dir, &place.registry)?;
    let settings = directory.settings_of(server_of(&place.registry));
    let host = Host { capabilities: Capabilities::default(), ..settings };
    registry_itself(place, insecure, host, certs_dir)
}

fn registry_itself(
    place: &Location,
    insecure: bool,
    host: Host,
    certs_dir: &Path,
) -> Result<Endpoint, ConfigurationError> {
    let server = server_of(&place.registry);
    let authority = server.parse().map_err(|_| ConfigurationError {
        path: certs_dir.to_owned(),
        problem: format!("{server:?} is no host with port"),
    })?;
    // As docker: registries on this machine need no TLS, unless somebody set it up for them.
    let insecure = insecure || (is_loopback(split_port(server).0) && !host.tls.is_configured());
    Ok(Endpoint {
        scheme: if insecure { Scheme::Either } else { Scheme::Https },
        tls: TlsSettings::new(&host.tls, insecure),
        headers: host.headers,
        capabilities: host.capabilities,
        credential_host: canonical_host(&place.registry),
        repository: hub_namespaced(place),
        authority,
        root: "/v2".to_owned(),
        namespace: None,
    })
}

/// An endpoint whose URL hosts.toml states.
fn configured(place: &Location, host: &Host, base: &BaseUrl) -> Endpoint {
    let is_itself = base.authority.as_str() == server_of(&place.registry);
    Endpoint {
        scheme: if base.https { Scheme::Https } else { Scheme::Http },
        tls: TlsSettings::new(&host.tls, false),
        headers: host.headers.clone(),
        capabilities: host.capabilities,
        credential_host: canonical_host(base.authority.as_str()),
        repository: hub_namespaced(place),
        authority: base.authority.clone(),
        root: base.root.clone(),
        namespace: (!is_itself).then(|| place.registry.clone()),
    }
}

fn server_of(registry: &str) -> &str {
    if canonical_host(registry) == DOCKER_HUB { DOCKER_HUB_SERVER } else { registry }
}

/// Docker Hub knows single-word repositories only in `library/`; a rewritten location may lack it.
fn hub_namespaced(place: &Location) -> String {
    if canonical_host(&place.registry) == DOCKER_HUB && !place.repository.contains('/') {
        format!("library/{}", place.repository)
    } else {
        place.repository.clone()
    }
}

/// Percent-encodes everything but unreserved characters (RFC 3986 §2.3).
pub(crate) fn encoded(text: &str) -> String {
    let mut encoded = String::with_capacity(text.len());
    for byte in text.bytes() {
        if byte.is_ascii_alphanumeric() || b"-._~".contains(&byte) {
            encoded.push(char::from(byte));
        } else {
            let _ = write!(encoded, "%{byte:02X}");
        }
    }
    encoded
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::fs;

    /// `scheme url credential-host` of each endpoint.
    fn planned(name: &str, conf: &str, hosts: &[(&str, &str)]) -> Result<Vec<String>, RegistryError> {
        let directory = tempfile::tempdir().unwrap();
        for (host, text) in hosts {
            fs::create_dir(directory.path().join(host)).unwrap();
            fs::write(directory.path().join(host).join("hosts.toml"), text).unwrap();
        }
        let conf = RegistriesConf::from_text(conf).unwrap();
        let reference = Reference::parse(name).unwrap();
        let endpoints = plan(&reference, &conf, Path::new("registries.conf"), directory.path())?;
        Ok(endpoints
            .iter()
            .map(|endpoint| {
                let url = endpoint
                    .url(endpoint.scheme == Scheme::Http, Kind::Manifests, reference.version())
                    .unwrap();
                format!("{:?} {url} {}", endpoint.scheme, endpoint.credential_host)
            })
            .collect())
    }

    #[test]
    fn queries_are_encoded() {
        assert_eq!(encoded("repository:a/b:pull&x=ä"), "repository%3Aa%2Fb%3Apull%26x%3D%C3%A4");
    }

    #[test]
    fn without_configuration() {
        assert_eq!(
            planned("busybox", "", &[]).unwrap(),
            ["Https https://registry-1.docker.io/v2/library/busybox/manifests/latest docker.io"]
        );
        for name in ["localhost:5000/x", "127.0.0.1:5000/x", "[::1]:5000/x"] {
            assert!(planned(name, "", &[]).unwrap()[0].starts_with("Either https://"), "{name}");
        }
        assert!(planned("10.0.0.1:5000/x", "", &[]).unwrap()[0].starts_with("Https "));
    }

    #[test]
    fn registries_conf_decides() {
        let conf = r#"
            [[registry]]
            prefix = "docker.io"
            insecure = true
            [[registry.mirror]]
            location = "mirror.local:5000/hub"
            insecure = true
            [[registry.mirror]]
            location = "other.local"
            pull-from-mirror = "digest-only"
            [[registry]]
            prefix = "bad.net"
            blocked = true
            [[registry]]
            prefix = "moved.net"
            location = "docker.io"
        "#;
        let hosts = [
            ("docker.io", "server = \"https://ignored.local\"\n[host.\"https://ignored2.local\"]\n"),
            ("other.local", "[host.\"https://never.local\"]"),
        ];
        assert_eq!(
            planned("busybox", conf, &hosts).unwrap(),
            [
                "Either https://mirror.local:5000/v2/hub/library/busybox/manifests/latest mirror.local:5000",
                "Either https://registry-1.docker.io/v2/library/busybox/manifests/latest docker.io",
            ]
        );
        let digest = format!("sha256:{}", "0".repeat(64));
        let by_digest = planned(&format!("busybox@{digest}"), conf, &hosts).unwrap();
        assert_eq!(by_digest.len(), 3);
        assert_eq!(
            by_digest[1],
            format!("Https https://other.local/v2/library/busybox/manifests/{digest} other.local")
        );
        let error = planned("bad.net/x", conf, &[]).unwrap_err();
        assert_eq!(error.kind(), crate::ErrorKind::Refused);
        assert!(error.to_string().contains("bad.net/x:latest"), "{error}");
        assert_eq!(
            planned("moved.net/x", conf, &[]).unwrap(),
            ["Https https://registry-1.docker.io/v2/library/x/manifests/latest docker.io"]
        );
    }

    #[test]
    fn hosts_toml_supplies_endpoints() {
        let hosts = [(
            "a.net",
            "server = \"https://real.a.net\"\n[host.\"http://m.local\"]\n[host.\"https://n.local/x\"]\noverride_path = true\n",
        )];
        assert_eq!(
            planned("a.net/b", "", &hosts).unwrap(),
            [
                "Http http://m.local/v2/b/manifests/latest?ns=a.net m.local",
                "Https https://n.local/x/b/manifests/latest?ns=a.net n.local",
                "Https https://real.a.net/v2/b/manifests/latest?ns=a.net a.net",
            ]
        );
        // Also for a location without mirrors.
        let conf = "[[registry]]\nprefix = \"z.net\"\nlocation = \"a.net/z\"\n";
        assert_eq!(
            planned("z.net/b", conf, &hosts).unwrap()[0],
            "Http http://m.local/v2/z/b/manifests/latest?ns=a.net m.local"
        );
        let default = [("_default", "server = \"https://proxy.local\"\n")];
        assert_eq!(
            planned("a.net/b", "", &default).unwrap(),
            ["Https https://proxy.local/v2/b/manifests/latest?ns=a.net proxy.local"],
            "a proxy for everything gets no registry's credentials"
        );
        let broken = [("a.net", "server = 5")];
        assert_eq!(planned("a.net/b", "", &broken).unwrap_err().kind(), crate::ErrorKind::Configuration);
    }
}
