//! What a TLS connection is verified with: the system's roots, a registry's own CA, a client certificate, or,
//! where configuration says so, nothing.

use std::path::{Path, PathBuf};
use std::sync::Arc;

use rustls::client::danger::{HandshakeSignatureValid, ServerCertVerified, ServerCertVerifier};
use rustls::crypto::{CryptoProvider, verify_tls12_signature, verify_tls13_signature};
use rustls::{ClientConfig, DigitallySignedStruct, RootCertStore, SignatureScheme};
use rustls_pki_types::pem::PemObject;
use rustls_pki_types::{CertificateDer, PrivateKeyDer, ServerName, UnixTime};

use crate::certs_dir::TlsFiles;
use crate::stamp::Stamp;

/// How to verify one host; connections with the same settings share a pool.
#[derive(Debug, Clone, Default, PartialEq, Eq, Hash)]
pub(crate) struct TlsSettings {
    ca: Vec<PathBuf>,
    client: Option<(PathBuf, PathBuf)>,
    skip_verify: bool,
}

impl TlsSettings {
    pub(crate) fn new(files: &TlsFiles, insecure: bool) -> Self {
        Self {
            ca: files.ca.clone(),
            client: files.client.first().cloned(),
            skip_verify: files.skip_verify.unwrap_or(insecure),
        }
    }

    /// For a host that the configured one refers to (redirect, token server): it is trusted alike, but our
    /// certificate is for the configured one alone.
    pub(crate) fn for_other_host(&self) -> Self {
        Self { client: None, ..self.clone() }
    }

    /// The state of the files, so that a replaced certificate is noticed.
    pub(crate) fn stamps(&self) -> Vec<Option<Stamp>> {
        let client = self.client.iter().flat_map(|(certificate, key)| [certificate, key]);
        self.ca.iter().chain(client).map(|path| Stamp::take(path).ok().flatten()).collect()
    }

    /// Reads the files. Errors name the file.
    pub(crate) fn client_config(&self) -> Result<ClientConfig, String> {
        let provider = Arc::new(rustls::crypto::ring::default_provider());
        let builder = ClientConfig::builder_with_provider(Arc::clone(&provider))
            .with_safe_default_protocol_versions()
            .map_err(|error| format!("TLS cannot be set up: {error}"))?;
        let builder = if self.skip_verify {
            builder.dangerous().with_custom_certificate_verifier(Arc::new(AnyCertificate(provider)))
        } else {
            builder.with_root_certificates(self.roots()?)
        };
        let Some((certificate, key)) = &self.client else {
            return Ok(builder.with_no_client_auth());
        };
        let chain = certificates(certificate)?;
        let key = PrivateKeyDer::from_pem_file(key)
            .map_err(|error| format!("client key {}: {error}", key.display()))?;
        builder
            .with_client_auth_cert(chain, key)
            .map_err(|error| format!("client certificate {}: {error}", certificate.display()))
    }

    fn roots(&self) -> Result<RootCertStore, String> {
        let mut roots = RootCertStore::empty();
        let system = rustls_native_certs::load_native_certs();
        for error in &system.errors {
            tracing::debug!(error = %error, "a system root certificate cannot be read");
        }
        roots.add_parsable_certificates(system.certs);
        for path in &self.ca {
            for certificate in certificates(path)? {
                roots
                    .add(certificate)
                    .map_err(|error| format!("CA certificate {}: {error}", path.display()))?;
            }
        }
        Ok(roots)
    }
}

fn certificates(path: &Path) -> Result<Vec<CertificateDer<'static>>, String> {
    let read = CertificateDer::pem_file_iter(path).and_then(Iterator::collect::<Result<Vec<_>, _>>);
    let chain = read.map_err(|error| format!("certificate {}: {error}", path.display()))?;
    if chain.is_empty() {
        return Err(format!("certificate {}: has no PEM certificate", path.display()));
    }
    Ok(chain)
}

/// Accepts every certificate, as `insecure` and `skip_verify` ask. Signatures are still checked, so that the peer
/// at least holds the key it shows.
#[derive(Debug)]
struct AnyCertificate(Arc<CryptoProvider>);

impl ServerCertVerifier for AnyCertificate {
    fn verify_server_cert(
        &self,
        _end_entity: &CertificateDer<'_>,
        _intermediates: &[CertificateDer<'_>],
        _server_name: &ServerName<'_>,
        _ocsp_response: &[u8],
        _now: UnixTime,
    ) -> Result<ServerCertVerified, rustls::Error> {
        Ok(ServerCertVerified::assertion())
    }

    fn verify_tls12_signature(
        &self,
        message: &[u8],
        certificate: &CertificateDer<'_>,
        signature: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, rustls::Error> {
        verify_tls12_signature(message, certificate, signature, &self.0.signature_verification_algorithms)
    }

    fn verify_tls13_signature(
        &self,
        message: &[u8],
        certificate: &CertificateDer<'_>,
        signature: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, rustls::Error> {
        verify_tls13_signature(message, certificate, signature, &self.0.signature_verification_algorithms)
    }

    fn supported_verify_schemes(&self) -> Vec<SignatureScheme> {
        self.0.signature_verification_algorithms.supported_schemes()
    }
}
