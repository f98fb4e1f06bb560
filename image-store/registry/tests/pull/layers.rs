//! Layers over connections that break, stall, lie and never end.

use std::sync::atomic::{AtomicUsize, Ordering};

use podvisor_registry::ErrorKind;

use crate::content::{Content, missing, pattern};
use crate::server::{Answer, Reply, Seen, Server, unused_address};
use crate::{Client, assert_contains, collect};

const SIZE: usize = 300_000;

/// A registry with one large layer, which `layer` serves (given the request and the proper answer).
async fn server_with(
    knows_ranges: bool,
    layer: impl Fn(&Seen, Answer) -> Reply + Send + Sync + 'static,
) -> Server {
    let content = Content { knows_ranges, ..Content::with_layer(SIZE) };
    let (digest, _) = content.layer(SIZE);
    let digest = digest.to_owned();
    Server::start(move |seen| {
        let answer = content.answer(seen);
        if seen.path.ends_with(&digest) { layer(seen, answer) } else { answer.into() }
    })
    .await
}

fn starts(server: &Server) -> Vec<Option<usize>> {
    let digest = podvisor_registry::Digest::sha256(&pattern(SIZE)).to_string();
    server.seen().iter().filter(|seen| seen.path.ends_with(&digest)).map(Seen::range_start).collect()
}

#[tokio::test]
async fn arrives_whole() {
    let server = server_with(true, |_, answer| answer.into()).await;
    assert_eq!(Client::new().pull(&server.name("app")).await.unwrap(), [pattern(SIZE)]);
    let empty = Content::image(&[Vec::new()]);
    let server = Server::start(move |seen| empty.reply(seen)).await;
    assert_eq!(Client::new().pull(&server.name("app")).await.unwrap(), [Vec::<u8>::new()]);
}

#[tokio::test]
async fn resumes_where_it_broke() {
    // Each connection brings 70,000 bytes.
    let server = server_with(true, |_, answer| {
        let length = answer.body.len();
        if length > 70_000 { Reply::Cut(answer, 70_000) } else { answer.into() }
    })
    .await;
    assert_eq!(Client::new().pull(&server.name("app")).await.unwrap(), [pattern(SIZE)]);
    let starts = starts(&server);
    assert_eq!(starts, [None, Some(70_000), Some(140_000), Some(210_000), Some(280_000)]);
}

#[tokio::test]
async fn resumes_where_ranges_are_unknown() {
    let calls = AtomicUsize::new(0);
    let server = server_with(false, move |_, answer| {
        if calls.fetch_add(1, Ordering::Relaxed) < 2 { Reply::Cut(answer, 100_000) } else { answer.into() }
    })
    .await;
    assert_eq!(Client::new().pull(&server.name("app")).await.unwrap(), [pattern(SIZE)]);
    assert_eq!(starts(&server), [None, Some(100_000), Some(100_000)]);
}

#[tokio::test]
async fn resumes_after_silence() {
    let calls = AtomicUsize::new(0);
    let server = server_with(true, move |_, answer| {
        if calls.fetch_add(1, Ordering::Relaxed) == 0 { Reply::Stall(answer, 1000) } else { answer.into() }
    })
    .await;
    assert_eq!(Client::impatient().pull(&server.name("app")).await.unwrap(), [pattern(SIZE)]);
    assert_eq!(starts(&server)[0], None);
    assert_eq!(starts(&server).last().unwrap(), &Some(1000));
}

#[tokio::test]
async fn gives_up_when_nothing_comes() {
    let server = server_with(true, |_, answer| Reply::Cut(answer, 0)).await;
    let error = Client::new().pull(&server.name("app")).await.unwrap_err();
    assert_eq!(error.kind(), ErrorKind::Unavailable, "{error}");
    assert_contains(&error, &["fetch layer sha256:", &server.address.to_string()]);
    assert_eq!(starts(&server).len(), 6, "once and five times again");
}

#[tokio::test]
async fn a_byte_at_a_time_is_nothing() {
    let server = server_with(true, |_, answer| Reply::Cut(answer, 1)).await;
    let error = Client::new().pull(&server.name("app")).await.unwrap_err();
    assert_eq!(error.kind(), ErrorKind::Unavailable, "{error}");
    assert!(starts(&server).len() <= 7);
}

#[tokio::test]
async fn endless_layers_end() {
    let server = server_with(true, |_, answer| Reply::Endless(answer)).await;
    let error = Client::new().pull(&server.name("app")).await.unwrap_err();
    assert_eq!(error.kind(), ErrorKind::Corrupt, "{error}");
    assert_contains(&error, &["whose size is 300000"]);
    server.idle().await;

    // Announced from the start.
    let server = server_with(true, |_, mut answer| {
        answer.body.push(0);
        answer.into()
    })
    .await;
    let error = Client::new().pull(&server.name("app")).await.unwrap_err();
    assert_eq!(error.kind(), ErrorKind::Corrupt, "{error}");
    assert_contains(&error, &["300001"]);
}

#[tokio::test]
async fn layers_that_are_too_short_end() {
    let server = server_with(true, |_, mut answer| {
        answer.body.truncate(1000);
        answer.into()
    })
    .await;
    let error = Client::new().pull(&server.name("app")).await.unwrap_err();
    assert_eq!(error.kind(), ErrorKind::Unavailable, "{error}");
}

#[tokio::test]
async fn wrong_ranges_are_noticed() {
    for range in
        ["bytes 0-299999/300000", "bytes 1000-299999/300001", "bytes 1000-300000/300000", "nonsense", ""]
    {
        let server = server_with(true, move |seen, answer| {
            if seen.range_start().is_none() {
                return Reply::Cut(answer, 1000);
            }
            Answer::new(206, "", answer.body).with("content-range", range).into()
        })
        .await;
        let error = Client::new().pull(&server.name("app")).await.unwrap_err();
        assert_contains(&error, &["answered a range request wrongly"]);
    }
}

#[tokio::test]
async fn the_next_endpoint_goes_on_where_the_first_one_died() {
    let mirror = server_with(true, |seen, answer| {
        if seen.range_start().is_none() {
            Reply::Cut(answer, 100_000)
        } else {
            missing("BLOB_UNKNOWN").into()
        }
    })
    .await;
    let primary = server_with(true, |_, answer| answer.into()).await;
    let client = Client::new();
    client.registries_conf(&format!(
        "[[registry]]\nlocation = \"{}\"\n[[registry.mirror]]\nlocation = \"{}\"\n",
        primary.address, mirror.address
    ));
    assert_eq!(client.pull(&primary.name("app")).await.unwrap(), [pattern(SIZE)]);
    assert_eq!(starts(&primary), [Some(100_000)]);
    assert_eq!(primary.count("/manifests/"), 0);
}

#[tokio::test]
async fn a_mirror_that_lies_can_be_rejected() {
    let mirror = server_with(true, |_, mut answer| {
        answer.body.reverse();
        answer.into()
    })
    .await;
    let primary = server_with(true, |_, answer| answer.into()).await;
    let client = Client::new();
    client.registries_conf(&format!(
        "[[registry]]\nlocation = \"{}\"\n[[registry.mirror]]\nlocation = \"{}\"\n",
        primary.address, mirror.address
    ));
    let image = client.resolve(&primary.name("app")).await.unwrap();
    let layer = &image.layers[0];
    let mut stream = client.registry.blob(&image.source, layer).await.unwrap();
    let mut hasher = layer.digest.hasher();
    while let Some(chunk) = stream.next().await.unwrap() {
        hasher.update(&chunk);
    }
    assert_ne!(hasher.finish(), layer.digest);
    assert!(stream.reject(), "the primary is left");
    let again = client.registry.blob(&image.source, layer).await.unwrap();
    assert_eq!(collect(again).await.unwrap(), pattern(SIZE));
}

#[tokio::test]
async fn an_endpoint_that_dies_between_is_named() {
    let content = Content::with_layer(SIZE);
    let server = Server::start(move |seen| content.reply(seen)).await;
    let client = Client::new();
    let dead = unused_address().await;
    client.registries_conf(&format!(
        "[[registry]]\nlocation = \"{dead}\"\n[[registry.mirror]]\nlocation = \"{}\"\n",
        server.address
    ));
    let image = client.resolve(&format!("{dead}/app")).await.unwrap();
    let address = server.address.to_string();
    drop(server);
    let error = client.registry.blob(&image.source, &image.layers[0]).await.unwrap_err();
    assert_eq!(error.kind(), ErrorKind::Unavailable, "{error}");
    assert_contains(&error, &[&address, &dead.to_string(), "; "]);
}

#[tokio::test]
async fn a_dropped_stream_drops_its_connection() {
    let server = server_with(true, |_, answer| Reply::Endless(answer)).await;
    let client = Client::new();
    let image = client.resolve(&server.name("app")).await.unwrap();
    let mut stream = client.registry.blob(&image.source, &image.layers[0]).await.unwrap();
    assert!(stream.next().await.unwrap().is_some());
    drop(stream);
    drop(client);
    server.idle().await;
}

#[tokio::test]
async fn waiting_for_bytes_can_be_interrupted() {
    let server = server_with(true, |_, answer| Reply::Stall(answer, 1000)).await;
    let client = Client::impatient();
    let image = client.resolve(&server.name("app")).await.unwrap();
    let mut stream = client.registry.blob(&image.source, &image.layers[0]).await.unwrap();
    let mut got = Vec::new();
    while got.len() < 1000 {
        // Polled once and dropped, time and again: no byte may be lost or come twice.
        let next = std::future::poll_fn(|context| {
            let mut next = std::pin::pin!(stream.next());
            std::task::Poll::Ready(next.as_mut().poll(context))
        });
        match next.await {
            std::task::Poll::Ready(chunk) => got.extend_from_slice(&chunk.unwrap().unwrap()),
            std::task::Poll::Pending => tokio::task::yield_now().await,
        }
    }
    assert_eq!(got, pattern(SIZE)[..1000]);
    assert_eq!(stream.position(), 1000);
}
