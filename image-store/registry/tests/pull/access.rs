//! Who is told which secret: challenges, tokens, redirects.

use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};

use podvisor_registry::{Credentials, ErrorKind, Reference, RegistryError, ResolvedImage};

use crate::content::Content;
use crate::server::{Answer, Reply, Seen, Server};
use crate::{Client, assert_contains, collect};

/// `alice:hunter2-secret`
const BASIC: &str = "Basic YWxpY2U6aHVudGVyMi1zZWNyZXQ=";
const PASSWORD: &str = "hunter2-secret";

fn alice() -> Credentials {
    Credentials { username: "alice".into(), password: PASSWORD.into(), ..Credentials::default() }
}

async fn resolve_as(
    client: &Client,
    name: &str,
    credentials: &Credentials,
) -> Result<ResolvedImage, RegistryError> {
    client.registry.resolve(&Reference::parse(name).unwrap(), Some(credentials)).await
}

fn bearer_challenge(seen: &Seen) -> Answer {
    let host = seen.header("host").unwrap();
    let scope = "repository:app:pull";
    Answer::unauthorized(&format!("Bearer realm=\"http://{host}/token\",service=\"reg\",scope=\"{scope}\""))
}

/// A registry that gives tokens `t1`, `t2`, … at `/token` and accepts those that `accepts` says.
async fn token_server(
    token: impl Fn(&Seen, usize) -> Answer + Send + Sync + 'static,
    accepts: impl Fn(&str) -> bool + Send + Sync + 'static,
) -> Server {
    let content = Content::with_layer(1000);
    let given = AtomicUsize::new(0);
    Server::start(move |seen| {
        if seen.path == "/token" {
            return token(seen, given.fetch_add(1, Ordering::Relaxed) + 1).into();
        }
        match seen.header("authorization") {
            Some(header) if accepts(header) => content.reply(seen),
            _ => bearer_challenge(seen).into(),
        }
    })
    .await
}

fn plain_token(_: &Seen, number: usize) -> Answer {
    Answer::json(&format!("{{\"token\": \"t{number}\", \"expires_in\": 300}}"))
}

#[tokio::test]
async fn anonymous_tokens_are_fetched_once() {
    let server = token_server(plain_token, |header| header == "Bearer t1").await;
    let client = Client::new();
    client.pull(&server.name("app")).await.unwrap();
    client.pull(&server.name("app")).await.unwrap();
    assert_eq!(server.count("/token"), 1, "kept for the next pull");
    let seen = server.seen();
    let token = seen.iter().find(|seen| seen.path == "/token").unwrap();
    assert_eq!(token.method, "GET");
    assert_eq!(token.query, "service=reg&scope=repository%3Aapp%3Apull");
    assert_eq!(token.header("authorization"), None);
    // Another repository is another scope, another user another token.
    client.resolve(&server.name("other")).await.unwrap_err();
    assert_eq!(server.count("/token"), 2);
    resolve_as(&client, &server.name("app"), &alice()).await.unwrap_err();
    assert_eq!(server.count("/token"), 3);
}

#[tokio::test]
async fn tokens_with_a_password() {
    let token = |seen: &Seen, number| {
        if seen.header("authorization") == Some(BASIC) {
            plain_token(seen, number)
        } else {
            Answer::status(401)
        }
    };
    let server = token_server(token, |header| header == "Bearer t1").await;
    let client = Client::new();
    resolve_as(&client, &server.name("app"), &alice()).await.unwrap();
    let seen = server.seen();
    let token = seen.iter().find(|seen| seen.path == "/token").unwrap();
    assert!(token.query.contains("account=alice"), "{}", token.query);
    assert!(
        seen.iter()
            .filter(|seen| seen.path != "/token")
            .all(|seen| seen.header("authorization") != Some(BASIC))
    );

    let error = client.resolve(&server.name("app")).await.unwrap_err();
    assert_eq!(error.kind(), ErrorKind::Unauthorized, "{error}");
    assert_contains(&error, &["token server", "401", "no credentials"]);
}

#[tokio::test]
async fn an_expired_token_is_renewed_in_the_middle() {
    let accepted = Arc::new(AtomicUsize::new(1));
    let accepts = {
        let accepted = Arc::clone(&accepted);
        move |header: &str| header == format!("Bearer t{}", accepted.load(Ordering::Relaxed))
    };
    let server = token_server(plain_token, accepts).await;
    let client = Client::new();
    let image = client.resolve(&server.name("app")).await.unwrap();
    accepted.store(2, Ordering::Relaxed);
    // Several at once: one renews for all.
    let (a, b) = tokio::join!(
        client.registry.blob(&image.source, &image.layers[0]),
        client.registry.blob(&image.source, &image.layers[0])
    );
    assert_eq!(collect(a.unwrap()).await.unwrap(), collect(b.unwrap()).await.unwrap());
    assert_eq!(server.count("/token"), 2);
}

#[tokio::test]
async fn identity_tokens_are_posted_and_not_redirected() {
    let token = |seen: &Seen, number| {
        if seen.method == "POST" && seen.body.contains("refresh_token=refresh%2Fme") {
            let token = format!("{{\"access_token\": \"t{number}\"}}");
            Answer::json(&token)
        } else {
            Answer::status(400)
        }
    };
    let server = token_server(token, |header| header == "Bearer t1").await;
    let credentials = Credentials { identity_token: "refresh/me".into(), ..Credentials::default() };
    let client = Client::new();
    resolve_as(&client, &server.name("app"), &credentials).await.unwrap();
    let seen = server.seen();
    let token = seen.iter().find(|seen| seen.path == "/token").unwrap();
    assert!(token.body.contains("grant_type=refresh_token") && token.query.is_empty());
    assert_eq!(token.header("content-type"), Some("application/x-www-form-urlencoded"));

    let elsewhere = Server::start(|_| Answer::json("{\"token\": \"t1\"}").into()).await;
    let location = format!("http://{}/token", elsewhere.address);
    let server = token_server(move |_, _| Answer::redirect(&location), |_| true).await;
    let error = resolve_as(&Client::new(), &server.name("app"), &credentials).await;
    // Any token would do, but none is asked for elsewhere.
    assert_contains(&error.unwrap_err(), &["token server", "redirect refused"]);
    assert!(elsewhere.seen().is_empty());
}

#[tokio::test]
async fn registry_tokens_are_sent_as_they_are() {
    let server = token_server(plain_token, |header| header == "Bearer as-it-is").await;
    let credentials = Credentials { registry_token: "as-it-is".into(), ..Credentials::default() };
    resolve_as(&Client::new(), &server.name("app"), &credentials).await.unwrap();
    assert_eq!(server.count("/token"), 0);
}

async fn basic_server() -> Server {
    let content = Content::with_layer(1000);
    Server::start(move |seen| {
        if seen.header("authorization") == Some(BASIC) {
            content.reply(seen)
        } else {
            Answer::unauthorized("Basic realm=\"private\"").into()
        }
    })
    .await
}

#[tokio::test]
async fn basic_from_the_request_and_from_files() {
    let server = basic_server().await;
    let client = Client::new();
    resolve_as(&client, &server.name("app"), &alice()).await.unwrap();
    let encoded =
        Credentials { auth: BASIC.strip_prefix("Basic ").unwrap().into(), ..Credentials::default() };
    resolve_as(&client, &server.name("app"), &encoded).await.unwrap();
    let elsewhere = Credentials { server_address: "https://other.example.com/v1/".into(), ..alice() };
    let error = resolve_as(&client, &server.name("app"), &elsewhere).await.unwrap_err();
    assert_eq!(error.kind(), ErrorKind::Unauthorized, "{error}");
    assert_contains(&error, &["asks for user and password", "no credentials"]);

    client.write(
        "config.json",
        &format!("{{\"auths\": {{\"{}/app\": {{\"auth\": \"{}\"}}}}}}", server.address, &BASIC[6..]),
    );
    client.pull(&server.name("app")).await.unwrap();
    client.resolve(&server.name("other")).await.unwrap_err();

    let wrong = Credentials { password: "wrong-secret".into(), ..alice() };
    let error = resolve_as(&client, &server.name("app"), &wrong).await.unwrap_err();
    assert_eq!(error.kind(), ErrorKind::Unauthorized, "{error}");
    assert_contains(&error, &["401", "with credentials"]);
    assert!(!format!("{error} {error:?}").contains("wrong-secret"));

    client.write("config.json", "{\"auths\": 5}");
    let error = client.resolve(&server.name("app")).await.unwrap_err();
    assert_contains(&error, &["config.json cannot be read"]);
}

#[tokio::test]
async fn four_oh_one_for_ever_ends() {
    for challenge in ["Basic realm=\"x\"", "Bearer realm=\"http://HOST/token\"", "Negotiate", ""] {
        let server = Server::start(move |seen| {
            if seen.path == "/token" {
                return Answer::json("{\"token\": \"t\"}").into();
            }
            let challenge = challenge.replace("HOST", seen.header("host").unwrap());
            Answer::unauthorized(&challenge).into()
        })
        .await;
        let error = resolve_as(&Client::new(), &server.name("app"), &alice()).await.unwrap_err();
        assert_eq!(error.kind(), ErrorKind::Unauthorized, "{challenge}: {error}");
        assert!(server.seen().len() <= 4, "{:?}", server.seen());
    }
}

#[tokio::test]
async fn bad_token_servers_are_named() {
    let elsewhere = crate::server::unused_address().await;
    for (answer, kind, part) in [
        (Answer::json("{}"), ErrorKind::Unavailable, "holds no token"),
        (Answer::json("garbage"), ErrorKind::Unavailable, "holds no token"),
        (Answer::status(500), ErrorKind::Unavailable, "500"),
        (Answer::status(403), ErrorKind::Unauthorized, "403"),
        (Answer::new(200, "", vec![b' '; 2 << 20]), ErrorKind::Unavailable, "larger than"),
    ] {
        let server = token_server(move |_, _| answer.clone(), |_| false).await;
        let error = Client::new().resolve(&server.name("app")).await.unwrap_err();
        assert_eq!(error.kind(), kind, "{error}");
        assert_contains(&error, &["token server", part]);
    }
    for (realm, part) in [
        (format!("http://{elsewhere}/token"), "connection refused"),
        ("ftp://x/".to_owned(), "is no https URL"),
        ("/relative".to_owned(), "is no https URL"),
        ("https://user:s3cret@x/".to_owned(), "has a password"),
        ("not a url".to_owned(), "is no URL"),
    ] {
        let challenge = format!("Bearer realm=\"{realm}\"");
        let server = Server::start(move |_| Answer::unauthorized(&challenge).into()).await;
        let error = Client::new().resolve(&server.name("app")).await.unwrap_err();
        assert_contains(&error, &[part]);
        assert!(!error.to_string().contains("s3cret"));
    }
}

#[tokio::test]
async fn secrets_that_a_server_sends_back_are_not_repeated() {
    for status in [403, 500] {
        let server = Server::start(move |seen| {
            let Some(header) = seen.header("authorization") else {
                return Answer::unauthorized("Basic").into();
            };
            let body =
                format!("{{\"errors\": [{{\"code\": \"DENIED\", \"message\": \"you sent {header}\"}}]}}");
            Answer::new(status, "application/json", body).into()
        })
        .await;
        let error = resolve_as(&Client::new(), &server.name("app"), &alice()).await.unwrap_err();
        let shown = format!("{error} {error:?}");
        assert!(!shown.contains(PASSWORD) && !shown.contains(&BASIC[6..]), "{shown}");
        assert_contains(&error, &[&status.to_string()]);
    }
    let denied = |_: &Seen| -> Reply {
        let body = "{\"errors\": [{\"code\": \"DENIED\", \"message\": \"pull\\naccess denied\"}]}";
        Answer::new(403, "application/json", body).into()
    };
    let server = Server::start(denied).await;
    let error = Client::new().resolve(&server.name("app")).await.unwrap_err();
    assert_eq!(error.kind(), ErrorKind::Unauthorized);
    assert_contains(&error, &["(DENIED: pull access denied)"]);
}

#[tokio::test]
async fn redirects_carry_no_secret_to_another_host() {
    let content = Content::with_layer(1000);
    let storage = {
        let content = content.clone();
        Server::start_at("127.0.0.2", None, move |seen| content.reply(seen)).await
    };
    let location = storage.address;
    let server = Server::start(move |seen| {
        if seen.header("authorization") != Some(BASIC) {
            return Answer::unauthorized("Basic").into();
        }
        if let Some(path) = seen.path.strip_prefix("/moved") {
            let path = path.replace("/v2/", "/signed/v2/");
            return Answer::redirect(&format!("//{location}{path}?signature=s3cret")).into();
        }
        if seen.path.contains("/blobs/") {
            return Answer::redirect(&format!("/moved{}", seen.path)).into();
        }
        content.reply(seen)
    })
    .await;
    let client = Client::new();
    let image = resolve_as(&client, &server.name("app"), &alice()).await.unwrap();
    let layer = client.registry.blob(&image.source, &image.layers[0]).await.unwrap();
    assert_eq!(collect(layer).await.unwrap().len(), 1000);
    assert!(!storage.seen().is_empty());
    for seen in storage.seen() {
        assert_eq!(seen.header("authorization"), None);
        assert_eq!(seen.query, "signature=s3cret");
    }
    let moved = server.seen().into_iter().filter(|seen| seen.path.starts_with("/moved"));
    assert!(
        moved.into_iter().all(|seen| seen.header("authorization") == Some(BASIC)),
        "the same host knows it"
    );
}

#[tokio::test]
async fn a_challenge_from_elsewhere_is_not_met() {
    let thief = Server::start_at("127.0.0.2", None, |_| Answer::unauthorized("Basic").into()).await;
    let location = format!("http://{}/x?sig=s3cret", thief.address);
    let server = Server::start(move |_| Answer::redirect(&location).into()).await;
    let error = resolve_as(&Client::new(), &server.name("app"), &alice()).await.unwrap_err();
    assert_eq!(error.kind(), ErrorKind::Unauthorized, "{error}");
    assert_eq!(thief.seen().len(), 1);
    assert_eq!(thief.seen()[0].header("authorization"), None);
}

#[tokio::test]
async fn redirects_that_lead_nowhere_end() {
    let client = Client::new();
    let server = Server::start(|seen| Answer::redirect(&seen.path).into()).await;
    let error = client.resolve(&server.name("app")).await.unwrap_err();
    assert_contains(&error, &["redirect refused: loop"]);
    assert_eq!(server.seen().len(), 1);

    let server = Server::start(|seen| Answer::redirect(&format!("{}x", seen.path)).into()).await;
    let error = client.resolve(&server.name("app")).await.unwrap_err();
    assert_contains(&error, &["more than 10"]);
    assert_eq!(server.seen().len(), 11);

    for location in ["", "ftp://127.0.0.1/", "http://user:s3cret@127.0.0.1/", "http://:80/"] {
        let server = Server::start(move |_| Answer::redirect(location).into()).await;
        let error = client.resolve(&server.name("app")).await.unwrap_err();
        assert_eq!(error.kind(), ErrorKind::Unavailable, "{error}");
        assert_contains(&error, &["redirect refused"]);
        assert!(!error.to_string().contains("s3cret"), "{error}");
    }
}
