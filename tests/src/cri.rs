//! A CRI client on a unix socket.

use std::path::Path;

use anyhow::Result;
use hyper_util::rt::TokioIo;
use podvisor_proto::cri::image_service_client::ImageServiceClient;
use podvisor_proto::cri::runtime_service_client::RuntimeServiceClient;
use podvisor_proto::cri::{
    AttachRequest, Container, ContainerState, ContainerStats, ContainerStatsRequest, ContainerStatus,
    ContainerStatusRequest, CreateContainerRequest, ExecRequest, ExecSyncRequest, ExecSyncResponse,
    ImageSpec, LinuxContainerResources, ListContainersRequest, ListPodSandboxRequest, PodSandbox,
    PodSandboxConfig, PodSandboxStatus, PodSandboxStatusRequest, PullImageRequest, RemoveContainerRequest,
    RemoveImageRequest, RemovePodSandboxRequest, RunPodSandboxRequest, StartContainerRequest,
    StopContainerRequest, StopPodSandboxRequest, UpdateContainerResourcesRequest,
};
use podvisor_proto::cri::{ContainerConfig, VersionRequest};
use tokio::net::UnixStream;
use tonic::Status;
use tonic::transport::{Channel, Endpoint};
use tower::service_fn;

/// Both services. A clone shares the connection; after a restart of the daemon the next call connects again.
#[derive(Debug, Clone)]
pub struct Cri {
    /// Pods and containers.
    pub runtime: RuntimeServiceClient<Channel>,
    /// Images.
    pub images: ImageServiceClient<Channel>,
}

/// A channel to a unix socket, for clients of any crate.
pub fn channel(socket: &Path) -> Result<Channel> {
    let socket = socket.to_owned();
    let connect = service_fn(move |_| {
        let socket = socket.clone();
        async move { UnixStream::connect(socket).await.map(TokioIo::new) }
    });
    // The address is not used; the authority of a unix socket is by convention this.
    Ok(Endpoint::try_from("http://localhost")?.connect_with_connector_lazy(connect))
}

impl Cri {
    /// A client of the daemon that listens on `socket`, now or later.
    pub fn new(socket: &Path) -> Result<Self> {
        let channel = channel(socket)?;
        Ok(Self {
            runtime: RuntimeServiceClient::new(channel.clone()).max_decoding_message_size(64 << 20),
            images: ImageServiceClient::new(channel).max_decoding_message_size(64 << 20),
        })
    }

    /// Whether the daemon answers.
    pub async fn version(&self) -> Result<String, Status> {
        let request = VersionRequest { version: "v1".to_owned() };
        Ok(self.runtime.clone().version(request).await?.into_inner().runtime_version)
    }

    /// Pulls by name; the answer is the image's reference.
    pub async fn pull(&self, image: &str) -> Result<String, Status> {
        let request = PullImageRequest { image: Some(spec(image)), ..PullImageRequest::default() };
        Ok(self.images.clone().pull_image(request).await?.into_inner().image_ref)
    }

    /// RunPodSandbox with the default handler.
    pub async fn run_pod(&self, config: &PodSandboxConfig) -> Result<String, Status> {
        let request =
            RunPodSandboxRequest { config: Some(config.clone()), ..RunPodSandboxRequest::default() };
        Ok(self.runtime.clone().run_pod_sandbox(request).await?.into_inner().pod_sandbox_id)
    }

    /// RunPodSandbox with a handler.
    pub async fn run_pod_by(&self, config: &PodSandboxConfig, handler: &str) -> Result<String, Status> {
        let request =
            RunPodSandboxRequest { config: Some(config.clone()), runtime_handler: handler.to_owned() };
        Ok(self.runtime.clone().run_pod_sandbox(request).await?.into_inner().pod_sandbox_id)
    }

    /// RemoveImage.
    pub async fn remove_image(&self, image: &str) -> Result<(), Status> {
        let request = RemoveImageRequest { image: Some(spec(image)) };
        self.images.clone().remove_image(request).await.map(drop)
    }

    /// UpdateContainerResources.
    pub async fn update(&self, container: &str, resources: LinuxContainerResources) -> Result<(), Status> {
        let request = UpdateContainerResourcesRequest {
            container_id: container.to_owned(),
            linux: Some(resources),
            ..UpdateContainerResourcesRequest::default()
        };
        self.runtime.clone().update_container_resources(request).await.map(drop)
    }

    /// A URL for an exec without input.
    pub async fn exec_url(&self, container: &str, command: &[&str]) -> Result<String, Status> {
        let request = ExecRequest {
            container_id: container.to_owned(),
            cmd: command.iter().map(ToString::to_string).collect(),
            stdout: true,
            ..ExecRequest::default()
        };
        Ok(self.runtime.clone().exec(request).await?.into_inner().url)
    }

    /// A URL to attach to a container's standard output.
    pub async fn attach_url(&self, container: &str) -> Result<String, Status> {
        let request =
            AttachRequest { container_id: container.to_owned(), stdout: true, ..AttachRequest::default() };
        Ok(self.runtime.clone().attach(request).await?.into_inner().url)
    }

    /// StopPodSandbox.
    pub async fn stop_pod(&self, pod: &str) -> Result<(), Status> {
        let request = StopPodSandboxRequest { pod_sandbox_id: pod.to_owned() };
        self.runtime.clone().stop_pod_sandbox(request).await.map(drop)
    }

    /// RemovePodSandbox.
    pub async fn remove_pod(&self, pod: &str) -> Result<(), Status> {
        let request = RemovePodSandboxRequest { pod_sandbox_id: pod.to_owned() };
        self.runtime.clone().remove_pod_sandbox(request).await.map(drop)
    }

    /// PodSandboxStatus without verbose info.
    pub async fn pod_status(&self, pod: &str) -> Result<PodSandboxStatus, Status> {
        let request = PodSandboxStatusRequest { pod_sandbox_id: pod.to_owned(), verbose: false };
        let response = self.runtime.clone().pod_sandbox_status(request).await?.into_inner();
        response.status.ok_or_else(|| Status::internal("the answer has no status"))
    }

    /// What PodSandboxStatus tells beside the status, as JSON.
    pub async fn pod_info(&self, pod: &str) -> Result<String, Status> {
        let request = PodSandboxStatusRequest { pod_sandbox_id: pod.to_owned(), verbose: true };
        let mut response = self.runtime.clone().pod_sandbox_status(request).await?.into_inner();
        response.info.remove("info").ok_or_else(|| Status::internal("the answer has no info"))
    }

    /// ContainerStats.
    pub async fn container_stats(&self, container: &str) -> Result<ContainerStats, Status> {
        let request = ContainerStatsRequest { container_id: container.to_owned() };
        let response = self.runtime.clone().container_stats(request).await?.into_inner();
        response.stats.ok_or_else(|| Status::internal("the answer has no stats"))
    }

    /// Every pod.
    pub async fn pods(&self) -> Result<Vec<PodSandbox>, Status> {
        Ok(self.runtime.clone().list_pod_sandbox(ListPodSandboxRequest::default()).await?.into_inner().items)
    }

    /// Every container.
    pub async fn containers(&self) -> Result<Vec<Container>, Status> {
        Ok(self
            .runtime
            .clone()
            .list_containers(ListContainersRequest::default())
            .await?
            .into_inner()
            .containers)
    }

    /// CreateContainer.
    pub async fn create(
        &self,
        pod: &str,
        config: &ContainerConfig,
        pod_config: &PodSandboxConfig,
    ) -> Result<String, Status> {
        let request = CreateContainerRequest {
            pod_sandbox_id: pod.to_owned(),
            config: Some(config.clone()),
            sandbox_config: Some(pod_config.clone()),
        };
        Ok(self.runtime.clone().create_container(request).await?.into_inner().container_id)
    }

    /// StartContainer.
    pub async fn start(&self, container: &str) -> Result<(), Status> {
        let request = StartContainerRequest { container_id: container.to_owned() };
        self.runtime.clone().start_container(request).await.map(drop)
    }

    /// StopContainer; `timeout` in seconds.
    pub async fn stop(&self, container: &str, timeout: i64) -> Result<(), Status> {
        let request = StopContainerRequest { container_id: container.to_owned(), timeout };
        self.runtime.clone().stop_container(request).await.map(drop)
    }

    /// RemoveContainer.
    pub async fn remove(&self, container: &str) -> Result<(), Status> {
        let request = RemoveContainerRequest { container_id: container.to_owned() };
        self.runtime.clone().remove_container(request).await.map(drop)
    }

    /// ContainerStatus without verbose info.
    pub async fn status(&self, container: &str) -> Result<ContainerStatus, Status> {
        let request = ContainerStatusRequest { container_id: container.to_owned(), verbose: false };
        let response = self.runtime.clone().container_status(request).await?.into_inner();
        response.status.ok_or_else(|| Status::internal("the answer has no status"))
    }

    /// ExecSync; `timeout` in seconds, 0 for none.
    pub async fn exec(
        &self,
        container: &str,
        command: &[&str],
        timeout: i64,
    ) -> Result<ExecSyncResponse, Status> {
        let request = ExecSyncRequest {
            container_id: container.to_owned(),
            cmd: command.iter().map(ToString::to_string).collect(),
            timeout,
        };
        Ok(self.runtime.clone().exec_sync(request).await?.into_inner())
    }

    /// ExecSync that has to succeed: its standard output.
    pub async fn output(&self, container: &str, command: &[&str]) -> Result<String> {
        let answer = self.exec(container, command, 20).await?;
        let stderr = String::from_utf8_lossy(&answer.stderr).into_owned();
        anyhow::ensure!(answer.exit_code == 0, "{command:?} ended with {}: {stderr}", answer.exit_code);
        Ok(String::from_utf8(answer.stdout)?)
    }

    /// Waits until a container has exited.
    pub async fn wait_exited(&self, container: &str) -> Result<ContainerStatus> {
        crate::eventually("the container exits", || async {
            let status = self.status(container).await?;
            anyhow::ensure!(status.state() == ContainerState::ContainerExited, "it is {:?}", status.state());
            Ok(status)
        })
        .await
    }
}

/// An image by its name.
pub fn spec(image: &str) -> ImageSpec {
    ImageSpec { image: image.to_owned(), ..ImageSpec::default() }
}
