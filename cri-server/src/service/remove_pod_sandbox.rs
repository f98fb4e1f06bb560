//! RemovePodSandbox: stops it first where that has not happened; success for what is not there.

use podvisor_proto::cri;
use tonic::Status;

use crate::error::{PodError, unless_gone};
use crate::pod::Pods;

pub(super) async fn remove_pod_sandbox(
    pods: &Pods,
    request: cri::RemovePodSandboxRequest,
) -> Result<cri::RemovePodSandboxResponse, Status> {
    match pods.find(&request.pod_sandbox_id) {
        Ok(pod) => unless_gone(pod.remove().await)?,
        Err(PodError::NoSuchPod(_)) => {}
        Err(error) => return Err(error.into()),
    }
    Ok(cri::RemovePodSandboxResponse {})
}
