//! Reading one file and laying it over those before it.

use std::collections::{BTreeMap, BTreeSet};

use serde::Deserialize;

use super::{Entry, Mirror, PullFromMirror, RegistriesConf, ShortNameMode};
use crate::reference::{Reference, is_registry, split_version};

/// Unknown keys are left alone: the file is shared with other tools.
#[derive(Deserialize)]
#[serde(rename_all = "kebab-case")]
struct File {
    unqualified_search_registries: Option<Vec<String>>,
    short_name_mode: Option<String>,
    credential_helpers: Option<Vec<String>>,
    aliases: Option<BTreeMap<String, String>>,
    #[serde(default)]
    registry: Vec<FileEntry>,
    /// `[registries.search]` and its like: version 1.
    registries: Option<toml::Value>,
}

#[derive(Deserialize)]
#[serde(rename_all = "kebab-case")]
struct FileEntry {
    prefix: Option<String>,
    location: Option<String>,
    #[serde(default)]
    insecure: bool,
    #[serde(default)]
    blocked: bool,
    #[serde(default)]
    mirror_by_digest_only: bool,
    #[serde(default)]
    mirror: Vec<FileMirror>,
}

#[derive(Deserialize)]
#[serde(rename_all = "kebab-case")]
struct FileMirror {
    location: Option<String>,
    #[serde(default)]
    insecure: bool,
    pull_from_mirror: Option<String>,
}

impl RegistriesConf {
    /// Lays the file `text` over what is there: lists and modes replace, aliases are added (an empty one is
    /// erased), a `[[registry]]` replaces one of the same prefix. On an error `self` may be half changed.
    pub(super) fn merge(&mut self, text: &str) -> Result<(), String> {
        let file: File = toml::from_str(text).map_err(|error| located(text, &error))?;
        if file.registries.is_some() {
            return Err("version 1 ([registries.search], [registries.insecure], [registries.block]) is not \
                        understood; write [[registry]] tables"
                .to_owned());
        }
        if let Some(search) = file.unqualified_search_registries {
            for registry in &search {
                // A bare word would read as the first part of a repository.
                if !is_registry(registry) || Reference::is_short(&format!("{registry}/x")) {
                    return Err(format!("unqualified-search-registries: {registry:?} is no registry"));
                }
            }
            self.search = Some(search);
        }
        match file.short_name_mode.as_deref() {
            None => {}
            Some("" | "permissive") => self.short_name_mode = ShortNameMode::Permissive,
            Some("enforcing") => self.short_name_mode = ShortNameMode::Enforcing,
            Some("disabled") => self.short_name_mode = ShortNameMode::Disabled,
            Some(other) => {
                return Err(format!("short-name-mode: {other:?} is none of enforcing, permissive, disabled"));
            }
        }
        if let Some(helpers) = file.credential_helpers {
            self.credential_helpers = helpers;
        }
        for (name, target) in file.aliases.unwrap_or_default() {
            check_alias(&name, &target)?;
            if target.is_empty() {
                self.aliases.remove(&name);
            } else {
                self.aliases.insert(name, target);
            }
        }
        let mut seen = BTreeSet::new();
        for entry in file.registry {
            let entry = entry.checked()?;
            if !seen.insert(entry.prefix.clone()) {
                return Err(format!("[[registry]] {:?} stands twice in one file", entry.prefix));
            }
            match self.registries.iter_mut().find(|known| known.prefix == entry.prefix) {
                Some(known) => *known = entry,
                None => self.registries.push(entry),
            }
        }
        Ok(())
    }
}

impl FileEntry {
    fn checked(self) -> Result<Entry, String> {
        let location = self.location.filter(|location| !location.is_empty());
        let prefix = match (self.prefix.filter(|prefix| !prefix.is_empty()), &location) {
            (Some(prefix), _) => prefix,
            (None, Some(location)) => location.clone(),
            (None, None) => return Err("[[registry]] has neither prefix nor location".to_owned()),
        };
        let prefix = place(&prefix, "prefix", true)?;
        let wildcard = prefix.starts_with("*.");
        let location = location.map(|location| place(&location, "location", wildcard)).transpose()?;
        let mut mirrors = Vec::with_capacity(self.mirror.len());
        for mirror in self.mirror {
            let location = mirror.location.filter(|location| !location.is_empty());
            let location =
                location.ok_or_else(|| format!("a [[registry.mirror]] of {prefix:?} has no location"))?;
            let location = place(&location, "mirror location", false)?;
            let pull = match (mirror.pull_from_mirror.as_deref(), self.mirror_by_digest_only) {
                (None | Some("" | "all"), false) => PullFromMirror::All,
                (None | Some(""), true) | (Some("digest-only"), false) => PullFromMirror::DigestOnly,
                (Some("tag-only"), false) => PullFromMirror::TagOnly,
                (Some(_), true) => {
                    return Err(format!(
                        "{prefix:?} has mirror-by-digest-only, its mirrors can have no pull-from-mirror"
                    ));
                }
                (Some(other), false) => {
                    return Err(format!("pull-from-mirror: {other:?} is none of all, digest-only, tag-only"));
                }
            };
            mirrors.push(Mirror { location, insecure: mirror.insecure, pull });
        }
        // A wildcard that is its own location means: wherever the name says.
        let location = location.filter(|location| *location != prefix);
        Ok(Entry { prefix, location, insecure: self.insecure, blocked: self.blocked, mirrors })
    }
}

/// Checks a `host[:port][/path]`; with `wildcard` a `*.host` will do.
fn place(text: &str, key: &str, wildcard: bool) -> Result<String, String> {
    let text = text.trim_end_matches('/');
    if text.contains("://") {
        return Err(format!("{key} {text:?}: write it without a scheme"));
    }
    if let Some(domain) = text.strip_prefix("*.") {
        if !wildcard {
            return Err(format!("{key} {text:?}: a wildcard can only be a prefix"));
        }
        if !is_registry(domain) {
            return Err(format!("{key} {text:?}: a wildcard is *. and a host name, nothing else"));
        }
        return Ok(text.to_owned());
    }
    let (host, path) = text.split_once('/').unwrap_or((text, "x"));
    // Tags and digests may follow the path.
    let (path, _) = split_version(path);
    if !is_registry(host) || !crate::reference::is_repository(path) {
        return Err(format!("{key} {text:?} is no host[:port][/path]"));
    }
    Ok(text.to_owned())
}

fn check_alias(name: &str, target: &str) -> Result<(), String> {
    let bare = |text: &str| split_version(text).1.is_empty();
    if !Reference::is_short(name) || !bare(name) || Reference::parse(name).is_err() {
        return Err(format!("[aliases] {name:?} is no short name without tag"));
    }
    if !target.is_empty()
        && (Reference::is_short(target) || !bare(target) || Reference::parse(target).is_err())
    {
        return Err(format!("[aliases] {name:?}: {target:?} is no full name without tag"));
    }
    Ok(())
}

fn located(text: &str, error: &toml::de::Error) -> String {
    let line = error.span().map(|span| text[..span.start.min(text.len())].matches('\n').count() + 1);
    let message = error.message().replace('\n', " ");
    match line {
        Some(line) => format!("line {line}: {message}"),
        None => message,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn later_files_win() {
        let mut conf = RegistriesConf::default();
        conf.merge(
            r#"
            unqualified-search-registries = ["a.net", "b.net:5000"]
            short-name-mode = "enforcing"
            credential-helpers = ["containers-auth.json", "ecr-login"]
            additional-layer-store-auth-helper = "unknown keys are left alone"
            [aliases]
            one = "a.net/one"
            two = "a.net/two"
            [[registry]]
            prefix = "x.net"
            blocked = true
            [[registry]]
            prefix = "y.net"
            insecure = true
            "#,
        )
        .unwrap();
        conf.merge(
            r#"
            unqualified-search-registries = ["c.net"]
            [aliases]
            one = ""
            three = "c.net/ns/three"
            [[registry]]
            prefix = "x.net"
            "#,
        )
        .unwrap();
        assert_eq!(conf.search.as_deref(), Some(&["c.net".to_owned()][..]));
        assert_eq!(conf.short_name_mode, ShortNameMode::Enforcing);
        assert_eq!(conf.credential_helpers, ["containers-auth.json", "ecr-login"]);
        assert_eq!(conf.aliases.keys().collect::<Vec<_>>(), ["three", "two"]);
        let flags: Vec<_> =
            conf.registries.iter().map(|e| (e.prefix.as_str(), e.blocked, e.insecure)).collect();
        assert_eq!(flags, [("x.net", false, false), ("y.net", false, true)]);
    }

    #[test]
    fn errors_say_where_and_what() {
        for (text, part) in [
            ("a = [", "line 1"),
            ("\n\nshort-name-mode = 3", "line 3"),
            ("short-name-mode = \"loud\"", "enforcing, permissive, disabled"),
            ("unqualified-search-registries = [\"https://a\"]", "no registry"),
            ("[[registry]]\nblocked = true", "neither prefix nor location"),
            ("[[registry]]\nlocation = \"https://a.net\"", "without a scheme"),
            ("[[registry]]\nlocation = \"a b\"", "host[:port]"),
            ("[[registry]]\nprefix = \"*.a.net/x\"", "wildcard"),
            ("[[registry]]\nprefix = \"a.net\"\nlocation = \"*.b.net\"", "wildcard"),
            ("[[registry]]\nprefix = \"a.net\"\n[[registry]]\nprefix = \"a.net/\"", "twice"),
            ("[[registry]]\nprefix = \"a.net\"\n[[registry.mirror]]\ninsecure = true", "no location"),
            (
                "[[registry]]\nprefix = \"a.net\"\n[[registry.mirror]]\nlocation = \"m\"\npull-from-mirror = \"x\"",
                "digest-only",
            ),
            (
                "[[registry]]\nprefix = \"a.net\"\nmirror-by-digest-only = true\n[[registry.mirror]]\nlocation = \"m\"\npull-from-mirror = \"all\"",
                "mirror-by-digest-only",
            ),
            ("[aliases]\n\"a.net/x\" = \"b.net/x\"", "short name"),
            ("[aliases]\nx = \"y\"", "full name"),
            ("[aliases]\nx = \"a.net/y:1\"", "without tag"),
            ("[registries.search]\nregistries = [\"a\"]", "version 1"),
        ] {
            let error = RegistriesConf::default().merge(text).expect_err(text);
            assert!(error.contains(part), "{text:?}: {error}");
        }
    }
}
