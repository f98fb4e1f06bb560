//! Kubernetes' own conformance tests on a cluster of one node, and how their results differ from the list of what is expected ([`Kind`]).
//!
//! `PODVISOR_FOCUS` names the tests that run, as a regular expression for ginkgo, and `PROCS` how many at once; `TRUST=untrusted` makes
//! machines of all pods that can be one, `SERIAL=1` runs those that bear no others beside them. What the tests said, ginkgo's reports and the logs
//! stay in `target/kubernetes/logs`.

use std::env;
use std::fs::{self, File};
use std::os::unix::fs::symlink;
use std::path::Path;
use std::process::{Command, Stdio};

use anyhow::{Context, Result, ensure};
use libtest_mimic::{Failed, Trial};
use podvisor_critest::expected::{Expected, as_list};
use podvisor_critest::report::{self, Outcome, Outcomes};
use podvisor_critest::{project_dir, target_dir};

use crate::cluster::{ADMIN, Cluster, Settings};
use crate::conformance_images::{self, conformance_program};
use crate::images::program;
use crate::machine::DIRECTORY;
use crate::runtime::{Setup, is_peer};

/// A run, and where its results are listed.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Kind {
    /// Tests that run beside others.
    Parallel,
    /// The same with machines.
    Untrusted,
    /// Tests that change the node or the whole cluster, or take very long.
    Serial,
}

impl Kind {
    fn asked_for() -> Self {
        let is = |name: &str, value: &str| env::var(name).is_ok_and(|is| is == value);
        match (is("TRUST", "untrusted"), is("SERIAL", "1")) {
            (true, _) => Self::Untrusted,
            (false, true) => Self::Serial,
            (false, false) => Self::Parallel,
        }
    }

    /// Of the list, and of the directory of logs.
    fn name(self) -> &'static str {
        match self {
            Self::Parallel => "conformance",
            Self::Untrusted => "conformance-untrusted",
            Self::Serial => "conformance-serial",
        }
    }

    /// The tests that the list names.
    fn whole(self) -> &'static str {
        match self {
            Self::Parallel | Self::Serial => r"\[Conformance\]",
            Self::Untrusted => r"\[sig-node\].*\[Conformance\]",
        }
    }

    /// Which of those that are focused on, for ginkgo.
    fn labels(self) -> &'static str {
        match self {
            Self::Parallel | Self::Untrusted => "!Serial && !Slow && !Disruptive",
            Self::Serial => "Serial || Slow || Disruptive",
        }
    }

    /// How many run at once.
    fn processes(self) -> String {
        match self {
            Self::Serial => "1".to_owned(),
            _ => env::var("PROCS").unwrap_or_else(|_| "4".to_owned()),
        }
    }
}

/// What a test of jobs leaves on the node.
const LEFT: &str = "/tmp/job-e2e";

/// How long all of them may take, for ginkgo.
const LIMIT: &str = "3h";

/// The run, if the environment asks for one.
pub(crate) fn asked_for() -> Option<Trial> {
    let focus = env::var("PODVISOR_FOCUS").ok()?;
    let trial = Trial::test("conformance::is_as_expected", move || {
        run(&focus, Kind::asked_for()).map_err(|error| Failed::from(format!("{error:#}")))
    });
    Some(trial.with_ignored_flag(true))
}

fn run(focus: &str, kind: Kind) -> Result<()> {
    let (name, untrusted) = (kind.name(), kind == Kind::Untrusted);
    ensure!(!untrusted || !is_peer(), "the peer has no machines: leave TRUST out");
    let list = project_dir().join("tests/kubernetes").join(name).with_extension("txt");
    let expected = Expected::read(&list)?;
    let registry = conformance_images::serve()?;
    let setup = Setup { untrusted, ..Setup::default() };
    let mut cluster = Cluster::up(&Settings { setup, ..Settings::default() }, &registry)?;
    let kept = target_dir().join("kubernetes/logs").join(name);
    fs::create_dir_all(&kept).with_context(|| format!("making {}", kept.display()))?;
    let outcomes = tests(&mut cluster, focus, kind, &kept);
    cluster.keep_logs(&format!("{name}/cluster"));
    cluster.down()?;
    if Path::new(LEFT).exists() {
        fs::remove_dir_all(LEFT).with_context(|| format!("removing {LEFT}"))?;
    }
    let outcomes = outcomes?;
    fs::write(kept.join("results.txt"), as_list(&outcomes)).context("keeping the results")?;
    summarize(&outcomes);
    let differences = expected.differences(&outcomes, focus != kind.whole());
    ensure!(differences.is_empty(), "not as {} expects:\n{}", list.display(), differences.join("\n"));
    Ok(())
}

/// Runs ginkgo to its end; what became of each test. Those that fail are no error.
fn tests(cluster: &mut Cluster, focus: &str, kind: Kind, kept: &Path) -> Result<Outcomes> {
    let report = kept.join("report.json");
    let _ = fs::remove_file(&report);
    let output = File::create(kept.join("output.txt"))?;
    // ginkgo takes a finished suite by the end of its name, and writes beside it.
    let suite = Path::new(DIRECTORY).join("e2e.test");
    symlink(conformance_program("e2e.test"), &suite).context("linking the tests")?;
    let status = cluster.run_beside(
        Command::new(conformance_program("ginkgo"))
            .arg(format!("--procs={}", kind.processes()))
            .args(["--no-color", "--timeout", LIMIT, "--focus", focus, "--label-filter", kind.labels()])
            .args(["--json-report=report.json", "--junit-report=junit.xml", "--output-dir"])
            .arg(kept)
            .arg(&suite)
            .args(["--", "--provider=skeleton", "--num-nodes=1", "--kubeconfig", ADMIN, "--kubectl-path"])
            .arg(program("kubectl"))
            .current_dir(DIRECTORY)
            .env("HOME", DIRECTORY)
            .env("TMPDIR", DIRECTORY)
            .stdin(Stdio::null())
            .stdout(output.try_clone()?)
            .stderr(output),
    )?;
    ensure!(report.exists(), "ginkgo wrote no report ({status}): see {}", kept.join("output.txt").display());
    report::read(&report)
}

fn summarize(outcomes: &Outcomes) {
    let (mut passed, mut failed, mut skipped) = (0, 0, 0);
    for (name, outcome) in outcomes {
        match outcome {
            Outcome::Pass => passed += 1,
            Outcome::Skip(_) => skipped += 1,
            Outcome::Fail(why) => {
                failed += 1;
                let why: Vec<&str> = why.lines().take(3).collect();
                println!("FAILED {name}\n    {}", why.join("\n    "));
            }
        }
    }
    println!("conformance: {passed} passed, {failed} failed, {skipped} skipped");
}
