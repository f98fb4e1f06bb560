//! A container that writes 1 GB of lines as fast as somebody takes them, until the last one is in its log.

use std::fs::File;
use std::io::{BufRead, BufReader};
use std::os::unix::fs::FileExt;
use std::path::Path;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use podvisor_tests::ask;

use super::{remove, running};
use crate::process;
use crate::subject::Subject;
use crate::wire::Sample;

const LINE: &str =
    "a line of a log as programs write them, with a hundred bytes, its end included: 0123456789 abcdefg";
const LAST: &str = "the last line\n";
const LINES: u32 = 10_000_000;
const PATIENCE: Duration = Duration::from_secs(300);

pub(super) async fn run(subject: &Subject, round: u32) -> Result<Vec<Sample>> {
    // The container stays, so that the helper's processor time can still be read.
    let last = LAST.trim_end();
    let text =
        format!("yes '{LINE}' | head -n {LINES}; echo '{last}'; trap 'exit 0' TERM; sleep 1000 & wait");
    let config = ask::script("c", &text);
    let before = process::processor_time(&[subject.daemon()?])?;
    let (pod, container) = running(subject, &format!("log{round}"), &config).await?;
    let log = subject.cri.status(&container).await?.log_path;
    let began = Instant::now();
    let file = File::open(&log).with_context(|| format!("opening {log}"))?;
    while !ends_with_the_last(&file)? {
        ensure!(began.elapsed() < PATIENCE, "the last line is not in {log} after {PATIENCE:?}");
        tokio::time::sleep(Duration::from_millis(5)).await;
    }
    let time = began.elapsed();
    let helpers = process::processor_time(&subject.helpers()?)?;
    let daemon = process::processor_time(&[subject.daemon()?])?.saturating_sub(before);
    let lines = lines(Path::new(&log))?;
    ensure!(lines == LINES + 1, "{lines} lines are in the log, and {} were written", LINES + 1);
    remove(subject, &pod).await?;
    std::fs::remove_file(&log)?;
    let megabytes = f64::from(LINES) * f64::from(u32::try_from(LINE.len() + 1)?) / 1e6;
    Ok(vec![
        Sample::new("log throughput", "MB/s", megabytes / time.as_secs_f64()),
        Sample::new("log, per processor second", "MB", megabytes / (helpers + daemon).as_secs_f64()),
    ])
}

/// Whoever writes the log is not kept from its work by somebody who reads all of it.
fn ends_with_the_last(file: &File) -> Result<bool> {
    let mut end = [0_u8; LAST.len()];
    let length = file.metadata()?.len();
    let Some(at) = length.checked_sub(end.len() as u64) else { return Ok(false) };
    file.read_exact_at(&mut end, at)?;
    Ok(end == *LAST.as_bytes())
}

/// Lines of the container. One may be written in parts, of which only the last has the tag `F`.
fn lines(log: &Path) -> Result<u32> {
    let mut file = BufReader::with_capacity(1 << 20, File::open(log)?);
    let (mut line, mut count) = (Vec::new(), 0);
    while file.read_until(b'\n', &mut line)? > 0 {
        let tag = line.split(|byte| *byte == b' ').nth(2);
        count += u32::from(tag.is_some_and(|tag| tag == b"F"));
        line.clear();
    }
    Ok(count)
}
