//! Writable layers of containers: a directory each, with a small record that says which layers it stands on. The record needs no
//! fsync: it must survive the daemon, and after the machine's end no container is left that it could matter to.

use std::collections::{HashMap, HashSet};
use std::os::unix::fs::{MetadataExt, PermissionsExt};
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use serde::{Deserialize, Serialize};

use crate::error::ImageError;
use crate::layers::Layers;
use crate::tree;
use crate::{FsUsage, Rootfs};

/// Older measurements are renewed when somebody asks.
const FRESH: Duration = Duration::from_secs(10);

#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
struct Record {
    image: String,
    /// Diff ids, lowest first.
    layers: Vec<String>,
    read_only: bool,
}

/// All snapshots of a store.
#[derive(Debug)]
pub(crate) struct Snapshots {
    directory: PathBuf,
    ingest: PathBuf,
    records: Mutex<HashMap<String, Record>>,
    measured: Arc<Mutex<HashMap<String, Measured>>>,
}

#[derive(Debug, Clone)]
struct Measured {
    at: Instant,
    usage: FsUsage,
    renewing: bool,
}

impl Snapshots {
    /// Reads what is there; what has no readable record is removed.
    pub(crate) fn open(root: &Path) -> Result<Self, ImageError> {
        let directory = root.join("snapshots");
        let ingest = root.join("ingest");
        let mut records = HashMap::new();
        let entries = std::fs::read_dir(&directory).map_err(ImageError::io("read", &directory))?;
        for entry in entries.flatten() {
            let record = std::fs::read(entry.path().join("record.json"))
                .ok()
                .and_then(|bytes| serde_json::from_slice(&bytes).ok());
            match (record, entry.file_name().into_string()) {
                (Some(record), Ok(key)) => {
                    records.insert(key, record);
                }
                _ => tree::Scratch::of(&ingest, &entry.path())?.discard(),
            }
        }
        Ok(Self { directory, ingest, records: Mutex::new(records), measured: Arc::default() })
    }

    pub(crate) fn keys(&self) -> Vec<String> {
        self.records.lock().expect("no panic under this lock").keys().cloned().collect()
    }

    /// Adds the diff ids that snapshots stand on.
    pub(crate) fn needed(&self, layers: &mut HashSet<String>) {
        for record in self.records.lock().expect("no panic under this lock").values() {
            layers.extend(record.layers.iter().cloned());
        }
    }

    /// Makes the snapshot, or finds it made. Blocking, without fsync.
    pub(crate) fn prepare(
        &self,
        key: &str,
        image: &str,
        layers: &[String],
        read_only: bool,
        store: &Layers,
    ) -> Result<Rootfs, ImageError> {
        let wanted = Record { image: image.to_owned(), layers: layers.to_vec(), read_only };
        let home = self.directory.join(key);
        let mut records = self.records.lock().expect("no panic under this lock");
        if records.get(key) != Some(&wanted) {
            let scratch = tree::Scratch::new(&self.ingest)?;
            let made = |name: &str| self.make(&scratch, name, store, layers.last());
            if !read_only {
                made("fs")?;
                made("work")?;
            }
            let record = scratch.file("record.json");
            std::fs::write(&record, serde_json::to_vec(&wanted).unwrap_or_default())
                .map_err(ImageError::io("write", &record))?;
            if records.remove(key).is_some() {
                tree::Scratch::of(&self.ingest, &home)?.discard();
            }
            scratch.rename(&home)?;
            records.insert(key.to_owned(), wanted);
        }
        drop(records);
        Ok(Rootfs {
            key: key.to_owned(),
            lower: layers.iter().rev().map(|diff_id| store.path(diff_id)).collect(),
            upper: (!read_only).then(|| home.join("fs")),
            work: (!read_only).then(|| home.join("work")),
        })
    }

    /// The root directory's owner and mode are the upper directory's (kernel, overlayfs.rst): they come from the topmost layer.
    fn make(
        &self,
        scratch: &tree::Scratch,
        name: &str,
        store: &Layers,
        top: Option<&String>,
    ) -> Result<(), ImageError> {
        let path = scratch.file(name);
        std::fs::create_dir(&path).map_err(ImageError::io("make", &path))?;
        let (mode, owner) = match top.map(|diff_id| std::fs::metadata(store.path(diff_id))) {
            Some(Ok(root)) => (root.mode() & 0o7777, (root.uid(), root.gid())),
            _ => (0o755, (0, 0)),
        };
        std::os::unix::fs::chown(&path, Some(owner.0), Some(owner.1))
            .and_then(|()| std::fs::set_permissions(&path, std::fs::Permissions::from_mode(mode)))
            .map_err(ImageError::io("set owner and mode of", &path))
    }

    /// Drops a snapshot. Idempotent. Blocking.
    pub(crate) fn release(&self, key: &str) -> Result<(), ImageError> {
        let mut records = self.records.lock().expect("no panic under this lock");
        if records.contains_key(key) {
            tree::Scratch::of(&self.ingest, &self.directory.join(key))?.discard();
            records.remove(key);
        }
        self.measured.lock().expect("no panic under this lock").remove(key);
        Ok(())
    }

    /// Use of one writable layer: measured when first asked for, renewed in the background later.
    pub(crate) fn usage(&self, key: &str, mountpoint: &Path) -> Option<FsUsage> {
        if !self.records.lock().expect("no panic under this lock").contains_key(key) {
            return None;
        }
        let upper = self.directory.join(key).join("fs");
        let mut measured = self.measured.lock().expect("no panic under this lock");
        if let Some(last) = measured.get_mut(key) {
            if last.at.elapsed() > FRESH && !last.renewing {
                last.renewing = true;
                let (key, mountpoint, all) = (key.to_owned(), mountpoint.to_owned(), self.measured.clone());
                let _ = std::thread::Builder::new().name("measure".into()).spawn(move || {
                    let usage = measure(&upper, &mountpoint);
                    let mut all = all.lock().expect("no panic under this lock");
                    if let Some(entry) = all.get_mut(&key) {
                        *entry = Measured { at: Instant::now(), usage, renewing: false };
                    }
                });
            }
            return Some(last.usage.clone());
        }
        drop(measured);
        let usage = measure(&upper, mountpoint);
        let fresh = Measured { at: Instant::now(), usage: usage.clone(), renewing: false };
        self.measured.lock().expect("no panic under this lock").insert(key.to_owned(), fresh);
        Some(usage)
    }
}

fn measure(upper: &Path, mountpoint: &Path) -> FsUsage {
    let (used_bytes, inodes_used) = tree::usage(upper);
    FsUsage { mountpoint: mountpoint.to_owned(), used_bytes, inodes_used }
}
