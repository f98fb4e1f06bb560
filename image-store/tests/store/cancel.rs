//! Pulls whose caller has gone.

use std::future::poll_fn;
use std::pin::Pin;
use std::task::Poll;

use crate::layer::Layer;
use crate::server::{Rule, Server};
use crate::{World, eventually, ids};

#[tokio::test(flavor = "multi_thread")]
async fn leaves_nothing_and_hangs_up() {
    let (world, server) = (World::new(), Server::start().await);
    let layers: Vec<_> = (0..3).map(|number| Layer::bulk("a", number, 300_000)).collect();
    server.push("app", "latest", &layers.iter().collect::<Vec<_>>(), "app");
    // One is complete, two are on their way.
    server.rule(&layers[0].digest(), Rule::Held(200_000));
    server.rule(&layers[1].digest(), Rule::Held(0));
    let store = world.open().await;
    let pull = tokio::spawn({
        let (store, name) = (store.clone(), server.name("app"));
        async move { store.pull(&name, None).await }
    });
    eventually(|| {
        let done = world.layers() == [layers[2].diff_id()];
        if done { Ok(()) } else { Err((world.layers(), world.ingest())) }
    })
    .await;
    server.held(2).await;
    pull.abort();
    assert!(pull.await.unwrap_err().is_cancelled());
    server.idle().await;
    world.holds(&[]).await;
    assert!(store.list().is_empty());
    // And then all the same.
    server.release();
    store.pull(&server.name("app"), None).await.unwrap();
    world.holds(&layers.iter().map(Layer::diff_id).collect::<Vec<_>>()).await;
}

/// Polls once, and no more: the caller has taken its seat.
async fn begun<T>(mut pull: Pin<&mut impl Future<Output = T>>) {
    let is_pending = poll_fn(|context| Poll::Ready(pull.as_mut().poll(context).is_pending())).await;
    assert!(is_pending, "it ended at once");
}

#[tokio::test(flavor = "multi_thread")]
async fn of_two_callers_one_goes() {
    let (world, server) = (World::new(), Server::start().await);
    let layer = Layer::bulk("a", 1, 300_000);
    let pushed = server.push("app", "latest", &[&layer], "app");
    let own = Layer::file("b", b"b");
    server.push("other", "latest", &[&layer, &own], "other");
    server.rule(&layer.digest(), Rule::Held(1000));
    let store = world.open().await;
    let (app, second) = (server.name("app"), server.name("other"));
    let mut beginner = Box::pin(store.pull(&app, None));
    let mut same = Box::pin(store.pull(&app, None));
    let mut other = Box::pin(store.pull(&second, None));
    begun(beginner.as_mut()).await;
    begun(same.as_mut()).await;
    server.held(1).await;
    begun(other.as_mut()).await;
    eventually(|| if world.layers() == [own.diff_id()] { Ok(()) } else { Err(world.layers()) }).await;
    drop(beginner);
    drop(other);
    server.release();
    assert_eq!(same.await.unwrap().id, pushed.id);
    assert_eq!(server.count(&layer.digest()), 1);
    world.holds(&[layer.diff_id()]).await;
}

/// Cancelled at every stage, also after the last byte: whole or not at all, never in between.
#[tokio::test(flavor = "multi_thread")]
async fn at_any_moment() {
    let (world, server) = (World::new(), Server::start().await);
    let layers = [Layer::bulk("a", 1, 100_000), Layer::bulk("a", 2, 60_000)];
    let pushed = server.push("app", "latest", &[&layers[0], &layers[1]], "app");
    let diff_ids = layers.map(|layer| layer.diff_id());
    let store = world.open().await;
    let mut cut = 0;
    for round in 0..40 {
        let start = server.sent();
        let mut pull = tokio::spawn({
            let (store, name) = (store.clone(), server.name("app"));
            async move { store.pull(&name, None).await }
        });
        // Bytes of documents and layers together. Where the last pull got all bytes of a layer before it was cancelled,
        // this one may find it in passing, and need fewer.
        let ended = tokio::select! {
            ended = &mut pull => Some(ended),
            () = server.has_sent(start + round % 8 * 20_000) => None,
        };
        if ended.is_none() {
            for _ in 0..round * 5 {
                tokio::task::yield_now().await;
            }
            pull.abort();
            cut += u32::from(pull.await.is_err());
        }
        server.idle().await;
        // A change that has begun is made, so the image may still appear.
        eventually(|| {
            let whole = ids(&store) == [pushed.id.as_str()] && world.layers().len() == 2;
            let absent = ids(&store).is_empty() && world.layers().is_empty();
            let state = (round, ids(&store), world.layers(), world.ingest());
            if (whole || absent) && state.3.is_empty() { Ok(()) } else { Err(state) }
        })
        .await;
        store.remove(&pushed.id).await.unwrap();
        world.holds(&[]).await;
    }
    assert!(cut > 0, "no pull was cancelled");
    store.pull(&server.name("app"), None).await.unwrap();
    world.holds(&diff_ids).await;
}
