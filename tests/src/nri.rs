//! The NRI plugin of the tests (`critest/tools/nri-plugin`), which is built on NRI's own client library, as a process.

use std::fs;
use std::io::Write;
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};

use anyhow::{Context, Result, ensure};
use podvisor_critest::tools_dir;
use serde_json::{Value, json};

use crate::{Fixture, eventually};

/// A plugin and what it has written down.
#[derive(Debug)]
pub struct Plugin {
    log: PathBuf,
    /// If the test has started it.
    process: Option<Child>,
}

fn program() -> PathBuf {
    tools_dir().join("nri-plugin")
}

/// A plugin's log, and its configuration with these rules.
fn configured(f: &Fixture, name: &str, rules: &Value) -> Result<(PathBuf, String)> {
    let directory = f.node.path("nri");
    fs::create_dir_all(&directory)?;
    let log = directory.join(format!("{name}.log"));
    let text = json!({ "log": log, "rules": rules }).to_string();
    Ok((log, text))
}

impl Plugin {
    /// Starts a plugin (INDEX-NAME) that connects, and waits until it is synchronised.
    pub async fn connect(f: &Fixture, name: &str, rules: Value) -> Result<Self> {
        let plugin = Self::launch(f, name, rules, &[])?;
        plugin.wait_for("Synchronize", 1).await?;
        Ok(plugin)
    }

    /// The same with more arguments, and without waiting.
    pub fn launch(f: &Fixture, name: &str, rules: Value, arguments: &[&str]) -> Result<Self> {
        let (log, text) = configured(f, name, &rules)?;
        let file = log.with_extension("json");
        fs::write(&file, text)?;
        let (index, base) = name.split_once('-').context("INDEX-NAME")?;
        let process = Command::new(program())
            .arg("-socket")
            .arg(f.node.path("nri/nri.sock"))
            .args(["-index", index, "-name", base, "-config"])
            .arg(file)
            .args(arguments)
            .stdin(Stdio::piped())
            .stdout(Stdio::null())
            .stderr(Stdio::null())
            .spawn()
            .context("starting the plugin; critest/tools/build nri-plugin builds it")?;
        Ok(Self { log, process: Some(process) })
    }

    /// Puts a plugin where the daemon starts it at its next start.
    pub fn install(f: &Fixture, name: &str, rules: Value) -> Result<Self> {
        let (log, text) = configured(f, name, &rules)?;
        for directory in ["nri/plugins", "nri/conf.d"] {
            fs::create_dir_all(f.node.path(directory))?;
        }
        let file = f.node.path("nri/plugins").join(name);
        fs::copy(program(), &file).context("copying the plugin")?;
        fs::set_permissions(&file, PermissionsExt::from_mode(0o755))?;
        fs::write(f.node.path("nri/conf.d").join(format!("{name}.conf")), text)?;
        Ok(Self { log, process: None })
    }

    /// Everything that it has written down.
    pub fn lines(&self) -> Result<Vec<Value>> {
        if !self.log.exists() {
            return Ok(Vec::new());
        }
        let text = fs::read_to_string(&self.log)?;
        // The last line may be half there.
        let whole = text.rfind('\n').map_or("", |end| &text[..=end]);
        whole.lines().map(|line| serde_json::from_str(line).context("a line of the plugin's log")).collect()
    }

    /// The hooks about a pod (`container` empty) or about a container, in order.
    pub fn hooks(&self, pod: &str, container: &str) -> Result<Vec<String>> {
        let about = |line: &&Value| {
            let named = |key: &str| line[key].as_str().unwrap_or_default().to_owned();
            named("container") == container && (named("pod") == pod || !container.is_empty())
        };
        let lines = self.lines()?;
        Ok(lines.iter().filter(about).filter_map(|line| Some(line["event"].as_str()?.to_owned())).collect())
    }

    /// The last line about an event of a container (or of a pod, by its name).
    pub fn last(&self, event: &str, of: &str) -> Result<Value> {
        let lines = self.lines()?;
        let found = lines.into_iter().rev().find(|line| {
            line["event"] == json!(event)
                && (line["container"] == json!(of)
                    || (line["pod"] == json!(of) && line["container"].is_null()))
        });
        found.with_context(|| format!("no {event} of {of}"))
    }

    /// Waits until an event has been written down so many times.
    pub async fn wait_for(&self, event: &str, times: usize) -> Result<()> {
        eventually(&format!("{event} comes {times} times"), || async {
            let count = self.lines()?.iter().filter(|line| line["event"] == json!(event)).count();
            ensure!(count >= times, "{count} times");
            Ok(())
        })
        .await
    }

    /// Waits until the hooks about something are these.
    pub async fn wait_for_hooks(&self, pod: &str, container: &str, wanted: &[&str]) -> Result<()> {
        eventually("the hooks come", || async {
            let hooks = self.hooks(pod, container)?;
            ensure!(hooks == wanted, "{pod}/{container}: {hooks:?}");
            Ok(())
        })
        .await
    }

    /// Lets it ask for updates unsolicited; the line about the outcome.
    pub async fn ask(&mut self, updates: Value) -> Result<Value> {
        let before = self.lines()?.iter().filter(|line| line["event"] == json!("Updated")).count();
        let process = self.process.as_mut().context("the daemon's own plugin")?;
        let stdin = process.stdin.as_mut().context("its standard input")?;
        stdin.write_all(format!("{updates}\n").as_bytes())?;
        self.wait_for("Updated", before + 1).await?;
        let lines = self.lines()?;
        lines.into_iter().rev().find(|line| line["event"] == json!("Updated")).context("the outcome")
    }

    /// Ends it.
    pub fn end(&mut self) {
        if let Some(mut process) = self.process.take() {
            // It may have ended by itself.
            let _ = process.kill();
            let _ = process.wait();
        }
    }

    /// Its log.
    pub fn log(&self) -> &Path {
        &self.log
    }
}

impl Drop for Plugin {
    fn drop(&mut self) {
        self.end();
    }
}
