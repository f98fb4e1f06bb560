//! Many pods at once: what lists and status cost meanwhile, what the daemon holds per pod, and whether it lets go of it.

use std::fs;
use std::time::{Duration, Instant};

use anyhow::{Result, ensure};

use crate::cri::Cri;
use crate::images::BUSYBOX;
use crate::memory::Memory;
use crate::{Fixture, ask, eventually};

/// How many pods are started and stopped at the same time.
const AT_ONCE: usize = 4;

/// What a load showed.
#[derive(Debug)]
pub struct Figures {
    /// Times of ListPodSandbox, ListContainers and PodSandboxStatus while pods started and stopped, sorted.
    pub asked: Vec<Duration>,
    /// The daemon's own memory per pod with one container, KiB: pages of its program come and go with work, not with pods.
    pub per_pod: f64,
    /// Open descriptors and threads of the daemon before any pod, with all of them, and after the last.
    pub held: [Held; 3],
}

/// What a process holds.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Held {
    /// Open descriptors.
    pub descriptors: usize,
    /// Threads.
    pub threads: usize,
}

impl Held {
    fn by(pid: i32) -> Result<Self> {
        let count = |what: &str| Ok::<_, anyhow::Error>(fs::read_dir(format!("/proc/{pid}/{what}"))?.count());
        Ok(Self { descriptors: count("fd")?, threads: count("task")? })
    }
}

impl Figures {
    /// The time below which so many of a hundred answers came.
    pub fn percentile(&self, percent: usize) -> Duration {
        self.asked[(self.asked.len() * percent / 100).min(self.asked.len() - 1)]
    }
}

/// Starts `count` pods, a few at a time, and removes them again.
pub async fn run(f: &mut Fixture, count: usize) -> Result<Figures> {
    f.cri.pull(BUSYBOX).await?;
    // One of each first: what is there from the first pod on is no pod's.
    let first = f.pod("first").await?;
    first.start(&ask::waiting("c")).await?;
    f.cri.stop_pod(&first.id).await?;
    f.cri.remove_pod(&first.id).await?;
    let pid = f.daemon()?.pid().as_raw_nonzero().get();
    // Threads that have nothing to do end after some seconds.
    let settled = || async {
        Held::by(pid).and_then(|held| {
            ensure!(held.threads < 12, "{held:?}");
            Ok(held)
        })
    };
    let before = eventually("idle threads end", settled).await?;
    let memory = Memory::of(pid)?.anonymous;

    let asking = Asking::start(f.cri.clone());
    let mut pods = Vec::new();
    for batch in 0..count.div_ceil(AT_ONCE) {
        let fixture = &*f;
        let started = (0..AT_ONCE.min(count - batch * AT_ONCE)).map(|number| async move {
            let pod = fixture.pod(&format!("load{batch}-{number}")).await?;
            pod.start(&ask::waiting("c")).await?;
            anyhow::Ok(pod.id)
        });
        pods.extend(futures_util::future::try_join_all(started).await?);
    }
    let with_all = Held::by(pid)?;
    #[allow(clippy::cast_precision_loss)] // a few hundred pods
    let per_pod = (f64::from(Memory::of(pid)?.anonymous) - f64::from(memory)) / count as f64;
    for batch in pods.chunks(AT_ONCE) {
        let stopped = batch.iter().map(|pod| async {
            f.cri.stop_pod(pod).await?;
            f.cri.remove_pod(pod).await
        });
        futures_util::future::try_join_all(stopped).await?;
    }
    let asked = asking.stop().await?;
    let after = eventually("the daemon lets go of everything", || async {
        let after = Held::by(pid)?;
        ensure!(
            after.descriptors <= before.descriptors && after.threads <= before.threads,
            "{after:?}, before the pods it held {before:?}"
        );
        Ok(after)
    })
    .await?;
    Ok(Figures { asked, per_pod, held: [before, with_all, after] })
}

/// Asks as kubelet's relist does, all the time.
struct Asking {
    stop: tokio::sync::oneshot::Sender<()>,
    task: tokio::task::JoinHandle<Result<Vec<Duration>>>,
}

impl Asking {
    fn start(cri: Cri) -> Self {
        let (stop, mut stopped) = tokio::sync::oneshot::channel();
        let task = tokio::spawn(async move {
            let mut times = Vec::new();
            while stopped.try_recv().is_err() {
                let began = Instant::now();
                let pods = cri.pods().await?;
                times.push(began.elapsed());
                let began = Instant::now();
                cri.containers().await?;
                times.push(began.elapsed());
                if let Some(pod) = pods.last() {
                    let began = Instant::now();
                    // It may be gone by now, which is an answer too.
                    let _ = cri.pod_status(&pod.id).await;
                    times.push(began.elapsed());
                }
                tokio::time::sleep(Duration::from_millis(20)).await;
            }
            times.sort();
            Ok(times)
        });
        Self { stop, task }
    }

    async fn stop(self) -> Result<Vec<Duration>> {
        let _ = self.stop.send(());
        self.task.await?
    }
}
