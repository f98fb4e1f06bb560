//! Running critest against a socket.

use std::ffi::OsString;
use std::fs::{self, File};
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use anyhow::{Context, Result, bail};

use crate::report::{self, Outcomes};
use crate::tools_dir;

/// How the suite is run.
#[derive(Debug, Clone, Default, clap::Args)]
pub struct Options {
    /// Only specs whose name matches this regular expression.
    #[arg(long)]
    pub focus: Option<String>,
    /// No spec whose name matches this regular expression.
    #[arg(long)]
    pub skip: Option<String>,
    /// How many specs at once.
    #[arg(long, default_value_t = 1)]
    pub parallel: u32,
    /// Random order, from this seed.
    #[arg(long)]
    pub seed: Option<u64>,
    /// Runtime handler that the pods name.
    #[arg(long)]
    pub runtime_handler: Option<String>,
    /// Exec, attach and port-forward over WebSocket instead of SPDY.
    #[arg(long)]
    pub websocket: bool,
    /// Where the suite's output goes.
    #[arg(long)]
    pub output: Option<PathBuf>,
}

impl Options {
    /// Whether some specs are left out on purpose.
    pub fn partial(&self) -> bool {
        self.focus.is_some() || self.skip.is_some()
    }
}

/// Runs the suite against the runtime that listens on `socket`. Failing specs are no error.
pub fn run(socket: &Path, options: &Options) -> Result<Outcomes> {
    let program = tools_dir().join("critest");
    if !program.exists() {
        bail!("{} is missing (`make images` builds it)", program.display());
    }
    // The suite and ginkgo leave files behind in the directory for temporary files.
    let directory = tempfile::Builder::new().prefix("critest.").tempdir().context("making a directory")?;
    let report = directory.path().join("report.json");
    let output = options.output.clone().unwrap_or_else(|| directory.path().join("output"));
    let log = File::create(&output).with_context(|| format!("making {}", output.display()))?;

    // ginkgo's own program takes the flags without a prefix, the suite's with one.
    let in_parallel = options.parallel > 1;
    let prefix = if in_parallel { "--" } else { "-ginkgo." };
    let mut flags: Vec<OsString> = vec![format!("{prefix}no-color").into()];
    if let Some(focus) = &options.focus {
        flags.push(format!("{prefix}focus={focus}").into());
    }
    if let Some(skip) = &options.skip {
        flags.push(format!("{prefix}skip={skip}").into());
    }
    if let Some(seed) = options.seed {
        flags.push(format!("{prefix}seed={seed}").into());
        flags.push(format!("{prefix}randomize-all").into());
    }
    let mut for_suite: Vec<OsString> = vec![format!("-runtime-endpoint=unix://{}", socket.display()).into()];
    if let Some(handler) = &options.runtime_handler {
        for_suite.push(format!("-runtime-handler={handler}").into());
    }
    if options.websocket {
        for_suite
            .extend(["-websocket-exec", "-websocket-attach", "-websocket-portforward"].map(OsString::from));
    }

    let mut command;
    if in_parallel {
        // ginkgo takes a finished suite by the end of its name.
        let suite = directory.path().join("critest.test");
        std::os::unix::fs::symlink(&program, &suite).context("linking the suite")?;
        command = Command::new(tools_dir().join("ginkgo"));
        command
            .arg(format!("--nodes={}", options.parallel))
            .arg("--json-report=report.json")
            .arg(format!("--output-dir={}", directory.path().display()))
            .args(&flags)
            .arg(&suite)
            .arg("--")
            .args(&for_suite);
    } else {
        command = Command::new(&program);
        command.arg(format!("-ginkgo.json-report={}", report.display())).args(&flags).args(&for_suite);
    }
    let status = command
        .current_dir(directory.path())
        .env("TMPDIR", directory.path())
        .stdin(Stdio::null())
        .stdout(log.try_clone()?)
        .stderr(log)
        .status()
        .context("starting critest")?;
    take_off_mounts(directory.path());
    if !report.exists() {
        let said = fs::read_to_string(&output).unwrap_or_default();
        let lines: Vec<&str> = said.lines().collect();
        bail!("critest wrote no report ({status}):\n{}", lines[lines.len().saturating_sub(30)..].join("\n"));
    }
    report::read(&report)
}

/// A spec that mounts something and then fails leaves it.
fn take_off_mounts(below: &Path) {
    let table = fs::read_to_string("/proc/self/mountinfo").unwrap_or_default();
    let points = table.lines().filter_map(|line| line.split(' ').nth(4)).map(Path::new);
    for point in points.filter(|point| point.starts_with(below)).collect::<Vec<_>>().into_iter().rev() {
        let _ = rustix::mount::unmount(point, rustix::mount::UnmountFlags::DETACH);
    }
}
