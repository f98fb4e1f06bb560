//! Pods at the same time, until the last one runs; then what is held for them.

use std::time::Instant;

use anyhow::Result;
use futures_util::future::try_join_all;
use podvisor_tests::ask;

use super::{remove, running};
use crate::process;
use crate::subject::Subject;
use crate::wire::Sample;

pub(super) async fn run(subject: &Subject, count: u32) -> Result<Vec<Sample>> {
    let began = Instant::now();
    let container = ask::waiting("c");
    let pods = (0..count).map(async |number| {
        Ok::<_, anyhow::Error>(running(subject, &format!("once{number}"), &container).await?.0)
    });
    let pods = try_join_all(pods).await?;
    let mut samples = vec![Sample::milliseconds(&format!("{count} at once"), began.elapsed())];
    let (private, proportional) = process::memory(&subject.helpers()?)?;
    for (series, kib) in [("helpers of a pod, private", private), ("helpers of a pod, PSS", proportional)] {
        samples.push(Sample::new(series, "KiB", kib / f64::from(count)));
    }
    let began = Instant::now();
    try_join_all(pods.iter().map(|pod| remove(subject, pod))).await?;
    samples.push(Sample::milliseconds(&format!("{count} stopped and removed at once"), began.elapsed()));
    Ok(samples)
}
