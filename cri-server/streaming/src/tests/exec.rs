//! Exec and attach over both transports.

use std::time::Duration;

use tokio::io::AsyncWriteExt as _;

use super::spdy_client::SpdyClient;
use super::websocket_client::{BINARY, PING, WebSocketClient};
use super::{Fixture, exec_tty, limits, options, patiently, pattern};
use crate::Session;
use crate::server::Limits;

const V4: &str = "v5.channel.k8s.io, v4.channel.k8s.io, v3.channel.k8s.io, channel.k8s.io";
const SUCCESS: &str = r#"{"metadata":{},"status":"Success"}"#;

/// The streams of an exec in the order of client-go.
async fn streams(client: &mut SpdyClient) -> (u32, u32, u32, u32) {
    let error = client.open_type("error").await;
    let stdin = client.open_type("stdin").await;
    let stdout = client.open_type("stdout").await;
    (error, stdin, stdout, client.open_type("stderr").await)
}

#[tokio::test]
async fn spdy_keeps_outputs_apart_and_tells_the_exit_code() {
    let fixture = Fixture::start().await;
    let mut client = SpdyClient::connect(&fixture.exec(&["both", "3"]), V4).await;
    let (error, stdin, stdout, stderr) = streams(&mut client).await;
    client.until_closed().await;
    assert_eq!(client.text(stdout), "out ".repeat(100));
    assert_eq!(client.text(stderr), "err ".repeat(100));
    assert!(client.text(error).contains(r#""causes":[{"reason":"ExitCode","message":"3"}]"#));
    assert!([error, stdin, stdout, stderr].iter().all(|stream| client.streams[stream].ended));
    assert!(client.gone_away);
}

#[tokio::test]
async fn spdy_streams_may_come_in_any_order_and_data_before_all_are_there() {
    let fixture = Fixture::start().await;
    let mut client = SpdyClient::connect(&fixture.exec(&["cat", "0"]), V4).await;
    let stdin = client.open_type("stdin").await;
    client.send(stdin, b"early ", false).await;
    let unknown = client.open_type("carrier-pigeon").await;
    assert_eq!(client.streams[&unknown].reset, Some(3));
    let stderr = client.open_type("stderr").await;
    let twice = client.open_type("stdin").await;
    assert_eq!(client.streams[&twice].reset, Some(3));
    let stdout = client.open_type("stdout").await;
    assert_eq!(*fixture.programs.seen.borrow(), super::program::Seen::default());
    let error = client.open_type("error").await;
    client.send(stdin, b"late", true).await;
    client.until_closed().await;
    assert_eq!(client.text(stdout), "early late");
    assert_eq!(client.text(stderr), "");
    assert_eq!(client.text(error), SUCCESS);
}

#[tokio::test]
async fn spdy_half_close_of_stdin_ends_the_program_and_nothing_else() {
    let fixture = Fixture::start().await;
    let mut client = SpdyClient::connect(&fixture.exec(&["cat", "7"]), V4).await;
    let (error, stdin, stdout, _) = streams(&mut client).await;
    client.send(stdin, b"hello", false).await;
    client.until(|client| client.text(stdout) == "hello").await;
    client.send(stdin, b"", true).await;
    client.until_closed().await;
    assert!(client.text(error).contains("command terminated with exit code 7"));
}

#[tokio::test]
async fn spdy_before_v4_says_text_and_only_about_failures() {
    let fixture = Fixture::start().await;
    for (protocol, command, expected) in [
        ("v3.channel.k8s.io", &["both", "0"][..], ""),
        ("v2.channel.k8s.io", &["both", "5"], "command terminated with exit code 5"),
        ("channel.k8s.io", &["fail", "no such file"], "executing command in container: no such file"),
    ] {
        let mut client = SpdyClient::connect(&fixture.exec(command), protocol).await;
        let (error, ..) = streams(&mut client).await;
        client.until_closed().await;
        assert!(client.text(error).ends_with(expected), "{}", client.text(error));
        assert_eq!(client.text(error).is_empty(), expected.is_empty());
    }
}

#[tokio::test]
async fn failures_are_told() {
    let fixture = Fixture::start().await;
    for (command, expected) in [
        (&["fail", "no such file"][..], "error executing command in container: no such file"),
        (&["vanish"], "it ended without an exit code"),
    ] {
        let mut client = SpdyClient::connect(&fixture.exec(command), V4).await;
        let (error, ..) = streams(&mut client).await;
        client.until_closed().await;
        assert!(client.text(error).contains(expected), "{}", client.text(error));
        assert!(client.text(error).contains(r#""reason":"InternalError""#));
    }
}

#[tokio::test]
async fn an_attach_ends_well_when_its_channel_closes() {
    let fixture = Fixture::start().await;
    let container = "c".to_owned();
    let url = fixture.server.offer(Session::Attach {
        container,
        tty: false,
        stdin: true,
        stdout: true,
        stderr: false,
    });
    assert!(url.contains("/attach/"));
    let mut client = SpdyClient::connect(&url, V4).await;
    let error = client.open_type("error").await;
    let stdin = client.open_type("stdin").await;
    let stdout = client.open_type("stdout").await;
    client.send(stdin, b"me", true).await;
    client.until_closed().await;
    assert_eq!((client.text(stdout), client.text(error)), ("attached me", SUCCESS));
}

#[tokio::test]
async fn a_slow_reader_slows_the_process_and_gets_everything() {
    const LENGTH: usize = 10 << 20;
    let fixture = Fixture::start().await;
    let mut client = SpdyClient::connect(&fixture.exec(&["big", &LENGTH.to_string()]), V4).await;
    let (error, _, stdout, _) = streams(&mut client).await;
    fixture.programs.until(|seen| seen.produced > 0).await;
    // Nothing is read: what the kernel and the queues take is far less than everything. Wait until it stands still.
    let mut seen = fixture.programs.seen.subscribe();
    while tokio::time::timeout(Duration::from_millis(500), seen.changed()).await.is_ok() {}
    let produced = seen.borrow().produced;
    assert!(produced < LENGTH, "the process was not slowed down");
    client.until_closed().await;
    assert!(client.streams[&stdout].bytes == pattern(LENGTH));
    assert_eq!(client.text(error), SUCCESS);
}

#[tokio::test]
async fn megabytes_go_both_ways_at_once() {
    const LENGTH: usize = 4 << 20;
    let fixture = Fixture::start().await;
    let mut client = SpdyClient::connect(&fixture.exec(&["cat"]), V4).await;
    let (error, stdin, stdout, _) = streams(&mut client).await;
    let sent = pattern(LENGTH);
    for (at, chunk) in sent.chunks(50_000).enumerate() {
        client.send(stdin, chunk, false).await;
        // Stay a megabyte ahead.
        let wanted = (at * 50_000).saturating_sub(1 << 20);
        client.until(|client| client.streams[&stdout].bytes.len() >= wanted).await;
    }
    client.send(stdin, b"", true).await;
    client.until_closed().await;
    assert!(client.streams[&stdout].bytes == sent);
    assert_eq!(client.text(error), SUCCESS);
    // Clients with flow control were told to go on.
    for stream in [0, stdin] {
        assert!(client.opened[&stream] > (LENGTH - (64 << 10)) as u64, "{:?}", client.opened);
    }
}

#[tokio::test]
async fn a_client_with_windows_is_not_overrun() {
    const LENGTH: usize = 1 << 20;
    let fixture = Fixture::start().await;
    let mut client = SpdyClient::connect(&fixture.exec(&["big", &LENGTH.to_string()]), V4).await;
    // SETTINGS: one entry, INITIAL_WINDOW_SIZE, 10,000 bytes.
    client.control(4, &[1, 7, 10_000]).await;
    let (error, _, stdout, _) = streams(&mut client).await;
    let mut window = 10_000;
    while window < LENGTH {
        client.until(|client| client.streams[&stdout].bytes.len() == window).await;
        let ping = u32::try_from(window).unwrap() | 1;
        client.control(6, &[ping]).await;
        client.until(|client| client.pings.contains(&ping)).await;
        assert_eq!(client.streams[&stdout].bytes.len(), window, "more than the window");
        client.control(9, &[stdout, 30_001]).await;
        window += 30_001;
    }
    client.until_closed().await;
    assert!(client.streams[&stdout].bytes == pattern(LENGTH));
    assert_eq!(client.text(error), SUCCESS);
}

#[tokio::test]
async fn input_that_nobody_wants_is_discarded() {
    let fixture = Fixture::start().await;
    let mut client = SpdyClient::connect(&fixture.exec(&["deaf"]), V4).await;
    let (error, stdin, stdout, _) = streams(&mut client).await;
    client.until(|client| client.text(stdout) == "deaf").await;
    for _ in 0..200 {
        patiently(client.send(stdin, &vec![0; 60_000], false)).await;
    }
    fixture.programs.seen.send_modify(|seen| seen.produced = 1);
    client.until_closed().await;
    assert_eq!(client.text(error), SUCCESS);
}

#[tokio::test]
async fn a_client_that_goes_closes_the_input() {
    let fixture = Fixture::start().await;
    let mut client = SpdyClient::connect(&fixture.exec(&["cat"]), V4).await;
    streams(&mut client).await;
    fixture.programs.until(|seen| seen.started == 1).await;
    drop(client);
    fixture.programs.until(|seen| seen.abandoned == 1).await;

    let mut client = SpdyClient::connect(&fixture.exec(&["big", "100000000"]), V4).await;
    streams(&mut client).await;
    fixture.programs.until(|seen| seen.produced > 0).await;
    drop(client);
    fixture.programs.until(|seen| seen.abandoned == 2).await;

    for how in ["drop", "close"] {
        let before = fixture.programs.seen.borrow().abandoned;
        let mut client = WebSocketClient::connect(&fixture.exec(&["cat"]), Some("v4.channel.k8s.io")).await;
        client.send(0, b"x").await;
        client.until(|client| client.text(1) == "x").await;
        if how == "close" {
            client.frame(super::websocket_client::CLOSE, true, &[]).await;
            client.until(|client| client.close_received).await;
        }
        drop(client);
        fixture.programs.until(|seen| seen.abandoned == before + 1).await;
    }
}

#[tokio::test]
async fn resizes_of_the_terminal() {
    let fixture = Fixture::start().await;
    let mut client = SpdyClient::connect(&fixture.server.offer(exec_tty(&["sizes"])), V4).await;
    let error = client.open_type("error").await;
    let stdin = client.open_type("stdin").await;
    let stdout = client.open_type("stdout").await;
    let resize = client.open_type("resize").await;
    client.send(resize, b"{\"Width\":80,\"Height\":24}\n", false).await;
    client.until(|client| client.text(stdout) == "80x24 ").await;
    client.send(resize, b"{\"Width\":81,", false).await;
    client.send(resize, b"\"Height\":25}\n", false).await;
    client.until(|client| client.text(stdout) == "80x24 81x25 ").await;
    client.send(resize, b"rubbish", false).await;
    client.send(stdin, b"", true).await;
    client.until_closed().await;
    assert_eq!(client.text(error), SUCCESS);

    let url = fixture.server.offer(exec_tty(&["sizes"]));
    let mut client = WebSocketClient::connect(&url, Some("v5.channel.k8s.io")).await;
    client.send(4, b"{\"Width\":10,\"Height\":20}").await;
    client.until(|client| client.text(1) == "10x20 ").await;
    client.frame(BINARY, true, &[255, 0]).await;
    client.until_closed().await;
    assert_eq!(client.text(3), SUCCESS);
}

#[tokio::test]
async fn websocket_v5_half_closes_stdin() {
    let fixture = Fixture::start().await;
    let mut client = WebSocketClient::connect(&fixture.exec(&["cat", "9"]), Some("v5.channel.k8s.io")).await;
    // The first message is empty and says that the session is there.
    client.until(|client| client.messages == 1).await;
    assert_eq!(client.text(1), "");
    // A fragmented message with a ping inside.
    client.frame(BINARY, false, b"\x00hel").await;
    client.frame(PING, true, b"?").await;
    client.frame(0, true, b"lo").await;
    client.until(|client| client.text(1) == "hello" && client.pongs == 1).await;
    client.frame(BINARY, true, &[255, 0]).await;
    client.until_closed().await;
    assert!(client.close_received);
    assert!(client.text(3).contains(r#""message":"command terminated with exit code 9""#));
}

#[tokio::test]
async fn websocket_protocols() {
    let fixture = Fixture::start().await;
    for protocol in [
        Some("v5.channel.k8s.io"),
        Some("v4.channel.k8s.io"),
        Some("v4.base64.channel.k8s.io"),
        Some("channel.k8s.io"),
        Some("base64.channel.k8s.io"),
        None,
    ] {
        let mut client = WebSocketClient::connect(&fixture.exec(&["both", "4"]), protocol).await;
        client.until_closed().await;
        assert_eq!(client.text(1), "out ".repeat(100));
        assert_eq!(client.text(2), "err ".repeat(100));
        let json = protocol.is_some_and(|protocol| protocol.starts_with('v'));
        assert_eq!(client.text(3).contains("NonZeroExitCode"), json, "{protocol:?}: {}", client.text(3));
        assert!(client.text(3).contains("command terminated with exit code 4"));

        let mut client = WebSocketClient::connect(&fixture.exec(&["cat"]), protocol).await;
        let sent = pattern(100_000);
        client.send(0, &sent).await;
        client.until(|client| client.channels.get(&1).is_some_and(|bytes| *bytes == sent)).await;
    }
}

#[tokio::test]
async fn websocket_slow_reader() {
    const LENGTH: usize = 10 << 20;
    let fixture = Fixture::start().await;
    let url = fixture.exec(&["big", &LENGTH.to_string()]);
    let mut client = WebSocketClient::connect(&url, Some("v5.channel.k8s.io")).await;
    let mut seen = fixture.programs.seen.subscribe();
    fixture.programs.until(|seen| seen.produced > 0).await;
    while tokio::time::timeout(Duration::from_millis(500), seen.changed()).await.is_ok() {}
    assert!(seen.borrow().produced < LENGTH);
    client.until_closed().await;
    assert!(client.channels[&1] == pattern(LENGTH));
    assert_eq!(client.text(3), SUCCESS);
}

#[tokio::test]
async fn what_is_not_websocket_or_breaks_its_protocol_is_closed() {
    let fixture = Fixture::start().await;
    for wrong in [&[0x82, 0x01, 0][..], &[0xf2, 0x80], &[0x80, 0x80, 0, 0, 0, 0]] {
        let mut client = WebSocketClient::connect(&fixture.exec(&["cat"]), Some("v4.channel.k8s.io")).await;
        client.io.write_all(wrong).await.unwrap();
        client.until(|client| client.close_received).await;
    }
    let url = fixture.exec(&["cat"]);
    let mut client = WebSocketClient::connect(&url, Some("v4.base64.channel.k8s.io")).await;
    client.frame(1, true, b"0not base64!").await;
    client.until(|client| client.close_received).await;
    fixture.programs.until(|seen| seen.abandoned == 4).await;
}

#[tokio::test]
async fn a_client_that_opens_too_few_streams_is_told() {
    let limits = Limits { stream_creation: Duration::from_millis(200), ..limits() };
    let fixture = Fixture::with(options(), limits).await;
    let mut client = SpdyClient::connect(&fixture.exec(&["cat"]), V4).await;
    let error = client.open_type("error").await;
    client.until_closed().await;
    assert!(client.text(error).contains("did not open the streams"));
    assert_eq!(fixture.programs.seen.borrow().started, 0);
}

#[tokio::test]
async fn an_idle_session_ends() {
    let options = crate::Options { idle_timeout: Duration::from_millis(300), ..options() };
    let fixture = Fixture::with(options, limits()).await;
    let mut client = SpdyClient::connect(&fixture.exec(&["sleep"]), V4).await;
    let (error, ..) = streams(&mut client).await;
    client.until_closed().await;
    assert!(client.text(error).contains("idle"));
    fixture.programs.until(|seen| seen.abandoned == 1).await;
    let mut client = WebSocketClient::connect(&fixture.exec(&["sleep"]), Some("v5.channel.k8s.io")).await;
    client.until_closed().await;
    assert!(client.text(3).contains("idle"));
    fixture.programs.until(|seen| seen.abandoned == 2).await;
}
