//! Talking to registries: references, mirrors, credentials, and blobs that survive broken connections.
//!
//! Nothing here writes to disk. A pull goes [`Reference::parse`] → [`Registry::resolve`] (index → manifest for
//! this platform → configuration) → [`Registry::blob`] for each layer, whose bytes the caller verifies and unpacks.

use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

use bytes::Bytes;

/// Where configuration comes from and how patient to be.
#[derive(Debug, Clone)]
pub struct Options {
    /// registries.conf v2; drop-ins in `<file>.d/`. Read again when it changed.
    pub registries_conf: PathBuf,
    /// containerd's `certs.d`.
    pub certs_dir: PathBuf,
    /// docker `config.json` files, first match wins. Read again at each pull.
    pub auth_files: Vec<PathBuf>,
    /// For names without a registry, when registries.conf has no `unqualified-search-registries`.
    pub default_registries: Vec<String>,
    /// No byte for this long: the transfer is broken (and resumed, a bounded number of times).
    pub progress_timeout: Duration,
    /// `User-Agent`.
    pub user_agent: String,
}

/// Credentials from a CRI request (`AuthConfig`). Never logged: `Debug` prints no secret.
#[derive(Clone, Default, PartialEq, Eq, Hash)]
pub struct Credentials {
    /// With `password`.
    pub username: String,
    /// With `username`.
    pub password: String,
    /// Base64 of `username:password`.
    pub auth: String,
    /// Where they apply; empty: to the registry asked.
    pub server_address: String,
    /// An OAuth2 refresh token for the registry's token server.
    pub identity_token: String,
    /// Sent as it is, as a bearer token.
    pub registry_token: String,
}

/// Content identity: `sha256:` and 64 lowercase hex digits (sha512 likewise).
#[derive(Debug, Clone, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct Digest(String);

/// A normalised image reference: registry, repository, tag and/or digest.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub struct Reference {}

/// One layer as the manifest names it.
#[derive(Debug, Clone)]
pub struct LayerDescriptor {
    /// Of the compressed blob.
    pub digest: Digest,
    /// Compressed size, bytes.
    pub size: u64,
    /// How it is compressed.
    pub compression: Compression,
    /// Of the tar inside, from the image configuration.
    pub diff_id: Digest,
}

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

/// What a reference turned out to be, verified by digest from the top down.
#[derive(Debug, Clone)]
pub struct ResolvedImage {
    /// The reference as normalised.
    pub reference: Reference,
    /// Digest of what the reference names (the index, where there is one): goes into repo digests.
    pub target_digest: Digest,
    /// Digest of the manifest for this platform.
    pub manifest_digest: Digest,
    /// The manifest's bytes.
    pub manifest: Bytes,
    /// Digest of the image configuration: the image's identity.
    pub config_digest: Digest,
    /// The image configuration's bytes (OCI image-spec config).
    pub config: Bytes,
    /// In order, lowest first.
    pub layers: Vec<LayerDescriptor>,
    /// Where it came from, for `blob`.
    pub source: Arc<Source>,
}

/// The endpoints that answered, with the authorisation they gave. Opaque.
#[derive(Debug)]
pub struct Source {}

/// A client for all registries: connection pool, tokens, configuration.
#[derive(Debug)]
pub struct Registry {}

/// A blob's bytes in order. Resumes by itself (Range) after a broken connection, at the next endpoint if need be.
/// Ends after exactly the descriptor's size; does **not** verify the digest (the caller hashes).
#[derive(Debug)]
pub struct BlobStream {}

/// Why nothing was pulled; names each endpoint that was tried and what it answered.
#[derive(Debug, thiserror::Error)]
#[error("placeholder")]
pub struct RegistryError;

impl Registry {
    /// Reads nothing yet but the options.
    pub fn new(_options: Options) -> Result<Self, RegistryError> {
        todo!()
    }

    /// Finds out what `reference` is: tries its endpoints in order, follows an index to this platform, fetches manifest and configuration.
    pub async fn resolve(
        &self,
        _reference: &Reference,
        _credentials: Option<&Credentials>,
    ) -> Result<ResolvedImage, RegistryError> {
        todo!()
    }

    /// Opens a layer of a resolved image.
    pub async fn blob(&self, _source: &Arc<Source>, _layer: &LayerDescriptor) -> Result<BlobStream, RegistryError> {
        todo!()
    }
}

impl BlobStream {
    /// The next bytes; `None` at the end.
    pub async fn next(&mut self) -> Result<Option<Bytes>, RegistryError> {
        todo!()
    }
}
