//! PodSandboxStatus, with the statuses of its containers for the evented PLEG.

use podvisor_proto::cri;
use tonic::Status;

use super::answers::{container_status, sandbox_info, sandbox_status};
use crate::node::now;
use crate::pod::Pods;

pub(super) fn pod_sandbox_status(
    pods: &Pods,
    request: &cri::PodSandboxStatusRequest,
) -> Result<cri::PodSandboxStatusResponse, Status> {
    let view = pods.find(&request.pod_sandbox_id)?.view();
    Ok(cri::PodSandboxStatusResponse {
        status: Some(sandbox_status(&view)),
        info: if request.verbose { sandbox_info(&view) } else { Default::default() },
        containers_statuses: view.visible_containers().map(|container| container_status(container)).collect(),
        timestamp: now(),
    })
}
