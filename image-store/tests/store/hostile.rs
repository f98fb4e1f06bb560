//! Registries that send something else than they should: nothing of it stays, and another endpoint is asked.

use podvisor_image_store::{ErrorKind, ImageError, ImageStore};

use crate::layer::{As, Layer, Tar, noise};
use crate::server::{Pushed, Rule, Server};
use crate::{World, chain, ids};

/// A mirror that lies about one layer, and a registry that does not.
struct Pair {
    world: World,
    mirror: Server,
    primary: Server,
    liar: Layer,
    honest: Layer,
    pushed: Pushed,
}

impl Pair {
    async fn new() -> Self {
        let (mirror, primary) = (Server::start().await, Server::start().await);
        let liar = Layer::new(Tar::new().file("a", &noise(1, 200_000)), As::Gzip);
        let honest = Layer::file("b", b"content");
        let world = World::new();
        mirror.push("app", "latest", &[&liar, &honest], "app");
        let pushed = primary.push("app", "latest", &[&liar, &honest], "app");
        Self { world, mirror, primary, liar, honest, pushed }
    }

    fn lie(&self, rule: Rule) {
        self.mirror.rule(&self.liar.digest(), rule);
    }

    /// The mirror alone fails and leaves nothing.
    async fn alone(&self) -> ImageError {
        let store = self.world.open().await;
        let error = store.pull(&self.mirror.name("app"), None).await.unwrap_err();
        assert!(store.list().is_empty());
        self.world.holds(&[]).await;
        assert_eq!(store.fs_info().0.used_bytes, 0);
        error
    }

    /// With the primary behind it the image comes, whole.
    async fn with_primary(&self) -> ImageStore {
        self.world.registries_conf(&format!(
            "[[registry]]\nlocation = \"{}\"\n[[registry.mirror]]\nlocation = \"{}\"\n",
            self.primary.address, self.mirror.address
        ));
        let store = self.world.open().await;
        let image = store.pull(&self.primary.name("app"), None).await.map_err(|error| chain(&error)).unwrap();
        assert_eq!(image.id, self.pushed.id);
        assert!(self.mirror.count(&self.liar.digest()) >= 1, "the mirror comes first");
        assert!(self.primary.count(&self.liar.digest()) >= 1);
        self.world.holds(&[self.liar.diff_id(), self.honest.diff_id()]).await;
        assert_eq!(crate::layer_file(&self.world, &self.liar.diff_id(), "a"), noise(1, 200_000));
        store
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn wrong_digest() {
    let pair = Pair::new().await;
    let other = Layer::new(Tar::new().file("a", &noise(2, 200_000)), As::Gzip);
    // As long as it should be, and a proper layer: only the digest tells.
    let mut same_length = other.blob.clone();
    same_length.resize(pair.liar.blob.len(), 0);
    let plain = Layer::new(Tar::new().file("a", &noise(3, 100)), As::Plain);
    let mut padded = Layer::new(Tar::new().file("a", &noise(3, 100)), As::Gzip).blob;
    padded.resize(pair.liar.blob.len(), 0);
    for lie in
        [same_length, padded, noise(4, pair.liar.blob.len()), vec![0; pair.liar.blob.len()], plain.blob]
    {
        pair.lie(Rule::Body(lie));
        let error = pair.alone().await;
        // One that is too short counts as broken off: it may be the rest that is missing.
        assert!(matches!(error.kind(), ErrorKind::Corrupt | ErrorKind::Unavailable), "{}", chain(&error));
    }
    let mut flipped = pair.liar.blob.clone();
    let middle = flipped.len() / 2;
    flipped[middle] ^= 1;
    pair.lie(Rule::Body(flipped));
    let error = pair.alone().await;
    assert_eq!(error.kind(), ErrorKind::Corrupt, "{}", chain(&error));
    assert!(chain(&error).contains(&pair.liar.digest()), "{}", chain(&error));
    pair.with_primary().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn more_than_announced() {
    let pair = Pair::new().await;
    pair.lie(Rule::TooLong);
    let error = pair.alone().await;
    assert_eq!(error.kind(), ErrorKind::Corrupt, "{}", chain(&error));
    pair.with_primary().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn longer_than_it_should_be() {
    let pair = Pair::new().await;
    pair.lie(Rule::Body([pair.liar.blob.as_slice(), b"more"].concat()));
    let error = pair.alone().await;
    assert_eq!(error.kind(), ErrorKind::Corrupt, "{}", chain(&error));
    pair.with_primary().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn shorter_than_it_should_be() {
    let pair = Pair::new().await;
    pair.lie(Rule::Body(pair.liar.blob[..pair.liar.blob.len() - 1000].to_vec()));
    pair.alone().await;
    pair.with_primary().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_layer_that_is_not_there() {
    let pair = Pair::new().await;
    pair.lie(Rule::Status(404));
    let error = pair.alone().await;
    assert_eq!(error.kind(), ErrorKind::NotFound, "{}", chain(&error));
    pair.with_primary().await;
}

/// The mirror has nothing and the registry itself lies: that ends, though neither can be done without.
#[tokio::test(flavor = "multi_thread")]
async fn nobody_tells_the_truth() {
    let pair = Pair::new().await;
    pair.lie(Rule::Status(404));
    pair.primary.rule(&pair.liar.digest(), Rule::Body(noise(9, pair.liar.blob.len())));
    pair.world.registries_conf(&format!(
        "[[registry]]\nlocation = \"{}\"\n[[registry.mirror]]\nlocation = \"{}\"\n",
        pair.primary.address, pair.mirror.address
    ));
    let store = pair.world.open().await;
    let name = pair.primary.name("app");
    let pull = tokio::time::timeout(crate::PATIENCE, store.pull(&name, None));
    let error = pull.await.expect("it never ends").unwrap_err();
    assert_eq!(error.kind(), ErrorKind::Corrupt, "{}", chain(&error));
    assert!(pair.primary.count(&pair.liar.digest()) < 10);
    pair.world.holds(&[]).await;
}

/// The manifest's own fault: no endpoint has anything better.
#[tokio::test(flavor = "multi_thread")]
async fn wrong_diff_id() {
    let (world, server) = (World::new(), Server::start().await);
    let (layer, other) = (Layer::bulk("a", 1, 100_000), Layer::file("b", b"b"));
    server.push_claiming("app", "latest", &[&layer, &other], &[other.diff_id(), layer.diff_id()], "app");
    let store = world.open().await;
    let error = store.pull(&server.name("app"), None).await.unwrap_err();
    assert_eq!(error.kind(), ErrorKind::Corrupt, "{}", chain(&error));
    assert!(chain(&error).contains("its image says"), "{}", chain(&error));
    world.holds(&[]).await;
    assert!(ids(&store).is_empty());
}

/// Digests are right, what they name is no archive.
#[tokio::test(flavor = "multi_thread")]
async fn layers_that_are_none() {
    let (world, server) = (World::new(), Server::start().await);
    let whole = Layer::bulk("a", 1, 100_000);
    let broken = |blob: Vec<u8>| whole.clone().with_blob(blob);
    let plain = Layer::new(Tar::new().file("a", &noise(1, 5000)), As::Plain);
    let cut_tar = plain.clone().with_blob(plain.blob[..1024].to_vec());
    let store = world.open().await;
    for (number, layer) in [
        broken(whole.blob[..whole.blob.len() / 2].to_vec()),
        broken(noise(1, 5000)),
        broken(Vec::new()),
        broken(whole.tar.clone()),
        cut_tar,
        Layer::new(Tar::new().file("../outside", b"x"), As::Gzip),
    ]
    .iter()
    .enumerate()
    {
        server.push("app", "latest", &[layer], &number.to_string());
        let error = store.pull(&server.name("app"), None).await.unwrap_err();
        assert_eq!(error.kind(), ErrorKind::Corrupt, "{number}: {}", chain(&error));
        world.holds(&[]).await;
    }
    assert!(!world.path("images/ingest/outside").exists() && !world.path("images/outside").exists());
}

/// One bad layer takes the good ones with it.
#[tokio::test(flavor = "multi_thread")]
async fn an_image_comes_whole_or_not_at_all() {
    let (world, server) = (World::new(), Server::start().await);
    let good: Vec<_> = (0..6).map(|number| Layer::bulk("a", number, 20_000)).collect();
    let bad = Layer::new(Tar::new().file("../outside", b"x"), As::Gzip);
    let mut layers: Vec<_> = good.iter().collect();
    layers.push(&bad);
    server.push("app", "latest", &layers, "app");
    let store = world.open().await;
    store.pull(&server.name("app"), None).await.unwrap_err();
    assert!(store.list().is_empty());
    world.holds(&[]).await;
    // The next one is not the worse for it.
    let pushed = server.push("app", "latest", &good.iter().collect::<Vec<_>>(), "app");
    assert_eq!(store.pull(&server.name("app"), None).await.unwrap().id, pushed.id);
}

#[tokio::test(flavor = "multi_thread")]
async fn documents_that_are_none() {
    let (world, server) = (World::new(), Server::start().await);
    let store = world.open().await;
    let pushed = server.push("app", "latest", &[&Layer::file("a", b"a")], "app");
    for (part, rule) in [
        ("/manifests/", Rule::Body(b"<html>log in</html>".to_vec())),
        ("/manifests/", Rule::Body(b"{}".to_vec())),
        ("/manifests/", Rule::Status(500)),
        (pushed.id.as_str(), Rule::Body(b"{}".to_vec())),
        (pushed.id.as_str(), Rule::Status(404)),
    ] {
        server.rule(part, rule.clone());
        let error = store.pull(&server.name("app"), None).await.unwrap_err();
        assert_ne!(error.kind(), ErrorKind::Internal, "{rule:?}: {}", chain(&error));
        assert!(chain(&error).contains(&server.address.to_string()), "{}", chain(&error));
        server.release();
    }
    world.holds(&[]).await;
    store.pull(&server.name("app"), None).await.unwrap();
}
