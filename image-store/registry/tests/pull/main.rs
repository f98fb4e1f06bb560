//! The client against a real server on loopback that does as told, well or badly.

mod access;
mod content;
mod documents;
mod endpoints;
mod environment;
mod layers;
mod server;
mod tls;

use std::fs;
use std::path::Path;
use std::time::Duration;

use podvisor_registry::{BlobStream, Options, Reference, Registry, RegistryError, ResolvedImage};
use tempfile::TempDir;

/// A client with configuration of its own.
struct Client {
    directory: TempDir,
    registry: Registry,
}

impl Client {
    /// With patience for a loaded machine: for tests in which nothing is supposed to time out.
    fn new() -> Self {
        Self::with_timeout(Duration::from_secs(30))
    }

    /// For tests that wait for the timeout.
    fn impatient() -> Self {
        Self::with_timeout(Duration::from_secs(1))
    }

    fn with_timeout(progress_timeout: Duration) -> Self {
        let directory = tempfile::tempdir().unwrap();
        let registry = Registry::new(Options {
            registries_conf: directory.path().join("registries.conf"),
            certs_dir: directory.path().join("certs.d"),
            auth_files: vec![directory.path().join("config.json")],
            default_registries: vec!["docker.io".to_owned()],
            progress_timeout,
            user_agent: "podvisor-test".to_owned(),
        })
        .unwrap();
        Self { directory, registry }
    }

    fn path(&self) -> &Path {
        self.directory.path()
    }

    fn write(&self, path: &str, text: &str) {
        let path = self.path().join(path);
        fs::create_dir_all(path.parent().unwrap()).unwrap();
        fs::write(path, text).unwrap();
    }

    fn registries_conf(&self, text: &str) {
        self.write("registries.conf", text);
    }

    async fn resolve(&self, name: &str) -> Result<ResolvedImage, RegistryError> {
        self.registry.resolve(&Reference::parse(name).unwrap(), None).await
    }

    /// Resolves and reads every layer.
    async fn pull(&self, name: &str) -> Result<Vec<Vec<u8>>, RegistryError> {
        let image = self.resolve(name).await?;
        let mut layers = Vec::new();
        for layer in &image.layers {
            layers.push(collect(self.registry.blob(&image.source, layer).await?).await?);
        }
        Ok(layers)
    }
}

async fn collect(mut stream: BlobStream) -> Result<Vec<u8>, RegistryError> {
    let mut bytes = Vec::new();
    while let Some(chunk) = stream.next().await? {
        bytes.extend_from_slice(&chunk);
    }
    assert_eq!(stream.position(), stream.size());
    assert!(stream.next().await?.is_none(), "the end is the end");
    Ok(bytes)
}

fn assert_contains(error: &RegistryError, parts: &[&str]) {
    let text = error.to_string();
    for part in parts {
        assert!(text.contains(part), "{part:?} is not in: {text}");
    }
    assert!(!text.contains('\n'), "more than one line: {text}");
}

#[tokio::test]
async fn pulls_can_be_spawned() {
    let content = content::Content::with_layer(1000);
    let server = server::Server::start(move |seen| content.reply(seen)).await;
    let (registry, name) = (Client::new().registry, server.name("app"));
    let task = tokio::spawn(async move {
        let reference = registry.candidates(&name).await?.remove(0);
        let image = registry.resolve(&reference, None).await?;
        collect(registry.blob(&image.source, &image.layers[0]).await?).await
    });
    assert_eq!(task.await.unwrap().unwrap().len(), 1000);
}
