//! The steps of pods that come and go, as the daemon tells them (`cri-server/src/timeline.rs`).

use anyhow::{Context, Result, ensure};

use super::pod;
use crate::subject::Subject;
use crate::timeline;
use crate::wire::Sample;

/// Pods one after the other. The first one is not counted.
const PODS: u32 = 6;
const FILTER: &str = "info,podvisor::timeline=debug";

pub(super) async fn run(subject: &mut Subject) -> Result<Vec<Sample>> {
    let quiet = subject.log_from_now_on(FILTER, "json")?;
    let lives = async {
        for number in 0..PODS {
            pod::run(subject, number).await?;
        }
        let lives = timeline::lives(&subject.log()?).context("understanding the daemon's log")?;
        ensure!(lives.len() == PODS as usize, "the log tells of {} pods, and there were {PODS}", lives.len());
        anyhow::Ok(lives.into_iter().skip(1).flatten().collect())
    };
    let lives = lives.await;
    quiet.restore(subject)?;
    lives
}
