//! registries.conf version 2, as containers-registries.conf(5) describes it: which `[[registry]]` a name belongs
//! to, where it is fetched from, and what short names mean.

mod live;
mod parse;

use std::collections::BTreeMap;

pub(crate) use live::LiveConf;

use crate::reference::{Reference, is_registry, is_repository, split_version};

/// Several files merged; the empty configuration is the default.
#[derive(Debug, Clone, Default)]
pub(crate) struct RegistriesConf {
    /// `unqualified-search-registries`; `None` where no file has the key.
    pub(crate) search: Option<Vec<String>>,
    /// `short-name-mode`.
    pub(crate) short_name_mode: ShortNameMode,
    /// `[aliases]`: short name without tag → `registry/repository`.
    pub(crate) aliases: BTreeMap<String, String>,
    /// `credential-helpers`; empty where no file has the key.
    pub(crate) credential_helpers: Vec<String>,
    registries: Vec<Entry>,
}

/// What to do with a short name that several registries might know.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub(crate) enum ShortNameMode {
    /// Refuse: a daemon has no terminal to ask at.
    Enforcing,
    /// Try all in order.
    #[default]
    Permissive,
    /// Try all in order.
    Disabled,
}

/// One `[[registry]]`.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Entry {
    pub(crate) prefix: String,
    /// `None`: where the prefix says.
    location: Option<String>,
    pub(crate) insecure: bool,
    pub(crate) blocked: bool,
    pub(crate) mirrors: Vec<Mirror>,
}

/// One `[[registry.mirror]]`.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Mirror {
    location: String,
    pub(crate) insecure: bool,
    pub(crate) pull: PullFromMirror,
}

/// Which references may be pulled from a mirror.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum PullFromMirror {
    All,
    DigestOnly,
    TagOnly,
}

/// A physical place: host with port, and repository there.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Location {
    pub(crate) registry: String,
    pub(crate) repository: String,
}

impl RegistriesConf {
    /// The entry with the longest matching prefix.
    pub(crate) fn find(&self, reference: &Reference) -> Option<&Entry> {
        let name = reference.to_string();
        self.registries
            .iter()
            .filter_map(|entry| Some((matched(&entry.prefix, &name)?, entry)))
            // Of a host and a wildcard that both match a whole host name, the host says more.
            .max_by_key(|(length, entry)| (*length, !entry.prefix.starts_with("*."), entry.prefix.len()))
            .map(|(_, entry)| entry)
    }
}

#[cfg(test)]
impl RegistriesConf {
    pub(crate) fn from_text(text: &str) -> Result<Self, String> {
        let mut conf = Self::default();
        conf.merge(text)?;
        Ok(conf)
    }
}

impl Entry {
    /// Where `reference`, which matches this entry, lives in the first place.
    pub(crate) fn primary(&self, reference: &Reference) -> Result<Location, String> {
        match &self.location {
            Some(location) => rewrite(&self.prefix, location, reference),
            None => Ok(Location {
                registry: reference.registry().to_owned(),
                repository: reference.repository().to_owned(),
            }),
        }
    }

    /// Where `mirror` has `reference`, which matches this entry.
    pub(crate) fn mirrored(&self, mirror: &Mirror, reference: &Reference) -> Result<Location, String> {
        rewrite(&self.prefix, &mirror.location, reference)
    }
}

impl Mirror {
    /// Whether `reference` may come from here.
    pub(crate) fn serves(&self, reference: &Reference) -> bool {
        match self.pull {
            PullFromMirror::All => true,
            PullFromMirror::DigestOnly => reference.digest().is_some(),
            PullFromMirror::TagOnly => reference.digest().is_none(),
        }
    }
}

/// How many characters of `name` (canonical, with tag or digest) `prefix` covers; `None` if it does not match.
fn matched(prefix: &str, name: &str) -> Option<usize> {
    if let Some(domain) = prefix.strip_prefix('*') {
        let host = name.split('/').next().unwrap_or(name);
        // `.example.com` needs something before it.
        return (host.len() > domain.len() && host.ends_with(domain)).then_some(host.len());
    }
    let rest = name.strip_prefix(prefix)?;
    let ends_a_part = match rest.bytes().next() {
        None | Some(b'/' | b'@') => true,
        // After a mere host a colon starts a port, and that is another registry.
        Some(b':') => prefix.contains('/'),
        Some(_) => false,
    };
    ends_a_part.then_some(prefix.len())
}

/// Puts `location` in the place of `prefix`; of a wildcard the whole host is replaced.
fn rewrite(prefix: &str, location: &str, reference: &Reference) -> Result<Location, String> {
    let name = reference.name();
    let rest = if prefix.starts_with("*.") {
        &name[reference.registry().len()..]
    } else {
        // Behind a mere host a colon is a port.
        let path = if prefix.contains('/') { split_version(prefix).0 } else { prefix };
        name.strip_prefix(path).unwrap_or_default()
    };
    let place = format!("{location}{rest}");
    let (registry, repository) =
        place.split_once('/').ok_or_else(|| format!("location {location:?} leaves no repository"))?;
    if !is_registry(registry) {
        return Err(format!("location {location:?} does not start with a host name"));
    }
    if !is_repository(repository) {
        return Err(format!("location {location:?} makes an invalid repository {repository:?}"));
    }
    Ok(Location { registry: registry.to_owned(), repository: repository.to_owned() })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn conf(text: &str) -> RegistriesConf {
        RegistriesConf::from_text(text).unwrap()
    }

    fn reference(name: &str) -> Reference {
        Reference::parse(name).unwrap()
    }

    #[test]
    fn the_longest_prefix_decides() {
        let conf = conf(
            r#"
            [[registry]]
            location = "example.com"
            [[registry]]
            prefix = "*.example.com"
            [[registry]]
            prefix = "*.deep.example.com"
            [[registry]]
            prefix = "a.example.com"
            [[registry]]
            prefix = "example.com/ns"
            [[registry]]
            prefix = "example.com/ns/app"
            [[registry]]
            prefix = "example.com/ns/app:v1"
            [[registry]]
            prefix = "example.com:5000"
            [[registry]]
            prefix = "docker.io/library"
            "#,
        );
        let digest = format!("example.com/ns/app@sha256:{}", "0".repeat(64));
        for (name, prefix) in [
            ("example.com/x", Some("example.com")),
            ("example.com/ns/x", Some("example.com/ns")),
            ("example.com/nsx/y", Some("example.com")),
            ("example.com/ns/app", Some("example.com/ns/app")),
            ("example.com/ns/app/more", Some("example.com/ns/app")),
            ("example.com/ns/application", Some("example.com/ns")),
            ("example.com/ns/app:v1", Some("example.com/ns/app:v1")),
            ("example.com/ns/app:v10", Some("example.com/ns/app")),
            (&digest, Some("example.com/ns/app")),
            ("example.com:5000/x", Some("example.com:5000")),
            ("example.com:5001/x", None),
            ("a.example.com/x", Some("a.example.com")),
            ("b.example.com/x", Some("*.example.com")),
            ("c.b.example.com/x", Some("*.example.com")),
            ("x.deep.example.com/x", Some("*.deep.example.com")),
            ("b.example.com:5000/x", None),
            ("notexample.com/x", None),
            ("other.net/b.example.com/x", None),
            ("busybox", Some("docker.io/library")),
            ("user/busybox", None),
        ] {
            let found = conf.find(&reference(name)).map(|entry| entry.prefix.as_str());
            assert_eq!(found, prefix, "{name}");
        }
    }

    #[test]
    fn locations_replace_prefixes() {
        let conf = conf(
            r#"
            [[registry]]
            prefix = "example.com/foo"
            location = "internal.net/bar/"
            [[registry.mirror]]
            location = "mirror.local:5000/for/foo"
            [[registry]]
            prefix = "*.wild.net"
            location = "caught.net/all"
            [[registry]]
            prefix = "kept.net"
            [[registry]]
            prefix = "pinned.net/a/b:v1"
            location = "fixed.net/c"
            [[registry]]
            prefix = "port.net:5000"
            location = "127.0.0.1:5001"
            [[registry]]
            prefix = "bad.net/x"
            location = "elsewhere.net"
            "#,
        );
        for (name, place) in [
            ("example.com/foo/image:latest", "internal.net bar/image"),
            ("example.com/foo", "internal.net bar"),
            ("x.y.wild.net/a/b", "caught.net all/a/b"),
            ("kept.net/a", "kept.net a"),
            ("port.net:5000/a/b", "127.0.0.1:5001 a/b"),
            ("pinned.net/a/b:v1", "fixed.net c"),
        ] {
            let reference = reference(name);
            let location = conf.find(&reference).unwrap().primary(&reference).unwrap();
            assert_eq!(format!("{} {}", location.registry, location.repository), place, "{name}");
        }
        let image = reference("example.com/foo/image");
        let entry = conf.find(&image).unwrap();
        let location = entry.mirrored(&entry.mirrors[0], &image).unwrap();
        assert_eq!(location.registry, "mirror.local:5000");
        assert_eq!(location.repository, "for/foo/image");
        let bad = reference("bad.net/x");
        assert!(conf.find(&bad).unwrap().primary(&bad).is_err());
    }

    #[test]
    fn mirrors_serve_what_they_may() {
        let conf = conf(
            r#"
            [[registry]]
            location = "a.net"
            [[registry.mirror]]
            location = "m.net"
            [[registry.mirror]]
            location = "m.net"
            pull-from-mirror = "digest-only"
            [[registry.mirror]]
            location = "m.net"
            pull-from-mirror = "tag-only"
            [[registry]]
            location = "b.net"
            mirror-by-digest-only = true
            [[registry.mirror]]
            location = "m.net"
            "#,
        );
        let serving = |name: &str| -> Vec<bool> {
            let reference = reference(name);
            conf.find(&reference).unwrap().mirrors.iter().map(|mirror| mirror.serves(&reference)).collect()
        };
        let digest = format!("@sha256:{}", "0".repeat(64));
        assert_eq!(serving("a.net/x"), [true, false, true]);
        assert_eq!(serving(&format!("a.net/x{digest}")), [true, true, false]);
        assert_eq!(serving("b.net/x"), [false]);
        assert_eq!(serving(&format!("b.net/x{digest}")), [true]);
    }
}
