//! OCI artifacts: whole or not at all, verified, of one identity, and gone when nobody needs them.

use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};

use podvisor_image_store::{ErrorKind, ImageStore, Rootfs};

use crate::layer::{As, Layer, Tar, noise};
use crate::server::{Blob, Rule, Server};
use crate::{World, assert_named, chain, eventually, ids};

const MODEL: &str = "application/vnd.example.model";

fn blob(title: &str, bytes: &[u8]) -> Blob {
    Blob { media_type: "application/octet-stream", title: Some(title.to_owned()), bytes: bytes.to_vec() }
}

/// Where the topmost layer is that has the file.
fn find(rootfs: &Rootfs, path: &str) -> Option<PathBuf> {
    rootfs.lower.iter().map(|layer| layer.join(path)).find(|path| path.exists())
}

fn read(rootfs: &Rootfs, path: &str) -> Vec<u8> {
    std::fs::read(find(rootfs, path).unwrap_or_else(|| panic!("no {path}"))).unwrap()
}

async fn layers(world: &World, count: usize) {
    eventually(|| {
        let (layers, ingest) = (world.layers(), world.ingest());
        if layers.len() == count && ingest.is_empty() { Ok(()) } else { Err((layers, ingest)) }
    })
    .await;
}

async fn mounted(store: &ImageStore, id: &str) -> Rootfs {
    store.prepare("volume", id, true).await.unwrap()
}

#[tokio::test(flavor = "multi_thread")]
async fn files_under_their_titles_and_tars_unpacked() {
    let (world, server) = (World::new(), Server::start().await);
    let weights = noise(1, 700_000);
    let tar = Layer::new(Tar::new().directory("docs", 0o755).file("docs/a", b"from the tar"), As::Gzip);
    let packed = Blob { media_type: tar.media_type, title: None, bytes: tar.blob.clone() };
    // A file that ORAS calls a tar because nobody gave it a type.
    let text = Blob {
        media_type: "application/vnd.oci.image.layer.v1.tar",
        title: Some("README".to_owned()),
        bytes: b"no tar".to_vec(),
    };
    let blobs = [blob("model/deep/weights.bin", &weights), packed, text, blob("again", &weights)];
    let pushed = server.push_artifact("model", "1", MODEL, &blobs);
    let store = world.open().await;
    let image = store.pull(&server.name("model:1"), None).await.map_err(|error| chain(&error)).unwrap();
    assert_eq!(image.id, pushed.id);
    assert_eq!((image.artifact.as_deref(), image.size), (Some(MODEL), pushed.size));
    assert_eq!(image.repo_tags, [server.name("model:1")]);
    assert_named(
        &store,
        &image,
        &[&server.name("model:1"), &pushed.id, &server.name(&format!("model@{}", pushed.digest))],
    );
    assert_eq!(ids(&store), std::slice::from_ref(&pushed.id));
    // Its tar, and one for all files.
    layers(&world, 2).await;
    let rootfs = mounted(&store, &image.id).await;
    assert_eq!(rootfs.lower.len(), 2);
    assert_eq!(read(&rootfs, "model/deep/weights.bin"), weights);
    assert_eq!(read(&rootfs, "again"), weights);
    assert_eq!(read(&rootfs, "README"), b"no tar");
    assert_eq!(read(&rootfs, "docs/a"), b"from the tar");
    for (path, mode) in [("model", 0o40755), ("model/deep", 0o40755), ("README", 0o100_644)] {
        let metadata = std::fs::metadata(find(&rootfs, path).unwrap()).unwrap();
        assert_eq!((metadata.mode(), metadata.uid()), (mode, 0), "{path}");
    }
    // Pulled again, nothing is fetched but the manifest.
    let fetched = server.count("/blobs/");
    store.pull(&server.name("model:1"), None).await.unwrap();
    assert_eq!(server.count("/blobs/"), fetched);

    // The same after a start, and gone with its last use.
    drop(store);
    let store = world.open().await;
    assert_eq!(store.get(&pushed.id).unwrap().artifact.as_deref(), Some(MODEL));
    assert_eq!(read(&mounted(&store, &image.id).await, "README"), b"no tar");
    store.remove(&server.name("model:1")).await.unwrap();
    assert!(store.list().is_empty());
    assert_eq!(read(&rootfs, "again"), weights);
    store.release("volume").await.unwrap();
    layers(&world, 0).await;
    assert_eq!(store.fs_info().0.used_bytes, 0);
}

#[tokio::test(flavor = "multi_thread")]
async fn versions_of_one_artifact_are_told_apart() {
    let (world, server) = (World::new(), Server::start().await);
    // The configuration of both is the same.
    let first = server.push_artifact("model", "1", MODEL, &[blob("a", b"one"), blob("b", b"shared")]);
    let second = server.push_artifact("model", "2", MODEL, &[blob("a", b"two"), blob("b", b"shared")]);
    assert_ne!(first.id, second.id);
    let store = world.open().await;
    for (tag, id) in [("1", &first.id), ("2", &second.id)] {
        assert_eq!(store.pull(&server.name(&format!("model:{tag}")), None).await.unwrap().id, *id);
    }
    assert_eq!(read(&store.prepare("v1", &first.id, true).await.unwrap(), "a"), b"one");
    assert_eq!(read(&store.prepare("v2", &second.id, true).await.unwrap(), "a"), b"two");
    layers(&world, 2).await;
    store.remove(&first.id).await.unwrap();
    store.release("v1").await.unwrap();
    layers(&world, 1).await;
    assert_eq!(read(&store.prepare("v2", &second.id, true).await.unwrap(), "b"), b"shared");
}

#[tokio::test(flavor = "multi_thread")]
async fn nothing_of_it_and_nothing_in_it() {
    let (world, server) = (World::new(), Server::start().await);
    let empty = Blob { media_type: "application/vnd.oci.empty.v1+json", title: None, bytes: b"{}".to_vec() };
    let pushed = server.push_artifact("empty", "latest", MODEL, &[empty]);
    let store = world.open().await;
    let image = store.pull(&server.name("empty"), None).await.unwrap();
    assert_eq!(image.id, pushed.id);
    assert!(mounted(&store, &image.id).await.lower.is_empty());
    layers(&world, 0).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn what_is_wrong_with_one_leaves_nothing() {
    let (world, server) = (World::new(), Server::start().await);
    let store = world.open().await;
    let bytes = noise(1, 100_000);
    for (number, title) in ["/etc/passwd", "../x", "a/../../x", "", "a\0b"].iter().enumerate() {
        let name = format!("hostile{number}");
        server.push_artifact(&name, "latest", MODEL, &[blob("fine", b"x"), blob(title, &bytes)]);
        let error = store.pull(&server.name(&name), None).await.expect_err(title);
        assert_eq!(error.kind(), ErrorKind::Corrupt, "{}", chain(&error));
        assert!(chain(&error).contains("title"), "{}", chain(&error));
    }
    server.push_artifact("twice", "latest", MODEL, &[blob("a", b"1"), blob("a", b"2")]);
    let error = store.pull(&server.name("twice"), None).await.unwrap_err();
    assert!(chain(&error).contains("two blobs"), "{}", chain(&error));

    let pushed =
        server.push_artifact("model", "latest", MODEL, &[blob("fine", b"x"), blob("weights", &bytes)]);
    let digest = podvisor_registry::Digest::sha256(&bytes).to_string();
    let mut flipped = bytes.clone();
    flipped[50_000] ^= 1;
    for (rule, kind) in [
        (Rule::Body(flipped), ErrorKind::Corrupt),
        (Rule::Body(bytes[..99_000].to_vec()), ErrorKind::Unavailable),
        (Rule::TooLong, ErrorKind::Corrupt),
        (Rule::Status(404), ErrorKind::NotFound),
    ] {
        let what = format!("{rule:?}").chars().take(20).collect::<String>();
        server.rule(&digest, rule);
        let error = store.pull(&server.name("model"), None).await.expect_err(&what);
        assert_eq!(error.kind(), kind, "{what}: {}", chain(&error));
        layers(&world, 0).await;
        assert!(store.list().is_empty());
    }
    server.release();
    assert_eq!(store.pull(&server.name("model"), None).await.unwrap().id, pushed.id);
    layers(&world, 1).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_thousand_files_are_one_directory() {
    let (world, server) = (World::new(), Server::start().await);
    let blobs: Vec<_> = (0..1000)
        .map(|n| blob(&format!("d{}/f{n}", n % 10), format!("content {}", n / 2).as_bytes()))
        .collect();
    server.push_artifact("many", "latest", MODEL, &blobs);
    let store = world.open().await;
    let image = store.pull(&server.name("many"), None).await.map_err(|error| chain(&error)).unwrap();
    let rootfs = mounted(&store, &image.id).await;
    assert_eq!(rootfs.lower.len(), 1);
    assert_eq!(read(&rootfs, "d7/f777"), b"content 388");
    assert_eq!(std::fs::read_dir(rootfs.lower[0].join("d3")).unwrap().count(), 100);
    layers(&world, 1).await;
    assert!(Path::new(&rootfs.lower[0]).join("d0/f0").exists());
}
