//! The time of a pull, podvisor's and containerd's in turn: the same image from the same registry on loopback.
//!
//! To be run in a sandbox (`make bench-pull`). The image is as large as an ordinary application's, in eight layers, made of
//! programs, libraries, headers and documents of this machine.

use std::collections::VecDeque;
use std::fs;
use std::os::unix::ffi::OsStrExt;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use podvisor_critest::image::Image;
use podvisor_critest::layer::{Compression, Files};
use podvisor_critest::node::{Node, Options};
use podvisor_critest::peer::{Kind, Peer};
use podvisor_critest::registry::{Access, Registry};
use podvisor_tests::cri::{Cri, spec};
use serde_json::json;

/// What the registry is reached under; RFC 2606 keeps it from ever resolving.
const HOST: &str = "registry.example.invalid";
const NAME: &str = "registry.example.invalid/bench/application:latest";
const LAYERS: usize = 8;
/// Bytes of files in a layer.
const LAYER: u64 = 25 << 20;
const ROUNDS: usize = 7;

fn main() -> Result<()> {
    let runtime = tokio::runtime::Builder::new_multi_thread().worker_threads(2).enable_all().build()?;
    let storage = tempfile::tempdir().context("making the registry's storage")?;
    let registry = Registry::start(storage.path(), Access::ReadWrite)?;
    push(&registry)?;
    let node = Node::new(&Options {
        mirrored: vec![HOST.to_owned()],
        mirror: Some(registry.address()),
        log: "info".to_owned(),
        ..Options::default()
    })?;
    let daemon = node.start()?;
    let peer =
        Peer::start(Kind::Containerd, &[HOST], registry.address(), "registry.example.invalid/pause:1")?;
    let _inside = runtime.enter();
    let clients = [("podvisor", Cri::new(&node.socket())?), ("containerd", Cri::new(peer.socket())?)];
    let mut times = [const { Vec::new() }; 2];
    for round in 0..=ROUNDS {
        for ((name, client), times) in clients.iter().zip(&mut times) {
            let time = runtime.block_on(pull(client)).with_context(|| format!("pulling with {name}"))?;
            // The first one fills the page cache for both.
            if round > 0 {
                times.push(time);
            }
        }
    }
    let [ours, theirs] = times.map(median);
    println!("podvisor    {ours:6.2} s");
    println!("containerd  {theirs:6.2} s");
    println!("ratio       {:6.2}   (medians of {ROUNDS} pulls each, in turn)", ours / theirs);
    ensure!(daemon.stop()?.success(), "the daemon did not end well");
    Ok(())
}

async fn pull(client: &Cri) -> Result<Duration> {
    let began = Instant::now();
    client.pull(NAME).await?;
    let time = began.elapsed();
    let request = podvisor_proto::cri::RemoveImageRequest { image: Some(spec(NAME)) };
    client.images.clone().remove_image(request).await?;
    // What one has left to be written is not the other's to wait for.
    rustix::fs::sync();
    Ok(time)
}

fn median(mut times: Vec<Duration>) -> f64 {
    times.sort();
    times.get(times.len() / 2).map_or(f64::NAN, Duration::as_secs_f64)
}

fn push(registry: &Registry) -> Result<()> {
    // A file from each place in turn, so that every layer is a mixture.
    let mut places: Vec<VecDeque<PathBuf>> = Vec::new();
    for place in ["/usr/bin", "/usr/lib", "/usr/include", "/usr/share"] {
        let mut files = Vec::new();
        walk(Path::new(place), &mut files);
        files.sort();
        places.push(files.into());
    }
    let (mut layers, mut count, mut total) = (Vec::new(), 0, 0);
    for _ in 0..LAYERS {
        let (mut files, mut size) = (Files::new(), 0);
        while size < LAYER {
            ensure!(places.iter().any(|place| !place.is_empty()), "this machine has too few files");
            for path in places.iter_mut().filter_map(VecDeque::pop_front) {
                let Ok(content) = fs::read(&path) else { continue };
                let Some(name) = path.to_str() else { continue };
                size += content.len() as u64;
                count += 1;
                files = files.file(name.trim_start_matches('/'), 0o644, content);
            }
        }
        total += size;
        layers.push(files.pack(Compression::Gzip)?);
    }
    let compressed: usize = layers.iter().map(|layer| layer.blob.len()).sum();
    println!(
        "{LAYERS} layers, {count} files, {} MB, {} MB compressed",
        total / 1_000_000,
        compressed / 1_000_000
    );
    registry.push("bench/application", &["latest"], &Image::new(layers, json!({"Cmd": ["sh"]})).bundle()?)
}

/// Regular files that fit into an old tar header and none of which is a layer by itself.
fn walk(directory: &Path, files: &mut Vec<PathBuf>) {
    let Ok(entries) = fs::read_dir(directory) else { return };
    for entry in entries.flatten() {
        let Ok(metadata) = entry.path().symlink_metadata() else { continue };
        let path = entry.path();
        if metadata.is_dir() {
            walk(&path, files);
        } else if metadata.is_file() && metadata.len() < LAYER && path.as_os_str().as_bytes().len() < 95 {
            files.push(path);
        }
    }
}
