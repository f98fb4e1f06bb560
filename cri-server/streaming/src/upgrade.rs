//! What a request asks to be upgraded to, and the answer.

use http::header::{CONNECTION, HeaderName, HeaderValue, UPGRADE};
use http::{HeaderMap, StatusCode};

use crate::Session;
use crate::port_forward;
use crate::remote_command::{Version, Wanted};
use crate::websocket::{Codec, accept_key};

const SPDY: &str = "SPDY/3.1";
const STREAM_PROTOCOL: HeaderName = HeaderName::from_static("x-stream-protocol-version");
const ACCEPTED_STREAM_PROTOCOLS: HeaderName = HeaderName::from_static("x-accepted-stream-protocol-versions");
const WEBSOCKET_PROTOCOL: HeaderName = HeaderName::from_static("sec-websocket-protocol");
const WEBSOCKET_KEY: HeaderName = HeaderName::from_static("sec-websocket-key");
const WEBSOCKET_VERSION: HeaderName = HeaderName::from_static("sec-websocket-version");
const WEBSOCKET_ACCEPT: HeaderName = HeaderName::from_static("sec-websocket-accept");

/// How the session is spoken once the connection is upgraded.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Dialect {
    CommandSpdy(Version),
    CommandWebSocket(Codec, Version),
    ForwardSpdy,
    ForwardWebSocket(Codec),
    /// SPDY inside WebSocket.
    ForwardTunnel,
}

const COMMAND_SPDY: [(&str, Dialect); 4] = [
    ("v4.channel.k8s.io", Dialect::CommandSpdy(Version::V4)),
    ("v3.channel.k8s.io", Dialect::CommandSpdy(Version::V3)),
    ("v2.channel.k8s.io", Dialect::CommandSpdy(Version::V2)),
    ("channel.k8s.io", Dialect::CommandSpdy(Version::V1)),
];

const COMMAND_WEBSOCKET: [(&str, Dialect); 5] = [
    ("v5.channel.k8s.io", Dialect::CommandWebSocket(Codec::Binary, Version::V5)),
    ("v4.channel.k8s.io", Dialect::CommandWebSocket(Codec::Binary, Version::V4)),
    ("v4.base64.channel.k8s.io", Dialect::CommandWebSocket(Codec::Base64, Version::V4)),
    ("channel.k8s.io", Dialect::CommandWebSocket(Codec::Binary, Version::V1)),
    ("base64.channel.k8s.io", Dialect::CommandWebSocket(Codec::Base64, Version::V1)),
];

const FORWARD_SPDY: [(&str, Dialect); 1] = [("portforward.k8s.io", Dialect::ForwardSpdy)];

const FORWARD_WEBSOCKET: [(&str, Dialect); 4] = [
    ("SPDY/3.1+portforward.k8s.io", Dialect::ForwardTunnel),
    ("v4.channel.k8s.io", Dialect::ForwardWebSocket(Codec::Binary)),
    ("v4.base64.channel.k8s.io", Dialect::ForwardWebSocket(Codec::Base64)),
    ("portforward.k8s.io", Dialect::ForwardWebSocket(Codec::Binary)),
];

/// The answer 101 and what follows it.
#[derive(Debug)]
pub(crate) struct Upgrade {
    pub(crate) dialect: Dialect,
    pub(crate) headers: HeaderMap,
}

/// The answer to a request that cannot be upgraded.
#[derive(Debug)]
pub(crate) struct Refusal {
    pub(crate) status: StatusCode,
    pub(crate) message: String,
    pub(crate) headers: Vec<(HeaderName, &'static str)>,
}

impl Refusal {
    pub(crate) fn new(status: StatusCode, message: impl Into<String>) -> Self {
        Self { status, message: message.into(), headers: Vec::new() }
    }
}

/// Agrees on a dialect for the session.
pub(crate) fn negotiate(request: &HeaderMap, session: &Session) -> Result<Upgrade, Refusal> {
    if names(request, &CONNECTION, "upgrade") {
        if names(request, &UPGRADE, "websocket") {
            return websocket(request, session);
        }
        if names(request, &UPGRADE, SPDY) {
            return spdy(request, session);
        }
    }
    Err(Refusal::new(
        StatusCode::BAD_REQUEST,
        format!("the request has to ask for an upgrade to {SPDY} or websocket"),
    ))
}

/// The elements of a header whose value is a list.
fn list<'a>(request: &'a HeaderMap, name: &HeaderName) -> impl Iterator<Item = &'a str> {
    let values = request.get_all(name).iter().filter_map(|value| value.to_str().ok());
    values.flat_map(|value| value.split(',')).map(str::trim).filter(|value| !value.is_empty())
}

fn names(request: &HeaderMap, name: &HeaderName, element: &str) -> bool {
    list(request, name).any(|value| value.eq_ignore_ascii_case(element))
}

/// The first of the client's protocols that we know.
fn choose<'a>(
    offered: impl Iterator<Item = &'a str>,
    known: &[(&'static str, Dialect)],
) -> Option<(&'static str, Dialect)> {
    offered.into_iter().find_map(|offer| known.iter().find(|(name, _)| *name == offer)).copied()
}

fn spdy(request: &HeaderMap, session: &Session) -> Result<Upgrade, Refusal> {
    let known: &[_] = if Wanted::of(session).is_some() { &COMMAND_SPDY } else { &FORWARD_SPDY };
    if list(request, &STREAM_PROTOCOL).next().is_none() {
        let why = format!("the header {STREAM_PROTOCOL} is missing");
        return Err(Refusal::new(StatusCode::BAD_REQUEST, why));
    }
    let Some((name, dialect)) = choose(list(request, &STREAM_PROTOCOL), known) else {
        let mut refusal = Refusal::new(StatusCode::FORBIDDEN, "no stream protocol in common");
        for (name, _) in known {
            refusal.headers.push((ACCEPTED_STREAM_PROTOCOLS, name));
        }
        return Err(refusal);
    };
    let mut headers = HeaderMap::new();
    headers.insert(CONNECTION, HeaderValue::from_static("Upgrade"));
    headers.insert(UPGRADE, HeaderValue::from_static(SPDY));
    headers.insert(STREAM_PROTOCOL, HeaderValue::from_static(name));
    Ok(Upgrade { dialect, headers })
}

fn websocket(request: &HeaderMap, session: &Session) -> Result<Upgrade, Refusal> {
    if !names(request, &WEBSOCKET_VERSION, "13") {
        let mut refusal = Refusal::new(StatusCode::UPGRADE_REQUIRED, "the WebSocket version has to be 13");
        refusal.headers.push((WEBSOCKET_VERSION, "13"));
        return Err(refusal);
    }
    let key = request.get(WEBSOCKET_KEY).and_then(|key| key.to_str().ok()).and_then(accept_key);
    let accept = key.and_then(|key| HeaderValue::try_from(key).ok());
    let Some(accept) = accept else {
        return Err(Refusal::new(StatusCode::BAD_REQUEST, "the WebSocket key is missing or malformed"));
    };
    // A client that names no protocol gets the one from before there were names, and the answer names none.
    let (known, unnamed): (&[_], _) = if Wanted::of(session).is_some() {
        (&COMMAND_WEBSOCKET, Dialect::CommandWebSocket(Codec::Binary, Version::V1))
    } else {
        (&FORWARD_WEBSOCKET, Dialect::ForwardWebSocket(Codec::Binary))
    };
    let chosen = choose(list(request, &WEBSOCKET_PROTOCOL), known);
    let dialect = match chosen {
        Some((_, dialect)) => dialect,
        None if list(request, &WEBSOCKET_PROTOCOL).next().is_none() => unnamed,
        None => return Err(Refusal::new(StatusCode::FORBIDDEN, "no WebSocket protocol in common")),
    };
    if let (Dialect::ForwardWebSocket(codec), Session::PortForward { ports, .. }) = (dialect, session) {
        let most = port_forward::max_ports(codec);
        if ports.is_empty() || ports.len() > most {
            let why = format!("port-forward over WebSocket channels needs 1 to {most} ports in the request");
            return Err(Refusal::new(StatusCode::BAD_REQUEST, why));
        }
    }
    let mut headers = HeaderMap::new();
    headers.insert(CONNECTION, HeaderValue::from_static("Upgrade"));
    headers.insert(UPGRADE, HeaderValue::from_static("websocket"));
    headers.insert(WEBSOCKET_ACCEPT, accept);
    if let Some((name, _)) = chosen {
        headers.insert(WEBSOCKET_PROTOCOL, HeaderValue::from_static(name));
    }
    Ok(Upgrade { dialect, headers })
}

#[cfg(test)]
mod tests {
    use super::*;

    const KEY: (&str, &str) = ("Sec-WebSocket-Key", "dGhlIHNhbXBsZSBub25jZQ==");

    fn request(headers: &[(&str, &str)]) -> HeaderMap {
        headers
            .iter()
            .map(|(name, value)| (name.parse::<HeaderName>().unwrap(), value.parse::<HeaderValue>().unwrap()))
            .fold(HeaderMap::new(), |mut map, (name, value)| {
                map.append(name, value);
                map
            })
    }

    fn exec() -> Session {
        let container = "c".to_owned();
        Session::Attach { container, tty: false, stdin: true, stdout: true, stderr: true }
    }

    fn forward(ports: &[u16]) -> Session {
        Session::PortForward { sandbox: "s".to_owned(), ports: ports.to_vec() }
    }

    #[test]
    fn spdy_takes_the_first_protocol_that_is_known() {
        let offered = [
            ("Connection", "keep-alive, Upgrade"),
            ("Upgrade", "SPDY/3.1"),
            ("X-Stream-Protocol-Version", "v5.channel.k8s.io"),
            ("X-Stream-Protocol-Version", "v3.channel.k8s.io, v4.channel.k8s.io"),
        ];
        let upgrade = negotiate(&request(&offered), &exec()).unwrap();
        assert_eq!(upgrade.dialect, Dialect::CommandSpdy(Version::V3));
        assert_eq!(upgrade.headers["x-stream-protocol-version"], "v3.channel.k8s.io");
        let refusal = negotiate(&request(&offered), &forward(&[])).unwrap_err();
        assert_eq!(refusal.status, StatusCode::FORBIDDEN);
        assert_eq!(refusal.headers, [(ACCEPTED_STREAM_PROTOCOLS, "portforward.k8s.io")]);
        assert_eq!(negotiate(&request(&offered[..2]), &exec()).unwrap_err().status, StatusCode::BAD_REQUEST);
        assert_eq!(negotiate(&request(&offered[1..]), &exec()).unwrap_err().status, StatusCode::BAD_REQUEST);
    }

    #[test]
    fn websocket_with_and_without_names() {
        let base =
            [("Connection", "Upgrade"), ("Upgrade", "WebSocket"), ("Sec-WebSocket-Version", "13"), KEY];
        let with = |protocols| {
            let mut headers = base.to_vec();
            headers.push(("Sec-WebSocket-Protocol", protocols));
            request(&headers)
        };
        let upgrade = negotiate(&request(&base), &exec()).unwrap();
        assert_eq!(upgrade.dialect, Dialect::CommandWebSocket(Codec::Binary, Version::V1));
        assert!(!upgrade.headers.contains_key("sec-websocket-protocol"));
        let upgrade = negotiate(&with("v9.channel.k8s.io, v5.channel.k8s.io"), &exec()).unwrap();
        assert_eq!(upgrade.dialect, Dialect::CommandWebSocket(Codec::Binary, Version::V5));
        assert_eq!(upgrade.headers["sec-websocket-accept"], "s3pPLMBiTxaQ9kYGzzhZRbK+xOo=");
        let upgrade = negotiate(&with("SPDY/3.1+portforward.k8s.io"), &forward(&[])).unwrap();
        assert_eq!(upgrade.dialect, Dialect::ForwardTunnel);
        assert_eq!(upgrade.headers["sec-websocket-protocol"], "SPDY/3.1+portforward.k8s.io");
        let status = |headers: &HeaderMap, session: &Session| negotiate(headers, session).unwrap_err().status;
        assert_eq!(status(&with("chat"), &exec()), StatusCode::FORBIDDEN);
        assert_eq!(status(&request(&base[..3]), &exec()), StatusCode::BAD_REQUEST);
        assert_eq!(status(&request(&base[..2]), &exec()), StatusCode::UPGRADE_REQUIRED);
        assert_eq!(status(&with("v4.channel.k8s.io"), &forward(&[])), StatusCode::BAD_REQUEST);
        assert_eq!(status(&with("v4.base64.channel.k8s.io"), &forward(&[1; 40])), StatusCode::BAD_REQUEST);
        assert!(negotiate(&with("v4.channel.k8s.io"), &forward(&[80])).is_ok());
    }
}
