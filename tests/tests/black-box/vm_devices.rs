//! What pods in virtual machines are given while they run: block volumes.

use std::fs;
use std::path::Path;

use anyhow::{Context, Result, ensure};
use podvisor_critest::node::{Options, VM};
use podvisor_proto::cri::{ContainerConfig, Device, LinuxContainerResources};
use podvisor_tests::{BlockVolume, Fixture, ask, eventually};
use rustix::fs::{CWD, FileType, Mode, makedev, mknodat};

use super::Tests;

pub(crate) fn add(tests: &mut Tests) {
    let options = || Options { handler: VM.to_owned(), ..Options::default() };
    tests.add_with("vm_devices::block_volumes_come_and_go", options(), block_volumes_come_and_go);
}

fn with(name: &str, devices: &[(&BlockVolume, &str, &str)]) -> ContainerConfig {
    let device = |(volume, place, permissions): &(&BlockVolume, &str, &str)| Device {
        host_path: volume.device().display().to_string(),
        container_path: (*place).to_owned(),
        permissions: (*permissions).to_owned(),
    };
    ContainerConfig { devices: devices.iter().map(device).collect(), ..ask::waiting(name) }
}

/// How many descriptors a process has of a device.
fn opened(pid: i64, device: &Path) -> Result<usize> {
    let links = fs::read_dir(format!("/proc/{pid}/fd"))?.flatten().map(|entry| fs::read_link(entry.path()));
    Ok(links.flatten().filter(|target| target == device).count())
}

async fn block_volumes_come_and_go(f: &mut Fixture) -> Result<()> {
    let [writable, fixed] = ["writable", "fixed"].map(|name| f.node.path(name));
    let writable = BlockVolume::of(&writable, "from the host\n")?;
    let fixed = BlockVolume::of(&fixed, "as it is\n")?;
    let first = with("first", &[(&writable, "/dev/xvda", ""), (&fixed, "/data/fixed", "rm")]);
    let (pod, first) = f.running("pod", &first).await?;
    let cri = f.cri.clone();
    let run = async |container: &str, script: &str| cri.output(container, &["sh", "-c", script]).await;
    let read = |place: &str| format!("head -c 200 {place} | tr -d '\\0'");
    ensure!(run(&first, &read("/dev/xvda")).await? == "from the host\n");
    ensure!(run(&first, &read("/data/fixed")).await? == "as it is\n");
    ensure!(
        run(&first, "test -b /dev/xvda && test -b /data/fixed && blockdev --getsize64 /dev/xvda").await?
            == "1048576\n"
    );
    let refused = run(&first, "echo x >/data/fixed 2>/dev/null || echo refused").await?;
    ensure!(refused == "refused\n", "{refused}");
    // Its limits are changed; that it may use its devices stays.
    let limit = LinuxContainerResources { memory_limit_in_bytes: 64 << 20, ..Default::default() };
    f.cri.update(&first, limit).await?;

    // A container that comes later, after the daemon has been started anew, sees the same device.
    run(&first, "printf 'from the guest\\n' >/dev/xvda").await?;
    f.kill()?;
    f.start()?;
    let second = pod.start(&with("second", &[(&writable, "/dev/block", "rw")])).await?;
    let seen = run(&second, &read("/dev/block")).await?;
    ensure!(seen == "from the guest\n", "{seen:?}");
    f.cri.stop(&second, 1).await?;
    f.cri.remove(&second).await?;
    ensure!(run(&first, &read("/dev/xvda")).await? == "from the guest\n");

    // With the last container that has it a disk leaves the machine, and what was written is on the host.
    let machine = super::vm::info(f, &pod.id).await?["pid"].as_i64().context("no machine")?;
    ensure!(opened(machine, writable.device())? > 0 && opened(machine, fixed.device())? > 0);
    f.cri.stop(&first, 1).await?;
    f.cri.remove(&first).await?;
    eventually("the machine lets go of the devices", || async {
        ensure!(opened(machine, writable.device())? == 0 && opened(machine, fixed.device())? == 0);
        ensure!(writable.text()? == "from the guest\n");
        Ok(())
    })
    .await?;

    // A device that is not there any more, only its node; the other one of the container is let go of.
    let vanished = f.node.path("vanished");
    let (mode, number) = (Mode::RUSR | Mode::WUSR, makedev(240, 0));
    mknodat(CWD, &vanished, FileType::BlockDevice, mode, number)?;
    let mut container = with("gone", &[(&writable, "/dev/a", "")]);
    container.devices.push(Device { host_path: vanished.display().to_string(), ..Default::default() });
    let error = pod.create(&container).await.err().context("a device that is gone was used")?;
    ensure!(
        format!("{error:#}").contains(&format!("open disk 240:0w at {}", vanished.display())),
        "{error:#}"
    );
    fs::remove_file(&vanished)?;
    let error = pod.create(&container).await.err().context("a device without a node was used")?;
    ensure!(format!("{error:#}").contains("config.devices[1].host_path"), "{error:#}");
    eventually("the device that was there is let go of", || async {
        ensure!(opened(machine, writable.device())? == 0);
        Ok(())
    })
    .await?;

    // What a running container has goes with the pod.
    let third = pod.start(&with("third", &[(&writable, "/dev/xvda", "")])).await?;
    run(&third, "printf 'and at the end\\n' >/dev/xvda").await?;
    f.cri.stop_pod(&pod.id).await?;
    ensure!(writable.text()? == "and at the end\n", "{:?}", writable.text()?);
    writable.detach()?;
    ensure!(!writable.is_attached());
    Ok(())
}
