//! Many pods: the daemon holds little for each, and nothing when they are gone. How fast it answers meanwhile is `make bench-load`'s.

use anyhow::{Result, ensure};
use podvisor_tests::{Fixture, Tests, load};

use crate::scale;

pub(crate) fn add(tests: &mut Tests) {
    tests.add("load::is_let_go_of", is_let_go_of);
}

async fn is_let_go_of(f: &mut Fixture) -> Result<()> {
    let figures = load::run(f, scale(12, 100) as usize).await?;
    println!("load: {:.0} KiB per pod, held {:?}", figures.per_pod, figures.held);
    // Generous: a debug build's pages, and few pods in the short form.
    ensure!(figures.per_pod < 1024.0, "{:.0} KiB per pod", figures.per_pod);
    Ok(())
}
