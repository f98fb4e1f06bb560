//! A pull: what the name means, the layers that are missing, and the change that makes the image visible.

use std::collections::{HashMap, HashSet};
use std::fs::File;
use std::sync::Arc;
use std::time::{SystemTime, UNIX_EPOCH};

use futures_util::{StreamExt, TryStreamExt};
use podvisor_registry::{Content, Credentials, Reference, ResolvedImage};

use crate::artifact::{self, files_layer};
use crate::catalog::{merged, parse_config};
use crate::database::{ImageRecord, LayerRecord};
use crate::error::{ErrorKind, ImageError};
use crate::layers::Lease;
use crate::store::{ImageStore, Shared, blocking};

impl ImageStore {
    /// Pulls and returns the image's id.
    pub(crate) async fn fetch(
        &self,
        name: &str,
        credentials: Option<&Credentials>,
    ) -> Result<String, ImageError> {
        let shared = &self.shared;
        let resolved = self.resolve(name, credentials).await?;
        let config = std::str::from_utf8(&resolved.config).unwrap_or_default().to_owned();
        if resolved.artifact.is_none() {
            parse_config(name, &config)?;
        }

        let manifest = resolved.manifest_digest.to_string();
        let files = resolved.artifact.as_ref().and_then(|a| files_layer(a, &resolved.manifest_digest));
        let diff_ids: Vec<_> = artifact::layers(&resolved.layers, files.as_ref()).collect();
        // Whatever was fetched in vain goes when this pull ends or is dropped; so do an artifact's files, which are elsewhere then.
        let blobs = resolved.layers.iter().map(|layer| layer.diff_id.to_string());
        let lease = Some(shared.layers.lease(diff_ids.iter().cloned().chain(blobs).collect()));
        let assembled = files.as_ref().and_then(|files| shared.layers.present(files, &manifest));
        let hold = Arc::new(Hold { shared: shared.clone(), lease });
        // Artifacts are files for containers, not their root.
        let for_machines = shared.options.machine_images && resolved.artifact.is_none();
        let mut seen = HashSet::new();
        let mut fetches = Vec::new();
        for layer in resolved.layers.iter().filter(|layer| seen.insert((&layer.diff_id, &layer.digest))) {
            if layer.content == Content::File && assembled.is_some() {
                continue;
            }
            let (layers, registry, source, layer) =
                (shared.layers.clone(), shared.registry.clone(), resolved.source.clone(), layer.clone());
            let (host, hold) = (resolved.reference.registry().to_owned(), hold.clone());
            let machine = for_machines.then(|| shared.machine.clone());
            fetches.push(async move {
                let fetched = layers.fetch(&registry, &source, &layer, &host, hold).await;
                let (diff_id, record) = (layer.diff_id.to_string(), fetched.map_err(ImageError::Shared)?);
                if let Some(machine) = machine {
                    // Its files are still in memory.
                    machine.layer(&layers, None, &diff_id).await.or_else(unless_full)?;
                }
                Ok((diff_id, record))
            });
        }
        let mut fetched: HashMap<String, LayerRecord> = futures_util::stream::iter(fetches)
            .buffer_unordered(shared.options.parallel_layers.max(1))
            .try_collect()
            .await?;

        if let (Some(files), Some(artifact)) = (files, resolved.artifact.clone()) {
            let record = if let Some(record) = assembled {
                record
            } else {
                let (hold, key, fetched) = (hold.clone(), files.clone(), fetched.clone());
                blocking(move || hold.shared.layers.assemble(&key, &manifest, &artifact, &fetched)).await?
            };
            fetched.insert(files, record);
        }
        if for_machines {
            let made = shared.machine.image(&shared.layers, None, &diff_ids).await;
            made.map(drop).or_else(unless_full)?;
        }
        let id = resolved.identity.to_string();
        let record = ImageRecord {
            config,
            artifact: resolved.artifact.as_ref().map(|artifact| artifact.kind.clone()),
            size: (resolved.layers.iter().map(|layer| layer.size))
                .fold((resolved.manifest.len() + resolved.config.len()) as u64, u64::saturating_add),
            layers: diff_ids,
            repo_tags: Vec::new(),
            repo_digests: Vec::new(),
            pulled_at: now(),
        };
        let names = Names::of(name, &resolved);
        let image = id.clone();
        // It goes on to its end without us; the hold goes with it, so that the layers stay until they have an image.
        blocking(move || hold.shared.admit(image, record, names, fetched)).await?;
        Ok(id)
    }

    /// Asks for each reference that the name may mean, until one is found.
    async fn resolve(
        &self,
        name: &str,
        credentials: Option<&Credentials>,
    ) -> Result<ResolvedImage, ImageError> {
        let registry = &self.shared.registry;
        let failed = || ImageError::registry(name);
        let candidates = registry.candidates(name).await.map_err(failed())?;
        let mut errors = Vec::new();
        for candidate in candidates {
            match registry.resolve(&candidate, credentials).await {
                Ok(resolved) => return Ok(resolved),
                Err(error) => errors.push(error),
            }
        }
        Err(match (errors.pop(), errors.is_empty()) {
            (Some(only), true) => failed()(only),
            (Some(last), false) => {
                errors.push(last);
                ImageError::Candidates { name: name.to_owned(), errors }
            }
            (None, _) => ImageError::NotFound(name.to_owned()),
        })
    }
}

impl Shared {
    /// Makes a pulled image durable, then visible.
    fn admit(
        &self,
        id: String,
        record: ImageRecord,
        names: Names,
        fetched: HashMap<String, LayerRecord>,
    ) -> Result<(), ImageError> {
        let unsynced = self.layers.unsynced(&record.layers);
        if !unsynced.is_empty() {
            // All layers on the disk before the first word of the image: one call for all their files.
            let root = &self.options.root;
            let directory = File::open(root).map_err(ImageError::io("open", root))?;
            rustix::fs::syncfs(&directory)
                .map_err(|error| ImageError::io("write to disk", root)(error.into()))?;
            self.layers.synced(&unsynced);
        }
        podvisor_fault::point("pull.layers-durable");
        self.change(move |tables| {
            // A tag that has moved is no longer the old image's.
            for other in tables.images.values_mut() {
                other.repo_tags.retain(|tag| !names.tags.contains(tag));
            }
            let record = tables.images.entry(id).or_insert(record);
            record.repo_tags = merged(&record.repo_tags, names.tags);
            record.repo_digests = merged(&record.repo_digests, names.digests);
            for (diff_id, layer) in fetched {
                tables.layers.entry(diff_id).or_default().merge(layer);
            }
            match names.short {
                Some((short, meant)) => drop(tables.short_names.insert(short, meant)),
                // It means now what it says.
                None => drop(tables.short_names.remove(&names.asked)),
            }
        })?;
        podvisor_fault::point("pull.recorded");
        Ok(())
    }
}

/// Keeps layers while a pull, or a fetch that it began, is on its way; then those that it fetched for no image are collected.
struct Hold {
    shared: Arc<Shared>,
    lease: Option<Lease>,
}

impl Drop for Hold {
    fn drop(&mut self) {
        drop(self.lease.take());
        let shared = self.shared.clone();
        match tokio::runtime::Handle::try_current() {
            Ok(runtime) => drop(runtime.spawn_blocking(move || shared.collect())),
            Err(_) => shared.collect(),
        }
    }
}

/// The names that a pull gives an image.
struct Names {
    asked: String,
    tags: Vec<String>,
    digests: Vec<String>,
    /// A name that means something else here than it says, and what.
    short: Option<(String, String)>,
}

impl Names {
    fn of(asked: &str, resolved: &ResolvedImage) -> Self {
        let reference = &resolved.reference;
        let canonical = reference.to_string();
        let says_so = Reference::parse(asked).is_ok_and(|says| says == *reference);
        Self {
            asked: asked.to_owned(),
            // A reference with a digest names that content, whatever tag stands beside it.
            tags: if reference.tag().is_some() { vec![canonical.clone()] } else { Vec::new() },
            digests: vec![reference.with_digest(resolved.target_digest.clone()).to_string()],
            short: (!says_so).then(|| (asked.to_owned(), canonical)),
        }
    }
}

/// An image that cannot be had in the form for virtual machines is one for all others: only a full disk is worth failing for.
fn unless_full(error: ImageError) -> Result<(), ImageError> {
    if error.kind() == ErrorKind::Full {
        return Err(error);
    }
    tracing::warn!(error = &error as &dyn std::error::Error, "an image is not there for virtual machines");
    Ok(())
}

fn now() -> i64 {
    let since = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
    i64::try_from(since.as_nanos()).unwrap_or(i64::MAX)
}
