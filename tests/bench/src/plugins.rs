//! The network of a pod without a daemon: the CNI plugins that everybody calls, called by hand (CNI specification 1.0, section 2).

use std::io::Write;
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use podvisor_critest::peer;
use serde_json::Value;

const FOLDERS: [&str; 2] = ["/usr/lib/cni", "/opt/cni/bin"];

/// A network namespace that is connected.
#[derive(Debug)]
pub(crate) struct Attachment {
    name: String,
    result: Value,
}

impl Attachment {
    /// Makes a namespace and connects it; the time that the plugins took.
    pub(crate) fn add(name: &str) -> Result<(Self, Duration)> {
        ip(&["netns", "add", name])?;
        let mut attachment = Self { name: name.to_owned(), result: Value::Null };
        let began = Instant::now();
        for plugin in plugins()? {
            attachment.result = serde_json::from_slice(&attachment.call("ADD", plugin)?)?;
        }
        Ok((attachment, began.elapsed()))
    }

    /// Disconnects and removes it; the time that the plugins took.
    pub(crate) fn delete(self) -> Result<Duration> {
        let began = Instant::now();
        for plugin in plugins()?.into_iter().rev() {
            self.call("DEL", plugin)?;
        }
        let time = began.elapsed();
        ip(&["netns", "delete", &self.name])?;
        Ok(time)
    }

    fn call(&self, verb: &str, mut plugin: Value) -> Result<Vec<u8>> {
        plugin["cniVersion"] = "1.0.0".into();
        plugin["name"] = "bare".into();
        if !self.result.is_null() {
            plugin["prevResult"] = self.result.clone();
        }
        let kind = plugin["type"].as_str().context("a plugin without a type")?;
        let program = FOLDERS.iter().map(|folder| format!("{folder}/{kind}"));
        let program = program.into_iter().find(|path| std::fs::exists(path).unwrap_or(false));
        let mut process = Command::new(program.with_context(|| format!("no plugin {kind}"))?)
            .env("CNI_COMMAND", verb)
            .env("CNI_CONTAINERID", &self.name)
            .env("CNI_NETNS", format!("/run/netns/{}", self.name))
            .env("CNI_IFNAME", "eth0")
            .env("CNI_PATH", FOLDERS.join(":"))
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .spawn()
            .with_context(|| format!("starting {kind}"))?;
        process.stdin.take().context("no input")?.write_all(plugin.to_string().as_bytes())?;
        let output = process.wait_with_output()?;
        ensure!(output.status.success(), "{kind} {verb}: {}", String::from_utf8_lossy(&output.stdout));
        Ok(output.stdout)
    }
}

fn plugins() -> Result<Vec<Value>> {
    let list: Value = serde_json::from_str(&peer::network())?;
    Ok(list["plugins"].as_array().context("no plugins")?.clone())
}

fn ip(arguments: &[&str]) -> Result<()> {
    let status = Command::new("ip").args(arguments).status().context("running ip")?;
    ensure!(status.success(), "ip {arguments:?}: {status}");
    Ok(())
}
