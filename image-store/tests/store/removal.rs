//! Images go, and their layers when nobody needs them any more.

use crate::layer::Layer;
use crate::server::{Rule, Server};
use crate::{World, ids};

#[tokio::test(flavor = "multi_thread")]
async fn by_one_tag_all_go() {
    let (world, server) = (World::new(), Server::start().await);
    let layer = Layer::file("a", b"content");
    let pushed = server.push("app", "1", &[&layer], "app");
    server.tag("app", "2", &pushed.digest);
    let store = world.open().await;
    store.pull(&server.name("app:1"), None).await.unwrap();
    let image = store.pull(&server.name("app:2"), None).await.unwrap();
    assert_eq!(image.repo_tags, [server.name("app:1"), server.name("app:2")]);

    store.remove(&server.name("app:1")).await.unwrap();
    assert!(store.list().is_empty());
    assert!(store.get(&server.name("app:2")).is_none());
    world.holds(&[]).await;
    store.remove(&server.name("app:1")).await.unwrap();
    store.remove("never-there").await.unwrap();
    drop(store);
    assert!(world.open().await.list().is_empty());
}

#[tokio::test(flavor = "multi_thread")]
async fn shared_layers_stay_for_the_others() {
    let (world, server) = (World::new(), Server::start().await);
    let (base, top) = (Layer::file("base", b"base"), Layer::file("top", b"top"));
    server.push("lower", "latest", &[&base], "lower");
    let upper = server.push("upper", "latest", &[&base, &top], "upper");
    let store = world.open().await;
    store.pull(&server.name("lower"), None).await.unwrap();
    store.pull(&server.name("upper"), None).await.unwrap();
    store.remove(&upper.id[..20]).await.unwrap();
    world.holds(&[base.diff_id()]).await;
    store.remove(&server.name("lower")).await.unwrap();
    world.holds(&[]).await;
    assert_eq!(store.fs_info().0.used_bytes, 0);
    // All anew.
    store.pull(&server.name("upper"), None).await.unwrap();
    assert_eq!(server.count(&base.digest()), 2);
    world.holds(&[base.diff_id(), top.diff_id()]).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn many_at_once() {
    let (world, server) = (World::new(), Server::start().await);
    let base = Layer::file("base", b"base");
    let own: Vec<_> = (0..4).map(|number| Layer::file("own", &[number])).collect();
    for (number, layer) in own.iter().enumerate() {
        server.push(&format!("app{number}"), "latest", &[&base, layer], &number.to_string());
    }
    let store = world.open().await;
    for round in 0..5 {
        let work = (0..4).map(|number| {
            let (store, name) = (store.clone(), server.name(&format!("app{number}")));
            tokio::spawn(async move {
                store.pull(&name, None).await.unwrap();
                // Two at once.
                let (first, second) = tokio::join!(store.remove(&name), store.remove(&name));
                first.unwrap();
                second.unwrap();
                if round == 4 && number == 0 {
                    store.pull(&name, None).await.unwrap();
                }
            })
        });
        for task in work.collect::<Vec<_>>() {
            task.await.unwrap();
        }
    }
    assert_eq!(store.list().len(), 1);
    world.holds(&[base.diff_id(), own[0].diff_id()]).await;
}

/// A pull that counts on a layer which was there keeps it from being collected with the image that had it.
#[tokio::test(flavor = "multi_thread")]
async fn under_a_pull_that_shares_a_layer() {
    let (world, server) = (World::new(), Server::start().await);
    let (base, top) = (Layer::file("base", b"base"), Layer::bulk("top", 1, 300_000));
    server.push("lower", "latest", &[&base], "lower");
    let upper = server.push("upper", "latest", &[&base, &top], "upper");
    let store = world.open().await;
    store.pull(&server.name("lower"), None).await.unwrap();
    server.rule(&top.digest(), Rule::Held(1000));
    let (pulled, ()) = tokio::join!(async { store.pull(&server.name("upper"), None).await }, async {
        server.held(1).await;
        store.remove(&server.name("lower")).await.unwrap();
        server.release();
    });
    assert_eq!(pulled.unwrap().id, upper.id);
    assert_eq!(server.count(&base.digest()), 1);
    assert_eq!(ids(&store), [upper.id.as_str()]);
    world.holds(&[base.diff_id(), top.diff_id()]).await;
    // And after a restart its rows are there.
    drop(store);
    let store = world.open().await;
    assert_eq!(ids(&store), [upper.id]);
}

#[tokio::test(flavor = "multi_thread")]
async fn in_use_the_names_go_first_and_the_layers_last() {
    let (world, server) = (World::new(), Server::start().await);
    let layer = Layer::file("a", b"content");
    let pushed = server.push("app", "latest", &[&layer], "app");
    let store = world.open().await;
    store.pull(&server.name("app"), None).await.unwrap();
    store.prepare("one", &pushed.id, false).await.unwrap();
    store.prepare("two", &pushed.id, true).await.unwrap();
    store.remove(&server.name("app")).await.unwrap();
    assert!(store.list().is_empty() && store.get(&pushed.id).is_none());
    assert!(store.prepare("three", &pushed.id, false).await.is_err(), "it has no image to stand on");
    world.holds(&[layer.diff_id()]).await;
    store.release("one").await.unwrap();
    world.holds(&[layer.diff_id()]).await;

    // The container goes on to live through a restart.
    drop(store);
    let store = world.open().await;
    assert_eq!(store.snapshots(), ["two"]);
    world.holds(&[layer.diff_id()]).await;
    store.release("two").await.unwrap();
    world.holds(&[]).await;
    store.release("two").await.unwrap();
    assert!(store.snapshots().is_empty());
}

#[tokio::test(flavor = "multi_thread")]
async fn in_use_and_pulled_again() {
    let (world, server) = (World::new(), Server::start().await);
    let layer = Layer::file("a", b"content");
    let pushed = server.push("app", "latest", &[&layer], "app");
    let store = world.open().await;
    store.pull(&server.name("app"), None).await.unwrap();
    store.prepare("one", &pushed.id, false).await.unwrap();
    store.remove(&pushed.id).await.unwrap();
    store.pull(&server.name("app"), None).await.unwrap();
    assert_eq!(server.count(&layer.digest()), 1);
    store.release("one").await.unwrap();
    world.holds(&[layer.diff_id()]).await;
    assert_eq!(ids(&store), [pushed.id]);
}

/// Somebody has removed directories by hand.
#[tokio::test(flavor = "multi_thread")]
async fn what_was_lost_counts_as_not_there() {
    let (world, server) = (World::new(), Server::start().await);
    let (lost, kept) = (Layer::file("a", b"a"), Layer::file("b", b"b"));
    let broken = server.push("broken", "latest", &[&lost, &kept], "broken");
    let whole = server.push("whole", "latest", &[&kept], "whole");
    let store = world.open().await;
    store.pull(&server.name("broken"), None).await.unwrap();
    store.pull(&server.name("whole"), None).await.unwrap();
    store.prepare("gone", &whole.id, false).await.unwrap();
    std::fs::remove_dir_all(world.path("images/snapshots/gone")).unwrap();
    store.release("gone").await.unwrap();
    assert!(store.snapshots().is_empty());
    drop(store);
    let hex = lost.diff_id();
    std::fs::remove_dir_all(world.path("images/layers").join(hex.strip_prefix("sha256:").unwrap())).unwrap();
    std::fs::create_dir(world.path("images/layers/0123456789abcdef")).unwrap();
    std::fs::create_dir_all(world.path("images/ingest/left/over")).unwrap();
    std::fs::create_dir(world.path("images/snapshots/without-a-record")).unwrap();
    let store = world.open().await;
    assert_eq!(ids(&store), [whole.id]);
    assert!(store.snapshots().is_empty());
    world.holds(&[kept.diff_id()]).await;
    assert_eq!(store.pull(&server.name("broken"), None).await.unwrap().id, broken.id);
    world.holds(&[lost.diff_id(), kept.diff_id()]).await;
}
