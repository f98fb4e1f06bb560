//! Pulling, and what a pulled image is called.

use podvisor_image_store::ErrorKind;

use crate::layer::{As, Layer, Tar};
use crate::server::Server;
use crate::{World, assert_named, chain, ids, layer_file};

#[tokio::test(flavor = "multi_thread")]
async fn one_identity_and_all_names() {
    let (world, server) = (World::new(), Server::start().await);
    let layers = [
        Layer::new(Tar::new().directory("./", 0o755).file("a", b"plain"), As::Plain),
        Layer::new(Tar::new().file("b", b"gzip"), As::Gzip),
        Layer::new(Tar::new().file("c", b"zstd").link("d", "c"), As::Zstd),
    ];
    let pushed = server.push("group/app", "1.0", &[&layers[0], &layers[1], &layers[2]], "app");
    let store = world.open().await;
    assert!(store.list().is_empty());

    let image = store.pull(&server.name("group/app:1.0"), None).await.unwrap();
    assert_eq!(image.id, pushed.id);
    assert_eq!(image.repo_tags, [server.name("group/app:1.0")]);
    assert_eq!(image.repo_digests, [server.name(&format!("group/app@{}", pushed.digest))]);
    assert_eq!(image.size, pushed.size);
    assert!(image.raw_config.contains("IMAGE=app"));
    let config = image.config.config().as_ref().unwrap();
    assert_eq!(config.env().as_deref(), Some(&["IMAGE=app".to_owned()][..]));
    assert!(!image.pinned && image.pulled_at > 0);

    let hex = pushed.id.strip_prefix("sha256:").unwrap();
    assert_named(
        &store,
        &image,
        &[
            &server.name("group/app:1.0"),
            &server.name(&format!("group/app@{}", pushed.digest)),
            &server.name(&format!("group/app:1.0@{}", pushed.digest)),
            // As kubelet puts name and identity together.
            &server.name(&format!("group/app@{}", pushed.id)),
            &pushed.id,
            hex,
            &hex[..12],
            &pushed.id[..20],
        ],
    );
    for other in [
        server.name("group/app"),
        server.name("group/app:2.0"),
        server.name("app:1.0"),
        server.name(&format!("other@{}", pushed.digest)),
        format!("sha256:{}", "0".repeat(64)),
        hex[..2].to_owned(),
        String::new(),
        "sha256:".to_owned(),
        "UPPER/case".to_owned(),
    ] {
        assert!(store.get(&other).is_none(), "{other:?} must mean nothing");
    }
    assert_eq!(layer_file(&world, &layers[0].diff_id(), "a"), b"plain");
    assert_eq!(layer_file(&world, &layers[1].diff_id(), "b"), b"gzip");
    assert_eq!(layer_file(&world, &layers[2].diff_id(), "d"), b"zstd");
    world.holds(&layers.map(|layer| layer.diff_id())).await;

    // The same after a restart.
    let before = store.list();
    drop(store);
    let store = world.open().await;
    assert_eq!(format!("{before:?}"), format!("{:?}", store.list()));
    assert_named(&store, &image, &[&server.name("group/app:1.0"), &pushed.id]);
}

#[tokio::test(flavor = "multi_thread")]
async fn by_digest_there_is_no_tag() {
    let (world, server) = (World::new(), Server::start().await);
    let layer = Layer::file("a", b"content");
    let pushed = server.push("app", "latest", &[&layer], "app");
    let index = server.push_index("app", "multi", &pushed);
    let store = world.open().await;

    let image = store.pull(&server.name(&format!("app@{}", pushed.digest)), None).await.unwrap();
    assert_eq!(image.id, pushed.id);
    assert!(image.repo_tags.is_empty(), "{:?}", image.repo_tags);
    assert_eq!(image.repo_digests, [server.name(&format!("app@{}", pushed.digest))]);

    // A tag beside a digest was not asked about, and proves nothing.
    let image = store.pull(&server.name(&format!("app:beside@{}", pushed.digest)), None).await.unwrap();
    assert!(image.repo_tags.is_empty(), "{:?}", image.repo_tags);

    // The digest of an index is what the name is, the identity stays the image's.
    let image = store.pull(&server.name("app:multi"), None).await.unwrap();
    assert_eq!(image.id, pushed.id);
    assert_eq!(image.repo_tags, [server.name("app:multi")]);
    let mut digests =
        vec![server.name(&format!("app@{}", pushed.digest)), server.name(&format!("app@{}", index.digest))];
    digests.sort();
    assert_eq!(image.repo_digests, digests);
    assert_eq!(ids(&store), [pushed.id]);
    assert_eq!(server.count(&layer.digest()), 1);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_tag_moves() {
    let (world, server) = (World::new(), Server::start().await);
    let (old, new) = (Layer::file("a", b"old"), Layer::file("a", b"new"));
    let first = server.push("app", "latest", &[&old], "first");
    let store = world.open().await;
    store.pull(&server.name("app"), None).await.unwrap();
    let second = server.push("app", "latest", &[&new], "second");
    let pulled = store.pull(&server.name("app"), None).await.unwrap();
    assert_eq!(pulled.id, second.id);

    let left = store.get(&first.id).unwrap();
    assert!(left.repo_tags.is_empty());
    assert_eq!(left.repo_digests, [server.name(&format!("app@{}", first.digest))]);
    assert_named(&store, &pulled, &[&server.name("app:latest"), &server.name("app")]);
    world.holds(&[old.diff_id(), new.diff_id()]).await;

    // And back.
    server.tag("app", "latest", &first.digest);
    assert_eq!(store.pull(&server.name("app"), None).await.unwrap().id, first.id);
    assert!(store.get(&second.id).unwrap().repo_tags.is_empty());
}

#[tokio::test(flavor = "multi_thread")]
async fn short_names_are_found_again() {
    let (world, server) = (World::new(), Server::start().await);
    let pushed = server.push("app", "latest", &[&Layer::file("a", b"content")], "app");
    world.registries_conf(&format!("unqualified-search-registries = [\"{}\"]\n", server.address));
    let store = world.open().await;
    let image = store.pull("app", None).await.unwrap();
    assert_eq!(image.repo_tags, [server.name("app:latest")]);
    // kubelet asks for the name that stands in the pod.
    assert_named(&store, &image, &["app", &server.name("app"), &pushed.id]);
    drop(store);
    let store = world.open().await;
    assert_named(&store, &image, &["app"]);
    store.remove("app").await.unwrap();
    assert!(store.get("app").is_none() && store.list().is_empty());
}

#[tokio::test(flavor = "multi_thread")]
async fn pinned_images_say_so() {
    let (world, server) = (World::new(), Server::start().await);
    server.push("pause", "3.10", &[&Layer::file("pause", b"zzz")], "pause");
    server.push("app", "latest", &[&Layer::file("a", b"content")], "app");
    let store = world.open().await;
    store.pin(&[server.name("pause:3.10")]).await.unwrap();
    assert!(store.pull(&server.name("pause:3.10"), None).await.unwrap().pinned);
    assert!(!store.pull(&server.name("app"), None).await.unwrap().pinned);
    store.pin(&[server.name("app")]).await.unwrap();
    assert!(!store.get(&server.name("pause:3.10")).unwrap().pinned);
    assert!(store.get(&server.name("app")).unwrap().pinned);
    assert_eq!(store.pin(&["Not A Name".to_owned()]).await.unwrap_err().kind(), ErrorKind::Invalid);
    assert!(store.get(&server.name("app")).unwrap().pinned, "a mistake changes nothing");
}

#[tokio::test(flavor = "multi_thread")]
async fn what_cannot_be_pulled_says_why() {
    let (world, server) = (World::new(), Server::start().await);
    let store = world.open().await;
    for (name, kind) in [
        (server.name("missing"), ErrorKind::NotFound),
        (server.name("app:bad tag"), ErrorKind::Invalid),
        (String::new(), ErrorKind::Invalid),
    ] {
        let error = store.pull(&name, None).await.unwrap_err();
        assert_eq!(error.kind(), kind, "{}", chain(&error));
        assert!(chain(&error).contains(&name), "{}", chain(&error));
    }
    assert!(store.list().is_empty());
    world.holds(&[]).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn an_image_without_layers_and_one_with_the_same_twice() {
    let (world, server) = (World::new(), Server::start().await);
    let layer = Layer::file("a", b"content");
    let twice = server.push("twice", "latest", &[&layer, &Layer::file("b", b"b"), &layer], "twice");
    let store = world.open().await;
    assert_eq!(store.pull(&server.name("twice"), None).await.unwrap().id, twice.id);
    assert_eq!(server.count(&layer.digest()), 1);
    let none = server.push("none", "latest", &[], "none");
    assert_eq!(store.pull(&server.name("none"), None).await.unwrap().id, none.id);
    assert_eq!(store.list().len(), 2);
}

#[tokio::test(flavor = "multi_thread")]
async fn two_stores_on_one_directory() {
    let world = World::new();
    let store = world.open().await;
    let error = podvisor_image_store::ImageStore::open(world.options()).await.unwrap_err();
    let text = chain(&error);
    assert!(text.contains("in use by another process") && text.contains("images"), "{text}");
    assert!(!text.contains('\n'), "{text}");
    drop(store);
    world.open().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_database_that_is_none() {
    let world = World::new();
    drop(world.open().await);
    std::fs::write(world.path("images/metadata.redb"), b"garbage").unwrap();
    let error = podvisor_image_store::ImageStore::open(world.options()).await.unwrap_err();
    assert!(chain(&error).contains("metadata.redb"), "{}", chain(&error));
    assert_eq!(error.kind(), ErrorKind::Internal);
}
