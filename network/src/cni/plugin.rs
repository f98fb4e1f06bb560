//! One call of a plugin: a process that reads its configuration and answers with JSON.
//!
//! CNI specification 1.1.0, section 2. A plugin is trusted with the node but not to be well written: the call is limited in
//! time (then its whole process group is killed) and in output, and what it says is quoted in errors only in part.

use std::io;
use std::os::unix::process::ExitStatusExt;
use std::path::{Path, PathBuf};
use std::process::{ExitStatus, Stdio};
use std::time::Duration;

use rustix::fs::Access;
use rustix::process::{Pid, Signal};
use serde::Deserialize;
use tokio::io::{AsyncRead, AsyncReadExt, AsyncWriteExt};
use tokio::process::Command;

/// Most that a plugin may answer, bytes.
const OUTPUT_LIMIT: u64 = 1 << 20;
/// As much of standard error is kept, bytes.
const ERROR_LIMIT: u64 = 64 << 10;
/// As much of an unintelligible answer is quoted, bytes.
const EXCERPT: usize = 200;
/// As much of a plugin's message is shown, characters.
const MESSAGE: usize = 2000;
/// After a plugin has ended, what it started has this long to close the plugin's output.
const LINGER: Duration = Duration::from_secs(1);

/// Why a call of a plugin failed.
#[derive(Debug, thiserror::Error)]
#[allow(missing_docs)] // the messages say it
pub enum PluginError {
    #[error("CNI plugin {plugin} not found in {}", list(.directories))]
    NotFound { plugin: String, directories: Vec<PathBuf> },
    #[error("running CNI plugin {}", .path.display())]
    Run { path: PathBuf, source: io::Error },
    #[error("CNI plugin {plugin} did not answer {command} within {} s and was killed", .limit.as_secs_f32())]
    TimedOut { plugin: String, command: &'static str, limit: Duration },
    #[error("CNI plugin {plugin} answered {command} with more than {OUTPUT_LIMIT} bytes and was killed")]
    TooMuch { plugin: String, command: &'static str },
    #[error("CNI plugin {plugin} ended at {command} but something it started keeps its output open")]
    Lingering { plugin: String, command: &'static str },
    #[error("CNI plugin {plugin} failed at {command}: code {code}: {message}")]
    Refused { plugin: String, command: &'static str, code: u64, message: String },
    #[error("CNI plugin {plugin} failed at {command} with {status}: {excerpt:?}")]
    Failed { plugin: String, command: &'static str, status: String, excerpt: String },
    #[error("CNI plugin {plugin} answered {command} unintelligibly ({reason}): {excerpt:?}")]
    Garbage { plugin: String, command: &'static str, reason: String, excerpt: String },
}

fn list(directories: &[PathBuf]) -> String {
    let names: Vec<_> = directories.iter().map(|directory| directory.display().to_string()).collect();
    names.join(", ")
}

/// The first so many bytes, for a message.
pub(crate) fn excerpt(bytes: &[u8]) -> String {
    String::from_utf8_lossy(&bytes[..bytes.len().min(EXCERPT)]).into_owned()
}

/// The plugin's program.
pub(crate) fn find(plugin: &str, directories: &[PathBuf]) -> Result<PathBuf, PluginError> {
    let executable = |path: &PathBuf| path.is_file() && rustix::fs::access(path, Access::EXEC_OK).is_ok();
    directories.iter().map(|directory| directory.join(plugin)).find(executable).ok_or_else(|| {
        PluginError::NotFound { plugin: plugin.to_owned(), directories: directories.to_owned() }
    })
}

/// What a plugin is called with.
#[derive(Debug)]
pub(crate) struct Call<'a> {
    pub(crate) plugin: &'a str,
    pub(crate) program: &'a Path,
    pub(crate) command: &'static str,
    /// The other `CNI_*` variables.
    pub(crate) variables: &'a [(&'static str, String)],
    pub(crate) input: &'a [u8],
    pub(crate) limit: Duration,
}

/// Kills the process group unless the plugin is known to have ended.
struct Group(Option<Pid>);

impl Drop for Group {
    fn drop(&mut self) {
        if let Some(leader) = self.0 {
            // The leader is not reaped yet, so the number is still its group's.
            let _ = rustix::process::kill_process_group(leader, Signal::KILL);
        }
    }
}

impl Call<'_> {
    /// The plugin's answer, empty or not. Dropped before it is done, the plugin is killed.
    pub(crate) async fn run(&self) -> Result<Vec<u8>, PluginError> {
        let failed = |source| PluginError::Run { path: self.program.to_owned(), source };
        let mut child = Command::new(self.program)
            .env("CNI_COMMAND", self.command)
            .envs(self.variables.iter().map(|(key, value)| (key, value)))
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .stderr(Stdio::piped())
            .process_group(0)
            .kill_on_drop(true)
            .spawn()
            .map_err(failed)?;
        let pid = child.id().and_then(|id| i32::try_from(id).ok()).and_then(Pid::from_raw);
        let mut group = Group(pid);
        let (stdin, stdout, stderr) = (child.stdin.take(), child.stdout.take(), child.stderr.take());
        let feed = async {
            if let Some(mut stdin) = stdin {
                // A plugin that does not read what it does not need is no error.
                let _ = stdin.write_all(self.input).await;
            }
            Ok(())
        };
        let streams = async {
            let (output, error, ()) = tokio::try_join!(self.answer(stdout), words(stderr), feed)?;
            Ok::<_, PluginError>((output, error))
        };
        let whole = async {
            tokio::pin!(streams);
            tokio::select! {
                texts = &mut streams => {
                    let texts = texts?;
                    let status = child.wait().await.map_err(failed)?;
                    group.0 = None;
                    Ok((status, texts))
                }
                status = child.wait() => {
                    let status = status.map_err(failed)?;
                    group.0 = None; // reaped: the number may become another's
                    let texts = tokio::time::timeout(LINGER, &mut streams).await;
                    let lingering = PluginError::Lingering { plugin: self.plugin.to_owned(), command: self.command };
                    let texts = texts.map_err(|_| lingering)??;
                    Ok((status, texts))
                }
            }
        };
        let outcome = tokio::time::timeout(self.limit, whole).await;
        match outcome {
            Ok(Ok((status, (output, _)))) if status.success() => Ok(output),
            Ok(Ok((status, (output, error)))) => Err(self.failure(status, &output, &error)),
            Ok(Err(error)) => Err(error),
            Err(_) => {
                let (plugin, limit) = (self.plugin.to_owned(), self.limit);
                Err(PluginError::TimedOut { plugin, command: self.command, limit })
            }
        }
    }

    async fn answer(&self, stream: Option<impl AsyncRead + Unpin>) -> Result<Vec<u8>, PluginError> {
        let mut output = Vec::new();
        if let Some(stream) = stream {
            let read = stream.take(OUTPUT_LIMIT + 1).read_to_end(&mut output).await;
            read.map_err(|source| PluginError::Run { path: self.program.to_owned(), source })?;
        }
        if output.len() as u64 > OUTPUT_LIMIT {
            return Err(PluginError::TooMuch { plugin: self.plugin.to_owned(), command: self.command });
        }
        Ok(output)
    }

    /// From the error object on standard output (section 5), or from whatever there is.
    fn failure(&self, status: ExitStatus, output: &[u8], error: &[u8]) -> PluginError {
        #[derive(Deserialize)]
        struct Words {
            code: u64,
            msg: String,
            #[serde(default)]
            details: String,
        }
        let plugin = self.plugin.to_owned();
        let command = self.command;
        if let Ok(Words { code, msg, details }) = serde_json::from_slice(output) {
            let details = if details.is_empty() { details } else { format!(" ({details})") };
            let message = format!("{msg}{details}").chars().take(MESSAGE).collect();
            return PluginError::Refused { plugin, command, code, message };
        }
        let words = if output.trim_ascii().is_empty() { error } else { output };
        let status = match (status.code(), status.signal()) {
            (Some(code), _) => format!("exit status {code}"),
            (None, signal) => format!("signal {}", signal.unwrap_or_default()),
        };
        PluginError::Failed { plugin, command, status, excerpt: excerpt(words) }
    }
}

/// Standard error to its end; the beginning is kept.
async fn words(stream: Option<impl AsyncRead + Unpin>) -> Result<Vec<u8>, PluginError> {
    let mut kept = Vec::new();
    if let Some(mut stream) = stream {
        // What cannot be read is not worth failing for.
        let _ = (&mut stream).take(ERROR_LIMIT).read_to_end(&mut kept).await;
        let _ = tokio::io::copy(&mut stream, &mut tokio::io::sink()).await;
    }
    Ok(kept)
}
