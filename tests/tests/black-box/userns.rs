//! Pods with a user namespace (KEP-127): who is root inside is nobody outside.

use std::collections::HashMap;
use std::fs;
use std::os::unix::fs::MetadataExt;
use std::path::Path;

use anyhow::{Context, Result, ensure};
use podvisor_proto::cri::{
    Capability, ContainerConfig, ContainerStatusRequest, IdMapping, Int64Value, Mount, NamespaceMode,
    NamespaceOption, PodSandboxConfig, PortMapping, RunPodSandboxRequest, RuntimeHandlerFeatures,
    StatusRequest,
};
use podvisor_tests::ask::FIRST_ID;
use podvisor_tests::cri::spec;
use podvisor_tests::fixture::Pod;
use podvisor_tests::images::{ACCOUNTS, BUSYBOX, CONFIGURED};
use podvisor_tests::{Fixture, ask, eventually};
use tonic::Code;

use super::Tests;

pub(crate) fn add(tests: &mut Tests) {
    tests.add("userns::own_everything_of_their_pod", own_everything);
    tests.add("userns::show_volumes_with_their_ids", volumes);
    tests.add("userns::show_images_with_their_ids", images);
    tests.add("userns::share_a_pid_namespace_and_outlive_the_daemon", shared_pid_and_restart);
    tests.add("userns::roll_back_and_reboot", roll_back_and_reboot);
    tests.add("userns::are_refused_with_the_reason", refused);
}

fn ask_pod(f: &Fixture, name: &str) -> PodSandboxConfig {
    let mut config = f.ask_pod(name);
    ask::with_user_namespace(ask::pod_namespaces(&mut config));
    config
}

fn inside(mut config: ContainerConfig) -> ContainerConfig {
    ask::with_user_namespace(ask::container_namespaces(&mut config));
    config
}

/// The pid on the node of a container's first process.
async fn pid(f: &Fixture, container: &str) -> Result<u32> {
    let request = ContainerStatusRequest { container_id: container.to_owned(), verbose: true };
    let info: HashMap<String, String> =
        f.cri.runtime.clone().container_status(request).await?.into_inner().info;
    let info: serde_json::Value = serde_json::from_str(info.get("info").context("no info")?)?;
    Ok(info["pid"].as_u64().context("no pid")?.try_into()?)
}

fn owner(path: impl AsRef<Path>) -> Result<(u32, u32)> {
    let path = path.as_ref();
    let metadata = fs::symlink_metadata(path).with_context(|| format!("looking at {}", path.display()))?;
    Ok((metadata.uid(), metadata.gid()))
}

async fn own_everything(f: &mut Fixture) -> Result<()> {
    f.cri.pull(BUSYBOX).await?;
    let mut config = ask_pod(f, "owner");
    config.port_mappings =
        vec![PortMapping { container_port: 8080, host_port: 18081, ..PortMapping::default() }];
    config.linux.as_mut().context("no linux")?.sysctls = [
        ("net.ipv4.ip_local_port_range".to_owned(), "4000\t5000".to_owned()),
        ("kernel.shm_rmid_forced".to_owned(), "1".to_owned()),
        ("kernel.domainname".to_owned(), "example".to_owned()),
    ]
    .into();
    let pod = f.run(config).await?;
    let server = "trap 'exit 0' TERM; while :; do echo answered | nc -l -p 8080 & wait; done";
    let mut config = inside(ask::script("c", server));
    // The kernel asks for it (sysctl_net.c), in the user namespace that the network belongs to.
    let capabilities = Capability { add_capabilities: vec!["NET_ADMIN".to_owned()], ..Capability::default() };
    ask::context(&mut config).capabilities = Some(capabilities);
    let id = pod.start(&config).await?;
    let sh = async |text: &str| f.cri.output(&id, &["sh", "-c", text]).await;

    // Root inside, by exec too, and nobody outside.
    let map = sh("cat /proc/self/uid_map /proc/self/gid_map; id -u").await?;
    let words: Vec<_> = map.split_whitespace().collect();
    let first = FIRST_ID.to_string();
    ensure!(words == ["0", &first, "65536", "0", &first, "65536", "0"], "{map}");
    let process = pid(f, &id).await?;
    ensure!(owner(format!("/proc/{process}"))? == (FIRST_ID, FIRST_ID), "its process is the node's root's");

    // Root's: the root file system and what podvisor puts into it, which is as writable as without a user namespace.
    let owners =
        sh("stat -c %u:%g / /bin /etc/hosts /etc/hostname /etc/resolv.conf /dev/shm /dev/pts").await?;
    ensure!(owners == "0:0\n".repeat(7), "{owners}");
    sh("echo 10.0.0.1 x >> /etc/hosts && echo x > /dev/shm/x && chown 5:6 /bin/sh /dev/shm/x && echo > /new")
        .await?;
    ensure!(sh("stat -c %u:%g /bin/sh /dev/shm/x /new").await? == "5:6\n5:6\n0:0\n");
    ensure!(sh("dd if=/dev/urandom of=/dev/null bs=1 count=1 2>&1 | tail -1").await?.contains("1 byte"));
    // What the node's root owns is not theirs.
    ensure!(sh("stat -c %u /proc/sys/kernel/panic").await? == "65534\n");

    // The namespaces are the user namespace's: their sysctls were set, and can be set from inside.
    let sysctls = "cd /proc/sys; cat net/ipv4/ip_local_port_range kernel/shm_rmid_forced kernel/domainname; \
         echo 7 > net/ipv4/ip_unprivileged_port_start && cat net/ipv4/ip_unprivileged_port_start";
    let output = sh(sysctls).await?;
    ensure!(output == "4000\t5000\n1\nexample\n7\n", "{output}");
    ensure!(sh("hostname").await? == "owner\n");

    // Its network, from the node and through a port of it.
    let address = f.cri.pod_status(&pod.id).await?.network.context("no network")?.ip;
    for (address, port) in [(address.as_str(), 8080), ("127.0.0.1", 18081)] {
        eventually("the pod answers", || async {
            let mut text = String::new();
            let mut stream = tokio::net::TcpStream::connect((address, port)).await?;
            tokio::io::AsyncReadExt::read_to_string(&mut stream, &mut text).await?;
            ensure!(text == "answered\n", "{address}: {text:?}");
            Ok(())
        })
        .await?;
    }
    let told = f.cri.pod_status(&pod.id).await?.linux.and_then(|linux| linux.namespaces);
    let told = told.and_then(|namespaces| namespaces.options).and_then(|options| options.userns_options);
    ensure!(told.is_some_and(|user| user.uids.len() == 1), "the pod's status does not tell");
    // Stats, log and stop.
    let (output, code) =
        script(&pod, ask::script("log", "echo to the log; cat /proc/self/uid_map | tr -s ' '")).await?;
    ensure!(code == 0 && output == format!("to the log\n 0 {FIRST_ID} 65536\n"), "{code}: {output}");
    f.cri.stop(&id, 10).await?;
    ensure!(f.cri.status(&id).await?.exit_code == 0);
    Ok(())
}

/// Runs a container to its end; its standard output and exit code.
async fn script(pod: &Pod, config: ContainerConfig) -> Result<(String, i32)> {
    let name = config.log_path.clone();
    let id = pod.start(&inside(config)).await?;
    let status = pod.cri.wait_exited(&id).await?;
    let log = pod.log(&name)?;
    ensure!(log.stderr().is_empty(), "{}", log.stderr());
    Ok((log.stdout(), status.exit_code))
}

async fn volumes(f: &mut Fixture) -> Result<()> {
    f.cri.pull(BUSYBOX).await?;
    let pod = f.run(ask_pod(f, "volumes")).await?;
    let volume = f.node.path("volume");
    fs::create_dir_all(&volume)?;
    fs::write(volume.join("root"), "")?;
    fs::write(volume.join("other"), "")?;
    std::os::unix::fs::chown(volume.join("other"), Some(1234), Some(4321))?;
    let open = f.node.path("open");
    fs::create_dir_all(&open)?;
    fs::set_permissions(&open, std::os::unix::fs::PermissionsExt::from_mode(0o777))?;

    let range = vec![IdMapping { host_id: FIRST_ID, container_id: 0, length: 65_536 }];
    let mapped = Mount {
        container_path: "/mapped".to_owned(),
        host_path: volume.display().to_string(),
        uid_mappings: range.clone(),
        gid_mappings: range,
        ..Mount::default()
    };
    let fixed = Mount { container_path: "/fixed".to_owned(), readonly: true, ..mapped.clone() };
    let plain = Mount {
        container_path: "/plain".to_owned(),
        host_path: open.display().to_string(),
        ..Mount::default()
    };
    let mut config = ask::script(
        "root",
        "stat -c %u:%g /mapped/root /mapped/other /plain; touch /mapped/new /plain/new; \
         chown 5:6 /mapped/root; touch /fixed/x 2>/dev/null || echo read-only",
    );
    config.mounts = vec![mapped.clone(), fixed, plain];
    let (output, code) = script(&pod, config).await?;
    ensure!(code == 0 && output == "0:0\n1234:4321\n65534:65534\nread-only\n", "{code}: {output}");
    // With the mapping the ids on the disk are those inside; without it those outside.
    ensure!(owner(volume.join("new"))? == (0, 0) && owner(volume.join("root"))? == (5, 6));
    ensure!(owner(open.join("new"))? == (FIRST_ID, FIRST_ID));

    let mut config = ask::script("user", "touch /mapped/of-user && stat -c %u:%g /mapped/of-user");
    config.mounts = vec![mapped];
    let context = ask::context(&mut config);
    (context.run_as_user, context.run_as_group) =
        (Some(Int64Value { value: 1234 }), Some(Int64Value { value: 4321 }));
    fs::set_permissions(&volume, std::os::unix::fs::PermissionsExt::from_mode(0o777))?;
    let (output, _) = script(&pod, config).await?;
    ensure!(output == "1234:4321\n" && owner(volume.join("of-user"))? == (1234, 4321), "{output}");
    Ok(())
}

async fn images(f: &mut Fixture) -> Result<()> {
    for image in [CONFIGURED, ACCOUNTS] {
        f.cri.pull(image).await?;
    }
    let pod = f.run(ask_pod(f, "images")).await?;
    // A user of the image, and a root file system that is read-only.
    let mut config =
        ask::script("configured", "id -u; id -g; stat -c %u:%g / /home; touch /x 2>/dev/null || echo no");
    config.image = Some(spec(CONFIGURED));
    ask::context(&mut config).readonly_rootfs = true;
    let (output, _) = script(&pod, config).await?;
    ensure!(output == "1000\n2000\n0:0\n0:0\nno\n", "{output}");

    // A volume that the image declares comes with its files.
    let mut config = ask::script(
        "volume",
        "stat -c %u:%g /data /data/file; cat /data/file; chown 7:8 /data/file; echo more > /data/new; stat -c %u:%g /data/file /data/new",
    );
    config.image = Some(spec(ACCOUNTS));
    ask::context(&mut config).run_as_user = Some(Int64Value { value: 0 });
    let (output, _) = script(&pod, config).await?;
    ensure!(output == "0:0\n0:0\nof the image\n7:8\n0:0\n", "{output}");

    // An image as a volume.
    let range = vec![IdMapping { host_id: FIRST_ID, container_id: 0, length: 65_536 }];
    let mut config = ask::script("image", "stat -c %u:%g /image /image/data/file; cat /image/data/file");
    config.image = Some(spec(ACCOUNTS));
    config.mounts = vec![Mount {
        container_path: "/image".to_owned(),
        image: Some(spec(ACCOUNTS)),
        readonly: true,
        uid_mappings: range.clone(),
        gid_mappings: range,
        ..Mount::default()
    }];
    let (output, _) = script(&pod, config).await?;
    ensure!(output == "0:0\n0:0\nof the image\n", "{output}");

    // A pod without a user namespace has the same image as it is.
    let plain = f.pod("plain").await?;
    let mut config = ask::script("plain", "stat -c %u:%g / /data/file");
    config.image = Some(spec(ACCOUNTS));
    let id = plain.start(&config).await?;
    f.cri.wait_exited(&id).await?;
    ensure!(plain.log("plain.log")?.stdout() == "0:0\n0:0\n");
    Ok(())
}

async fn shared_pid_and_restart(f: &mut Fixture) -> Result<()> {
    f.cri.pull(BUSYBOX).await?;
    let mut config = ask_pod(f, "shared");
    ask::pod_namespaces(&mut config).pid = NamespaceMode::Pod.into();
    let pod = f.run(config).await?;
    let container = |name: &str| {
        let mut config = inside(ask::waiting(name));
        ask::container_namespaces(&mut config).pid = NamespaceMode::Pod.into();
        config
    };
    let one = pod.start(&container("one")).await?;
    let look = [
        "sh",
        "-c",
        "readlink /proc/self/ns/user /proc/self/ns/pid /proc/self/ns/net; stat -c %u:%g /proc/1",
    ];
    let first = f.cri.output(&one, &look).await?;
    let outside = fs::read_link("/proc/self/ns/user")?.display().to_string();
    ensure!(!first.contains(&outside), "the node's user namespace: {first}");
    ensure!(f.cri.output(&one, &["cat", "/proc/1/comm"]).await? == "podvisor-init\n");

    f.kill()?;
    f.start()?;
    ensure!(f.cri.output(&one, &look).await? == first, "after a new start of the daemon");
    let two = pod.start(&container("two")).await?;
    ensure!(f.cri.output(&two, &look).await? == first, "a container made by the next daemon is elsewhere");
    let mut joins = inside(ask::waiting("joins"));
    let options = ask::container_namespaces(&mut joins);
    options.pid = NamespaceMode::Target.into();
    options.target_id = two.clone();
    let joins = pod.start(&joins).await?;
    ensure!(f.cri.output(&joins, &look).await? == first);
    f.kill()?;
    f.start()?;
    f.cri.stop_pod(&pod.id).await?;
    ensure!(fs::read_dir("/run/userns")?.next().is_none(), "a pin is left");
    Ok(())
}

async fn roll_back_and_reboot(f: &mut Fixture) -> Result<()> {
    f.cri.pull(BUSYBOX).await?;
    // The kernel refuses the value when the namespaces are there already.
    let mut config = ask_pod(f, "refused");
    config.linux.as_mut().context("no linux")?.sysctls =
        [("kernel.shm_rmid_forced".to_owned(), "nonsense".to_owned())].into();
    let error = f.cri.run_pod(&config).await.err().context("nonsense was taken")?;
    ensure!(error.message().contains("shm_rmid_forced"), "{error:?}");
    ensure!(fs::read_dir("/run/userns")?.next().is_none(), "a pin is left");

    let pod = f.run(ask_pod(f, "reboot")).await?;
    pod.start(&inside(ask::waiting("c"))).await?;
    f.reboot()?;
    eventually("the pins from before are gone", || async {
        ensure!(fs::read_dir("/run/userns")?.next().is_none());
        Ok(())
    })
    .await
}

type Break = fn(&mut NamespaceOption);

async fn refused(f: &mut Fixture) -> Result<()> {
    f.cri.pull(BUSYBOX).await?;
    let status = f.cri.runtime.status(StatusRequest { verbose: true }).await?.into_inner();
    let features = |name: &str| -> RuntimeHandlerFeatures {
        let found = status.runtime_handlers.iter().find(|handler| handler.name == name);
        found.and_then(|handler| handler.features).unwrap_or_default()
    };
    ensure!(features("").user_namespaces && features("runc").user_namespaces);
    ensure!(!features("crun").user_namespaces, "Debian's crun tells nobody its features");
    ensure!(!status.features.unwrap_or_default().user_namespaces_host_network);
    let told = status.info.get("handlers").context("no info about handlers")?;
    ensure!(told.contains("crun does not tell its features"), "{told}");

    let request =
        RunPodSandboxRequest { config: Some(ask_pod(f, "crun")), runtime_handler: "crun".to_owned() };
    let error = f.cri.runtime.run_pod_sandbox(request).await.err().context("a pod that crun cannot run")?;
    ensure!(error.code() == Code::Unimplemented, "{error:?}");
    ensure!(error.message().contains("crun does not tell its features"), "{error:?}");

    let broken: [(&str, Break); 5] = [
        ("network namespace", |options| options.network = NamespaceMode::Node.into()),
        ("pid namespace", |options| options.pid = NamespaceMode::Node.into()),
        ("ipc namespace", |options| options.ipc = NamespaceMode::Node.into()),
        ("uids: has 2 ranges", |options| {
            let uids = &mut options.userns_options.as_mut().expect("asked for").uids;
            uids.push(uids[0]);
        }),
        ("host_id: would make the pod's root the node's", |options| {
            options.userns_options.as_mut().expect("asked for").gids[0].host_id = 0;
        }),
    ];
    for (words, break_it) in broken {
        let mut config = ask_pod(f, "broken");
        break_it(ask::pod_namespaces(&mut config));
        let error = f.cri.run_pod(&config).await.err().with_context(|| words.to_owned())?;
        ensure!(error.code() == Code::InvalidArgument && error.message().contains(words), "{error:?}");
    }
    ensure!(f.cri.pods().await?.is_empty());

    let pod = f.run(ask_pod(f, "containers")).await?;
    let mut other = inside(ask::waiting("other"));
    ask::container_namespaces(&mut other).userns_options.as_mut().context("asked for")?.uids[0].host_id += 1;
    let mut stranger = inside(ask::waiting("stranger"));
    ask::context(&mut stranger).run_as_user = Some(Int64Value { value: 65_536 });
    for (config, words) in
        [(other, "differs from the pod's"), (stranger, "user 65536 is not in the pod's user namespace")]
    {
        let error = f.cri.create(&pod.id, &config, &pod.config).await.err().context("not refused")?;
        ensure!(error.code() == Code::InvalidArgument && error.message().contains(words), "{error:?}");
    }
    let plain = f.pod("plain").await?;
    let error = f.cri.create(&plain.id, &inside(ask::waiting("c")), &plain.config).await.err();
    ensure!(error.is_some_and(|error| error.message().contains("differs from the pod's")));
    Ok(())
}
