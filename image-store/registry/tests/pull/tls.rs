//! Certificates: who is believed, who is shown ours, and what may do without.

use std::sync::Arc;

use podvisor_registry::ErrorKind;
use rcgen::{BasicConstraints, CertificateParams, DnType, IsCa, Issuer, KeyPair};
use tokio_rustls::rustls::pki_types::{CertificateDer, PrivateKeyDer, pem::PemObject};
use tokio_rustls::rustls::server::WebPkiClientVerifier;
use tokio_rustls::rustls::{RootCertStore, ServerConfig, crypto::ring};

use crate::content::Content;
use crate::server::{Answer, Server};
use crate::{Client, assert_contains};

/// A CA and a certificate of it, PEM.
pub(crate) struct Issued {
    pub(crate) ca: String,
    pub(crate) certificate: String,
    pub(crate) key: String,
}

pub(crate) fn issue(name: &str) -> Issued {
    let mut ca = CertificateParams::new(Vec::new()).unwrap();
    ca.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
    ca.distinguished_name.push(DnType::CommonName, "test CA");
    let ca_key = KeyPair::generate().unwrap();
    let ca_certificate = ca.self_signed(&ca_key).unwrap();
    let issuer = Issuer::new(ca, ca_key);
    let key = KeyPair::generate().unwrap();
    let certificate =
        CertificateParams::new(vec![name.to_owned()]).unwrap().signed_by(&key, &issuer).unwrap();
    Issued { ca: ca_certificate.pem(), certificate: certificate.pem(), key: key.serialize_pem() }
}

/// Serves with `issued`; with `clients` only clients with a certificate of that CA.
pub(crate) fn server_config(issued: &Issued, clients: Option<&Issued>) -> ServerConfig {
    let provider = Arc::new(ring::default_provider());
    let builder =
        ServerConfig::builder_with_provider(Arc::clone(&provider)).with_safe_default_protocol_versions();
    let builder = match clients {
        None => builder.unwrap().with_no_client_auth(),
        Some(clients) => {
            let mut roots = RootCertStore::empty();
            roots.add(CertificateDer::from_pem_slice(clients.ca.as_bytes()).unwrap()).unwrap();
            let verifier = WebPkiClientVerifier::builder_with_provider(Arc::new(roots), provider);
            builder.unwrap().with_client_cert_verifier(verifier.build().unwrap())
        }
    };
    let chain = vec![CertificateDer::from_pem_slice(issued.certificate.as_bytes()).unwrap()];
    let key = PrivateKeyDer::from_pem_slice(issued.key.as_bytes()).unwrap();
    builder.with_single_cert(chain, key).unwrap()
}

async fn registry(issued: &Issued, clients: Option<&Issued>) -> Server {
    let content = Content::with_layer(1000);
    Server::start_tls(server_config(issued, clients), move |seen| content.reply(seen)).await
}

#[tokio::test]
async fn a_registry_has_its_own_ca() {
    let issued = issue("127.0.0.1");
    let server = registry(&issued, None).await;
    let client = Client::new();
    let directory = format!("certs.d/{}", server.address);
    client.write(&format!("{directory}/ca.crt"), &issued.ca);
    client.pull(&server.name("app")).await.unwrap();

    // Replaced by another CA: noticed at once.
    client.write(&format!("{directory}/ca.crt"), &issue("127.0.0.1").ca);
    let error = client.resolve(&server.name("app")).await.unwrap_err();
    assert_eq!(error.kind(), ErrorKind::Unavailable, "{error}");
    assert_contains(&error, &["TLS failed", "https://"]);

    client.write(&format!("{directory}/ca.crt"), "no certificate");
    let error = client.resolve(&server.name("app")).await.unwrap_err();
    assert_eq!(error.kind(), ErrorKind::Configuration, "{error}");
    assert_contains(&error, &["ca.crt"]);
}

#[tokio::test]
async fn a_certificate_is_for_its_name() {
    let issued = issue("other.example.com");
    let server = registry(&issued, None).await;
    let client = Client::new();
    client.write(&format!("certs.d/{}/ca.crt", server.address), &issued.ca);
    let error = client.resolve(&server.name("app")).await.unwrap_err();
    assert_contains(&error, &["TLS failed"]);
}

#[tokio::test]
async fn insecure_means_any_certificate_and_only_where_said() {
    let issued = issue("other.example.com");
    let server = registry(&issued, None).await;
    // Loopback needs no configuration, as with docker.
    let client = Client::new();
    client.pull(&server.name("app")).await.unwrap();
    // What hosts.toml spells out is held to.
    let hosts = format!("certs.d/{}/hosts.toml", server.address);
    client.write(&hosts, &format!("server = \"https://{}\"\n", server.address));
    let error = client.resolve(&server.name("app")).await.unwrap_err();
    assert_contains(&error, &["TLS failed"]);
    client.write(&hosts, &format!("server = \"https://{}\"\nskip_verify = true\n", server.address));
    client.pull(&server.name("app")).await.unwrap();
}

#[tokio::test]
async fn client_certificates_are_shown_to_their_host_alone() {
    let (issued, clients) = (issue("127.0.0.1"), issue("client"));
    let server = registry(&issued, Some(&clients)).await;
    let client = Client::new();
    let directory = format!("certs.d/{}", server.address);
    client.write(&format!("{directory}/ca.crt"), &issued.ca);
    client.resolve(&server.name("app")).await.unwrap_err();
    client.write(&format!("{directory}/client.cert"), &clients.certificate);
    client.write(&format!("{directory}/client.key"), &clients.key);
    client.pull(&server.name("app")).await.unwrap();

    // A redirect to another host that would like to see it.
    let (elsewhere_issued, content) = (issue("127.0.0.2"), Content::with_layer(10));
    let config = server_config(&elsewhere_issued, Some(&clients));
    let elsewhere = Server::start_at("127.0.0.2", Some(config), move |seen| content.reply(seen)).await;
    let location = format!("https://{}/v2/app/manifests/latest", elsewhere.address);
    let config = server_config(&issued, Some(&clients));
    let server = Server::start_tls(config, move |_| Answer::redirect(&location).into()).await;
    let directory = format!("certs.d/{}", server.address);
    client.write(&format!("{directory}/ca.crt"), &format!("{}{}", issued.ca, elsewhere_issued.ca));
    client.write(&format!("{directory}/client.cert"), &clients.certificate);
    client.write(&format!("{directory}/client.key"), &clients.key);
    client.resolve(&server.name("app")).await.unwrap_err();
    assert!(!server.seen().is_empty());
    assert!(elsewhere.seen().is_empty());
}

#[tokio::test]
async fn https_never_becomes_http() {
    let issued = issue("127.0.0.1");
    let content = Content::with_layer(10);
    let plain = Server::start(move |seen| content.reply(seen)).await;
    let location = format!("http://{}/v2/app/manifests/latest", plain.address);
    let config = server_config(&issued, None);
    let server = Server::start_tls(config, move |_| Answer::redirect(&location).into()).await;
    let client = Client::new();
    client.write(&format!("certs.d/{}/ca.crt", server.address), &issued.ca);
    let error = client.resolve(&server.name("app")).await.unwrap_err();
    assert_contains(&error, &["from https to plain http"]);
    assert!(plain.seen().is_empty());

    // Neither does a token request.
    let realm = format!("Bearer realm=\"http://{}/token\"", plain.address);
    let config = server_config(&issued, None);
    let server = Server::start_tls(config, move |_| Answer::unauthorized(&realm).into()).await;
    client.write(&format!("certs.d/{}/ca.crt", server.address), &issued.ca);
    let error = client.resolve(&server.name("app")).await.unwrap_err();
    assert_contains(&error, &["is plain http"]);
    assert!(plain.seen().is_empty());
}
