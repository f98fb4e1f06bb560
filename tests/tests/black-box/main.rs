//! Black-box tests of the daemon. Each gets a node of its own, and fails if it leaves anything on it.

// A test is run once: neither the size of its future nor one more allocation matters.
#![allow(clippy::large_futures, clippy::assigning_clones)]

mod artifacts;
mod cdi;
mod containers;
mod guests;
mod gvisor;
mod image_volumes;
mod images;
mod input;
mod kills;
mod metrics;
mod observing;
mod pods;
mod recovery;
mod resize;
mod resources;
mod security;
mod telemetry;
mod userns;
mod version;

use std::process::ExitCode;
use std::sync::Arc;

use anyhow::Result;
use libtest_mimic::{Arguments, Failed, Trial};
use podvisor_critest::node::Options;
use podvisor_tests::Fixture;
use podvisor_tests::images::TestImages;

/// The tests, as they are collected from the modules.
pub(crate) struct Tests {
    images: Arc<TestImages>,
    trials: Vec<Trial>,
}

impl Tests {
    /// A test on a node with the default options.
    pub(crate) fn add<F>(&mut self, name: &str, test: F)
    where
        F: AsyncFnOnce(&mut Fixture) -> Result<()> + Send + 'static,
    {
        self.add_with(name, Options::default(), test);
    }

    /// A test on a node with other options.
    pub(crate) fn add_with<F>(&mut self, name: &str, options: Options, test: F)
    where
        F: AsyncFnOnce(&mut Fixture) -> Result<()> + Send + 'static,
    {
        self.trials.push(self.trial(name, options, test));
    }

    /// One that needs what not every machine has; it runs only when ignored tests are asked for.
    pub(crate) fn add_optional<F>(&mut self, name: &str, options: Options, test: F)
    where
        F: AsyncFnOnce(&mut Fixture) -> Result<()> + Send + 'static,
    {
        self.trials.push(self.trial(name, options, test).with_ignored_flag(true));
    }

    fn trial<F>(&self, name: &str, options: Options, test: F) -> Trial
    where
        F: AsyncFnOnce(&mut Fixture) -> Result<()> + Send + 'static,
    {
        let images = Arc::clone(&self.images);
        Trial::test(name, move || {
            // Not `{:?}`, which would add a backtrace of the test's own tasks.
            run(&images, options, test).map_err(|error| Failed::from(format!("{error:#}")))
        })
    }
}

fn run<F>(images: &Arc<TestImages>, options: Options, test: F) -> Result<()>
where
    F: AsyncFnOnce(&mut Fixture) -> Result<()>,
{
    let runtime = tokio::runtime::Builder::new_multi_thread().worker_threads(2).enable_all().build()?;
    runtime.block_on(async {
        let mut fixture = Fixture::with(images, options)?;
        if let Err(error) = test(&mut fixture).await {
            return Err(error.context(format!("the daemon's log ends with\n{}\n", fixture.node.log_tail(60))));
        }
        fixture.finish().await
    })
}

fn main() -> Result<ExitCode> {
    let mut arguments = Arguments::from_args();
    // Each test looks for what it has left on the machine, which must not be what another one has just made.
    arguments.test_threads = Some(1);
    let mut tests = Tests { images: Arc::new(TestImages::serve()?), trials: Vec::new() };
    version::add(&mut tests);
    guests::add(&mut tests);
    images::add(&mut tests);
    image_volumes::add(&mut tests);
    artifacts::add(&mut tests);
    cdi::add(&mut tests);
    resources::add(&mut tests);
    pods::add(&mut tests);
    containers::add(&mut tests);
    input::add(&mut tests);
    observing::add(&mut tests);
    metrics::add(&mut tests);
    resize::add(&mut tests);
    telemetry::add(&mut tests);
    recovery::add(&mut tests);
    kills::add(&mut tests);
    gvisor::add(&mut tests);
    security::add(&mut tests);
    userns::add(&mut tests);
    let Tests { images, trials } = tests;
    let conclusion = libtest_mimic::run(&arguments, trials);
    drop(images);
    Ok(conclusion.exit_code())
}
