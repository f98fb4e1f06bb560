//! The clients of Kubernetes themselves (Go, `k8s.io/client-go`) against the server: see `peer/main.go`.
//!
//! Needs Go and its module proxy; `peer/go.sum` pins what is fetched.

use std::collections::BTreeSet;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use bytes::Bytes;
use podvisor_streaming::{Backend, Input, Options, Output, Server, Session, Streams, Tunnel};
use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
use tokio::net::{TcpListener, TcpStream};

const OUTPUT_LENGTH: usize = 10 << 20;

/// The transports that `main.go` knows, and whether each is spoken over TLS.
const COMMANDS: [&str; 11] = [
    "spdy",
    "spdy-v4",
    "spdy-v3",
    "spdy-v2",
    "websocket",
    "websocket-v4",
    "websocket-tls",
    "spdy-tls",
    "fallback",
    "spdy-proxied",
    "websocket-proxied",
];
const FORWARDS: [&str; 6] = ["spdy", "tunnel", "spdy-tls", "tunnel-tls", "spdy-proxied", "tunnel-proxied"];

fn pattern(length: usize) -> Bytes {
    (0..length).map(|at| at.wrapping_mul(2_654_435_761).to_le_bytes()[3]).collect()
}

/// Runs a small program for each command, and connects to this machine.
#[derive(Debug)]
struct Programs;

impl Backend for Programs {
    async fn run(&self, session: Session, Streams { mut input, output }: Streams) {
        let Session::Exec { command, .. } = session else {
            let _ = output.send(Output::Stdout(Bytes::from_static(b"attached"))).await;
            return;
        };
        let code = match command[0].as_str() {
            "both" => {
                for _ in 0..100 {
                    let _ = output.send(Output::Stdout(Bytes::from_static(b"out "))).await;
                    let _ = output.send(Output::Stderr(Bytes::from_static(b"err "))).await;
                }
                3
            }
            "big" => {
                let mut rest = pattern(OUTPUT_LENGTH);
                let mut size = 1;
                while !rest.is_empty() {
                    let _ = output.send(Output::Stdout(rest.split_to(size.min(rest.len())))).await;
                    size = (size * 3 + 1) % 200_000;
                }
                0
            }
            "cat" => {
                while let Some(Input::Stdin(bytes)) = input.recv().await {
                    let _ = output.send(Output::Stdout(bytes)).await;
                }
                0
            }
            "sizes" => {
                for _ in 0..3 {
                    let Some(Input::Resize(size)) = input.recv().await else { break };
                    let text = format!("{}x{} ", size.width, size.height);
                    let _ = output.send(Output::Stdout(text.into())).await;
                }
                0
            }
            _ => {
                let _ = output.send(Output::Failed("no such file".to_owned())).await;
                return;
            }
        };
        let _ = output.send(Output::Exit(code)).await;
    }

    async fn connect(&self, _sandbox: &str, port: u16) -> Result<Tunnel, String> {
        TcpStream::connect(("127.0.0.1", port)).await.map(Tunnel::from).map_err(|error| error.to_string())
    }
}

/// Listens, and answers each connection's whole input, as `answer` says.
async fn answering(answer: fn(Vec<u8>) -> Vec<u8>) -> u16 {
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let port = listener.local_addr().unwrap().port();
    tokio::spawn(async move {
        while let Ok((mut stream, _)) = listener.accept().await {
            tokio::spawn(async move {
                let mut all = Vec::new();
                let _ = stream.read_to_end(&mut all).await;
                let _ = stream.write_all(&answer(all)).await;
            });
        }
    });
    port
}

/// Writes a self-signed certificate and its key.
fn write_certificate(directory: &Path) -> (PathBuf, PathBuf, String) {
    let made = rcgen::generate_simple_self_signed(["127.0.0.1".to_owned()]).unwrap();
    let (certificate, key) = (directory.join("tls.crt"), directory.join("tls.key"));
    std::fs::write(&certificate, made.cert.pem()).unwrap();
    std::fs::write(&key, made.signing_key.serialize_pem()).unwrap();
    (certificate, key, made.cert.pem())
}

async fn start(tls: Option<(PathBuf, PathBuf)>) -> Server {
    let options = Options {
        address: "127.0.0.1:0".parse().unwrap(),
        tls,
        // The clients may have to be compiled first.
        token_lifetime: Duration::from_secs(3600),
        idle_timeout: Duration::from_secs(300),
    };
    Server::start(options, Arc::new(Programs)).await.unwrap()
}

fn session(kind: &str) -> Session {
    let container = "container".to_owned();
    match kind {
        "attach" => Session::Attach { container, tty: false, stdin: false, stdout: true, stderr: true },
        "forward" | "forward-closed" => {
            Session::PortForward { sandbox: "sandbox".to_owned(), ports: Vec::new() }
        }
        command => {
            let tty = command == "sizes";
            let command = vec![command.to_owned()];
            Session::Exec { container, command, tty, stdin: true, stdout: true, stderr: !tty }
        }
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn the_clients_of_kubernetes_are_content() {
    let directory = tempfile::tempdir().unwrap();
    let (certificate, key, ca) = write_certificate(directory.path());
    let (plain, secure) = (start(None).await, start(Some((certificate, key))).await);
    let mut urls = serde_json::Map::new();
    let mut offer = |kind: &str, transport: &str| {
        let server = if transport.ends_with("-tls") { &secure } else { &plain };
        urls.insert(format!("{kind} {transport}"), server.offer(session(kind)).into());
    };
    for transport in COMMANDS {
        for kind in ["both", "big", "fail", "attach"] {
            offer(kind, transport);
        }
        if transport != "websocket-v4" {
            offer("cat", transport);
        }
        if transport != "spdy-v2" {
            offer("sizes", transport);
        }
    }
    offer("both", "spdy-v1");
    for transport in FORWARDS {
        offer("forward", transport);
        offer("forward-closed", transport);
    }
    let expected: BTreeSet<String> = urls.keys().map(|name| format!("ok {name}")).collect();
    // Bound and closed again: nobody listens there.
    let closed = TcpListener::bind("127.0.0.1:0").await.unwrap().local_addr().unwrap().port();
    let given = serde_json::json!({
        "URLs": urls,
        "CA": ca,
        "EchoPort": answering(|all| all).await,
        "CountPort": answering(|all| format!("{} bytes", all.len()).into_bytes()).await,
        "ClosedPort": closed,
        "OutputLength": OUTPUT_LENGTH,
    });
    let program = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/peer");
    let output = tokio::process::Command::new("go")
        .args(["run", "."])
        .arg(given.to_string())
        .current_dir(&program)
        // What `go.mod` and `go.sum` say, whatever the environment says.
        .env("GOFLAGS", "-mod=readonly -buildvcs=false")
        .kill_on_drop(true)
        .output()
        .await
        .unwrap_or_else(|error| panic!("cannot run go in {}: {error}", program.display()));
    let (text, problems) = (String::from_utf8_lossy(&output.stdout), String::from_utf8_lossy(&output.stderr));
    let seen: BTreeSet<String> = text.lines().map(str::to_owned).collect();
    assert!(output.status.success() && seen == expected, "{}\n{text}\n{problems}", output.status);
}
