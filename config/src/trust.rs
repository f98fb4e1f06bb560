//! Which handler a pod gets: one pure function.
//!
//! In order: the RuntimeClass handler; `io.kubernetes.cri.untrusted-workload` (containerd's semantics);
//! `io.kubernetes.cri-o.TrustedSandbox` (CRI-O ≤ 1.13 semantics); the node's default trust.

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

/// Why a pod gets no handler. The message lists the handlers there are.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("placeholder")]
pub struct TrustError;

/// The name of the handler that `pod` runs with on `node`.
pub fn select<'a>(_pod: &Pod<'_>, _node: &Node<'a>) -> Result<&'a str, TrustError> {
    todo!()
}
