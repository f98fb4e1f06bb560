//! All plugins of the node: the hooks in their order, who joins and who leaves.

mod joining;

use std::path::PathBuf;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, OnceLock, RwLock};
use std::time::Duration;

use podvisor_proto::nri::{
    Container, ContainerAdjustment, ContainerEviction, ContainerUpdate, Event, LinuxResources,
    PluginInstance, PodSandbox, UpdatePodSandboxRequest, ValidateContainerAdjustmentRequest,
};
use tokio::sync::{Mutex, MutexGuard};

use crate::collect::{Changes, CollectError, Creation, overlay};
use crate::connection::{CallError, printable};
use crate::plugin::Plugin;
use crate::runtime::Runtime;

/// Where plugins are and how long they may take.
#[derive(Debug, Clone)]
pub struct Options {
    /// Where plugins connect to; `None`: they cannot.
    pub socket: Option<PathBuf>,
    /// Programs that are started.
    pub plugin_dir: PathBuf,
    /// Their configuration files.
    pub plugin_config_dir: PathBuf,
    /// From a plugin's start or connection until it has registered.
    pub registration_timeout: Duration,
    /// Each call of a plugin.
    pub request_timeout: Duration,
}

/// A hook says no: the operation fails.
#[derive(Debug, thiserror::Error)]
pub enum Refused {
    /// A plugin says no.
    #[error("NRI plugin {plugin} refused {event}")]
    Plugin {
        /// Which.
        plugin: String,
        /// The hook.
        event: &'static str,
        /// Its word.
        source: CallError,
    },
    /// A validator does not accept what the plugins have asked for.
    #[error("NRI plugin {plugin} rejected what plugins asked for: {reason}")]
    Rejected {
        /// Which.
        plugin: String,
        /// Its word.
        reason: String,
    },
    /// The plugins' answers do not go together.
    #[error("NRI plugins do not agree")]
    Answers(#[source] CollectError),
}

/// What plugins ask for when a container is created.
#[derive(Debug, Default)]
pub struct Adjusted {
    /// Of the new container.
    pub adjustment: ContainerAdjustment,
    /// Of others.
    pub updates: Vec<ContainerUpdate>,
    /// Of others.
    pub evictions: Vec<ContainerEviction>,
}

/// What plugins ask for when a container is updated or stopped.
#[derive(Debug, Default)]
pub struct Updated {
    /// Laid over what was asked for by the caller; only an update has it.
    pub resources: Option<LinuxResources>,
    /// Of other containers.
    pub updates: Vec<ContainerUpdate>,
    /// Of other containers.
    pub evictions: Vec<ContainerEviction>,
}

/// The plugins. Without any, each hook costs a look at one lock that nobody holds.
#[derive(Debug)]
pub struct Nri {
    options: Options,
    /// True from the moment at which the first plugin is being synchronised. Who passes a hook while it is false notes that down
    /// under this lock, so that a synchronisation either finds the note or the hook is run after it.
    active: RwLock<bool>,
    /// In the order of their names. Held while a hook runs.
    plugins: Mutex<Vec<Plugin>>,
    runtime: OnceLock<RuntimeOf>,
}

struct RuntimeOf(Arc<dyn Runtime>);

impl std::fmt::Debug for RuntimeOf {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("Runtime")
    }
}

impl Nri {
    /// Without plugins until it is started.
    pub fn new(options: Options) -> Arc<Self> {
        Arc::new(Self {
            options,
            active: RwLock::new(false),
            plugins: Mutex::default(),
            runtime: OnceLock::new(),
        })
    }

    /// There are plugins: a hook has to be run.
    pub fn is_active(&self) -> bool {
        *self.active.read().expect("no panic under this lock")
    }

    /// Passes a hook if there is no plugin, and then notes that down in `mark`. False: it has to be run.
    pub fn pass(&self, mark: &AtomicBool) -> bool {
        let active = self.active.read().expect("no panic under this lock");
        if !*active {
            mark.store(true, Ordering::Release);
        }
        !*active
    }

    /// Tells of an event to which there is no answer. `mark` is set when every plugin was told, before the next one can join.
    ///
    /// RunPodSandbox is taken back (StopPodSandbox, RemovePodSandbox) at those who had heard of it when another says no.
    pub async fn tell(
        &self,
        event: Event,
        pod: &PodSandbox,
        container: Option<&Container>,
        mark: Option<&AtomicBool>,
    ) -> Result<(), Refused> {
        let mut plugins = self.plugins.lock().await;
        let mut outcome = Ok(());
        let mut told = 0;
        for plugin in plugins.iter() {
            let answer = plugin.tell(event, pod, container).await;
            outcome = usable(plugin, event, answer).map(drop);
            if outcome.is_err() && !is_announcement(event) {
                break;
            }
            told += 1;
            if let Err(refused) = std::mem::replace(&mut outcome, Ok(())) {
                // Nobody can be stopped from ending: the others hear of it all the same.
                tracing::warn!(error = with_cause(&refused), "a plugin refuses what has happened");
            }
        }
        if outcome.is_err() && event == Event::RunPodSandbox {
            for plugin in &plugins[..told] {
                for event in [Event::StopPodSandbox, Event::RemovePodSandbox] {
                    let _ = usable(plugin, event, plugin.tell(event, pod, None).await);
                }
            }
        }
        if let (Some(mark), Ok(())) = (mark, &outcome) {
            mark.store(true, Ordering::Release);
        }
        self.sweep(&mut plugins);
        outcome
    }

    /// A pod is to get other resources.
    pub async fn update_pod(&self, request: UpdatePodSandboxRequest) -> Result<(), Refused> {
        let mut plugins = self.plugins.lock().await;
        let mut outcome = Ok(());
        for plugin in plugins.iter() {
            outcome = usable(plugin, Event::UpdatePodSandbox, plugin.update_pod(&request).await).map(drop);
            if outcome.is_err() {
                break;
            }
        }
        self.sweep(&mut plugins);
        outcome
    }

    /// A container is to be created. `mark` is set when the plugins agree. If they do not, those that had been asked are told that it
    /// has stopped and been removed.
    pub async fn create(
        &self,
        pod: &PodSandbox,
        container: Container,
        mark: &AtomicBool,
    ) -> Result<Adjusted, Refused> {
        let mut plugins = self.plugins.lock().await;
        let mut asked = 0;
        let outcome = create(&plugins, pod, container.clone(), &mut asked).await;
        if outcome.is_ok() {
            mark.store(true, Ordering::Release);
        } else {
            for plugin in &plugins[..asked] {
                let _ = usable(plugin, Event::StopContainer, plugin.stop(pod, &container).await);
                let event = Event::RemoveContainer;
                let _ = usable(plugin, event, plugin.tell(event, pod, Some(&container)).await);
            }
        }
        self.sweep(&mut plugins);
        outcome
    }

    /// A container is to get other resources.
    pub async fn update(
        &self,
        pod: &PodSandbox,
        container: &Container,
        mut resources: LinuxResources,
    ) -> Result<Updated, Refused> {
        let mut plugins = self.plugins.lock().await;
        let mut changes = Changes::default();
        let mut outcome = Ok(());
        for plugin in plugins.iter() {
            let answer = plugin.update(pod, container, &resources).await;
            outcome = usable(plugin, Event::UpdateContainer, answer).and_then(|answer| {
                let Some(answer) = answer else { return Ok(()) };
                changes.add(&plugin.name.to_string(), answer.update, answer.evict).map_err(Refused::Answers)
            });
            if outcome.is_err() {
                break;
            }
            let so_far = changes.updates.get(&container.id).and_then(|update| update.linux.clone());
            if let Some(changed) = so_far.and_then(|linux| linux.resources) {
                overlay(&mut resources, changed);
            }
        }
        self.sweep(&mut plugins);
        outcome?;
        let resources = changes.take(&container.id);
        let Changes { updates, evictions, .. } = changes;
        Ok(Updated { resources, updates: updates.into_values().collect(), evictions })
    }

    /// A container has stopped.
    pub async fn stop(&self, pod: &PodSandbox, container: &Container) -> Updated {
        let mut plugins = self.plugins.lock().await;
        let mut changes = Changes::default();
        for plugin in plugins.iter() {
            let answer = plugin.stop(pod, container).await;
            let added = usable(plugin, Event::StopContainer, answer).and_then(|answer| {
                let updates = answer.unwrap_or_default().update;
                changes.add(&plugin.name.to_string(), updates, Vec::new()).map_err(Refused::Answers)
            });
            if let Err(refused) = added {
                tracing::warn!(error = with_cause(&refused), "a plugin's answer to a stop is left out");
            }
        }
        self.sweep(&mut plugins);
        let Changes { mut updates, evictions, .. } = changes;
        updates.remove(&container.id);
        Updated { resources: None, updates: updates.into_values().collect(), evictions }
    }

    /// Drops plugins whose connections have ended; after the last one hooks are passed again.
    fn sweep(&self, plugins: &mut MutexGuard<'_, Vec<Plugin>>) {
        if plugins.iter().any(|plugin| plugin.connection.is_closed()) {
            plugins.retain(|plugin| !plugin.connection.is_closed());
        }
        if plugins.is_empty() {
            *self.active.write().expect("no panic under this lock") = false;
        }
    }
}

/// The operation is over, or ends whatever plugins say.
fn is_announcement(event: Event) -> bool {
    !matches!(event, Event::RunPodSandbox | Event::StartContainer)
}

async fn create(
    plugins: &[Plugin],
    pod: &PodSandbox,
    container: Container,
    asked: &mut usize,
) -> Result<Adjusted, Refused> {
    let pristine = container.clone();
    let mut creation = Creation::of(container);
    let mut consulted = Vec::new();
    for plugin in plugins {
        let answer = plugin.create(pod, &creation.container).await;
        let answer = usable(plugin, Event::CreateContainer, answer)?;
        *asked += 1;
        let Some(answer) = answer else { continue };
        let name = plugin.name.to_string();
        consulted.push(PluginInstance { name: plugin.name.base.clone(), index: plugin.name.index.clone() });
        let adjusted = creation
            .adjust(&name, answer.adjust.unwrap_or_default())
            .map_err(CollectError::from)
            .and_then(|()| creation.changes.add(&name, answer.update, answer.evict));
        adjusted.map_err(Refused::Answers)?;
    }
    let Creation { adjustment, changes, .. } = creation;
    let updates: Vec<ContainerUpdate> = changes.updates.into_values().collect();
    let mut validation = None;
    for plugin in plugins {
        let event = Event::ValidateContainerAdjustment;
        if !plugin.events.has(event) || plugin.connection.is_closed() {
            continue;
        }
        let request = validation.get_or_insert_with(|| ValidateContainerAdjustmentRequest {
            pod: Some(pod.clone()),
            container: Some(pristine.clone()),
            adjust: Some(adjustment.clone()),
            update: updates.clone(),
            owners: Some(changes.owners.as_message().clone()),
            plugins: consulted.clone(),
        });
        // What could not be looked at is not accepted, whatever the reason.
        let answer = plugin.validate(request).await.inspect_err(|error| drop_if_lost(plugin, error));
        let answer = answer.map_err(|source| Refused::Plugin {
            plugin: plugin.name.to_string(),
            event: "ValidateContainerAdjustment",
            source,
        })?;
        if answer.reject {
            let reason = printable(&answer.reason);
            return Err(Refused::Rejected { plugin: plugin.name.to_string(), reason });
        }
    }
    Ok(Adjusted { adjustment, updates, evictions: changes.evictions })
}

/// A plugin's answer. `None`: it is lost and was dropped.
fn usable<T>(plugin: &Plugin, event: Event, answer: Result<T, CallError>) -> Result<Option<T>, Refused> {
    match answer {
        Ok(answer) => Ok(Some(answer)),
        Err(source) if source.is_answer() => Err(Refused::Plugin {
            plugin: plugin.name.to_string(),
            event: crate::event::method(event).unwrap_or_default(),
            source,
        }),
        Err(error) => {
            drop_if_lost(plugin, &error);
            Ok(None)
        }
    }
}

fn drop_if_lost(plugin: &Plugin, error: &CallError) {
    if !error.is_answer() {
        tracing::warn!(plugin = %plugin.name, %error, "an NRI plugin is dropped");
        plugin.connection.close(&error.to_string());
    }
}

fn with_cause(refused: &Refused) -> String {
    use std::error::Error;
    match refused.source() {
        Some(source) => format!("{refused}: {source}"),
        None => refused.to_string(),
    }
}
