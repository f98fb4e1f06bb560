//! containerd's `certs.d`: `<host>/hosts.toml` with the endpoints of a registry, or docker's certificate files.
//!
//! A host's directory is `host_port_`, `host:port` or `host`, else `_default`. With a hosts.toml the certificate
//! files beside it count only if it names them; without one every `*.crt` is a CA and every `*.cert` with its
//! `*.key` a client certificate, as docker reads its own `certs.d`.

use std::fs;
use std::io;
use std::path::{Path, PathBuf};

use http::uri::Authority;
use http::{HeaderMap, HeaderName, HeaderValue, Uri};
use toml::{Table, Value};

use crate::error::ConfigurationError;
use crate::reference::split_port;

/// The directory for registries without one.
const DEFAULT: &str = "_default";

/// What a directory says about one registry.
#[derive(Debug, Clone, Default)]
pub(crate) struct HostDirectory {
    /// `[host."…"]` in the order of the file: tried before the server.
    pub(crate) hosts: Vec<Host>,
    /// `server` and the settings at the top of the file.
    pub(crate) server: Host,
    /// It is `_default`: what it says is not about this registry in particular.
    pub(crate) is_default: bool,
}

/// One `[host."…"]`, or the top of the file.
#[derive(Debug, Clone, Default)]
pub(crate) struct Host {
    /// `None` only for a file without `server`: the registry itself.
    pub(crate) base: Option<BaseUrl>,
    pub(crate) capabilities: Capabilities,
    pub(crate) tls: TlsFiles,
    pub(crate) headers: HeaderMap,
}

/// Where an API root is.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct BaseUrl {
    /// `https`, or else `http`.
    pub(crate) https: bool,
    pub(crate) authority: Authority,
    /// `/v2`, or what `override_path` says; no slash at the end.
    pub(crate) root: String,
}

/// What a host may be asked for. (`push` is accepted and means nothing here.)
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Capabilities {
    /// Content by digest.
    pub(crate) pull: bool,
    /// What a tag means.
    pub(crate) resolve: bool,
}

/// Certificates by file.
#[derive(Debug, Clone, Default, PartialEq, Eq, Hash)]
pub(crate) struct TlsFiles {
    /// PEM, in addition to the system's roots.
    pub(crate) ca: Vec<PathBuf>,
    /// PEM certificate chain and key; only the first pair is used.
    pub(crate) client: Vec<(PathBuf, PathBuf)>,
    /// `None`: not mentioned.
    pub(crate) skip_verify: Option<bool>,
}

impl Default for Capabilities {
    fn default() -> Self {
        Self { pull: true, resolve: true }
    }
}

impl TlsFiles {
    /// Whether somebody took the trouble to say how to verify.
    pub(crate) fn is_configured(&self) -> bool {
        *self != Self::default()
    }
}

impl HostDirectory {
    /// Reads what `root` has for `registry` (host with optional port); no directory means nothing special.
    pub(crate) fn read(root: &Path, registry: &str) -> Result<Self, ConfigurationError> {
        let Some(directory) = find(root, registry) else { return Ok(Self::default()) };
        let file = directory.join("hosts.toml");
        let problem = |problem: String| ConfigurationError { path: file.clone(), problem };
        let read = match fs::read_to_string(&file) {
            Ok(text) if !text.trim().is_empty() => parse(&text, &directory).map_err(problem)?,
            Ok(_) => certificate_files(&directory)?,
            Err(error) if error.kind() == io::ErrorKind::NotFound => certificate_files(&directory)?,
            Err(error) => return Err(problem(error.to_string())),
        };
        Ok(Self { is_default: directory.ends_with(DEFAULT), ..read })
    }

    /// Settings for talking to `authority` itself, wherever in the file they stand.
    pub(crate) fn settings_of(&self, authority: &str) -> Host {
        let is_it =
            |host: &&Host| host.base.as_ref().is_some_and(|base| base.authority.as_str() == authority);
        let server = Some(&self.server).filter(|server| server.base.is_none() || is_it(server));
        self.hosts.iter().find(is_it).or(server).cloned().unwrap_or_default()
    }
}

fn find(root: &Path, registry: &str) -> Option<PathBuf> {
    let (host, port) = split_port(registry);
    let with_port = port.map(|port| format!("{host}_{port}_"));
    [with_port.as_deref(), Some(registry), Some(DEFAULT)]
        .into_iter()
        .flatten()
        .map(|name| root.join(name))
        .find(|path| path.is_dir())
}

fn certificate_files(directory: &Path) -> Result<HostDirectory, ConfigurationError> {
    let problem =
        |error: io::Error| ConfigurationError { path: directory.to_owned(), problem: error.to_string() };
    let mut tls = TlsFiles::default();
    let mut paths = Vec::new();
    for entry in fs::read_dir(directory).map_err(problem)? {
        paths.push(entry.map_err(problem)?.path());
    }
    paths.sort();
    for path in paths {
        match path.extension().and_then(|extension| extension.to_str()) {
            Some("crt") => tls.ca.push(path),
            Some("cert") => {
                let key = path.with_extension("key");
                if !key.exists() {
                    return Err(ConfigurationError {
                        path,
                        problem: "has no .key file beside it".to_owned(),
                    });
                }
                tls.client.push((path, key));
            }
            _ => {}
        }
    }
    Ok(HostDirectory { server: Host { tls, ..Host::default() }, ..HostDirectory::default() })
}

/// Read by hand and not with serde, whose errors repeat values: headers may be secrets.
fn parse(text: &str, directory: &Path) -> Result<HostDirectory, String> {
    let table: Table = text.parse().map_err(|error: toml::de::Error| {
        let line =
            error.span().map_or(0, |span| text[..span.start.min(text.len())].matches('\n').count() + 1);
        format!("line {line}: not valid TOML")
    })?;
    let mut server = settings(&table, directory)?;
    let root_override = flag(&table, "override_path")?.unwrap_or(false);
    if let Some(url) = table.get("server") {
        let url = url.as_str().ok_or("server is no string")?;
        if !url.is_empty() {
            server.base = Some(base_url(url, root_override).map_err(|error| format!("server: {error}"))?);
        }
    }
    let mut hosts = Vec::new();
    if let Some(tables) = table.get("host") {
        let tables = tables.as_table().ok_or("host is no table")?;
        for (url, entry) in tables {
            let read = || {
                let entry = entry.as_table().ok_or("is no table")?;
                let mut host = settings(entry, directory)?;
                host.base = Some(base_url(url, flag(entry, "override_path")?.unwrap_or(false))?);
                Ok(host)
            };
            hosts.push(read().map_err(|error: String| format!("[host.{}]: {error}", shown(url)))?);
        }
    }
    Ok(HostDirectory { hosts, server, is_default: false })
}

fn settings(table: &Table, directory: &Path) -> Result<Host, String> {
    Ok(Host {
        base: None,
        capabilities: capabilities(table)?,
        tls: TlsFiles {
            ca: strings(table.get("ca"), "ca")?.into_iter().map(|path| directory.join(path)).collect(),
            client: client_pairs(table, directory)?,
            skip_verify: flag(table, "skip_verify")?,
        },
        headers: headers(table)?,
    })
}

fn capabilities(table: &Table) -> Result<Capabilities, String> {
    let named = strings(table.get("capabilities"), "capabilities")?;
    if named.is_empty() {
        return Ok(Capabilities::default());
    }
    let mut capabilities = Capabilities { pull: false, resolve: false };
    for name in named {
        match name.to_ascii_lowercase().as_str() {
            "pull" => capabilities.pull = true,
            "resolve" => capabilities.resolve = true,
            "push" => {}
            _ => return Err(format!("capability {name:?} is none of pull, resolve, push")),
        }
    }
    Ok(capabilities)
}

/// `client` is one file with certificate and key, several of them, or `[certificate, key]` pairs.
fn client_pairs(table: &Table, directory: &Path) -> Result<Vec<(PathBuf, PathBuf)>, String> {
    let items = match table.get("client") {
        None => return Ok(Vec::new()),
        Some(Value::Array(items)) => items.clone(),
        Some(one) => vec![one.clone()],
    };
    items
        .iter()
        .map(|item| match item {
            Value::String(path) => Ok((directory.join(path), directory.join(path))),
            Value::Array(_) => match strings(Some(item), "client")?.as_slice() {
                [certificate] => Ok((directory.join(certificate), directory.join(certificate))),
                [certificate, key] => Ok((directory.join(certificate), directory.join(key))),
                _ => Err("client: a pair has a certificate and a key".to_owned()),
            },
            _ => Err("client is no path, list of paths or list of pairs".to_owned()),
        })
        .collect()
}

fn headers(table: &Table) -> Result<HeaderMap, String> {
    let mut headers = HeaderMap::new();
    let Some(named) = table.get("header") else { return Ok(headers) };
    for (name, values) in named.as_table().ok_or("header is no table")? {
        let key =
            HeaderName::from_bytes(name.as_bytes()).map_err(|_| format!("header {name:?} is no name"))?;
        for value in strings(Some(values), "header")? {
            let mut value =
                HeaderValue::from_str(&value).map_err(|_| format!("header {name:?} has an invalid value"))?;
            value.set_sensitive(true);
            headers.append(key.clone(), value);
        }
    }
    Ok(headers)
}

fn flag(table: &Table, key: &str) -> Result<Option<bool>, String> {
    match table.get(key) {
        None => Ok(None),
        Some(Value::Boolean(flag)) => Ok(Some(*flag)),
        Some(_) => Err(format!("{key} is neither true nor false")),
    }
}

/// A string, or a list of strings.
fn strings(value: Option<&Value>, key: &str) -> Result<Vec<String>, String> {
    let refused = || format!("{key} is no string and no list of strings");
    match value {
        None => Ok(Vec::new()),
        Some(Value::String(one)) => Ok(vec![one.clone()]),
        Some(Value::Array(items)) => {
            items.iter().map(|item| item.as_str().map(str::to_owned).ok_or_else(refused)).collect()
        }
        Some(_) => Err(refused()),
    }
}

/// Reads a host's URL; the scheme may be missing and is `https` then. `/v2` is appended unless it stands there or
/// `override_path` says that the path is the API root.
fn base_url(text: &str, override_path: bool) -> Result<BaseUrl, String> {
    let full = if text.contains("://") { text.to_owned() } else { format!("https://{text}") };
    let uri: Uri = full.parse().map_err(|_| "is no URL".to_owned())?;
    let https = match uri.scheme_str() {
        Some("https") => true,
        Some("http") => false,
        _ => return Err("is neither https:// nor http://".to_owned()),
    };
    let authority = uri.authority().cloned().ok_or("has no host")?;
    if authority.as_str().contains('@') {
        return Err("must not contain user and password".to_owned());
    }
    if uri.query().is_some() {
        return Err("must not contain a query".to_owned());
    }
    let mut root = uri.path().trim_end_matches('/').to_owned();
    if !override_path && !root.ends_with("/v2") {
        root.push_str("/v2");
    }
    Ok(BaseUrl { https, authority, root })
}

/// A URL as an error may repeat it.
fn shown(url: &str) -> String {
    let safe = url.rsplit_once('@').map_or(url, |(_, host)| host);
    format!("{safe:?}")
}

#[cfg(test)]
mod tests {
    use super::*;

    fn read(text: &str) -> Result<HostDirectory, String> {
        parse(text, Path::new("/certs/x"))
    }

    #[test]
    fn reads_hosts_in_order() {
        let directory = read(
            r#"
            server = "https://upstream.net"
            ca = "top.crt"
            [host."https://zzz.local:5000"]
            capabilities = ["pull", "resolve"]
            ca = ["a.crt", "/abs/b.crt"]
            client = [["c.cert", "c.key"]]
            skip_verify = true
            [host."https://zzz.local:5000".header]
            x-one = "1"
            x-two = ["2", "3"]
            [host."http://aaa.local/prefix"]
            capabilities = ["pull", "push"]
            client = "both.pem"
            [host."mmm.local/api/v2"]
            [host."https://ooo.local/odd"]
            override_path = true
            "#,
        )
        .unwrap();
        let bases: Vec<_> = directory.hosts.iter().map(|host| host.base.clone().unwrap()).collect();
        let urls: Vec<_> =
            bases.iter().map(|base| format!("{} {}{}", base.https, base.authority, base.root)).collect();
        assert_eq!(
            urls,
            [
                "true zzz.local:5000/v2",
                "false aaa.local/prefix/v2",
                "true mmm.local/api/v2",
                "true ooo.local/odd"
            ]
        );
        let first = &directory.hosts[0];
        assert_eq!(first.tls.ca, [Path::new("/certs/x/a.crt"), Path::new("/abs/b.crt")]);
        assert_eq!(first.tls.client, [("/certs/x/c.cert".into(), "/certs/x/c.key".into())]);
        assert_eq!(first.tls.skip_verify, Some(true));
        assert_eq!(first.headers.len(), 3);
        assert!(!format!("{first:?}").contains("\"1\""), "header values are not shown");
        assert_eq!(directory.hosts[1].capabilities, Capabilities { pull: true, resolve: false });
        assert_eq!(directory.hosts[1].tls.client, [("/certs/x/both.pem".into(), "/certs/x/both.pem".into())]);
        assert_eq!(directory.server.base.as_ref().unwrap().authority, "upstream.net");
        assert_eq!(directory.server.tls.ca, [Path::new("/certs/x/top.crt")]);
        assert_eq!(directory.settings_of("zzz.local:5000").tls.skip_verify, Some(true));
        assert_eq!(directory.settings_of("upstream.net").tls.ca.len(), 1);
    }

    #[test]
    fn errors_name_the_key_and_no_values() {
        for (text, part) in [
            ("x = [", "line 1"),
            ("server = 3", "server"),
            ("server = \"ftp://a\"", "https://"),
            ("server = \"https://user:hunter2@a\"", "user and password"),
            ("[host.\"https://user:hunter2@a\"]", "user and password"),
            ("[host.\"https://a\"]\ncapabilities = [\"fly\"]", "fly"),
            ("[host.\"https://a\"]\nskip_verify = \"hunter2\"", "skip_verify"),
            ("[host.\"https://a\".header]\nAuthorization = 5", "header"),
            ("[host.\"https://a\".header]\nAuthorization = \"hunter2\\n\"", "Authorization"),
            ("[host.\"https://a\"]\nclient = 5", "client"),
            ("[host.\"https://a\"]\nclient = [[\"a\", \"b\", \"c\"]]", "client"),
            ("host = 5", "host"),
        ] {
            let error = read(text).expect_err(text);
            assert!(error.to_lowercase().contains(&part.to_lowercase()), "{text:?}: {error}");
            assert!(!error.contains("hunter2"), "{error}");
        }
    }

    #[test]
    fn finds_directories() {
        let root = tempfile::tempdir().unwrap();
        let ca = |host: &str| {
            let directory = HostDirectory::read(root.path(), host).unwrap();
            directory.server.tls.ca.first().map(|path| path.strip_prefix(root.path()).unwrap().to_owned())
        };
        assert_eq!(ca("a.net:5000"), None);
        for name in ["_default", "a.net:5000", "a.net"] {
            fs::create_dir(root.path().join(name)).unwrap();
            fs::write(root.path().join(name).join("ca.crt"), "").unwrap();
        }
        assert_eq!(ca("a.net:5000"), Some("a.net:5000/ca.crt".into()));
        fs::create_dir(root.path().join("a.net_5000_")).unwrap();
        fs::write(root.path().join("a.net_5000_/ca.crt"), "").unwrap();
        assert_eq!(ca("a.net:5000"), Some("a.net_5000_/ca.crt".into()));
        assert_eq!(ca("a.net"), Some("a.net/ca.crt".into()));
        assert_eq!(ca("b.net"), Some("_default/ca.crt".into()));

        fs::write(root.path().join("a.net/client.cert"), "").unwrap();
        let error = HostDirectory::read(root.path(), "a.net").unwrap_err().to_string();
        assert!(error.contains(".key"), "{error}");
        fs::write(root.path().join("a.net/client.key"), "").unwrap();
        let directory = HostDirectory::read(root.path(), "a.net").unwrap();
        assert_eq!(directory.server.tls.client.len(), 1);
        assert!(directory.server.tls.is_configured());

        fs::write(root.path().join("a.net/hosts.toml"), "server = \"https://c.net\"\n").unwrap();
        let directory = HostDirectory::read(root.path(), "a.net").unwrap();
        assert!(!directory.server.tls.is_configured(), "hosts.toml names its own files");
    }
}
