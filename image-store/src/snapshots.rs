//! Writable layers of containers: a directory each, with a small record that says which layers it stands on. The record needs no
//! fsync: it must survive the daemon, and after the machine's end no container is left that it could matter to.

use std::collections::{BTreeMap, HashSet};
use std::os::unix::fs::{MetadataExt, PermissionsExt};
use std::path::{Path, PathBuf};
use std::sync::{Mutex, MutexGuard, PoisonError};

use serde::{Deserialize, Serialize};

use crate::error::ImageError;
use crate::layers::Layers;
use crate::tree;
use crate::usage::{Meter, Usage};
use crate::{FsUsage, Rootfs};

/// Longest name of a snapshot.
const KEY_MAX: usize = 128;
const RECORD: &str = "record.json";
/// Upper and work directory of a snapshot, together: so they can be shown to whoever is to join the layers elsewhere.
const WRITABLE: &str = "rw";

#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct Record {
    image: String,
    /// Diff ids, lowest first.
    pub(crate) layers: Vec<String>,
    read_only: bool,
    /// Whose pieces of images for virtual machines it has, if not those of the whole node.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub(crate) domain: Option<String>,
    /// What is written is in [`WRITABLE`]; in snapshots of older stores it is not, and nothing is shown of them as a whole.
    #[serde(default)]
    apart: bool,
}

impl Record {
    /// Upper and work directory of the snapshot that is in this directory.
    fn directories(&self, home: &Path) -> [PathBuf; 2] {
        let names = if self.apart { ["upper", "work"] } else { ["fs", "work"] };
        let home = if self.apart { home.join(WRITABLE) } else { home.to_owned() };
        names.map(|name| home.join(name))
    }
}

/// All snapshots of a store.
#[derive(Debug)]
pub(crate) struct Snapshots {
    directory: PathBuf,
    ingest: PathBuf,
    /// Held while one is made or released, so that readers of the records never wait for the disk.
    making: Mutex<()>,
    records: Mutex<BTreeMap<String, Record>>,
    meter: Meter,
}

impl Snapshots {
    /// Reads what is there; what has no readable record is removed: it was never given to a container, or the machine
    /// stopped before the record was on the disk.
    pub(crate) fn open(root: &Path) -> Result<Self, ImageError> {
        let directory = root.join("snapshots");
        let ingest = root.join("ingest");
        let mut records = BTreeMap::new();
        let entries = std::fs::read_dir(&directory).map_err(ImageError::io("read", &directory))?;
        for entry in entries.flatten() {
            let record = std::fs::read(entry.path().join(RECORD))
                .ok()
                .and_then(|bytes| serde_json::from_slice(&bytes).ok());
            match (record, entry.file_name().into_string()) {
                (Some(record), Ok(key)) => {
                    records.insert(key, record);
                }
                _ => tree::Scratch::of(&ingest, &entry.path())?.discard(),
            }
        }
        let (making, records) = (Mutex::default(), Mutex::new(records));
        Ok(Self { directory, ingest, making, records, meter: Meter::default() })
    }

    /// Names of all, sorted.
    pub(crate) fn keys(&self) -> Vec<String> {
        self.records().keys().cloned().collect()
    }

    /// Adds the diff ids that snapshots stand on.
    pub(crate) fn needed(&self, layers: &mut HashSet<String>) {
        layers.extend(self.records().values().flat_map(|record| record.layers.iter().cloned()));
    }

    /// Calls `work` with the records while no snapshot can be begun.
    pub(crate) fn while_none_begins<T>(&self, work: impl FnOnce(&BTreeMap<String, Record>) -> T) -> T {
        work(&self.records())
    }

    /// The layers that a snapshot stands on, lowest first; from now on it also has the pieces of `domain`. Blocking, without fsync.
    pub(crate) fn enter_domain(&self, key: &str, domain: Option<&str>) -> Result<Vec<String>, ImageError> {
        let _making = self.making.lock().unwrap_or_else(PoisonError::into_inner);
        let missing = || ImageError::NoSnapshot { key: key.chars().take(KEY_MAX).collect() };
        let record = self.records().get(key).cloned().ok_or_else(missing)?;
        let layers = record.layers.clone();
        if record.domain.as_deref() != domain {
            let record = Record { domain: domain.map(str::to_owned), ..record };
            let home = self.directory.join(key);
            let path = home.join("record.new");
            write(&path, &record)?;
            let to = home.join(RECORD);
            std::fs::rename(&path, &to).map_err(ImageError::io("rename to", to))?;
            self.records().insert(key.to_owned(), record);
        }
        Ok(layers)
    }

    /// Makes the snapshot, or finds it made. `layers` says which layers `image` has, if it is there; it is asked while
    /// nothing can be collected. Blocking, without fsync.
    pub(crate) fn prepare(
        &self,
        key: &str,
        image: &str,
        read_only: bool,
        store: &Layers,
        layers: impl FnOnce() -> Option<Vec<String>>,
    ) -> Result<Rootfs, ImageError> {
        let is_name = |byte: u8| byte.is_ascii_alphanumeric() || matches!(byte, b'-' | b'_' | b'.');
        if key.is_empty() || key.len() > KEY_MAX || key.starts_with('.') || !key.bytes().all(is_name) {
            return Err(ImageError::SnapshotKey { key: key.chars().take(KEY_MAX).collect() });
        }
        let _making = self.making.lock().unwrap_or_else(PoisonError::into_inner);
        let (record, is_new) = self.record(key, image, read_only, layers)?;
        if is_new && let Err(error) = self.make(key, &record, store) {
            self.records().remove(key);
            return Err(error);
        }
        let [upper, work] = record.directories(&self.directory.join(key));
        Ok(Rootfs {
            key: key.to_owned(),
            lower: record.layers.iter().rev().map(|diff_id| store.path(diff_id)).collect(),
            upper: (!read_only).then_some(upper),
            work: (!read_only).then_some(work),
        })
    }

    /// The record of a snapshot, and whether it was not there before. From now on its layers are in use.
    fn record(
        &self,
        key: &str,
        image: &str,
        read_only: bool,
        layers: impl FnOnce() -> Option<Vec<String>>,
    ) -> Result<(Record, bool), ImageError> {
        let mut records = self.records();
        match records.get(key) {
            Some(record) if record.image == image && record.read_only == read_only => {
                Ok((record.clone(), false))
            }
            // Somebody's files are in it.
            Some(_) => Err(ImageError::SnapshotTaken { key: key.to_owned() }),
            None => {
                let layers = layers().ok_or_else(|| ImageError::NotFound(image.to_owned()))?;
                let record = Record { image: image.to_owned(), layers, read_only, domain: None, apart: true };
                records.insert(key.to_owned(), record.clone());
                Ok((record, true))
            }
        }
    }

    /// Everything or nothing: it is put together elsewhere and gets its name last.
    fn make(&self, key: &str, record: &Record, store: &Layers) -> Result<(), ImageError> {
        let scratch = tree::Scratch::new(&self.ingest)?;
        if !record.read_only {
            // The root directory's owner and mode are the upper directory's (kernel, overlayfs.rst): they come from the
            // topmost layer.
            let top = record.layers.last().map(|diff_id| std::fs::metadata(store.path(diff_id)));
            let (mode, owner) = match top {
                Some(Ok(root)) => (root.mode() & 0o7777, (root.uid(), root.gid())),
                _ => (0o755, (0, 0)),
            };
            let [upper, work] = record.directories(&scratch.file(""));
            for (path, mode, owner) in [(upper, mode, owner), (work, 0o700, (0, 0))] {
                std::fs::create_dir_all(&path)
                    .and_then(|()| std::os::unix::fs::chown(&path, Some(owner.0), Some(owner.1)))
                    .and_then(|()| std::fs::set_permissions(&path, std::fs::Permissions::from_mode(mode)))
                    .map_err(ImageError::io("make", &path))?;
            }
        }
        write(&scratch.file(RECORD), record)?;
        scratch.rename(&self.directory.join(key))?;
        self.meter.set(key, Usage { bytes: 0, inodes: u64::from(!record.read_only) });
        Ok(())
    }

    /// Drops a snapshot; its files go in the background. Idempotent. Blocking.
    pub(crate) fn release(&self, key: &str) -> Result<(), ImageError> {
        let _making = self.making.lock().unwrap_or_else(PoisonError::into_inner);
        if self.records().contains_key(key) {
            match tree::Scratch::of(&self.ingest, &self.directory.join(key)) {
                Ok(scratch) => scratch.discard(),
                Err(ImageError::Io { source, .. }) if source.kind() == std::io::ErrorKind::NotFound => {}
                Err(error) => return Err(error),
            }
            self.records().remove(key);
        }
        self.meter.forget(key);
        Ok(())
    }

    /// Use of one writable layer: some seconds old, `None` if there is none, or it was not measured yet.
    pub(crate) fn usage(&self, key: &str, mountpoint: &Path) -> Option<FsUsage> {
        let record = self.records().get(key)?.clone();
        let usage = if record.read_only {
            Usage::default()
        } else {
            let [upper, _] = record.directories(&self.directory.join(key));
            self.meter.usage(key, &upper)?
        };
        Some(FsUsage {
            mountpoint: mountpoint.to_owned(),
            used_bytes: usage.bytes,
            inodes_used: usage.inodes,
        })
    }

    fn records(&self) -> MutexGuard<'_, BTreeMap<String, Record>> {
        self.records.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

fn write(path: &Path, record: &Record) -> Result<(), ImageError> {
    std::fs::write(path, serde_json::to_vec(record).unwrap_or_default())
        .map_err(ImageError::io("write", path))
}
