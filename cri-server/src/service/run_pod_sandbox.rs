//! RunPodSandbox.

use podvisor_proto::cri;
use tonic::Status;

use crate::error::{PodError, status};
use crate::pod::Pods;

pub(super) async fn run_pod_sandbox(
    pods: &Pods,
    request: cri::RunPodSandboxRequest,
) -> Result<cri::RunPodSandboxResponse, Status> {
    let config = request.config.ok_or_else(|| PodError::invalid("config", "must be given"))?;
    let id = pods.run(config, request.runtime_handler).await.map_err(|failure| status(&failure))?;
    Ok(cri::RunPodSandboxResponse { pod_sandbox_id: id.to_string() })
}
