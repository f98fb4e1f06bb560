//! A registry on loopback: images in memory, HTTP/1.1 by hand, and misbehaviour where a test asks for it.

use std::collections::HashMap;
use std::net::SocketAddr;
use std::sync::{Arc, Mutex};

use podvisor_registry::Digest;
use serde_json::json;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::watch;
use tokio::task::{AbortHandle, JoinSet};

use crate::layer::Layer;

const INDEX: &str = "application/vnd.oci.image.index.v1+json";
const MANIFEST: &str = "application/vnd.oci.image.manifest.v1+json";
const CONFIG: &str = "application/vnd.oci.image.config.v1+json";
/// First byte of a TLS ClientHello. The client tries https first, also on loopback.
const TLS_HANDSHAKE: u8 = 0x16;
/// Bytes written at once, so that counts of bytes are fine enough to stop at.
const STEP: usize = 16 << 10;

/// What to do with a path instead of answering as one should.
#[derive(Debug, Clone)]
pub(crate) enum Rule {
    /// This body.
    Body(Vec<u8>),
    /// Only this status.
    Status(u16),
    /// So many bytes of the right body, the rest when [`Server::release`] is called.
    Held(usize),
    /// So many bytes of the right body, and the end of the connection when [`Server::let_go`] is called.
    Cut(usize),
    /// The right body, without a length, and then more.
    TooLong,
}

/// A part of an artifact.
#[derive(Debug, Clone)]
pub(crate) struct Blob {
    pub(crate) media_type: &'static str,
    /// The annotation that names the file.
    pub(crate) title: Option<String>,
    pub(crate) bytes: Vec<u8>,
}

/// An image that was put into the registry.
#[derive(Debug, Clone)]
pub(crate) struct Pushed {
    /// Digest of the configuration: the identity that the store must give it.
    pub(crate) id: String,
    /// Digest of what the tag names.
    pub(crate) digest: String,
    pub(crate) manifest: String,
    /// Compressed layers, manifest and configuration, bytes.
    pub(crate) size: u64,
}

#[derive(Default)]
struct State {
    /// By `repository:tag` or digest: media type and bytes.
    documents: Mutex<HashMap<String, (&'static str, Vec<u8>)>>,
    rules: Mutex<HashMap<String, Rule>>,
    seen: Mutex<Vec<String>>,
    released: watch::Sender<bool>,
    /// Bodies on their way.
    sending: watch::Sender<usize>,
    /// Those of them that are held.
    held: watch::Sender<usize>,
    /// Bytes of bodies since the start.
    sent: watch::Sender<u64>,
}

/// Stops when it is dropped.
pub(crate) struct Server {
    pub(crate) address: SocketAddr,
    state: Arc<State>,
    task: AbortHandle,
}

impl Drop for Server {
    fn drop(&mut self) {
        self.task.abort();
    }
}

impl Server {
    pub(crate) async fn start() -> Self {
        let listener = TcpListener::bind(("127.0.0.1", 0)).await.unwrap();
        let address = listener.local_addr().unwrap();
        let state = Arc::<State>::default();
        let served = state.clone();
        let task = tokio::spawn(async move {
            let mut connections = JoinSet::new();
            while let Ok((stream, _)) = listener.accept().await {
                let state = served.clone();
                connections.spawn(async move { connection(stream, &state).await });
            }
        });
        Self { address, state, task: task.abort_handle() }
    }

    /// `host:port/rest`.
    pub(crate) fn name(&self, rest: &str) -> String {
        format!("{}/{rest}", self.address)
    }

    /// Puts an image there. `more` tells images of the same layers apart.
    pub(crate) fn push(&self, repository: &str, tag: &str, layers: &[&Layer], more: &str) -> Pushed {
        let diff_ids: Vec<_> = layers.iter().map(|layer| layer.diff_id()).collect();
        self.push_claiming(repository, tag, layers, &diff_ids, more)
    }

    /// With diff ids that need not be the layers'.
    pub(crate) fn push_claiming(
        &self,
        repository: &str,
        tag: &str,
        layers: &[&Layer],
        diff_ids: &[String],
        more: &str,
    ) -> Pushed {
        let config = json!({
            "architecture": if cfg!(target_arch = "aarch64") { "arm64" } else { "amd64" },
            "os": "linux",
            "config": {"Env": [format!("IMAGE={more}")], "Cmd": ["/bin/true"]},
            "rootfs": {"type": "layers", "diff_ids": diff_ids},
        });
        let (config, id) = self.put(CONFIG, config.to_string().into_bytes());
        let descriptors: Vec<_> =
            layers.iter().map(|layer| self.put(layer.media_type, layer.blob.clone()).0).collect();
        let manifest =
            json!({"schemaVersion": 2, "mediaType": MANIFEST, "config": config, "layers": descriptors});
        let size = config["size"].as_u64().unwrap()
            + descriptors.iter().map(|layer| layer["size"].as_u64().unwrap()).sum::<u64>();
        let (descriptor, manifest) = self.put(MANIFEST, manifest.to_string().into_bytes());
        self.tag(repository, tag, &manifest);
        Pushed { id, digest: manifest.clone(), manifest, size: size + descriptor["size"].as_u64().unwrap() }
    }

    /// Puts an artifact there, with the configuration that all of them have.
    pub(crate) fn push_artifact(&self, repository: &str, tag: &str, kind: &str, blobs: &[Blob]) -> Pushed {
        let (config, _) = self.put("application/vnd.oci.empty.v1+json", b"{}".to_vec());
        let mut layers = Vec::new();
        for blob in blobs {
            let (mut descriptor, _) = self.put(blob.media_type, blob.bytes.clone());
            if let Some(title) = &blob.title {
                descriptor["annotations"] = json!({"org.opencontainers.image.title": title});
            }
            layers.push(descriptor);
        }
        let manifest = json!({
            "schemaVersion": 2, "mediaType": MANIFEST, "artifactType": kind, "config": config, "layers": layers,
        });
        let size = blobs.iter().map(|blob| blob.bytes.len() as u64).sum::<u64>();
        let (descriptor, digest) = self.put(MANIFEST, manifest.to_string().into_bytes());
        self.tag(repository, tag, &digest);
        let size = size + descriptor["size"].as_u64().unwrap();
        Pushed { id: digest.clone(), digest: digest.clone(), manifest: digest, size }
    }

    /// Lets the tag name an index with that image in it.
    pub(crate) fn push_index(&self, repository: &str, tag: &str, image: &Pushed) -> Pushed {
        let architecture = if cfg!(target_arch = "aarch64") { "arm64" } else { "amd64" };
        let size = self.state.documents.lock().unwrap()[&image.manifest].1.len();
        let index = json!({"schemaVersion": 2, "mediaType": INDEX, "manifests": [{
            "mediaType": MANIFEST, "digest": image.manifest, "size": size,
            "platform": {"os": "linux", "architecture": architecture},
        }]});
        let (_, digest) = self.put(INDEX, index.to_string().into_bytes());
        self.tag(repository, tag, &digest);
        Pushed { digest, ..image.clone() }
    }

    fn put(&self, media_type: &'static str, bytes: Vec<u8>) -> (serde_json::Value, String) {
        let digest = Digest::sha256(&bytes).to_string();
        let descriptor = json!({"mediaType": media_type, "digest": digest, "size": bytes.len()});
        self.state.documents.lock().unwrap().insert(digest.clone(), (media_type, bytes));
        (descriptor, digest)
    }

    pub(crate) fn tag(&self, repository: &str, tag: &str, digest: &str) {
        let mut documents = self.state.documents.lock().unwrap();
        let document = documents[digest].clone();
        documents.insert(format!("{repository}:{tag}"), document);
    }

    /// What to do with paths that contain `part`, from now on.
    pub(crate) fn rule(&self, part: &str, rule: Rule) {
        self.state.rules.lock().unwrap().insert(part.to_owned(), rule);
    }

    /// Behaves as one should again, and sends the rest of what was held.
    pub(crate) fn release(&self) {
        self.state.rules.lock().unwrap().clear();
        self.let_go();
    }

    /// Goes on with what was held.
    pub(crate) fn let_go(&self) {
        self.state.released.send_replace(true);
    }

    /// How many requests there were for paths that contain `part`.
    pub(crate) fn count(&self, part: &str) -> usize {
        self.state.seen.lock().unwrap().iter().filter(|path| path.contains(part)).count()
    }

    /// Waits until so many bodies are held.
    pub(crate) async fn held(&self, wanted: usize) {
        reach(&self.state.held, |held| *held == wanted).await;
    }

    /// Waits until no body is on its way: every client has what it wanted or has gone.
    pub(crate) async fn idle(&self) {
        reach(&self.state.sending, |sending| *sending == 0).await;
    }

    /// Waits until so many bytes of bodies were sent, since the start of the server.
    pub(crate) async fn has_sent(&self, bytes: u64) {
        reach(&self.state.sent, |sent| *sent >= bytes).await;
    }

    /// Bytes of bodies since the start.
    pub(crate) fn sent(&self) -> u64 {
        *self.state.sent.borrow()
    }
}

async fn reach<T: std::fmt::Debug>(value: &watch::Sender<T>, wanted: impl FnMut(&T) -> bool) {
    let mut receiver = value.subscribe();
    let reached = tokio::time::timeout(crate::PATIENCE, receiver.wait_for(wanted)).await.is_ok();
    assert!(reached, "it stays at {:?}", *value.borrow());
}

async fn connection(mut stream: TcpStream, state: &State) {
    let mut first = [0];
    if stream.peek(&mut first).await.is_err() || first[0] == TLS_HANDSHAKE {
        return;
    }
    let mut buffer = Vec::new();
    while let Some((path, start)) = request(&mut stream, &mut buffer).await {
        state.seen.lock().unwrap().push(path.clone());
        if answer(&mut stream, state, &path, start).await.is_none() {
            return;
        }
    }
}

/// Path and start of the range.
async fn request(stream: &mut TcpStream, buffer: &mut Vec<u8>) -> Option<(String, Option<usize>)> {
    let end = loop {
        if let Some(at) = buffer.windows(4).position(|window| window == b"\r\n\r\n") {
            break at + 4;
        }
        if stream.read_buf(buffer).await.ok()? == 0 {
            return None;
        }
    };
    let head = String::from_utf8(buffer.drain(..end).collect()).ok()?;
    let path = head.split(' ').nth(1)?.to_owned();
    let range = head.lines().find_map(|line| {
        let (name, value) = line.split_once(':')?;
        let start = value.trim().strip_prefix("bytes=")?.strip_suffix('-')?;
        name.eq_ignore_ascii_case("range").then(|| start.parse().ok())?
    });
    Some((path, range))
}

/// `None` when the connection is not to be used again.
async fn answer(stream: &mut TcpStream, state: &State, path: &str, start: Option<usize>) -> Option<()> {
    let rule = {
        let rules = state.rules.lock().unwrap();
        rules.iter().find(|(part, _)| path.contains(*part)).map(|(_, rule)| rule.clone())
    };
    let found = {
        let documents = state.documents.lock().unwrap();
        let (repository, version) = path.rsplit_once('/')?;
        let repository = repository.strip_prefix("/v2/")?;
        let tagged = format!("{}:{version}", repository.strip_suffix("/manifests").unwrap_or_default());
        documents.get(version).or_else(|| documents.get(&tagged)).cloned()
    };
    let (mut held, mut cut) = (None, false);
    let (media_type, body) = match (rule, found) {
        (Some(Rule::Status(status)), _) => return status_only(stream, status).await,
        (Some(Rule::TooLong | Rule::Held(_) | Rule::Cut(_)) | None, None) => {
            return status_only(stream, 404).await;
        }
        (Some(Rule::Body(body)), found) => (found.map_or("text/plain", |(media_type, _)| media_type), body),
        (Some(Rule::TooLong), Some((_, body))) => {
            stream.write_all(b"HTTP/1.1 200 OK\r\nconnection: close\r\n\r\n").await.ok()?;
            stream.write_all(&body).await.ok()?;
            stream.write_all(b"and more").await.ok()?;
            stream.shutdown().await.ok()?;
            return None;
        }
        (Some(Rule::Held(after)), Some(found)) => {
            held = Some(after);
            found
        }
        (Some(Rule::Cut(after)), Some(found)) => {
            (held, cut) = (Some(after), true);
            found
        }
        (None, Some(found)) => found,
    };
    let (status, range) = match start {
        Some(start) => (
            "206 Partial Content",
            format!("content-range: bytes {start}-{}/{}\r\n", body.len() - 1, body.len()),
        ),
        None => ("200 OK", String::new()),
    };
    let body = body.get(start.unwrap_or(0)..)?;
    let head = format!(
        "HTTP/1.1 {status}\r\ncontent-type: {media_type}\r\n{range}content-length: {}\r\n\r\n",
        body.len()
    );
    stream.write_all(head.as_bytes()).await.ok()?;
    state.sending.send_modify(|sending| *sending += 1);
    let sent = send(stream, state, body, held, cut).await;
    state.sending.send_modify(|sending| *sending -= 1);
    sent
}

async fn send(
    stream: &mut TcpStream,
    state: &State,
    body: &[u8],
    held: Option<usize>,
    cut: bool,
) -> Option<()> {
    let (now, later) = body.split_at(held.unwrap_or(body.len()).min(body.len()));
    write(stream, state, now).await?;
    if held.is_some() {
        let mut released = state.released.subscribe();
        let mut ignored = [0];
        state.held.send_modify(|held| *held += 1);
        let is_released = tokio::select! {
            released = released.wait_for(|released| *released) => released.is_ok(),
            // The client does not send anything while it waits: this is its leaving.
            _ = stream.peek(&mut ignored) => false,
        };
        state.held.send_modify(|held| *held -= 1);
        if !is_released {
            return None;
        }
    }
    if cut { None } else { write(stream, state, later).await }
}

async fn write(stream: &mut TcpStream, state: &State, bytes: &[u8]) -> Option<()> {
    for step in bytes.chunks(STEP) {
        stream.write_all(step).await.ok()?;
        state.sent.send_modify(|sent| *sent += step.len() as u64);
    }
    Some(())
}

async fn status_only(stream: &mut TcpStream, status: u16) -> Option<()> {
    let head = format!("HTTP/1.1 {status} Told\r\ncontent-length: 0\r\n\r\n");
    stream.write_all(head.as_bytes()).await.ok()
}
