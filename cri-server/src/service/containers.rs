//! ListContainers and StreamContainers: the same answer, whole or in pieces.

use podvisor_proto::cri;

use super::answers::{container, selects};
use crate::pod::Pods;

pub(super) fn list(pods: &Pods, filter: Option<&cri::ContainerFilter>) -> Vec<cri::Container> {
    let everything = cri::ContainerFilter::default();
    let filter = filter.unwrap_or(&everything);
    let mut found = Vec::new();
    for view in pods.views() {
        if !view.record.id.as_str().starts_with(&filter.pod_sandbox_id) {
            continue;
        }
        found.extend(
            view.visible_containers()
                .filter(|one| {
                    one.record.id.as_str().starts_with(&filter.id)
                        && filter.state.is_none_or(|wanted| wanted.state() == one.cri_state())
                        && selects(&filter.label_selector, &one.record.config.0.labels)
                })
                .map(|one| container(&view, one)),
        );
    }
    found.sort_by_key(|container| std::cmp::Reverse(container.created_at));
    found
}
