//! The images there are. Changes go one after the other through the database; readers see the last published state.

use std::collections::{BTreeMap, BTreeSet, HashMap, HashSet};
use std::fs::File;
use std::path::{Path, PathBuf};
use std::sync::{Arc, RwLock};
use std::time::{SystemTime, UNIX_EPOCH};

use futures_util::{StreamExt, TryStreamExt};
use oci_spec::image::ImageConfiguration;
use podvisor_registry::{Credentials, Reference, Registry, ResolvedImage};

use crate::database::{Database, ImageRecord, LayerRecord, Tables};
use crate::error::ImageError;
use crate::flight::Flights;
use crate::layers::Layers;
use crate::snapshots::Snapshots;
use crate::{FsUsage, Image, Options, Rootfs, mount, tree};

/// Digits of a shortened id that are worth looking for.
const SHORTEST_ID: usize = 3;

type PullKey = (String, Option<Credentials>);

/// The store. Cheap to clone.
#[derive(Debug, Clone)]
pub struct ImageStore {
    shared: Arc<Shared>,
}

#[derive(Debug)]
struct Shared {
    options: Options,
    registry: Registry,
    layers: Arc<Layers>,
    snapshots: Snapshots,
    database: Database,
    /// What the database says; held while it is changed.
    tables: tokio::sync::Mutex<Tables>,
    /// What readers see.
    published: RwLock<Arc<BTreeMap<String, Image>>>,
    pinned: RwLock<HashSet<String>>,
    pulls: Flights<PullKey, Result<String, Arc<ImageError>>>,
    /// Locked as long as the store is open.
    _lock: File,
}

impl ImageStore {
    /// Opens or creates the store and removes what a crash left half done.
    pub async fn open(options: Options) -> Result<Self, ImageError> {
        let registry = Registry::new(options.registry.clone())
            .map_err(|source| ImageError::Registry { name: String::new(), source })?;
        blocking(move || Self::open_blocking(options, registry)).await
    }

    fn open_blocking(options: Options, registry: Registry) -> Result<Self, ImageError> {
        let root = &options.root;
        for name in ["", "layers", "ingest", "snapshots", "empty"] {
            let path = root.join(name);
            std::fs::create_dir_all(&path).map_err(ImageError::io("make", path))?;
        }
        let lock = lock(root)?;
        sweep_ingest(&root.join("ingest"))?;
        let database = Database::open(&root.join("metadata.redb"))?;
        let found = database.read()?;
        let snapshots = Snapshots::open(root)?;
        let (tables, present) = reconcile(root, &found)?;
        if tables != found {
            database.replace(&found, &tables)?;
        }
        let layers = Layers::new(root, present);
        let store = Self {
            shared: Arc::new(Shared {
                options,
                registry,
                layers,
                snapshots,
                database,
                published: RwLock::default(),
                pinned: RwLock::default(),
                pulls: Flights::default(),
                tables: tokio::sync::Mutex::new(Tables::default()),
                _lock: lock,
            }),
        };
        store.publish(&tables);
        store.collect(&tables);
        *store.shared.tables.blocking_lock() = tables;
        Ok(store)
    }

    /// Pulls `name` and returns the image. The same image or layer wanted twice at once is fetched once. Dropping the future
    /// cancels the pull (unless another caller waits for it) and leaves nothing.
    pub async fn pull(&self, name: &str, credentials: Option<Credentials>) -> Result<Image, ImageError> {
        loop {
            let (store, key) = (self.clone(), (name.to_owned(), credentials.clone()));
            let work = {
                let (name, credentials) = key.clone();
                move || async move { store.fetch(&name, credentials.as_ref()).await.map_err(Arc::new) }
            };
            match self.shared.pulls.join(key, work).await {
                Some(Ok(id)) => return self.get(&id).ok_or_else(|| ImageError::NotFound(name.to_owned())),
                Some(Err(error)) => return Err(ImageError::Shared(error)),
                None => {}
            }
        }
    }

    async fn fetch(&self, name: &str, credentials: Option<&Credentials>) -> Result<String, ImageError> {
        let shared = &self.shared;
        let failed = |source| ImageError::Registry { name: name.to_owned(), source };
        let candidates = shared.registry.candidates(name).await.map_err(failed)?;
        let mut resolved = None;
        let mut last = None;
        for candidate in candidates {
            match shared.registry.resolve(&candidate, credentials).await {
                Ok(found) => {
                    resolved = Some(found);
                    break;
                }
                Err(error) => last = Some(error),
            }
        }
        let resolved = match (resolved, last) {
            (Some(resolved), _) => resolved,
            (None, Some(error)) => return Err(failed(error)),
            (None, None) => return Err(ImageError::NotFound(name.to_owned())),
        };
        let config = std::str::from_utf8(&resolved.config).unwrap_or_default().to_owned();
        parse_config(name, &config)?;

        let diff_ids: Vec<_> = resolved.layers.iter().map(|layer| layer.diff_id.to_string()).collect();
        let lease = shared.layers.lease(diff_ids.clone());
        // Whatever was fetched in vain goes when this pull ends or is dropped.
        let leftovers = Leftovers { store: self.clone(), lease: Some(lease) };
        let mut seen = HashSet::new();
        let mut fetches = Vec::new();
        for layer in resolved.layers.iter().filter(|layer| seen.insert(layer.diff_id.to_string())) {
            let (layers, registry, source, layer) =
                (shared.layers.clone(), shared.registry.clone(), resolved.source.clone(), layer.clone());
            fetches.push(async move {
                let record = layers.fetch(&registry, &source, &layer).await;
                record.map(|record| (layer.diff_id.to_string(), record)).map_err(ImageError::Shared)
            });
        }
        let fetched: HashMap<String, LayerRecord> = futures_util::stream::iter(fetches)
            .buffer_unordered(shared.options.parallel_layers.max(1))
            .try_collect()
            .await?;

        let id = resolved.config_digest.to_string();
        let size = resolved.layers.iter().map(|layer| layer.size).sum::<u64>()
            + (resolved.manifest.len() + resolved.config.len()) as u64;
        let root = shared.options.root.clone();
        // All layers on the disk before the first word of the image.
        blocking(move || {
            let directory = File::open(&root).map_err(ImageError::io("open", &root))?;
            rustix::fs::syncfs(&directory)
                .map_err(|error| ImageError::io("write to disk", &root)(error.into()))
        })
        .await?;
        let names = Names::of(&resolved);
        let image = id.clone();
        self.change(move |tables| {
            for record in tables.images.values_mut() {
                record.repo_tags.retain(|tag| !names.tags.contains(tag));
            }
            let record = tables.images.entry(image).or_insert_with(|| ImageRecord {
                config,
                size,
                layers: diff_ids,
                repo_tags: Vec::new(),
                repo_digests: Vec::new(),
                pulled_at: now(),
            });
            record.repo_tags = merged(&record.repo_tags, names.tags);
            record.repo_digests = merged(&record.repo_digests, names.digests);
            tables.layers.extend(fetched);
        })
        .await?;
        drop(leftovers);
        Ok(id)
    }

    /// All images, sorted by id. Never waits for a pull.
    pub fn list(&self) -> Vec<Image> {
        self.published().values().cloned().collect()
    }

    /// The image that `name` (reference, id, or unambiguous id prefix) means.
    pub fn get(&self, name: &str) -> Option<Image> {
        let published = self.published();
        find(&published, name).map(|id| published[&id].clone())
    }

    /// Removes the image with all its names. Used by a container: names go at once, layers with the last container. Idempotent.
    pub async fn remove(&self, name: &str) -> Result<(), ImageError> {
        let Some(id) = find(&self.published(), name) else { return Ok(()) };
        self.change(move |tables| drop(tables.images.remove(&id))).await
    }

    /// Images whose normalised reference is in `names` are pinned, all others are not.
    pub async fn pin(&self, names: &[String]) -> Result<(), ImageError> {
        let mut pinned = HashSet::new();
        for name in names {
            let failed = |source| ImageError::Registry { name: name.clone(), source };
            pinned.insert(Reference::parse(name).map_err(failed)?.to_string());
        }
        *self.shared.pinned.write().expect("no panic under this lock") = pinned;
        let tables = self.shared.tables.lock().await;
        self.publish(&tables);
        Ok(())
    }

    /// Makes a snapshot of `image` (an id) for container `key`; from now on the image's layers are in use. Idempotent.
    pub async fn prepare(&self, key: &str, image: &str, read_only: bool) -> Result<Rootfs, ImageError> {
        // Under the lock that removals take: the image cannot go between the look and the snapshot.
        let tables = self.shared.tables.lock().await;
        let record = tables.images.get(image).ok_or_else(|| ImageError::NotFound(image.to_owned()))?;
        self.shared.snapshots.prepare(key, image, &record.layers, read_only, &self.shared.layers)
    }

    /// Mounts a snapshot at `target`, an existing directory. Blocking.
    pub fn mount(&self, rootfs: &Rootfs, target: &Path) -> Result<(), ImageError> {
        let options = &self.shared.options;
        mount::mount(rootfs, target, &options.run.join("l"), &options.root.join("empty"))
    }

    /// Drops a snapshot (already unmounted) and, if it was the last user of a removed image, its layers. Idempotent.
    pub async fn release(&self, key: &str) -> Result<(), ImageError> {
        let tables = self.shared.tables.lock().await;
        self.shared.snapshots.release(key)?;
        self.collect(&tables);
        Ok(())
    }

    /// Names of all snapshots: recovery releases those without a container.
    pub fn snapshots(&self) -> Vec<String> {
        self.shared.snapshots.keys()
    }

    /// Bytes and inodes in a container's writable layer (at most some seconds old). Blocking when asked for the first time.
    pub fn writable_usage(&self, key: &str) -> Option<FsUsage> {
        self.shared.snapshots.usage(key, &self.shared.options.root)
    }

    /// Use by images and by writable layers: CRI's two lists. Blocking like [`ImageStore::writable_usage`].
    pub fn fs_info(&self) -> (FsUsage, FsUsage) {
        let mountpoint = self.shared.options.root.clone();
        let (used_bytes, inodes_used) = self.shared.layers.usage();
        let images = FsUsage { mountpoint: mountpoint.clone(), used_bytes, inodes_used };
        let mut containers = FsUsage { mountpoint, used_bytes: 0, inodes_used: 0 };
        for key in self.snapshots() {
            if let Some(usage) = self.writable_usage(&key) {
                containers.used_bytes += usage.used_bytes;
                containers.inodes_used += usage.inodes_used;
            }
        }
        (images, containers)
    }

    /// What is wrong with the registry configuration, if something is.
    pub fn configuration_error(&self) -> Option<String> {
        self.shared.registry.configuration_error()
    }

    fn published(&self) -> Arc<BTreeMap<String, Image>> {
        self.shared.published.read().expect("no panic under this lock").clone()
    }

    /// One change: durable, then visible, then what nobody needs any more goes.
    async fn change(&self, edit: impl FnOnce(&mut Tables) + Send + 'static) -> Result<(), ImageError> {
        let mut tables = self.shared.tables.lock().await;
        let (store, present) = (self.clone(), tables.clone());
        *tables = blocking(move || {
            let mut next = present.clone();
            edit(&mut next);
            let mut needed = needed(&next);
            store.shared.snapshots.needed(&mut needed);
            next.layers.retain(|diff_id, _| needed.contains(diff_id));
            store.shared.database.replace(&present, &next)?;
            store.publish(&next);
            store.shared.layers.collect(&needed);
            Ok(next)
        })
        .await?;
        Ok(())
    }

    fn collect(&self, tables: &Tables) {
        let mut needed = needed(tables);
        self.shared.snapshots.needed(&mut needed);
        self.shared.layers.collect(&needed);
    }

    fn publish(&self, tables: &Tables) {
        let pinned = self.shared.pinned.read().expect("no panic under this lock").clone();
        let before = self.published();
        let mut images = BTreeMap::new();
        for (id, record) in &tables.images {
            let (config, raw_config) = match before.get(id) {
                Some(image) => (image.config.clone(), image.raw_config.clone()),
                None => match parse_config(id, &record.config) {
                    Ok(config) => (Arc::new(config), Arc::from(record.config.as_str())),
                    Err(_) => continue,
                },
            };
            let is_pinned =
                record.repo_tags.iter().chain(&record.repo_digests).any(|name| pinned.contains(name));
            images.insert(
                id.clone(),
                Image {
                    id: id.clone(),
                    repo_tags: record.repo_tags.clone(),
                    repo_digests: record.repo_digests.clone(),
                    size: record.size,
                    config,
                    raw_config,
                    pinned: is_pinned,
                    pulled_at: record.pulled_at,
                },
            );
        }
        *self.shared.published.write().expect("no panic under this lock") = Arc::new(images);
    }
}

/// Collects, when a pull ends in whatever way, the layers that it fetched for no image.
struct Leftovers {
    store: ImageStore,
    lease: Option<crate::layers::Lease>,
}

impl Drop for Leftovers {
    fn drop(&mut self) {
        drop(self.lease.take());
        let store = self.store.clone();
        if let Ok(runtime) = tokio::runtime::Handle::try_current() {
            runtime.spawn(async move {
                let tables = store.shared.tables.lock().await;
                store.collect(&tables);
            });
        }
    }
}

/// The names that a pull gives an image.
struct Names {
    tags: Vec<String>,
    digests: Vec<String>,
}

impl Names {
    fn of(resolved: &ResolvedImage) -> Self {
        let reference = &resolved.reference;
        let name = reference.name();
        // A reference with a digest names that content, whatever tag stands beside it.
        let tags = match (reference.tag(), reference.digest()) {
            (Some(tag), None) => vec![format!("{name}:{tag}")],
            _ => Vec::new(),
        };
        Self { tags, digests: vec![format!("{name}@{}", resolved.target_digest)] }
    }
}

fn merged(present: &[String], more: Vec<String>) -> Vec<String> {
    present.iter().cloned().chain(more).collect::<BTreeSet<_>>().into_iter().collect()
}

/// The id of the image that a name means: a reference first, then ids and their beginnings.
fn find(images: &BTreeMap<String, Image>, name: &str) -> Option<String> {
    if images.contains_key(name) {
        return Some(name.to_owned());
    }
    if let Ok(reference) = Reference::parse(name) {
        let by_name = match reference.digest() {
            Some(digest) => format!("{}@{digest}", reference.name()),
            None => format!("{}:{}", reference.name(), reference.tag().unwrap_or("latest")),
        };
        let named =
            |image: &&Image| image.repo_tags.iter().chain(&image.repo_digests).any(|name| *name == by_name);
        if let Some(image) = images.values().find(named) {
            return Some(image.id.clone());
        }
        // The identity itself behind a repository's name, as kubelet puts it together.
        if let Some(digest) = reference.digest()
            && let Some(image) = images.get(digest.as_str())
        {
            let prefix = format!("{}@", reference.name());
            if image.repo_digests.iter().any(|name| name.starts_with(&prefix)) {
                return Some(image.id.clone());
            }
        }
    }
    let hex = name.strip_prefix("sha256:").unwrap_or(name);
    if hex.len() < SHORTEST_ID || !hex.bytes().all(|byte| byte.is_ascii_hexdigit()) {
        return None;
    }
    let prefix = format!("sha256:{hex}");
    let mut found = images.range(prefix.clone()..).take_while(|(id, _)| id.starts_with(&prefix));
    let first = found.next()?;
    found.next().is_none().then(|| first.0.clone())
}

fn parse_config(name: &str, text: &str) -> Result<ImageConfiguration, ImageError> {
    ImageConfiguration::from_reader(text.as_bytes())
        .map_err(|source| ImageError::BadConfig { name: name.to_owned(), source })
}

fn needed(tables: &Tables) -> HashSet<String> {
    tables.images.values().flat_map(|record| record.layers.iter().cloned()).collect()
}

/// One process at a time, open(2) + flock(2): the kernel gives the lock back however the process ends.
fn lock(root: &Path) -> Result<File, ImageError> {
    use rustix::fs::{FlockOperation, flock};
    let path = root.join("lock");
    let file = File::options()
        .create(true)
        .truncate(false)
        .write(true)
        .open(&path)
        .map_err(ImageError::io("open", &path))?;
    match flock(&file, FlockOperation::NonBlockingLockExclusive) {
        Ok(()) => Ok(file),
        Err(rustix::io::Errno::WOULDBLOCK) => Err(ImageError::Locked { root: root.to_owned() }),
        Err(error) => Err(ImageError::io("lock", path)(error.into())),
    }
}

fn sweep_ingest(ingest: &Path) -> Result<(), ImageError> {
    let entries = std::fs::read_dir(ingest).map_err(ImageError::io("read", ingest))?;
    for entry in entries.flatten() {
        tree::remove(&entry.path())?;
    }
    Ok(())
}

/// Compares the database with the directories: an image whose layers are not all there is none, a layer without a row was never
/// finished.
fn reconcile(root: &Path, found: &Tables) -> Result<(Tables, HashMap<String, LayerRecord>), ImageError> {
    let mut tables = found.clone();
    let directory = root.join("layers");
    let path = |diff_id: &str| -> PathBuf { directory.join(diff_id.rsplit(':').next().unwrap_or_default()) };
    tables.layers.retain(|diff_id, _| path(diff_id).is_dir());
    let layers = tables.layers.clone();
    tables.images.retain(|id, record| {
        let whole = record.layers.iter().all(|diff_id| layers.contains_key(diff_id));
        if !whole {
            tracing::warn!(image = id, "an image has lost a layer and counts as not pulled");
        }
        whole
    });
    let entries = std::fs::read_dir(&directory).map_err(ImageError::io("read", &directory))?;
    for entry in entries.flatten() {
        let name = entry.file_name().to_string_lossy().into_owned();
        if !layers.contains_key(&format!("sha256:{name}")) {
            tree::Scratch::of(&root.join("ingest"), &entry.path())?.discard();
        }
    }
    Ok((tables, layers.into_iter().collect()))
}

fn now() -> i64 {
    let since = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
    i64::try_from(since.as_nanos()).unwrap_or(i64::MAX)
}

async fn blocking<T: Send + 'static>(
    work: impl FnOnce() -> Result<T, ImageError> + Send + 'static,
) -> Result<T, ImageError> {
    match tokio::task::spawn_blocking(work).await {
        Ok(done) => done,
        Err(error) if error.is_panic() => std::panic::resume_unwind(error.into_panic()),
        Err(_) => Err(ImageError::Cancelled),
    }
}
