//! StopContainer: the stop signal, the grace period, SIGKILL. Success for what is not there or has ended.

use std::time::Duration;

use podvisor_proto::cri;
use tonic::Status;

use crate::error::{PodError, unless_gone};
use crate::pod::Pods;

pub(super) async fn stop_container(
    pods: &Pods,
    request: cri::StopContainerRequest,
) -> Result<cri::StopContainerResponse, Status> {
    match pods.find_container(&request.container_id) {
        Ok((pod, container)) => {
            let seconds = u64::try_from(request.timeout)
                .map_err(|_| PodError::invalid("timeout", "must not be negative (0 means at once)"))?;
            let grace = Duration::from_secs(seconds);
            // Longer than a year is a mistake of units, and more than a timer can hold.
            let grace = grace.min(Duration::from_secs(365 * 24 * 3600));
            unless_gone(pod.stop_container(container.record.id.clone(), grace).await)?;
        }
        Err(PodError::NoSuchContainer(_)) => {}
        Err(error) => return Err(error.into()),
    }
    Ok(cri::StopContainerResponse {})
}
