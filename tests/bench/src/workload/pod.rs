//! A pod with one container, one call after the other, as kubelet makes them.

use std::time::{Duration, Instant};

use anyhow::Result;
use podvisor_tests::ask;

use crate::subject::Subject;
use crate::wire::Sample;

/// A shell that ends at SIGTERM, and says when it does: a first process without a handler does not hear of it.
const OBEYS: &str = "trap 'exit 0' TERM; touch /dev/shm/up; while :; do sleep 1000 & wait; done";
const UP: [&str; 3] = ["sh", "-c", "until test -e /dev/shm/up; do sleep 0.01; done"];

pub(super) async fn run(subject: &Subject, round: u32) -> Result<Vec<Sample>> {
    let cri = &subject.cri;
    let config = ask::pod(&format!("pod{round}"), subject.logs());
    std::fs::create_dir_all(&config.log_directory)?;
    let container = super::as_kubelet(ask::script("c", OBEYS));
    let mut laps = Laps::default();
    let pod = laps.time("RunPodSandbox", Box::pin(cri.run_pod(&config))).await?;
    let container = laps.time("CreateContainer", Box::pin(cri.create(&pod, &container, &config))).await?;
    laps.time("StartContainer", cri.start(&container)).await?;
    laps.sum("start");
    laps.time("ExecSync", cri.exec(&container, &["true"], 10)).await?;
    cri.exec(&container, &UP, 10).await?;
    laps.sum = Duration::ZERO;
    laps.time("StopContainer", cri.stop(&container, 30)).await?;
    laps.time("StopPodSandbox", cri.stop_pod(&pod)).await?;
    laps.sum("stop");
    laps.time("RemoveContainer", cri.remove(&container)).await?;
    laps.time("RemovePodSandbox", cri.remove_pod(&pod)).await?;
    laps.sum("remove");
    Ok(laps.samples)
}

/// Times of calls, and their sums.
#[derive(Debug, Default)]
struct Laps {
    samples: Vec<Sample>,
    sum: Duration,
}

impl Laps {
    async fn time<T, E>(&mut self, series: &str, call: impl Future<Output = Result<T, E>>) -> Result<T, E> {
        let began = Instant::now();
        let answer = call.await?;
        let time = began.elapsed();
        self.samples.push(Sample::milliseconds(series, time));
        self.sum += time;
        Ok(answer)
    }

    /// Of all since the last sum.
    fn sum(&mut self, series: &str) {
        self.samples.push(Sample::milliseconds(series, std::mem::take(&mut self.sum)));
    }
}
