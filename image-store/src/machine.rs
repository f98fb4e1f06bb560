//! Images for virtual machines (`podvisor-erofs`): per layer a data blob and an index, made of its directory, and per image the metadata that
//! merges them. They are made when somebody wants them first, or with a pull, and go with what they were made of.
//!
//! They are pieces with names of their own in `machine/`, each a directory that is on the disk before it gets its name: so there whole or
//! not at all. Machines that must not see each other in the host's page cache (who has a page there can tell when another reads it) have
//! pieces of their own: a **domain**.

use std::collections::{HashMap, HashSet};
use std::fs::{File, Permissions};
use std::io::{BufReader, BufWriter};
use std::os::fd::AsFd;
use std::os::unix::fs::{MetadataExt, PermissionsExt};
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use podvisor_erofs::{BLOCK, write_image, write_layer};
use podvisor_registry::Digest;

use crate::error::ImageError;
use crate::flight::Flights;
use crate::layers::{Layers, Lease};
use crate::store::blocking;
use crate::tree::Scratch;
use crate::usage::Usage;

const DATA: &str = "data";
const INDEX: &str = "index";
const METADATA: &str = "metadata";
/// The domain of all that need none.
const NODE: &str = "node";

/// An image for virtual machines: files that belong to root, are never written again and are there as long as the snapshot that they
/// were asked for.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct MachineImage {
    /// The EROFS metadata. It comes first in the address range of the machine.
    pub metadata: PathBuf,
    /// The data blobs, in the order in which they follow it. Every file is a multiple of 4096 bytes long, and there is nothing between them.
    pub blobs: Vec<PathBuf>,
    /// All of it, bytes.
    pub size: u64,
}

/// Images for virtual machines in a store.
#[derive(Debug)]
pub(crate) struct MachineImages {
    directory: PathBuf,
    ingest: PathBuf,
    /// Whether files can share their blocks here.
    shares: bool,
    /// The pieces there are.
    present: Mutex<HashMap<String, Usage>>,
    flights: Flights<String, Result<(), Arc<ImageError>>>,
}

impl MachineImages {
    /// Looks at what is there.
    pub(crate) fn open(root: &Path) -> Result<Self, ImageError> {
        let (directory, ingest) = (root.join("machine"), root.join("ingest"));
        let mut present = HashMap::new();
        let entries = std::fs::read_dir(&directory).map_err(ImageError::io("read", &directory))?;
        for entry in entries.flatten() {
            if let Ok(name) = entry.file_name().into_string() {
                present.insert(name, usage(&entry.path()));
            }
        }
        let shares = can_share(&ingest);
        Ok(Self { directory, ingest, shares, present: Mutex::new(present), flights: Flights::default() })
    }

    /// Makes what is missing of an image's pieces, and says where they are. `layers` are its diff ids, lowest first.
    pub(crate) async fn image(
        self: &Arc<Self>,
        store: &Arc<Layers>,
        domain: Option<&str>,
        layers: &[String],
    ) -> Result<MachineImage, ImageError> {
        let layers = distinct(layers);
        for layer in &layers {
            self.layer(store, domain, layer).await?;
        }
        let name = image_name(domain, &layers);
        let blobs: Vec<PathBuf> =
            layers.iter().map(|layer| self.directory.join(layer_name(domain, layer))).collect();
        let (this, to, from) = (self.clone(), name.clone(), blobs.clone());
        let made = self.make(name.clone(), store.lease(layers.clone()), move || this.merge(&to, &from)).await;
        if let Err(error) = made {
            if error.is_damage() {
                // Made anew by whoever tries next; who has the blobs open keeps them.
                self.take(layers.iter().map(|layer| layer_name(domain, layer)).collect())
                    .into_iter()
                    .for_each(Scratch::discard);
            }
            return Err(error);
        }
        let metadata = self.directory.join(name).join(METADATA);
        blocking(move || located(metadata, &blobs)).await
    }

    /// Makes the pieces of one layer unless they are there.
    pub(crate) async fn layer(
        self: &Arc<Self>,
        store: &Arc<Layers>,
        domain: Option<&str>,
        layer: &str,
    ) -> Result<(), ImageError> {
        let name = layer_name(domain, layer);
        let lease = store.lease(vec![layer.to_owned()]);
        let (this, to, tree) = (self.clone(), name.clone(), store.path(layer));
        self.make(name, lease, move || this.read(&to, &tree)).await
    }

    /// Does the work for a piece, once for all who want it now. What it is made of stays meanwhile.
    async fn make(
        &self,
        name: String,
        lease: Lease,
        work: impl FnOnce() -> Result<(), ImageError> + Send + 'static,
    ) -> Result<(), ImageError> {
        if self.present().contains_key(&name) {
            return Ok(());
        }
        let to_its_end = move || {
            let made = work();
            drop(lease);
            made
        };
        let start = || async move { blocking(to_its_end).await.map_err(Arc::new) };
        match self.flights.join(name, start).await {
            Some(Ok(())) => Ok(()),
            Some(Err(error)) => Err(ImageError::Shared(error)),
            None => Err(ImageError::Cancelled),
        }
    }

    /// Reads a layer's tree. Blocking.
    fn read(&self, name: &str, tree: &Path) -> Result<(), ImageError> {
        let failed = |source| ImageError::MachineImage { path: tree.to_owned(), source };
        // A layer that is gone meanwhile fails here; one that is here stays, by the lease.
        let directory = File::open(tree).map_err(ImageError::io("open", tree))?;
        let scratch = Scratch::new(&self.ingest)?;
        let data = create(&scratch.file(DATA))?;
        let index = BufWriter::new(create(&scratch.file(INDEX))?);
        let (index, summary) = write_layer(directory.as_fd(), &data, index, self.shares).map_err(failed)?;
        let index = index.into_inner().map_err(|error| failed(error.into_error().into()))?;
        tracing::debug!(
            piece = name,
            files = summary.entries,
            blocks = summary.blocks,
            "read a layer for machines"
        );
        self.admit(name, scratch, &[(DATA, &data), (INDEX, &index)])
    }

    /// Merges layers. Blocking.
    fn merge(&self, name: &str, layers: &[PathBuf]) -> Result<(), ImageError> {
        let open = |layer: &PathBuf| {
            let path = layer.join(INDEX);
            File::open(&path).map(BufReader::new).map_err(ImageError::io("open", path))
        };
        let mut indexes = layers.iter().map(open).collect::<Result<Vec<_>, _>>()?;
        let scratch = Scratch::new(&self.ingest)?;
        let mut metadata = create(&scratch.file(METADATA))?;
        write_image(&mut indexes, &mut metadata)
            .map_err(|source| ImageError::MachineImage { path: self.directory.join(name), source })?;
        self.admit(name, scratch, &[(METADATA, &metadata)])
    }

    /// Gives a piece its name, when its files are on the disk.
    fn admit(&self, name: &str, scratch: Scratch, files: &[(&str, &File)]) -> Result<(), ImageError> {
        for (file, open) in files {
            let path = scratch.file(file);
            open.set_permissions(Permissions::from_mode(0o400))
                .map_err(ImageError::io("set the mode of", &path))?;
            open.sync_all().map_err(ImageError::io("write to disk", &path))?;
        }
        let usage = usage(&scratch.file(""));
        let mut present = self.present();
        if present.contains_key(name) {
            drop(present);
            scratch.discard();
            return Ok(());
        }
        scratch.rename(&self.directory.join(name))?;
        present.insert(name.to_owned(), usage);
        Ok(())
    }

    /// Takes away every piece that is not among those that `needed` says, which is asked only where there are any. What is returned is to be
    /// removed: it has lost its name already.
    pub(crate) fn collect(&self, needed: impl FnOnce() -> HashSet<String>) -> Vec<Scratch> {
        if self.present().is_empty() {
            return Vec::new();
        }
        let needed = needed();
        let idle = self.present().keys().filter(|name| !needed.contains(*name)).cloned().collect();
        self.take(idle)
    }

    fn take(&self, names: Vec<String>) -> Vec<Scratch> {
        let mut present = self.present();
        let mut taken = Vec::new();
        for name in names.into_iter().filter(|name| present.contains_key(name)).collect::<Vec<_>>() {
            match Scratch::of(&self.ingest, &self.directory.join(&name)) {
                Ok(scratch) => {
                    present.remove(&name);
                    taken.push(scratch);
                }
                Err(error) => tracing::warn!(name, %error, "cannot take a piece away that nobody needs"),
            }
        }
        taken
    }

    /// What they use on the disk: bytes and inodes.
    pub(crate) fn usage(&self) -> (u64, u64) {
        let present = self.present();
        present.values().fold((0, 0), |(bytes, inodes), piece| (bytes + piece.bytes, inodes + piece.inodes))
    }

    fn present(&self) -> MutexGuard<'_, HashMap<String, Usage>> {
        self.present.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// Adds the names of the pieces of an image.
pub(crate) fn pieces(domain: Option<&str>, layers: &[String], names: &mut HashSet<String>) {
    let layers = distinct(layers);
    names.insert(image_name(domain, &layers));
    names.extend(layers.iter().map(|layer| layer_name(domain, layer)));
}

/// The name of a layer's pieces.
pub(crate) fn layer_name(domain: Option<&str>, diff_id: &str) -> String {
    format!("{}-layer-{}", domain_name(domain), hex(diff_id))
}

fn image_name(domain: Option<&str>, layers: &[String]) -> String {
    let chain = Digest::sha256(layers.join(" ").as_bytes()).to_string();
    format!("{}-image-{}", domain_name(domain), hex(&chain))
}

/// The name of a domain may be any text.
fn domain_name(domain: Option<&str>) -> String {
    domain
        .map_or_else(|| NODE.to_owned(), |domain| hex(Digest::sha256(domain.as_bytes()).as_str()).to_owned())
}

fn hex(digest: &str) -> &str {
    digest.rsplit(':').next().unwrap_or_default()
}

/// A layer that an image has twice adds nothing below itself.
fn distinct(layers: &[String]) -> Vec<String> {
    let mut seen = HashSet::new();
    let mut distinct: Vec<_> = layers.iter().rev().filter(|layer| seen.insert(*layer)).cloned().collect();
    distinct.reverse();
    distinct
}

fn create(path: &Path) -> Result<File, ImageError> {
    let file = File::options().read(true).write(true).create_new(true).open(path);
    file.map_err(ImageError::io("make", path))
}

/// The files of an image whose pieces are all there.
fn located(metadata: PathBuf, layers: &[PathBuf]) -> Result<MachineImage, ImageError> {
    let length = |path: &Path| {
        let stat = std::fs::metadata(path).map_err(ImageError::io("look at", path))?;
        debug_assert!(stat.len().is_multiple_of(BLOCK));
        Ok::<_, ImageError>(stat.len())
    };
    let mut image = MachineImage { size: length(&metadata)?, metadata, blobs: Vec::new() };
    for path in layers.iter().map(|layer| layer.join(DATA)) {
        let length = length(&path)?;
        image.size += length;
        // A layer without content has an empty one, which nobody can map.
        if length > 0 {
            image.blobs.push(path);
        }
    }
    Ok(image)
}

/// Of a piece: its directory and what is in it.
fn usage(directory: &Path) -> Usage {
    let files = std::fs::read_dir(directory).into_iter().flatten().flatten();
    files.filter_map(|file| file.metadata().ok()).fold(Usage { bytes: 0, inodes: 1 }, |sum, file| Usage {
        bytes: sum.bytes + file.blocks() * 512,
        inodes: sum.inodes + 1,
    })
}

/// Tries out whether the file system of the store has files that share blocks (reflinks: XFS, btrfs). On a full disk it counts as one that
/// has not: a start must not depend on room.
fn can_share(ingest: &Path) -> bool {
    let attempt = || {
        let scratch = Scratch::new(ingest)?;
        let (from, to) = (create(&scratch.file("from"))?, create(&scratch.file("to"))?);
        Ok::<_, ImageError>(rustix::fs::ioctl_ficlone(&to, &from).is_ok())
    };
    attempt().unwrap_or(false)
}
