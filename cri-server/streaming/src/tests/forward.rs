//! Port-forward over SPDY, SPDY inside WebSocket, and WebSocket channels.

use std::time::Duration;

use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
use tokio::net::TcpListener;

use super::program::{counting_server, echo_server};
use super::spdy_client::SpdyClient;
use super::websocket_client::{BINARY, WebSocketClient, frame, handshake};
use super::{Fixture, Io, limits, options, patiently, pattern};
use crate::server::Limits;

const PROTOCOL: &str = "portforward.k8s.io";

/// Error and data stream of a connection.
async fn open(client: &mut SpdyClient, port: u16, request: &str) -> (u32, u32) {
    let port = port.to_string();
    let error = client.open(&[("streamtype", "error"), ("port", &port), ("requestid", request)]).await;
    // As client-go does, which never writes there.
    client.send(error, b"", true).await;
    (error, client.open(&[("streamtype", "data"), ("port", &port), ("requestid", request)]).await)
}

async fn half_close(client: &mut SpdyClient, port: u16) {
    let (error, data) = open(client, port, "half").await;
    client.send(data, &vec![1; 70_000], false).await;
    client.send(data, b"x", true).await;
    client.until(|client| client.streams[&data].ended && client.streams[&error].ended).await;
    assert_eq!((client.text(data), client.text(error)), ("70001 bytes", ""));
}

async fn many_at_once(client: &mut SpdyClient, port: u16) {
    let sent = pattern(100_000);
    let mut open_streams = Vec::new();
    for request in 0..20 {
        open_streams.push(open(client, port, &request.to_string()).await);
    }
    for (_, data) in &open_streams {
        client.send(*data, &sent, false).await;
    }
    for (error, data) in &open_streams {
        client.until(|client| client.streams[data].bytes.len() == sent.len()).await;
        assert!(client.streams[data].bytes == sent);
        client.send(*data, b"", true).await;
        client.until(|client| client.streams[data].ended && client.streams[error].ended).await;
        assert_eq!(client.text(*error), "");
    }
}

#[tokio::test]
async fn spdy_connections_are_independent() {
    let fixture = Fixture::start().await;
    let (echo, counting) = (echo_server().await.port(), counting_server().await.port());
    let mut client = SpdyClient::connect(&fixture.forward(&[]), PROTOCOL).await;
    half_close(&mut client, counting).await;
    many_at_once(&mut client, echo).await;
}

#[tokio::test]
async fn a_failed_connection_does_not_end_the_session() {
    let fixture = Fixture::start().await;
    let echo = echo_server().await.port();
    // Bound and closed again: nobody listens there.
    let closed = TcpListener::bind("127.0.0.1:0").await.unwrap().local_addr().unwrap().port();
    let mut client = SpdyClient::connect(&fixture.forward(&[echo, closed]), PROTOCOL).await;
    for (port, expected) in [(closed, "refused"), (9, "not among the ports")] {
        let (error, data) = open(&mut client, port, "0").await;
        client.until(|client| client.streams[&error].ended && client.streams[&data].reset.is_some()).await;
        assert!(client.text(error).contains(expected), "{}", client.text(error));
    }
    let (_, data) = open(&mut client, echo, "0").await;
    client.send(data, b"still here", false).await;
    client.until(|client| client.text(data) == "still here").await;
}

#[tokio::test]
async fn streams_that_make_no_sense_are_refused() {
    let limits = Limits { stream_creation: Duration::from_millis(200), ..limits() };
    let fixture = Fixture::with(options(), limits).await;
    let mut client = SpdyClient::connect(&fixture.forward(&[]), PROTOCOL).await;
    for headers in [
        &[("streamtype", "data")][..],
        &[("streamtype", "data"), ("port", "0")],
        &[("streamtype", "data"), ("port", "65536")],
        &[("streamtype", "stdin"), ("port", "80")],
        &[("port", "80")],
    ] {
        let stream = client.open(headers).await;
        assert_eq!(client.streams[&stream].reset, Some(3), "{headers:?}");
    }
    let error = client.open(&[("streamtype", "error"), ("port", "80"), ("requestid", "1")]).await;
    let twice = client.open(&[("streamtype", "error"), ("port", "80"), ("requestid", "1")]).await;
    assert_eq!(client.streams[&twice].reset, Some(3));
    client.until(|client| client.streams[&error].ended).await;
    assert!(client.text(error).contains("did not come in time"));
    let data = client.open(&[("streamtype", "data"), ("port", "80"), ("requestid", "2")]).await;
    client.until(|client| client.streams[&data].reset.is_some()).await;
}

#[tokio::test]
async fn old_clients_send_no_request_ids() {
    let fixture = Fixture::start().await;
    let echo = echo_server().await.port().to_string();
    let mut client = SpdyClient::connect(&fixture.forward(&[]), PROTOCOL).await;
    for _ in 0..3 {
        client.open(&[("streamtype", "error"), ("port", &echo)]).await;
        let data = client.open(&[("streamtype", "data"), ("port", &echo)]).await;
        client.send(data, b"hello", false).await;
        client.until(|client| client.text(data) == "hello").await;
    }
}

#[tokio::test]
async fn a_reset_of_the_client_closes_the_connection_and_one_of_the_pod_the_stream() {
    let fixture = Fixture::start().await;
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let port = listener.local_addr().unwrap().port();
    let mut client = SpdyClient::connect(&fixture.forward(&[]), PROTOCOL).await;
    let (error, data) = open(&mut client, port, "a").await;
    let (mut pod, _) = patiently(listener.accept()).await.unwrap();
    client.control(3, &[data, 5]).await;
    let mut rest = Vec::new();
    let _ = patiently(pod.read_to_end(&mut rest)).await;
    client.until(|client| client.streams[&error].ended).await;

    let (error, data) = open(&mut client, port, "b").await;
    let (mut pod, _) = patiently(listener.accept()).await.unwrap();
    pod.write_all(b"x").await.unwrap();
    client.until(|client| client.text(data) == "x").await;
    rustix::net::sockopt::set_socket_linger(&pod, Some(Duration::ZERO)).unwrap();
    drop(pod);
    client.until(|client| client.streams[&error].ended && client.streams[&data].reset.is_some()).await;
    assert_eq!(client.text(error), "", "kubectl ends the session when it is told of an error");
}

/// A client's end of SPDY inside WebSocket.
async fn tunnel(url: &str) -> SpdyClient {
    let answer = handshake(url, Some("SPDY/3.1+portforward.k8s.io")).await;
    assert_eq!(answer.status, 101, "{}", answer.head);
    assert_eq!(answer.header("sec-websocket-protocol"), Some("SPDY/3.1+portforward.k8s.io"));
    let (near, far) = tokio::io::duplex(64 << 10);
    tokio::spawn(carry(answer.io, far));
    SpdyClient::on(Box::new(near))
}

/// Frames on `io`, bytes on `pipe`.
async fn carry(io: Box<dyn Io>, pipe: tokio::io::DuplexStream) {
    use crate::websocket::{Decoder, Frame, Role};
    let (mut read, mut write) = tokio::io::split(io);
    let (mut from, mut to) = tokio::io::split(pipe);
    let up = async {
        let mut buffer = vec![0; 5000];
        while let Ok(length @ 1..) = from.read(&mut buffer).await {
            write.write_all(&frame(BINARY, true, &buffer[..length])).await.unwrap();
        }
        write.write_all(&frame(8, true, &[])).await.unwrap();
    };
    let down = async {
        let (mut decoder, mut buffer) = (Decoder::new(Role::Client), bytes::BytesMut::new());
        while matches!(read.read_buf(&mut buffer).await, Ok(1..)) {
            while let Some(frame) = decoder.next(&mut buffer).unwrap() {
                match frame {
                    Frame::Data { bytes, .. } => to.write_all(&bytes).await.unwrap(),
                    Frame::Close => return to.shutdown().await.unwrap(),
                    other => panic!("{other:?}"),
                }
            }
        }
    };
    tokio::join!(up, down);
}

#[tokio::test]
async fn spdy_inside_websocket() {
    let fixture = Fixture::start().await;
    let (echo, counting) = (echo_server().await.port(), counting_server().await.port());
    let mut client = tunnel(&fixture.forward(&[])).await;
    half_close(&mut client, counting).await;
    many_at_once(&mut client, echo).await;
    client.io.shutdown().await.unwrap();
    client.until_closed().await;
}

#[tokio::test]
async fn websocket_channels() {
    let fixture = Fixture::start().await;
    let echo = echo_server().await.port();
    let closed = TcpListener::bind("127.0.0.1:0").await.unwrap().local_addr().unwrap().port();
    for protocol in [Some("v4.channel.k8s.io"), Some("v4.base64.channel.k8s.io"), Some(PROTOCOL), None] {
        let mut client = WebSocketClient::connect(&fixture.forward(&[echo, closed]), protocol).await;
        client.until(|client| client.channels.len() == 4 && client.channels[&3].len() > 2).await;
        for (channel, port) in [(0, echo), (1, echo), (2, closed), (3, closed)] {
            assert_eq!(client.channels[&channel][..2], port.to_le_bytes());
        }
        assert!(String::from_utf8_lossy(&client.channels[&3][2..]).contains("refused"));
        let sent = pattern(200_000);
        client.send(0, &sent).await;
        client.until(|client| client.channels[&0].len() == 200_002).await;
        assert!(client.channels[&0][2..] == sent);
    }
}

#[tokio::test]
async fn websocket_channels_close_when_every_connection_has_ended() {
    let fixture = Fixture::start().await;
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let port = listener.local_addr().unwrap().port();
    let mut client =
        WebSocketClient::connect(&fixture.forward(&[port, port]), Some("v4.channel.k8s.io")).await;
    for _ in 0..2 {
        let (mut pod, _) = patiently(listener.accept()).await.unwrap();
        pod.write_all(b"bye").await.unwrap();
    }
    client.until_closed().await;
    assert_eq!((&client.channels[&0][2..], &client.channels[&2][2..]), (&b"bye"[..], &b"bye"[..]));
    assert!(client.close_received);
}

#[tokio::test]
async fn an_idle_session_ends() {
    let options = crate::Options { idle_timeout: Duration::from_millis(300), ..options() };
    let fixture = Fixture::with(options, limits()).await;
    let echo = echo_server().await.port();
    let mut client = SpdyClient::connect(&fixture.forward(&[]), PROTOCOL).await;
    open(&mut client, echo, "0").await;
    client.until_closed().await;
    assert!(client.gone_away);
    let mut client = WebSocketClient::connect(&fixture.forward(&[echo]), None).await;
    client.until_closed().await;
    assert!(client.close_received);
}
