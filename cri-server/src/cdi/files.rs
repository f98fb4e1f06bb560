//! Vendors' files as they are now. A file is read again when it looks changed; nobody watches the directories.

use std::collections::BTreeMap;
use std::fs::Metadata;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, PoisonError};

use podvisor_spec::cdi::Document;

use super::yaml;

/// Larger ones are not CDI's.
const FILE_MAX: u64 = 16 << 20;

/// What tells a file from the one that was read: name and content both show in it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct Stamp {
    device: u64,
    inode: u64,
    size: u64,
    modified: (i64, i64),
    changed: (i64, i64),
}

/// A file that was read, or why it cannot be.
type Read = Result<Arc<Document>, String>;

/// What was read, by path.
#[derive(Debug, Default)]
pub(super) struct Files {
    known: Mutex<BTreeMap<PathBuf, (Stamp, Read)>>,
}

/// One device as the files have it.
#[derive(Debug, Clone)]
pub(super) struct Known {
    pub(super) document: Arc<Document>,
    /// Position in the document.
    pub(super) device: usize,
    /// Position of its directory: a later one has priority.
    priority: usize,
    pub(super) path: PathBuf,
}

/// All devices by qualified name, and what is wrong.
#[derive(Debug, Default)]
pub(super) struct Devices {
    pub(super) known: BTreeMap<String, Known>,
    /// Names that two files of the same directory have.
    pub(super) conflicts: BTreeMap<String, [PathBuf; 2]>,
    /// Files and directories that cannot be read, and why.
    pub(super) unreadable: Vec<(PathBuf, String)>,
}

impl Files {
    /// What the directories hold now, the later ones before the earlier. Blocking.
    pub(super) fn devices(&self, directories: &[PathBuf]) -> Devices {
        let mut known = self.known.lock().unwrap_or_else(PoisonError::into_inner);
        let before = std::mem::take(&mut *known);
        let mut devices = Devices::default();
        for (priority, directory) in directories.iter().enumerate() {
            let paths = match specs(directory) {
                Ok(paths) => paths,
                Err(error) => {
                    devices.unreadable.push((directory.clone(), error.to_string()));
                    continue;
                }
            };
            for path in paths {
                let Ok(metadata) = std::fs::metadata(&path) else { continue };
                if !metadata.is_file() {
                    continue;
                }
                let stamp = Stamp::of(&metadata);
                let read = match before.get(&path) {
                    Some((known, read)) if *known == stamp => read.clone(),
                    _ => read(&path),
                };
                match &read {
                    Ok(document) => devices.add(document, priority, &path),
                    Err(why) => devices.unreadable.push((path.clone(), why.clone())),
                }
                known.insert(path, (stamp, read));
            }
        }
        for name in devices.conflicts.keys() {
            devices.known.remove(name);
        }
        devices
    }
}

impl Devices {
    fn add(&mut self, document: &Arc<Document>, priority: usize, path: &Path) {
        for (device, described) in document.devices.iter().enumerate() {
            let name = format!("{}={}", document.kind, described.name.0);
            let found = Known { document: document.clone(), device, priority, path: path.to_owned() };
            match self.known.get(&name) {
                Some(other) if other.priority == priority => {
                    self.conflicts.insert(name, [other.path.clone(), found.path]);
                }
                // Whatever two files of an earlier directory say: this one decides.
                _ => {
                    self.conflicts.remove(&name);
                    self.known.insert(name, found);
                }
            }
        }
    }
}

/// Files of one directory that may be specs, in order; a directory that is not there has none.
fn specs(directory: &Path) -> std::io::Result<Vec<PathBuf>> {
    let entries = match std::fs::read_dir(directory) {
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => return Ok(Vec::new()),
        entries => entries?,
    };
    let is_spec = |path: &PathBuf| path.extension().is_some_and(|end| end == "json" || end == "yaml");
    let mut paths: Vec<_> = entries.flatten().map(|entry| entry.path()).filter(is_spec).collect();
    paths.sort();
    Ok(paths)
}

fn read(path: &Path) -> Read {
    use std::io::Read as _;
    let mut text = String::new();
    let file = std::fs::File::open(path).map_err(|error| error.to_string())?;
    file.take(FILE_MAX + 1).read_to_string(&mut text).map_err(|error| error.to_string())?;
    if text.len() as u64 > FILE_MAX {
        return Err(format!("has more than {FILE_MAX} bytes"));
    }
    let document: Document = if path.extension().is_some_and(|end| end == "json") {
        serde_json::from_str(&text).map_err(|error| error.to_string())?
    } else {
        serde_json::from_value(yaml::parse(&text)?).map_err(|error| error.to_string())?
    };
    document.check().map_err(|error| error.to_string())?;
    Ok(Arc::new(document))
}

impl Stamp {
    fn of(metadata: &Metadata) -> Self {
        Self {
            device: metadata.dev(),
            inode: metadata.ino(),
            size: metadata.len(),
            modified: (metadata.mtime(), metadata.mtime_nsec()),
            changed: (metadata.ctime(), metadata.ctime_nsec()),
        }
    }
}
