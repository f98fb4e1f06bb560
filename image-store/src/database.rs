//! What the store remembers across restarts, in redb: images with their names, and layers. Snapshots are directories with a record of
//! their own: they must survive the daemon's death without an fsync, and mean nothing after the machine's.

use std::collections::{BTreeMap, BTreeSet};
use std::path::{Path, PathBuf};
use std::sync::{Mutex, PoisonError};

use redb::{ReadableDatabase, ReadableTable, TableDefinition};
use serde::de::DeserializeOwned;
use serde::{Deserialize, Serialize};

use crate::error::ImageError;

const VERSION: u64 = 1;
const META: TableDefinition<'_, &str, u64> = TableDefinition::new("meta");
/// `sha256:…` of the configuration (of an artifact: of the manifest) → [`ImageRecord`] as JSON.
const IMAGES: TableDefinition<'_, &str, &[u8]> = TableDefinition::new("images");
/// Short name, as it stands in pods → the reference that it turned out to mean, as a JSON string.
const SHORT_NAMES: TableDefinition<'_, &str, &[u8]> = TableDefinition::new("short_names");
/// `sha256:…` of the tar (of an artifact: a stand-in) → [`LayerRecord`] as JSON.
const LAYERS: TableDefinition<'_, &str, &[u8]> = TableDefinition::new("layers");

/// An image.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct ImageRecord {
    /// The configuration as it was pulled.
    pub(crate) config: String,
    /// Type of an OCI artifact, which has no such configuration.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub(crate) artifact: Option<String>,
    /// Compressed layers, manifest and configuration, bytes.
    pub(crate) size: u64,
    /// Diff ids, lowest first.
    pub(crate) layers: Vec<String>,
    pub(crate) repo_tags: Vec<String>,
    pub(crate) repo_digests: Vec<String>,
    /// ns since the epoch.
    pub(crate) pulled_at: i64,
}

impl ImageRecord {
    /// Tags and digests.
    pub(crate) fn names(&self) -> impl Iterator<Item = &String> {
        self.repo_tags.iter().chain(&self.repo_digests)
    }
}

/// An unpacked layer.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct LayerRecord {
    /// Bytes of file content.
    pub(crate) size: u64,
    pub(crate) inodes: u64,
    /// Digests of the compressed blobs that were seen to hold it.
    #[serde(default)]
    pub(crate) blobs: BTreeSet<String>,
}

impl LayerRecord {
    /// Adds what a later fetch found.
    pub(crate) fn merge(&mut self, later: Self) {
        self.size = later.size;
        self.inodes = later.inodes;
        self.blobs.extend(later.blobs);
    }
}

/// Everything in the database.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub(crate) struct Tables {
    pub(crate) images: BTreeMap<String, ImageRecord>,
    pub(crate) layers: BTreeMap<String, LayerRecord>,
    pub(crate) short_names: BTreeMap<String, String>,
}

/// The open database.
#[derive(Debug)]
pub(crate) struct Database {
    path: PathBuf,
    /// After an input or output error (a full disk) redb refuses everything until it is opened again: `None` then.
    redb: Mutex<Option<redb::Database>>,
}

impl Database {
    pub(crate) fn open(path: &Path) -> Result<Self, ImageError> {
        let database = Self { path: path.to_owned(), redb: Mutex::new(None) };
        // Nothing is written to a database that is all right: a start must not depend on room on the disk.
        let version = match database.attempt(version)? {
            Some(version) => version,
            None => database.attempt(initialise)?,
        };
        if version > VERSION {
            return Err(ImageError::Newer { path: path.to_owned(), version, known: VERSION });
        }
        Ok(database)
    }

    fn attempt<T>(
        &self,
        work: impl FnOnce(&redb::Database) -> Result<T, redb::Error>,
    ) -> Result<T, ImageError> {
        let mut open = self.redb.lock().unwrap_or_else(PoisonError::into_inner);
        let redb = match open.take() {
            Some(redb) => redb,
            // The cache is for large databases; this one has a page or two.
            None => redb::Builder::new()
                .set_cache_size(1 << 20)
                .create(&self.path)
                .map_err(|error| failed(&self.path, error))?,
        };
        let done = work(&redb).map_err(|error| failed(&self.path, error))?;
        *open = Some(redb);
        Ok(done)
    }

    pub(crate) fn read(&self) -> Result<Tables, ImageError> {
        self.attempt(|redb| {
            let transaction = redb.begin_read()?;
            Ok(Tables {
                images: rows(&transaction.open_table(IMAGES)?)?,
                layers: rows(&transaction.open_table(LAYERS)?)?,
                short_names: rows(&transaction.open_table(SHORT_NAMES)?)?,
            })
        })
    }

    /// Makes the database say `next` where it says `present`, durably and at once.
    pub(crate) fn replace(&self, present: &Tables, next: &Tables) -> Result<(), ImageError> {
        self.attempt(|redb| {
            let transaction = redb.begin_write()?;
            change(&mut transaction.open_table(IMAGES)?, &present.images, &next.images)?;
            change(&mut transaction.open_table(LAYERS)?, &present.layers, &next.layers)?;
            change(&mut transaction.open_table(SHORT_NAMES)?, &present.short_names, &next.short_names)?;
            transaction.commit()?;
            Ok(())
        })
    }
}

/// `None`: new, or never finished.
fn version(redb: &redb::Database) -> Result<Option<u64>, redb::Error> {
    let transaction = redb.begin_read()?;
    match transaction.open_table(META) {
        Ok(meta) => Ok(meta.get("version")?.map(|found| found.value())),
        Err(redb::TableError::TableDoesNotExist(_)) => Ok(None),
        Err(error) => Err(error.into()),
    }
}

fn initialise(redb: &redb::Database) -> Result<u64, redb::Error> {
    let transaction = redb.begin_write()?;
    transaction.open_table(IMAGES)?;
    transaction.open_table(LAYERS)?;
    transaction.open_table(SHORT_NAMES)?;
    transaction.open_table(META)?.insert("version", VERSION)?;
    transaction.commit()?;
    Ok(VERSION)
}

fn failed(path: &Path, error: impl Into<redb::Error>) -> ImageError {
    ImageError::Database { path: path.to_owned(), source: Box::new(error.into()) }
}

fn rows<R: DeserializeOwned>(
    table: &impl ReadableTable<&'static str, &'static [u8]>,
) -> Result<BTreeMap<String, R>, redb::Error> {
    let mut rows = BTreeMap::new();
    for row in table.iter()? {
        let (key, value) = row?;
        match serde_json::from_slice(value.value()) {
            Ok(record) => {
                rows.insert(key.value().to_owned(), record);
            }
            // Treated like one that was never pulled; its layers are swept.
            Err(error) => {
                tracing::error!(key = key.value(), %error, "a row of the image database cannot be read");
            }
        }
    }
    Ok(rows)
}

fn change<R: Serialize + PartialEq>(
    table: &mut redb::Table<'_, &str, &[u8]>,
    present: &BTreeMap<String, R>,
    next: &BTreeMap<String, R>,
) -> Result<(), redb::Error> {
    for key in present.keys().filter(|key| !next.contains_key(*key)) {
        table.remove(key.as_str())?;
    }
    for (key, record) in next.iter().filter(|(key, record)| present.get(*key) != Some(record)) {
        let bytes = serde_json::to_vec(record).unwrap_or_default();
        table.insert(key.as_str(), bytes.as_slice())?;
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use std::fs;
    use std::io::Write;

    use rustix::mount::{MountFlags, UnmountFlags, mount, unmount};

    use super::*;
    use crate::error::ErrorKind;
    use crate::mount::tests::privately;

    fn tables(images: usize) -> Tables {
        let record = |number: usize| ImageRecord {
            config: "x".repeat(5000),
            artifact: None,
            size: number as u64,
            layers: vec![format!("sha256:{number}")],
            repo_tags: vec![format!("registry/app:{number}")],
            repo_digests: Vec::new(),
            pulled_at: 1,
        };
        Tables {
            images: (0..images).map(|number| (format!("sha256:{number:064}"), record(number))).collect(),
            ..Tables::default()
        }
    }

    #[test]
    fn says_again_what_it_was_told() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("metadata.redb");
        let (mut before, wanted) = (Tables::default(), tables(20));
        let database = Database::open(&path).unwrap();
        database.replace(&before, &wanted).unwrap();
        before = wanted;
        let mut fewer = before.clone();
        fewer.images.retain(|_, record| record.size % 2 == 0);
        fewer.short_names.insert("app".into(), "registry/app:2".into());
        database.replace(&before, &fewer).unwrap();
        drop(database);
        assert_eq!(Database::open(&path).unwrap().read().unwrap(), fewer);
    }

    #[test]
    fn one_of_a_later_version_is_left_alone() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("metadata.redb");
        let database = Database::open(&path).unwrap();
        database
            .attempt(|redb| {
                let transaction = redb.begin_write()?;
                transaction.open_table(META)?.insert("version", VERSION + 1)?;
                Ok(transaction.commit()?)
            })
            .unwrap();
        drop(database);
        assert!(matches!(Database::open(&path), Err(ImageError::Newer { version: 2, .. })));
    }

    /// What a daemon leaves that is killed, opened where nothing can be written any more, and then again with room.
    #[test]
    fn an_unclean_one_on_a_full_disk() {
        privately(|| {
            let directory = tempfile::tempdir().unwrap();
            let path = directory.path().join("metadata.redb");
            let database = Database::open(&path).unwrap();
            database.replace(&Tables::default(), &tables(50)).unwrap();
            let unclean = fs::read(&path).unwrap();
            drop(database);

            let small = directory.path().join("small");
            fs::create_dir(&small).unwrap();
            mount("tmpfs", &small, "tmpfs", MountFlags::empty(), c"size=4m").unwrap();
            let path = small.join("metadata.redb");
            fs::write(&path, unclean).unwrap();
            let mut ballast = fs::File::create(small.join("ballast")).unwrap();
            while ballast.write_all(&[0; 4096]).is_ok() {}
            let database = Database::open(&path).expect("a full disk must not keep the daemon from starting");
            assert_eq!(database.read().unwrap(), tables(50));
            let refused = database.replace(&tables(50), &tables(500)).unwrap_err();
            assert_eq!(refused.kind(), ErrorKind::Full);
            drop(ballast);
            fs::remove_file(small.join("ballast")).unwrap();
            database.replace(&tables(50), &tables(100)).unwrap();
            drop(database);
            assert_eq!(Database::open(&path).unwrap().read().unwrap(), tables(100));
            unmount(&small, UnmountFlags::empty()).unwrap();
        });
    }
}
