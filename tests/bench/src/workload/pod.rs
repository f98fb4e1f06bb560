//! A pod with one container, one call after the other, as kubelet makes them.

use std::time::Instant;

use anyhow::Result;
use podvisor_tests::ask;

use crate::subject::Subject;
use crate::wire::Sample;

pub(super) async fn run(subject: &Subject, round: u32) -> Result<Vec<Sample>> {
    let cri = &subject.cri;
    let config = ask::pod(&format!("pod{round}"), subject.logs());
    std::fs::create_dir_all(&config.log_directory)?;
    let container = super::as_kubelet(ask::waiting("c"));
    let mut samples = Vec::new();
    let mut last = Instant::now();
    let began = last;
    let mut lap = |series: &str| {
        samples.push(Sample::milliseconds(series, last.elapsed()));
        last = Instant::now();
    };
    let pod = Box::pin(cri.run_pod(&config)).await?;
    lap("RunPodSandbox");
    let container = Box::pin(cri.create(&pod, &container, &config)).await?;
    lap("CreateContainer");
    cri.start(&container).await?;
    lap("StartContainer");
    let start = began.elapsed();
    cri.exec(&container, &["true"], 10).await?;
    lap("ExecSync");
    let began = Instant::now();
    cri.stop(&container, 30).await?;
    lap("StopContainer");
    cri.stop_pod(&pod).await?;
    lap("StopPodSandbox");
    let stop = began.elapsed();
    let began = Instant::now();
    cri.remove(&container).await?;
    lap("RemoveContainer");
    cri.remove_pod(&pod).await?;
    lap("RemovePodSandbox");
    for (series, time) in [("start", start), ("stop", stop), ("remove", began.elapsed())] {
        samples.push(Sample::milliseconds(series, time));
    }
    Ok(samples)
}
