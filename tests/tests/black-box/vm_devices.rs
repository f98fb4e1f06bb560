//! What pods in virtual machines are given: block volumes, memory and processors while they run, a network with rules of its own.

use std::fs;
use std::path::Path;

use anyhow::{Context, Result, ensure};
use podvisor_critest::node::{Options, VM};
use podvisor_proto::cri::{
    ContainerConfig, Device, LinuxContainerResources, UpdatePodSandboxResourcesRequest,
};
use podvisor_tests::{BlockVolume, Fixture, ask, eventually};
use rustix::fs::{CWD, FileType, Mode, makedev, mknodat};
use tonic::{Code, Status};

use super::Tests;

pub(crate) fn add(tests: &mut Tests) {
    let options = || Options { handler: VM.to_owned(), ..Options::default() };
    tests.add_with("vm_devices::block_volumes_come_and_go", options(), block_volumes_come_and_go);
    let cni = Options { network: "cni".to_owned(), ..options() };
    tests.add_with("vm_devices::rules_and_tables_are_the_guests", cni, rules_and_tables_are_the_guests);
    tests.add_with("vm_devices::machines_grow_and_shrink", options(), machines_grow_and_shrink);
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

/// UpdatePodSandboxResources: memory for all containers, MiB, and processors.
async fn resize(f: &Fixture, pod: &str, memory: i64, cpus: i64) -> Result<(), Status> {
    let request = UpdatePodSandboxResourcesRequest {
        pod_sandbox_id: pod.to_owned(),
        resources: Some(of(memory, cpus)),
        ..Default::default()
    };
    f.cri.runtime.clone().update_pod_sandbox_resources(request).await.map(drop)
}

fn of(memory: i64, cpus: i64) -> LinuxContainerResources {
    LinuxContainerResources {
        memory_limit_in_bytes: memory << 20,
        cpu_period: 100_000,
        cpu_quota: cpus * 100_000,
        ..Default::default()
    }
}

/// MiB and processors, as `crictl inspectp` shows them.
async fn shown(f: &Fixture, pod: &str) -> Result<(u64, u64)> {
    let machine = super::vm::machine(f, pod).await?;
    let number = |name: &str| machine[name].as_u64().with_context(|| format!("no {name} in {machine}"));
    Ok((number("memoryBytes")? >> 20, number("cpus")?))
}

async fn machines_grow_and_shrink(f: &mut Fixture) -> Result<()> {
    const RESERVE: u64 = 128;
    f.cri.pull(podvisor_tests::images::BUSYBOX).await?;
    let mut config = f.ask_pod("pod");
    config.linux.get_or_insert_default().resources = Some(of(256, 1));
    let pod = f.run(config).await?;
    let container = pod.start(&ask::waiting("c")).await?;
    let cri = f.cri.clone();
    let run = async |script: &str| cri.output(&container, &["sh", "-c", script]).await;
    // A block of that size has to be in memory at once.
    let hungry = "dd if=/dev/zero of=/dev/null bs=500M count=1 2>/dev/null && echo done || echo failed";
    ensure!(shown(f, &pod.id).await? == (256 + RESERVE, 1));
    ensure!(run("nproc").await? == "1\n");
    ensure!(run(hungry).await? == "failed\n");

    resize(f, &pod.id, 1024, 2).await?;
    ensure!(shown(f, &pod.id).await? == (1024 + RESERVE, 2), "{:?}", shown(f, &pod.id).await?);
    ensure!(run("nproc").await? == "2\n");
    ensure!(run(hungry).await? == "done\n");

    // What cannot be had changes nothing, whichever part of it it is.
    let refused = resize(f, &pod.id, 1 << 30, 1).await.err().context("a pebibyte was there")?;
    ensure!(refused.code() == Code::FailedPrecondition, "{refused}");
    let holding =
        "dd if=/dev/zero of=/dev/null bs=500M count=100000 2>/dev/null </dev/null & echo $! >/tmp/holding";
    run(holding).await?;
    eventually("the memory is in use", || async {
        let size = run("awk '/VmRSS/ { print $2 }' /proc/$(cat /tmp/holding)/status").await?;
        ensure!(size.trim().parse::<u64>()? > 480_000, "{size}");
        Ok(())
    })
    .await?;
    let refused = resize(f, &pod.id, 256, 1).await.err().context("what is in use was taken away")?;
    ensure!(refused.message().contains("the containers use"), "{refused}");
    ensure!(shown(f, &pod.id).await? == (1024 + RESERVE, 2));
    ensure!(run("nproc; kill $(cat /tmp/holding)").await? == "2\n");

    // As far as the guest gives memory back, which is told.
    eventually("the memory is free", || async {
        resize(f, &pod.id, 256, 1).await?;
        Ok(())
    })
    .await?;
    let (memory, cpus) = shown(f, &pod.id).await?;
    ensure!((256 + RESERVE..1024 + RESERVE).contains(&memory) && cpus == 1, "{memory} {cpus}");
    ensure!(run("nproc").await? == "1\n");
    f.kill()?;
    f.start()?;
    ensure!(shown(f, &pod.id).await? == (memory, cpus));
    resize(f, &pod.id, 512, 1).await?;
    ensure!(shown(f, &pod.id).await? == (512 + RESERVE, 1));
    Ok(())
}

/// A CNI plugin (sbr) that moves the pod's routes into a table of their own, with a rule that leads there.
async fn rules_and_tables_are_the_guests(f: &mut Fixture) -> Result<()> {
    let directory = f.node.path("cni/net.d");
    fs::create_dir_all(&directory)?;
    let list = serde_json::json!({ "cniVersion": "1.0.0", "name": "rules", "plugins": [
        { "type": "ptp", "mtu": 1400,
          "ipam": { "type": "host-local", "dataDir": f.node.path("ipam"),
                    "ranges": [[{ "subnet": "10.77.0.0/24" }], [{ "subnet": "fd00:77::/64" }]],
                    "routes": [{ "dst": "0.0.0.0/0" }, { "dst": "::/0" }] } },
        { "type": "sbr" },
    ] });
    fs::write(directory.join("10-rules.conflist"), list.to_string())?;
    f.cri.pull(podvisor_tests::images::BUSYBOX).await?;
    eventually("the network is ready", || async {
        let status = f.cri.runtime.clone().status(podvisor_proto::cri::StatusRequest::default()).await?;
        let status = status.into_inner().status.context("no status")?;
        let ready = status.conditions.iter().all(|condition| condition.status);
        ensure!(ready, "{:?}", status.conditions);
        Ok(())
    })
    .await?;
    let (pod, container) = f.running("pod", &ask::waiting("c")).await?;
    let run = async |script: &str| f.cri.output(&container, &["sh", "-c", script]).await;
    let address = f.cri.pod_status(&pod.id).await?.network.context("no network")?.ip;
    let rules = run("ip rule; ip -6 rule").await?;
    ensure!(rules.contains(&format!("from {address} lookup 100")), "{rules}");
    ensure!(rules.contains("from fd00:77::2 lookup 10"), "{rules}");
    let routes = run("ip route show table 100; ip route show").await?;
    ensure!(routes.contains("default via 10.77.0.1"), "{routes}");
    ensure!(run("cat /sys/class/net/eth0/mtu").await? == "1400\n");
    // Only for what has the pod's address there is a way.
    for (own, gateway) in [(address.as_str(), "10.77.0.1"), ("fd00:77::2", "fd00:77::1")] {
        let pinged = run(&format!("ping -c 1 -W 10 -I {own} {gateway} >/dev/null && echo reached")).await?;
        ensure!(pinged == "reached\n", "{gateway}: {pinged}");
    }
    Ok(())
}
