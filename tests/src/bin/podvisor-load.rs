//! 200 pods on one node: lists and status while they start and stop, memory per pod, what is left of them. To be run in a sandbox
//! (`make bench-load`).

use std::process::ExitCode;
use std::sync::Arc;

use anyhow::Result;
use podvisor_critest::node::Options;
use podvisor_tests::images::TestImages;
use podvisor_tests::{Fixture, load};

const PODS: usize = 200;

fn main() -> Result<ExitCode> {
    let runtime = tokio::runtime::Builder::new_multi_thread().worker_threads(2).enable_all().build()?;
    let images = Arc::new(TestImages::serve()?);
    runtime.block_on(async {
        let mut f = Fixture::with(&images, Options { log: "info".to_owned(), ..Options::default() })?;
        let figures = Box::pin(load::run(&mut f, PODS)).await?;
        let milliseconds = |percent| figures.percentile(percent).as_secs_f64() * 1000.0;
        println!("{PODS} pods, {} questions while they started and stopped", figures.asked.len());
        println!("  list or status, median       {:8.2} ms", milliseconds(50));
        println!("  list or status, p99          {:8.2} ms", milliseconds(99));
        println!("  the daemon's memory per pod  {:8.1} KiB", figures.per_pod);
        for (when, held) in ["before", "with all", "after"].iter().zip(figures.held) {
            println!("  {when:<9} {:4} descriptors {:3} threads", held.descriptors, held.threads);
        }
        f.finish().await
    })?;
    Ok(ExitCode::SUCCESS)
}
