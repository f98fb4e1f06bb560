//! When something last moved on a session.

use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use tokio::time::Instant;

/// Touched by whatever reads from or writes to the client. Pings count: they show that somebody is there, and
/// `kubectl port-forward` relies on them to keep an unused forward open.
#[derive(Debug)]
pub(crate) struct Activity {
    started: Instant,
    /// Milliseconds after `started`.
    last: AtomicU64,
    limit: Duration,
}

impl Activity {
    pub(crate) fn new(limit: Duration) -> Self {
        Self { started: Instant::now(), last: AtomicU64::new(0), limit }
    }

    pub(crate) fn touch(&self) {
        let now = u64::try_from(self.started.elapsed().as_millis()).unwrap_or(u64::MAX);
        self.last.store(now, Ordering::Relaxed);
    }

    /// Waits until nothing has moved for as long as the limit.
    pub(crate) async fn idle(&self) {
        loop {
            let last = Duration::from_millis(self.last.load(Ordering::Relaxed));
            let quiet = self.started.elapsed().saturating_sub(last);
            match self.limit.checked_sub(quiet) {
                // `last` is rounded down to milliseconds, so never wait for less than one.
                Some(rest) if !rest.is_zero() => {
                    tokio::time::sleep(rest.max(Duration::from_millis(1))).await;
                }
                _ => return,
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test(start_paused = true)]
    async fn movement_postpones_the_end() {
        let activity = Activity::new(Duration::from_secs(10));
        let before = Instant::now();
        tokio::join!(activity.idle(), async {
            for _ in 0..3 {
                tokio::time::sleep(Duration::from_secs(6)).await;
                activity.touch();
            }
        });
        assert!(before.elapsed() >= Duration::from_secs(28));
    }
}
