//! RemovePodSandbox: stops it first where that has not happened; success for what is not there.

use podvisor_proto::cri;
use tonic::Status;

use crate::error::{PodError, status};
use crate::pod::Pods;

pub(super) async fn remove_pod_sandbox(
    pods: &Pods,
    request: cri::RemovePodSandboxRequest,
) -> Result<cri::RemovePodSandboxResponse, Status> {
    match pods.find(&request.pod_sandbox_id) {
        Ok(pod) => pod.remove().await.map_err(|failure| status(&failure))?,
        Err(PodError::NoSuchPod(_)) => {}
        Err(error) => return Err(error.into()),
    }
    Ok(cri::RemovePodSandboxResponse {})
}
