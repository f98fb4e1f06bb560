//! The Debian package as an administrator meets it: installed, configured by a drop-in, upgraded under a running pod, purged.

use std::fs;
use std::path::Path;
use std::process::Command;
use std::sync::Arc;

use anyhow::{Context, Result, ensure};
use podvisor_tests::cri::Cri;
use podvisor_tests::fixture::Pod;
use podvisor_tests::images::{BUSYBOX, HOST, TestImages};
use podvisor_tests::{ask, eventually};

use crate::systemd::{UNIT, main_pid, monitors, process_in, systemctl};

const SOCKET: &str = "/run/podvisor/podvisor.sock";

#[test]
#[ignore = "runs in the lab: make test-lab"]
fn is_installed_upgraded_and_purged() {
    crate::run(async {
        let outcome = lifetime().await;
        let log = Command::new("journalctl").args(["--no-pager", "--lines=60", "--unit", UNIT]).output()?;
        outcome.with_context(|| {
            format!("the daemon's log ends with\n{}\n", String::from_utf8_lossy(&log.stdout))
        })
    });
}

/// The package that this variable of tests/lab/test names.
fn package(variable: &str) -> Result<String> {
    std::env::var(variable).with_context(|| format!("{variable} names no package"))
}

/// What a program says on its standard output.
fn said(program: &Path, arguments: &[&str]) -> Result<String> {
    let output = Command::new(program).args(arguments).output();
    let output = output.with_context(|| format!("running {}", program.display()))?;
    let errors = String::from_utf8_lossy(&output.stderr);
    ensure!(output.status.success(), "{} {arguments:?}: {}: {errors}", program.display(), output.status);
    Ok(String::from_utf8_lossy(&output.stdout).trim().to_owned())
}

fn dpkg(arguments: &[&str]) -> Result<String> {
    said(Path::new("dpkg"), arguments)
}

async fn lifetime() -> Result<()> {
    let images = Arc::new(TestImages::serve()?);
    dpkg(&["--install", &package("LAB_PACKAGE")?])?;
    ensure!(systemctl(&["is-active", UNIT])? == "active" && systemctl(&["is-enabled", UNIT])? == "enabled");
    let forward = fs::read_to_string("/proc/sys/net/ipv4/ip_forward")?;
    ensure!(forward.trim() == "1", "pods could not be reached: ip_forward = {forward}");

    // One drop-in, and everything else as it was installed.
    let registries = format!(
        "[[registry]]\nlocation = \"{HOST}\"\n[[registry.mirror]]\nlocation = \"{}\"\ninsecure = true\n",
        images.registry().address()
    );
    fs::create_dir_all("/etc/podvisor/config.toml.d")?;
    fs::write("/etc/podvisor/registries.conf", registries)?;
    // The lab's own root is an overlay, which cannot be the upper layer of another.
    let images_root = tempfile::tempdir_in("/run")?;
    let node = format!(
        "root = {:?}\n[image]\nregistries_conf = \"/etc/podvisor/registries.conf\"\n[network]\nmode = \"builtin\"\n",
        images_root.path().display().to_string()
    );
    fs::write("/etc/podvisor/config.toml.d/node.toml", node)?;
    said(Path::new("/usr/bin/podvisor"), &["config", "validate"])?;
    systemctl(&["restart", UNIT])?;
    let cri = Cri::new(Path::new(SOCKET))?;
    eventually("the daemon serves", || async { Ok(cri.version().await?) }).await?;

    cri.pull(BUSYBOX).await.context("PullImage")?;
    let logs = tempfile::tempdir()?;
    let mut config = ask::pod("packaged", logs.path());
    config.linux.get_or_insert_default().cgroup_parent = "kubepods-podpackaged.slice".to_owned();
    let pod = Pod::known(&cri.run_pod(&config).await.context("RunPodSandbox")?, &config, &cri);
    let container = pod.start(&ask::waiting("waiting")).await?;
    let scope = format!("/kubepods.slice/kubepods-podpackaged.slice/podvisor-{container}.scope");
    let running = process_in(&scope)?;

    // The upgrade of a node that works: another daemon, the same pod.
    let before = main_pid()?;
    dpkg(&["--install", &package("LAB_NEXT_PACKAGE")?])?;
    eventually("another daemon serves", || async {
        ensure!(main_pid()? != before, "it is still process {before}");
        Ok(cri.version().await?)
    })
    .await?;
    ensure!(process_in(&scope)? == running, "the upgrade started the container again");
    ensure!(cri.output(&container, &["echo", "upgraded"]).await?.trim() == "upgraded");
    ensure!(cri.pods().await?.len() == 1);

    cri.stop_pod(&pod.id).await.context("StopPodSandbox")?;
    cri.remove_pod(&pod.id).await.context("RemovePodSandbox")?;
    cri.remove_image(BUSYBOX).await?;
    dpkg(&["--purge", "podvisor"])?;
    eventually("the waiting monitors go", || async {
        let left = monitors();
        ensure!(left.is_empty(), "left: {left:?}");
        Ok(())
    })
    .await?;
    for gone in
        ["/usr/bin/podvisor", "/usr/libexec/podvisor", "/etc/podvisor", "/var/lib/podvisor", "/run/podvisor"]
    {
        ensure!(!Path::new(gone).exists(), "{gone} is left");
    }
    ensure!(systemctl(&["cat", UNIT]).is_err(), "the unit is left");
    clear()
}

/// What a node keeps: others may use it.
fn clear() -> Result<()> {
    said(Path::new("ip"), &["link", "delete", "podvisor0"])?;
    said(Path::new("nft"), &["delete", "table", "inet", "podvisor"])?;
    for pinned in ["/run/netns", "/run/ipcns", "/run/utsns"] {
        said(Path::new("umount"), &[pinned])?;
        fs::remove_dir(pinned)?;
    }
    fs::remove_dir("/run/nri")?;
    Ok(())
}
