//! Image references, normalised as docker does, so that one image has one name.
//!
//! The grammar is the distribution project's: `[registry/]repository[:tag][@digest]`. A registry is told from the
//! first part of a repository by a dot, a port, an uppercase letter or the word `localhost`. Without one it is
//! `docker.io`, where a single-word repository lives in `library/`. A digest outranks a tag: what has a digest
//! keeps no tag, because nobody checked that the tag means it.

use std::fmt;
use std::str::FromStr;

use crate::digest::{Digest, DigestError};
use crate::error::RegistryError;

/// Where names without a registry belong.
pub(crate) const DOCKER_HUB: &str = "docker.io";
const DOCKER_HUB_LEGACY: &str = "index.docker.io";
const DOCKER_HUB_NAMESPACE: &str = "library";
const DEFAULT_TAG: &str = "latest";
const REPOSITORY_MAX: usize = 255;
const TAG_MAX: usize = 128;
/// Longest of all parts together, with room for a host name (253) and a sha512 digest.
const NAME_MAX: usize = 1024;

/// A normalised image reference: registry, repository, tag or digest. Prints in its canonical form.
#[derive(Debug, Clone, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct Reference {
    registry: String,
    repository: String,
    version: Version,
}

#[derive(Debug, Clone, PartialEq, Eq, Hash, PartialOrd, Ord)]
enum Version {
    Tag(String),
    Digest(Digest),
}

/// What is wrong with an image name.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum ReferenceProblem {
    /// Nothing there.
    #[error("is empty")]
    Empty,
    /// Longer than any reference can be.
    #[error("is longer than {NAME_MAX} characters")]
    TooLong,
    /// 64 hex digits mean an image by its id.
    #[error("is an image id, not a name")]
    IsId,
    /// The part before the first slash is no host name with optional port.
    #[error("has an invalid registry {0:?}")]
    Registry(String),
    /// The repository has uppercase letters.
    #[error("has an invalid repository {0:?}: it must be lowercase")]
    Uppercase(String),
    /// The repository breaks the grammar.
    #[error(
        "has an invalid repository {0:?}: its parts are lowercase letters and digits, separated by one '.', one or two '_', or '-'"
    )]
    Repository(String),
    /// The repository is too long.
    #[error("has a repository longer than {REPOSITORY_MAX} characters")]
    RepositoryTooLong,
    /// The tag breaks the grammar.
    #[error(
        "has an invalid tag {0:?}: it is at most {TAG_MAX} letters, digits, '_', '.' and '-', and starts with none of the last two"
    )]
    Tag(String),
    /// What follows `@` is no digest.
    #[error("has an invalid digest")]
    Digest(#[source] DigestError),
    /// Short, and nobody said where short names live.
    #[error("has no registry, and no unqualified-search-registries are configured")]
    NoSearchRegistry,
    /// Short, and more than one registry could be meant.
    #[error("has no registry, and short-name-mode \"enforcing\" forbids to choose among {0}")]
    Ambiguous(String),
}

impl Reference {
    /// Reads `name` and normalises it. Names without a registry go to `docker.io`; where `registries.conf` has to
    /// be heard about them, use [`crate::Registry::candidates`].
    pub fn parse(name: &str) -> Result<Self, RegistryError> {
        parse(name).map_err(|problem| RegistryError::reference(name, problem))
    }

    /// Whether `name` says no registry, so that aliases and search registries decide.
    pub fn is_short(name: &str) -> bool {
        split_registry(name).is_none()
    }

    /// Host and optional port; `docker.io` for Docker Hub.
    pub fn registry(&self) -> &str {
        &self.registry
    }

    /// Without the registry: `library/busybox`.
    pub fn repository(&self) -> &str {
        &self.repository
    }

    /// `registry/repository`.
    pub fn name(&self) -> String {
        format!("{}/{}", self.registry, self.repository)
    }

    /// The tag (`latest` if the name said none); `None` for a reference by digest.
    pub fn tag(&self) -> Option<&str> {
        match &self.version {
            Version::Tag(tag) => Some(tag),
            Version::Digest(_) => None,
        }
    }

    /// The digest, where the reference is by digest.
    pub fn digest(&self) -> Option<&Digest> {
        match &self.version {
            Version::Tag(_) => None,
            Version::Digest(digest) => Some(digest),
        }
    }

    /// The same repository by digest: what repo digests show.
    #[must_use]
    pub fn with_digest(&self, digest: Digest) -> Self {
        Self {
            registry: self.registry.clone(),
            repository: self.repository.clone(),
            version: Version::Digest(digest),
        }
    }

    /// Tag or digest, as it stands in a manifest URL.
    pub(crate) fn version(&self) -> &str {
        match &self.version {
            Version::Tag(tag) => tag,
            Version::Digest(digest) => digest.as_str(),
        }
    }
}

impl fmt::Display for Reference {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let mark = if matches!(self.version, Version::Tag(_)) { ':' } else { '@' };
        write!(f, "{}/{}{mark}{}", self.registry, self.repository, self.version())
    }
}

impl FromStr for Reference {
    type Err = RegistryError;

    fn from_str(name: &str) -> Result<Self, RegistryError> {
        Self::parse(name)
    }
}

/// Splits a short name from the tag or digest at its end: aliases are looked up without.
pub(crate) fn split_version(name: &str) -> (&str, &str) {
    let end = name.find('@').unwrap_or(name.len());
    let slash = name[..end].rfind('/').map_or(0, |at| at + 1);
    let end = name[slash..end].find(':').map_or(end, |at| slash + at);
    name.split_at(end)
}

/// Whether `text` is a host (name, IPv4, `[IPv6]`) with an optional port.
pub(crate) fn is_registry(text: &str) -> bool {
    let (host, port) = split_port(text);
    let host_is_valid = match host.strip_prefix('[').and_then(|rest| rest.strip_suffix(']')) {
        Some(address) => address.parse::<std::net::Ipv6Addr>().is_ok(),
        None => host.split('.').all(|label| {
            !label.is_empty()
                && label.bytes().all(|byte| byte.is_ascii_alphanumeric() || byte == b'-')
                && !label.starts_with('-')
                && !label.ends_with('-')
        }),
    };
    host_is_valid
        && host.len() <= 255
        && port.is_none_or(|port| port.parse::<u16>().is_ok_and(|port| port > 0))
}

/// Host and port of `host[:port]`; brackets stay.
pub(crate) fn split_port(text: &str) -> (&str, Option<&str>) {
    match text.rsplit_once(':') {
        Some((host, port)) if !port.contains(']') => (host, Some(port)),
        _ => (text, None),
    }
}

/// Whether `text` follows the grammar of repositories.
pub(crate) fn is_repository(text: &str) -> bool {
    text.len() <= REPOSITORY_MAX && text.split('/').all(is_path_component)
}

fn parse(name: &str) -> Result<Reference, ReferenceProblem> {
    if name.is_empty() {
        return Err(ReferenceProblem::Empty);
    }
    if name.len() > NAME_MAX {
        return Err(ReferenceProblem::TooLong);
    }
    if name.len() == 64 && name.bytes().all(|byte| matches!(byte, b'0'..=b'9' | b'a'..=b'f')) {
        return Err(ReferenceProblem::IsId);
    }
    let (rest, digest) = match name.split_once('@') {
        Some((rest, digest)) => (rest, Some(Digest::parse(digest).map_err(ReferenceProblem::Digest)?)),
        None => (name, None),
    };
    let (registry, rest) = match split_registry(rest) {
        Some((registry, rest)) => (registry, rest),
        None => (DOCKER_HUB, rest),
    };
    if !is_registry(registry) {
        return Err(ReferenceProblem::Registry(registry.to_owned()));
    }
    let (path, tag) = match rest.split_once(':') {
        Some((path, tag)) => (path, Some(tag)),
        None => (rest, None),
    };
    if let Some(tag) = tag
        && !is_tag(tag)
    {
        return Err(ReferenceProblem::Tag(tag.to_owned()));
    }
    if !path.split('/').all(is_path_component) {
        let folded = path.to_ascii_lowercase();
        return Err(if folded != path && folded.split('/').all(is_path_component) {
            ReferenceProblem::Uppercase(path.to_owned())
        } else {
            ReferenceProblem::Repository(path.to_owned())
        });
    }
    let registry = if registry == DOCKER_HUB_LEGACY { DOCKER_HUB } else { registry };
    let repository = if registry == DOCKER_HUB && !path.contains('/') {
        format!("{DOCKER_HUB_NAMESPACE}/{path}")
    } else {
        path.to_owned()
    };
    if repository.len() > REPOSITORY_MAX {
        return Err(ReferenceProblem::RepositoryTooLong);
    }
    let version = match digest {
        Some(digest) => Version::Digest(digest),
        None => Version::Tag(tag.unwrap_or(DEFAULT_TAG).to_owned()),
    };
    Ok(Reference { registry: registry.to_owned(), repository, version })
}

/// The registry that `name` starts with, and what follows. Everything but the first part of a path (a dot, a
/// port, `localhost`, an uppercase letter) is taken for a registry, as docker does.
fn split_registry(name: &str) -> Option<(&str, &str)> {
    let (first, rest) = name.split_once('/')?;
    let is_host = first == "localhost"
        || first.contains(['.', ':'])
        || first.bytes().any(|byte| byte.is_ascii_uppercase());
    // `name@sha256:…/x` is a broken digest, not a registry.
    (is_host && !first.contains('@')).then_some((first, rest))
}

/// `[a-z0-9]+` runs, joined by one dot, one or two underscores, or any number of dashes.
fn is_path_component(text: &str) -> bool {
    let bytes = text.as_bytes();
    let alphanumeric = |byte: u8| matches!(byte, b'a'..=b'z' | b'0'..=b'9');
    let (Some(&first), Some(&last)) = (bytes.first(), bytes.last()) else { return false };
    if !alphanumeric(first) || !alphanumeric(last) {
        return false;
    }
    let mut separators = bytes.split(|&byte| alphanumeric(byte)).filter(|run| !run.is_empty());
    separators.all(|run| matches!(run, b"." | b"_" | b"__") || run.iter().all(|&byte| byte == b'-'))
}

fn is_tag(text: &str) -> bool {
    let word = |byte: u8| byte.is_ascii_alphanumeric() || byte == b'_';
    text.len() <= TAG_MAX
        && text.bytes().next().is_some_and(word)
        && text.bytes().all(|byte| word(byte) || byte == b'.' || byte == b'-')
}

#[cfg(test)]
mod tests {
    use super::*;

    const HEX: &str = "e3b0c44298fc1c149afbf4c8996fb92427ae41e4649b934ca495991b7852b855";

    #[test]
    fn normalises_as_docker_does() {
        let by_digest = format!("busybox@sha256:{HEX}");
        let both = format!("quay.io/a/b:1.0@sha256:{HEX}");
        let port_and_digest = format!("localhost:5000/b@sha256:{HEX}");
        let uppercase_host = "REG.example.COM/a/b";
        for (name, canonical) in [
            ("busybox", "docker.io/library/busybox:latest".to_owned()),
            ("busybox:1.36", "docker.io/library/busybox:1.36".to_owned()),
            ("docker.io/busybox", "docker.io/library/busybox:latest".to_owned()),
            ("index.docker.io/busybox", "docker.io/library/busybox:latest".to_owned()),
            ("docker.io/library/busybox", "docker.io/library/busybox:latest".to_owned()),
            ("user/app", "docker.io/user/app:latest".to_owned()),
            ("user/app/more", "docker.io/user/app/more:latest".to_owned()),
            ("localhost/foo", "localhost/foo:latest".to_owned()),
            ("localhost:5000/foo", "localhost:5000/foo:latest".to_owned()),
            ("localhost", "docker.io/library/localhost:latest".to_owned()),
            ("localhost:5000", "docker.io/library/localhost:5000".to_owned()),
            ("host:5000/x", "host:5000/x:latest".to_owned()),
            ("Host/x", "Host/x:latest".to_owned()),
            (uppercase_host, "REG.example.COM/a/b:latest".to_owned()),
            ("registry.k8s.io/pause:3.10.2", "registry.k8s.io/pause:3.10.2".to_owned()),
            ("[::1]:5000/x/y:z", "[::1]:5000/x/y:z".to_owned()),
            ("[2001:db8::1]/x", "[2001:db8::1]/x:latest".to_owned()),
            ("127.0.0.1:5000/a", "127.0.0.1:5000/a:latest".to_owned()),
            ("a.b/c__d/e---f/g.h_i", "a.b/c__d/e---f/g.h_i:latest".to_owned()),
            (&by_digest, format!("docker.io/library/busybox@sha256:{HEX}")),
            (&both, format!("quay.io/a/b@sha256:{HEX}")),
            (&port_and_digest, format!("localhost:5000/b@sha256:{HEX}")),
        ] {
            let reference = Reference::parse(name).unwrap_or_else(|error| panic!("{name}: {error}"));
            assert_eq!(reference.to_string(), canonical, "{name}");
            assert_eq!(Reference::parse(&canonical).unwrap(), reference, "{name} is stable");
        }
    }

    #[test]
    fn accessors_agree() {
        let reference = Reference::parse(&format!("quay.io/a/b:1.0@sha256:{HEX}")).unwrap();
        assert_eq!(reference.registry(), "quay.io");
        assert_eq!(reference.repository(), "a/b");
        assert_eq!(reference.name(), "quay.io/a/b");
        assert_eq!(reference.tag(), None, "a digest outranks the tag");
        assert_eq!(reference.digest().unwrap().hex(), HEX);
        let tagged = Reference::parse("quay.io/a/b").unwrap();
        assert_eq!(tagged.tag(), Some("latest"));
        assert_eq!(tagged.with_digest(Digest::sha256(b"")).to_string(), reference.to_string());
    }

    #[test]
    fn refuses_what_docker_refuses() {
        let long = "a".repeat(256);
        let long_in_library = "a".repeat(250);
        let long_tag = format!("a:{}", "t".repeat(129));
        let endless = "a/".repeat(1000);
        for name in [
            "",
            HEX,
            "UPPER",
            "a/Upper",
            "docker.io/Upper",
            ":tag",
            "/a",
            "a/",
            "a//b",
            "-a",
            "a-",
            "a..b",
            "a___b",
            "a._b",
            "a:",
            "a:.t",
            "a:-t",
            "a:b:c",
            "a:b/c/",
            "a@",
            "a@sha256:abc",
            "a@md5:d41d8cd98f00b204e9800998ecf8427e",
            "https://docker.io/a",
            "host:port/a",
            "host:99999/a",
            "host:0/a",
            "-host.com/a",
            "host..com/a",
            "[::1/a",
            "[zz]/a",
            "a b",
            "a\n",
            "ä",
            "a/../b",
            "../a",
            "docker.io/",
            "docker.io",
            &long,
            &long_in_library,
            &long_tag,
            &endless,
        ] {
            if name == "docker.io" {
                // A name like any other: docker reads it as a repository too.
                assert!(Reference::parse(name).is_ok());
                continue;
            }
            let error = Reference::parse(name).expect_err(name);
            assert_eq!(error.kind(), crate::ErrorKind::Invalid, "{name}");
        }
        let text = Reference::parse("a/Upper").unwrap_err().to_string();
        assert!(text.contains("lowercase"), "{text}");
        let text = Reference::parse(HEX).unwrap_err().to_string();
        assert!(text.contains("image id"), "{text}");
    }

    #[test]
    fn short_names_are_told_from_full_ones() {
        for name in ["busybox", "a/b", "busybox:1", "a/b:c", "library/x@sha256:00", "localhost"] {
            assert!(Reference::is_short(name), "{name}");
        }
        for name in ["docker.io/a", "localhost/a", "h:1/a", "Host/a"] {
            assert!(!Reference::is_short(name), "{name}");
        }
        assert_eq!(split_version("a/b:c"), ("a/b", ":c"));
        assert_eq!(split_version("a/b@sha256:00"), ("a/b", "@sha256:00"));
        assert_eq!(split_version("a:1@sha256:00"), ("a", ":1@sha256:00"));
        assert_eq!(split_version("h:1/b"), ("h:1/b", ""));
        assert_eq!(split_version("a"), ("a", ""));
    }
}
