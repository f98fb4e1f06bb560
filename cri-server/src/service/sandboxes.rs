//! ListPodSandbox and StreamPodSandboxes: the same answer, whole or in pieces.

use podvisor_proto::cri;

use super::answers::{sandbox, sandbox_state, selects};
use crate::pod::Pods;

pub(super) fn list(pods: &Pods, filter: Option<&cri::PodSandboxFilter>) -> Vec<cri::PodSandbox> {
    let everything = cri::PodSandboxFilter::default();
    let filter = filter.unwrap_or(&everything);
    let mut found: Vec<_> = pods
        .views()
        .iter()
        .filter(|view| {
            view.record.id.as_str().starts_with(&filter.id)
                && filter.state.is_none_or(|wanted| wanted.state() == sandbox_state(view))
                && selects(&filter.label_selector, &view.config().labels)
        })
        .map(|view| sandbox(view))
        .collect();
    found.sort_by_key(|sandbox| std::cmp::Reverse(sandbox.created_at));
    found
}
