//! The certificate of the streaming server, re-read when its files change.

use std::io;
use std::os::unix::fs::MetadataExt as _;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, PoisonError, RwLock};

use rustls::ServerConfig;
use rustls::crypto::CryptoProvider;
use rustls::server::{ClientHello, ResolvesServerCert};
use rustls::sign::CertifiedKey;
use rustls_pki_types::pem::PemObject as _;
use rustls_pki_types::{CertificateDer, PrivateKeyDer, pem};

/// Why a certificate cannot be used.
#[derive(Debug, thiserror::Error)]
pub enum CertificateError {
    /// One of the two files cannot be read.
    #[error("cannot read {path}")]
    Read {
        /// Of the certificate or the key.
        path: PathBuf,
        /// What the system said.
        #[source]
        source: io::Error,
    },
    /// One of the two files is not PEM.
    #[error("cannot parse {path}")]
    Parse {
        /// Of the certificate or the key.
        path: PathBuf,
        /// What is wrong with it.
        #[source]
        source: pem::Error,
    },
    /// The chain is empty.
    #[error("there is no certificate in {path}")]
    Empty {
        /// Of the certificate.
        path: PathBuf,
    },
    /// Certificate and key are not usable, or not with each other.
    #[error("cannot use the certificate in {certificate} with the key in {key}")]
    Unusable {
        /// Path of the certificate.
        certificate: PathBuf,
        /// Path of the key.
        key: PathBuf,
        /// What is wrong with them.
        #[source]
        source: rustls::Error,
    },
}

/// What tells one content of a file from the next, without reading it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct Stamp {
    inode: u64,
    size: u64,
    modified: (i64, i64),
}

impl Stamp {
    fn of(path: &Path) -> Option<Self> {
        let metadata = std::fs::metadata(path).ok()?;
        let modified = (metadata.mtime(), metadata.mtime_nsec());
        Some(Self { inode: metadata.ino(), size: metadata.len(), modified })
    }
}

/// Certificate and key, as last read.
#[derive(Debug)]
pub(crate) struct Certificate {
    chain_path: PathBuf,
    key_path: PathBuf,
    provider: Arc<CryptoProvider>,
    current: RwLock<Arc<CertifiedKey>>,
    stamps: Mutex<[Option<Stamp>; 2]>,
}

impl Certificate {
    pub(crate) fn read(certificate: PathBuf, key: PathBuf) -> Result<Arc<Self>, CertificateError> {
        let provider = Arc::new(rustls::crypto::ring::default_provider());
        // Before reading, so that a change in between is seen later.
        let stamps = Mutex::new([Stamp::of(&certificate), Stamp::of(&key)]);
        let current = RwLock::new(Arc::new(load(&certificate, &key, &provider)?));
        Ok(Arc::new(Self { chain_path: certificate, key_path: key, provider, current, stamps }))
    }

    /// The server's side of TLS with this certificate.
    pub(crate) fn config(self: &Arc<Self>) -> Result<ServerConfig, CertificateError> {
        let unusable = |source| CertificateError::Unusable {
            certificate: self.chain_path.clone(),
            key: self.key_path.clone(),
            source,
        };
        let mut config = ServerConfig::builder_with_provider(Arc::clone(&self.provider))
            .with_safe_default_protocol_versions()
            .map_err(unusable)?
            .with_no_client_auth()
            .with_cert_resolver(Arc::clone(self) as Arc<dyn ResolvesServerCert>);
        // HTTP/2 has no upgrades.
        config.alpn_protocols = vec![b"http/1.1".to_vec()];
        Ok(config)
    }

    /// Looks whether the files have changed, and reads them again. What cannot be used is logged, and the old
    /// certificate stays: the two files are seldom replaced at the same instant.
    pub(crate) fn refresh(&self) {
        let now = [Stamp::of(&self.chain_path), Stamp::of(&self.key_path)];
        let mut stamps = self.stamps.lock().unwrap_or_else(PoisonError::into_inner);
        if *stamps == now {
            return;
        }
        *stamps = now;
        drop(stamps);
        match load(&self.chain_path, &self.key_path, &self.provider) {
            Ok(fresh) => {
                *self.current.write().unwrap_or_else(PoisonError::into_inner) = Arc::new(fresh);
                tracing::info!(path = %self.chain_path.display(), "read the changed streaming certificate");
            }
            Err(error) => tracing::warn!(
                error = &error as &dyn std::error::Error,
                "cannot use the changed streaming certificate; the old one stays"
            ),
        }
    }
}

impl ResolvesServerCert for Certificate {
    fn resolve(&self, _hello: ClientHello<'_>) -> Option<Arc<CertifiedKey>> {
        Some(Arc::clone(&self.current.read().unwrap_or_else(PoisonError::into_inner)))
    }
}

fn load(certificate: &Path, key: &Path, provider: &CryptoProvider) -> Result<CertifiedKey, CertificateError> {
    let read = |path: &Path| {
        std::fs::read(path).map_err(|source| CertificateError::Read { path: path.to_owned(), source })
    };
    let chain: Vec<_> = CertificateDer::pem_slice_iter(&read(certificate)?)
        .collect::<Result<_, _>>()
        .map_err(|source| CertificateError::Parse { path: certificate.to_owned(), source })?;
    if chain.is_empty() {
        return Err(CertificateError::Empty { path: certificate.to_owned() });
    }
    let private = PrivateKeyDer::from_pem_slice(&read(key)?)
        .map_err(|source| CertificateError::Parse { path: key.to_owned(), source })?;
    CertifiedKey::from_der(chain, private, provider).map_err(|source| CertificateError::Unusable {
        certificate: certificate.to_owned(),
        key: key.to_owned(),
        source,
    })
}
