//! What kubelet asks again and again, on a node where many pods run and some come and go.

use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use anyhow::Result;
use podvisor_proto::cri::ListPodSandboxStatsRequest;
use podvisor_tests::ask;

use super::{remove, running};
use crate::subject::Subject;
use crate::wire::Sample;

/// Pods that stay, with one container each.
const PODS: u32 = 50;
/// Pods that come and go meanwhile, one after the other.
const PASSING: u32 = 10;
/// How often statistics are asked for.
const STATISTICS: u32 = 20;
const PAUSE: Duration = Duration::from_millis(20);

pub(super) async fn run(subject: &Subject) -> Result<Vec<Sample>> {
    let container = ask::waiting("c");
    let mut pods = Vec::new();
    for number in 0..PODS {
        pods.push(running(subject, &format!("stays{number}"), &container).await?.0);
    }
    let mut samples = statistics(subject).await?;
    let over = AtomicBool::new(false);
    let asking = async {
        while !over.load(Ordering::Relaxed) {
            samples.extend(ask(subject, &pods[0]).await?);
            tokio::time::sleep(PAUSE).await;
        }
        Ok::<_, anyhow::Error>(())
    };
    let passing = async {
        for number in 0..PASSING {
            let (pod, _) = running(subject, &format!("passes{number}"), &container).await?;
            remove(subject, &pod).await?;
        }
        over.store(true, Ordering::Relaxed);
        Ok::<_, anyhow::Error>(())
    };
    let (asked, passed) = tokio::join!(asking, passing);
    asked.and(passed)?;
    for pod in &pods {
        remove(subject, pod).await?;
    }
    Ok(samples)
}

/// While no pod comes or goes: CRI-O 1.36.3 ends in a nil pointer of its `StatsForSandboxes` when one goes meanwhile.
async fn statistics(subject: &Subject) -> Result<Vec<Sample>> {
    let mut samples = Vec::new();
    for _ in 0..STATISTICS {
        let began = Instant::now();
        subject.cri.runtime.clone().list_pod_sandbox_stats(ListPodSandboxStatsRequest::default()).await?;
        samples.push(Sample::milliseconds("ListPodSandboxStats", began.elapsed()));
        tokio::time::sleep(PAUSE).await;
    }
    Ok(samples)
}

async fn ask(subject: &Subject, pod: &str) -> Result<Vec<Sample>> {
    let cri = &subject.cri;
    let mut samples = Vec::new();
    let mut last = Instant::now();
    let mut lap = |series: &str| {
        samples.push(Sample::milliseconds(series, last.elapsed()));
        last = Instant::now();
    };
    cri.pods().await?;
    lap("ListPodSandbox");
    cri.containers().await?;
    lap("ListContainers");
    cri.pod_status(pod).await?;
    lap("PodSandboxStatus");
    Ok(samples)
}
