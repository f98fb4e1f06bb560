//! StopPodSandbox: success for what is not there, as the CRI demands.

use podvisor_proto::cri;
use tonic::Status;

use crate::error::{PodError, unless_gone};
use crate::pod::Pods;

pub(super) async fn stop_pod_sandbox(
    pods: &Pods,
    request: cri::StopPodSandboxRequest,
) -> Result<cri::StopPodSandboxResponse, Status> {
    match pods.find(&request.pod_sandbox_id) {
        Ok(pod) => unless_gone(pod.stop().await)?,
        Err(PodError::NoSuchPod(_)) => {}
        Err(error) => return Err(error.into()),
    }
    Ok(cri::StopPodSandboxResponse {})
}
