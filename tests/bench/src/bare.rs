//! The OCI runtime's own create, start, exec, kill and delete of the same program, without a daemon.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use podvisor_critest::{target_dir, tools_dir};
use serde_json::Value;
use tempfile::TempDir;

use crate::plugins::Attachment;
use crate::subject::Name;
use crate::wire::Sample;

const PLUGINS_ADD: &str = "CNI plugins alone, ADD";
const PLUGINS_DELETE: &str = "CNI plugins alone, DEL";

/// A bundle of busybox.
#[derive(Debug)]
pub(crate) struct Bare {
    program: PathBuf,
    bundle: TempDir,
}

impl Bare {
    pub(crate) fn new(name: Name) -> Result<Self> {
        let program = if name == Name::Runc { tools_dir().join("runc") } else { "crun".into() };
        let bundle = tempfile::Builder::new().prefix("bundle.").tempdir().context("making a bundle")?;
        let bin = bundle.path().join("rootfs/bin");
        fs::create_dir_all(&bin)?;
        fs::copy(target_dir().join("critest/contents/busybox/busybox"), bin.join("busybox"))?;
        for applet in ["sh", "sleep", "true"] {
            std::os::unix::fs::symlink("busybox", bin.join(applet))?;
        }
        let bare = Self { program, bundle };
        bare.call(&["spec"])?;
        specification(&bare.bundle.path().join("config.json"))?;
        Ok(bare)
    }

    pub(crate) fn version(&self) -> Result<String> {
        let output = Command::new(&self.program).arg("--version").output()?;
        let text = String::from_utf8_lossy(&output.stdout);
        Ok(text.lines().next().unwrap_or_default().to_owned())
    }

    /// Workload "pod".
    pub(crate) fn pod(&self, round: u32) -> Result<Vec<Sample>> {
        let id = format!("bare{round}");
        let (attachment, add) = Attachment::add(&id)?;
        let create = self.call(&["create", &id])?;
        let start = self.call(&["start", &id])?;
        let exec = self.call(&["exec", &id, "true"])?;
        let kill = self.call(&["kill", &id, "KILL"])?;
        let delete = self.call(&["delete", "--force", &id])?;
        let remove = attachment.delete()?;
        let samples = [
            (PLUGINS_ADD, add),
            (PLUGINS_DELETE, remove),
            ("CreateContainer", create),
            ("StartContainer", start),
            ("start", create + start),
            ("ExecSync", exec),
            ("StopContainer", kill),
            ("stop", kill),
            ("RemoveContainer", delete),
            ("remove", delete),
        ];
        Ok(samples.map(|(series, time)| Sample::milliseconds(series, time)).into())
    }

    /// Workload "at-once".
    pub(crate) fn at_once(&self, count: u32) -> Result<Vec<Sample>> {
        let ids: Vec<String> = (0..count).map(|number| format!("once{number}")).collect();
        let began = Instant::now();
        all(&ids, |id| {
            self.call(&["create", id])?;
            self.call(&["start", id])
        })?;
        let started = began.elapsed();
        let began = Instant::now();
        all(&ids, |id| {
            self.call(&["kill", id, "KILL"])?;
            self.call(&["delete", "--force", id])
        })?;
        Ok(vec![
            Sample::milliseconds(&format!("{count} at once"), started),
            Sample::milliseconds(&format!("{count} stopped and removed at once"), began.elapsed()),
        ])
    }

    fn call(&self, arguments: &[&str]) -> Result<Duration> {
        let began = Instant::now();
        let status = Command::new(&self.program)
            .arg("--root")
            .arg(self.bundle.path().join("state"))
            .args(arguments)
            .current_dir(self.bundle.path())
            .stdin(Stdio::null())
            .stdout(Stdio::null())
            .status()
            .with_context(|| format!("running {}", self.program.display()))?;
        ensure!(status.success(), "{} {arguments:?}: {status}", self.program.display());
        Ok(began.elapsed())
    }
}

/// Does that with each of them at the same time.
fn all(ids: &[String], work: impl Fn(&str) -> Result<Duration> + Sync) -> Result<()> {
    std::thread::scope(|scope| {
        let threads: Vec<_> = ids.iter().map(|id| scope.spawn(|| work(id))).collect();
        threads.into_iter().try_for_each(|thread| thread.join().expect("a thread that waits").map(drop))
    })
}

fn specification(file: &Path) -> Result<()> {
    let mut spec: Value = serde_json::from_slice(&fs::read(file)?)?;
    spec["process"]["terminal"] = false.into();
    spec["process"]["args"] = ["sleep", "1000"].into_iter().collect();
    // Raising a limit needs a capability that the machine may lack.
    spec["process"].as_object_mut().context("no process")?.remove("rlimits");
    fs::write(file, spec.to_string())?;
    Ok(())
}
