//! Images: configuration, manifest and index around layers, and the order in which a registry wants them.

use anyhow::Result;
use serde_json::{Value, json};

use crate::layer::{Compression, Digest, Files, Layer, digest_of};

/// Which vendor's media types an image uses; the structures are the same.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Dialect {
    /// `application/vnd.docker.…`
    Docker,
    /// `application/vnd.oci.…`
    Oci,
}

impl Dialect {
    fn index(self) -> &'static str {
        match self {
            Self::Docker => "application/vnd.docker.distribution.manifest.list.v2+json",
            Self::Oci => "application/vnd.oci.image.index.v1+json",
        }
    }

    fn manifest(self) -> &'static str {
        match self {
            Self::Docker => "application/vnd.docker.distribution.manifest.v2+json",
            Self::Oci => "application/vnd.oci.image.manifest.v1+json",
        }
    }

    fn config(self) -> &'static str {
        match self {
            Self::Docker => "application/vnd.docker.container.image.v1+json",
            Self::Oci => "application/vnd.oci.image.config.v1+json",
        }
    }

    fn layer(self, compression: Compression) -> &'static str {
        match (self, compression) {
            (Self::Docker, Compression::Plain) => "application/vnd.docker.image.rootfs.diff.tar",
            (Self::Docker, _) => "application/vnd.docker.image.rootfs.diff.tar.gzip",
            (Self::Oci, Compression::Plain) => "application/vnd.oci.image.layer.v1.tar",
            (Self::Oci, Compression::Gzip) => "application/vnd.oci.image.layer.v1.tar+gzip",
            (Self::Oci, Compression::Zstd) => "application/vnd.oci.image.layer.v1.tar+zstd",
        }
    }
}

/// An image for this machine's architecture, to be pushed alone or in an index.
#[derive(Debug, Clone)]
pub struct Image {
    layers: Vec<Layer>,
    /// The `config` object of the configuration: `Cmd`, `User` and their like.
    config: Value,
    dialect: Dialect,
    /// With an index in which images for other machines stand before this one.
    indexed: bool,
}

/// A manifest or index as a registry takes it.
#[derive(Debug, Clone)]
pub struct Document {
    /// Its `Content-Type`.
    pub media_type: &'static str,
    /// Its digest.
    pub digest: Digest,
    /// The JSON text.
    pub body: Vec<u8>,
}

/// Everything that makes up an image, in the order of pushing.
#[derive(Debug, Clone, Default)]
pub struct Bundle {
    /// Layers and configurations with their digests.
    pub blobs: Vec<(Digest, Vec<u8>)>,
    /// Manifests; the last is the one that a tag names.
    pub documents: Vec<Document>,
}

impl Bundle {
    /// What the tag names: the index, or the only manifest.
    pub fn top(&self) -> &Document {
        self.documents.last().expect("a bundle has at least one manifest")
    }
}

impl Image {
    /// An image of `layers`; `config` is the `config` object of its configuration.
    pub fn new(layers: Vec<Layer>, config: Value) -> Self {
        Self { layers, config, dialect: Dialect::Docker, indexed: true }
    }

    /// Without an index around it.
    #[must_use]
    pub fn single(mut self) -> Self {
        self.indexed = false;
        self
    }

    /// With media types of that dialect.
    #[must_use]
    pub fn dialect(mut self, dialect: Dialect) -> Self {
        self.dialect = dialect;
        self
    }

    /// With one more layer on top.
    #[must_use]
    pub fn layer(mut self, layer: Layer) -> Self {
        self.layers.push(layer);
        self
    }

    /// With one key of its configuration set.
    #[must_use]
    pub fn set(mut self, key: &str, value: impl Into<Value>) -> Self {
        self.config[key] = value.into();
        self
    }

    /// Everything to be pushed. An index lists images for other machines around the real one: their layers hold no
    /// program, so a client that takes the first entry gets an image that cannot run.
    pub fn bundle(&self) -> Result<Bundle> {
        let mut bundle = Bundle::default();
        if !self.indexed {
            self.add_manifest(&mut bundle, &self.layers, &json!({"architecture": "amd64"}));
            return Ok(bundle);
        }
        let platforms = [
            json!({"architecture": "arm64", "variant": "v8"}),
            json!({"architecture": "arm", "variant": "v7"}),
            json!({"architecture": "amd64"}),
            json!({"architecture": "s390x"}),
        ];
        let mut entries = Vec::new();
        for platform in platforms {
            let decoy;
            let layers = if platform["architecture"] == "amd64" {
                self.layers.as_slice()
            } else {
                decoy = [Files::new().file("decoy", 0o644, platform.to_string()).pack(Compression::Gzip)?];
                &decoy
            };
            let manifest = self.add_manifest(&mut bundle, layers, &platform);
            let mut described = platform;
            described["os"] = "linux".into();
            entries.push(json!({
                "mediaType": manifest.media_type,
                "digest": manifest.digest,
                "size": manifest.body.len(),
                "platform": described,
            }));
        }
        let index = json!({"schemaVersion": 2, "mediaType": self.dialect.index(), "manifests": entries});
        bundle.documents.push(document(self.dialect.index(), &index));
        Ok(bundle)
    }

    fn add_manifest(&self, bundle: &mut Bundle, layers: &[Layer], platform: &Value) -> Document {
        let mut config = platform.clone();
        config["os"] = "linux".into();
        config["created"] = "1970-01-01T00:00:00Z".into();
        config["config"] = self.config.clone();
        config["rootfs"] = json!({
            "type": "layers",
            "diff_ids": layers.iter().map(|layer| layer.diff_id.as_str()).collect::<Vec<_>>(),
        });
        config["history"] = layers
            .iter()
            .map(|_| json!({"created": "1970-01-01T00:00:00Z", "created_by": "podvisor tests"}))
            .collect();
        let config = config.to_string().into_bytes();
        let manifest = json!({
            "schemaVersion": 2,
            "mediaType": self.dialect.manifest(),
            "config": {
                "mediaType": self.dialect.config(),
                "digest": digest_of(&config),
                "size": config.len(),
            },
            "layers": layers
                .iter()
                .map(|layer| json!({
                    "mediaType": self.dialect.layer(layer.compression),
                    "digest": digest_of(&layer.blob),
                    "size": layer.blob.len(),
                }))
                .collect::<Vec<_>>(),
        });
        bundle.blobs.push((digest_of(&config), config));
        bundle.blobs.extend(layers.iter().map(|layer| (digest_of(&layer.blob), layer.blob.clone())));
        let manifest = document(self.dialect.manifest(), &manifest);
        bundle.documents.push(manifest.clone());
        manifest
    }
}

fn document(media_type: &'static str, content: &Value) -> Document {
    let body = content.to_string().into_bytes();
    Document { media_type, digest: digest_of(&body), body }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn image() -> Image {
        let layer = Files::new().file("bin/sh", 0o755, "x").pack(Compression::Gzip).unwrap();
        Image::new(vec![layer], json!({"Cmd": ["sh"]}))
    }

    #[test]
    fn an_index_puts_a_decoy_first() {
        let bundle = image().bundle().unwrap();
        let index: Value = serde_json::from_slice(&bundle.top().body).unwrap();
        let architectures: Vec<_> = index["manifests"]
            .as_array()
            .unwrap()
            .iter()
            .map(|m| m["platform"]["architecture"].clone())
            .collect();
        assert_eq!(architectures, ["arm64", "arm", "amd64", "s390x"]);
        for entry in index["manifests"].as_array().unwrap() {
            assert!(bundle.documents.iter().any(|d| d.digest == entry["digest"].as_str().unwrap()));
        }
    }

    #[test]
    fn every_blob_that_a_manifest_names_is_in_the_bundle() {
        let bundle = image().dialect(Dialect::Oci).bundle().unwrap();
        for document in &bundle.documents {
            let manifest: Value = serde_json::from_slice(&document.body).unwrap();
            let Some(layers) = manifest["layers"].as_array() else { continue };
            for named in layers.iter().chain([&manifest["config"]]) {
                let blob =
                    bundle.blobs.iter().find(|(digest, _)| digest == named["digest"].as_str().unwrap());
                assert_eq!(blob.unwrap().1.len() as u64, named["size"].as_u64().unwrap());
            }
        }
    }

    #[test]
    fn the_same_image_has_the_same_digest() {
        assert_eq!(image().bundle().unwrap().top().digest, image().bundle().unwrap().top().digest);
        let marked = image().set("User", "1000").bundle().unwrap();
        assert_ne!(marked.top().digest, image().bundle().unwrap().top().digest);
    }
}
