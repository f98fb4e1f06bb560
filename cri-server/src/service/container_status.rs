//! ContainerStatus.

use podvisor_proto::cri;
use tonic::Status;

use super::answers::{self, container_info};
use crate::node::Node;
use crate::pod::Pods;

pub(super) async fn container_status(
    pods: &Pods,
    node: &Node,
    request: &cri::ContainerStatusRequest,
) -> Result<cri::ContainerStatusResponse, Status> {
    let (pod, container) = pods.find_container(&request.container_id)?;
    let mut info = Default::default();
    if request.verbose {
        let path = node.bundle(&container.record.id).join("config.json");
        let spec = tokio::fs::read(path).await.ok().and_then(|text| serde_json::from_slice(&text).ok());
        info = container_info(&pod.view(), &container, spec);
    }
    Ok(cri::ContainerStatusResponse { status: Some(answers::container_status(&container)), info })
}
