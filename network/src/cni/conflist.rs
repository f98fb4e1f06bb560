//! Network configurations: what a `.conflist` (or a single plugin's `.conf`) says, and which file of the directory counts.
//!
//! CNI specification 1.1.0, section 1. The directory is read again when names, sizes or times in it have changed.

use std::collections::BTreeSet;
use std::fs;
use std::io::{self, Read};
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};

use serde_json::{Map, Value, json};

/// Versions of the specification that this crate speaks. 0.3.0 differs from 0.3.1 in nothing that a runtime sees.
const VERSIONS: [(&str, Version); 5] = [
    ("0.3.0", Version(0, 3, 0)),
    ("0.3.1", Version(0, 3, 1)),
    ("0.4.0", Version(0, 4, 0)),
    ("1.0.0", Version(1, 0, 0)),
    ("1.1.0", Version(1, 1, 0)),
];
/// Largest configuration read, bytes.
const FILE_LIMIT: u64 = 1 << 20;

/// A version of the specification.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) struct Version(u8, u8, u8);

impl Version {
    /// CHECK, and `prevResult` at DEL.
    pub(crate) const CHECK: Self = Self(0, 4, 0);
    /// STATUS and GC.
    pub(crate) const STATUS: Self = Self(1, 1, 0);
}

/// Why a file is no network configuration.
#[derive(Debug, thiserror::Error)]
#[allow(missing_docs)] // the messages say it
pub(crate) enum ConflistError {
    #[error("cannot be read")]
    Read(#[source] io::Error),
    #[error("is larger than 1 MiB")]
    TooLarge,
    #[error("is not JSON")]
    Json(#[source] serde_json::Error),
    #[error("is not a JSON object")]
    NotAnObject,
    #[error("{key:?} is missing or not {expected}")]
    Field { key: &'static str, expected: &'static str },
    #[error("cniVersion {found:?} is none of 0.3.0, 0.3.1, 0.4.0, 1.0.0, 1.1.0")]
    Version { found: String },
    #[error("network name {name:?} is not letters, digits, `_`, `.` and `-` after a letter or digit")]
    Name { name: String },
    #[error("plugin type {kind:?} is not the name of a file")]
    Type { kind: String },
    #[error("has no plugins")]
    NoPlugins,
}

/// One plugin of a network.
#[derive(Debug, Clone, PartialEq)]
pub(crate) struct Plugin {
    /// Name of its program.
    pub(crate) kind: String,
    /// Runtime configuration that it wants.
    pub(crate) capabilities: BTreeSet<String>,
    configuration: Map<String, Value>,
}

/// A network: plugins that are called one after the other.
#[derive(Debug, Clone, PartialEq)]
pub(crate) struct Conflist {
    pub(crate) name: String,
    pub(crate) version: Version,
    pub(crate) version_text: &'static str,
    pub(crate) disable_check: bool,
    pub(crate) disable_gc: bool,
    pub(crate) plugins: Vec<Plugin>,
    /// As JSON again: what a cached attachment needs to be undone when the file has changed.
    pub(crate) text: Vec<u8>,
}

/// Letters, digits, `_`, `.` and `-` after a letter or digit: network names and container ids (sections 1 and 2).
pub(crate) fn well_formed(name: &str) -> bool {
    name.len() <= 200
        && name.starts_with(|first: char| first.is_ascii_alphanumeric())
        && name.bytes().all(|byte| byte.is_ascii_alphanumeric() || b"_.-".contains(&byte))
}

impl Conflist {
    /// Reads a file and, unless it says `loadOnlyInlinedPlugins`, the plugins in the folder named like the network.
    pub(crate) fn load(path: &Path) -> Result<Self, ConflistError> {
        let value = read(path)?;
        if path.extension().is_some_and(|extension| extension == "conflist") {
            let mut list = value;
            let inlined = list.get("loadOnlyInlinedPlugins").is_some_and(truth);
            let name = list.get("name").and_then(Value::as_str).filter(|name| well_formed(name));
            if let (false, Some(folder)) = (inlined, name.map(|name| path.with_file_name(name))) {
                let mut plugins = match list.get("plugins") {
                    Some(Value::Array(plugins)) => plugins.clone(),
                    _ => Vec::new(),
                };
                for file in configurations(&folder, &["conf"]).unwrap_or_default() {
                    plugins.push(read(&file)?.into());
                }
                list.insert("plugins".into(), plugins.into());
            }
            Self::parse(&list)
        } else {
            let keep = |key: &str| value.get(key).cloned().unwrap_or(Value::Null);
            let list = json!({"cniVersion": keep("cniVersion"), "name": keep("name"), "plugins": [value]});
            Self::from_json(list.to_string().as_bytes())
        }
    }

    /// The text of a conflist, complete in itself.
    pub(crate) fn from_json(text: &[u8]) -> Result<Self, ConflistError> {
        match serde_json::from_slice(text).map_err(ConflistError::Json)? {
            Value::Object(list) => Self::parse(&list),
            _ => Err(ConflistError::NotAnObject),
        }
    }

    fn parse(list: &Map<String, Value>) -> Result<Self, ConflistError> {
        let (version_text, version) = version(list)?;
        let name = text(list, "name")?;
        if !well_formed(name) {
            return Err(ConflistError::Name { name: name.to_owned() });
        }
        let Some(Value::Array(plugins)) = list.get("plugins") else {
            return Err(ConflistError::Field { key: "plugins", expected: "a list" });
        };
        if plugins.is_empty() {
            return Err(ConflistError::NoPlugins);
        }
        let plugins = plugins.iter().map(Plugin::parse).collect::<Result<_, _>>()?;
        Ok(Self {
            name: name.to_owned(),
            version,
            version_text,
            disable_check: list.get("disableCheck").is_some_and(truth),
            disable_gc: list.get("disableGC").is_some_and(truth),
            plugins,
            text: serde_json::to_vec(list).unwrap_or_default(),
        })
    }

    /// What `plugin` reads at a call: its configuration with what the runtime adds (section 3, "Deriving execution
    /// configuration"). `runtime` is every piece of runtime configuration there is.
    pub(crate) fn input(
        &self,
        plugin: &Plugin,
        runtime: &Map<String, Value>,
        more: Map<String, Value>,
    ) -> Vec<u8> {
        let mut input = plugin.configuration.clone();
        input.insert("cniVersion".into(), self.version_text.into());
        input.insert("name".into(), self.name.as_str().into());
        let wanted: Map<String, Value> = runtime
            .iter()
            .filter(|(key, _)| plugin.capabilities.contains(*key))
            .map(|(key, value)| (key.clone(), value.clone()))
            .collect();
        if !wanted.is_empty() {
            input.insert("runtimeConfig".into(), wanted.into());
        }
        input.extend(more);
        Value::from(input).to_string().into_bytes()
    }
}

impl Plugin {
    fn parse(value: &Value) -> Result<Self, ConflistError> {
        let configuration = value.as_object().ok_or(ConflistError::NotAnObject)?.clone();
        let kind = text(&configuration, "type")?.to_owned();
        if kind.is_empty() || kind == "." || kind == ".." || kind.contains(['/', '\0']) {
            return Err(ConflistError::Type { kind });
        }
        let capabilities = match configuration.get("capabilities") {
            None | Some(Value::Null) => BTreeSet::new(),
            Some(Value::Object(all)) => {
                all.iter().filter(|(_, value)| truth(value)).map(|(key, _)| key.clone()).collect()
            }
            Some(_) => return Err(ConflistError::Field { key: "capabilities", expected: "an object" }),
        };
        Ok(Self { kind, capabilities, configuration })
    }
}

/// Older configurations write booleans as strings.
fn truth(value: &Value) -> bool {
    matches!(value, Value::Bool(true)) || value.as_str().is_some_and(|text| text.eq_ignore_ascii_case("true"))
}

fn text<'a>(object: &'a Map<String, Value>, key: &'static str) -> Result<&'a str, ConflistError> {
    object.get(key).and_then(Value::as_str).ok_or(ConflistError::Field { key, expected: "a string" })
}

/// The highest of `cniVersion` and `cniVersions` that is spoken here.
fn version(list: &Map<String, Value>) -> Result<(&'static str, Version), ConflistError> {
    let first = text(list, "cniVersion")?;
    let more =
        list.get("cniVersions").and_then(Value::as_array).into_iter().flatten().filter_map(Value::as_str);
    let known = |wanted: &str| VERSIONS.iter().copied().find(|(text, _)| *text == wanted);
    let best = more.chain([first]).filter_map(known).max_by_key(|(_, version)| *version);
    best.ok_or_else(|| ConflistError::Version { found: first.to_owned() })
}

fn read(path: &Path) -> Result<Map<String, Value>, ConflistError> {
    let mut text = Vec::new();
    let file = fs::File::open(path).map_err(ConflistError::Read)?;
    file.take(FILE_LIMIT + 1).read_to_end(&mut text).map_err(ConflistError::Read)?;
    if text.len() as u64 > FILE_LIMIT {
        return Err(ConflistError::TooLarge);
    }
    match serde_json::from_slice(&text).map_err(ConflistError::Json)? {
        Value::Object(object) => Ok(object),
        _ => Err(ConflistError::NotAnObject),
    }
}

fn configurations(directory: &Path, extensions: &[&str]) -> io::Result<Vec<PathBuf>> {
    let mut found = Vec::new();
    for entry in fs::read_dir(directory)? {
        let path = entry?.path();
        if path
            .extension()
            .and_then(|extension| extension.to_str())
            .is_some_and(|it| extensions.contains(&it))
        {
            found.push(path);
        }
    }
    found.sort();
    Ok(found)
}

/// What tells one state of the directory from another.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub(crate) struct Fingerprint(Vec<(PathBuf, u64, u64, i64, i64)>);

impl Fingerprint {
    /// Of the files that count, and of those in folders beside them.
    pub(crate) fn of(directory: &Path) -> Self {
        let mut seen = Vec::new();
        let mut look = |directory: &Path, folders: &mut Vec<PathBuf>| {
            for entry in fs::read_dir(directory).into_iter().flatten().flatten() {
                let path = entry.path();
                let Ok(metadata) = fs::metadata(&path) else { continue };
                if metadata.is_dir() {
                    folders.push(path);
                } else {
                    let time = (metadata.mtime(), metadata.mtime_nsec());
                    seen.push((path, metadata.ino(), metadata.len(), time.0, time.1));
                }
            }
        };
        let mut folders = Vec::new();
        look(directory, &mut folders);
        for folder in folders {
            look(&folder, &mut Vec::new());
        }
        seen.sort();
        Self(seen)
    }
}

/// The lexically first valid configuration, or why there is none.
pub(crate) fn choose(directory: &Path) -> Result<Conflist, String> {
    let nothing = || format!("no CNI configuration in {}", directory.display());
    let files = match configurations(directory, &["conflist", "conf", "json"]) {
        Ok(files) => files,
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Err(nothing()),
        Err(error) => return Err(format!("reading {}: {error}", directory.display())),
    };
    let mut reasons = Vec::new();
    for path in files {
        match Conflist::load(&path) {
            Ok(list) => {
                if !reasons.is_empty() {
                    let skipped = reasons.join("; ");
                    tracing::warn!(chosen = %path.display(), skipped, "unusable CNI configurations skipped");
                }
                return Ok(list);
            }
            Err(error) => {
                let name = path.file_name().unwrap_or_default().to_string_lossy().into_owned();
                let cause =
                    std::error::Error::source(&error).map(|cause| format!(": {cause}")).unwrap_or_default();
                reasons.push(format!("{name} {error}{cause}"));
            }
        }
    }
    if reasons.is_empty() {
        return Err(nothing());
    }
    Err(format!("no usable CNI configuration in {}: {}", directory.display(), reasons.join("; ")))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn reason(text: &str) -> String {
        Conflist::from_json(text.as_bytes()).unwrap_err().to_string()
    }

    #[test]
    fn what_is_no_conflist_says_why() {
        for (text, part) in [
            ("", "is not JSON"),
            ("[]", "not a JSON object"),
            ("{}", "\"cniVersion\" is missing"),
            (
                r#"{"cniVersion":"0.2.0","name":"n","plugins":[{"type":"a"}]}"#,
                "cniVersion \"0.2.0\" is none of",
            ),
            (r#"{"cniVersion":1,"name":"n","plugins":[{"type":"a"}]}"#, "not a string"),
            (r#"{"cniVersion":"1.0.0","plugins":[{"type":"a"}]}"#, "\"name\" is missing"),
            (r#"{"cniVersion":"1.0.0","name":"../n","plugins":[{"type":"a"}]}"#, "network name \"../n\""),
            (r#"{"cniVersion":"1.0.0","name":"n"}"#, "\"plugins\" is missing"),
            (r#"{"cniVersion":"1.0.0","name":"n","plugins":[]}"#, "has no plugins"),
            (r#"{"cniVersion":"1.0.0","name":"n","plugins":[{}]}"#, "\"type\" is missing"),
            (r#"{"cniVersion":"1.0.0","name":"n","plugins":[{"type":"../sh"}]}"#, "plugin type \"../sh\""),
            (
                r#"{"cniVersion":"1.0.0","name":"n","plugins":[{"type":"a","capabilities":[]}]}"#,
                "\"capabilities\"",
            ),
        ] {
            assert!(reason(text).contains(part), "{text}: {}", reason(text));
        }
    }

    #[test]
    fn versions_and_old_spellings() {
        let list = |more: &str| {
            let text = format!(r#"{{"cniVersion":"0.4.0","name":"n","plugins":[{{"type":"a"}}]{more}}}"#);
            Conflist::from_json(text.as_bytes()).unwrap()
        };
        assert_eq!(list("").version_text, "0.4.0");
        assert_eq!(list(r#","cniVersions":["0.3.1","1.1.0","9.9.9"]"#).version_text, "1.1.0");
        assert!(list(r#","disableCheck":"true""#).disable_check);
        assert!(list(r#","disableGC":true"#).disable_gc);
        let again = Conflist::from_json(&list("").text).unwrap();
        assert_eq!(again, list(""));
    }

    #[test]
    fn a_plugin_reads_what_it_declared() {
        let text = br#"{"cniVersion":"1.0.0","name":"n","plugins":[
            {"type":"a","capabilities":{"portMappings":true,"bandwidth":false},"mtu":9000}]}"#;
        let list = Conflist::from_json(text).unwrap();
        let runtime = json!({"portMappings":[1],"bandwidth":{},"dns":{}});
        let more = json!({"prevResult":{"ips":[]}});
        let input =
            list.input(&list.plugins[0], runtime.as_object().unwrap(), more.as_object().unwrap().clone());
        let expected = json!({
            "type":"a", "capabilities":{"portMappings":true,"bandwidth":false}, "mtu":9000,
            "cniVersion":"1.0.0", "name":"n", "runtimeConfig":{"portMappings":[1]}, "prevResult":{"ips":[]},
        });
        assert_eq!(serde_json::from_slice::<Value>(&input).unwrap(), expected);
    }

    #[test]
    fn the_first_valid_file_counts() {
        let root = tempfile::tempdir().unwrap();
        let write = |name: &str, text: &str| fs::write(root.path().join(name), text).unwrap();
        assert!(choose(&root.path().join("missing")).unwrap_err().starts_with("no CNI configuration in "));
        write("00-notes.txt", "{");
        assert!(choose(root.path()).unwrap_err().starts_with("no CNI configuration in "));
        write("05-broken.conflist", "{");
        let reason = choose(root.path()).unwrap_err();
        assert!(reason.contains("05-broken.conflist is not JSON: EOF"), "{reason}");
        let before = Fingerprint::of(root.path());
        write("20-later.conflist", r#"{"cniVersion":"1.0.0","name":"later","plugins":[{"type":"a"}]}"#);
        assert_ne!(Fingerprint::of(root.path()), before);
        assert_eq!(choose(root.path()).unwrap().name, "later");
        write("10-single.conf", r#"{"cniVersion":"0.3.1","name":"single","type":"b","x":1}"#);
        let single = choose(root.path()).unwrap();
        assert_eq!((single.name.as_str(), single.plugins[0].kind.as_str()), ("single", "b"));
        // A folder named like the network adds plugins, and its changes are seen.
        write("07-folder.conflist", r#"{"cniVersion":"1.1.0","name":"folder","plugins":[{"type":"a"}]}"#);
        let before = Fingerprint::of(root.path());
        fs::create_dir(root.path().join("folder")).unwrap();
        write("folder/10-b.conf", r#"{"type":"b"}"#);
        assert_ne!(Fingerprint::of(root.path()), before);
        let folder = choose(root.path()).unwrap();
        assert_eq!(folder.plugins.iter().map(|plugin| plugin.kind.as_str()).collect::<Vec<_>>(), ["a", "b"]);
        assert_eq!(Conflist::from_json(&folder.text).unwrap(), folder);
    }

    #[test]
    fn a_huge_file_is_not_read() {
        let root = tempfile::tempdir().unwrap();
        fs::write(root.path().join("a.conflist"), vec![b' '; 2 << 20]).unwrap();
        assert!(choose(root.path()).unwrap_err().contains("larger than 1 MiB"));
    }
}
