//! The store: opening it after whatever happened, and what callers do with it.

use std::collections::{BTreeMap, HashMap, HashSet};
use std::fs::File;
use std::os::fd::BorrowedFd;
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::{Duration, Instant};

use podvisor_registry::{Credentials, Reference, Registry};
use rustix::fs::{FlockOperation, flock};

use crate::catalog::Catalog;
use crate::database::{Database, LayerRecord, Tables};
use crate::error::ImageError;
use crate::flight::Flights;
use crate::layers::Layers;
use crate::machine::{self, MachineImage, MachineImages};
use crate::snapshots::{Record, Snapshots};
use crate::{FsUsage, Image, Options, Rootfs, idmap, mount, tree};

/// How long a store may be held by what is left of a process that has ended.
const LOCKED_WITHIN: Duration = Duration::from_secs(2);

/// Name as it was asked for, and as whom.
type PullKey = (String, Option<Credentials>);

/// The store. Cheap to clone.
#[derive(Debug, Clone)]
pub struct ImageStore {
    pub(crate) shared: Arc<Shared>,
}

#[derive(Debug)]
pub(crate) struct Shared {
    pub(crate) options: Options,
    pub(crate) registry: Registry,
    pub(crate) layers: Arc<Layers>,
    pub(crate) machine: Arc<MachineImages>,
    pub(crate) catalog: Catalog,
    snapshots: Snapshots,
    pulls: Flights<PullKey, Result<String, Arc<ImageError>>>,
    /// Locked as long as the store is open.
    _lock: File,
}

impl ImageStore {
    /// Opens or creates the store and removes what a crash left half done.
    pub async fn open(options: Options) -> Result<Self, ImageError> {
        let registry = Registry::new(options.registry.clone()).map_err(ImageError::registry(""))?;
        blocking(move || Self::open_blocking(options, registry)).await
    }

    fn open_blocking(options: Options, registry: Registry) -> Result<Self, ImageError> {
        let root = &options.root;
        make_directories(root)?;
        let lock = lock(root)?;
        sweep_ingest(&root.join("ingest"))?;
        let database = Database::open(&root.join("metadata.redb"))?;
        let found = database.read()?;
        let snapshots = Snapshots::open(root)?;
        let mut used = HashSet::new();
        snapshots.needed(&mut used);
        let (tables, present) = reconcile(root, &found, &used)?;
        if tables != found {
            database.replace(&found, &tables)?;
        }
        let store = Self {
            shared: Arc::new(Shared {
                layers: Layers::new(root, present),
                machine: Arc::new(MachineImages::open(root)?),
                catalog: Catalog::new(database, tables),
                options,
                registry,
                snapshots,
                pulls: Flights::default(),
                _lock: lock,
            }),
        };
        store.shared.collect();
        Ok(store)
    }

    /// Pulls `name` and returns the image. The same image or layer wanted twice at once is fetched once. Dropping the future
    /// cancels the pull (unless another caller waits for it) and leaves nothing.
    pub async fn pull(&self, name: &str, credentials: Option<Credentials>) -> Result<Image, ImageError> {
        let (store, key) = (self.clone(), (name.to_owned(), credentials.clone()));
        let asked = name.to_owned();
        let work = move || async move { store.fetch(&asked, credentials.as_ref()).await.map_err(Arc::new) };
        match self.shared.pulls.join(key, work).await {
            Some(Ok(id)) => self.get(&id).ok_or_else(|| ImageError::NotFound(name.to_owned())),
            Some(Err(error)) => Err(ImageError::Shared(error)),
            None => Err(ImageError::Cancelled),
        }
    }

    /// All images, sorted by id. Never waits for a pull.
    pub fn list(&self) -> Vec<Image> {
        self.shared.catalog.published().images().cloned().collect()
    }

    /// The image that `name` (reference, id, or unambiguous id prefix) means. Never waits for a pull.
    pub fn get(&self, name: &str) -> Option<Image> {
        self.shared.catalog.published().find(name).cloned()
    }

    /// Removes the image with all its names. Used by a container: names go at once, layers with the last container. Idempotent.
    pub async fn remove(&self, name: &str) -> Result<(), ImageError> {
        let Some(id) = self.get(name).map(|image| image.id) else { return Ok(()) };
        let shared = self.shared.clone();
        blocking(move || {
            if shared.catalog.remove(|kept| shared.snapshots.needed(kept), &id)? {
                podvisor_fault::point("remove-image.recorded");
                shared.collect();
                podvisor_fault::point("remove-image.collected");
                return Ok(());
            }
            // First the room, on this thread, then the word.
            drop(shared.take_idle());
            if let Err(error) = shared.catalog.persist() {
                tracing::warn!(image = id, %error, "the database still has an image that is gone");
            }
            Ok(())
        })
        .await
    }

    /// Images whose normalised reference is in `names` are pinned, all others are not.
    pub async fn pin(&self, names: &[String]) -> Result<(), ImageError> {
        let mut pinned = HashSet::new();
        for name in names {
            let failed = || ImageError::registry(name.clone());
            // A short name may mean any of several until it is pulled.
            let candidates = self.shared.registry.candidates(name).await.map_err(failed())?;
            pinned.extend(candidates.iter().map(ToString::to_string));
            pinned.insert(Reference::parse(name).map_err(failed())?.to_string());
        }
        let shared = self.shared.clone();
        blocking(move || {
            shared.catalog.pin(pinned);
            Ok(())
        })
        .await
    }

    /// Makes a snapshot of `image` (an id) for container `key`; from now on the image's layers are in use. Idempotent:
    /// asked again for the same it gives the same. Waits for no pull and no fsync.
    pub async fn prepare(&self, key: &str, image: &str, read_only: bool) -> Result<Rootfs, ImageError> {
        let (shared, key, image) = (self.shared.clone(), key.to_owned(), image.to_owned());
        blocking(move || {
            let layers = || Some(shared.catalog.published().with_id(&image)?.1.to_vec());
            shared.snapshots.prepare(&key, &image, read_only, &shared.layers, layers)
        })
        .await
    }

    /// Mounts a snapshot at `target`, an existing directory. Some system calls; no disk is waited for. With a `label` that is every file's
    /// SELinux label; the kernel refuses it where SELinux is off.
    pub fn mount(&self, rootfs: &Rootfs, target: &Path, label: Option<&str>) -> Result<(), ImageError> {
        let options = &self.shared.options;
        mount::mount(rootfs, target, label, &options.run.join("l"), &options.root.join("empty"))
    }

    /// Likewise, for a container with the user namespace `user`: the image's ids are those inside. The layers are shared with all
    /// other containers and stay as they are; what is written into the snapshot has the ids outside.
    pub fn mount_with_ids(
        &self,
        rootfs: &Rootfs,
        target: &Path,
        label: Option<&str>,
        user: BorrowedFd<'_>,
    ) -> Result<(), ImageError> {
        idmap::mount(rootfs, target, label, &self.places(), user)
    }

    /// Whether [`ImageStore::mount_with_ids`] can work here, found out by doing it.
    pub fn try_ids(&self, user: BorrowedFd<'_>) -> Result<(), ImageError> {
        idmap::try_out(&self.places(), user)
    }

    /// The image of a snapshot as virtual machines take it; made now unless it is there. The files stay until the snapshot is released.
    /// Machines see the same pages of the host's memory only if they name the same `domain` (`None`: all of this node that name none).
    /// Waits for the disk.
    pub async fn machine_image(&self, key: &str, domain: Option<&str>) -> Result<MachineImage, ImageError> {
        let shared = &self.shared;
        let (snapshots, asked, of) = (shared.clone(), key.to_owned(), domain.map(str::to_owned));
        let layers = blocking(move || snapshots.snapshots.enter_domain(&asked, of.as_deref())).await?;
        let made = shared.machine.image(&shared.layers, domain, &layers).await;
        if !shared.snapshots.while_none_begins(|records| records.contains_key(key)) {
            // Released meanwhile: what was made for it is nobody's, and what it was made of was held.
            let shared = shared.clone();
            blocking(move || {
                shared.collect();
                Ok(())
            })
            .await?;
            return Err(ImageError::NoSnapshot { key: key.to_owned() });
        }
        made
    }

    fn places(&self) -> idmap::Places {
        let Options { root, run, .. } = &self.shared.options;
        idmap::Places { layers: root.join("layers"), empty: root.join("empty"), links: run.join("l") }
    }

    /// Drops a snapshot (already unmounted) and, if it was the last user of a removed image, its layers. Idempotent.
    pub async fn release(&self, key: &str) -> Result<(), ImageError> {
        let (shared, key) = (self.shared.clone(), key.to_owned());
        blocking(move || {
            shared.snapshots.release(&key)?;
            // Rows of layers that go now are left: without a directory they mean nothing, and the next change drops them.
            shared.collect();
            Ok(())
        })
        .await
    }

    /// Names of all snapshots, sorted: recovery releases those without a container.
    pub fn snapshots(&self) -> Vec<String> {
        self.shared.snapshots.keys()
    }

    /// Bytes and inodes in a container's writable layer, measured in the background: some seconds old. `None`: no such
    /// snapshot, or (after a start) not measured yet.
    pub fn writable_usage(&self, key: &str) -> Option<FsUsage> {
        self.shared.snapshots.usage(key, &self.shared.options.root)
    }

    /// Bytes of layers that registries have sent since the store was opened.
    pub fn received_bytes(&self) -> u64 {
        self.shared.layers.received()
    }

    /// Use by images and by writable layers: CRI's two lists.
    pub fn fs_info(&self) -> (FsUsage, FsUsage) {
        let mountpoint = self.shared.options.root.clone();
        let (bytes, inodes) = self.shared.layers.usage();
        let (machine_bytes, machine_inodes) = self.shared.machine.usage();
        let (used_bytes, inodes_used) = (bytes + machine_bytes, inodes + machine_inodes);
        let images = FsUsage { mountpoint: mountpoint.clone(), used_bytes, inodes_used };
        let mut containers = FsUsage { mountpoint, used_bytes: 0, inodes_used: 0 };
        for usage in self.snapshots().iter().filter_map(|key| self.writable_usage(key)) {
            containers.used_bytes += usage.used_bytes;
            containers.inodes_used += usage.inodes_used;
        }
        (images, containers)
    }

    /// What is wrong with the registry configuration, if something is.
    pub fn configuration_error(&self) -> Option<String> {
        self.shared.registry.configuration_error()
    }
}

impl Shared {
    /// Changes which images there are. Blocking.
    pub(crate) fn change(&self, edit: impl FnOnce(&mut Tables)) -> Result<(), ImageError> {
        self.catalog.change(|kept| self.snapshots.needed(kept), edit)
    }

    /// Takes away layers that nobody needs; their files go in the background. Blocking, but only for some renames.
    pub(crate) fn collect(&self) {
        self.take_idle().into_iter().for_each(tree::Scratch::discard);
    }

    fn take_idle(&self) -> Vec<tree::Scratch> {
        // In this order of locks no snapshot is made of an image between the look at who needs what and the taking away.
        self.snapshots.while_none_begins(|records| {
            let mut taken = self.layers.collect(|needed| {
                needed.extend(records.values().flat_map(|record| record.layers.iter().cloned()));
                self.catalog.published().needed(needed);
            });
            taken.extend(self.machine.collect(|| self.pieces(records)));
            taken
        })
    }

    /// The pieces of images for virtual machines that somebody may have, or soon want: those of the node go with the images, those of a domain with
    /// its snapshots. One that is taken away too early is made again.
    fn pieces(&self, records: &BTreeMap<String, Record>) -> HashSet<String> {
        let mut names = HashSet::new();
        for layers in self.catalog.published().layers() {
            machine::pieces(None, layers, &mut names);
        }
        for record in records.values() {
            machine::pieces(None, &record.layers, &mut names);
            if let Some(domain) = &record.domain {
                machine::pieces(Some(domain), &record.layers, &mut names);
            }
        }
        let mut leased = HashSet::new();
        self.layers.leased(&mut leased);
        names.extend(leased.iter().map(|layer| machine::layer_name(None, layer)));
        names
    }
}

/// Runs what waits for the disk where that disturbs nobody; to its end, even if the caller has gone.
pub(crate) async fn blocking<T: Send + 'static>(
    work: impl FnOnce() -> Result<T, ImageError> + Send + 'static,
) -> Result<T, ImageError> {
    match tokio::task::spawn_blocking(work).await {
        Ok(done) => done,
        Err(error) if error.is_panic() => std::panic::resume_unwind(error.into_panic()),
        Err(_) => Err(ImageError::Cancelled),
    }
}

fn make_directories(root: &Path) -> Result<(), ImageError> {
    for name in ["", "layers", "ingest", "snapshots", "machine", "empty/a", "empty/b"] {
        let path = root.join(name);
        std::fs::create_dir_all(&path).map_err(ImageError::io("make", path))?;
    }
    // An image's set-user-id programs are not for this machine's users.
    for name in ["layers", "ingest", "snapshots", "machine"] {
        let path = root.join(name);
        std::fs::set_permissions(&path, std::fs::Permissions::from_mode(0o700))
            .map_err(ImageError::io("set the mode of", path))?;
    }
    Ok(())
}

/// One process at a time, open(2) + flock(2): the kernel gives the lock back however the process ends. A child that the last owner
/// was just starting when it was killed still has the descriptor, until it executes its program: so a held lock is asked for
/// again for a while.
fn lock(root: &Path) -> Result<File, ImageError> {
    let path = root.join("lock");
    let file = File::options()
        .create(true)
        .truncate(false)
        .write(true)
        .open(&path)
        .map_err(ImageError::io("open", &path))?;
    let deadline = Instant::now() + LOCKED_WITHIN;
    loop {
        match flock(&file, FlockOperation::NonBlockingLockExclusive) {
            Ok(()) => return Ok(file),
            Err(rustix::io::Errno::WOULDBLOCK) if Instant::now() < deadline => {
                std::thread::sleep(Duration::from_millis(10));
            }
            Err(rustix::io::Errno::WOULDBLOCK) => return Err(ImageError::Locked { root: root.to_owned() }),
            Err(error) => return Err(ImageError::io("lock", path)(error.into())),
        }
    }
}

/// Removes what an earlier run left, in the background: it may be much, and no new name is like an old one.
fn sweep_ingest(ingest: &Path) -> Result<(), ImageError> {
    let entries = std::fs::read_dir(ingest).map_err(ImageError::io("read", ingest))?;
    for entry in entries.flatten() {
        tree::Scratch::left(entry.path()).discard();
    }
    Ok(())
}

/// Compares the database with the directories: an image whose layers are not all there is none, a layer without a row was never
/// finished, unless a snapshot stands on it. Returns what the database should say, and the layers there are.
fn reconcile(
    root: &Path,
    found: &Tables,
    used: &HashSet<String>,
) -> Result<(Tables, HashMap<String, LayerRecord>), ImageError> {
    let mut tables = found.clone();
    let directory = root.join("layers");
    let path = |diff_id: &str| -> PathBuf { directory.join(diff_id.rsplit(':').next().unwrap_or_default()) };
    tables.layers.retain(|diff_id, _| path(diff_id).is_dir());
    let known = &tables.layers;
    tables.images.retain(|id, record| {
        let whole = record.layers.iter().all(|diff_id| known.contains_key(diff_id));
        if !whole {
            tracing::warn!(image = id, "an image has lost a layer and counts as not pulled");
        }
        whole
    });
    let mut present: HashMap<_, _> = tables.layers.clone().into_iter().collect();
    let entries = std::fs::read_dir(&directory).map_err(ImageError::io("read", &directory))?;
    for entry in entries.flatten() {
        let diff_id = format!("sha256:{}", entry.file_name().to_string_lossy());
        if used.contains(&diff_id) {
            // Without a row nothing is known of it but that it is in use: no image may be built on it.
            present.entry(diff_id).or_insert_with(LayerRecord::default);
        } else if !present.contains_key(&diff_id) {
            tree::Scratch::of(&root.join("ingest"), &entry.path())?.discard();
        }
    }
    Ok((tables, present))
}
