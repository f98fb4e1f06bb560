//! Attachments on disk, in libcni's format: what DEL, CHECK and GC need after a restart.
//!
//! An entry without result is written before the first ADD, with the network's configuration in it: whatever happens then,
//! what was begun can be undone with the plugins it was begun with. libcni takes such an entry for one it cannot use.
//! Other runtimes may share the directory; entries of ours carry a mark, and only those are ever removed unasked.

use std::fs;
use std::io;
use std::os::unix::fs::DirBuilderExt;
use std::path::{Path, PathBuf};

use base64::Engine;
use base64::engine::general_purpose::STANDARD;
use serde::{Deserialize, Serialize};
use serde_json::{Map, Value};

use super::CniError;
use super::conflist::Conflist;

const KIND: &str = "cniCacheV1";
const OWNER: &str = "podvisor";

/// One attachment.
#[derive(Debug, Clone, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub(crate) struct Entry {
    pub(crate) kind: String,
    pub(crate) container_id: String,
    /// The conflist, base64 as Go writes bytes.
    pub(crate) config: String,
    pub(crate) if_name: String,
    pub(crate) network_name: String,
    #[serde(default)]
    pub(crate) netns: String,
    #[serde(default)]
    pub(crate) cni_args: Vec<(String, String)>,
    #[serde(default)]
    pub(crate) capability_args: Map<String, Value>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub(crate) result: Option<Map<String, Value>>,
    /// Not libcni's.
    #[serde(default)]
    owner: String,
}

impl Entry {
    pub(crate) fn new(list: &Conflist, id: &str, interface: &str) -> Self {
        Self {
            kind: KIND.to_owned(),
            container_id: id.to_owned(),
            config: STANDARD.encode(&list.text),
            if_name: interface.to_owned(),
            network_name: list.name.clone(),
            netns: String::new(),
            cni_args: Vec::new(),
            capability_args: Map::new(),
            result: None,
            owner: OWNER.to_owned(),
        }
    }

    /// The configuration that the attachment was made with.
    pub(crate) fn conflist(&self) -> Option<Conflist> {
        Conflist::from_json(&STANDARD.decode(&self.config).ok()?).ok()
    }

    pub(crate) fn is_ours(&self) -> bool {
        self.owner == OWNER
    }
}

/// The directory of entries.
#[derive(Debug)]
pub(crate) struct Cache {
    directory: PathBuf,
}

impl Cache {
    pub(crate) fn new(cache_dir: &Path) -> Self {
        Self { directory: cache_dir.join("results") }
    }

    /// Writes or replaces an entry.
    pub(crate) fn write(&self, entry: &Entry) -> Result<(), CniError> {
        let name = format!("{}-{}-{}", entry.network_name, entry.container_id, entry.if_name);
        let path = self.directory.join(&name);
        let temporary = self.directory.join(format!(".{name}"));
        fs::DirBuilder::new()
            .recursive(true)
            .mode(0o700)
            .create(&self.directory)
            .and_then(|()| fs::write(&temporary, serde_json::to_vec(entry)?))
            .and_then(|()| fs::rename(&temporary, &path))
            .map_err(|source| {
                let _ = fs::remove_file(&temporary);
                CniError::Cache { what: "writing", path, source }
            })
    }

    /// The entries of one sandbox: one, unless the network's name has changed between two attempts.
    pub(crate) fn of(&self, id: &str, interface: &str) -> Result<Vec<(PathBuf, Entry)>, CniError> {
        let mut entries = self.all(|name| name.ends_with(&format!("-{id}-{interface}")))?;
        entries.retain(|(_, entry)| entry.container_id == id && entry.if_name == interface);
        Ok(entries)
    }

    /// All entries whose file name is wanted. One that cannot be understood is passed over, as libcni does.
    pub(crate) fn all(&self, wanted: impl Fn(&str) -> bool) -> Result<Vec<(PathBuf, Entry)>, CniError> {
        let failed = |path: &Path, source| CniError::Cache { what: "reading", path: path.to_owned(), source };
        let files = match fs::read_dir(&self.directory) {
            Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(Vec::new()),
            files => files.map_err(|source| failed(&self.directory, source))?,
        };
        let mut entries = Vec::new();
        for file in files {
            let file = file.map_err(|source| failed(&self.directory, source))?;
            let name = file.file_name();
            let Some(name) = name.to_str().filter(|name| !name.starts_with('.') && wanted(name)) else {
                continue;
            };
            let path = self.directory.join(name);
            let text = match fs::read(&path) {
                Err(error) if error.kind() == io::ErrorKind::NotFound => continue,
                text => text.map_err(|source| failed(&path, source))?,
            };
            match serde_json::from_slice::<Entry>(&text) {
                Ok(entry) if entry.kind == KIND => entries.push((path, entry)),
                _ => tracing::warn!(path = %path.display(), "cached CNI result cannot be understood"),
            }
        }
        Ok(entries)
    }

    pub(crate) fn remove(path: &Path) -> Result<(), CniError> {
        match fs::remove_file(path) {
            Err(error) if error.kind() != io::ErrorKind::NotFound => {
                Err(CniError::Cache { what: "removing", path: path.to_owned(), source: error })
            }
            _ => Ok(()),
        }
    }
}
