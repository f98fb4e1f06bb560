//! ReopenContainerLog: after kubelet has rotated the file away.

use podvisor_proto::cri;
use podvisor_proto::monitor::ReopenLog;
use podvisor_proto::monitor::request::Verb;
use tonic::Status;

use super::running;
use crate::error::PodError;
use crate::pod::Pods;

pub(super) async fn reopen_container_log(
    pods: &Pods,
    request: &cri::ReopenContainerLogRequest,
) -> Result<cri::ReopenContainerLogResponse, Status> {
    let (container, monitor) = running(pods, &request.container_id).await?;
    let verb = Verb::ReopenLog(ReopenLog { container_id: container.record.id.to_string() });
    monitor.command(verb).await.map_err(PodError::from)?;
    Ok(cri::ReopenContainerLogResponse {})
}
