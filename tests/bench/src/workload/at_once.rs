//! Ten pods at the same time, until the last one runs; then what is held for them.

use std::time::Instant;

use anyhow::Result;
use podvisor_tests::ask;
use podvisor_tests::memory::Memory;

use super::{remove, running};
use crate::subject::Subject;
use crate::wire::Sample;

const PODS: u32 = 10;

pub(super) async fn run(subject: &Subject, round: u32) -> Result<Vec<Sample>> {
    let began = Instant::now();
    let container = ask::waiting("c");
    let pods = (0..PODS).map(async |number| {
        Ok::<_, anyhow::Error>(running(subject, &format!("once{round}-{number}"), &container).await?.0)
    });
    let pods = futures_util::future::try_join_all(pods).await?;
    let mut samples = vec![Sample::milliseconds("ten at once", began.elapsed())];
    let (mut private, mut proportional) = (0.0, 0.0);
    for pid in subject.helpers()? {
        let memory = Memory::of(pid)?;
        private += f64::from(memory.private);
        proportional += f64::from(memory.proportional);
    }
    for (series, kib) in [("helpers of a pod, private", private), ("helpers of a pod, PSS", proportional)] {
        samples.push(Sample::new(series, "KiB", kib / f64::from(PODS)));
    }
    let mut resident = 0.0;
    for pid in subject.daemon() {
        resident += f64::from(Memory::of(pid)?.private) / 1024.0;
    }
    samples.push(Sample::new("daemon with ten pods, private", "MiB", resident));
    futures_util::future::try_join_all(pods.iter().map(|pod| remove(subject, pod))).await?;
    Ok(samples)
}
