//! Kubernetes' own conformance tests on a cluster of one node, and how their results differ from `conformance.txt`, or from
//! `conformance-untrusted.txt` where all pods are machines that can be one.
//!
//! `PODVISOR_FOCUS` names the tests that run, as a regular expression for ginkgo, and `PROCS` how many at once; `TRUST=untrusted` makes
//! the machines. What the tests said, ginkgo's reports and the logs stay in `target/kubernetes/logs`.

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

/// All conformance tests.
const ALL: &str = r"\[Conformance\]";

/// Those of nodes, which the list of untrusted pods is for.
const NODE: &str = r"\[sig-node\].*\[Conformance\]";

/// They change the node or the whole cluster, or take very long.
const SKIP: &str = r"\[Serial\]|\[Slow\]|\[Disruptive\]";

/// What a test of jobs leaves on the node.
const LEFT: &str = "/tmp/job-e2e";

/// How long all of them may take, for ginkgo.
const LIMIT: &str = "3h";

/// The run, if the environment asks for one.
pub(crate) fn asked_for() -> Option<Trial> {
    let focus = env::var("PODVISOR_FOCUS").ok()?;
    let untrusted = env::var("TRUST").is_ok_and(|trust| trust == "untrusted");
    let trial = Trial::test("conformance::is_as_expected", move || {
        run(&focus, untrusted).map_err(|error| Failed::from(format!("{error:#}")))
    });
    Some(trial.with_ignored_flag(true))
}

fn run(focus: &str, untrusted: bool) -> Result<()> {
    ensure!(!untrusted || !is_peer(), "the peer has no machines: leave TRUST out");
    let (name, whole) = if untrusted { ("conformance-untrusted", NODE) } else { ("conformance", ALL) };
    let list = project_dir().join("tests/kubernetes").join(name).with_extension("txt");
    let expected = Expected::read(&list)?;
    let registry = conformance_images::serve()?;
    let setup = Setup { untrusted, ..Setup::default() };
    let mut cluster = Cluster::up(&Settings { setup, ..Settings::default() }, &registry)?;
    let kept = target_dir().join("kubernetes/logs").join(name);
    fs::create_dir_all(&kept).with_context(|| format!("making {}", kept.display()))?;
    let outcomes = tests(&mut cluster, focus, &kept);
    cluster.keep_logs(&format!("{name}/cluster"));
    cluster.down()?;
    if Path::new(LEFT).exists() {
        fs::remove_dir_all(LEFT).with_context(|| format!("removing {LEFT}"))?;
    }
    let outcomes = outcomes?;
    fs::write(kept.join("results.txt"), as_list(&outcomes)).context("keeping the results")?;
    summarize(&outcomes);
    let differences = expected.differences(&outcomes, focus != whole);
    ensure!(differences.is_empty(), "not as {} expects:\n{}", list.display(), differences.join("\n"));
    Ok(())
}

/// Runs ginkgo to its end; what became of each test. Those that fail are no error.
fn tests(cluster: &mut Cluster, focus: &str, kept: &Path) -> Result<Outcomes> {
    let report = kept.join("report.json");
    let _ = fs::remove_file(&report);
    let output = File::create(kept.join("output.txt"))?;
    // ginkgo takes a finished suite by the end of its name, and writes beside it.
    let suite = Path::new(DIRECTORY).join("e2e.test");
    symlink(conformance_program("e2e.test"), &suite).context("linking the tests")?;
    let status = cluster.run_beside(
        Command::new(conformance_program("ginkgo"))
            .arg(format!("--procs={}", env::var("PROCS").unwrap_or_else(|_| "4".to_owned())))
            .args(["--no-color", "--timeout", LIMIT, "--focus", focus, "--skip", SKIP])
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
