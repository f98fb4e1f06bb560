//! AppArmor as the kernel enforces it: the default profile is on containers that say nothing and takes away what namespaces leave. Run in a
//! sandbox in the lab. (Profiles by name are the conformance suite's.)

use std::sync::Arc;

use anyhow::{Context, Result, ensure};
use podvisor_proto::cri::security_profile::ProfileType;
use podvisor_proto::cri::{Capability, ContainerConfig, NamespaceMode, SecurityProfile, StatusRequest};
use podvisor_tests::images::{BUSYBOX, TestImages};
use podvisor_tests::{Fixture, ask};

#[test]
#[ignore = "runs in the lab: make test-lab"]
fn the_default_profile_confines() {
    crate::run(async {
        let images = Arc::new(TestImages::serve()?);
        let fixture = Fixture::new(&images)?;
        if let Err(error) = confines(&fixture).await {
            return Err(error.context(format!("the daemon's log ends with\n{}\n", fixture.node.log_tail(60))));
        }
        fixture.finish().await
    });
}

/// What would be done to the machine by a container that may mount; the answer is the profile, then what worked of it.
const ATTEMPTS: &str = "cat /proc/self/attr/current; mount -t tmpfs none /tmp 2>/dev/null && echo mounted; \
     head -c 1 /proc/kcore >/dev/null 2>&1 && echo kcore; \
     { echo 50 >/proc/sys/vm/swappiness; } 2>/dev/null && echo swappiness; \
     { echo 10 >/proc/sys/net/ipv4/ip_default_ttl; } 2>/dev/null && echo ttl; touch /root/file && echo file";

/// Nothing is masked or read-only by mounts, so that only the profile is left.
fn mounting(name: &str, profile: Option<ProfileType>) -> ContainerConfig {
    let mut config = ask::script(name, ATTEMPTS);
    let context = ask::context(&mut config);
    context.capabilities = Some(Capability {
        add_capabilities: vec!["SYS_ADMIN".to_owned(), "NET_ADMIN".to_owned(), "SYS_RAWIO".to_owned()],
        ..Capability::default()
    });
    context.apparmor =
        profile.map(|kind| SecurityProfile { profile_type: kind.into(), ..SecurityProfile::default() });
    config
}

async fn confines(fixture: &Fixture) -> Result<()> {
    let status = fixture.cri.runtime.clone().status(StatusRequest { verbose: true }).await?.into_inner();
    let told = status.info.get("config").context("no info")?;
    ensure!(!told.contains("appArmor"), "the default profile was not loaded: {told}");

    fixture.cri.pull(BUSYBOX).await.context("PullImage")?;
    let pod = fixture.pod("confined").await?;
    for (name, profile) in [("silent", None), ("default", Some(ProfileType::RuntimeDefault))] {
        let id = pod.start(&mounting(name, profile)).await?;
        fixture.cri.wait_exited(&id).await?;
        let done = pod.log(&format!("{name}.log"))?.stdout();
        ensure!(done == "podvisor-default (enforce)\nttl\nfile\n", "with the default profile: {done:?}");
    }
    let id = pod.start(&mounting("free", Some(ProfileType::Unconfined))).await?;
    fixture.cri.wait_exited(&id).await?;
    let done = pod.log("free.log")?.stdout();
    ensure!(
        done.starts_with("unconfined\nmounted\n") && done.contains("swappiness\n"),
        "without a profile the same is possible, else this shows nothing: {done:?}"
    );

    // exec is confined too, and what shares a pid namespace can end each other.
    let mut config = fixture.ask_pod("sharing");
    ask::pod_namespaces(&mut config).pid = NamespaceMode::Pod.into();
    ask::pod_context(&mut config).privileged = true;
    let pod = fixture.run(config).await?;
    let mut victim = ask::script("victim", ": the-victim; while :; do sleep 1000 & wait; done");
    ask::container_namespaces(&mut victim).pid = NamespaceMode::Pod.into();
    let victim = pod.start(&victim).await?;
    let mut other = ask::waiting("other");
    ask::container_namespaces(&mut other).pid = NamespaceMode::Pod.into();
    let other = pod.start(&other).await?;
    let output = fixture.cri.output(&other, &["cat", "/proc/self/attr/current"]).await?;
    ensure!(output == "podvisor-default (enforce)\n", "exec runs under {output:?}");
    // A pattern that does not match the command line that it stands in.
    let find =
        "for p in /proc/[0-9]*; do grep -q 'the-[v]ictim' $p/cmdline && kill -KILL ${p#/proc/}; done; true";
    fixture.cri.exec(&other, &["sh", "-c", find], 20).await?;
    fixture.cri.wait_exited(&victim).await?;

    let mut privileged = ask::script("privileged", "cat /proc/self/attr/current");
    ask::context(&mut privileged).privileged = true;
    let id = pod.start(&privileged).await?;
    fixture.cri.wait_exited(&id).await?;
    ensure!(pod.log("privileged.log")?.stdout() == "unconfined\n", "a privileged container is confined");
    Ok(())
}
