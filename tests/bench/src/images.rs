//! The images, and the registry's files that every sandbox serves them from.

use std::collections::VecDeque;
use std::fs;
use std::os::unix::ffi::OsStrExt;
use std::path::{Path, PathBuf};

use anyhow::{Result, ensure};
use podvisor_critest::contents;
use podvisor_critest::image::{Dialect, Image};
use podvisor_critest::layer::{Compression, Files};
use podvisor_critest::registry::{Access, Registry};
use serde_json::json;

/// What the registry is reached under; RFC 2606 keeps it from ever resolving.
pub(crate) const HOST: &str = "registry.example.invalid";
/// The sandboxes' image of those who need one.
pub(crate) const PAUSE: &str = "registry.example.invalid/pause:1";
/// As large as an ordinary application's, made of programs, libraries, headers and documents of this machine.
pub(crate) const APPLICATION: &str = "registry.example.invalid/application:gzip";
/// The same files in layers compressed with zstd.
pub(crate) const APPLICATION_ZSTD: &str = "registry.example.invalid/application:zstd";

const LAYERS: usize = 8;
/// Bytes of files in a layer.
const LAYER: u64 = 25 << 20;

/// Pushes all of them into `storage`.
pub(crate) fn push(storage: &Path, with_application: bool) -> Result<()> {
    let registry = Registry::start(storage, Access::ReadWrite)?;
    let path = "PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin";
    let busybox = contents::busybox()?.pack(Compression::Gzip)?;
    let busybox = Image::new(vec![busybox], json!({"Cmd": ["sh"], "Env": [path]}));
    registry.push("library/busybox", &["latest"], &busybox.bundle()?)?;
    let pause = Files::new().file("pause", 0o755, contents::program("pause")?).pack(Compression::Gzip)?;
    let pause = Image::new(vec![pause], json!({"Entrypoint": ["/pause"], "User": "65535:65535"}));
    registry.push("pause", &["1"], &pause.bundle()?)?;
    if with_application {
        let layers = application()?;
        for (tag, compression) in [("gzip", Compression::Gzip), ("zstd", Compression::Zstd)] {
            let packed = layers.iter().map(|files| files.pack(compression)).collect::<Result<_>>()?;
            // Only OCI's media types know zstd.
            let image = Image::new(packed, json!({"Cmd": ["sh"]})).dialect(Dialect::Oci);
            registry.push("application", &[tag], &image.bundle()?)?;
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
                size += content.len() as u64;
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
        } else if metadata.is_file() && metadata.len() < LAYER && path.as_os_str().as_bytes().len() < 95 {
            files.push(path);
        }
    }
}
