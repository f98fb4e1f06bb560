//! CheckpointContainer.

use std::path::{Component, Path};
use std::time::Duration;

use podvisor_proto::cri;
use tonic::Status;

use super::{answers, running};
use crate::checkpoint::{self, Wanted};
use crate::error::PodError;
use crate::node::Node;
use crate::pod::Pods;

pub(super) async fn checkpoint_container(
    pods: &Pods,
    node: &Node,
    request: &cri::CheckpointContainerRequest,
) -> Result<cri::CheckpointContainerResponse, Status> {
    let location = Path::new(&request.location);
    let invalid = |why: &str| PodError::invalid("location", format!("{:?} {why}", request.location));
    let plain = |path: &Path| !path.components().any(|part| part == Component::ParentDir);
    if !location.is_absolute() || location.file_name().is_none() || !plain(location) {
        return Err(invalid("is no absolute path of a file").into());
    }
    if location.is_dir() {
        return Err(invalid("is a directory").into());
    }
    if !location.parent().is_some_and(Path::is_dir) {
        return Err(invalid("is in no directory that exists").into());
    }
    let seconds = u64::try_from(request.timeout)
        .map_err(|_| PodError::invalid("timeout", "must not be negative (0 means what OCI runtimes have)"))?;
    let (pod, _) = pods.find_container(&request.container_id)?;
    if let Some(why) = checkpoint::impossible(node, &pod.view().record) {
        return Err(PodError::Unsupported(format!("this container cannot be checkpointed: {why}")).into());
    }
    let (container, _) = running(pods, &request.container_id).await?;
    let limit = match seconds {
        0 => u64::from(node.config().limits.runtime_timeout),
        seconds => seconds,
    };
    let wanted = Wanted {
        pod: pod.view().record.clone(),
        container: container.record.clone(),
        status: answers::container_status(&container),
        location: location.to_owned(),
        limit: Duration::from_secs(limit),
    };
    checkpoint::write(node, wanted).await?;
    Ok(cri::CheckpointContainerResponse {})
}
