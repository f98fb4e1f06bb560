//! What the daemon and an idle pod in a virtual machine hold and do, moment by moment. How fast they are is `make bench`'s (tests/bench).
//!
//! To be run in a sandbox (`make bench-idle`). The arguments `memory` and `machine` measure only that; `clock`, which takes eleven minutes, is
//! measured only when it is asked for.

mod machine;

use std::fs;
use std::path::Path;
use std::sync::Arc;
use std::time::{Duration, Instant};

use anyhow::{Context, Result};
use podvisor_critest::node::Options;
use podvisor_proto::cri::{
    ImageFsInfoRequest, ListContainerStatsRequest, ListImagesRequest, ListPodSandboxStatsRequest,
    StatusRequest,
};
use podvisor_tests::images::{BUSYBOX, TestImages};
use podvisor_tests::memory::Memory;
use podvisor_tests::{Fixture, ask};

const AT_ONCE: usize = 10;
/// Pods that come and go between two looks at the daemon's memory.
const PODS: usize = 50;

fn main() -> Result<()> {
    let runtime = tokio::runtime::Builder::new_multi_thread().worker_threads(2).enable_all().build()?;
    let images = Arc::new(TestImages::serve()?);
    let only = std::env::args().nth(1);
    let wanted = |what: &str| only.as_ref().is_none_or(|only| only == what);
    if wanted("memory") {
        runtime.block_on(memory(&images)).context("measuring memory")?;
    }
    if wanted("machine") {
        runtime.block_on(Box::pin(machine::measure(&images))).context("measuring a virtual machine")?;
    }
    // Takes longer than all the rest, so only when it is asked for.
    if only.as_deref() == Some("clock") {
        runtime.block_on(Box::pin(machine::clock(&images))).context("measuring a guest's clock")?;
    }
    Ok(())
}

/// The daemon's memory: what it holds while there is nothing to do for it, before its first pod and after many.
async fn memory(images: &Arc<TestImages>) -> Result<()> {
    const IDLE: Duration = Duration::from_secs(60);
    let options = Options { log: "info".to_owned(), ..Options::default() };
    let mut f = Fixture::with(images, options)?;
    let pid = f.daemon()?.pid().as_raw_nonzero().get();
    println!("the daemon's memory in MiB      resident = own + of files; private, proportional");
    let look = |when: &str| {
        let memory = Memory::of(pid)?;
        let Memory { resident, anonymous, file, private, proportional } = memory;
        let [resident, anonymous, file, private, proportional] =
            [resident, anonymous, file, private, proportional].map(|kib| f64::from(kib) / 1024.0);
        println!("  {when:<29} {resident:8.1} {anonymous:5.1} {file:10.1} {private:8.1} {proportional:13.1}");
        keep_map(pid, when)
    };
    look("started")?;
    tokio::time::sleep(IDLE).await;
    look("idle")?;
    asked_by_kubelet(&f, IDLE).await?;
    look("asked by kubelet")?;
    f.cri.pull(BUSYBOX).await?;
    for batch in 0..PODS / AT_ONCE {
        let fixture = &f;
        let pods = (0..AT_ONCE).map(|number| async move {
            let pod = fixture.pod(&format!("memory{batch}-{number}")).await?;
            let container = pod.start(&ask::waiting("c")).await?;
            fixture.cri.exec(&container, &["true"], 10).await?;
            anyhow::Ok(pod.id)
        });
        for pod in futures_util::future::try_join_all(pods).await? {
            f.cri.stop_pod(&pod).await?;
            f.cri.remove_pod(&pod).await?;
        }
    }
    look("fifty pods came and went")?;
    tokio::time::sleep(IDLE).await;
    look("idle again")?;
    asked_by_kubelet(&f, IDLE).await?;
    look("asked by kubelet again")?;
    f.finish().await
}

/// What kubelet asks of a node where nothing happens, at its intervals.
async fn asked_by_kubelet(f: &Fixture, time: Duration) -> Result<()> {
    let began = Instant::now();
    let (mut runtime, mut images) = (f.cri.runtime.clone(), f.cri.images.clone());
    for second in 0.. {
        f.cri.pods().await?;
        f.cri.containers().await?;
        if second % 5 == 0 {
            runtime.status(StatusRequest::default()).await?;
        }
        if second % 10 == 0 {
            runtime.list_pod_sandbox_stats(ListPodSandboxStatsRequest::default()).await?;
            runtime.list_container_stats(ListContainerStatsRequest::default()).await?;
            images.image_fs_info(ImageFsInfoRequest {}).await?;
        }
        if second % 30 == 0 {
            images.list_images(ListImagesRequest::default()).await?;
        }
        if began.elapsed() > time {
            break;
        }
        tokio::time::sleep(Duration::from_secs(1)).await;
    }
    Ok(())
}

/// With `PODVISOR_IDLE_MAPS=DIRECTORY`: keeps what /proc says of every mapping, to see what the memory is.
fn keep_map(pid: i32, when: &str) -> Result<()> {
    let Some(directory) = std::env::var_os("PODVISOR_IDLE_MAPS") else { return Ok(()) };
    let map = fs::read(format!("/proc/{pid}/smaps"))?;
    Ok(fs::write(Path::new(&directory).join(when.replace(' ', "-")), map)?)
}
