//! The store against a registry on loopback, real files and real mounts.

#![allow(missing_docs)]

mod artifacts;
mod cancel;
mod crash;
mod full;
mod hostile;
mod idmap;
mod layer;
mod machine;
mod names;
mod removal;
mod rootfs;
mod server;
mod sharing;

use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use podvisor_image_store::{Image, ImageError, ImageStore, Options};
use tempfile::TempDir;

/// How long to wait for what must come. Only a failing test waits so long.
pub(crate) const PATIENCE: Duration = Duration::from_secs(60);

/// Directories of a store.
pub(crate) struct World {
    directory: Option<TempDir>,
    at: PathBuf,
}

impl World {
    pub(crate) fn new() -> Self {
        let directory = tempfile::tempdir().unwrap();
        let at = directory.path().to_owned();
        Self { directory: Some(directory), at }
    }

    /// At a place that somebody else removes.
    pub(crate) fn at(path: &Path) -> Self {
        Self { directory: None, at: path.to_owned() }
    }

    pub(crate) fn path(&self, name: &str) -> PathBuf {
        self.at.join(name)
    }

    pub(crate) fn options(&self) -> Options {
        Options {
            root: self.path("images"),
            run: self.path("run"),
            registry: podvisor_registry::Options {
                registries_conf: self.path("registries.conf"),
                certs_dir: self.path("certs.d"),
                auth_files: Vec::new(),
                default_registries: vec!["docker.io".into()],
                progress_timeout: Duration::from_secs(30),
                user_agent: "podvisor-test".into(),
            },
            parallel_layers: 3,
            machine_images: false,
        }
    }

    pub(crate) fn registries_conf(&self, text: &str) {
        std::fs::write(self.path("registries.conf"), text).unwrap();
    }

    /// Opens the store; waits for one that has been dropped to be gone altogether.
    pub(crate) async fn open(&self) -> ImageStore {
        let deadline = Instant::now() + PATIENCE;
        loop {
            match ImageStore::open(self.options()).await {
                Err(ImageError::Locked { .. }) if Instant::now() < deadline => {
                    tokio::time::sleep(Duration::from_millis(5)).await;
                }
                opened => return opened.unwrap(),
            }
        }
    }

    /// Diff ids of the layers on disk.
    pub(crate) fn layers(&self) -> Vec<String> {
        entries(&self.path("images/layers")).iter().map(|name| format!("sha256:{name}")).collect()
    }

    /// What is unfinished or on its way out.
    pub(crate) fn ingest(&self) -> Vec<String> {
        entries(&self.path("images/ingest"))
    }

    /// Waits until exactly these layers are there and nothing is in between.
    pub(crate) async fn holds(&self, diff_ids: &[String]) {
        let mut wanted = diff_ids.to_vec();
        wanted.sort();
        wanted.dedup();
        eventually(|| {
            let (layers, ingest) = (self.layers(), self.ingest());
            if layers == wanted && ingest.is_empty() { Ok(()) } else { Err((layers, ingest)) }
        })
        .await;
    }
}

impl Drop for World {
    fn drop(&mut self) {
        let Some(directory) = self.directory.take() else { return };
        // Directories that are removed in the background may vanish under our hands.
        let deadline = Instant::now() + PATIENCE;
        let path = directory.keep();
        while let Err(error) = std::fs::remove_dir_all(&path) {
            if !path.exists() {
                break;
            }
            if Instant::now() >= deadline {
                // The first failure is the one to tell.
                assert!(std::thread::panicking(), "{}: {error}", path.display());
                break;
            }
            std::thread::yield_now();
        }
    }
}

fn entries(directory: &Path) -> Vec<String> {
    let mut names: Vec<_> = std::fs::read_dir(directory)
        .unwrap()
        .map(|entry| entry.unwrap().file_name().into_string().unwrap())
        .collect();
    names.sort();
    names
}

/// Waits until `check` is content; else fails with what it said last.
pub(crate) async fn eventually<E: std::fmt::Debug>(mut check: impl FnMut() -> Result<(), E>) {
    let deadline = Instant::now() + PATIENCE;
    while let Err(why) = check() {
        assert!(Instant::now() < deadline, "never: {why:?}");
        tokio::time::sleep(Duration::from_millis(5)).await;
    }
}

/// All ids, sorted.
pub(crate) fn ids(store: &ImageStore) -> Vec<String> {
    store.list().into_iter().map(|image| image.id).collect()
}

/// The error and its causes on one line.
pub(crate) fn chain(error: &dyn std::error::Error) -> String {
    let mut text = error.to_string();
    let mut cause = error.source();
    while let Some(error) = cause {
        text = format!("{text}: {error}");
        cause = error.source();
    }
    text
}

/// What a file of the image holds, seen through its layers' directories.
pub(crate) fn layer_file(world: &World, diff_id: &str, name: &str) -> Vec<u8> {
    let layer = world.path("images/layers").join(diff_id.strip_prefix("sha256:").unwrap());
    std::fs::read(layer.join(name)).unwrap()
}

/// What must be the same however one looks at an image.
pub(crate) fn assert_named(store: &ImageStore, image: &Image, names: &[&str]) {
    for name in names {
        let found = store.get(name).unwrap_or_else(|| panic!("{name} is not found"));
        assert_eq!(found.id, image.id, "{name}");
    }
}
