//! UpdatePodSandboxResources.

use podvisor_proto::cri;
use tonic::Status;

use crate::error::status;
use crate::pod::Pods;
use crate::pod::resize::Sizes;

pub(super) async fn update_pod_sandbox_resources(
    pods: &Pods,
    request: cri::UpdatePodSandboxResourcesRequest,
) -> Result<cri::UpdatePodSandboxResourcesResponse, Status> {
    let pod = pods.find(&request.pod_sandbox_id)?;
    let sizes = Sizes::requested(request.overhead.clone(), request.resources.clone())?;
    let hooks = pods.hooks();
    hooks.update_pod(&pod.view().record, &request).await?;
    pod.resize(sizes).await.map_err(|failure| status(&failure))?;
    hooks.pod_updated(&pod.view().record).await;
    Ok(cri::UpdatePodSandboxResourcesResponse {})
}
