//! What several want is fetched once, and nobody pays for another's failure.

use podvisor_image_store::{Credentials, ErrorKind};

use crate::layer::Layer;
use crate::server::{Rule, Server};
use crate::{World, chain, eventually, ids};

#[tokio::test(flavor = "multi_thread")]
async fn the_same_image_twice_at_once() {
    let (world, server) = (World::new(), Server::start().await);
    let layer = Layer::bulk("a", 1, 300_000);
    let pushed = server.push("app", "latest", &[&layer], "app");
    server.rule(&layer.digest(), Rule::Held(1000));
    let store = world.open().await;
    let name = server.name("app");
    let pulls: Vec<_> = (0..4)
        .map(|_| {
            let (store, name) = (store.clone(), name.clone());
            tokio::spawn(async move { store.pull(&name, None).await })
        })
        .collect();
    server.held(1).await;
    server.release();
    for pull in pulls {
        assert_eq!(pull.await.unwrap().unwrap().id, pushed.id);
    }
    assert_eq!(server.count(&layer.digest()), 1);
    world.holds(&[layer.diff_id()]).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_layer_of_two_images() {
    let (world, server) = (World::new(), Server::start().await);
    let base = Layer::bulk("base", 1, 300_000);
    let tops = [Layer::file("a", b"a"), Layer::file("b", b"b")];
    server.push("a", "latest", &[&base, &tops[0]], "a");
    server.push("b", "latest", &[&base, &tops[1]], "b");
    server.rule(&base.digest(), Rule::Held(1000));
    let store = world.open().await;
    let (first, second) = (server.name("a"), server.name("b"));
    let (first, second, ()) = tokio::join!(store.pull(&first, None), store.pull(&second, None), async {
        // Both have everything else when the one body of the base is let go.
        eventually(|| {
            let tops = tops.iter().all(|top| world.layers().contains(&top.diff_id()));
            if tops { Ok(()) } else { Err(world.layers()) }
        })
        .await;
        server.held(1).await;
        server.release();
    });
    first.unwrap();
    second.unwrap();
    assert_eq!(server.count(&base.digest()), 1);
    world.holds(&[base.diff_id(), tops[0].diff_id(), tops[1].diff_id()]).await;

    // Later ones find it.
    server.push("c", "latest", &[&base], "c");
    store.pull(&server.name("c"), None).await.unwrap();
    assert_eq!(server.count(&base.digest()), 1);
}

/// Whoever joined a transfer that fails through its beginner's fault tries for himself.
#[tokio::test(flavor = "multi_thread")]
async fn a_failure_is_its_owners() {
    let (world, server) = (World::new(), Server::start().await);
    let (layer, own) = (Layer::bulk("a", 1, 300_000), Layer::file("own", b"own"));
    server.push("bad", "latest", &[&layer], "bad");
    let pushed = server.push("good", "latest", &[&layer, &own], "good");
    let bad = format!("/v2/bad/blobs/{}", layer.digest());
    server.rule(&bad, Rule::Cut(1000));
    let store = world.open().await;
    let spawn = |name: &str| {
        let (store, name) = (store.clone(), server.name(name));
        tokio::spawn(async move { store.pull(&name, None).await })
    };
    let failing = spawn("bad");
    server.held(1).await;
    let joining = spawn("good");
    // When it has its own layer it waits for the other one.
    eventually(|| if world.layers() == [own.diff_id()] { Ok(()) } else { Err(world.layers()) }).await;
    assert_eq!(server.count(&layer.digest()), 1);
    server.rule(&bad, Rule::Status(403));
    server.let_go();
    assert_eq!(failing.await.unwrap().unwrap_err().kind(), ErrorKind::Unauthorized);
    assert_eq!(joining.await.unwrap().unwrap().id, pushed.id);
    assert_eq!(ids(&store), [pushed.id]);
    world.holds(&[layer.diff_id(), own.diff_id()]).await;
}

/// A registry that takes its time holds up nobody who pulls from another one.
#[tokio::test(flavor = "multi_thread")]
async fn a_slow_registry_is_its_own_problem() {
    let (world, slow, good) = (World::new(), Server::start().await, Server::start().await);
    let layer = Layer::bulk("a", 1, 300_000);
    slow.push("app", "latest", &[&layer], "slow");
    let pushed = good.push("app", "latest", &[&layer], "good");
    slow.rule(&layer.digest(), Rule::Held(1000));
    let store = world.open().await;
    let stuck = tokio::spawn({
        let (store, name) = (store.clone(), slow.name("app"));
        async move { store.pull(&name, None).await }
    });
    slow.held(1).await;
    let pulled = tokio::time::timeout(crate::PATIENCE, store.pull(&good.name("app"), None)).await;
    assert_eq!(pulled.expect("it waits for the slow one").unwrap().id, pushed.id);
    slow.release();
    stuck.await.unwrap().unwrap();
    assert_eq!(store.list().len(), 2);
    world.holds(&[layer.diff_id()]).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn others_credentials_are_others() {
    let (world, server) = (World::new(), Server::start().await);
    let layer = Layer::file("a", b"content");
    server.push("app", "latest", &[&layer], "app");
    let store = world.open().await;
    let credentials = Credentials { username: "alice".into(), password: "pw".into(), ..Default::default() };
    store.pull(&server.name("app"), Some(credentials)).await.unwrap();
    // What is there already opens no door: the registry is asked as the one who wants it now.
    server.rule("/v2/app/manifests/", Rule::Status(401));
    let error = store.pull(&server.name("app"), None).await.unwrap_err();
    assert_eq!(error.kind(), ErrorKind::Unauthorized, "{}", chain(&error));
}

/// Naming a layer's diff id beside a blob of one's own gives no access to it.
#[tokio::test(flavor = "multi_thread")]
async fn a_claim_on_somebody_elses_layer() {
    let (world, server) = (World::new(), Server::start().await);
    let (secret, own) = (Layer::file("secret", b"secret"), Layer::file("own", b"own"));
    let pushed = server.push("private", "latest", &[&secret], "private");
    server.push_claiming("thief", "latest", &[&own], &[secret.diff_id()], "thief");
    let store = world.open().await;
    store.pull(&server.name("private"), None).await.unwrap();
    let error = store.pull(&server.name("thief"), None).await.unwrap_err();
    assert_eq!(error.kind(), ErrorKind::Corrupt, "{}", chain(&error));
    assert_eq!(ids(&store), [pushed.id]);
    world.holds(&[secret.diff_id()]).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn pulled_again_nothing_is_fetched() {
    let (world, server) = (World::new(), Server::start().await);
    let layer = Layer::file("a", b"content");
    server.push("app", "latest", &[&layer], "app");
    let store = world.open().await;
    let first = store.pull(&server.name("app"), None).await.unwrap();
    let second = store.pull(&server.name("app"), None).await.unwrap();
    assert_eq!((first.id, first.pulled_at), (second.id, second.pulled_at));
    assert_eq!(server.count(&layer.digest()), 1);
    // Also after a restart.
    drop(store);
    let store = world.open().await;
    store.pull(&server.name("app"), None).await.unwrap();
    assert_eq!(server.count(&layer.digest()), 1);
}
