//! What everybody may read about a pod: an immutable snapshot, published by the pod's task after each change. A List never waits
//! for a pod that is busy.

use std::collections::BTreeMap;
use std::sync::Arc;

use podvisor_proto::cri;

use super::record::{ContainerPhase, ContainerRecord, Phase, PodRecord};
use super::state::State;
use crate::error::Failure;
use crate::hooks::told::Told;
use crate::id::ContainerId;
use crate::monitor::Connection;

/// Where a sandbox is in its life, as the live view of [`Phase`].
#[derive(Debug, Clone)]
pub(crate) enum Status {
    /// Not visible yet.
    Creating,
    Ready,
    NotReady,
    /// Its creation failed, everything was rolled back.
    Failed(Failure),
    Removed,
}

/// A pod at one moment.
#[derive(Debug, Clone)]
pub(crate) struct PodView {
    pub(crate) record: Arc<PodRecord>,
    pub(crate) status: Status,
    pub(crate) containers: BTreeMap<ContainerId, Arc<ContainerView>>,
    /// To the pod's monitor, while there is one.
    pub(crate) monitor: Option<Connection>,
    /// What plugins have been told of it.
    pub(crate) told: Arc<Told>,
    /// False only for a pod that an earlier daemon left, until it has been compared with what there is.
    pub(crate) observed: bool,
}

/// A container at one moment.
#[derive(Debug, Clone)]
pub(crate) struct ContainerView {
    pub(crate) record: ContainerRecord,
    pub(crate) state: State,
    /// What plugins have been told of it.
    pub(crate) told: Arc<Told>,
}

impl PodView {
    pub(crate) fn is_visible(&self) -> bool {
        matches!(self.status, Status::Ready | Status::NotReady)
    }

    pub(crate) fn is_ready(&self) -> bool {
        matches!(self.status, Status::Ready)
    }

    pub(crate) fn config(&self) -> &cri::PodSandboxConfig {
        &self.record.config.0
    }

    /// Modes of the pod's namespaces; all at their defaults when the request had none.
    pub(crate) fn namespace_options(&self) -> cri::NamespaceOption {
        namespace_options(self.config())
    }

    pub(crate) fn metadata(&self) -> cri::PodSandboxMetadata {
        self.config().metadata.clone().unwrap_or_default()
    }

    /// Whether the pod's files or those of one of its containers have the SELinux level `level`.
    pub(crate) fn has_level(&self, level: &str) -> bool {
        let asked = |container: &Arc<ContainerView>| {
            let security = container.record.config.0.linux.as_ref()?.security_context.as_ref()?;
            Some(security.selinux_options.as_ref()?.level == level)
        };
        self.record.selinux.as_ref().is_some_and(|labels| labels.level() == Some(level))
            || self.containers.values().any(|container| asked(container).unwrap_or_default())
    }

    /// Why the pod is as it is, if there is something to tell.
    pub(crate) fn why(&self) -> &str {
        match &self.record.phase {
            Phase::Failed { why } => why,
            Phase::Stopped => "it was stopped",
            Phase::Removing => "it is being removed",
            Phase::Creating => "it is being created",
            Phase::Ready => "",
        }
    }

    /// Containers that the CRI shows: one that is still being made is nobody's business.
    pub(crate) fn visible_containers(&self) -> impl Iterator<Item = &Arc<ContainerView>> {
        self.containers.values().filter(|container| container.is_visible())
    }
}

impl ContainerView {
    pub(crate) fn is_visible(&self) -> bool {
        match self.state {
            State::Creating | State::Removed => false,
            // A creation that is being undone.
            State::Removing { .. } => self.record.phase != ContainerPhase::Creating,
            _ => true,
        }
    }

    pub(crate) fn is_running(&self) -> bool {
        matches!(self.state, State::Running | State::Stopping { .. } | State::Starting { .. })
    }

    pub(crate) fn cri_state(&self) -> cri::ContainerState {
        match &self.state {
            State::Creating | State::Created | State::Starting { .. } => {
                cri::ContainerState::ContainerCreated
            }
            State::Running => cri::ContainerState::ContainerRunning,
            // Killed before its start, it was never running.
            State::Stopping { .. } if self.record.started_at == 0 => cri::ContainerState::ContainerCreated,
            State::Stopping { .. } => cri::ContainerState::ContainerRunning,
            State::Exited(_) | State::Removing { .. } | State::Removed => {
                cri::ContainerState::ContainerExited
            }
            State::Unknown { .. } => cri::ContainerState::ContainerUnknown,
        }
    }
}

/// The namespace modes that a sandbox configuration asks for.
pub(crate) fn namespace_options(config: &cri::PodSandboxConfig) -> cri::NamespaceOption {
    config
        .linux
        .as_ref()
        .and_then(|linux| linux.security_context.as_ref())
        .and_then(|context| context.namespace_options.clone())
        .unwrap_or_default()
}
