//! StartContainer.

use podvisor_proto::cri;
use tonic::Status;

use crate::error::status;
use crate::pod::Pods;

pub(super) async fn start_container(
    pods: &Pods,
    request: cri::StartContainerRequest,
) -> Result<cri::StartContainerResponse, Status> {
    let (pod, container) = pods.find_container(&request.container_id)?;
    pod.start_container(container.record.id.clone()).await.map_err(|failure| status(&failure))?;
    Ok(cri::StartContainerResponse {})
}
