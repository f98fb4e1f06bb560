//! Waiting for what must become true.

use std::future::Future;
use std::time::{Duration, Instant};

use anyhow::{Result, anyhow};

/// How long anything may take that happens by itself, on a machine that is busy with much else.
pub const PATIENCE: Duration = Duration::from_secs(60);

const STEP: Duration = Duration::from_millis(10);

/// Asks `probe` again and again until it is `Ok`; after [`PATIENCE`] its last error is the result.
pub async fn eventually<T, F, Fut>(what: &str, mut probe: F) -> Result<T>
where
    F: FnMut() -> Fut,
    Fut: Future<Output = Result<T>>,
{
    let deadline = Instant::now() + PATIENCE;
    loop {
        match probe().await {
            Ok(value) => return Ok(value),
            Err(error) if Instant::now() > deadline => {
                return Err(error.context(anyhow!("{what}: not within {PATIENCE:?}")));
            }
            Err(_) => tokio::time::sleep(STEP).await,
        }
    }
}
