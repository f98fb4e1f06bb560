//! `podvisor shell`: the node operator's console in the guest of a pod. It goes past the daemon and the pod's monitor, straight to the
//! agent, so that it also works when one of those does not.

use std::io::{self, Read, Write};
use std::net::Shutdown;
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::process::ExitCode;
use std::time::Duration;

use anyhow::{Context, bail, ensure};
use podvisor_config::Config;
use podvisor_proto::agent::{Console, Open, Opened, STREAM_PORT, open::Stream};
use prost::Message;
use rustix::termios::{OptionalActions, Termios, isatty, tcgetattr, tcsetattr};

use crate::id::PodId;
use crate::monitor::connection::frame;

/// A guest that works answers at once.
const PATIENCE: Duration = Duration::from_secs(10);

/// Longest answer to `Open`.
const ANSWER: usize = 4096;

pub(crate) fn run(pod: &str, config: &Config) -> anyhow::Result<ExitCode> {
    let pod = find(&config.run.join("pods"), pod)?;
    let socket = config.run.join("pods").join(pod.as_str()).join("vsock.sock");
    ensure!(socket.exists(), "pod {pod} is no virtual machine that runs: there is no {}", socket.display());
    let console = connect(&socket).with_context(|| format!("opening a console in the guest of pod {pod}"))?;
    if isatty(io::stdin()) {
        eprintln!("podvisor: in the guest of pod {pod}; the shell's end (exit) leads back");
    }
    let _raw = RawTerminal::enter();
    carry(console).context("the console broke")?;
    Ok(ExitCode::SUCCESS)
}

/// The one pod whose id begins so.
fn find(pods: &Path, digits: &str) -> anyhow::Result<PodId> {
    let entries =
        std::fs::read_dir(pods).with_context(|| format!("looking for pods in {}", pods.display()))?;
    let ids = entries.flatten().filter_map(|entry| entry.file_name().to_str()?.parse::<PodId>().ok());
    let found: Vec<PodId> = ids.filter(|id| !digits.is_empty() && id.as_str().starts_with(digits)).collect();
    match &found[..] {
        [only] => Ok(only.clone()),
        [] => bail!("no pod whose id begins with {digits:?} runs here; `crictl pods` lists them"),
        _ => bail!("{} pods have ids that begin with {digits:?}: give more digits", found.len()),
    }
}

/// By the hypervisor's socket to the agent (hypervisor.proto, agent.proto).
fn connect(socket: &Path) -> anyhow::Result<UnixStream> {
    let mut stream = UnixStream::connect(socket)?;
    stream.set_read_timeout(Some(PATIENCE))?;
    writeln!(stream, "CONNECT {STREAM_PORT}")?;
    let answer = line(&mut stream).context("the hypervisor does not answer")?;
    ensure!(answer.starts_with("OK "), "the agent does not listen");
    stream.write_all(&frame(&Open { stream: Some(Stream::Console(Console {})) }))?;
    let mut length = [0; 4];
    stream.read_exact(&mut length).context("the agent does not answer")?;
    let length = u32::from_le_bytes(length) as usize;
    ensure!(length <= ANSWER, "the agent's answer is too long");
    let mut answer = vec![0; length];
    stream.read_exact(&mut answer)?;
    if let Some(error) = Opened::decode(answer.as_slice())?.error {
        bail!("{}", error.detail.chars().filter(|c| !c.is_control()).collect::<String>());
    }
    stream.set_read_timeout(None)?;
    Ok(stream)
}

/// Byte by byte: what follows the line belongs to the stream.
fn line(stream: &mut UnixStream) -> io::Result<String> {
    let mut text = Vec::new();
    let mut byte = [0];
    while text.len() < 64 {
        stream.read_exact(&mut byte)?;
        if byte == *b"\n" {
            break;
        }
        text.push(byte[0]);
    }
    Ok(String::from_utf8_lossy(&text).into_owned())
}

/// Until the shell ends.
fn carry(console: UnixStream) -> io::Result<()> {
    let mut to_guest = console.try_clone()?;
    // Ends with the process: a read of a terminal cannot be called off.
    std::thread::spawn(move || {
        let _ = io::copy(&mut io::stdin().lock(), &mut to_guest);
        let _ = to_guest.shutdown(Shutdown::Write);
    });
    let mut from_guest = console;
    let mut output = io::stdout().lock();
    let mut buffer = [0; 4096];
    loop {
        let count = match from_guest.read(&mut buffer) {
            Ok(0) => return Ok(()),
            Err(error) if error.kind() == io::ErrorKind::ConnectionReset => return Ok(()),
            count => count?,
        };
        output.write_all(&buffer[..count])?;
        output.flush()?;
    }
}

/// The operator's terminal passes every key on; as it was again when this is dropped.
struct RawTerminal(Termios);

impl RawTerminal {
    fn enter() -> Option<Self> {
        let before = tcgetattr(io::stdin()).ok()?;
        let mut raw = before.clone();
        raw.make_raw();
        tcsetattr(io::stdin(), OptionalActions::Flush, &raw).ok()?;
        Some(Self(before))
    }
}

impl Drop for RawTerminal {
    fn drop(&mut self) {
        let _ = tcsetattr(io::stdin(), OptionalActions::Flush, &self.0);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_pod_is_found_by_its_first_digits() {
        let pods = tempfile::tempdir().unwrap();
        let [one, two] = ["a".repeat(64), format!("ab{}", "c".repeat(62))];
        for id in [&one, &two] {
            std::fs::create_dir(pods.path().join(id)).unwrap();
        }
        assert_eq!(find(pods.path(), "ab").unwrap().as_str(), two);
        assert!(find(pods.path(), "a").unwrap_err().to_string().contains("2 pods"));
        assert!(find(pods.path(), "b").unwrap_err().to_string().contains("crictl pods"));
        assert!(find(pods.path(), "").is_err());
    }
}
