//! What the process environment decides: credential helpers on PATH and proxies. The environment of a running
//! test cannot be changed safely, so these tests start themselves again with the one they want.

use std::fs;
use std::os::unix::fs::PermissionsExt;
use std::process::Command;

use podvisor_registry::ErrorKind;

use crate::content::Content;
use crate::server::{Answer, Server};
use crate::tls::{issue, server_config};
use crate::{Client, assert_contains};

/// Set for a test that was started again.
const MARK: &str = "PODVISOR_REGISTRY_TEST_CHILD";

/// Runs `test` (its path) once more with `variables`; its assertions are the child's.
async fn again(test: &str, variables: &[(&str, &str)]) {
    let mut command = Command::new(std::env::current_exe().unwrap());
    command.args(["--exact", test, "--nocapture"]).env(MARK, "1");
    for name in [
        "HTTP_PROXY",
        "http_proxy",
        "HTTPS_PROXY",
        "https_proxy",
        "ALL_PROXY",
        "all_proxy",
        "NO_PROXY",
        "no_proxy",
    ] {
        command.env_remove(name);
    }
    command.envs(variables.iter().copied());
    let output = tokio::task::spawn_blocking(move || command.output().unwrap()).await.unwrap();
    let text = String::from_utf8_lossy(&output.stdout);
    assert!(output.status.success(), "{text}{}", String::from_utf8_lossy(&output.stderr));
    assert!(text.contains("1 passed"), "{test} does not exist: {text}");
}

fn is_child() -> bool {
    std::env::var_os(MARK).is_some()
}

fn script(directory: &std::path::Path, name: &str, text: &str) {
    let path = directory.join(format!("docker-credential-{name}"));
    fs::write(&path, format!("#!/bin/sh\n{text}\n")).unwrap();
    fs::set_permissions(path, fs::Permissions::from_mode(0o755)).unwrap();
}

#[tokio::test]
async fn credential_helpers_are_asked() {
    if !is_child() {
        let directory = tempfile::tempdir().unwrap();
        // Answers only the right question: the action as argument, the host on stdin.
        script(
            directory.path(),
            "good",
            "[ \"$1\" = get ] || exit 9\nread host\necho \"{\\\"ServerURL\\\": \\\"$host\\\", \\\"Username\\\": \\\"alice\\\", \\\"Secret\\\": \\\"for-$host\\\"}\"",
        );
        script(directory.path(), "empty", "echo 'credentials not found in native keychain'\nexit 1");
        script(directory.path(), "broken", "echo top-secret\necho top-secret >&2\nexit 3");
        script(directory.path(), "garbage", "echo top-secret");
        script(directory.path(), "endless", "exec cat /dev/zero");
        let path = format!("{}:/usr/bin:/bin", directory.path().display());
        return again("environment::credential_helpers_are_asked", &[("PATH", &path)]).await;
    }
    let content = Content::with_layer(10);
    let server = Server::start(move |seen| {
        use base64::Engine as _;
        let host = seen.header("host").unwrap();
        let login = base64::engine::general_purpose::STANDARD.encode(format!("alice:for-{host}"));
        if seen.header("authorization") == Some(&format!("Basic {login}")) {
            content.reply(seen)
        } else {
            Answer::unauthorized("Basic").into()
        }
    })
    .await;
    let client = Client::new();
    let helper = |name: &str| {
        client.write("config.json", &format!("{{\"credHelpers\": {{\"{}\": \"{name}\"}}}}", server.address));
    };
    helper("good");
    client.resolve(&server.name("app")).await.unwrap();
    client.write("config.json", "{\"credsStore\": \"good\"}");
    client.resolve(&server.name("app")).await.unwrap();
    for (name, part) in [
        ("broken", "docker-credential-broken: failed with exit status: 3"),
        ("garbage", "docker-credential-garbage: answered no credentials"),
        ("endless", "docker-credential-endless: answered more than"),
        ("missing", "docker-credential-missing: cannot be started"),
        ("empty", "asks for user and password"),
        ("../bad", "invalid name"),
    ] {
        helper(name);
        let error = client.resolve(&server.name("app")).await.unwrap_err();
        assert_eq!(error.kind(), ErrorKind::Unauthorized, "{error}");
        assert_contains(&error, &[part]);
        assert!(!error.to_string().contains("top-secret"), "{error}");
    }
    // registries.conf names the order: what has nothing is passed over.
    client.registries_conf("credential-helpers = [\"empty\", \"containers-auth.json\", \"good\"]\n");
    client.write("config.json", "{}");
    client.resolve(&server.name("app")).await.unwrap();
}

#[tokio::test]
async fn proxies_are_used_except_for_loopback() {
    if !is_child() {
        // A proxy that answers for everybody, and a tunnel that ends in a registry.
        let content = Content::with_layer(10);
        let proxy = Server::start(move |seen| match seen.method.as_str() {
            "CONNECT" => Answer::status(502).into(),
            _ if seen.header("proxy-authorization") != Some("Basic dXNlcjpwdw==") => {
                Answer::status(407).into()
            }
            _ => content.reply(seen),
        })
        .await;
        let url = format!("http://user:pw@{}", proxy.address);
        let variables = [("HTTP_PROXY", url.as_str()), ("HTTPS_PROXY", &url), ("NO_PROXY", "direct.invalid")];
        again("environment::proxies_are_used_except_for_loopback", &variables).await;
        let asked: Vec<_> =
            proxy.seen().iter().map(|seen| format!("{} {}", seen.method, seen.path)).collect();
        assert_eq!(asked[0], "CONNECT plain.invalid:443");
        assert_eq!(asked[1], "GET http://plain.invalid/v2/app/manifests/latest");
        assert!(asked.iter().any(|asked| asked == "CONNECT secure.invalid:443"), "{asked:?}");
        assert!(
            !asked.iter().any(|asked| asked.contains("direct") || asked.contains("127.0.0.1")),
            "{asked:?}"
        );
        return;
    }
    let client = Client::new();
    client.registries_conf("[[registry]]\nlocation = \"plain.invalid\"\ninsecure = true\n");
    client.pull("plain.invalid/app").await.unwrap();
    let error = client.resolve("secure.invalid/app").await.unwrap_err();
    assert_eq!(error.kind(), ErrorKind::Unavailable, "{error}");
    assert!(!error.to_string().contains("pw"), "{error}");
    client.resolve("direct.invalid/app").await.unwrap_err();
    let content = Content::with_layer(10);
    let server = Server::start(move |seen| content.reply(seen)).await;
    client.pull(&server.name("app")).await.unwrap();
}

#[tokio::test]
async fn tls_goes_through_a_tunnel() {
    if !is_child() {
        let issued = issue("tunnelled.invalid");
        let directory = tempfile::tempdir().unwrap();
        let ca = directory.path().join("ca.crt");
        fs::write(&ca, &issued.ca).unwrap();
        let content = Content::with_layer(10);
        let registry = Server::start_tls(server_config(&issued, None), move |seen| content.reply(seen)).await;
        let proxy = tunnel_to(registry.address).await;
        let url = format!("http://{proxy}");
        let variables = [("HTTPS_PROXY", url.as_str()), ("TEST_CA", ca.to_str().unwrap())];
        again("environment::tls_goes_through_a_tunnel", &variables).await;
        assert_eq!(registry.seen()[0].header("host"), Some("tunnelled.invalid"));
        return;
    }
    let client = Client::new();
    let ca = fs::read_to_string(std::env::var_os("TEST_CA").unwrap()).unwrap();
    client.write("certs.d/tunnelled.invalid/ca.crt", &ca);
    client.pull("tunnelled.invalid/app").await.unwrap();
}

/// A proxy whose tunnels all end at `target`.
async fn tunnel_to(target: std::net::SocketAddr) -> std::net::SocketAddr {
    use tokio::io::{AsyncReadExt, AsyncWriteExt};
    let listener = tokio::net::TcpListener::bind(("127.0.0.1", 0)).await.unwrap();
    let address = listener.local_addr().unwrap();
    tokio::spawn(async move {
        while let Ok((mut client, _)) = listener.accept().await {
            tokio::spawn(async move {
                let mut head = Vec::new();
                while !head.ends_with(b"\r\n\r\n") {
                    head.push(client.read_u8().await?);
                }
                client.write_all(b"HTTP/1.1 200 OK\r\n\r\n").await?;
                let mut registry = tokio::net::TcpStream::connect(target).await?;
                tokio::io::copy_bidirectional(&mut client, &mut registry).await
            });
        }
    });
    address
}
