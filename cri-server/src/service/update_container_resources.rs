//! UpdateContainerResources.

use podvisor_proto::cri;
use tonic::Status;

use crate::error::{PodError, status};
use crate::pod::Pods;

pub(super) async fn update_container_resources(
    pods: &Pods,
    request: cri::UpdateContainerResourcesRequest,
) -> Result<cri::UpdateContainerResourcesResponse, Status> {
    let (pod, container) = pods.find_container(&request.container_id)?;
    let resources = request.linux.ok_or_else(|| PodError::invalid("linux", "must be given"))?;
    pod.update_container(container.record.id.clone(), resources).await.map_err(|failure| status(&failure))?;
    Ok(cri::UpdateContainerResourcesResponse {})
}
