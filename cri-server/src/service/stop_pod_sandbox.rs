//! StopPodSandbox: success for what is not there, as the CRI demands.

use podvisor_proto::cri;
use tonic::Status;

use crate::error::{PodError, status};
use crate::pod::Pods;

pub(super) async fn stop_pod_sandbox(
    pods: &Pods,
    request: cri::StopPodSandboxRequest,
) -> Result<cri::StopPodSandboxResponse, Status> {
    match pods.find(&request.pod_sandbox_id) {
        Ok(pod) => pod.stop().await.map_err(|failure| status(&failure))?,
        Err(PodError::NoSuchPod(_)) => {}
        Err(error) => return Err(error.into()),
    }
    Ok(cri::StopPodSandboxResponse {})
}
