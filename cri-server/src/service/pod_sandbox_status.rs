//! PodSandboxStatus, with the statuses of its containers for the evented PLEG.

use std::time::Duration;

use podvisor_proto::cri;
use tonic::Status;

use super::answers::{container_status, sandbox_info, sandbox_status};
use crate::error::chain;
use crate::node::{Node, now};
use crate::pod::Pods;
use crate::pod::acquired::Acquisition;
use crate::pod::view::{self, PodView};

/// What the plugins of a network have for CHECK: somebody sits before a terminal.
const CHECK: Duration = Duration::from_secs(5);

pub(super) async fn pod_sandbox_status(
    pods: &Pods,
    node: &Node,
    request: &cri::PodSandboxStatusRequest,
) -> Result<cri::PodSandboxStatusResponse, Status> {
    let view = pods.find(&request.pod_sandbox_id)?.view();
    let info = if request.verbose {
        let network = check_network(node, &view).await;
        sandbox_info(&view, network.as_deref())
    } else {
        Default::default()
    };
    Ok(cri::PodSandboxStatusResponse {
        status: Some(sandbox_status(&view)),
        info,
        containers_statuses: view.visible_containers().map(|container| container_status(container)).collect(),
        timestamp: now(),
    })
}

/// Whether the network still finds the pod connected as it has made it, in words: for people, as kubelet never asks for more than the
/// status. `None` for a pod without a network of its own, or one that is not ready.
async fn check_network(node: &Node, view: &PodView) -> Option<String> {
    if !matches!(view.status, view::Status::Ready) {
        return None;
    }
    let (kind, sandbox) = view.record.acquired.iter().find_map(|acquired| match acquired {
        Acquisition::Network { kind, sandbox } => Some((*kind, sandbox)),
        _ => None,
    })?;
    Some(match tokio::time::timeout(CHECK, node.network.check(kind, sandbox)).await {
        Ok(Ok(())) => "as it was made".to_owned(),
        Ok(Err(error)) => chain(&error),
        Err(_) => format!("the network did not answer CHECK within {} s", CHECK.as_secs()),
    })
}
