//! Version, Status, RuntimeConfig: what kubelet asks first.

use anyhow::{Context, Result, ensure};
use podvisor_proto::cri::{CgroupDriver, RuntimeConfigRequest, StatusRequest, VersionRequest};
use podvisor_tests::Fixture;
use podvisor_tests::cri::channel;

use super::Tests;

pub(crate) fn add(tests: &mut Tests) {
    tests.add("version::names_the_program_and_the_api", names_the_program_and_the_api);
    tests.add("version::status_is_ready_and_names_every_handler", status_is_ready_and_names_every_handler);
    tests.add("version::runtime_config_names_the_cgroup_driver", runtime_config_names_the_cgroup_driver);
    tests.add("version::an_independent_client_reads_the_same", an_independent_client_reads_the_same);
}

async fn names_the_program_and_the_api(f: &mut Fixture) -> Result<()> {
    // kubelet asks with its own API's version, older ones with "0.1.0"; the answer does not depend on it.
    for asked in ["v1", "0.1.0", ""] {
        let request = VersionRequest { version: asked.to_owned() };
        let answer = f.cri.runtime.version(request).await?.into_inner();
        ensure!(answer.runtime_name == "podvisor", "{answer:?}");
        ensure!(answer.runtime_api_version == "v1", "{answer:?}");
        ensure!(answer.runtime_version.contains('.'), "{answer:?}");
        // kubelet refuses any other value here (its own kubeRuntimeAPIVersion).
        ensure!(answer.version == "0.1.0", "{answer:?}");
    }
    Ok(())
}

async fn status_is_ready_and_names_every_handler(f: &mut Fixture) -> Result<()> {
    let plain = f.cri.runtime.status(StatusRequest { verbose: false }).await?.into_inner();
    let conditions = plain.status.context("no status")?.conditions;
    for kind in ["RuntimeReady", "NetworkReady"] {
        let condition = conditions.iter().find(|condition| condition.r#type == kind).context(kind)?;
        ensure!(condition.status, "{condition:?}");
    }
    let names: Vec<&str> = plain.runtime_handlers.iter().map(|handler| handler.name.as_str()).collect();
    for name in ["", "runc", "crun"] {
        ensure!(names.contains(&name), "no handler {name:?} among {names:?}");
    }
    ensure!(plain.info.is_empty(), "information that nobody asked for: {:?}", plain.info);
    let verbose = f.cri.runtime.status(StatusRequest { verbose: true }).await?.into_inner();
    let config: serde_json::Value = serde_json::from_str(verbose.info.get("config").context("no config")?)?;
    // kubeadm reads `sandboxImage` there and accepts that it is missing: the pause is built in.
    ensure!(config.get("sandboxImage").is_none_or(|image| image == ""), "{config}");
    Ok(())
}

async fn runtime_config_names_the_cgroup_driver(f: &mut Fixture) -> Result<()> {
    let answer = f.cri.runtime.runtime_config(RuntimeConfigRequest {}).await?.into_inner();
    let driver = answer.linux.context("nothing about Linux")?.cgroup_driver();
    ensure!(driver == CgroupDriver::Cgroupfs, "{driver:?} without systemd");
    Ok(())
}

/// The types of crate `k8s-cri` come from the CRI's original files and from other hands than ours.
async fn an_independent_client_reads_the_same(f: &mut Fixture) -> Result<()> {
    use k8s_cri::v1;
    let channel = channel(&f.node.socket())?;
    let mut runtime = v1::runtime_service_client::RuntimeServiceClient::new(channel.clone());
    let mut images = v1::image_service_client::ImageServiceClient::new(channel);
    let version = runtime.version(v1::VersionRequest { version: "v1".to_owned() }).await?.into_inner();
    ensure!(version.runtime_name == "podvisor", "{version:?}");

    let image = v1::ImageSpec { image: podvisor_tests::images::BUSYBOX.to_owned(), ..Default::default() };
    let pull = v1::PullImageRequest { image: Some(image.clone()), ..Default::default() };
    let reference = images.pull_image(pull).await?.into_inner().image_ref;
    let listed = images.list_images(v1::ListImagesRequest::default()).await?.into_inner().images;
    ensure!(listed.len() == 1 && listed[0].id == reference, "{listed:?}");

    let metadata = v1::PodSandboxMetadata {
        name: "independent".to_owned(),
        uid: "independent".to_owned(),
        namespace: "tests".to_owned(),
        attempt: 1,
    };
    let logs = f.logs();
    std::fs::create_dir_all(&logs)?;
    let pod_config = v1::PodSandboxConfig {
        metadata: Some(metadata.clone()),
        log_directory: logs.display().to_string(),
        labels: [("a".to_owned(), "b".to_owned())].into(),
        linux: Some(v1::LinuxPodSandboxConfig {
            cgroup_parent: format!("{}/independent", podvisor_tests::ask::CGROUPS),
            ..Default::default()
        }),
        ..Default::default()
    };
    let run = v1::RunPodSandboxRequest { config: Some(pod_config.clone()), ..Default::default() };
    let pod = runtime.run_pod_sandbox(run).await?.into_inner().pod_sandbox_id;
    let status = v1::PodSandboxStatusRequest { pod_sandbox_id: pod.clone(), verbose: true };
    let status = runtime.pod_sandbox_status(status).await?.into_inner().status.context("no status")?;
    ensure!(status.metadata == Some(metadata) && status.labels == pod_config.labels, "{status:?}");

    let config = v1::ContainerConfig {
        metadata: Some(v1::ContainerMetadata { name: "c".to_owned(), attempt: 0 }),
        image: Some(image),
        command: ["sh", "-c", "exit 7"].map(str::to_owned).into(),
        log_path: "c.log".to_owned(),
        ..Default::default()
    };
    let create = v1::CreateContainerRequest {
        pod_sandbox_id: pod.clone(),
        config: Some(config),
        sandbox_config: Some(pod_config),
    };
    let container = runtime.create_container(create).await?.into_inner().container_id;
    runtime.start_container(v1::StartContainerRequest { container_id: container.clone() }).await?;
    podvisor_tests::eventually("the container exits", async || {
        let request = v1::ContainerStatusRequest { container_id: container.clone(), verbose: false };
        let status =
            runtime.clone().container_status(request).await?.into_inner().status.context("no status")?;
        ensure!(status.state() == v1::ContainerState::ContainerExited && status.exit_code == 7, "{status:?}");
        Ok(())
    })
    .await?;
    runtime.stop_pod_sandbox(v1::StopPodSandboxRequest { pod_sandbox_id: pod.clone() }).await?;
    runtime.remove_pod_sandbox(v1::RemovePodSandboxRequest { pod_sandbox_id: pod }).await?;
    let gone = runtime.list_containers(v1::ListContainersRequest::default()).await?.into_inner().containers;
    ensure!(gone.is_empty(), "{gone:?}");
    Ok(())
}
