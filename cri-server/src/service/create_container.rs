//! CreateContainer.

use podvisor_proto::cri;
use tonic::Status;

use crate::error::{PodError, status};
use crate::pod::Pods;

pub(super) async fn create_container(
    pods: &Pods,
    request: cri::CreateContainerRequest,
) -> Result<cri::CreateContainerResponse, Status> {
    let config = request.config.ok_or_else(|| PodError::invalid("config", "must be given"))?;
    let pod = pods.find(&request.pod_sandbox_id)?;
    // `sandbox_config` repeats what RunPodSandbox was given; a sandbox stays what it was created as.
    let id = pod.create_container(config).await.map_err(|failure| status(&failure))?;
    Ok(cri::CreateContainerResponse { container_id: id.to_string() })
}
