//! Reading manifests, indexes and image configurations (OCI image-spec and Docker schema 2).
//!
//! What a document is follows from its fields; every media type that is stated must agree with them, so that no
//! two readers can see different images in the same bytes (CVE-2021-41190).

mod artifact;

use serde::Deserialize;

use crate::digest::Digest;
use crate::failure::{Failure, printable};
use crate::platform::{HostPlatform, Platform};

pub use artifact::Artifact;

/// Manifests and indexes: distribution-spec recommends that registries accept 4 MiB.
pub(crate) const MANIFEST_MAX: u64 = 4 << 20;
/// Image configurations. Those of large images are some 100 KiB.
pub(crate) const CONFIG_MAX: u64 = 8 << 20;
/// overlayfs takes 500 lower directories (OVL_MAX_STACK); nobody builds more layers than that.
const LAYERS_MAX: usize = 512;
/// More entries than any index of images has.
const INDEX_ENTRIES_MAX: usize = 4096;

const OCI_INDEX: &str = "application/vnd.oci.image.index.v1+json";
const OCI_MANIFEST: &str = "application/vnd.oci.image.manifest.v1+json";
const OCI_CONFIG: &str = "application/vnd.oci.image.config.v1+json";
const DOCKER_LIST: &str = "application/vnd.docker.distribution.manifest.list.v2+json";
const DOCKER_MANIFEST: &str = "application/vnd.docker.distribution.manifest.v2+json";
const DOCKER_CONFIG: &str = "application/vnd.docker.container.image.v1+json";
const SCHEMA_1: [&str; 2] = [
    "application/vnd.docker.distribution.manifest.v1+json",
    "application/vnd.docker.distribution.manifest.v1+prettyjws",
];

/// The `Accept` header for manifests.
pub(crate) const ACCEPT: &str = "application/vnd.oci.image.index.v1+json, \
    application/vnd.oci.image.manifest.v1+json, \
    application/vnd.docker.distribution.manifest.list.v2+json, \
    application/vnd.docker.distribution.manifest.v2+json, */*;q=0.1";

/// How a layer is compressed.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Compression {
    /// Plain tar.
    None,
    /// gzip.
    Gzip,
    /// zstd.
    Zstd,
}

/// What a blob is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Content {
    /// A layer of an image: a tar.
    Layer,
    /// A tar in an artifact: its own digest is said nowhere.
    Archive,
    /// A file in an artifact, as it is.
    File,
}

/// One layer as the manifest names it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct LayerDescriptor {
    /// Of the compressed blob.
    pub digest: Digest,
    /// Compressed size, bytes.
    pub size: u64,
    /// How it is compressed.
    pub compression: Compression,
    /// Of the tar inside, from the image configuration. For the blobs of an artifact, which has none: what they are kept by, made
    /// from their digest.
    pub diff_id: Digest,
    /// What it is.
    pub content: Content,
}

/// What a manifest URL answered.
#[derive(Debug)]
pub(crate) enum Document {
    Index(Index),
    Manifest(Manifest),
}

/// Images for several platforms.
#[derive(Debug)]
pub(crate) struct Index {
    entries: Vec<Entry>,
}

/// A document that an index points to.
#[derive(Debug, Clone)]
pub(crate) struct Entry {
    pub(crate) digest: Digest,
    pub(crate) size: u64,
    pub(crate) media_type: String,
    platform: Option<Platform>,
}

/// One image.
#[derive(Debug)]
pub(crate) struct Manifest {
    pub(crate) config_digest: Digest,
    pub(crate) config_size: u64,
    layers: Vec<(Digest, u64, Compression)>,
    /// Where it is no image.
    artifact: Option<(Artifact, Vec<LayerDescriptor>)>,
}

/// The parts of an image configuration that the pull needs.
#[derive(Debug)]
pub(crate) struct Config {
    pub(crate) platform: Option<Platform>,
    diff_ids: Vec<Digest>,
}

#[derive(Deserialize)]
#[serde(rename_all = "camelCase")]
struct RawDocument {
    schema_version: Option<u64>,
    media_type: Option<String>,
    artifact_type: Option<String>,
    config: Option<RawDescriptor>,
    layers: Option<Vec<RawDescriptor>>,
    manifests: Option<Vec<RawDescriptor>>,
    fs_layers: Option<serde::de::IgnoredAny>,
}

#[derive(Deserialize)]
#[serde(rename_all = "camelCase")]
struct RawDescriptor {
    #[serde(default)]
    media_type: String,
    digest: String,
    size: u64,
    #[serde(default)]
    urls: Option<Vec<String>>,
    platform: Option<Platform>,
    artifact_type: Option<String>,
    /// Whatever is there: only an artifact's are looked at.
    annotations: Option<serde_json::Value>,
}

#[derive(Deserialize)]
struct RawConfig {
    #[serde(default)]
    os: String,
    #[serde(default)]
    architecture: String,
    #[serde(default)]
    variant: Option<String>,
    rootfs: RawRootfs,
}

#[derive(Deserialize)]
struct RawRootfs {
    #[serde(rename = "type")]
    kind: String,
    #[serde(default)]
    diff_ids: Option<Vec<String>>,
}

impl Document {
    /// Reads `bytes`, which somebody called `stated` (a Content-Type or a descriptor's media type).
    pub(crate) fn parse(bytes: &[u8], stated: Option<&str>) -> Result<Self, Failure> {
        let raw: RawDocument =
            serde_json::from_slice(bytes).map_err(|error| garbage(printable(&error.to_string())))?;
        let media_type = raw.media_type.as_deref().map(str::trim).filter(|text| !text.is_empty());
        let stated = stated.and_then(essence);
        let mentioned: Vec<&str> = media_type.into_iter().chain(stated.as_deref()).collect();
        if raw.schema_version == Some(1)
            || raw.fs_layers.is_some()
            || mentioned.iter().any(|name| SCHEMA_1.contains(name))
        {
            return Err(Failure::Unsupported(
                "is a Docker schema 1 manifest, which is no longer supported; push the image again"
                    .to_owned(),
            ));
        }
        if raw.schema_version != Some(2) {
            return Err(garbage("its schemaVersion is not 2".to_owned()));
        }
        let is_index = match (&raw.manifests, &raw.config, &raw.layers) {
            (Some(_), None, None) => true,
            // `layers: null` is what Go writes for an image without any.
            (None, Some(_), _) => false,
            (Some(_), _, _) => return Err(garbage("it is an index and a manifest at once".to_owned())),
            (None, _, _) => return Err(garbage("it has neither manifests nor a config".to_owned())),
        };
        for name in mentioned {
            match (name, is_index) {
                (OCI_INDEX | DOCKER_LIST, true) | (OCI_MANIFEST | DOCKER_MANIFEST, false) => {}
                (OCI_INDEX | DOCKER_LIST | OCI_MANIFEST | DOCKER_MANIFEST, _) => {
                    return Err(garbage(format!("its fields do not fit its media type {name}")));
                }
                (other, _) => {
                    return Err(Failure::Unsupported(format!(
                        "has media type {:?}, which is no image manifest",
                        printable(other)
                    )));
                }
            }
        }
        if is_index {
            Index::check(raw.manifests.unwrap_or_default()).map(Self::Index)
        } else {
            Manifest::check(raw).map(Self::Manifest)
        }
    }
}

impl Index {
    fn check(raw: Vec<RawDescriptor>) -> Result<Self, Failure> {
        if raw.len() > INDEX_ENTRIES_MAX {
            return Err(garbage(format!("its index has more than {INDEX_ENTRIES_MAX} entries")));
        }
        let mut entries = Vec::with_capacity(raw.len());
        for descriptor in raw {
            // Signatures and the like; and entries that no client of this kind can use.
            let is_image = matches!(
                descriptor.media_type.as_str(),
                OCI_INDEX | DOCKER_LIST | OCI_MANIFEST | DOCKER_MANIFEST
            );
            if !is_image || descriptor.artifact_type.is_some() {
                continue;
            }
            entries.push(Entry {
                digest: digest(&descriptor.digest)?,
                size: descriptor.size,
                media_type: descriptor.media_type,
                platform: descriptor.platform.filter(|platform| !platform.os.is_empty()),
            });
        }
        Ok(Self { entries })
    }

    /// What to look at for `host`, best first: entries for it, then entries that say no platform (among them
    /// nested indexes). Entries for `unknown/unknown` are attestations.
    pub(crate) fn candidates(&self, host: HostPlatform) -> Vec<&Entry> {
        let mut fitting: Vec<(_, &Entry)> = self
            .entries
            .iter()
            .filter_map(|entry| Some((host.fit(entry.platform.as_ref()?)?, entry)))
            .collect();
        // Stable: of equals the first wins.
        fitting.sort_by_key(|(fit, _)| std::cmp::Reverse(*fit));
        let unnamed = self.entries.iter().filter(|entry| entry.platform.is_none());
        fitting.into_iter().map(|(_, entry)| entry).chain(unnamed).collect()
    }

    /// The platforms there are, for an error.
    pub(crate) fn platforms(&self) -> String {
        let mut names: Vec<String> = self
            .entries
            .iter()
            .filter_map(|entry| entry.platform.as_ref())
            .filter(|platform| !platform.is_unknown())
            .map(ToString::to_string)
            .collect();
        names.dedup();
        if names.is_empty() { "none".to_owned() } else { printable(&names.join(", ")) }
    }
}

impl Entry {
    /// Whether the index itself says that this is for some platform.
    pub(crate) fn has_platform(&self) -> bool {
        self.platform.is_some()
    }
}

impl Manifest {
    fn check(raw: RawDocument) -> Result<Self, Failure> {
        let config = raw.config.ok_or_else(|| garbage("it has no config".to_owned()))?;
        let layers = raw.layers.unwrap_or_default();
        if !matches!(config.media_type.as_str(), OCI_CONFIG | DOCKER_CONFIG) {
            let kind = raw.artifact_type.unwrap_or(config.media_type);
            total(0, layers.iter())?;
            return Ok(Self {
                config_digest: digest(&config.digest)?,
                config_size: config.size,
                layers: Vec::new(),
                artifact: Some(artifact::check(printable(&kind), layers)?),
            });
        }
        if config.size > CONFIG_MAX {
            return Err(Failure::Unsupported(format!(
                "has an image configuration of {} bytes, more than {CONFIG_MAX}",
                config.size
            )));
        }
        if layers.len() > LAYERS_MAX {
            return Err(Failure::Unsupported(format!("has {} layers, more than {LAYERS_MAX}", layers.len())));
        }
        total(config.size, layers.iter())?;
        let mut checked = Vec::with_capacity(layers.len());
        for layer in layers {
            let compression = compression(&layer)?;
            checked.push((digest(&layer.digest)?, layer.size, compression));
        }
        Ok(Self {
            config_digest: digest(&config.digest)?,
            config_size: config.size,
            layers: checked,
            artifact: None,
        })
    }

    /// What it is made of, if it is no image but an artifact.
    pub(crate) fn artifact(&self) -> Option<(Artifact, Vec<LayerDescriptor>)> {
        self.artifact.clone()
    }

    /// Joins the layers with the configuration's diff ids.
    pub(crate) fn layers(&self, config: &Config) -> Result<Vec<LayerDescriptor>, Failure> {
        if config.diff_ids.len() != self.layers.len() {
            return Err(garbage(format!(
                "it has {} layers, but its configuration has {} diff_ids",
                self.layers.len(),
                config.diff_ids.len()
            )));
        }
        let joined = self.layers.iter().zip(&config.diff_ids);
        Ok(joined
            .map(|((digest, size, compression), diff_id)| LayerDescriptor {
                digest: digest.clone(),
                size: *size,
                compression: *compression,
                diff_id: diff_id.clone(),
                content: Content::Layer,
            })
            .collect())
    }
}

impl Config {
    pub(crate) fn parse(bytes: &[u8]) -> Result<Self, Failure> {
        let unreadable = |problem: String| Failure::Garbage { what: "image configuration", problem };
        let raw: RawConfig =
            serde_json::from_slice(bytes).map_err(|error| unreadable(printable(&error.to_string())))?;
        if raw.rootfs.kind != "layers" {
            return Err(unreadable(format!(
                "its rootfs has type {:?}, not layers",
                printable(&raw.rootfs.kind)
            )));
        }
        let diff_ids = raw
            .rootfs
            .diff_ids
            .unwrap_or_default()
            .iter()
            .map(|text| Digest::parse(text).map_err(|error| unreadable(format!("diff_ids: {error}"))))
            .collect::<Result<Vec<_>, _>>()?;
        let platform = (!raw.os.is_empty() && !raw.architecture.is_empty()).then(|| Platform {
            os: raw.os,
            architecture: raw.architecture,
            variant: raw.variant.unwrap_or_default(),
        });
        Ok(Self { platform, diff_ids })
    }
}

/// Refuses sizes whose sum is none.
fn total<'a>(first: u64, mut layers: impl Iterator<Item = &'a RawDescriptor>) -> Result<(), Failure> {
    layers
        .try_fold(first, |sum, layer| sum.checked_add(layer.size).filter(|sum| i64::try_from(*sum).is_ok()))
        .map(drop)
        .ok_or_else(|| garbage("its layers' sizes are impossible".to_owned()))
}

fn compression(layer: &RawDescriptor) -> Result<Compression, Failure> {
    let name = layer.media_type.as_str();
    let (compression, is_foreign) = match name {
        "application/vnd.oci.image.layer.v1.tar" | "application/vnd.docker.image.rootfs.diff.tar" => {
            (Compression::None, false)
        }
        "application/vnd.oci.image.layer.v1.tar+gzip"
        | "application/vnd.docker.image.rootfs.diff.tar.gzip" => (Compression::Gzip, false),
        "application/vnd.oci.image.layer.v1.tar+zstd"
        | "application/vnd.docker.image.rootfs.diff.tar.zstd" => (Compression::Zstd, false),
        "application/vnd.oci.image.layer.nondistributable.v1.tar"
        | "application/vnd.docker.image.rootfs.foreign.diff.tar" => (Compression::None, true),
        "application/vnd.oci.image.layer.nondistributable.v1.tar+gzip"
        | "application/vnd.docker.image.rootfs.foreign.diff.tar.gzip" => (Compression::Gzip, true),
        "application/vnd.oci.image.layer.nondistributable.v1.tar+zstd" => (Compression::Zstd, true),
        other => {
            return Err(Failure::Unsupported(format!("has a layer of unknown type {:?}", printable(other))));
        }
    };
    if is_foreign && layer.urls.as_ref().is_some_and(|urls| !urls.is_empty()) {
        return Err(Failure::Unsupported(format!(
            "has a foreign layer {} ({name}) that is not in the registry; such layers are not fetched from elsewhere",
            printable(&layer.digest)
        )));
    }
    Ok(compression)
}

/// The media type without parameters; types that say nothing count as not stated.
fn essence(stated: &str) -> Option<String> {
    let name = stated.split(';').next().unwrap_or_default().trim().to_ascii_lowercase();
    match name.as_str() {
        ""
        | "application/json"
        | "text/plain"
        | "text/json"
        | "application/octet-stream"
        | "binary/octet-stream" => None,
        _ => Some(name),
    }
}

fn digest(text: &str) -> Result<Digest, Failure> {
    Digest::parse(text).map_err(|error| garbage(printable(&error.to_string())))
}

fn garbage(problem: String) -> Failure {
    Failure::Garbage { what: "manifest", problem }
}

#[cfg(test)]
mod tests;
