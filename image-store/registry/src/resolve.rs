//! From a reference to an image: index → manifest for this platform → configuration, each verified by the digest
//! that named it.
//!
//! Endpoints are asked in order for every document; one that fails is asked last from then on. What a tag means is
//! the first endpoint's answer that is a manifest at all; from there on digests decide, whoever serves them.

use std::fmt;
use std::pin::Pin;
use std::sync::Arc;

use bytes::Bytes;
use http::header::{ACCEPT, CONTENT_TYPE};
use http::{HeaderMap, HeaderValue};

use crate::digest::Digest;
use crate::endpoint::Kind;
use crate::error::{Attempts, ErrorKind, RegistryError};
use crate::failure::Failure;
use crate::manifest::{self, Artifact, Config, Document, Index, LayerDescriptor, Manifest};
use crate::platform::HostPlatform;
use crate::reference::Reference;
use crate::session::{Session, Wire};
use crate::source::Source;

/// An index, and an index inside it.
const INDEX_DEPTH_MAX: usize = 2;
/// Entries without a platform are looked at in vain this often.
const GUESSES_MAX: usize = 16;
/// A document is asked for again once when the connection broke.
const TRIES: usize = 2;

/// What a reference turned out to be, verified by digest from the top down.
#[derive(Clone)]
pub struct ResolvedImage {
    /// The reference as normalised.
    pub reference: Reference,
    /// Digest of what the reference names (the index, where there is one): goes into repo digests.
    pub target_digest: Digest,
    /// Digest of the manifest for this platform.
    pub manifest_digest: Digest,
    /// The manifest's bytes.
    pub manifest: Bytes,
    /// Digest of the image configuration; of the manifest, where that is an artifact, whose configurations are often all the same.
    pub identity: Digest,
    /// The image configuration's bytes (OCI image-spec config); empty for an artifact.
    pub config: Bytes,
    /// Where it is no image.
    pub artifact: Option<Artifact>,
    /// In order, lowest first.
    pub layers: Vec<LayerDescriptor>,
    /// Where it came from, for `blob`.
    pub source: Arc<Source>,
}

/// One resolution in progress.
pub(crate) struct Walk<'a> {
    wire: &'a Wire,
    source: Arc<Source>,
    host: HostPlatform,
    attempts: Attempts,
}

/// Verified bytes and where they came from.
struct Fetched {
    bytes: Bytes,
    digest: Digest,
    url: String,
}

struct Selected {
    manifest: Fetched,
    identity: Digest,
    config: Bytes,
    artifact: Option<Artifact>,
    layers: Vec<LayerDescriptor>,
}

/// What is known about a document before it is fetched.
#[derive(Clone, Copy)]
struct Expected<'a> {
    digest: Option<&'a Digest>,
    size: Option<u64>,
    limit: u64,
}

/// The outer error ends the resolution; the inner one only rules out a document.
type Outcome<T> = Result<Result<T, Failure>, RegistryError>;

impl<'a> Walk<'a> {
    pub(crate) fn new(wire: &'a Wire, source: Arc<Source>) -> Self {
        Self { wire, source, host: HostPlatform::detect(), attempts: Attempts::default() }
    }

    pub(crate) async fn resolve(mut self) -> Result<ResolvedImage, RegistryError> {
        let (document, top) = match self.source.reference.digest().cloned() {
            Some(digest) => self.document(&digest, None, None).await?,
            None => self.tagged().await?,
        };
        let (target_digest, url) = (top.digest.clone(), top.url.clone());
        match self.select(document, top, 1, false).await? {
            Ok(Selected { manifest, identity, config, artifact, layers }) => Ok(ResolvedImage {
                reference: self.source.reference.clone(),
                target_digest,
                manifest_digest: manifest.digest,
                manifest: manifest.bytes,
                identity,
                config,
                artifact,
                layers,
                source: self.source,
            }),
            Err(failure) => Err(self.unusable(url, failure)),
        }
    }

    /// What the tag means at the first endpoint that knows it.
    async fn tagged(&mut self) -> Result<(Document, Fetched), RegistryError> {
        let source = Arc::clone(&self.source);
        let tag = source.reference.version();
        let expected = Expected { digest: None, size: None, limit: manifest::MANIFEST_MAX };
        for session in source.sessions.iter().filter(|session| session.endpoint().capabilities.resolve) {
            let outcome = match self.fetch(session, Kind::Manifests, tag, expected).await {
                Ok((fetched, stated)) => match Document::parse(&fetched.bytes, stated.as_deref()) {
                    Ok(document) => return Ok((document, fetched)),
                    // A proxy's login page is no reason to give up on the others; a manifest that cannot be used is.
                    Err(failure) if failure.kind() == ErrorKind::Corrupt => failure,
                    Err(failure) => return Err(self.unusable(fetched.url, failure)),
                },
                Err(failure) => failure,
            };
            self.failed(session, Kind::Manifests, tag, outcome);
        }
        Err(self.exhausted())
    }

    /// A manifest or index by its digest.
    async fn document(
        &mut self,
        digest: &Digest,
        size: Option<u64>,
        media_type: Option<&str>,
    ) -> Result<(Document, Fetched), RegistryError> {
        let expected = Expected { digest: Some(digest), size, limit: manifest::MANIFEST_MAX };
        let (fetched, stated) = self.fetch_anywhere(Kind::Manifests, digest, expected).await?;
        // The bytes are what their digest says: if they cannot be read, nobody has better ones.
        match Document::parse(&fetched.bytes, media_type.or(stated.as_deref())) {
            Ok(document) => Ok((document, fetched)),
            Err(failure) => Err(self.unusable(fetched.url, failure)),
        }
    }

    /// Boxed, as an index leads to further documents.
    fn select<'s>(
        &'s mut self,
        document: Document,
        at: Fetched,
        depth: usize,
        must_match: bool,
    ) -> Pin<Box<dyn Future<Output = Outcome<Selected>> + Send + 's>> {
        Box::pin(async move {
            match document {
                Document::Manifest(manifest) => self.image(&manifest, at, must_match).await,
                Document::Index(_) if depth > INDEX_DEPTH_MAX => Ok(Err(Failure::Unsupported(format!(
                    "has indexes nested more than {INDEX_DEPTH_MAX} deep"
                )))),
                Document::Index(index) => self.entry(&index, depth).await,
            }
        })
    }

    /// Follows an index to the image for this platform.
    async fn entry(&mut self, index: &Index, depth: usize) -> Outcome<Selected> {
        let mut ruled_out = None;
        for entry in index.candidates(self.host).into_iter().take(GUESSES_MAX) {
            let (document, fetched) =
                self.document(&entry.digest, Some(entry.size), Some(&entry.media_type)).await?;
            match self.select(document, fetched, depth + 1, !entry.has_platform()).await? {
                Ok(selected) => return Ok(Ok(selected)),
                // The index meant exactly this one.
                Err(failure) if entry.has_platform() => return Ok(Err(failure)),
                Err(failure) => {
                    ruled_out.get_or_insert(failure);
                }
            }
        }
        Ok(Err(ruled_out.unwrap_or_else(|| Failure::NoPlatform {
            wanted: self.host.to_string(),
            found: index.platforms(),
        })))
    }

    /// Completes a manifest with its configuration.
    async fn image(&mut self, manifest: &Manifest, at: Fetched, must_match: bool) -> Outcome<Selected> {
        if let Some((artifact, layers)) = manifest.artifact() {
            if must_match {
                // An index that says nothing of platforms has signatures and the like among its images.
                return Ok(Err(Failure::Unsupported(format!(
                    "is an OCI artifact of type {:?}, not a container image",
                    artifact.kind
                ))));
            }
            let (identity, config) = (at.digest.clone(), Bytes::new());
            return Ok(Ok(Selected { manifest: at, identity, config, artifact: Some(artifact), layers }));
        }
        let digest = &manifest.config_digest;
        let expected =
            Expected { digest: Some(digest), size: Some(manifest.config_size), limit: manifest::CONFIG_MAX };
        let (fetched, _) = self.fetch_anywhere(Kind::Blobs, digest, expected).await?;
        let checked = Config::parse(&fetched.bytes).and_then(|config| {
            if let Some(platform) = config.platform.as_ref().filter(|_| must_match)
                && self.host.fit(platform).is_none()
            {
                let (wanted, found) = (self.host.to_string(), platform.to_string());
                return Err(Failure::NoPlatform { wanted, found: crate::failure::printable(&found) });
            }
            manifest.layers(&config)
        });
        Ok(checked.map(|layers| Selected {
            manifest: at,
            identity: fetched.digest,
            config: fetched.bytes,
            artifact: None,
            layers,
        }))
    }

    /// Content by digest, from whoever has it.
    async fn fetch_anywhere(
        &mut self,
        kind: Kind,
        digest: &Digest,
        expected: Expected<'_>,
    ) -> Result<(Fetched, Option<String>), RegistryError> {
        let source = Arc::clone(&self.source);
        for position in source.for_content() {
            let session = &source.sessions[position];
            match self.fetch(session, kind, digest.as_str(), expected).await {
                Ok(fetched) => return Ok(fetched),
                Err(failure) => self.failed(session, kind, digest.as_str(), failure),
            }
        }
        Err(self.exhausted())
    }

    /// One document from one endpoint, and what media type it claims.
    async fn fetch(
        &self,
        session: &Session,
        kind: Kind,
        version: &str,
        expected: Expected<'_>,
    ) -> Result<(Fetched, Option<String>), Failure> {
        let mut tries = 1;
        loop {
            match self.fetch_once(session, kind, version, expected).await {
                Err(failure) if tries < TRIES && failure.is_transient() && !failure.is_dead_end() => {
                    tries += 1;
                }
                outcome => return outcome,
            }
        }
    }

    async fn fetch_once(
        &self,
        session: &Session,
        kind: Kind,
        version: &str,
        expected: Expected<'_>,
    ) -> Result<(Fetched, Option<String>), Failure> {
        let mut headers = HeaderMap::new();
        if kind == Kind::Manifests {
            headers.insert(ACCEPT, HeaderValue::from_static(manifest::ACCEPT));
        }
        let limit = expected.size.unwrap_or(expected.limit);
        if limit > expected.limit {
            return Err(Failure::TooLarge { limit: expected.limit });
        }
        let response = session.get(self.wire, kind, version, &headers).await?;
        let stated =
            response.headers().get(CONTENT_TYPE).and_then(|value| value.to_str().ok()).map(str::to_owned);
        let bytes = match (self.wire.transport.read(response, limit).await, expected) {
            (Err(Failure::TooLarge { .. }), Expected { digest: Some(digest), size: Some(size), .. }) => {
                return Err(Failure::WrongSize { digest: digest.clone(), got: size + 1, size });
            }
            (read, _) => read?,
        };
        let got = bytes.len() as u64;
        if let Some(size) = expected.size.filter(|size| got < *size) {
            return Err(Failure::CutShort { got, size });
        }
        let digest = match expected.digest {
            Some(digest) => {
                let found = Digest::of(digest.algorithm(), &bytes);
                if found != *digest {
                    return Err(Failure::WrongDigest { expected: digest.clone(), found });
                }
                found
            }
            None => Digest::sha256(&bytes),
        };
        Ok((Fetched { bytes, digest, url: session.shown(kind, version) }, stated))
    }

    fn failed(&mut self, session: &Session, kind: Kind, version: &str, failure: Failure) {
        session.demote();
        let url = session.shown(kind, version);
        tracing::debug!(reference = %self.source.reference, url, reason = %failure, "endpoint failed");
        self.attempts.add(url, failure);
    }

    fn exhausted(&mut self) -> RegistryError {
        let reference = self.source.reference.to_string();
        if self.attempts.is_empty() {
            return RegistryError::NoEndpoint { reference };
        }
        let attempts = std::mem::take(&mut self.attempts);
        RegistryError::Endpoints { action: "pull", subject: reference, attempts }
    }

    fn unusable(&self, source_url: String, failure: Failure) -> RegistryError {
        RegistryError::Unusable { reference: self.source.reference.to_string(), source_url, failure }
    }
}

impl fmt::Debug for ResolvedImage {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        // The configuration holds environment variables, which may be secrets.
        f.debug_struct("ResolvedImage")
            .field("reference", &self.reference)
            .field("target_digest", &self.target_digest)
            .field("manifest_digest", &self.manifest_digest)
            .field("identity", &self.identity)
            .field("layers", &self.layers)
            .finish_non_exhaustive()
    }
}
