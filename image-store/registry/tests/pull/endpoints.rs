//! Who is asked: mirrors, hosts.toml, names without a registry, and configuration that changes.

use podvisor_registry::{Credentials, ErrorKind, Reference};

use crate::content::{Content, missing};
use crate::server::{Answer, Server, unused_address};
use crate::{Client, assert_contains};

async fn registry_with(content: &Content) -> Server {
    let content = content.clone();
    Server::start(move |seen| content.reply(seen)).await
}

#[tokio::test]
async fn mirrors_come_first_and_in_order() {
    let content = Content::with_layer(1000);
    let absent = Server::start(|_| missing("MANIFEST_UNKNOWN").into()).await;
    let failing = Server::start(|_| Answer::status(503).into()).await;
    let good = registry_with(&content).await;
    let last = registry_with(&content).await;
    let dead = unused_address().await;
    let client = Client::new();
    client.registries_conf(&format!(
        r#"
        [[registry]]
        prefix = "example.invalid/team"
        location = "{}/elsewhere"
        [[registry.mirror]]
        location = "{dead}"
        [[registry.mirror]]
        location = "{}/a"
        [[registry.mirror]]
        location = "{}"
        [[registry.mirror]]
        location = "{}/hub/team"
        "#,
        last.address, absent.address, failing.address, good.address
    ));
    let layers = client.pull("example.invalid/team/app").await.unwrap();
    assert_eq!(layers[0].len(), 1000);
    assert_eq!(absent.seen()[0].path, "/v2/a/app/manifests/latest");
    assert_eq!(good.seen()[0].path, "/v2/hub/team/app/manifests/latest");
    assert!(last.seen().is_empty());
    // Who failed once is not asked for the rest.
    assert_eq!(absent.seen().len(), 1);
    assert_eq!(failing.seen().len(), 2, "a failing server gets a second chance");
}

#[tokio::test]
async fn an_error_names_everybody() {
    let absent = Server::start(|_| missing("MANIFEST_UNKNOWN").into()).await;
    let private = Server::start(|_| Answer::unauthorized("Basic").into()).await;
    let dead = unused_address().await;
    let client = Client::new();
    client.registries_conf(&format!(
        "[[registry]]\nlocation = \"{}\"\n[[registry.mirror]]\nlocation = \"{dead}\"\n[[registry.mirror]]\nlocation = \"{}\"\n",
        absent.address, private.address
    ));
    let error = client.resolve(&absent.name("app")).await.unwrap_err();
    assert_eq!(error.kind(), ErrorKind::NotFound, "the primary decides: {error}");
    assert_eq!(
        error.to_string(),
        format!(
            "pull {absent}/app:latest: https://{dead}/v2/app/manifests/latest: cannot connect: connection refused; \
             http://{private}/v2/app/manifests/latest: 401 Unauthorized: asks for user and password, no credentials \
             for {private}; http://{absent}/v2/app/manifests/latest: 404 Not Found (MANIFEST_UNKNOWN: not here)",
            absent = absent.address,
            private = private.address,
        )
    );
}

#[tokio::test]
async fn names_that_do_not_resolve_are_unavailable() {
    let error = Client::new().resolve("registry.invalid/app").await.unwrap_err();
    assert_eq!(error.kind(), ErrorKind::Unavailable, "{error}");
    assert_contains(&error, &["https://registry.invalid/v2/app/manifests/latest: cannot connect"]);
}

#[tokio::test]
async fn blocked_and_reloaded() {
    let server = registry_with(&Content::with_layer(10)).await;
    let client = Client::new();
    let name = server.name("app");
    client.resolve(&name).await.unwrap();
    assert_eq!(client.registry.configuration_error(), None);
    client.registries_conf(&format!("[[registry]]\nlocation = \"{}\"\nblocked = true\n", server.address));
    let error = client.resolve(&name).await.unwrap_err();
    assert_eq!(error.kind(), ErrorKind::Refused);
    assert_contains(&error, &["registries.conf blocks", &name]);

    client.write("registries.conf.d/50-broken.conf", "blocked = [");
    assert_eq!(client.resolve(&name).await.unwrap_err().kind(), ErrorKind::Refused, "the last good state");
    let problem = client.registry.configuration_error().unwrap();
    assert!(problem.contains("50-broken.conf"), "{problem}");
    client.write(
        "registries.conf.d/50-broken.conf",
        &format!("[[registry]]\nlocation = \"{}\"\n", server.address),
    );
    client.resolve(&name).await.unwrap();
    assert_eq!(client.registry.configuration_error(), None);

    let broken = Client::new();
    broken.registries_conf("x");
    let error = broken.resolve(&name).await.unwrap_err();
    assert_eq!(error.kind(), ErrorKind::Configuration, "{error}");
    assert_contains(&error, &["registries.conf", "line 1"]);
}

#[tokio::test]
async fn mirrors_for_digests_only() {
    let content = Content::with_layer(10);
    let mirror = registry_with(&content).await;
    let primary = registry_with(&content).await;
    let client = Client::new();
    client.registries_conf(&format!(
        "[[registry]]\nlocation = \"{}\"\n[[registry.mirror]]\nlocation = \"{}\"\npull-from-mirror = \"digest-only\"\n",
        primary.address, mirror.address
    ));
    let image = client.resolve(&primary.name("app")).await.unwrap();
    assert!(mirror.seen().is_empty());
    let by_digest = image.reference.with_digest(image.target_digest.clone());
    client.registry.resolve(&by_digest, None).await.unwrap();
    assert!(!mirror.seen().is_empty());
}

#[tokio::test]
async fn credentials_stay_with_their_host() {
    let private = |seen: &crate::server::Seen| {
        if seen.header("authorization").is_some() {
            Answer::status(404)
        } else {
            Answer::unauthorized("Basic")
        }
    };
    let mirror = Server::start(move |seen| private(seen).into()).await;
    let primary = Server::start(move |seen| private(seen).into()).await;
    let client = Client::new();
    client.registries_conf(&format!(
        "[[registry]]\nlocation = \"{}\"\n[[registry.mirror]]\nlocation = \"{}\"\n",
        primary.address, mirror.address
    ));
    let reference = Reference::parse(&primary.name("app")).unwrap();
    let credentials =
        Credentials { username: "alice".into(), password: "secret".into(), ..Credentials::default() };
    client.registry.resolve(&reference, Some(&credentials)).await.unwrap_err();
    assert!(mirror.seen().iter().all(|seen| seen.header("authorization").is_none()));
    assert!(primary.seen().iter().any(|seen| seen.header("authorization").is_some()));

    // The mirror has credentials of its own.
    let auth = "bWlycm9yOm93bg==";
    client.write(
        "config.json",
        &format!("{{\"auths\": {{\"{}\": {{\"auth\": \"{auth}\"}}}}}}", mirror.address),
    );
    client.registry.resolve(&reference, Some(&credentials)).await.unwrap_err();
    let expected = format!("Basic {auth}");
    assert!(mirror.seen().iter().any(|seen| seen.header("authorization") == Some(&expected)));
}

#[tokio::test]
async fn hosts_toml_says_who_does_what() {
    let content = Content::with_layer(1000);
    let pulls = registry_with(&content).await;
    let resolves = {
        let content = content.clone();
        Server::start_at("127.0.0.2", None, move |seen| {
            if seen.path.contains("/manifests/latest") {
                content.reply(seen)
            } else {
                Answer::status(500).into()
            }
        })
        .await
    };
    let client = Client::new();
    client.write(
        "certs.d/example.invalid/hosts.toml",
        &format!(
            r#"
            server = "http://{}"
            capabilities = ["resolve"]
            [host."http://{}/api/root"]
            capabilities = ["pull"]
            override_path = true
            [host."http://{}/api/root".header]
            x-key = "only-for-this-host"
            "#,
            resolves.address, pulls.address, pulls.address
        ),
    );
    let layers = client.pull("example.invalid/app").await.unwrap();
    assert_eq!(layers[0].len(), 1000);
    let tags: Vec<_> = resolves.seen().iter().map(|seen| seen.path.clone()).collect();
    assert_eq!(tags, ["/v2/app/manifests/latest"]);
    assert!(resolves.seen()[0].header("x-key").is_none());
    for seen in pulls.seen() {
        assert!(seen.path.starts_with("/api/root/app/blobs/sha256:"), "{}", seen.path);
        assert_eq!(seen.query, "ns=example.invalid");
        assert_eq!(seen.header("x-key"), Some("only-for-this-host"));
    }

    client.write("certs.d/nobody.invalid/hosts.toml", "capabilities = [\"push\"]\n");
    let error = client.resolve("nobody.invalid/app").await.unwrap_err();
    assert_eq!(error.kind(), ErrorKind::Configuration, "{error}");
    assert_contains(&error, &["no configured endpoint"]);
    client.write("certs.d/broken.invalid/hosts.toml", "server = [");
    let error = client.resolve("broken.invalid/app").await.unwrap_err();
    assert_eq!(error.kind(), ErrorKind::Configuration, "{error}");
}

#[tokio::test]
async fn short_names_mean_what_is_configured() {
    let client = Client::new();
    let candidates = async |name: &str| -> Vec<String> {
        let found = client.registry.candidates(name).await;
        found.map_or_else(
            |error| vec![error.to_string()],
            |found| found.iter().map(ToString::to_string).collect(),
        )
    };
    assert_eq!(candidates("busybox").await, ["docker.io/library/busybox:latest"]);
    assert_eq!(candidates("quay.io/a/b:1").await, ["quay.io/a/b:1"]);
    client.registries_conf(
        r#"
        unqualified-search-registries = ["a.net", "docker.io"]
        [aliases]
        tool = "b.net/ns/tool"
        "ns/tool" = "c.net/tool"
        "#,
    );
    assert_eq!(candidates("busybox:1").await, ["a.net/busybox:1", "docker.io/library/busybox:1"]);
    assert_eq!(candidates("tool:2").await, ["b.net/ns/tool:2"]);
    assert_eq!(candidates("ns/tool").await, ["c.net/tool:latest"]);
    let digest = format!("sha256:{}", "0".repeat(64));
    assert_eq!(candidates(&format!("tool:2@{digest}")).await, [format!("b.net/ns/tool@{digest}")]);
    assert_eq!(candidates("localhost/x").await, ["localhost/x:latest"]);

    client.write("registries.conf.d/1.conf", "short-name-mode = \"enforcing\"");
    assert!(candidates("busybox").await[0].contains("enforcing"));
    client.write("registries.conf.d/1.conf", "unqualified-search-registries = []");
    assert!(candidates("busybox").await[0].contains("unqualified-search-registries"));
    assert_eq!(candidates("tool").await, ["b.net/ns/tool:latest"]);
    let error = client.registry.candidates("Not Valid").await.unwrap_err();
    assert_eq!(error.kind(), ErrorKind::Invalid);
}
