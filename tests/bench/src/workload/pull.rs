//! An image that is not there yet, and its removal.

use std::time::Instant;

use anyhow::Result;

use crate::process;
use crate::subject::Subject;
use crate::wire::Sample;

pub(super) async fn run(subject: &Subject, image: &str, series: &str) -> Result<Vec<Sample>> {
    let before = process::processor_time(&subject.daemon())?;
    let began = Instant::now();
    subject.cri.pull(image).await?;
    let pulled = began.elapsed();
    let worked = process::processor_time(&subject.daemon())?.saturating_sub(before);
    let began = Instant::now();
    subject.cri.remove_image(image).await?;
    let removed = began.elapsed();
    // What one has left to be written is not the other's to wait for.
    rustix::fs::sync();
    Ok(vec![
        Sample::new(series, "s", pulled.as_secs_f64()),
        Sample::new(&format!("{series}, processor time"), "s", worked.as_secs_f64()),
        Sample::milliseconds(&format!("{series}: RemoveImage"), removed),
    ])
}
