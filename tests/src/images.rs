//! The images that the black-box tests pull, in a registry on loopback that mirrors a name which cannot be reached.

use anyhow::{Context, Result};
use podvisor_critest::contents;
use podvisor_critest::image::{Dialect, Image};
use podvisor_critest::layer::{Compression, Files};
use podvisor_critest::registry::{Access, Registry};
use serde_json::json;
use tempfile::TempDir;

/// The registry's name in image references; RFC 2606 keeps it from ever resolving.
pub const HOST: &str = "registry.example.invalid";

/// busybox with a shell as its command: Docker media types, gzip, an index with decoys.
pub const BUSYBOX: &str = "registry.example.invalid/library/busybox:latest";

/// The same files as a single OCI manifest with a zstd layer, user 1000:2000, entrypoint `echo from-entrypoint` and
/// command `from-command`, working directory `/home`, `IMAGE=yes` in its environment.
pub const CONFIGURED: &str = "registry.example.invalid/test/configured:1";

/// busybox under two tags.
pub const TAGGED: [&str; 2] =
    ["registry.example.invalid/test/tagged:a", "registry.example.invalid/test/tagged:b"];

/// busybox with accounts of its own: user `app` (1000:1001), which is in the groups `video` (44) and `staff` (50), and a volume `/data`
/// with a file in it.
pub const ACCOUNTS: &str = "registry.example.invalid/test/accounts:1";

/// The registry with these images in it. It ends, and its storage goes, when this is dropped.
#[derive(Debug)]
pub struct TestImages {
    registry: Registry,
    _storage: TempDir,
}

impl TestImages {
    /// Starts a registry and pushes the images.
    pub fn serve() -> Result<Self> {
        let storage = tempfile::Builder::new()
            .prefix("registry.")
            .tempdir()
            .context("making the registry's storage")?;
        let registry = Registry::start(storage.path(), Access::ReadWrite)?;
        let files = contents::busybox()?;
        let base = files.pack(Compression::Gzip)?;
        let path = "PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin";
        let busybox = Image::new(vec![base], json!({"Cmd": ["sh"], "Env": [path]}));
        registry.push("library/busybox", &["latest"], &busybox.bundle()?)?;
        let marker = Files::new().file("marker", 0o644, "tagged").pack(Compression::Gzip)?;
        registry.push("test/tagged", &["a", "b"], &busybox.layer(marker).bundle()?)?;
        let config = json!({
            "User": "1000:2000",
            "Entrypoint": ["echo", "from-entrypoint"],
            "Cmd": ["from-command"],
            "WorkingDir": "/home",
            "Env": [path, "IMAGE=yes", "BOTH=image"],
            "StopSignal": "SIGUSR1",
            "Labels": {"kept": "in the image"},
        });
        let configured =
            Image::new(vec![files.pack(Compression::Zstd)?], config).dialect(Dialect::Oci).single();
        registry.push("test/configured", &["1"], &configured.bundle()?)?;
        let accounts = Files::new()
            .file("etc/passwd", 0o644, "root:x:0:0::/:/bin/sh\napp:x:1000:1001::/:/bin/sh\n")
            .file("etc/group", 0o644, "root:x:0:\napp:x:1001:\nvideo:x:44:other,app\nstaff:x:50:app\n")
            .directory("data", 0o755)
            .file("data/file", 0o644, "of the image\n")
            .pack(Compression::Gzip)?;
        let config = json!({"Cmd": ["sh"], "User": "app", "Env": [path], "Volumes": {"/data": {}}});
        let image = Image::new(vec![files.pack(Compression::Gzip)?, accounts], config);
        registry.push("test/accounts", &["1"], &image.bundle()?)?;
        Ok(Self { registry, _storage: storage })
    }

    /// The registry, to start more or to push more.
    pub fn registry(&self) -> &Registry {
        &self.registry
    }
}
