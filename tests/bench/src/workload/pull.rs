//! Images that are not there yet, or not wholly, and their removal.

use std::path::Path;
use std::time::{Duration, Instant};

use anyhow::Result;
use futures_util::future::try_join_all;

use crate::images::{self, APPLICATION, RANDOM, TEN, reference};
use crate::process;
use crate::subject::Subject;
use crate::wire::Sample;

/// An image that is pulled as a whole, and what its time is called.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Whole {
    pub(crate) repository: &'static str,
    pub(crate) tag: &'static str,
    pub(crate) series: &'static str,
}

pub(super) const GZIP: Whole = Whole { repository: APPLICATION, tag: "gzip", series: "pull" };
pub(super) const ZSTD: Whole = Whole { repository: APPLICATION, tag: "zstd", series: "pull, zstd" };
pub(super) const INCOMPRESSIBLE: Whole =
    Whole { repository: RANDOM, tag: "gzip", series: "pull, incompressible" };

pub(super) async fn whole(subject: &Subject, image: Whole) -> Result<Vec<Sample>> {
    let Whole { repository, tag, series } = image;
    let image = &reference(repository, tag);
    let daemon = subject.daemon()?;
    let (memory, worked) = (process::forget_peak(daemon)?, process::processor_time(&[daemon])?);
    let pulled = pull(subject, image).await?;
    let worked = process::processor_time(&[daemon])?.saturating_sub(worked);
    let memory = process::peak(daemon)? - memory;
    let removed = remove(subject, image).await?;
    Ok(vec![
        Sample::new(series, "s", pulled.as_secs_f64()),
        Sample::new(&format!("{series}, processor time"), "s", worked.as_secs_f64()),
        Sample::new(&format!("{series}, memory at its peak over before"), "MiB", memory / 1024.0),
        Sample::milliseconds(&format!("{series}: RemoveImage"), removed),
    ])
}

/// An image whose first four layers are there already, as another one's.
pub(super) async fn half(subject: &Subject) -> Result<Vec<Sample>> {
    let (base, image) = (reference(APPLICATION, images::BASE), reference(APPLICATION, "gzip"));
    pull(subject, &base).await?;
    let pulled = pull(subject, &image).await?;
    remove(subject, &image).await?;
    remove(subject, &base).await?;
    Ok(vec![Sample::new("pull, half is there", "s", pulled.as_secs_f64())])
}

/// Ten images at once, each with four layers that all have and one of its own.
pub(super) async fn ten(subject: &Subject) -> Result<Vec<Sample>> {
    let names: Vec<String> = (0..10).map(|number| reference(TEN, &number.to_string())).collect();
    let before = used()?;
    let began = Instant::now();
    try_join_all(names.iter().map(|name| subject.cri.pull(name))).await?;
    let pulled = began.elapsed();
    let disk = used()? - before;
    for name in &names {
        remove(subject, name).await?;
    }
    Ok(vec![
        Sample::new("pull of ten similar images at once", "s", pulled.as_secs_f64()),
        Sample::new("disk used by ten similar images", "MiB", disk),
    ])
}

async fn pull(subject: &Subject, image: &str) -> Result<Duration> {
    let began = Instant::now();
    subject.cri.pull(image).await?;
    Ok(began.elapsed())
}

async fn remove(subject: &Subject, image: &str) -> Result<Duration> {
    let began = Instant::now();
    subject.cri.remove_image(image).await?;
    let time = began.elapsed();
    // What one has left to be written is not the other's to wait for.
    rustix::fs::sync();
    Ok(time)
}

/// MiB in use on the file system that the daemon keeps images on.
fn used() -> Result<f64> {
    let state = rustix::fs::statvfs(Path::new(&std::env::temp_dir()))?;
    let blocks = state.f_blocks - state.f_bfree;
    #[allow(clippy::cast_precision_loss)] // far from 2^52 bytes
    Ok((blocks * state.f_frsize) as f64 / f64::from(1 << 20))
}
