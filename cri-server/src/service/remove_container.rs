//! RemoveContainer: kills it first where it still runs; success for what is not there.

use podvisor_proto::cri;
use tonic::Status;

use crate::error::{PodError, unless_gone};
use crate::pod::Pods;

pub(super) async fn remove_container(
    pods: &Pods,
    request: cri::RemoveContainerRequest,
) -> Result<cri::RemoveContainerResponse, Status> {
    match pods.find_container(&request.container_id) {
        Ok((pod, container)) => {
            unless_gone(pod.remove_container(container.record.id.clone()).await)?;
        }
        Err(PodError::NoSuchContainer(_)) => {}
        Err(error) => return Err(error.into()),
    }
    Ok(cri::RemoveContainerResponse {})
}
