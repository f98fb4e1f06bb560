//! Which images there are. Changes go one after the other: durable first, then visible. Readers take a published copy and never
//! wait for the disk.
//!
//! Lock order: `tables` or the snapshots' `making`, then the snapshots' `records`, then the layers' `state`, then `published`.

use std::collections::{BTreeMap, BTreeSet, HashSet};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError, RwLock};

use oci_spec::image::ImageConfiguration;
use podvisor_registry::Reference;

use crate::Image;
use crate::database::{Database, ImageRecord, Tables};
use crate::error::{ErrorKind, ImageError};

/// Digits of a shortened id that are worth looking for.
const SHORTEST_ID: usize = 3;

/// What readers see.
#[derive(Debug, Default)]
pub(crate) struct Published {
    images: BTreeMap<String, Listed>,
    short_names: BTreeMap<String, String>,
}

#[derive(Debug)]
struct Listed {
    image: Image,
    /// Diff ids, lowest first.
    layers: Vec<String>,
}

/// What is true, and what the database says: less may be true, when there was no room to write that something is gone.
#[derive(Debug, Default)]
struct State {
    now: Tables,
    written: Tables,
}

/// The images of a store.
#[derive(Debug)]
pub(crate) struct Catalog {
    database: Database,
    /// Held while the database is changed.
    tables: Mutex<State>,
    published: RwLock<Arc<Published>>,
    pinned: RwLock<HashSet<String>>,
}

impl Catalog {
    /// `tables` is what the database says.
    pub(crate) fn new(database: Database, tables: Tables) -> Self {
        let catalog = Self {
            database,
            tables: Mutex::default(),
            published: RwLock::default(),
            pinned: RwLock::default(),
        };
        catalog.publish(&tables);
        *catalog.tables() = State { written: tables.clone(), now: tables };
        catalog
    }

    /// What there is now.
    pub(crate) fn published(&self) -> Arc<Published> {
        self.published.read().unwrap_or_else(PoisonError::into_inner).clone()
    }

    /// One change, whole or not at all. `kept` adds layers whose rows stay although no image has them. Blocking.
    pub(crate) fn change(
        &self,
        kept: impl FnOnce(&mut HashSet<String>),
        edit: impl FnOnce(&mut Tables),
    ) -> Result<(), ImageError> {
        let mut state = self.tables();
        let next = edited(&state.now, kept, edit);
        if next != state.now || state.now != state.written {
            self.database.replace(&state.written, &next)?;
            state.now = next.clone();
            state.written = next;
            self.publish(&state.now);
        }
        Ok(())
    }

    /// Takes an image out. A full disk does not prevent that, as it is how room is made: `false` says that it is not
    /// written yet, and that [`Catalog::persist`] should be called as soon as there is room. A start without it finds the
    /// image without its layers, and drops it. Blocking.
    pub(crate) fn remove(
        &self,
        kept: impl FnOnce(&mut HashSet<String>),
        id: &str,
    ) -> Result<bool, ImageError> {
        let mut state = self.tables();
        let next = edited(&state.now, kept, |tables| drop(tables.images.remove(id)));
        let written = match self.database.replace(&state.written, &next) {
            Ok(()) => {
                state.written = next.clone();
                true
            }
            Err(error) if error.kind() == ErrorKind::Full => {
                tracing::warn!(image = id, "the disk is too full to write down that an image is gone");
                false
            }
            Err(error) => return Err(error),
        };
        state.now = next;
        self.publish(&state.now);
        Ok(written)
    }

    /// Writes what could not be written before. Blocking.
    pub(crate) fn persist(&self) -> Result<(), ImageError> {
        let mut state = self.tables();
        self.database.replace(&state.written, &state.now)?;
        state.written = state.now.clone();
        Ok(())
    }

    /// Pins the images that have one of these names, and no others.
    pub(crate) fn pin(&self, names: HashSet<String>) {
        let state = self.tables();
        *self.pinned.write().unwrap_or_else(PoisonError::into_inner) = names;
        self.publish(&state.now);
    }

    fn tables(&self) -> MutexGuard<'_, State> {
        self.tables.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn publish(&self, tables: &Tables) {
        let before = self.published();
        let pinned = self.pinned.read().unwrap_or_else(PoisonError::into_inner);
        let mut images = BTreeMap::new();
        for (id, record) in &tables.images {
            let (config, raw_config) = match before.images.get(id) {
                Some(Listed { image, .. }) => (image.config.clone(), image.raw_config.clone()),
                None if record.artifact.is_some() => (Arc::default(), Arc::from("")),
                None => match parse_config(id, &record.config) {
                    Ok(config) => (Arc::new(config), Arc::from(record.config.as_str())),
                    Err(error) => {
                        tracing::error!(image = id, %error, "an image cannot be shown");
                        continue;
                    }
                },
            };
            let image = Image {
                id: id.clone(),
                artifact: record.artifact.clone(),
                repo_tags: record.repo_tags.clone(),
                repo_digests: record.repo_digests.clone(),
                size: record.size,
                config,
                raw_config,
                pinned: record.names().any(|name| pinned.contains(name)),
                pulled_at: record.pulled_at,
            };
            images.insert(id.clone(), Listed { image, layers: record.layers.clone() });
        }
        let published = Published { images, short_names: tables.short_names.clone() };
        *self.published.write().unwrap_or_else(PoisonError::into_inner) = Arc::new(published);
    }
}

impl Published {
    /// All images, sorted by id.
    pub(crate) fn images(&self) -> impl Iterator<Item = &Image> {
        self.images.values().map(|listed| &listed.image)
    }

    /// The image with that id and its layers, lowest first.
    pub(crate) fn with_id(&self, id: &str) -> Option<(&Image, &[String])> {
        self.images.get(id).map(|listed| (&listed.image, listed.layers.as_slice()))
    }

    /// Adds the layers of all images.
    pub(crate) fn needed(&self, layers: &mut HashSet<String>) {
        layers.extend(self.images.values().flat_map(|listed| listed.layers.iter().cloned()));
    }

    /// The layers of each image, lowest first.
    pub(crate) fn layers(&self) -> impl Iterator<Item = &[String]> {
        self.images.values().map(|listed| listed.layers.as_slice())
    }

    /// The image that a name means: an id, what a short name meant when it was pulled, a reference, the beginning of an id.
    pub(crate) fn find(&self, name: &str) -> Option<&Image> {
        if let Some(listed) = self.images.get(name) {
            return Some(&listed.image);
        }
        let meant = self.short_names.get(name).map_or(name, String::as_str);
        if let Ok(reference) = Reference::parse(meant)
            && let Some(image) = self.by_reference(&reference)
        {
            return Some(image);
        }
        self.by_prefix(name.strip_prefix("sha256:").unwrap_or(name))
    }

    fn by_reference(&self, reference: &Reference) -> Option<&Image> {
        let canonical = reference.to_string();
        let named =
            |image: &&Image| image.repo_tags.iter().chain(&image.repo_digests).any(|name| *name == canonical);
        if let Some(image) = self.images().find(named) {
            return Some(image);
        }
        // The identity itself behind a repository's name, as kubelet puts it together.
        let image = &self.images.get(reference.digest()?.as_str())?.image;
        let prefix = format!("{}@", reference.name());
        image.repo_digests.iter().any(|name| name.starts_with(&prefix)).then_some(image)
    }

    fn by_prefix(&self, hex: &str) -> Option<&Image> {
        if hex.len() < SHORTEST_ID || !hex.bytes().all(|byte| matches!(byte, b'0'..=b'9' | b'a'..=b'f')) {
            return None;
        }
        let prefix = format!("sha256:{hex}");
        let mut found = self.images.range(prefix.clone()..).take_while(|(id, _)| id.starts_with(&prefix));
        let (_, listed) = found.next()?;
        found.next().is_none().then_some(&listed.image)
    }
}

/// What the tables become by a change: rows that mean nothing any more go with it.
fn edited(now: &Tables, kept: impl FnOnce(&mut HashSet<String>), edit: impl FnOnce(&mut Tables)) -> Tables {
    let mut next = now.clone();
    edit(&mut next);
    let mut needed = next.images.values().flat_map(|record| record.layers.iter().cloned()).collect();
    kept(&mut needed);
    next.layers.retain(|diff_id, _| needed.contains(diff_id));
    let named: HashSet<&String> = next.images.values().flat_map(ImageRecord::names).collect();
    next.short_names.retain(|_, meant| named.contains(meant));
    next
}

/// Reads an image configuration.
pub(crate) fn parse_config(name: &str, text: &str) -> Result<ImageConfiguration, ImageError> {
    ImageConfiguration::from_reader(text.as_bytes())
        .map_err(|source| ImageError::BadConfig { name: name.to_owned(), source })
}

/// Both together, sorted, each once.
pub(crate) fn merged(present: &[String], more: Vec<String>) -> Vec<String> {
    present.iter().cloned().chain(more).collect::<BTreeSet<_>>().into_iter().collect()
}
