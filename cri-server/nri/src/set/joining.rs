//! How plugins come: started ones all at once before the first hook, others whenever they connect.
//!
//! A plugin joins while no hook runs: it is told what there is, and from then on takes part in every hook.

use std::os::unix::fs::PermissionsExt;
use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

use podvisor_proto::nri::ContainerUpdate;
use tokio::net::{UnixListener, UnixStream};
use tokio::sync::{MutexGuard, Semaphore};

use super::{Nri, RuntimeOf};
use crate::launch::{Program, discover};
use crate::plugin::{Limits, Plugin};
use crate::runtime::Runtime;

/// Who has connected, plugins included; more have to wait.
const CONNECTIONS: usize = 64;

impl Nri {
    /// Starts the plugins in the directory and listens for others. Hooks wait until the started ones have joined or failed;
    /// this does not. What does not work is logged: no plugin is needed to serve.
    pub async fn start(self: &Arc<Self>, runtime: Arc<dyn Runtime>) {
        if self.runtime.set(RuntimeOf(runtime)).is_err() {
            return;
        }
        let (plugins, configurations) =
            (self.options.plugin_dir.clone(), self.options.plugin_config_dir.clone());
        let found = tokio::task::spawn_blocking(move || discover(&plugins, &configurations)).await;
        let (programs, errors) = found.unwrap_or_default();
        for error in errors {
            tracing::warn!(error = chain(&error), "an NRI plugin is left out");
        }
        if !programs.is_empty() {
            let (holding, held) = tokio::sync::oneshot::channel();
            let nri = self.clone();
            tokio::spawn(async move { nri.launch(programs, holding).await });
            // From here on hooks wait for it.
            let _ = held.await;
        }
        if let Some(socket) = &self.options.socket {
            match listen(socket) {
                Ok(listener) => drop(tokio::spawn(self.clone().accept(listener))),
                Err(error) => {
                    tracing::warn!(path = %socket.display(), %error, "NRI plugins cannot connect");
                }
            }
        }
    }

    /// Lets the plugins know that podvisor ends; processes that it has started end with it.
    pub async fn shut_down(&self) {
        const PATIENCE: Duration = Duration::from_secs(2);
        let mut plugins = self.plugins.lock().await;
        for plugin in plugins.drain(..) {
            let _ = tokio::time::timeout(PATIENCE, plugin.shut_down()).await;
        }
        if let Some(socket) = &self.options.socket {
            let _ = std::fs::remove_file(socket);
        }
    }

    async fn launch(self: Arc<Self>, programs: Vec<Program>, holding: tokio::sync::oneshot::Sender<()>) {
        let mut plugins = self.plugins.lock().await;
        self.set_active();
        let _ = holding.send(());
        let Some(RuntimeOf(runtime)) = self.runtime.get() else { return };
        let starting: Vec<_> = programs
            .into_iter()
            .map(|program| {
                let (runtime, limits) = (runtime.clone(), self.limits());
                tokio::spawn(async move {
                    let name = program.name.clone();
                    start(program, runtime, limits).await.map_err(|error| (name, error))
                })
            })
            .collect();
        let mut updates = Vec::new();
        runtime.settled().await;
        for started in starting {
            match started.await {
                Ok(Ok(plugin)) => updates.extend(self.join(&mut plugins, plugin).await),
                Ok(Err((name, error))) => {
                    tracing::warn!(plugin = %name, error, "an NRI plugin could not be started");
                }
                Err(_) => {}
            }
        }
        self.sweep(&mut plugins);
        drop(plugins);
        self.apply(updates).await;
    }

    async fn accept(self: Arc<Self>, listener: UnixListener) {
        let places = Arc::new(Semaphore::new(CONNECTIONS));
        loop {
            let Ok(place) = places.clone().acquire_owned().await else { return };
            match listener.accept().await {
                Ok((socket, _)) => {
                    let nri = self.clone();
                    tokio::spawn(async move {
                        nri.connected(socket).await;
                        drop(place);
                    });
                }
                Err(error) => {
                    // Out of descriptors, or the like: it passes.
                    tracing::warn!(%error, "cannot accept an NRI plugin");
                    tokio::time::sleep(Duration::from_millis(100)).await;
                }
            }
        }
    }

    /// The whole life of a plugin that has connected.
    async fn connected(&self, socket: UnixStream) {
        let Some(RuntimeOf(runtime)) = self.runtime.get() else { return };
        let limits = self.limits();
        let registered =
            Plugin::register(socket, None, None, String::new(), (runtime.clone(), &limits)).await;
        let plugin = match registered {
            Ok(plugin) => plugin,
            Err(error) => {
                tracing::warn!(
                    error = chain(&error),
                    "somebody connected to NRI and did not become a plugin"
                );
                return;
            }
        };
        let connection = plugin.connection.clone();
        runtime.settled().await;
        let mut plugins = self.plugins.lock().await;
        self.set_active();
        let updates = self.join(&mut plugins, plugin).await;
        self.sweep(&mut plugins);
        drop(plugins);
        self.apply(updates).await;
        let why = connection.closed().await;
        tracing::info!(why = &*why, "an NRI plugin has left");
        self.sweep(&mut self.plugins.lock().await);
    }

    /// Synchronises a plugin and takes it in. Under the lock, so that nothing happens between the two.
    async fn join(&self, plugins: &mut MutexGuard<'_, Vec<Plugin>>, plugin: Plugin) -> Vec<ContainerUpdate> {
        let Some(RuntimeOf(runtime)) = self.runtime.get() else { return Vec::new() };
        let inventory = runtime.inventory().await;
        let (pods, containers) = (inventory.pods.len(), inventory.containers.len());
        match plugin.synchronize(inventory.pods, inventory.containers).await {
            Ok(updates) => {
                tracing::info!(plugin = %plugin.name, pods, containers, "an NRI plugin has joined");
                let place = plugins.partition_point(|present| present.name <= plugin.name);
                plugins.insert(place, plugin);
                updates
            }
            Err(error) => {
                tracing::warn!(plugin = %plugin.name, %error, "an NRI plugin could not be synchronised");
                plugin.connection.close("it could not be synchronised");
                Vec::new()
            }
        }
    }

    async fn apply(&self, updates: Vec<ContainerUpdate>) {
        let Some(RuntimeOf(runtime)) = self.runtime.get() else { return };
        if updates.is_empty() {
            return;
        }
        if let (_, Some(error)) = runtime.apply(updates, Vec::new()).await {
            tracing::warn!(error, "an update that a joining NRI plugin asked for failed");
        }
    }

    fn set_active(&self) {
        *self.active.write().expect("no panic under this lock") = true;
    }

    fn limits(&self) -> Limits {
        Limits { registration: self.options.registration_timeout, request: self.options.request_timeout }
    }
}

async fn start(program: Program, runtime: Arc<dyn Runtime>, limits: Limits) -> Result<Plugin, String> {
    let name = program.name.clone();
    let begun = tokio::task::spawn_blocking({
        let program = program.clone();
        move || program.configuration()
    });
    let configuration = begun.await.map_err(|error| error.to_string())?.map_err(|error| chain(&error))?;
    let (child, socket) = program.start().map_err(|error| chain(&error))?;
    Plugin::register(socket, Some(name), Some(child), configuration, (runtime, &limits))
        .await
        .map_err(|error| chain(&error))
}

/// The socket for plugins, for root only: who can connect can change every container.
fn listen(socket: &Path) -> std::io::Result<UnixListener> {
    if let Some(directory) = socket.parent()
        && !directory.exists()
    {
        std::fs::create_dir_all(directory)?;
        std::fs::set_permissions(directory, std::fs::Permissions::from_mode(0o700))?;
    }
    match std::fs::remove_file(socket) {
        Err(error) if error.kind() != std::io::ErrorKind::NotFound => return Err(error),
        _ => {}
    }
    let listener = UnixListener::bind(socket)?;
    std::fs::set_permissions(socket, std::fs::Permissions::from_mode(0o600))?;
    Ok(listener)
}

/// An error with its causes, on one line.
fn chain(error: &dyn std::error::Error) -> String {
    match error.source() {
        Some(source) => format!("{error}: {}", chain(source)),
        None => error.to_string(),
    }
}
