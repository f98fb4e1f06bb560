//! The images, and the registry's files that every sandbox serves them from.

use std::collections::VecDeque;
use std::fs;
use std::os::unix::ffi::OsStrExt;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result, ensure};
use podvisor_critest::contents;
use podvisor_critest::image::{Dialect, Image};
use podvisor_critest::layer::{Compression, Files, Layer};
use podvisor_critest::registry::{Access, Registry};
use serde_json::{Value, json};

use crate::workload::Workload;

/// What the registry is reached under; RFC 2606 keeps it from ever resolving.
pub(crate) const HOST: &str = "registry.example.invalid";
/// The sandboxes' image of those who need one.
pub(crate) const PAUSE: &str = "registry.example.invalid/pause:1";
/// As large as an ordinary application's, made of programs, libraries, headers and documents of this machine: `gzip`, the same files as
/// `zstd`, and [`BASE`].
pub(crate) const APPLICATION: &str = "application";
/// The application's first four layers.
pub(crate) const BASE: &str = "base";
/// As large, of bytes that no program can compress.
pub(crate) const RANDOM: &str = "random";
/// Ten images: the application's first four layers and one of their own.
pub(crate) const TEN: &str = "ten";
/// Small images: busybox's layer and one of their own.
pub(crate) const MANY: &str = "many";
pub(crate) const MANY_COUNT: u32 = 101;

const LAYERS: usize = 8;
/// Bytes of files in a layer.
const LAYER: usize = 25 << 20;

/// The name that an image is pulled by.
pub(crate) fn reference(repository: &str, tag: &str) -> String {
    format!("{HOST}/{repository}:{tag}")
}

/// Pushes what these workloads pull into `storage`.
pub(crate) fn push(storage: &Path, workloads: &[Workload]) -> Result<()> {
    let registry = Registry::start(storage, Access::ReadWrite)?;
    let path = "PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin";
    let base = contents::busybox()?.pack(Compression::Gzip)?;
    let busybox = Image::new(vec![base], json!({"Cmd": ["sh"], "Env": [path]}));
    registry.push("library/busybox", &["latest"], &busybox.bundle()?)?;
    let pause = Files::new().file("pause", 0o755, contents::program("pause")?).pack(Compression::Gzip)?;
    let pause = Image::new(vec![pause], json!({"Entrypoint": ["/pause"], "User": "65535:65535"}));
    registry.push("pause", &["1"], &pause.bundle()?)?;
    let pulls = |wanted: &[Workload]| workloads.iter().any(|workload| wanted.contains(workload));
    let push = |repository: &str, tag: &str, layers: Vec<Layer>| {
        // Only OCI's media types know zstd.
        let image = Image::new(layers, json!({"Cmd": ["sh"]})).dialect(Dialect::Oci);
        registry.push(repository, &[tag], &image.bundle()?)
    };
    if pulls(&[Workload::Pull, Workload::PullZstd, Workload::PullHalf, Workload::PullTen]) {
        let files = application()?;
        let pack =
            |compression| files.iter().map(|files| files.pack(compression)).collect::<Result<Vec<_>>>();
        let layers = pack(Compression::Gzip)?;
        let shared = &layers[..LAYERS / 2];
        push(APPLICATION, BASE, shared.to_vec())?;
        for number in 0..10_usize {
            let own = random(number as u64, 1 << 20).pack(Compression::Gzip)?;
            push(TEN, &number.to_string(), [shared, &[own]].concat())?;
        }
        push(APPLICATION, "gzip", layers)?;
        push(APPLICATION, "zstd", pack(Compression::Zstd)?)?;
    }
    if pulls(&[Workload::PullRandom]) {
        let layers = (0..LAYERS).map(|number| random(100 + number as u64, LAYER).pack(Compression::Gzip));
        push(RANDOM, "gzip", layers.collect::<Result<_>>()?)?;
    }
    if pulls(&[Workload::Images]) {
        for number in 0..MANY_COUNT {
            let own = Files::new().file("number", 0o644, number.to_string()).pack(Compression::Gzip)?;
            registry.push(MANY, &[&number.to_string()], &busybox.clone().layer(own).bundle()?)?;
        }
    }
    Ok(())
}

fn application() -> Result<Vec<Files>> {
    // A file from each place in turn, so that every layer is a mixture.
    let mut places: Vec<VecDeque<PathBuf>> = Vec::new();
    for place in ["/usr/bin", "/usr/lib", "/usr/include", "/usr/share"] {
        let mut files = Vec::new();
        walk(Path::new(place), &mut files);
        files.sort();
        places.push(files.into());
    }
    let mut layers = Vec::new();
    for _ in 0..LAYERS {
        let (mut files, mut size) = (Files::new(), 0);
        while size < LAYER {
            ensure!(places.iter().any(|place| !place.is_empty()), "this machine has too few files");
            for path in places.iter_mut().filter_map(VecDeque::pop_front) {
                let (Ok(content), Some(name)) = (fs::read(&path), path.to_str()) else { continue };
                size += content.len();
                files = files.file(name.trim_start_matches('/'), 0o644, content);
            }
        }
        layers.push(files);
    }
    Ok(layers)
}

/// Regular files that fit into an old tar header and none of which is a layer by itself.
fn walk(directory: &Path, files: &mut Vec<PathBuf>) {
    let Ok(entries) = fs::read_dir(directory) else { return };
    for entry in entries.flatten() {
        let Ok(metadata) = entry.path().symlink_metadata() else { continue };
        let path = entry.path();
        if metadata.is_dir() {
            walk(&path, files);
        } else if metadata.is_file()
            && metadata.len() < LAYER as u64
            && path.as_os_str().as_bytes().len() < 95
        {
            files.push(path);
        }
    }
}

/// Files of 1 MiB, so many bytes in all, that are the same for the same seed.
fn random(seed: u64, size: usize) -> Files {
    let mut state = seed.wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1;
    let mut next = || {
        // Marsaglia's xorshift64.
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        state.to_le_bytes()
    };
    let mut files = Files::new();
    for number in 0..size >> 20 {
        let content: Vec<u8> = (0..1 << 17).flat_map(|_| next()).collect();
        files = files.file(&format!("random/{seed}-{number}"), 0o644, content);
    }
    files
}

/// The compressed layers of an image in a registry's files, lowest first.
pub(crate) fn layers(storage: &Path, repository: &str, tag: &str) -> Result<Vec<PathBuf>> {
    let root = storage.join("docker/registry/v2");
    let tag = root.join(format!("repositories/{repository}/_manifests/tags/{tag}/current/link"));
    let blob = |digest: &str| -> Result<PathBuf> {
        let digest = digest.trim().strip_prefix("sha256:").context("not a sha256")?;
        Ok(root.join("blobs/sha256").join(&digest[..2]).join(digest).join("data"))
    };
    let document = |digest: &str| -> Result<Value> { Ok(serde_json::from_slice(&fs::read(blob(digest)?)?)?) };
    let index = document(&fs::read_to_string(&tag).with_context(|| format!("reading {}", tag.display()))?)?;
    let ours = index["manifests"].as_array().and_then(|all| {
        all.iter().find(|one| one["platform"]["architecture"] == "amd64")?["digest"].as_str()
    });
    let manifest = document(ours.context("no manifest for amd64")?)?;
    let layers = manifest["layers"].as_array().context("no layers")?;
    layers.iter().map(|layer| blob(layer["digest"].as_str().context("no digest")?)).collect()
}
