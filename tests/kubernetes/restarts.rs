//! The daemon dies or is upgraded under a running cluster, and nobody but its own log tells.

use std::io::{BufRead, BufReader, Read, Write};
use std::net::TcpStream;
use std::process::{Child, ChildStdout, Stdio};
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use serde_json::Value;

use crate::cluster::{Cluster, Settings, kubectl_command, name};
use crate::machine::NAME;
use crate::pods::{machine, pod, serving};
use crate::{Tests, until};

pub(crate) fn add(tests: &mut Tests) {
    tests.add("restarts::nobody_notices_once", &Settings::default(), |cluster| notice_nothing(cluster, 1));
    tests.add("restarts::nobody_notices_ten_times", &Settings::default(), |cluster| {
        notice_nothing(cluster, 10)
    });
    tests.add("restarts::nobody_notices_ten_upgrades", &Settings::default(), |cluster| {
        notice_no_upgrade(cluster, 10)
    });
    tests.add_in_lab("restarts::nobody_notices_upgrades_of_the_unit", &Settings::default(), |cluster| {
        notice_no_upgrade(cluster, 3)
    });
}

/// Everything that tells of a restart: each pod's sandbox, and each container's id, start and number of restarts.
fn lives(cluster: &Cluster) -> Result<Vec<String>> {
    let pods = cluster.get(&["pods", "--all-namespaces"])?;
    let mut lives = Vec::new();
    for pod in pods["items"].as_array().context("no pods")? {
        lives.push(format!("{} {}", name(pod), pod["status"]["podIP"]));
        for container in pod["status"]["containerStatuses"].as_array().into_iter().flatten() {
            lives.push(format!(
                "{}/{} {} {} {}",
                name(pod),
                container["name"],
                container["containerID"],
                container["restartCount"],
                container["state"]["running"]["startedAt"]
            ));
        }
    }
    // What pods before have left kubelet removes when it likes.
    let ready = ["pods", "--state", "ready", "--output", "json"];
    let sandboxes: Value = serde_json::from_str(&cluster.crictl(&ready)?)?;
    for sandbox in sandboxes["items"].as_array().context("no sandboxes")? {
        lives.push(format!("{} {}", sandbox["metadata"]["name"], sandbox["id"]));
    }
    lives.sort();
    Ok(lives)
}

/// When the node became ready: a moment in which it was not would have left another time.
fn ready_since(cluster: &Cluster) -> Result<String> {
    let node = cluster.get(&["node", NAME])?;
    let conditions = node["status"]["conditions"].as_array().context("no conditions")?;
    let ready = conditions.iter().find(|condition| condition["type"] == "Ready").context("no Ready")?;
    ensure!(ready["status"] == "True", "{ready}");
    Ok(ready["lastTransitionTime"].to_string())
}

/// Waits for kubelet, which connects again by itself, at the latest three seconds after the daemon serves (cri-client's `maxBackoffDelay`).
/// Until then nothing but that may be wrong: there is nobody, or, where systemd keeps the socket, nobody who answers within the five seconds
/// that gRPC waits for an answer to its connection.
fn connected(cluster: &Cluster) -> Result<()> {
    until("kubelet is connected again", || match cluster.exec("trusted", &["true"]) {
        Err(error) if format!("{error:#}").contains("connection error: desc = ") => Err(error),
        other => Ok(other),
    })?
    .map(drop)
}

fn notice_nothing(cluster: &mut Cluster, times: usize) -> Result<()> {
    go_on(cluster, times, |cluster, _| {
        cluster.runtime.kill()?;
        cluster.runtime.start_again()
    })
}

/// The programs are replaced by those of another build, and the daemon is restarted, each build by the other.
fn notice_no_upgrade(cluster: &mut Cluster, times: usize) -> Result<()> {
    // So the old daemon starts the pods with new programs.
    cluster.runtime.install(1)?;
    go_on(cluster, times, |cluster, turn| {
        cluster.runtime.install(turn % 2)?;
        cluster.runtime.restart()
    })
}

/// Pods of both kinds, and everything else on the node, go on while the daemon is restarted this many times.
fn go_on(
    cluster: &mut Cluster,
    times: usize,
    restart: impl Fn(&mut Cluster, usize) -> Result<()>,
) -> Result<()> {
    cluster.run(&[pod("trusted"), machine("untrusted")].map(serving))?;
    let (before, since) = (lives(cluster)?, ready_since(cluster)?);
    for turn in 1..=times {
        restart(cluster, turn).with_context(|| format!("restart {turn}"))?;
        connected(cluster)?;
        // At once, without another try.
        for name in ["trusted", "untrusted"] {
            let said = cluster.exec(name, &["hostname"])?;
            ensure!(said.trim() == name, "{said}");
            let forward = Forward::to(name)?;
            let answer = forward.get("/hostname")?;
            ensure!(answer.ends_with(name), "{name}: {answer:?}");
        }
    }
    let after = lives(cluster)?;
    ensure!(after == before, "before: {before:#?}\nafter: {after:#?}");
    ensure!(ready_since(cluster)? == since, "the node was not ready for a moment");
    cluster.delete(&["trusted", "untrusted"])
}

/// A `kubectl port-forward` that runs.
#[derive(Debug)]
pub(crate) struct Forward {
    process: Child,
    /// Held open: kubectl writes a line for each connection, and dies if nobody could read it.
    output: BufReader<ChildStdout>,
    port: u16,
}

impl Forward {
    /// Starts one to port 8080 of a pod.
    pub(crate) fn to(pod: &str) -> Result<Self> {
        Self::by("true", pod)
    }

    /// The same by WebSocket ("true") or SPDY ("false").
    pub(crate) fn by(web_sockets: &str, pod: &str) -> Result<Self> {
        let mut process = kubectl_command()
            .env("KUBECTL_PORT_FORWARD_WEBSOCKETS", web_sockets)
            .args(["port-forward", "--address", "127.0.0.1", &format!("pod/{pod}"), ":8080"])
            .stdout(Stdio::piped())
            .spawn()
            .context("starting kubectl port-forward")?;
        let output = BufReader::new(process.stdout.take().context("no output")?);
        let mut forward = Self { process, output, port: 0 };
        let mut line = String::new();
        forward.output.read_line(&mut line)?;
        // "Forwarding from 127.0.0.1:40321 -> 8080"
        let address = line.split_whitespace().nth(2).with_context(|| format!("no address in {line:?}"))?;
        forward.port = address.rsplit(':').next().unwrap_or_default().parse().context(line.clone())?;
        Ok(forward)
    }

    /// Asks for a page; the whole answer.
    pub(crate) fn get(&self, path: &str) -> Result<String> {
        let mut stream = TcpStream::connect(("127.0.0.1", self.port)).context("connecting")?;
        stream.set_read_timeout(Some(Duration::from_secs(60)))?;
        write!(stream, "GET {path} HTTP/1.0\r\n\r\n")?;
        let mut answer = String::new();
        stream.read_to_string(&mut answer).context("reading the answer")?;
        Ok(answer)
    }
}

impl Drop for Forward {
    fn drop(&mut self) {
        // Both fail only when it has ended already.
        let _ = self.process.kill();
        let _ = self.process.wait();
    }
}
