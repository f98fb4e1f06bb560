//! Requests and answers before a session begins.

use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

use rustls_pki_types::ServerName;
use rustls_pki_types::pem::PemObject as _;
use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
use tokio::net::TcpStream;

use super::program::Programs;
use super::spdy_client::SpdyClient;
use super::{Fixture, limits, options, patiently, request, request_on, split};
use crate::server::Limits;
use crate::{CertificateError, Options, Server, StreamingError};

const UPGRADE: [(&str, &str); 3] =
    [("Connection", "Upgrade"), ("Upgrade", "SPDY/3.1"), ("X-Stream-Protocol-Version", "v4.channel.k8s.io")];

async fn status(url: &str) -> u16 {
    request(url, "POST", &UPGRADE).await.status
}

#[tokio::test]
async fn a_url_works_once() {
    let fixture = Fixture::start().await;
    let url = fixture.exec(&["cat"]);
    assert_eq!(status(&url.replace("/exec/", "/attach/")).await, 404);
    assert_eq!(status(&url[..url.len() - 1]).await, 404);
    assert_eq!(status(&format!("{url}/")).await, 404);
    assert_eq!(status(&format!("http://{}/", split(&url).0)).await, 404);
    assert_eq!(status(&format!("{url}?command=x")).await, 101);
    assert_eq!(status(&url).await, 404);
}

#[tokio::test]
async fn a_request_that_gets_no_session_does_not_use_it_up() {
    let fixture = Fixture::start().await;
    let url = fixture.exec(&["cat"]);
    assert_eq!(request(&url, "PUT", &UPGRADE).await.status, 405);
    assert_eq!(request(&url, "GET", &[]).await.status, 400);
    assert_eq!(request(&url, "GET", &UPGRADE[..2]).await.status, 400);
    let answer = request(&url, "GET", &[UPGRADE[0], UPGRADE[1], ("X-Stream-Protocol-Version", "v9")]).await;
    assert_eq!(answer.status, 403);
    assert_eq!(answer.header("x-accepted-stream-protocol-versions"), Some("v4.channel.k8s.io"));
    let websocket = [("Connection", "Upgrade"), ("Upgrade", "websocket"), ("Sec-WebSocket-Version", "8")];
    assert_eq!(request(&url, "GET", &websocket).await.status, 426);
    assert_eq!(status(&url).await, 101);
}

#[tokio::test]
async fn an_expired_url_is_not_found() {
    let options = Options { token_lifetime: Duration::ZERO, ..options() };
    let fixture = Fixture::with(options, limits()).await;
    assert_eq!(status(&fixture.exec(&["cat"])).await, 404);
}

#[tokio::test]
async fn sessions_are_limited_and_end_with_their_process() {
    let fixture = Fixture::with(options(), Limits { sessions: 1, ..limits() }).await;
    let (first, second) = (fixture.exec(&["cat"]), fixture.exec(&["cat"]));
    let mut client = SpdyClient::connect(&first, "v4.channel.k8s.io").await;
    assert_eq!(status(&second).await, 503);
    for kind in ["error", "stdin", "stdout", "stderr"] {
        client.open_type(kind).await;
    }
    fixture.programs.until(|seen| seen.started == 1).await;
    drop(client);
    let again = async {
        while status(&second).await == 503 {
            tokio::task::yield_now().await;
        }
    };
    patiently(again).await;
    assert_eq!(status(&second).await, 404);
}

#[tokio::test]
async fn heads_are_bounded_and_do_not_take_forever() {
    let limits = Limits { handshake: Duration::from_millis(200), ..limits() };
    let fixture = Fixture::with(options(), limits).await;
    let url = fixture.exec(&["cat"]);
    let long = "x".repeat(20_000);
    assert_eq!(request(&url, "GET", &[("X", &long)]).await.status, 431);
    let many = vec![("X", "y"); 100];
    assert_eq!(request(&url, "GET", &many).await.status, 431);
    let mut slow = TcpStream::connect(split(&url).0).await.unwrap();
    slow.write_all(b"GET /exec/").await.unwrap();
    let mut rest = Vec::new();
    let _ = patiently(slow.read_to_end(&mut rest)).await;
    assert!(!rest.starts_with(b"HTTP/1.1 101"));
}

#[tokio::test]
async fn after_close_running_sessions_go_on() {
    let fixture = Fixture::start().await;
    let (url, unused) = (fixture.exec(&["cat"]), fixture.exec(&["cat"]));
    let mut client = SpdyClient::connect(&url, "v4.channel.k8s.io").await;
    fixture.server.close();
    client.open_type("error").await;
    let stdin = client.open_type("stdin").await;
    let stdout = client.open_type("stdout").await;
    client.open_type("stderr").await;
    client.send(stdin, b"on", false).await;
    client.until(|client| client.text(stdout) == "on").await;
    let address = split(&unused).0.to_owned();
    let refused = async { while TcpStream::connect(&address).await.is_ok() {} };
    patiently(refused).await;
}

#[tokio::test]
async fn only_loopback_does_without_tls() {
    for address in ["0.0.0.0:0", "[::]:0", "192.0.2.1:0", "[::ffff:192.0.2.1]:0"] {
        let options = Options { address: address.parse().unwrap(), ..options() };
        let error = Server::start(options, Arc::new(Programs::new())).await.unwrap_err();
        assert!(matches!(error, StreamingError::NeedsTls { .. }), "{error:?}");
    }
    let taken = Fixture::start().await.server;
    let options = Options { address: taken.address(), ..options() };
    let error = Server::start(options, Arc::new(Programs::new())).await.unwrap_err();
    assert!(matches!(error, StreamingError::Listen { .. }), "{error:?}");
}

/// Writes a self-signed certificate and its key.
fn write_certificate(directory: &Path) -> (std::path::PathBuf, std::path::PathBuf) {
    let made = rcgen::generate_simple_self_signed(["localhost".to_owned(), "127.0.0.1".to_owned()]).unwrap();
    let (certificate, key) = (directory.join("tls.crt"), directory.join("tls.key"));
    // Replaced, not rewritten: another inode, whatever the clock's resolution.
    for (path, text) in [(&key, made.signing_key.serialize_pem()), (&certificate, made.cert.pem())] {
        let fresh = directory.join("fresh");
        std::fs::write(&fresh, text).unwrap();
        std::fs::rename(&fresh, path).unwrap();
    }
    (certificate, key)
}

/// A TLS connection that trusts exactly this certificate.
async fn connect_tls(
    url: &str,
    certificate: &Path,
) -> std::io::Result<tokio_rustls::client::TlsStream<TcpStream>> {
    let mut roots = rustls::RootCertStore::empty();
    roots.add(rustls_pki_types::CertificateDer::from_pem_file(certificate).unwrap()).unwrap();
    let provider = Arc::new(rustls::crypto::ring::default_provider());
    let config = rustls::ClientConfig::builder_with_provider(provider)
        .with_safe_default_protocol_versions()
        .unwrap()
        .with_root_certificates(roots)
        .with_no_client_auth();
    let tcp = TcpStream::connect(split(url).0).await.unwrap();
    let name = ServerName::try_from("127.0.0.1").unwrap();
    tokio_rustls::TlsConnector::from(Arc::new(config)).connect(name, tcp).await
}

#[tokio::test]
async fn tls_with_a_certificate_that_is_replaced_while_running() {
    let directory = tempfile::tempdir().unwrap();
    let (certificate, key) = write_certificate(directory.path());
    let tls = Some((certificate.clone(), key.clone()));
    let options = Options { address: "0.0.0.0:0".parse().unwrap(), tls, ..options() };
    let fixture = Fixture::with(options, limits()).await;
    for round in 0..2 {
        let url = fixture.exec(&["both", "3"]);
        assert!(url.starts_with("https://127.0.0.1:"), "{url}");
        let io = connect_tls(&url, &certificate).await.unwrap();
        let answer = request_on(Box::new(io), &url, "POST", &UPGRADE).await;
        assert_eq!(answer.status, 101);
        let mut client = SpdyClient::on(answer.io);
        let error = client.open_type("error").await;
        for kind in ["stdin", "stdout", "stderr"] {
            client.open_type(kind).await;
        }
        client.until_closed().await;
        assert!(client.text(error).contains("exit code 3"));
        // Without TLS there is no answer in clear.
        let mut plain = TcpStream::connect(fixture.server.address()).await.unwrap();
        plain.write_all(b"GET / HTTP/1.1\r\n\r\n").await.unwrap();
        let mut rest = Vec::new();
        let _ = patiently(plain.read_to_end(&mut rest)).await;
        assert!(!rest.starts_with(b"HTTP"));
        if round == 0 {
            // Between two good certificates a moment with a broken one.
            std::fs::write(&key, "broken").unwrap();
            assert!(connect_tls(&url, &certificate).await.is_ok(), "the old one stays");
            write_certificate(directory.path());
        }
    }
}

#[tokio::test]
async fn certificates_that_cannot_be_used_are_named() {
    let directory = tempfile::tempdir().unwrap();
    let (certificate, key) = write_certificate(directory.path());
    let empty = directory.path().join("empty");
    std::fs::write(&empty, "").unwrap();
    let other = tempfile::tempdir().unwrap();
    let (_, other_key) = write_certificate(other.path());
    let start = async |tls| {
        let options = Options { tls: Some(tls), ..options() };
        match Server::start(options, Arc::new(Programs::new())).await {
            Err(StreamingError::Certificate(error)) => error,
            other => panic!("{other:?}"),
        }
    };
    let missing = directory.path().join("missing");
    assert!(matches!(start((missing, key.clone())).await, CertificateError::Read { .. }));
    assert!(matches!(start((empty.clone(), key)).await, CertificateError::Empty { .. }));
    assert!(matches!(start((certificate.clone(), empty)).await, CertificateError::Parse { .. }));
    assert!(matches!(start((certificate, other_key)).await, CertificateError::Unusable { .. }));
}
