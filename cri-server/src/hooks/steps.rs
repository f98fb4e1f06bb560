//! The hooks of each step in the life of a pod and of a container.

use std::sync::Arc;
use std::sync::atomic::Ordering;

use oci_spec::runtime::Spec;
use podvisor_nri::api::{self, Event, UpdatePodSandboxRequest};
use podvisor_nri::{Nri, Updated, adjust, overlay};
use podvisor_proto::cri;
use serde_json::Value;

use super::told::Told;
use super::{Hooks, describe};
use crate::error::PodError;
use crate::node::Node;
use crate::pod::record::PodRecord;
use crate::pod::view::ContainerView;

/// What a hook is about: a container as it was last published, and its pod.
#[derive(Debug, Clone)]
pub(crate) struct Subject {
    pub(crate) pod: Arc<PodRecord>,
    pub(crate) container: Arc<ContainerView>,
}

impl Subject {
    fn told(&self) -> &Told {
        &self.container.told
    }

    /// As plugins see it; reads its spec.
    async fn described(&self, node: &Arc<Node>) -> (api::PodSandbox, api::Container) {
        let (node, subject) = (node.clone(), self.clone());
        let spec = tokio::task::spawn_blocking(move || describe::spec(&node, &subject.container)).await;
        let spec = spec.unwrap_or_default();
        (describe::pod(&self.pod), describe::container(&self.pod, &self.container, &spec))
    }
}

impl Hooks {
    // ---- pods

    /// RunPodSandbox: everything of the pod is there, nobody has heard of it. On error it is to be undone.
    pub(crate) async fn run_pod(&self, told: &Told, pod: impl FnOnce() -> PodRecord) -> Result<(), PodError> {
        match &self.nri {
            Some(nri) if !nri.pass(&told.created) => {
                let pod = describe::pod(&pod());
                Ok(nri.tell(Event::RunPodSandbox, &pod, None, Some(&told.created)).await?)
            }
            _ => Ok(()),
        }
    }

    /// StopPodSandbox: no container runs any more, the pod's own things are still there.
    pub(crate) async fn stop_pod(&self, pod: &PodRecord, told: &Told) {
        let Some(nri) = self.active() else { return told.has_stopped() };
        if told.stops() {
            announce(nri, Event::StopPodSandbox, &describe::pod(pod), None, None).await;
        }
    }

    /// RemovePodSandbox has been told, or nobody has to be. False: [`Hooks::remove_pod`] has to be called.
    pub(crate) fn pass_removal(&self, told: &Told) -> bool {
        let Some(nri) = &self.nri else { return true };
        !told.is_known() || nri.pass(&told.removed)
    }

    /// RemovePodSandbox.
    pub(crate) async fn remove_pod(&self, pod: &PodRecord, told: &Told) {
        if let Some(nri) = &self.nri
            && told.is_known()
        {
            announce(nri, Event::RemovePodSandbox, &describe::pod(pod), None, Some(&told.removed)).await;
        }
    }

    /// A pod whose creation comes to nothing after all.
    pub(crate) async fn undo_pod(&self, pod: &PodRecord, told: &Told) {
        if !self.pass_removal(told) {
            self.stop_pod(pod, told).await;
            self.remove_pod(pod, told).await;
        }
    }

    /// UpdatePodSandbox: kubelet wants other resources for the whole pod.
    pub(crate) async fn update_pod(
        &self,
        pod: &PodRecord,
        asked: &cri::UpdatePodSandboxResourcesRequest,
    ) -> Result<(), PodError> {
        let Some(nri) = self.active() else { return Ok(()) };
        let request = UpdatePodSandboxRequest {
            pod: Some(describe::pod(pod)),
            overhead_linux_resources: asked.overhead.as_ref().map(describe::resources),
            linux_resources: asked.resources.as_ref().map(describe::resources),
        };
        Ok(nri.update_pod(request).await?)
    }

    /// PostUpdatePodSandbox: it has them.
    pub(crate) async fn pod_updated(&self, pod: &PodRecord) {
        if let Some(nri) = self.active() {
            announce(nri, Event::PostUpdatePodSandbox, &describe::pod(pod), None, None).await;
        }
    }

    // ---- containers

    /// CreateContainer, passed because there are no plugins. False: [`Hooks::create`] has to be called. The spec is written.
    pub(crate) fn pass_creation(&self, subject: &Subject) -> bool {
        let Some(nri) = &self.nri else { return true };
        nri.pass(&subject.told().created)
    }

    /// CreateContainer: the spec as plugins want it, in JSON. On error the creation has failed.
    pub(crate) async fn create(
        &self,
        node: &Arc<Node>,
        subject: &Subject,
        spec: &Spec,
    ) -> Result<Option<Value>, PodError> {
        let Some(nri) = &self.nri else { return Ok(None) };
        let pod = describe::pod(&subject.pod);
        let json = serde_json::to_value(spec).unwrap_or_default();
        let container = describe::container(&subject.pod, &subject.container, &json);
        // In a box: it is large, and most creations do without.
        let adjusted = Box::pin(nri.create(&pod, container, &subject.told().created)).await?;
        self.change(adjusted.updates, adjusted.evictions).await?;
        let (node, mut spec, adjustment, host) = (node.clone(), spec.clone(), adjusted.adjustment, self.host);
        tokio::task::spawn_blocking(move || {
            let devices: Vec<_> = adjustment.cdi_devices.iter().map(|device| device.name.clone()).collect();
            // First, as the Go implementation has it: what a plugin says itself counts more.
            crate::cdi::inject(&node, &mut spec, &devices)?;
            Ok(Some(adjust(&spec, &adjustment, host)?))
        })
        .await
        .map_err(|_| PodError::TaskGone)?
    }

    /// StartContainer. On error the start has failed.
    pub(crate) async fn start_container(&self, node: &Arc<Node>, subject: &Subject) -> Result<(), PodError> {
        let Some(nri) = self.active() else { return Ok(()) };
        let (pod, container) = subject.described(node).await;
        Ok(nri.tell(Event::StartContainer, &pod, Some(&container), None).await?)
    }

    /// PostCreateContainer or PostStartContainer, with what has become of the container.
    pub(crate) async fn done(
        &self,
        node: &Arc<Node>,
        event: Event,
        subject: &Subject,
        change: impl FnOnce(&mut api::Container),
    ) {
        let Some(nri) = self.active() else { return };
        let (pod, mut container) = subject.described(node).await;
        change(&mut container);
        announce(nri, event, &pod, Some(&container), None).await;
    }

    /// UpdateContainer: what plugins want laid over what kubelet asks for.
    pub(crate) async fn update(
        &self,
        node: &Arc<Node>,
        subject: &Subject,
        asked: &cri::LinuxContainerResources,
    ) -> Result<Option<api::LinuxResources>, PodError> {
        let Some(nri) = self.active() else { return Ok(None) };
        let (pod, container) = subject.described(node).await;
        let Updated { resources, updates, evictions } =
            nri.update(&pod, &container, describe::resources(asked)).await?;
        self.change(updates, evictions).await?;
        Ok(resources)
    }

    /// PostUpdateContainer, with the resources that the container got.
    pub(crate) async fn updated(
        &self,
        node: &Arc<Node>,
        subject: &Subject,
        asked: &cri::LinuxContainerResources,
        plugins: Option<api::LinuxResources>,
    ) {
        let changed = |container: &mut api::Container| {
            let resources = container.linux.get_or_insert_default().resources.get_or_insert_default();
            overlay(resources, describe::resources(asked));
            overlay(resources, plugins.unwrap_or_default());
        };
        self.done(node, Event::PostUpdateContainer, subject, changed).await;
    }

    /// StopContainer, once: it has ended.
    pub(crate) async fn stop_container(&self, node: &Arc<Node>, subject: &Subject) {
        let Some(nri) = self.active() else { return subject.told().has_stopped() };
        if !subject.told().stops() {
            return;
        }
        let (pod, container) = subject.described(node).await;
        let Updated { updates, evictions, .. } = nri.stop(&pod, &container).await;
        if let Err(error) = self.change(updates, evictions).await {
            tracing::warn!(error = crate::error::chain(&error), "a change that a plugin asked for failed");
        }
    }

    /// RemoveContainer, after StopContainer if that has not been told: its spec is still there.
    pub(crate) async fn remove_container(&self, node: &Arc<Node>, subject: &Subject) {
        let told = subject.told();
        let Some(nri) = &self.nri else { return };
        if !told.is_known() || nri.pass(&told.removed) {
            return;
        }
        self.stop_container(node, subject).await;
        let (pod, container) = subject.described(node).await;
        announce(nri, Event::RemoveContainer, &pod, Some(&container), Some(&told.removed)).await;
        told.removed.store(true, Ordering::Release);
    }

    /// The resources in force with what a plugin wants laid over them.
    pub(crate) fn overlay(&self, resources: &mut Value, over: &api::LinuxResources) -> Result<(), PodError> {
        Ok(podvisor_nri::adjust_resources(resources, over, self.host)?)
    }
}

/// Tells of what cannot be refused any more.
async fn announce(
    nri: &Nri,
    event: Event,
    pod: &api::PodSandbox,
    container: Option<&api::Container>,
    mark: Option<&std::sync::atomic::AtomicBool>,
) {
    if let Err(refused) = nri.tell(event, pod, container, mark).await {
        tracing::warn!(error = crate::error::chain(&refused), "a plugin refuses what has happened");
    }
}
