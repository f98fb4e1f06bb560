//! Debian's docker-registry as a child process on a free loopback port, and pushing to it.

use std::fs;
use std::io::{BufRead, BufReader};
use std::net::SocketAddr;
use std::path::Path;
use std::process::{Child, Command, Stdio};

use anyhow::{Context, Result, bail};
use serde_json::json;

use crate::http::request;
use crate::image::{Bundle, Document};

/// Whether a registry takes pushes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Access {
    /// It serves what is there; several may share one directory.
    ReadOnly,
    /// Images can be pushed and deleted.
    ReadWrite,
    /// As [`Access::ReadOnly`], for [`USER`] with [`PASSWORD`] alone.
    Private,
}

/// Who a private registry serves.
pub const USER: &str = "somebody";

/// The password of [`USER`].
pub const PASSWORD: &str = "secret";

/// The same as htpasswd has it: bcrypt, which is the only kind that the registry takes.
const ACCOUNT: &str = "somebody:$2y$05$abcdefghijklmnopqrstuuOQiyCxlgf/oeuTqixKmWdcYUh4Hjl0a\n";

/// A running registry; it ends when this is dropped.
#[derive(Debug)]
pub struct Registry {
    process: Child,
    address: SocketAddr,
    _configuration: tempfile::TempDir,
}

impl Registry {
    /// Starts one over `storage` and returns when it listens.
    pub fn start(storage: &Path, access: Access) -> Result<Self> {
        let directory = tempfile::tempdir().context("making a directory for the registry's configuration")?;
        let file = directory.path().join("registry.json");
        // The registry reads YAML, of which JSON is a part.
        let mut configuration = json!({
            "version": "0.1",
            "log": {"level": "info", "accesslog": {"disabled": true}},
            "storage": {
                "filesystem": {"rootdirectory": storage},
                "delete": {"enabled": true},
                "maintenance": {
                    "uploadpurging": {"enabled": false},
                    "readonly": {"enabled": access != Access::ReadWrite},
                },
            },
            "http": {"addr": "127.0.0.1:0"},
        });
        if access == Access::Private {
            let accounts = directory.path().join("htpasswd");
            fs::write(&accounts, ACCOUNT).with_context(|| format!("writing {}", accounts.display()))?;
            configuration["auth"] = json!({"htpasswd": {"realm": "private", "path": accounts}});
        }
        fs::write(&file, configuration.to_string()).with_context(|| format!("writing {}", file.display()))?;
        let mut process = Command::new("docker-registry")
            .arg("serve")
            .arg(&file)
            .env("OTEL_TRACES_EXPORTER", "none")
            .stdin(Stdio::null())
            .stdout(Stdio::null())
            .stderr(Stdio::piped())
            .spawn()
            .context("starting docker-registry (`make deps` installs it)")?;
        let mut lines =
            BufReader::new(process.stderr.take().context("docker-registry has no stderr")?).lines();
        let mut said = String::new();
        let address = loop {
            let Some(line) = lines.next().transpose().context("reading docker-registry's log")? else {
                process.wait().context("waiting for docker-registry")?;
                bail!("docker-registry ended before it listened:\n{said}");
            };
            if let Some((_, rest)) = line.split_once("listening on ") {
                let address =
                    rest.split(|c: char| c == '"' || c == ',' || c.is_whitespace()).next().unwrap_or("");
                break address.parse().with_context(|| format!("docker-registry listens on {address:?}"))?;
            }
            said.push_str(&line);
            said.push('\n');
        };
        // Read on, so that the pipe never fills; it ends with the process.
        std::thread::spawn(move || lines.for_each(drop));
        Ok(Self { process, address, _configuration: directory })
    }

    /// Where it listens.
    pub fn address(&self) -> SocketAddr {
        self.address
    }

    /// The process, for tests that stop it.
    pub fn pid(&self) -> u32 {
        self.process.id()
    }

    /// Pushes an image into `repository` under `tags`.
    pub fn push(&self, repository: &str, tags: &[&str], bundle: &Bundle) -> Result<()> {
        push(self.address, repository, tags, bundle).with_context(|| format!("pushing {repository}"))
    }
}

impl Drop for Registry {
    fn drop(&mut self) {
        // Both fail only when it has ended by itself.
        let _ = self.process.kill();
        let _ = self.process.wait();
    }
}

/// Uploads what the registry lacks: blobs, then manifests by digest, then the tags (OCI distribution spec, "Push").
fn push(server: SocketAddr, repository: &str, tags: &[&str], bundle: &Bundle) -> Result<()> {
    for (digest, content) in &bundle.blobs {
        let present = request(server, "HEAD", &format!("/v2/{repository}/blobs/{digest}"), &[], &[])?;
        if present.status == 200 {
            continue;
        }
        let upload =
            request(server, "POST", &format!("/v2/{repository}/blobs/uploads/"), &[], &[])?.expect(202)?;
        let location = upload.header("location").context("the registry named no place for the upload")?;
        // Absolute or relative, with a query already or without.
        let target = location.strip_prefix(&format!("http://{server}")).unwrap_or(location);
        let separator = if target.contains('?') { '&' } else { '?' };
        let target = format!("{target}{separator}digest={digest}");
        request(server, "PUT", &target, &[("Content-Type", "application/octet-stream")], content)?
            .expect(201)?;
    }
    for document in &bundle.documents {
        put(server, repository, &document.digest, document)?;
    }
    for tag in tags {
        put(server, repository, tag, bundle.top())?;
    }
    Ok(())
}

fn put(server: SocketAddr, repository: &str, reference: &str, document: &Document) -> Result<()> {
    let target = format!("/v2/{repository}/manifests/{reference}");
    request(server, "PUT", &target, &[("Content-Type", document.media_type)], &document.body)?.expect(201)?;
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::image::{Dialect, Image};
    use crate::layer::{Compression, Files};

    #[test]
    fn what_was_pushed_is_served_unchanged() {
        let storage = tempfile::tempdir().unwrap();
        let layer = Files::new().file("a", 0o644, "x").pack(Compression::Gzip).unwrap();
        for dialect in [Dialect::Docker, Dialect::Oci] {
            let bundle = Image::new(vec![layer.clone()], json!({})).dialect(dialect).bundle().unwrap();
            let top = bundle.top();
            {
                let registry = Registry::start(storage.path(), Access::ReadWrite).unwrap();
                registry.push("some/image", &["1", "2"], &bundle).unwrap();
            }
            let registry = Registry::start(storage.path(), Access::ReadOnly).unwrap();
            for reference in ["1", "2", &top.digest] {
                let target = format!("/v2/some/image/manifests/{reference}");
                let answer =
                    request(registry.address(), "GET", &target, &[("Accept", top.media_type)], &[]).unwrap();
                assert_eq!(answer.header("docker-content-digest"), Some(top.digest.as_str()));
                assert_eq!(answer.header("content-type"), Some(top.media_type));
                assert_eq!(answer.body, top.body);
            }
            for (digest, content) in &bundle.blobs {
                let target = format!("/v2/some/image/blobs/{digest}");
                let answer = request(registry.address(), "GET", &target, &[], &[]).unwrap();
                assert_eq!(&answer.body, content);
            }
            assert!(registry.push("some/other", &["1"], &bundle).is_err(), "read-only");
        }
    }
}
