//! Layers on disk: which are there, who needs them, and how one comes in. A layer is visible under its name only when its digests
//! have been verified.

use std::collections::{HashMap, HashSet};
use std::io::Read;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex};

use bytes::Bytes;
use podvisor_registry::{Compression, LayerDescriptor, Registry, Source};
use podvisor_unpack::{Limits, Unpacked};
use tokio::sync::mpsc;

use crate::database::LayerRecord;
use crate::error::ImageError;
use crate::flight::Flights;
use crate::tree;

/// What a layer may unpack to. Far above every real image, far below what would be a surprise on a node's disk.
const LIMITS: Limits = Limits { bytes: 256 << 30, entries: 20_000_000 };

/// Pieces of a download that wait for the unpacking thread; with hyper's buffers below 4 MiB a layer.
const QUEUE: usize = 32;

type Outcome = Result<LayerRecord, Arc<ImageError>>;

/// The layers of a store.
#[derive(Debug)]
pub(crate) struct Layers {
    directory: PathBuf,
    pub(crate) ingest: PathBuf,
    state: Mutex<State>,
    flights: Flights<String, Outcome>,
}

#[derive(Debug, Default)]
struct State {
    /// On disk and verified, by diff id.
    present: HashMap<String, LayerRecord>,
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
        let mut state = self.layers.state.lock().expect("no panic under this lock");
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
            state: Mutex::new(State { present, leased: HashMap::new() }),
            flights: Flights::default(),
        })
    }

    /// Where a layer is.
    pub(crate) fn path(&self, diff_id: &str) -> PathBuf {
        self.directory.join(diff_id.rsplit(':').next().unwrap_or_default())
    }

    pub(crate) fn lease(self: &Arc<Self>, diff_ids: Vec<String>) -> Lease {
        let mut state = self.state.lock().expect("no panic under this lock");
        for diff_id in &diff_ids {
            *state.leased.entry(diff_id.clone()).or_default() += 1;
        }
        Lease { layers: self.clone(), diff_ids }
    }

    fn present(&self, diff_id: &str) -> Option<LayerRecord> {
        self.state.lock().expect("no panic under this lock").present.get(diff_id).cloned()
    }

    /// Sum of what the layers on disk use.
    pub(crate) fn usage(&self) -> (u64, u64) {
        let state = self.state.lock().expect("no panic under this lock");
        state
            .present
            .values()
            .fold((0, 0), |(bytes, inodes), layer| (bytes + layer.size, inodes + layer.inodes))
    }

    /// Brings a layer in unless it is there; the caller holds a lease for it.
    pub(crate) async fn fetch(
        self: &Arc<Self>,
        registry: &Registry,
        source: &Arc<Source>,
        layer: &LayerDescriptor,
    ) -> Outcome {
        let diff_id = layer.diff_id.as_str().to_owned();
        loop {
            if let Some(record) = self.present(&diff_id) {
                return Ok(record);
            }
            let (layers, registry, source, layer) =
                (self.clone(), registry.clone(), source.clone(), layer.clone());
            let fetched = self.flights.join(diff_id.clone(), move || async move {
                layers.bring(&registry, &source, &layer).await.map_err(Arc::new)
            });
            if let Some(outcome) = fetched.await {
                return outcome;
            }
            // Whoever had begun it went away in the same moment: begin anew.
        }
    }

    async fn bring(
        self: &Arc<Self>,
        registry: &Registry,
        source: &Arc<Source>,
        layer: &LayerDescriptor,
    ) -> Result<LayerRecord, ImageError> {
        if !layer.digest.as_str().starts_with("sha256:") || !layer.diff_id.as_str().starts_with("sha256:") {
            return Err(ImageError::UnsupportedDigest { digest: layer.digest.to_string() });
        }
        loop {
            let named = |source| ImageError::Registry { name: layer.digest.to_string(), source };
            let mut blob = registry.blob(source, layer).await.map_err(named)?;
            let (sender, receiver) = mpsc::channel(QUEUE);
            let (layers, compression) = (self.clone(), layer.compression);
            let digest = layer.digest.to_string();
            // The thread owns the ingest directory: it removes it whenever it does not come to a good end, also when this future is
            // dropped, which it notices by the broken channel.
            let unpacking = tokio::task::spawn_blocking(move || layers.unpack(receiver, compression, digest));
            let downloaded = async {
                while let Some(bytes) = blob.next().await? {
                    if sender.send(Piece::Data(bytes)).await.is_err() {
                        // Unpacking has failed; its error says more.
                        break;
                    }
                }
                let _ = sender.send(Piece::End).await;
                Ok(())
            }
            .await;
            drop(sender);
            let unpacked = unpacking.await.map_err(|_| ImageError::Cancelled)?;
            downloaded.map_err(named)?;
            let wrong = match unpacked {
                Ok((ingest, unpacked)) if unpacked.digest == layer.digest.as_str() => {
                    return self.admit(ingest, layer, &unpacked);
                }
                Ok((_, unpacked)) => {
                    ImageError::WrongDigest { digest: layer.digest.to_string(), found: unpacked.digest }
                }
                // An endpoint may have sent something else altogether.
                Err(error) if error.kind() == crate::ErrorKind::Corrupt => error,
                Err(error) => return Err(error),
            };
            if !blob.reject() {
                return Err(wrong);
            }
            tracing::warn!(layer = %layer.digest, error = %wrong, "an endpoint sent a wrong layer, asking the next");
        }
    }

    fn unpack(
        &self,
        pieces: mpsc::Receiver<Piece>,
        compression: Compression,
        digest: String,
    ) -> Result<(tree::Scratch, Unpacked), ImageError> {
        let scratch = tree::Scratch::new(&self.ingest)?;
        let target = scratch.open()?;
        let compression = match compression {
            Compression::None => podvisor_unpack::Compression::None,
            Compression::Gzip => podvisor_unpack::Compression::Gzip,
            Compression::Zstd => podvisor_unpack::Compression::Zstd,
        };
        let source = Pieces { pieces, current: Bytes::new(), ended: false };
        use std::os::fd::AsFd;
        let unpacked = podvisor_unpack::unpack(source, compression, target.as_fd(), LIMITS)
            .map_err(|source| ImageError::Unpack { digest, source })?;
        Ok((scratch, unpacked))
    }

    /// Gives a verified layer its name.
    fn admit(
        &self,
        scratch: tree::Scratch,
        layer: &LayerDescriptor,
        unpacked: &Unpacked,
    ) -> Result<LayerRecord, ImageError> {
        let diff_id = layer.diff_id.as_str();
        if unpacked.diff_id != diff_id {
            return Err(ImageError::WrongDiffId {
                digest: layer.digest.to_string(),
                expected: diff_id.to_owned(),
                found: unpacked.diff_id.clone(),
            });
        }
        let record = LayerRecord { size: unpacked.size, inodes: unpacked.inodes };
        let mut state = self.state.lock().expect("no panic under this lock");
        scratch.rename(&self.path(diff_id))?;
        state.present.insert(diff_id.to_owned(), record.clone());
        Ok(record)
    }

    /// Takes away every layer that is neither in `needed` nor leased. Its directory goes in the background.
    pub(crate) fn collect(&self, needed: &HashSet<String>) {
        let mut state = self.state.lock().expect("no panic under this lock");
        let idle: Vec<_> = state
            .present
            .keys()
            .filter(|diff_id| !needed.contains(*diff_id) && !state.leased.contains_key(*diff_id))
            .cloned()
            .collect();
        for diff_id in idle {
            match tree::Scratch::of(&self.ingest, &self.path(&diff_id)) {
                Ok(scratch) => {
                    state.present.remove(&diff_id);
                    scratch.discard();
                }
                Err(error) => {
                    tracing::warn!(diff_id, error = %error, "cannot take a layer away that nobody needs");
                }
            }
        }
    }
}

/// What goes from the download to the unpacking thread.
enum Piece {
    Data(Bytes),
    /// The download is complete; a channel that closes without it is a broken one.
    End,
}

struct Pieces {
    pieces: mpsc::Receiver<Piece>,
    current: Bytes,
    ended: bool,
}

impl Read for Pieces {
    fn read(&mut self, buffer: &mut [u8]) -> std::io::Result<usize> {
        while self.current.is_empty() && !self.ended {
            match self.pieces.blocking_recv() {
                Some(Piece::Data(bytes)) => self.current = bytes,
                Some(Piece::End) => self.ended = true,
                None => return Err(std::io::Error::other("the download was broken off")),
            }
        }
        let length = buffer.len().min(self.current.len());
        buffer[..length].copy_from_slice(&self.current.split_to(length));
        Ok(length)
    }
}
