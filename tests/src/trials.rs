//! Test programs whose tests each get a node of their own.

use std::process::ExitCode;
use std::sync::Arc;

use anyhow::Result;
use libtest_mimic::{Arguments, Failed, Trial};
use podvisor_critest::node::Options;

use crate::Fixture;
use crate::images::TestImages;

/// The tests of a program, as they are collected from its modules.
#[derive(Debug)]
pub struct Tests {
    images: Arc<TestImages>,
    trials: Vec<Trial>,
    /// Names and reasons of those that run only when asked for.
    optional: Vec<String>,
}

impl Tests {
    /// None yet; the images are served already.
    pub fn new() -> Result<Self> {
        Ok(Self { images: Arc::new(TestImages::serve()?), trials: Vec::new(), optional: Vec::new() })
    }

    /// A test on a node with the default options.
    pub fn add<F>(&mut self, name: &str, test: F)
    where
        F: AsyncFnOnce(&mut Fixture) -> Result<()> + Send + 'static,
    {
        self.add_with(name, Options::default(), test);
    }

    /// A test on a node with other options.
    pub fn add_with<F>(&mut self, name: &str, options: Options, test: F)
    where
        F: AsyncFnOnce(&mut Fixture) -> Result<()> + Send + 'static,
    {
        self.trials.push(self.trial(name, options, test));
    }

    /// One that needs what not every machine has; it runs only when ignored tests are asked for. `why` is printed when it does not.
    pub fn add_optional<F>(&mut self, name: &str, why: &str, options: Options, test: F)
    where
        F: AsyncFnOnce(&mut Fixture) -> Result<()> + Send + 'static,
    {
        self.optional.push(format!("{name}: {why}"));
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

    /// Runs those that the command line selects.
    pub fn run(self) -> ExitCode {
        let mut arguments = Arguments::from_args();
        // Each test looks for what it has left on the machine, which must not be what another one has just made.
        arguments.test_threads = Some(1);
        let Self { images, trials, optional } = self;
        if !arguments.ignored && !arguments.include_ignored && !arguments.list {
            for skipped in optional {
                println!("skipped {skipped}");
            }
        }
        let conclusion = libtest_mimic::run(&arguments, trials);
        drop(images);
        conclusion.exit_code()
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
