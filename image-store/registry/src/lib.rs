//! Talking to registries: references, mirrors, credentials, and blobs that survive broken connections.
//!
//! Nothing here writes to disk. A pull goes [`Registry::candidates`] or [`Reference::parse`] →
//! [`Registry::resolve`] (index → manifest for this platform → configuration) → [`Registry::blob`] for each layer,
//! whose bytes the caller verifies and unpacks. Map, invariants and decisions stand in this crate's README.md.

mod blob;
mod certs_dir;
mod challenge;
mod connect;
mod credentials;
mod digest;
mod docker_config;
mod endpoint;
mod error;
mod failure;
mod manifest;
mod platform;
mod redirect;
mod reference;
mod registries_conf;
mod registry;
mod resolve;
mod session;
mod source;
mod stamp;
mod tls;
mod token;
mod transport;

pub use blob::BlobStream;
pub use credentials::{Credentials, CredentialsError};
pub use digest::{Algorithm, Digest, DigestError, Hasher};
pub use error::{Attempts, ConfigurationError, ErrorKind, RegistryError};
pub use failure::Failure;
pub use manifest::{Artifact, Compression, Content, LayerDescriptor};
pub use reference::{Reference, ReferenceProblem};
pub use registry::{Options, Registry};
pub use resolve::ResolvedImage;
pub use source::Source;
