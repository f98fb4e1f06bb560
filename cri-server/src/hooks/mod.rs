//! What NRI plugins are told of pods and containers, and what they may change. The steps of a pod call these; they run in the effects
//! beside the pod's task, so a plugin that takes its time holds up nobody else.
//!
//! | file | idea |
//! |---|---|
//! | `told.rs` | what has been told of each, and whose turn it is |
//! | `describe.rs` | records as plugins see them |
//! | `steps.rs` | the hooks of each step |
//! | `changes.rs` | what plugins change in containers that exist |
//!
//! Order: a container's hooks wait for each other ([`told::Turns`]), a pod's stop waits for those of its containers. The creation of
//! what plugins have refused is undone like any that failed; those who had agreed are told that it has ended.

mod changes;
mod describe;
mod steps;
pub(crate) mod told;

use std::sync::{Arc, OnceLock};
use std::time::Duration;

use podvisor_nri::{Host, Nri, Options};

use crate::node::Node;
use crate::pod::task::Index;
pub(crate) use steps::Subject;

/// The plugins, and what it takes to change containers for them.
#[derive(Debug)]
pub(crate) struct Hooks {
    /// `None`: switched off.
    nri: Option<Arc<Nri>>,
    index: OnceLock<Index>,
    host: Host,
}

impl Hooks {
    pub(crate) fn new(config: &podvisor_config::Nri, host: &podvisor_spec::HostFacts) -> Self {
        let seconds = |number: u32| Duration::from_secs(number.into());
        let options = Options {
            socket: (!config.disable_connections).then(|| config.socket.clone()),
            plugin_dir: config.plugin_dir.clone(),
            plugin_config_dir: config.plugin_config_dir.clone(),
            registration_timeout: seconds(config.registration_timeout),
            request_timeout: seconds(config.request_timeout),
        };
        Self {
            nri: config.enabled.then(|| Nri::new(options)),
            index: OnceLock::new(),
            host: Host { oom_score_adj_floor: host.oom_score_adj_floor.map(i64::from), swap: host.swap },
        }
    }

    /// Lets plugins come. All pods are in `index`; hooks wait for the plugins that are started now.
    pub(crate) async fn start(&self, node: &Arc<Node>, index: Index) {
        // Once.
        let _ = self.index.set(index.clone());
        if let Some(nri) = &self.nri {
            nri.start(Arc::new(changes::Containers { node: node.clone(), index })).await;
        }
    }

    /// Lets the plugins know that the daemon ends.
    pub(crate) async fn stop(&self) {
        if let Some(nri) = &self.nri {
            nri.shut_down().await;
        }
    }

    /// The plugins, if there are any. One look at a lock that is taken only when the first joins or the last leaves.
    fn active(&self) -> Option<&Arc<Nri>> {
        self.nri.as_ref().filter(|nri| nri.is_active())
    }

    pub(crate) fn are_active(&self) -> bool {
        self.active().is_some()
    }
}
