//! The CRI's two services. Each RPC is a thin function in a file of its own (lists share theirs with their streams); this file only
//! connects them to tonic.

pub(crate) mod answers;
mod checkpoint_container;
mod container_status;
mod containers;
mod create_container;
pub(crate) mod exec_sync;
mod guest_usage;
mod images;
mod interfaces;
mod metrics;
mod node_status;
mod pieces;
mod pod_sandbox_status;
mod remove_container;
mod remove_pod_sandbox;
mod reopen_container_log;
mod run_pod_sandbox;
mod sandboxes;
mod start_container;
mod stats;
mod stop_container;
mod stop_pod_sandbox;
mod streams;
mod update_container_resources;
mod update_pod_sandbox_resources;

use std::sync::Arc;

use podvisor_proto::cri;
use podvisor_proto::cri::image_service_server::ImageService;
use podvisor_proto::cri::runtime_service_server::RuntimeService;
use podvisor_streaming::Server;
use tokio_stream::StreamExt;
use tonic::{Request, Response, Status};

use crate::error::PodError;
use crate::meters::Meters;
use crate::monitor::{Connection, MonitorError};
use crate::node::Node;
use crate::pod::Pods;
use crate::pod::view::ContainerView;
use pieces::{Pieces, pieces};

/// Both services over the same pods and images.
#[derive(Debug, Clone)]
pub(crate) struct Cri {
    pub(crate) node: Arc<Node>,
    pub(crate) pods: Arc<Pods>,
    pub(crate) streaming: Arc<Server>,
    pub(crate) meters: Arc<Meters>,
}

/// A running container with the way to its monitor.
async fn running(pods: &Pods, id: &str) -> Result<(Arc<ContainerView>, Connection), PodError> {
    let (pod, container) = pods.find_container(id)?;
    let view = pod.observed().await;
    let gone = || PodError::NoSuchContainer(id.to_owned());
    let container = view.containers.get(&container.record.id).ok_or_else(gone)?;
    if container.cri_state() != cri::ContainerState::ContainerRunning {
        let id = container.record.id.to_string();
        return Err(PodError::NotRunning { id, state: container.state.name() });
    }
    let monitor = view.monitor.clone().ok_or(MonitorError::Gone)?;
    Ok((container.clone(), monitor))
}

type Answer<T> = Result<Response<T>, Status>;
/// All containers of a pod at one moment, with the namespaces that they share, are more than CRIU by way of an OCI runtime writes down.
fn no_checkpoints_of_pods(what: &str) -> Status {
    Status::unimplemented(format!(
        "podvisor does not {what} (alpha in Kubernetes 1.37): its OCI runtimes checkpoint one container at a time, for which there is \
         CheckpointContainer; nothing was paused or written, and the pod runs on"
    ))
}

#[tonic::async_trait]
impl RuntimeService for Cri {
    type StreamPodSandboxesStream = Pieces<cri::StreamPodSandboxesResponse>;
    type StreamContainersStream = Pieces<cri::StreamContainersResponse>;
    type StreamContainerStatsStream = Pieces<cri::StreamContainerStatsResponse>;
    type StreamPodSandboxStatsStream = Pieces<cri::StreamPodSandboxStatsResponse>;
    type StreamPodSandboxMetricsStream = Pieces<cri::StreamPodSandboxMetricsResponse>;
    type GetContainerEventsStream = Pieces<cri::ContainerEventResponse>;

    async fn version(&self, _: Request<cri::VersionRequest>) -> Answer<cri::VersionResponse> {
        Ok(Response::new(node_status::version()))
    }

    async fn run_pod_sandbox(
        &self,
        request: Request<cri::RunPodSandboxRequest>,
    ) -> Answer<cri::RunPodSandboxResponse> {
        run_pod_sandbox::run_pod_sandbox(&self.pods, request.into_inner()).await.map(Response::new)
    }

    async fn stop_pod_sandbox(
        &self,
        request: Request<cri::StopPodSandboxRequest>,
    ) -> Answer<cri::StopPodSandboxResponse> {
        stop_pod_sandbox::stop_pod_sandbox(&self.pods, request.into_inner()).await.map(Response::new)
    }

    async fn remove_pod_sandbox(
        &self,
        request: Request<cri::RemovePodSandboxRequest>,
    ) -> Answer<cri::RemovePodSandboxResponse> {
        remove_pod_sandbox::remove_pod_sandbox(&self.pods, request.into_inner()).await.map(Response::new)
    }

    async fn pod_sandbox_status(
        &self,
        request: Request<cri::PodSandboxStatusRequest>,
    ) -> Answer<cri::PodSandboxStatusResponse> {
        pod_sandbox_status::pod_sandbox_status(&self.pods, &self.node, request.get_ref())
            .await
            .map(Response::new)
    }

    async fn list_pod_sandbox(
        &self,
        request: Request<cri::ListPodSandboxRequest>,
    ) -> Answer<cri::ListPodSandboxResponse> {
        let items = sandboxes::list(&self.pods, request.get_ref().filter.as_ref());
        Ok(Response::new(cri::ListPodSandboxResponse { items }))
    }

    async fn stream_pod_sandboxes(
        &self,
        request: Request<cri::StreamPodSandboxesRequest>,
    ) -> Answer<Self::StreamPodSandboxesStream> {
        let items = sandboxes::list(&self.pods, request.get_ref().filter.as_ref());
        Ok(pieces(items, |pod_sandboxes| cri::StreamPodSandboxesResponse { pod_sandboxes }))
    }

    async fn create_container(
        &self,
        request: Request<cri::CreateContainerRequest>,
    ) -> Answer<cri::CreateContainerResponse> {
        create_container::create_container(&self.pods, request.into_inner()).await.map(Response::new)
    }

    async fn start_container(
        &self,
        request: Request<cri::StartContainerRequest>,
    ) -> Answer<cri::StartContainerResponse> {
        start_container::start_container(&self.pods, request.into_inner()).await.map(Response::new)
    }

    async fn stop_container(
        &self,
        request: Request<cri::StopContainerRequest>,
    ) -> Answer<cri::StopContainerResponse> {
        stop_container::stop_container(&self.pods, request.into_inner()).await.map(Response::new)
    }

    async fn remove_container(
        &self,
        request: Request<cri::RemoveContainerRequest>,
    ) -> Answer<cri::RemoveContainerResponse> {
        remove_container::remove_container(&self.pods, request.into_inner()).await.map(Response::new)
    }

    async fn list_containers(
        &self,
        request: Request<cri::ListContainersRequest>,
    ) -> Answer<cri::ListContainersResponse> {
        let containers = containers::list(&self.pods, request.get_ref().filter.as_ref());
        Ok(Response::new(cri::ListContainersResponse { containers }))
    }

    async fn stream_containers(
        &self,
        request: Request<cri::StreamContainersRequest>,
    ) -> Answer<Self::StreamContainersStream> {
        let items = containers::list(&self.pods, request.get_ref().filter.as_ref());
        Ok(pieces(items, |containers| cri::StreamContainersResponse { containers }))
    }

    async fn container_status(
        &self,
        request: Request<cri::ContainerStatusRequest>,
    ) -> Answer<cri::ContainerStatusResponse> {
        container_status::container_status(&self.pods, &self.node, request.get_ref()).await.map(Response::new)
    }

    async fn update_container_resources(
        &self,
        request: Request<cri::UpdateContainerResourcesRequest>,
    ) -> Answer<cri::UpdateContainerResourcesResponse> {
        update_container_resources::update_container_resources(&self.pods, request.into_inner())
            .await
            .map(Response::new)
    }

    async fn reopen_container_log(
        &self,
        request: Request<cri::ReopenContainerLogRequest>,
    ) -> Answer<cri::ReopenContainerLogResponse> {
        reopen_container_log::reopen_container_log(&self.pods, request.get_ref()).await.map(Response::new)
    }

    async fn exec_sync(&self, request: Request<cri::ExecSyncRequest>) -> Answer<cri::ExecSyncResponse> {
        exec_sync::exec_sync(&self.pods, &self.node, request.get_ref()).await.map(Response::new)
    }

    async fn exec(&self, request: Request<cri::ExecRequest>) -> Answer<cri::ExecResponse> {
        streams::exec(&self.pods, &self.streaming, request.into_inner()).await.map(Response::new)
    }

    async fn attach(&self, request: Request<cri::AttachRequest>) -> Answer<cri::AttachResponse> {
        streams::attach(&self.pods, &self.streaming, request.get_ref()).await.map(Response::new)
    }

    async fn port_forward(
        &self,
        request: Request<cri::PortForwardRequest>,
    ) -> Answer<cri::PortForwardResponse> {
        streams::port_forward(&self.pods, &self.streaming, request.get_ref()).map(Response::new)
    }

    async fn container_stats(
        &self,
        request: Request<cri::ContainerStatsRequest>,
    ) -> Answer<cri::ContainerStatsResponse> {
        stats::container_stats(&self.pods, &self.node, &self.meters, request.get_ref())
            .await
            .map(Response::new)
    }

    async fn list_container_stats(
        &self,
        request: Request<cri::ListContainerStatsRequest>,
    ) -> Answer<cri::ListContainerStatsResponse> {
        let stats =
            stats::list_container_stats(&self.pods, &self.node, &self.meters, request.into_inner().filter)
                .await;
        Ok(Response::new(cri::ListContainerStatsResponse { stats }))
    }

    async fn stream_container_stats(
        &self,
        request: Request<cri::StreamContainerStatsRequest>,
    ) -> Answer<Self::StreamContainerStatsStream> {
        let items =
            stats::list_container_stats(&self.pods, &self.node, &self.meters, request.into_inner().filter)
                .await;
        Ok(pieces(items, |container_stats| cri::StreamContainerStatsResponse { container_stats }))
    }

    async fn pod_sandbox_stats(
        &self,
        request: Request<cri::PodSandboxStatsRequest>,
    ) -> Answer<cri::PodSandboxStatsResponse> {
        stats::pod_sandbox_stats(&self.pods, &self.node, &self.meters, request.get_ref())
            .await
            .map(Response::new)
    }

    async fn list_pod_sandbox_stats(
        &self,
        request: Request<cri::ListPodSandboxStatsRequest>,
    ) -> Answer<cri::ListPodSandboxStatsResponse> {
        let stats =
            stats::list_pod_sandbox_stats(&self.pods, &self.node, &self.meters, request.into_inner().filter)
                .await;
        Ok(Response::new(cri::ListPodSandboxStatsResponse { stats }))
    }

    async fn stream_pod_sandbox_stats(
        &self,
        request: Request<cri::StreamPodSandboxStatsRequest>,
    ) -> Answer<Self::StreamPodSandboxStatsStream> {
        let items =
            stats::list_pod_sandbox_stats(&self.pods, &self.node, &self.meters, request.into_inner().filter)
                .await;
        Ok(pieces(items, |pod_sandbox_stats| cri::StreamPodSandboxStatsResponse { pod_sandbox_stats }))
    }

    async fn update_runtime_config(
        &self,
        request: Request<cri::UpdateRuntimeConfigRequest>,
    ) -> Answer<cri::UpdateRuntimeConfigResponse> {
        node_status::update_runtime_config(&self.node, request.into_inner()).await.map(Response::new)
    }

    async fn status(&self, request: Request<cri::StatusRequest>) -> Answer<cri::StatusResponse> {
        Ok(Response::new(node_status::status(&self.node, request.get_ref().verbose)))
    }

    async fn checkpoint_container(
        &self,
        request: Request<cri::CheckpointContainerRequest>,
    ) -> Answer<cri::CheckpointContainerResponse> {
        checkpoint_container::checkpoint_container(&self.pods, &self.node, request.get_ref())
            .await
            .map(Response::new)
    }

    async fn checkpoint_pod(
        &self,
        _: Request<cri::CheckpointPodRequest>,
    ) -> Answer<cri::CheckpointPodResponse> {
        Err(no_checkpoints_of_pods("checkpoint pods"))
    }

    async fn restore_pod(&self, _: Request<cri::RestorePodRequest>) -> Answer<cri::RestorePodResponse> {
        Err(no_checkpoints_of_pods("restore pods from checkpoints"))
    }

    async fn get_container_events(
        &self,
        _: Request<cri::GetEventsRequest>,
    ) -> Answer<Self::GetContainerEventsStream> {
        let events = tokio_stream::wrappers::BroadcastStream::new(self.node.events.subscribe());
        let events = events.map(|event| {
            event.map(Arc::unwrap_or_clone).map_err(|_| {
                Status::data_loss("events were lost because they were not read in time: list again")
            })
        });
        Ok(Response::new(Box::pin(events)))
    }

    async fn list_metric_descriptors(
        &self,
        _: Request<cri::ListMetricDescriptorsRequest>,
    ) -> Answer<cri::ListMetricDescriptorsResponse> {
        Ok(Response::new(cri::ListMetricDescriptorsResponse { descriptors: metrics::descriptors() }))
    }

    async fn list_pod_sandbox_metrics(
        &self,
        _: Request<cri::ListPodSandboxMetricsRequest>,
    ) -> Answer<cri::ListPodSandboxMetricsResponse> {
        let pod_metrics = metrics::list(&self.pods, &self.node, &self.meters).await;
        Ok(Response::new(cri::ListPodSandboxMetricsResponse { pod_metrics }))
    }

    async fn stream_pod_sandbox_metrics(
        &self,
        _: Request<cri::StreamPodSandboxMetricsRequest>,
    ) -> Answer<Self::StreamPodSandboxMetricsStream> {
        let items = metrics::list(&self.pods, &self.node, &self.meters).await;
        Ok(pieces(items, |pod_sandbox_metrics| cri::StreamPodSandboxMetricsResponse { pod_sandbox_metrics }))
    }

    async fn runtime_config(
        &self,
        _: Request<cri::RuntimeConfigRequest>,
    ) -> Answer<cri::RuntimeConfigResponse> {
        Ok(Response::new(node_status::runtime_config(&self.node)))
    }

    async fn update_pod_sandbox_resources(
        &self,
        request: Request<cri::UpdatePodSandboxResourcesRequest>,
    ) -> Answer<cri::UpdatePodSandboxResourcesResponse> {
        update_pod_sandbox_resources::update_pod_sandbox_resources(&self.pods, request.into_inner())
            .await
            .map(Response::new)
    }
}

#[tonic::async_trait]
impl ImageService for Cri {
    type StreamImagesStream = Pieces<cri::StreamImagesResponse>;

    async fn list_images(&self, request: Request<cri::ListImagesRequest>) -> Answer<cri::ListImagesResponse> {
        let images = images::list_images(&self.node, request.get_ref().filter.as_ref());
        Ok(Response::new(cri::ListImagesResponse { images }))
    }

    async fn stream_images(
        &self,
        request: Request<cri::StreamImagesRequest>,
    ) -> Answer<Self::StreamImagesStream> {
        let items = images::list_images(&self.node, request.get_ref().filter.as_ref());
        Ok(pieces(items, |images| cri::StreamImagesResponse { images }))
    }

    async fn image_status(
        &self,
        request: Request<cri::ImageStatusRequest>,
    ) -> Answer<cri::ImageStatusResponse> {
        images::image_status(&self.node, request.get_ref()).map(Response::new)
    }

    async fn pull_image(&self, request: Request<cri::PullImageRequest>) -> Answer<cri::PullImageResponse> {
        images::pull_image(&self.node, request.into_inner()).await.map(Response::new)
    }

    async fn remove_image(
        &self,
        request: Request<cri::RemoveImageRequest>,
    ) -> Answer<cri::RemoveImageResponse> {
        images::remove_image(&self.node, request.into_inner()).await.map(Response::new)
    }

    async fn image_fs_info(&self, _: Request<cri::ImageFsInfoRequest>) -> Answer<cri::ImageFsInfoResponse> {
        Ok(Response::new(images::image_fs_info(&self.node)))
    }
}
