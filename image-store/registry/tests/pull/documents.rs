//! Manifests, indexes and configurations: the right one is found, wrong ones are refused.

use podvisor_registry::{Digest, ErrorKind};
use serde_json::json;

use crate::content::{CONFIG, Content, INDEX, MANIFEST, descriptor, digest, for_platform};
use crate::server::{Answer, Reply, Server};
use crate::{Client, assert_contains};

async fn server_of(content: &Content) -> Server {
    let content = content.clone();
    Server::start(move |seen| content.reply(seen)).await
}

#[tokio::test]
async fn a_tag_becomes_an_image() {
    let content = Content::image(&[vec![1; 10], vec![2; 20]]);
    let server = server_of(&content).await;
    let client = Client::new();
    let image = client.resolve(&server.name("team/app")).await.unwrap();
    assert_eq!(image.manifest, content.documents["latest"].1);
    assert_eq!(image.manifest_digest, Digest::sha256(&image.manifest));
    assert_eq!(image.target_digest, image.manifest_digest);
    assert_eq!(image.identity, Digest::sha256(&image.config));
    assert_eq!(image.layers.iter().map(|layer| layer.size).collect::<Vec<_>>(), [10, 20]);
    assert_eq!(image.layers[0].diff_id, Digest::sha256(&[1; 10]));
    assert_eq!(image.reference.to_string(), server.name("team/app:latest"));
    let first = &server.seen()[0];
    assert_eq!(first.path, "/v2/team/app/manifests/latest");
    assert_eq!(first.header("user-agent"), Some("podvisor-test"));
    assert!(first.header("accept").unwrap().contains(INDEX));

    let by_digest =
        client.resolve(&server.name(&format!("team/app@{}", image.manifest_digest))).await.unwrap();
    assert_eq!(by_digest.identity, image.identity);
}

#[tokio::test]
async fn an_index_leads_to_this_platform() {
    let mut content = Content::default();
    let ours = content.add_image(&[vec![1]], "amd64");
    let other = content.add_image(&[vec![2]], "s390x");
    let attestation = content.add_image(&[vec![3]], "amd64");
    let index = content.add_index(&[
        for_platform(attestation, "unknown"),
        for_platform(other.clone(), "s390x"),
        for_platform(ours.clone(), "amd64"),
    ]);
    content.tag("flat", &index);
    let nested = content.add_index(&[for_platform(other.clone(), "s390x"), index.clone()]);
    content.tag("nested", &nested);
    let deep = content.add_index(&[nested]);
    content.tag("deep", &deep);
    // Without platforms the configurations tell.
    let unnamed = content.add_index(&[other.clone(), ours.clone()]);
    content.tag("unnamed", &unnamed);
    let foreign = content.add_index(&[for_platform(other.clone(), "s390x")]);
    content.tag("foreign", &foreign);
    let foreign_unnamed = content.add_index(&[other]);
    content.tag("foreign-unnamed", &foreign_unnamed);

    let server = server_of(&content).await;
    let client = Client::new();
    for tag in ["flat", "nested", "unnamed"] {
        let image = client.resolve(&server.name(&format!("app:{tag}"))).await.unwrap();
        assert_eq!(image.manifest_digest.as_str(), digest(&ours), "{tag}");
        assert_eq!(image.target_digest, Digest::sha256(&content.documents[tag].1), "{tag}");
    }
    for tag in ["foreign", "foreign-unnamed"] {
        let error = client.resolve(&server.name(&format!("app:{tag}"))).await.unwrap_err();
        assert_eq!(error.kind(), ErrorKind::NotFound, "{error}");
        assert_contains(&error, &["linux/amd64", "linux/s390x"]);
    }
    let error = client.resolve(&server.name("app:deep")).await.unwrap_err();
    assert_eq!(error.kind(), ErrorKind::Unsupported);
    assert_contains(&error, &["nested"]);
}

#[tokio::test]
async fn content_that_does_not_fit_its_digest_is_corrupt() {
    let content = Content::image(&[vec![1; 10]]);
    let config = content.blobs.iter().find(|(_, bytes)| bytes.starts_with(b"{")).unwrap().0.clone();
    let server = Server::start(move |seen| {
        let mut answer = content.answer(seen);
        if seen.path.ends_with(&config) {
            // Same size, so that only the digest tells.
            answer.body.reverse();
        }
        answer.with("docker-content-digest", &config).into()
    })
    .await;
    let client = Client::new();
    let error = client.resolve(&server.name("app")).await.unwrap_err();
    assert_eq!(error.kind(), ErrorKind::Corrupt, "{error}");
    assert_contains(&error, &["content has digest", "/blobs/sha256:"]);

    // By digest, another image is no answer, whatever the header claims.
    let absent = Digest::sha256(b"absent");
    let other = Content::image(&[vec![2; 10]]).documents["latest"].1.clone();
    let claimed = absent.to_string();
    let server = Server::start(move |_| {
        Answer::new(200, MANIFEST, other.clone()).with("docker-content-digest", &claimed).into()
    })
    .await;
    let error = client.resolve(&server.name(&format!("app@{absent}"))).await.unwrap_err();
    assert_eq!(error.kind(), ErrorKind::Corrupt, "{error}");
}

#[tokio::test]
async fn endless_and_oversized_documents_end() {
    let client = Client::new();
    let server = Server::start(|_| Reply::Endless(Answer::new(200, MANIFEST, "{"))).await;
    let error = client.resolve(&server.name("app")).await.unwrap_err();
    assert_eq!(error.kind(), ErrorKind::Corrupt, "{error}");
    assert_contains(&error, &["larger than 4194304 bytes"]);

    // A configuration that is longer than its descriptor.
    let content = Content::image(&[vec![1; 10]]);
    let server = Server::start(move |seen| {
        let answer = content.answer(seen);
        if seen.path.contains("/blobs/") { Reply::Endless(answer) } else { answer.into() }
    })
    .await;
    let error = client.resolve(&server.name("app")).await.unwrap_err();
    assert_eq!(error.kind(), ErrorKind::Corrupt, "{error}");
    assert_contains(&error, &["or more for sha256:"]);

    // A descriptor that asks for too much is not even fetched.
    let mut content = Content::default();
    let mut config = descriptor(CONFIG, b"{}");
    config["size"] = json!(9 << 20);
    let manifest =
        content.add_document(MANIFEST, &json!({"schemaVersion": 2, "config": config, "layers": []}));
    content.tag("latest", &manifest);
    let server = server_of(&content).await;
    let error = client.resolve(&server.name("app")).await.unwrap_err();
    assert_eq!(error.kind(), ErrorKind::Unsupported, "{error}");
    assert_eq!(server.count("/blobs/"), 0);
}

#[tokio::test]
async fn garbage_is_named() {
    let client = Client::new();
    for (body, content_type) in
        [("<html>log in</html>", "text/html"), ("{\"schemaVersion\": 2", MANIFEST), ("", MANIFEST)]
    {
        let server = Server::start(move |_| Answer::new(200, content_type, body).into()).await;
        let error = client.resolve(&server.name("app")).await.unwrap_err();
        assert_eq!(error.kind(), ErrorKind::Corrupt, "{error}");
        assert_contains(&error, &["manifest cannot be read", &server.address.to_string()]);
    }
    let server = Server::start(|_| Answer::json("{}").with("content-encoding", "gzip").into()).await;
    let error = client.resolve(&server.name("app")).await.unwrap_err();
    assert_contains(&error, &["content-encoding"]);
    let server = Server::start(|_| Reply::Raw(b"220 smtp.example.com ESMTP\r\n".to_vec())).await;
    let error = client.resolve(&server.name("app")).await.unwrap_err();
    assert_eq!(error.kind(), ErrorKind::Unavailable, "{error}");
}

#[tokio::test]
async fn what_cannot_be_run_says_why() {
    let client = Client::new();
    let mut foreign = descriptor("application/vnd.docker.image.rootfs.foreign.diff.tar.gzip", b"x");
    foreign["urls"] = json!(["https://elsewhere.invalid/layer"]);
    let manifest = |config: &str, layer: serde_json::Value| json!({"schemaVersion": 2, "config": descriptor(config, b"{}"), "layers": [layer]});
    for (document, part) in [
        (manifest(CONFIG, foreign), "foreign layer"),
        (manifest(CONFIG, descriptor("application/vnd.example.squashfs", b"x")), "squashfs"),
        (json!({"schemaVersion": 1, "name": "app", "fsLayers": [], "history": []}), "schema 1"),
    ] {
        let server = Server::start(move |_| Answer::new(200, "", document.to_string()).into()).await;
        let error = client.resolve(&server.name("app")).await.unwrap_err();
        assert_eq!(error.kind(), ErrorKind::Unsupported, "{error}");
        assert_contains(&error, &[part, &server.name("app")]);
    }
}

#[tokio::test]
async fn silence_and_trickle_end() {
    let client = Client::impatient();
    for reply in
        [Reply::Hang, Reply::Loris, Reply::Stall(Answer::new(200, MANIFEST, "{\"schemaVersion\": 2}"), 5)]
    {
        let told = reply.clone();
        let server = Server::start(move |_| told.clone()).await;
        let error = client.resolve(&server.name("app")).await.unwrap_err();
        assert_eq!(error.kind(), ErrorKind::Unavailable, "{reply:?}: {error}");
        assert_contains(&error, &[&server.address.to_string()]);
        server.idle().await;
    }
}

#[tokio::test]
async fn a_connection_that_breaks_once_is_no_failure() {
    let content = Content::image(&[vec![1; 10]]);
    let broken = std::sync::atomic::AtomicBool::new(false);
    let server = Server::start(move |seen| {
        let answer = content.answer(seen);
        let is_first = !broken.swap(true, std::sync::atomic::Ordering::Relaxed);
        if is_first { Reply::Cut(answer, 7) } else { answer.into() }
    })
    .await;
    Client::new().resolve(&server.name("app")).await.unwrap();
    assert_eq!(server.count("/manifests/"), 2);
}
