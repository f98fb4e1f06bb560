//! A disk that is full and one that is read-only: an error that says so, nothing half made, what runs goes on, and pods can be stopped
//! and removed, because that is what makes room.

use std::fs;
use std::io::Write;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result, ensure};
use podvisor_proto::cri::{ContainerState, PodSandboxConfig, PodSandboxState};
use podvisor_tests::images::BUSYBOX;
use podvisor_tests::world::World;
use podvisor_tests::{Fixture, Tests, ask, eventually};
use rustix::mount::{MountFlags, UnmountFlags, mount, mount_bind, mount_remount, unmount};
use tonic::Code;

pub(crate) fn add(tests: &mut Tests) {
    tests.add("disk::full", full);
    tests.add("disk::full_at_a_start", full_at_a_start);
    tests.add("disk::read_only", read_only);
}

/// A file system of some MiB at a directory; unmounted at the end.
struct Small(PathBuf);

impl Small {
    fn mount(path: &Path) -> Result<Self> {
        fs::create_dir_all(path)?;
        mount("small", path, "tmpfs", MountFlags::empty(), c"size=24m")?;
        Ok(Self(path.to_owned()))
    }

    /// Writes until nothing more can be written.
    fn fill(&self) -> Result<()> {
        let mut file = fs::File::create(self.0.join("ballast"))?;
        let mut size = 1 << 20;
        while size > 0 {
            match file.write(&vec![0; size]) {
                Ok(1..) => {}
                _ => size /= 2,
            }
        }
        Ok(())
    }

    fn make_room(&self) -> Result<()> {
        Ok(fs::remove_file(self.0.join("ballast"))?)
    }
}

impl Drop for Small {
    fn drop(&mut self) {
        let _ = unmount(&self.0, UnmountFlags::DETACH);
    }
}

/// A node whose state is on a small disk, with a pod whose logs are there too.
fn on_a_small_disk(f: &mut Fixture) -> Result<Small> {
    f.stop()?;
    let disk = Small::mount(&f.node.path("root"))?;
    f.start()?;
    Ok(disk)
}

fn logging_there(f: &Fixture, name: &str) -> PodSandboxConfig {
    ask::pod(name, &f.node.path("root/logs"))
}

/// After this the node has its own disk again.
fn give_back(f: &mut Fixture, disk: Small) -> Result<()> {
    f.stop()?;
    drop(disk);
    f.start()
}

async fn full(f: &mut Fixture) -> Result<()> {
    let disk = on_a_small_disk(f)?;
    f.cri.pull(BUSYBOX).await?;
    let before = World::now();
    let pod = f.run(logging_there(f, "before")).await?;
    let counting =
        ask::script("c", "trap 'exit 0' TERM; i=0; while :; do echo $i; i=$((i+1)); sleep 0.01; done");
    let id = pod.start(&counting).await?;
    let created = pod.create(&ask::waiting("created")).await?;
    disk.fill()?;
    let during = World::now();

    let config = f.ask_pod("none");
    let error = f.cri.run_pod(&config).await.err().context("a sandbox on a full disk")?;
    ensure!(error.code() == Code::ResourceExhausted, "{error:?}");
    let error = f
        .cri
        .create(&pod.id, &ask::waiting("none"), &pod.config)
        .await
        .err()
        .context("a container on a full disk")?;
    ensure!(error.code() == Code::ResourceExhausted, "{error:?}");
    eventually("nothing half made is left", || async { World::now().things_since(&during) }).await?;
    ensure!(f.cri.pods().await?.len() == 1 && f.cri.containers().await?.len() == 2);
    // What runs does so still; lines of its log are lost, and that is said as soon as there is room.
    ensure!(f.cri.output(&id, &["echo", "there"]).await? == "there\n");
    let error = f.cri.start(&created).await.err().context("a start that cannot be recorded")?;
    ensure!(error.code() == Code::ResourceExhausted, "{error:?}");
    ensure!(f.cri.status(&created).await?.state() == ContainerState::ContainerExited);
    disk.make_room()?;
    eventually("the log says what it lost, or lost nothing", || async {
        let log = pod.log("c.log")?;
        let lines = log.stdout().lines().count();
        ensure!(
            log.stderr().contains("could not be written")
                || log.stdout() == podvisor_tests::fixture::numbered("", 0..lines)
        );
        Ok(())
    })
    .await?;
    disk.fill()?;

    f.cri.stop(&id, 10).await?;
    ensure!(f.cri.status(&id).await?.exit_code == 0);
    f.cri.remove(&id).await?;
    f.cri.stop_pod(&pod.id).await?;
    ensure!(f.cri.pod_status(&pod.id).await?.state() == PodSandboxState::SandboxNotready);
    f.cri.remove_pod(&pod.id).await?;
    ensure!(f.cri.pods().await?.is_empty() && f.cri.containers().await?.is_empty());
    eventually("nothing is left", || async { World::now().things_since(&before) }).await?;
    disk.make_room()?;
    // And with room everything works again.
    let pod = f.pod("after").await?;
    pod.start(&ask::waiting("c")).await?;
    f.cri.stop_pod(&pod.id).await?;
    f.cri.remove_pod(&pod.id).await?;
    give_back(f, disk)
}

/// A daemon that is started on a full disk takes over its pods and can stop and remove them.
async fn full_at_a_start(f: &mut Fixture) -> Result<()> {
    let disk = on_a_small_disk(f)?;
    f.cri.pull(BUSYBOX).await?;
    let pod = f.pod("before").await?;
    let id = pod.start(&ask::waiting("c")).await?;
    disk.fill()?;
    f.kill()?;
    f.start()?;
    ensure!(f.cri.pod_status(&pod.id).await?.state() == PodSandboxState::SandboxReady);
    ensure!(f.cri.output(&id, &["echo", "there"]).await? == "there\n");
    f.cri.stop_pod(&pod.id).await?;
    // Its end could not be written down everywhere: after another start it has ended nevertheless.
    f.kill()?;
    f.start()?;
    ensure!(f.cri.pod_status(&pod.id).await?.state() == PodSandboxState::SandboxNotready);
    let status = f.cri.status(&id).await?;
    ensure!(status.state() == ContainerState::ContainerExited, "{status:?}");
    f.cri.stop_pod(&pod.id).await?;
    f.cri.remove_pod(&pod.id).await?;
    disk.make_room()?;
    give_back(f, disk)
}

async fn read_only(f: &mut Fixture) -> Result<()> {
    f.cri.pull(BUSYBOX).await?;
    let pod = f.pod("before").await?;
    let id = pod.start(&ask::waiting("c")).await?;
    let root = f.node.path("root");
    mount_bind(&root, &root)?;
    mount_remount(&root, MountFlags::BIND | MountFlags::RDONLY, c"")?;
    let cover = Small(root.clone());
    let during = World::now();

    let error = f.cri.run_pod(&f.ask_pod("none")).await.err().context("a sandbox without a record")?;
    ensure!(error.message().contains("Read-only file system"), "{error:?}");
    let error = f.cri.create(&pod.id, &ask::waiting("none"), &pod.config).await;
    let error = error.err().context("a container without a record")?;
    ensure!(error.message().contains("Read-only file system"), "{error:?}");
    eventually("nothing half made is left", || async { World::now().things_since(&during) }).await?;
    ensure!(f.cri.output(&id, &["echo", "there"]).await? == "there\n");
    // What runs can be stopped, but an address that cannot be given back, and a record that cannot be forgotten, are told.
    f.cri.stop(&id, 0).await?;
    ensure!(f.cri.status(&id).await?.exit_code == 137);
    for error in [f.cri.stop_pod(&pod.id).await, f.cri.remove_pod(&pod.id).await] {
        let error = error.err().context("done, and nothing written")?;
        ensure!(error.message().contains("Read-only file system"), "{error:?}");
    }
    ensure!(f.cri.pod_status(&pod.id).await?.state() == PodSandboxState::SandboxNotready);

    // A start says what is wrong, and touches no pod.
    f.kill()?;
    let (mut daemon, _notifications) = f.node.spawn()?;
    let status = daemon.wait(eventually::PATIENCE)?;
    ensure!(!status.success(), "a daemon on a read-only disk");
    let last = f.node.log_tail(3);
    ensure!(last.contains("Read-only file system") && last.contains(&root.display().to_string()), "{last}");
    drop(cover);
    f.start()?;
    ensure!(f.cri.pod_status(&pod.id).await?.state() == PodSandboxState::SandboxNotready);
    f.cri.stop_pod(&pod.id).await?;
    f.cri.remove_pod(&pod.id).await?;
    Ok(())
}
