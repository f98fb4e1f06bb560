//! What a registry holds: documents and blobs by digest, and tags.

use std::collections::HashMap;

use podvisor_registry::Digest;
use serde_json::{Value, json};

use crate::server::{Answer, Reply, Seen};

pub(crate) const INDEX: &str = "application/vnd.oci.image.index.v1+json";
pub(crate) const MANIFEST: &str = "application/vnd.oci.image.manifest.v1+json";
pub(crate) const CONFIG: &str = "application/vnd.oci.image.config.v1+json";
pub(crate) const LAYER: &str = "application/vnd.oci.image.layer.v1.tar+gzip";

/// One repository. Layers hold arbitrary bytes: nothing unpacks them here.
#[derive(Debug, Clone, Default)]
pub(crate) struct Content {
    /// By tag and by digest: media type and bytes.
    pub(crate) documents: HashMap<String, (String, Vec<u8>)>,
    pub(crate) blobs: HashMap<String, Vec<u8>>,
    /// Whether Range requests are answered with 206.
    pub(crate) knows_ranges: bool,
}

impl Content {
    /// `latest` is an image with these layers.
    pub(crate) fn image(layers: &[Vec<u8>]) -> Self {
        let mut content = Self { knows_ranges: true, ..Self::default() };
        let manifest = content.add_image(layers, "amd64");
        content.tag("latest", &manifest);
        content
    }

    /// `latest` is an image with one layer of `size` bytes.
    pub(crate) fn with_layer(size: usize) -> Self {
        Self::image(&[pattern(size)])
    }

    /// Adds an image and returns the descriptor of its manifest.
    pub(crate) fn add_image(&mut self, layers: &[Vec<u8>], architecture: &str) -> Value {
        let diff_ids: Vec<_> = layers.iter().map(|layer| Digest::sha256(layer).to_string()).collect();
        let config = json!({
            "architecture": architecture, "os": "linux", "rootfs": {"type": "layers", "diff_ids": diff_ids},
        });
        let config = self.add_blob(CONFIG, config.to_string().into_bytes());
        let layers: Vec<_> = layers.iter().map(|layer| self.add_blob(LAYER, layer.clone())).collect();
        let manifest = json!({"schemaVersion": 2, "mediaType": MANIFEST, "config": config, "layers": layers});
        self.add_document(MANIFEST, &manifest)
    }

    /// Adds an index of descriptors and returns its own.
    pub(crate) fn add_index(&mut self, entries: &[Value]) -> Value {
        self.add_document(INDEX, &json!({"schemaVersion": 2, "mediaType": INDEX, "manifests": entries}))
    }

    pub(crate) fn add_document(&mut self, media_type: &str, document: &Value) -> Value {
        let bytes = document.to_string().into_bytes();
        let descriptor = descriptor(media_type, &bytes);
        self.documents.insert(digest(&descriptor), (media_type.to_owned(), bytes));
        descriptor
    }

    pub(crate) fn add_blob(&mut self, media_type: &str, bytes: Vec<u8>) -> Value {
        let descriptor = descriptor(media_type, &bytes);
        self.blobs.insert(digest(&descriptor), bytes);
        descriptor
    }

    pub(crate) fn tag(&mut self, tag: &str, descriptor: &Value) {
        let document = self.documents[&digest(descriptor)].clone();
        self.documents.insert(tag.to_owned(), document);
    }

    /// The digest of the (one) layer of at least `size` bytes.
    pub(crate) fn layer(&self, size: usize) -> (&str, &[u8]) {
        let found = self.blobs.iter().find(|(_, bytes)| bytes.len() >= size).unwrap();
        (found.0, found.1)
    }

    /// Answers as a proper registry does.
    pub(crate) fn answer(&self, seen: &Seen) -> Answer {
        let version = seen.path.rsplit('/').next().unwrap_or_default();
        if seen.path.contains("/manifests/") {
            return match self.documents.get(version) {
                Some((media_type, bytes)) => Answer::new(200, media_type, bytes.clone()),
                None => missing("MANIFEST_UNKNOWN"),
            };
        }
        let Some(bytes) = self.blobs.get(version).filter(|_| seen.path.contains("/blobs/")) else {
            return missing("BLOB_UNKNOWN");
        };
        match seen.range_start().filter(|_| self.knows_ranges) {
            Some(start) => {
                let range = format!("bytes {start}-{}/{}", bytes.len() - 1, bytes.len());
                Answer::new(206, "application/octet-stream", &bytes[start..]).with("content-range", &range)
            }
            None => Answer::new(200, "application/octet-stream", bytes.clone()),
        }
    }

    pub(crate) fn reply(&self, seen: &Seen) -> Reply {
        self.answer(seen).into()
    }
}

/// Bytes that are not the same anywhere, so that a wrong offset shows.
pub(crate) fn pattern(size: usize) -> Vec<u8> {
    (0..size.div_ceil(8))
        .flat_map(|n| (n as u64).wrapping_mul(0x9e37_79b9_7f4a_7c15).to_le_bytes())
        .take(size)
        .collect()
}

pub(crate) fn descriptor(media_type: &str, bytes: &[u8]) -> Value {
    json!({"mediaType": media_type, "digest": Digest::sha256(bytes).as_str(), "size": bytes.len()})
}

pub(crate) fn for_platform(mut descriptor: Value, architecture: &str) -> Value {
    let os = if architecture == "unknown" { "unknown" } else { "linux" };
    descriptor["platform"] = json!({"os": os, "architecture": architecture});
    descriptor
}

pub(crate) fn digest(descriptor: &Value) -> String {
    descriptor["digest"].as_str().unwrap().to_owned()
}

pub(crate) fn missing(code: &str) -> Answer {
    let body = json!({"errors": [{"code": code, "message": "not here"}]});
    Answer::new(404, "application/json", body.to_string())
}
