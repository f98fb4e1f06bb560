//! Kubernetes on podvisor: a control plane that was built from its own modules, started by kubeadm, every image through a mirror, offline.
//!
//! `make test-kubernetes` builds what it takes and runs all of it. Each test says which cluster it wants; those that agree share one, and
//! the last act of a cluster is `kubeadm reset`. A few of them also run in `make test` where Kubernetes has been built already. Only `runtime.rs` knows what is below kubelet: with `RUNTIME=containerd` the tests that
//! hold for every runtime run on the peer.

mod block;
mod bring_up;
mod cluster;
mod conformance;
mod conformance_images;
mod dual_stack;
mod emulated;
mod eviction;
mod features;
mod figures;
mod images;
mod jobs;
mod machine;
mod memory;
mod pods;
mod probes;
mod pulls;
mod restarts;
mod runtime;
mod services;
mod shutdown;
mod streams;
mod trust;
mod unit;
mod workloads;

use std::process::{Command, ExitCode, Stdio};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, anyhow};
use libtest_mimic::{Arguments, Failed, Trial};
use podvisor_critest::registry::Registry;

use cluster::{Cluster, Settings};
use unit::Unit;

/// How long anything may take that happens by itself. kubelet waits up to a minute and a half before it looks again at some things, and
/// machines that test are slow.
pub(crate) const PATIENCE: Duration = Duration::from_secs(600);

/// Why a test does not run in `make test`.
const LONG: &str = "needs Kubernetes: make test-kubernetes";

/// Why one that could does not.
const NOT_BUILT: &str = "Kubernetes is not built: make kubernetes";

/// Why one does not run in either.
const LAB_ONLY: &str = "needs Kubernetes in the lab: make test-kubernetes-lab";

/// The tests that `make test` runs where Kubernetes has been built.
const SHORT: [&str; 8] = [
    "bring_up::with_another_repository_for_both",
    "bring_up::with_another_repository_for_kubeadm",
    "bring_up::with_another_repository_for_the_runtime",
    "bring_up::with_neither",
    "bring_up::says_what_was_tried",
    "trust::by_annotation_and_runtime_class",
    "services::join_three_pods_of_both_kinds",
    "restarts::nobody_notices_once",
];

/// The test that makes the images of a cluster.
const IMAGES: &str = "images::are_made";

/// The tests that run in the lab: on cgroup v2, with podvisor as a unit of systemd's and machines on KVM.
const LAB: [&str; 12] = [
    "trust::by_annotation_and_runtime_class",
    "trust::keeps_within_memory_limits",
    "memory::is_swapped_and_protected",
    "workloads::are_resized",
    "features::resize_without_limits",
    "eviction::by_files_of_containers",
    "figures::of_a_trusted_pod",
    "figures::of_a_machine",
    "restarts::nobody_notices_once",
    "restarts::nobody_notices_upgrades_of_the_unit",
    "shutdown::lets_pods_end",
    "reset::leaves_nothing_behind",
];

/// Asks `probe` again and again until it is `Ok`; after [`PATIENCE`] its last error is the result.
pub(crate) fn until<T>(what: &str, mut probe: impl FnMut() -> Result<T>) -> Result<T> {
    let deadline = Instant::now() + PATIENCE;
    loop {
        let began = Instant::now();
        match probe() {
            Ok(value) => return Ok(value),
            Err(error) if Instant::now() > deadline => {
                return Err(error.context(anyhow!("{what}: not within {PATIENCE:?}")));
            }
            // Where probes are slow they slow down what they wait for.
            Err(_) => std::thread::sleep(began.elapsed().max(Duration::from_millis(100))),
        }
    }
}

/// What the tests share.
#[derive(Debug, Default)]
struct Shared {
    registry: Mutex<Option<Arc<Registry>>>,
    cluster: Mutex<Option<Cluster>>,
}

impl Shared {
    fn registry(&self) -> Result<Arc<Registry>> {
        let mut registry = self.registry.lock().unwrap_or_else(PoisonError::into_inner);
        if registry.is_none() {
            *registry = Some(Arc::new(images::serve()?));
        }
        registry.clone().context("no registry")
    }

    /// Runs a test on a cluster with these settings: the one that is up, or a new one.
    fn run(&self, name: &str, settings: &Settings, test: fn(&mut Cluster) -> Result<()>) -> Result<()> {
        let mut cluster = self.cluster.lock().unwrap_or_else(PoisonError::into_inner);
        if cluster.as_ref().is_some_and(|have| have.settings != *settings) {
            down(&mut cluster)?;
        }
        if cluster.is_none() {
            *cluster = Some(Cluster::up(settings, &*self.registry()?)?);
        }
        let cluster = cluster.as_mut().context("no cluster")?;
        test(cluster).inspect_err(|error| {
            // The summary comes with the last test, which may be far.
            println!("{name}: {error:#}");
            cluster.keep_logs(name);
        })
    }

    fn down(&self) -> Result<()> {
        down(&mut self.cluster.lock().unwrap_or_else(PoisonError::into_inner))
    }
}

fn down(cluster: &mut Option<Cluster>) -> Result<()> {
    cluster.take().map_or(Ok(()), Cluster::down)
}

/// The tests, as they are collected from the modules.
#[derive(Debug, Default)]
pub(crate) struct Tests {
    shared: Arc<Shared>,
    trials: Vec<Trial>,
    /// Whether the short ones run.
    built: bool,
    /// Those that do not run unless they are asked for, and why.
    skipped: Vec<(String, &'static str)>,
}

impl Tests {
    /// A test of podvisor on a cluster with these settings.
    pub(crate) fn add(&mut self, name: &str, settings: &Settings, test: fn(&mut Cluster) -> Result<()>) {
        if !runtime::is_peer() {
            self.add_for_all(name, settings, test);
        }
    }

    /// A test that holds for every runtime.
    pub(crate) fn add_for_all(
        &mut self,
        name: &str,
        settings: &Settings,
        test: fn(&mut Cluster) -> Result<()>,
    ) {
        let shared = Arc::clone(&self.shared);
        let (title, settings) = (name.to_owned(), settings.clone());
        let trial = Trial::test(name, move || {
            shared.run(&title, &settings, test).map_err(|error| Failed::from(format!("{error:#}")))
        });
        self.push(name, trial);
    }

    /// The same, of what only the lab has.
    pub(crate) fn add_in_lab(
        &mut self,
        name: &str,
        settings: &Settings,
        test: fn(&mut Cluster) -> Result<()>,
    ) {
        if Unit::is_wanted() {
            self.add(name, settings, test);
        } else {
            self.skipped.push((name.to_owned(), LAB_ONLY));
        }
    }

    fn push(&mut self, name: &str, trial: Trial) {
        if Unit::is_wanted() && !LAB.contains(&name) {
            return;
        }
        let why = match SHORT.contains(&name) {
            true if self.built => None,
            true => Some(NOT_BUILT),
            false => Some(LONG),
        };
        self.trials.push(trial.with_ignored_flag(why.is_some()));
        self.skipped.extend(why.map(|why| (name.to_owned(), why)));
    }
}

/// Whether everything that `make kubernetes` makes is there, from these very sources.
fn is_built() -> bool {
    let script = podvisor_critest::project_dir().join("tests/kubernetes/build");
    let built = Command::new(script).arg("--cached").stdin(Stdio::null()).stderr(Stdio::null()).status();
    built.is_ok_and(|status| status.success())
}

fn main() -> ExitCode {
    let mut arguments = Arguments::from_args();
    // They share a cluster, and what one does to it must not be what another one sees.
    arguments.test_threads = Some(1);
    let usual = !arguments.ignored && !arguments.include_ignored;
    if let Some(conformance) = conformance::asked_for() {
        return libtest_mimic::run(&arguments, vec![conformance]).exit_code();
    }
    let mut tests = Tests { built: usual && is_built(), ..Tests::default() };
    tests.add_images();
    bring_up::add(&mut tests);
    workloads::add(&mut tests);
    jobs::add(&mut tests);
    probes::add(&mut tests);
    block::add(&mut tests);
    eviction::add(&mut tests);
    streams::add(&mut tests);
    features::add(&mut tests);
    trust::add(&mut tests);
    services::add(&mut tests);
    figures::add(&mut tests);
    restarts::add(&mut tests);
    pulls::add(&mut tests);
    memory::add(&mut tests);
    shutdown::add(&mut tests);
    let shared = Arc::clone(&tests.shared);
    tests.add_reset();
    figures::add_without_cri(&mut tests);
    dual_stack::add(&mut tests);
    trust::add_untrusted(&mut tests);
    if usual && !arguments.list {
        tests.skipped.iter().for_each(|(name, why)| println!("skipped {name}: {why}"));
    }
    let conclusion = libtest_mimic::run(&arguments, tests.trials);
    // Where a filter left out the reset.
    match shared.down() {
        Ok(()) => conclusion.exit_code(),
        Err(error) => {
            eprintln!("kubeadm reset: {error:#}");
            ExitCode::FAILURE
        }
    }
}

impl Tests {
    /// What every cluster pulls, made and served. Before a lab, where making them takes minutes.
    fn add_images(&mut self) {
        let shared = Arc::clone(&self.shared);
        let make = move || shared.registry().map(drop).map_err(|error| Failed::from(format!("{error:#}")));
        self.push(IMAGES, Trial::test(IMAGES, make));
    }

    /// The end of the last cluster as a test of its own.
    fn add_reset(&mut self) {
        let name = "reset::leaves_nothing_behind";
        let shared = Arc::clone(&self.shared);
        let trial = Trial::test(name, move || {
            let up = shared.cluster.lock().unwrap_or_else(PoisonError::into_inner).is_some();
            if !up {
                shared
                    .run(name, &Settings::default(), |_| Ok(()))
                    .map_err(|e| Failed::from(format!("{e:#}")))?;
            }
            shared.down().map_err(|error| Failed::from(format!("{error:#}")))
        });
        self.push(name, trial);
    }
}
