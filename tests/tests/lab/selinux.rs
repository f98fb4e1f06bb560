//! SELinux as the kernel enforces it: what containers and their files are labelled as, and that a pod's level keeps others out. Run in a
//! sandbox in the lab, with the policy of `lab/selinux.cil`.

use std::collections::BTreeSet;
use std::fs;
use std::path::Path;
use std::sync::Arc;

use anyhow::{Context, Result, ensure};
use podvisor_proto::cri::{ContainerConfig, Mount, NamespaceMode, SeLinuxOption};
use podvisor_tests::fixture::Pod;
use podvisor_tests::images::{BUSYBOX, TestImages};
use podvisor_tests::{Fixture, ask};
use tonic::Code;

#[test]
#[ignore = "runs in the lab: make test-lab"]
fn pods_are_kept_apart() {
    crate::run(async {
        let images = Arc::new(TestImages::serve()?);
        let mut fixture = Fixture::new(&images)?;
        if let Err(error) = labels(&mut fixture).await {
            return Err(error.context(format!("the daemon's log ends with\n{}\n", fixture.node.log_tail(60))));
        }
        fixture.finish().await
    });
}

const OWN: &str = "/proc/self/attr/current";

fn options(kind: &str, level: &str) -> SeLinuxOption {
    SeLinuxOption { r#type: kind.to_owned(), level: level.to_owned(), ..SeLinuxOption::default() }
}

/// What a process of a container says that it runs as.
async fn label(f: &Fixture, container: &str) -> Result<String> {
    Ok(f.cri.output(container, &["cat", OWN]).await?.trim_end_matches(['\0', '\n']).to_owned())
}

/// The label of a file as the machine sees it.
fn label_of(path: &Path) -> Result<String> {
    let mut value = [0; 256];
    let length = rustix::fs::getxattr(path, "security.selinux", &mut value)
        .with_context(|| format!("label of {}", path.display()))?;
    Ok(String::from_utf8(value[..length].to_vec())?.trim_end_matches('\0').to_owned())
}

fn level(label: &str) -> Result<&str> {
    label.splitn(4, ':').nth(3).with_context(|| format!("no level in {label}"))
}

fn volume(path: &Path, relabel: bool) -> Mount {
    Mount {
        host_path: path.display().to_string(),
        container_path: "/volume".to_owned(),
        selinux_relabel: relabel,
        ..Mount::default()
    }
}

fn with_volume(name: &str, path: &Path, relabel: bool) -> ContainerConfig {
    ContainerConfig { mounts: vec![volume(path, relabel)], ..ask::waiting(name) }
}

async fn labels(f: &mut Fixture) -> Result<()> {
    f.cri.pull(BUSYBOX).await.context("PullImage")?;
    let shared = f.node.path("volume");
    fs::create_dir_all(shared.join("below"))?;
    fs::write(shared.join("below/file"), "secret\n")?;

    let one = f.pod("one").await?;
    let first = one.start(&with_volume("first", &shared, true)).await?;
    let second = one.start(&with_volume("second", &shared, false)).await?;
    let own = label(f, &first).await?;
    let files = format!("system_u:object_r:container_file_t:{}", level(&own)?);
    ensure!(own.starts_with("system_u:system_r:container_t:s0:c"), "{own}");
    ensure!(label(f, &second).await? == own, "containers of a pod have one level");
    for path in [
        "/",
        "/bin/busybox",
        "/etc/hostname",
        "/etc/hosts",
        "/etc/resolv.conf",
        "/dev/shm",
        "/volume/below/file",
    ] {
        let pid = pid(f, &first).await?;
        let seen = label_of(&Path::new(&format!("/proc/{pid}/root")).join(&path[1..]))?;
        ensure!(seen == files, "{path} is {seen}");
    }
    let write = "cat /volume/below/file && echo x >/volume/new && echo x >/etc/hostname && echo x >/dev/shm/x && echo x >/root/x";
    ensure!(f.cri.output(&first, &["sh", "-c", write]).await? == "secret\n");

    other_pods(f, &shared, &own).await?;
    unconfined(f, &own).await?;
    asked_for(f, &one).await?;

    // The levels of those that run are known to the next daemon.
    f.kill()?;
    f.start()?;
    let mut seen = BTreeSet::from([level(&own)?.to_owned()]);
    for number in 0..5 {
        let pod = f.pod(&format!("later-{number}")).await?;
        let id = pod.start(&ask::waiting("waiting")).await?;
        let label = label(f, &id).await?;
        ensure!(seen.insert(level(&label)?.to_owned()), "{label} is another pod's");
    }
    ensure!(label(f, &first).await? == own, "exec after a restart");
    Ok(())
}

/// The first process of a container, on the machine.
async fn pid(f: &Fixture, container: &str) -> Result<i64> {
    let request =
        podvisor_proto::cri::ContainerStatusRequest { container_id: container.to_owned(), verbose: true };
    let answer = f.cri.runtime.clone().container_status(request).await?.into_inner();
    let info: serde_json::Value = serde_json::from_str(answer.info.get("info").context("no info")?)?;
    info["pid"].as_i64().with_context(|| format!("no pid in {info}"))
}

/// Another pod cannot read what one has, until it is its own.
async fn other_pods(f: &Fixture, shared: &Path, own: &str) -> Result<()> {
    let two = f.pod("two").await?;
    let stranger = two.start(&with_volume("stranger", shared, false)).await?;
    ensure!(level(&label(f, &stranger).await?)? != level(own)?, "two pods have one level");
    let answer = f.cri.exec(&stranger, &["cat", "/volume/below/file"], 20).await?;
    ensure!(
        answer.exit_code != 0 && answer.stdout.is_empty(),
        "another pod's volume can be read: {answer:?}"
    );
    let owner = two.start(&with_volume("owner", shared, true)).await?;
    ensure!(f.cri.output(&owner, &["cat", "/volume/below/file"]).await? == "secret\n");

    // With a user namespace the layers are mounted in another way.
    let mut config = f.ask_pod("users");
    ask::with_user_namespace(ask::pod_namespaces(&mut config));
    let pod = f.run(config).await?;
    let mut container = ask::waiting("users");
    ask::with_user_namespace(ask::container_namespaces(&mut container));
    let id = pod.start(&container).await?;
    let label = label(f, &id).await?;
    let root = label_of(Path::new(&format!("/proc/{}/root", pid(f, &id).await?)))?;
    ensure!(level(&root)? == level(&label)?, "{label} has {root}");
    Ok(())
}

/// Privileged, and with the node's pid namespace: what the policy has for those without a label.
async fn unconfined(f: &Fixture, own: &str) -> Result<()> {
    let mut config = f.ask_pod("privileged");
    ask::pod_context(&mut config).privileged = true;
    let pod = f.run(config).await?;
    let mut privileged = ask::waiting("privileged");
    ask::context(&mut privileged).privileged = true;
    ask::context(&mut privileged).selinux_options = Some(options("other_t", ""));
    let id = pod.start(&privileged).await?;
    let seen = label(f, &id).await?;
    ensure!(seen.starts_with("system_u:system_r:spc_t:"), "a privileged container runs as {seen}");
    let beside = pod.start(&ask::waiting("beside")).await?;
    let seen = label(f, &beside).await?;
    ensure!(seen.starts_with("system_u:system_r:container_t:s0:c") && level(&seen)? != level(own)?, "{seen}");

    let mut config = f.ask_pod("of-the-node");
    ask::pod_namespaces(&mut config).pid = NamespaceMode::Node.into();
    let pod = f.run(config).await?;
    for (name, asked, expected) in
        [("plain", None, "spc_t"), ("asking", Some(options("other_t", "")), "other_t")]
    {
        let mut container = ask::waiting(name);
        ask::container_namespaces(&mut container).pid = NamespaceMode::Node.into();
        ask::context(&mut container).selinux_options = asked;
        let id = pod.start(&container).await?;
        let seen = label(f, &id).await?;
        ensure!(seen.starts_with(&format!("system_u:system_r:{expected}:")), "{name} runs as {seen}");
    }
    Ok(())
}

async fn asked_for(f: &Fixture, one: &Pod) -> Result<()> {
    let mut config = f.ask_pod("asking");
    ask::pod_context(&mut config).selinux_options = Some(options("other_t", "s0:c1,c2"));
    let pod = f.run(config).await?;
    let id = pod.start(&ask::waiting("inherits")).await?;
    ensure!(label(f, &id).await? == "system_u:system_r:other_t:s0:c1,c2");
    let mut container = ask::waiting("other");
    ask::context(&mut container).selinux_options = Some(options("container_t", ""));
    let id = pod.start(&container).await?;
    ensure!(label(f, &id).await? == "system_u:system_r:container_t:s0:c1,c2");

    let mut container = ask::waiting("nonsense");
    ask::context(&mut container).selinux_options = Some(options("nonsense_t", ""));
    let refused = f.cri.create(&one.id, &container, &one.config).await.unwrap_err();
    ensure!(refused.code() == Code::InvalidArgument && refused.message().contains("nonsense_t"), "{refused}");
    let mut config = f.ask_pod("nonsense");
    ask::pod_context(&mut config).selinux_options = Some(options("", "s0:c5,c2000"));
    let refused = f.cri.run_pod(&config).await.unwrap_err();
    ensure!(refused.code() == Code::InvalidArgument && refused.message().contains("c2000"), "{refused}");
    let mut container = with_volume("machine", Path::new("/etc"), true);
    container.metadata.as_mut().context("no name")?.name = "machine".to_owned();
    let refused = f.cri.create(&one.id, &container, &one.config).await.unwrap_err();
    ensure!(refused.code() == Code::InvalidArgument && refused.message().contains("/etc"), "{refused}");
    Ok(())
}
