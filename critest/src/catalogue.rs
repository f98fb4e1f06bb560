//! The images that critest v1.36 pulls, made on the spot under the repository names that it uses.
//!
//! The suite names public registries; the runtime under test reaches the stand-ins through its ordinary mirror
//! configuration, as a node with an offline mirror would. Users, stop signals, tags and layouts are those that the
//! suite's specs check.

use std::fs;
use std::io::Read;
use std::path::PathBuf;

use anyhow::{Context, Result};
use serde_json::{Value, json};
use sha2::{Digest as _, Sha256};

use crate::contents;
use crate::image::{Dialect, Image};
use crate::layer::{Compression, Files, Layer};
use crate::registry::{Access, Registry};
use crate::target_dir;

/// The registries that the suite names; each is to be mirrored by the local one.
pub const MIRRORED: [&str; 4] = ["registry.k8s.io", "k8s.gcr.io", "gcr.io", "public.ecr.aws"];

const PATH: &str = "PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin";
const E2E: &str = "e2e-test-images";
const STAGING: &str = "k8s-staging-cri-tools";

/// An image with the names it gets.
#[derive(Debug)]
pub struct Named {
    /// Repository without registry.
    pub repository: String,
    /// Tags.
    pub tags: Vec<&'static str>,
    /// The image.
    pub image: Image,
}

fn named(repository: String, tags: &[&'static str], image: Image) -> Named {
    Named { repository, tags: tags.to_vec(), image }
}

/// The `config` object of an image that runs `command`.
fn runs(command: &[&str]) -> Value {
    json!({"Env": [PATH], "Cmd": command})
}

fn packed(files: &Files) -> Result<Layer> {
    files.pack(Compression::Gzip)
}

fn marker(name: &str) -> Result<Layer> {
    packed(&Files::new().file(name, 0o644, ""))
}

/// Every image of the suite.
pub fn images() -> Result<Vec<Named>> {
    let base = packed(&contents::busybox()?)?;
    let busybox = Image::new(vec![base.clone()], runs(&["sh"]));
    let mut images = vec![
        named(format!("{E2E}/busybox"), &["1.29-2"], busybox.clone()),
        named(
            format!("{E2E}/nginx"),
            &["1.14-2"],
            Image::new(
                vec![base.clone(), packed(&contents::nginx(80)?)?],
                runs(&["nginx", "-g", "daemon off;"]),
            )
            .set("ExposedPorts", json!({"80/tcp": {}}))
            .set("StopSignal", "SIGTERM"),
        ),
        named(
            format!("{E2E}/httpd"),
            &["2.4.39-4"],
            Image::new(vec![base.clone(), packed(&contents::httpd()?)?], runs(&["httpd-foreground"]))
                .set("ExposedPorts", json!({"80/tcp": {}}))
                .set("StopSignal", "SIGWINCH")
                .set("WorkingDir", "/usr/local/apache2"),
        ),
        named(
            format!("{E2E}/nonewprivs"),
            &["1.3"],
            Image::new(
                vec![
                    base.clone(),
                    packed(&Files::new().file("nonewprivs", 0o4755, contents::program("nonewprivs")?))?,
                ],
                json!({"Env": [PATH], "Entrypoint": ["/nonewprivs"]}),
            ),
        ),
        // The suite names it under two registries and expects one image: both mirrors lead to this repository.
        named(
            "pause".to_owned(),
            &["3.9"],
            Image::new(
                vec![packed(&Files::new().file("pause", 0o755, contents::program("pause")?))?],
                json!({"Env": [PATH], "Entrypoint": ["/pause"], "User": "65535:65535"}),
            ),
        ),
        named(
            format!("{STAGING}/test-image-predefined-group"),
            &["latest"],
            busybox.clone().layer(predefined_group()?).set("User", "1000"),
        ),
        named(
            format!("{STAGING}/hostnet-nginx-amd64"),
            &["latest"],
            Image::new(vec![base, packed(&contents::nginx(12003)?)?], runs(&["nginx", "-g", "daemon off;"]))
                .set("StopSignal", "SIGQUIT")
                .single(),
        ),
        named(format!("{STAGING}/test-image-tags"), &["1", "2", "3"], busybox.clone().layer(marker("tags")?)),
        named(format!("{STAGING}/test-image-tag"), &["test", "all"], busybox.clone().layer(marker("tag")?)),
        named(
            "docker/library/busybox".to_owned(),
            &["1.35.0-glibc", "1-uclibc", "1", "1-glibc", "1-musl"],
            busybox.clone().dialect(Dialect::Oci),
        ),
    ];
    for (name, user) in [
        ("test-image-user-uid", "1002"),
        ("test-image-user-username", "www-data"),
        ("test-image-user-uid-group", "1003:1004"),
        ("test-image-user-username-group", "www-data:1004"),
    ] {
        images.push(named(format!("{STAGING}/{name}"), &["latest"], busybox.clone().set("User", user)));
    }
    for name in ["test-image-1", "test-image-2", "test-image-3", "test-image-latest", "test-image-digest"] {
        images.push(named(format!("{STAGING}/{name}"), &["latest"], busybox.clone().layer(marker(name)?)));
    }
    Ok(images)
}

/// A user whose primary group is 1000 and who is also in a group that only the image knows.
fn predefined_group() -> Result<Layer> {
    let passwd = "root:x:0:0:root:/root:/bin/sh\ndefault-user:x:1000:1000::/home/default-user:/bin/sh\n";
    let group = "root:x:0:\ndefault-user:x:1000:\ngroup-defined-in-image:x:50000:default-user\n";
    packed(&Files::new().file("etc/passwd", 0o644, passwd).file("etc/group", 0o644, group))
}

/// The images as a registry's storage, made once and kept in the target directory.
#[derive(Debug, Clone)]
pub struct Prepared {
    directory: PathBuf,
}

impl Prepared {
    /// Makes the storage, unless the one that stands there was made by this very program out of the same contents.
    pub fn make() -> Result<Self> {
        let prepared = Self { directory: target_dir().join("critest/images") };
        let key = input_key()?;
        let key_file = prepared.directory.join("key");
        if fs::read_to_string(&key_file).is_ok_and(|have| have == key) {
            return Ok(prepared);
        }
        let parent = prepared.directory.parent().context("the storage has no parent directory")?;
        let part = tempfile::Builder::new().prefix("images.").tempdir_in(parent)?;
        let registry = Registry::start(&part.path().join("storage"), Access::ReadWrite)?;
        for named in images()? {
            let bundle = named.image.bundle()?;
            registry.push(&named.repository, &named.tags, &bundle)?;
            if named.repository.ends_with("/test-image-digest") {
                fs::write(part.path().join("digest"), &bundle.top().digest)?;
            }
        }
        drop(registry);
        fs::write(part.path().join("key"), key)?;
        if prepared.directory.exists() {
            fs::remove_dir_all(&prepared.directory)?;
        }
        let part = part.keep();
        fs::rename(&part, &prepared.directory)
            .with_context(|| format!("moving the images to {}", prepared.directory.display()))?;
        Ok(prepared)
    }

    /// Serves the images.
    pub fn serve(&self) -> Result<Registry> {
        Registry::start(&self.directory.join("storage"), Access::ReadOnly)
    }

    /// Digest of the image that the suite names by a digest; critest is built with it.
    pub fn digest(&self) -> Result<String> {
        let file = self.directory.join("digest");
        fs::read_to_string(&file).with_context(|| format!("reading {}", file.display()))
    }
}

/// Names everything the images are made from: this program, and what stands in the contents directory.
fn input_key() -> Result<String> {
    let contents = target_dir().join("critest/contents");
    let inputs = [
        std::env::current_exe().context("finding this program's file")?,
        contents.join("busybox/busybox"),
        contents.join("programs/pause"),
        contents.join("programs/nonewprivs"),
        contents.join("webservers/packages"),
    ];
    let mut hash = Sha256::new();
    for input in inputs {
        let mut bytes = Vec::new();
        fs::File::open(&input)
            .and_then(|mut file| file.read_to_end(&mut bytes))
            .with_context(|| format!("reading {} (`make images` makes it)", input.display()))?;
        hash.update(Sha256::digest(&bytes));
    }
    Ok(hex::encode(hash.finalize()))
}
