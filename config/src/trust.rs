//! Which handler a pod gets: one pure function.
//!
//! In order:
//! 1. the RuntimeClass handler;
//! 2. annotation `io.kubernetes.cri.untrusted-workload` with containerd's semantics: exactly `true` asks for
//!    the untrusted handler, anything else says nothing;
//! 3. annotation `io.kubernetes.cri-o.TrustedSandbox` with the semantics of CRI-O up to 1.13: absent and exactly
//!    `true` say nothing (in particular `true` does not lift a pod above the node's default trust), anything
//!    else asks for the untrusted handler;
//! 4. the node's default trust, where untrusted does not cover pods that are privileged or use a host
//!    namespace (a node's own agents).
//!
//! A pod that asked to be untrusted is never run with the trusted handler: where it cannot be untrusted it is
//! refused.

use std::collections::BTreeMap;

use crate::{Handler, Trust};

/// What of a pod decides.
#[derive(Debug, Clone, Default)]
pub struct Pod<'a> {
    /// `RunPodSandboxRequest.runtime_handler`; empty when no RuntimeClass was given.
    pub handler: &'a str,
    /// Value of annotation `io.kubernetes.cri.untrusted-workload`.
    pub untrusted_workload: Option<&'a str>,
    /// Value of annotation `io.kubernetes.cri-o.TrustedSandbox`.
    pub trusted_sandbox: Option<&'a str>,
    /// Host network, pid or ipc namespace: the names of those that are used.
    pub host_namespaces: Vec<&'static str>,
    /// The sandbox is privileged.
    pub privileged: bool,
}

/// What the node offers.
#[derive(Debug, Clone)]
pub struct Node<'a> {
    /// Handlers by name.
    pub handlers: &'a BTreeMap<String, Handler>,
    /// Handlers that cannot be used right now, with the reason.
    pub unusable: &'a BTreeMap<String, String>,
    /// Name of the trusted handler.
    pub trusted: &'a str,
    /// Name of the untrusted handler, if there is one.
    pub untrusted: Option<&'a str>,
    /// For pods that say nothing.
    pub default_trust: Trust,
}

/// The annotation that containerd introduced.
pub const UNTRUSTED_WORKLOAD: &str = "io.kubernetes.cri.untrusted-workload";

/// The annotation of CRI-O up to 1.13.
pub const TRUSTED_SANDBOX: &str = "io.kubernetes.cri-o.TrustedSandbox";

/// Why a pod gets no handler. The message lists the handlers there are.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum TrustError {
    /// No handler has this name.
    #[error("no runtime handler is named {handler:?}; handlers: {}", list(existing))]
    Unknown {
        /// The name that was asked for.
        handler: String,
        /// Those there are; an unusable one is marked.
        existing: Vec<String>,
    },
    /// The handler exists and does not work right now.
    #[error("runtime handler {handler:?} cannot be used: {reason}; handlers: {}", list(existing))]
    Unusable {
        /// The name.
        handler: String,
        /// Why not.
        reason: String,
        /// Those there are; an unusable one is marked.
        existing: Vec<String>,
    },
    /// The annotation asks for one handler and the RuntimeClass for another.
    #[error(
        "annotation {UNTRUSTED_WORKLOAD} is \"true\", but the RuntimeClass names handler {handler:?}, \
         which is not the untrusted one ({}); handlers: {}",
        untrusted.as_deref().unwrap_or("there is none"), list(existing)
    )]
    Conflict {
        /// What the RuntimeClass names.
        handler: String,
        /// The untrusted handler, if there is one.
        untrusted: Option<String>,
        /// Those there are; an unusable one is marked.
        existing: Vec<String>,
    },
    /// An untrusted pod has a kernel of its own, so it cannot share the host's namespaces.
    #[error(
        "annotation {annotation} makes the pod untrusted, but it uses the host's {} namespace; handlers: {}",
        namespaces.join(" and "), list(existing)
    )]
    HostNamespace {
        /// What asks for it.
        annotation: &'static str,
        /// The host namespaces that the pod uses.
        namespaces: Vec<&'static str>,
        /// Those there are; an unusable one is marked.
        existing: Vec<String>,
    },
    /// The node has no handler for untrusted pods.
    #[error(
        "{demand}, but no untrusted handler is configured: set untrusted_handler in section [runtime] of \
         podvisor's configuration; handlers: {}",
        list(existing)
    )]
    NoUntrustedHandler {
        /// What asks for it.
        demand: String,
        /// Those there are; an unusable one is marked.
        existing: Vec<String>,
    },
}

/// The name of the handler that `pod` runs with on `node`.
pub fn select<'a>(pod: &Pod<'_>, node: &Node<'a>) -> Result<&'a str, TrustError> {
    let marked_untrusted = pod.untrusted_workload == Some("true");
    if !pod.handler.is_empty() {
        let handler = node.usable(pod.handler)?;
        if marked_untrusted && node.untrusted != Some(handler) {
            return Err(TrustError::Conflict {
                handler: handler.to_owned(),
                untrusted: node.untrusted.map(str::to_owned),
                existing: node.existing(),
            });
        }
        if marked_untrusted {
            node.no_host_namespace(pod, UNTRUSTED_WORKLOAD)?;
        }
        return Ok(handler);
    }
    if marked_untrusted {
        return node.untrusted_by(pod, UNTRUSTED_WORKLOAD);
    }
    if pod.trusted_sandbox.is_some_and(|value| value != "true") {
        return node.untrusted_by(pod, TRUSTED_SANDBOX);
    }
    match node.default_trust {
        Trust::Untrusted if !pod.privileged && pod.host_namespaces.is_empty() => {
            node.untrusted("default_workload_trust is \"untrusted\"")
        }
        Trust::Trusted | Trust::Untrusted => node.usable(node.trusted),
    }
}

impl<'a> Node<'a> {
    /// The handler `name`, if it exists and works.
    fn usable(&self, name: &str) -> Result<&'a str, TrustError> {
        let Some((handler, _)) = self.handlers.get_key_value(name) else {
            return Err(TrustError::Unknown { handler: name.to_owned(), existing: self.existing() });
        };
        match self.unusable.get(name) {
            None => Ok(handler),
            Some(reason) => Err(TrustError::Unusable {
                handler: handler.clone(),
                reason: reason.clone(),
                existing: self.existing(),
            }),
        }
    }

    /// The untrusted handler for a pod with `annotation`.
    fn untrusted_by(&self, pod: &Pod<'_>, annotation: &'static str) -> Result<&'a str, TrustError> {
        self.no_host_namespace(pod, annotation)?;
        self.untrusted(&format!("annotation {annotation} makes the pod untrusted"))
    }

    fn untrusted(&self, demand: &str) -> Result<&'a str, TrustError> {
        match self.untrusted {
            Some(name) => self.usable(name),
            None => {
                Err(TrustError::NoUntrustedHandler { demand: demand.to_owned(), existing: self.existing() })
            }
        }
    }

    fn no_host_namespace(&self, pod: &Pod<'_>, annotation: &'static str) -> Result<(), TrustError> {
        if pod.host_namespaces.is_empty() {
            return Ok(());
        }
        let namespaces = pod.host_namespaces.clone();
        Err(TrustError::HostNamespace { annotation, namespaces, existing: self.existing() })
    }

    fn existing(&self) -> Vec<String> {
        let mark = |name: &String| {
            let mark = if self.unusable.contains_key(name) { " (cannot be used now)" } else { "" };
            format!("{name}{mark}")
        };
        self.handlers.keys().map(mark).collect()
    }
}

fn list(names: &[String]) -> String {
    if names.is_empty() { "none".to_owned() } else { names.join(", ") }
}
