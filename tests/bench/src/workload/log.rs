//! A container that writes lines as fast as somebody takes them, until the last one is in its log.

use std::fs::File;
use std::io::{BufRead, BufReader};
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
const LINES: u32 = 1_000_000;
const PATIENCE: Duration = Duration::from_secs(180);

pub(super) async fn run(subject: &Subject, round: u32) -> Result<Vec<Sample>> {
    // The container stays, so that the helper's processor time can still be read.
    let text = format!("yes '{LINE}' | head -n {LINES}; trap 'exit 0' TERM; sleep 1000 & wait");
    let config = ask::script("c", &text);
    let before = process::processor_time(&subject.daemon())?;
    let (pod, container) = running(subject, &format!("log{round}"), &config).await?;
    let log = subject.cri.status(&container).await?.log_path;
    let began = Instant::now();
    let (mut follower, mut lines) = (Follower::open(Path::new(&log))?, 0);
    while lines < LINES {
        ensure!(began.elapsed() < PATIENCE, "{lines} of {LINES} lines are in the log after {PATIENCE:?}");
        tokio::time::sleep(Duration::from_millis(10)).await;
        lines += follower.lines()?;
    }
    let time = began.elapsed();
    let helpers = process::processor_time(&subject.helpers()?)?;
    let daemon = process::processor_time(&subject.daemon())?.saturating_sub(before);
    remove(subject, &pod).await?;
    lines += follower.lines()?;
    ensure!(lines == LINES, "{lines} lines are in the log, and {LINES} were written");
    let megabytes = f64::from(LINES) * f64::from(u32::try_from(LINE.len() + 1)?) / 1e6;
    Ok(vec![
        Sample::new("log throughput", "MB/s", megabytes / time.as_secs_f64()),
        Sample::new("log, per processor second", "MB", megabytes / (helpers + daemon).as_secs_f64()),
    ])
}

/// Counts lines of a file that grows.
struct Follower {
    file: BufReader<File>,
    buffer: Vec<u8>,
}

impl Follower {
    fn open(path: &Path) -> Result<Self> {
        let file = File::open(path).with_context(|| format!("opening {}", path.display()))?;
        Ok(Self { file: BufReader::with_capacity(1 << 20, file), buffer: Vec::new() })
    }

    /// Lines of the container that have come since the last call. One may be written in parts, of which only the last has the tag `F`.
    fn lines(&mut self) -> Result<u32> {
        let mut count = 0;
        while self.file.read_until(b'\n', &mut self.buffer)? > 0 && self.buffer.ends_with(b"\n") {
            let tag = self.buffer.split(|byte| *byte == b' ').nth(2);
            count += u32::from(tag.is_some_and(|tag| tag == b"F"));
            self.buffer.clear();
        }
        Ok(count)
    }
}
