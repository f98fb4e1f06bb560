//! Layers on disk: which are there, who needs them, and how one comes in. A layer is visible under its name only when its digests
//! have been verified.
//!
//! Images share a layer by the digest of its tar (diff id). That a manifest's blob really holds that tar is checked for
//! each pair of digests once: a manifest that names another blob for a layer that is there has that blob fetched and
//! looked at, so nobody gets at a layer by naming its diff id beside a blob of his own.

use std::collections::{BTreeSet, HashMap, HashSet};
use std::io::Read;
use std::os::fd::AsFd;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use bytes::Bytes;
use podvisor_registry::{Artifact, Compression, Content, LayerDescriptor, Registry, Source};
use podvisor_unpack::Limits;
use tokio::sync::{OwnedSemaphorePermit, Semaphore, mpsc};

use crate::artifact;
use crate::database::LayerRecord;
use crate::error::ImageError;
use crate::flight::Flights;
use crate::tree;

/// What a layer may unpack to. Far above every real image, far below what would be a surprise on a node's disk.
const LIMITS: Limits = Limits { bytes: 256 << 30, entries: 20_000_000 };

/// What may wait between a download and the thread that unpacks it, bytes. hyper's pieces have up to 400 KiB.
const QUEUE: usize = 1 << 20;

/// Endpoints that may send a wrong layer before the pull fails.
const ENDPOINTS_MAX: usize = 4;

type Outcome = Result<LayerRecord, Arc<ImageError>>;

/// What is the same fetch. The registry is part of it: a slow one must not hold up others that have the same layer.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
struct Key {
    diff_id: String,
    blob: String,
    host: String,
}

/// The layers of a store.
#[derive(Debug)]
pub(crate) struct Layers {
    directory: PathBuf,
    pub(crate) ingest: PathBuf,
    state: Mutex<State>,
    flights: Flights<Key, Outcome>,
    received: AtomicU64,
}

#[derive(Debug, Default)]
struct State {
    /// On disk and verified, by diff id.
    present: HashMap<String, LayerRecord>,
    /// Those of them that may still be in the disk's cache alone.
    unsynced: HashSet<String>,
    /// How many pulls in progress count on a layer.
    leased: HashMap<String, usize>,
}

/// Keeps layers from being collected while a pull is in progress.
#[derive(Debug)]
pub(crate) struct Lease {
    layers: Arc<Layers>,
    diff_ids: Vec<String>,
}

impl Drop for Lease {
    fn drop(&mut self) {
        let mut state = self.layers.state();
        for diff_id in &self.diff_ids {
            if let Some(count) = state.leased.get_mut(diff_id) {
                *count -= 1;
                if *count == 0 {
                    state.leased.remove(diff_id);
                }
            }
        }
    }
}

impl Layers {
    pub(crate) fn new(root: &Path, present: HashMap<String, LayerRecord>) -> Arc<Self> {
        Arc::new(Self {
            directory: root.join("layers"),
            ingest: root.join("ingest"),
            state: Mutex::new(State { present, ..State::default() }),
            flights: Flights::default(),
            received: AtomicU64::new(0),
        })
    }

    /// Where a layer is.
    pub(crate) fn path(&self, diff_id: &str) -> PathBuf {
        self.directory.join(diff_id.rsplit(':').next().unwrap_or_default())
    }

    pub(crate) fn lease(self: &Arc<Self>, diff_ids: Vec<String>) -> Lease {
        let mut state = self.state();
        for diff_id in &diff_ids {
            *state.leased.entry(diff_id.clone()).or_default() += 1;
        }
        Lease { layers: self.clone(), diff_ids }
    }

    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// The layer, if it is there and known to be what that blob holds.
    pub(crate) fn present(&self, diff_id: &str, blob: &str) -> Option<LayerRecord> {
        self.state().present.get(diff_id).filter(|record| record.blobs.contains(blob)).cloned()
    }

    /// Which of these layers have to be written to the disk before an image may stand on them.
    pub(crate) fn unsynced(&self, diff_ids: &[String]) -> Vec<String> {
        let state = self.state();
        diff_ids.iter().filter(|diff_id| state.unsynced.contains(*diff_id)).cloned().collect()
    }

    /// To be told after syncfs(2), with what [`Layers::unsynced`] said before it, by who holds a lease for them.
    pub(crate) fn synced(&self, diff_ids: &[String]) {
        let mut state = self.state();
        for diff_id in diff_ids {
            state.unsynced.remove(diff_id);
        }
    }

    /// Bytes that registries have sent of layers, since the store was opened.
    pub(crate) fn received(&self) -> u64 {
        self.received.load(Ordering::Relaxed)
    }

    /// Sum of what the layers on disk use. One that only a snapshot knows of, after its row was lost, counts nothing.
    pub(crate) fn usage(&self) -> (u64, u64) {
        let state = self.state();
        state
            .present
            .values()
            .fold((0, 0), |(bytes, inodes), layer| (bytes + layer.size, inodes + layer.inodes))
    }

    /// Brings a layer in unless it is there; the caller holds a lease for it. `hold` is kept as long as anything of this
    /// call goes on.
    pub(crate) async fn fetch(
        self: &Arc<Self>,
        registry: &Registry,
        source: &Arc<Source>,
        layer: &LayerDescriptor,
        host: &str,
        hold: impl Send + Clone + 'static,
    ) -> Outcome {
        let key =
            Key { diff_id: layer.diff_id.to_string(), blob: layer.digest.to_string(), host: host.to_owned() };
        loop {
            if let Some(record) = self.present(&key.diff_id, &key.blob) {
                return Ok(record);
            }
            let leads = Arc::new(AtomicBool::new(false));
            let (layers, registry, source, layer) =
                (self.clone(), registry.clone(), source.clone(), layer.clone());
            let (leading, hold) = (leads.clone(), hold.clone());
            let fetched = self.flights.join(key.clone(), move || {
                leading.store(true, Ordering::Relaxed);
                async move { layers.bring(&registry, &source, &layer, hold).await.map_err(Arc::new) }
            });
            match fetched.await {
                Some(Ok(record)) => return Ok(record),
                Some(Err(error)) if leads.load(Ordering::Relaxed) => return Err(error),
                // Somebody else's credentials or mirrors failed, not ours.
                Some(Err(_)) => {}
                None => return Err(Arc::new(ImageError::Cancelled)),
            }
        }
    }

    async fn bring(
        self: &Arc<Self>,
        registry: &Registry,
        source: &Arc<Source>,
        layer: &LayerDescriptor,
        hold: impl Send + Clone + 'static,
    ) -> Result<LayerRecord, ImageError> {
        if !layer.digest.as_str().starts_with("sha256:") || !layer.diff_id.as_str().starts_with("sha256:") {
            return Err(ImageError::UnsupportedDigest { digest: layer.digest.to_string() });
        }
        let named = || ImageError::registry(layer.digest.to_string());
        for attempt in 1.. {
            let mut blob = registry.blob(source, layer).await.map_err(named())?;
            let (sender, receiver) = mpsc::unbounded_channel();
            let room = Arc::new(Semaphore::new(QUEUE));
            let (layers, expected) = (self.clone(), layer.clone());
            // The thread owns the ingest directory: it removes it whenever it does not come to a good end, also when this future is
            // dropped, which it notices by the broken channel. If it is past that, the layer comes in all the same: hence the hold.
            let kept = hold.clone();
            let unpacking = tokio::task::spawn_blocking(move || {
                let unpacked = layers.unpack(receiver, &expected);
                drop(kept);
                unpacked
            });
            let downloaded = async {
                while let Some(bytes) = blob.next().await? {
                    self.received.fetch_add(bytes.len() as u64, Ordering::Relaxed);
                    let length = u32::try_from(bytes.len().min(QUEUE)).unwrap_or(u32::MAX);
                    // Never closed, so there is always a permit in the end: what the thread has read, or given up, is
                    // dropped.
                    let taken = room.clone().acquire_many_owned(length).await.ok();
                    if sender.send(Piece::Data(bytes, taken)).is_err() {
                        // Unpacking has failed; its error says more.
                        break;
                    }
                }
                let _ = sender.send(Piece::End);
                Ok(())
            }
            .await;
            drop(sender);
            let unpacked = unpacking.await.map_err(|_| ImageError::Cancelled)?;
            let error = match (downloaded, unpacked) {
                (Ok(()), Ok(record)) => return Ok(record),
                (Err(error), _) => named()(error),
                (Ok(()), Err(error)) => error,
            };
            // An endpoint may have sent something else altogether. Then another one is asked, if there is one.
            let may_differ_elsewhere = error.kind() == crate::ErrorKind::Corrupt;
            if !may_differ_elsewhere || attempt == ENDPOINTS_MAX || !blob.reject() {
                return Err(error);
            }
            tracing::warn!(layer = %layer.digest, %error, "an endpoint sent a wrong layer, asking the next");
        }
        Err(ImageError::Cancelled)
    }

    /// Unpacks, verifies, and gives the layer its name. Blocking.
    fn unpack(
        &self,
        receiver: mpsc::UnboundedReceiver<Piece>,
        layer: &LayerDescriptor,
    ) -> Result<LayerRecord, ImageError> {
        let scratch = tree::Scratch::new(&self.ingest)?;
        let target = scratch.open()?;
        let compression = match layer.compression {
            Compression::None => podvisor_unpack::Compression::None,
            Compression::Gzip => podvisor_unpack::Compression::Gzip,
            Compression::Zstd => podvisor_unpack::Compression::Zstd,
        };
        let digest = || layer.digest.to_string();
        if layer.content == Content::File {
            let pieces = Pieces { receiver, current: Bytes::new(), taken: None, ended: false };
            let (found, size) = artifact::receive(pieces, &scratch)?;
            if found != layer.digest.as_str() {
                return Err(ImageError::WrongDigest { digest: digest(), found });
            }
            return self.admit(scratch, layer, size, 1);
        }
        let pieces = Pieces { receiver, current: Bytes::new(), taken: None, ended: false };
        let unpacked = podvisor_unpack::unpack(pieces, compression, target.as_fd(), LIMITS)
            .map_err(|source| ImageError::Unpack { digest: digest(), source })?;
        if unpacked.digest != layer.digest.as_str() {
            return Err(ImageError::WrongDigest { digest: digest(), found: unpacked.digest });
        }
        if layer.content == Content::Layer && unpacked.diff_id != layer.diff_id.as_str() {
            let expected = layer.diff_id.to_string();
            return Err(ImageError::WrongDiffId { digest: digest(), expected, found: unpacked.diff_id });
        }
        podvisor_fault::point("pull.layer-unpacked");
        self.admit(scratch, layer, unpacked.size, unpacked.inodes)
    }

    /// Gives a verified layer its name. Blocking.
    fn admit(
        &self,
        scratch: tree::Scratch,
        layer: &LayerDescriptor,
        size: u64,
        inodes: u64,
    ) -> Result<LayerRecord, ImageError> {
        let diff_id = layer.diff_id.as_str();
        let mut state = self.state();
        if let Some(record) = state.present.get_mut(diff_id) {
            // Held by another blob too; what was unpacked now goes.
            record.blobs.insert(layer.digest.to_string());
            let record = record.clone();
            drop(state);
            scratch.discard();
            return Ok(record);
        }
        let blobs = BTreeSet::from([layer.digest.to_string()]);
        let record = LayerRecord { size, inodes, blobs };
        scratch.rename(&self.path(diff_id))?;
        podvisor_fault::point("pull.layer-named");
        state.present.insert(diff_id.to_owned(), record.clone());
        state.unsynced.insert(diff_id.to_owned());
        Ok(record)
    }

    /// Puts the files of an artifact together as the layer `key`, from what the caller has fetched and holds a lease for. `manifest` takes
    /// the place of the blob. Blocking.
    pub(crate) fn assemble(
        &self,
        key: &str,
        manifest: &str,
        artifact: &Artifact,
        fetched: &HashMap<String, LayerRecord>,
    ) -> Result<LayerRecord, ImageError> {
        let scratch = tree::Scratch::new(&self.ingest)?;
        let unknown = LayerRecord::default();
        let blob = |kept: &podvisor_registry::Digest| {
            (self.path(kept.as_str()), fetched.get(kept.as_str()).unwrap_or(&unknown))
        };
        let mut record = artifact::assemble(artifact, &scratch, blob)?;
        record.blobs.insert(manifest.to_owned());
        let mut state = self.state();
        if let Some(present) = state.present.get(key) {
            // Another pull of the same artifact was faster.
            let present = present.clone();
            drop(state);
            scratch.discard();
            return Ok(present);
        }
        scratch.rename(&self.path(key))?;
        state.present.insert(key.to_owned(), record.clone());
        state.unsynced.insert(key.to_owned());
        Ok(record)
    }

    /// Adds the layers that pulls in progress, and what is made of layers, count on.
    pub(crate) fn leased(&self, diff_ids: &mut HashSet<String>) {
        diff_ids.extend(self.state().leased.keys().cloned());
    }

    /// Takes away every layer that is neither leased nor among what `needed` adds, which is asked under the lock: who
    /// publishes an image gives his lease back afterwards, so no layer is missing from both. What is returned is to be
    /// removed: it has lost its name already.
    pub(crate) fn collect(&self, needed: impl FnOnce(&mut HashSet<String>)) -> Vec<tree::Scratch> {
        let mut state = self.state();
        let mut kept: HashSet<String> = state.leased.keys().cloned().collect();
        needed(&mut kept);
        let idle: Vec<_> = state.present.keys().filter(|diff_id| !kept.contains(*diff_id)).cloned().collect();
        let mut taken = Vec::new();
        for diff_id in idle {
            match tree::Scratch::of(&self.ingest, &self.path(&diff_id)) {
                Ok(scratch) => {
                    state.present.remove(&diff_id);
                    state.unsynced.remove(&diff_id);
                    taken.push(scratch);
                }
                Err(error) => {
                    tracing::warn!(diff_id, error = %error, "cannot take a layer away that nobody needs");
                }
            }
        }
        taken
    }
}

/// What goes from the download to the unpacking thread.
enum Piece {
    /// With the room that it takes in the queue.
    Data(Bytes, Option<OwnedSemaphorePermit>),
    /// The download is complete; a channel that closes without it is a broken one.
    End,
}

struct Pieces {
    receiver: mpsc::UnboundedReceiver<Piece>,
    current: Bytes,
    taken: Option<OwnedSemaphorePermit>,
    ended: bool,
}

impl Read for Pieces {
    fn read(&mut self, buffer: &mut [u8]) -> std::io::Result<usize> {
        while self.current.is_empty() && !self.ended {
            // Its room first: the next piece may need it.
            self.taken = None;
            match self.receiver.blocking_recv() {
                Some(Piece::Data(bytes, taken)) => (self.current, self.taken) = (bytes, taken),
                Some(Piece::End) => self.ended = true,
                None => return Err(std::io::Error::other("the download was broken off")),
            }
        }
        let length = buffer.len().min(self.current.len());
        buffer[..length].copy_from_slice(&self.current.split_to(length));
        Ok(length)
    }
}
