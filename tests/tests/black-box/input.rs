//! Bad input: every call answers with the right code, names the field, and changes nothing.

use anyhow::{Context, Result, ensure};
use podvisor_proto::cri::{
    AttachRequest, ContainerConfig, ContainerStatsRequest, CreateContainerRequest, DnsConfig, ExecRequest,
    ImageSpec, ImageStatusRequest, Int64Value, LinuxContainerResources, Mount, NamespaceMode,
    PodSandboxConfig, PodSandboxStatsRequest, PortForwardRequest, PortMapping, PullImageRequest,
    RemoveImageRequest, ReopenContainerLogRequest, RunPodSandboxRequest, UpdateContainerResourcesRequest,
    UpdatePodSandboxResourcesRequest,
};
use podvisor_tests::cri::spec;
use podvisor_tests::images::BUSYBOX;
use podvisor_tests::{Fixture, ask};
use tonic::{Code, Status};

use super::Tests;

pub(crate) fn add(tests: &mut Tests) {
    tests.add("input::of_pods_is_checked", of_pods_is_checked);
    tests.add("input::of_containers_is_checked", of_containers_is_checked);
    tests.add("input::of_images_is_checked", of_images_is_checked);
    tests.add("input::unknown_ids_are_not_found", unknown_ids_are_not_found);
    tests.add("input::stop_and_remove_of_unknown_ids_succeed", stop_and_remove_of_unknown_ids_succeed);
    tests.add("input::empty_ids_are_named", empty_ids_are_named);
    tests.add("input::too_large_is_refused", too_large_is_refused);
}

/// The field that has to be named, and what makes it wrong.
type Case<T> = (&'static str, fn(&mut T));

/// The call has to have been refused as an invalid argument whose message names `field`.
fn refused<T: std::fmt::Debug>(result: Result<T, Status>, field: &str) -> Result<()> {
    let error = result.err().with_context(|| format!("{field} was accepted"))?;
    ensure!(error.code() == Code::InvalidArgument, "{field}: {error:?}");
    // As a word of the interface or of English: `container_id`, `container id`.
    ensure!(error.message().replace(' ', "_").contains(field), "{field} is not in: {}", error.message());
    Ok(())
}

async fn of_pods_is_checked(f: &mut Fixture) -> Result<()> {
    refused(f.cri.runtime.run_pod_sandbox(RunPodSandboxRequest::default()).await, "config")?;
    let cases: [Case<PodSandboxConfig>; 11] = [
        ("metadata", |c| c.metadata = None),
        ("name", |c| c.metadata.get_or_insert_default().name = String::new()),
        ("hostname", |c| c.hostname = "a".repeat(65)),
        ("hostname", |c| c.hostname = "a\nb".to_owned()),
        ("log_directory", |c| c.log_directory = "relative".to_owned()),
        ("log_directory", |c| c.log_directory = "/run/../etc".to_owned()),
        ("container_port", |c| {
            c.port_mappings = vec![PortMapping { container_port: 70_000, ..Default::default() }];
        }),
        ("host_port", |c| {
            c.port_mappings = vec![PortMapping { container_port: 80, host_port: -1, ..Default::default() }];
        }),
        ("dns_config", |c| {
            c.dns_config = Some(DnsConfig {
                servers: vec!["1.2.3.4\nnameserver 6.6.6.6".to_owned()],
                ..Default::default()
            });
        }),
        ("sysctl", |c| {
            c.linux.get_or_insert_default().sysctls =
                [("../../etc/passwd".to_owned(), "1".to_owned())].into();
        }),
        ("run_as_group", |c| ask::pod_context(c).run_as_group = Some(Int64Value { value: 5 })),
    ];
    for (field, change) in cases {
        let mut config = f.ask_pod("bad");
        change(&mut config);
        refused(f.cri.run_pod(&config).await, field)?;
    }
    let mut target = f.ask_pod("target");
    ask::pod_namespaces(&mut target).pid = NamespaceMode::Target.into();
    refused(f.cri.run_pod(&target).await, "pid")?;
    ensure!(f.cri.pods().await?.is_empty(), "a refused pod is listed");
    // Host names with the sysctl's own effect, as kubelet would refuse them too.
    let mut config = f.ask_pod("sysctl-host");
    ask::pod_namespaces(&mut config).network = NamespaceMode::Node.into();
    config.linux.get_or_insert_default().sysctls =
        [("net.ipv4.ip_local_port_range".to_owned(), "4000 5000".to_owned())].into();
    refused(f.cri.run_pod(&config).await, "sysctl")
}

async fn of_containers_is_checked(f: &mut Fixture) -> Result<()> {
    f.cri.pull(BUSYBOX).await?;
    let pod = f.pod("good").await?;
    let request = CreateContainerRequest { pod_sandbox_id: pod.id.clone(), ..Default::default() };
    refused(f.cri.runtime.create_container(request).await, "config")?;
    let mount = |container: &str, host: &str| Mount {
        container_path: container.to_owned(),
        host_path: host.to_owned(),
        ..Mount::default()
    };
    let mounts =
        [mount("", "/tmp"), mount("/tmp", ""), mount("/tmp", "relative"), mount("/a/../../etc", "/tmp")];
    for (field, mount) in ["container_path", "host_path", "host_path"].into_iter().zip(mounts) {
        let mut config = ask::waiting("bad");
        let what = format!("{mount:?}");
        config.mounts = vec![mount];
        refused(f.cri.create(&pod.id, &config, &pod.config).await, field).context(what)?;
    }
    let cases: [Case<ContainerConfig>; 12] = [
        ("metadata", |c| c.metadata = None),
        ("name", |c| c.metadata.get_or_insert_default().name = String::new()),
        ("image", |c| c.image = None),
        ("image", |c| c.image = Some(ImageSpec::default())),
        ("log_path", |c| c.log_path = "../../outside".to_owned()),
        ("run_as_user", |c| ask::context(c).run_as_user = Some(Int64Value { value: -1 })),
        ("run_as_user", |c| ask::context(c).run_as_user = Some(Int64Value { value: 1 << 40 })),
        ("run_as_group", |c| ask::context(c).run_as_group = Some(Int64Value { value: 5 })),
        ("run_as_user", |c| {
            ask::context(c).run_as_user = Some(Int64Value { value: 1 });
            ask::context(c).run_as_username = "root".to_owned();
        }),
        ("stop_signal", |c| c.stop_signal = 4711),
        ("oom_score_adj", |c| ask::resources(c).oom_score_adj = 5000),
        ("target_id", |c| {
            ask::container_namespaces(c).pid = NamespaceMode::Target.into();
            ask::container_namespaces(c).target_id = "f".repeat(64);
        }),
    ];
    for (field, change) in cases {
        let mut config = ask::waiting("bad");
        change(&mut config);
        refused(f.cri.create(&pod.id, &config, &pod.config).await, field)?;
    }
    ensure!(f.cri.containers().await?.is_empty(), "a refused container is listed");
    let error =
        f.cri.create(&"0".repeat(64), &ask::waiting("c"), &pod.config).await.err().context("no pod")?;
    ensure!(error.code() == Code::NotFound, "{error:?}");
    f.cri.stop_pod(&pod.id).await?;
    let error =
        f.cri.create(&pod.id, &ask::waiting("c"), &pod.config).await.err().context("a stopped pod")?;
    ensure!(error.code() == Code::FailedPrecondition, "{error:?}");
    Ok(())
}

async fn of_images_is_checked(f: &mut Fixture) -> Result<()> {
    refused(f.cri.images.pull_image(PullImageRequest::default()).await, "image")?;
    refused(f.cri.images.image_status(ImageStatusRequest::default()).await, "image")?;
    refused(f.cri.images.remove_image(RemoveImageRequest::default()).await, "image")?;
    for name in [
        "",
        "example.invalid/UPPER",
        "a b",
        "../../etc/passwd",
        "host:port/x",
        "x:tag:tag",
        "x@sha256:short",
        "-x/y",
    ] {
        refused(f.cri.pull(name).await, "image").with_context(|| format!("{name:?}"))?;
    }
    let long = "a".repeat(5000);
    refused(f.cri.pull(&long).await, "image")
}

async fn unknown_ids_are_not_found(f: &mut Fixture) -> Result<()> {
    let mut runtime = f.cri.runtime.clone();
    for id in ["0".repeat(64), "abc".to_owned(), "../../../etc".to_owned(), "x".repeat(5000)] {
        let stats = ContainerStatsRequest { container_id: id.clone() };
        let pod_stats = PodSandboxStatsRequest { pod_sandbox_id: id.clone() };
        let cmd = vec!["true".to_owned()];
        let exec = ExecRequest { container_id: id.clone(), cmd, stdout: true, ..Default::default() };
        let attach = AttachRequest { container_id: id.clone(), stdout: true, ..Default::default() };
        let forward = PortForwardRequest { pod_sandbox_id: id.clone(), port: vec![80] };
        let reopen = ReopenContainerLogRequest { container_id: id.clone() };
        let update = UpdateContainerResourcesRequest {
            container_id: id.clone(),
            linux: Some(LinuxContainerResources::default()),
            ..Default::default()
        };
        let errors = [
            ("PodSandboxStatus", f.cri.pod_status(&id).await.err()),
            ("ContainerStatus", f.cri.status(&id).await.err()),
            ("StartContainer", f.cri.start(&id).await.err()),
            ("ExecSync", f.cri.exec(&id, &["true"], 1).await.err()),
            ("ContainerStats", runtime.container_stats(stats).await.err()),
            ("PodSandboxStats", runtime.pod_sandbox_stats(pod_stats).await.err()),
            ("Exec", runtime.exec(exec).await.err()),
            ("Attach", runtime.attach(attach).await.err()),
            ("PortForward", runtime.port_forward(forward).await.err()),
            ("ReopenContainerLog", runtime.reopen_container_log(reopen).await.err()),
            ("UpdateContainerResources", runtime.update_container_resources(update).await.err()),
        ];
        for (call, error) in errors {
            let error = error.with_context(|| format!("{call} of {id} succeeded"))?;
            ensure!(error.code() == Code::NotFound, "{call}: {error:?}");
        }
        let update = UpdatePodSandboxResourcesRequest { pod_sandbox_id: id.clone(), ..Default::default() };
        let error = runtime.update_pod_sandbox_resources(update).await.err().context("updated nothing")?;
        // kubelet takes Unimplemented for "has no such call" and goes on.
        ensure!([Code::NotFound, Code::Unimplemented].contains(&error.code()), "{error:?}");
    }
    Ok(())
}

async fn stop_and_remove_of_unknown_ids_succeed(f: &mut Fixture) -> Result<()> {
    for id in ["0".repeat(64), "abc".to_owned()] {
        f.cri.stop(&id, 1).await?;
        f.cri.remove(&id).await?;
        f.cri.stop_pod(&id).await?;
        f.cri.remove_pod(&id).await?;
    }
    f.cri.images.remove_image(RemoveImageRequest { image: Some(spec("a.example.invalid/b:c")) }).await?;
    Ok(())
}

async fn empty_ids_are_named(f: &mut Fixture) -> Result<()> {
    refused(f.cri.stop("", 1).await, "container_id")?;
    refused(f.cri.remove("").await, "container_id")?;
    refused(f.cri.status("").await, "container_id")?;
    refused(f.cri.start("").await, "container_id")?;
    refused(f.cri.exec("", &["true"], 1).await, "container_id")?;
    refused(f.cri.stop_pod("").await, "sandbox_id")?;
    refused(f.cri.remove_pod("").await, "sandbox_id")?;
    refused(f.cri.pod_status("").await, "sandbox_id")?;
    let (_, id) = f.running("commands", &ask::waiting("c")).await?;
    refused(f.cri.exec(&id, &[], 1).await, "cmd")?;
    refused(f.cri.exec(&id, &["true"], -1).await, "timeout")?;
    refused(f.cri.stop(&id, -1).await, "timeout")?;
    let exec = ExecRequest { container_id: id.clone(), cmd: vec!["true".to_owned()], ..Default::default() };
    refused(f.cri.runtime.exec(exec).await, "stdin")?;
    let exec = ExecRequest {
        container_id: id,
        cmd: vec!["true".to_owned()],
        tty: true,
        stdout: true,
        stderr: true,
        ..Default::default()
    };
    refused(f.cri.runtime.exec(exec).await, "stderr")
}

async fn too_large_is_refused(f: &mut Fixture) -> Result<()> {
    let mut config = f.ask_pod("large");
    config.annotations.insert("large".to_owned(), "x".repeat(20 << 20));
    let error = f.cri.run_pod(&config).await.err().context("20 MiB of annotations were accepted")?;
    // What gRPC itself answers to a message over the limit.
    let codes = [Code::OutOfRange, Code::ResourceExhausted, Code::InvalidArgument];
    ensure!(codes.contains(&error.code()), "{error:?}");
    f.cri.version().await?;
    ensure!(f.cri.pods().await?.is_empty());
    Ok(())
}
