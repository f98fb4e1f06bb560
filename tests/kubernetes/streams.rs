//! What flows through the runtime while a pod runs: logs that are followed and rotated, attached input, terminals, forwarded ports; by both
//! of kubectl's protocols, SPDY and WebSocket.

use std::fs;
use std::io::Write;
use std::path::PathBuf;
use std::process::{Command, Output, Stdio};

use anyhow::{Context, Result, ensure};
use serde_json::{Value, json};

use crate::cluster::{Cluster, Settings, kubectl_command};
use crate::images::AGNHOST;
use crate::restarts::Forward;
use crate::workloads::{Kind, each_kind, runs, waits};
use crate::{PATIENCE, Tests, until};

pub(crate) fn add(tests: &mut Tests) {
    let usual = Settings::default();
    tests.add_for_all("streams::follow_logs", &usual, |c| each_kind(c, follow_logs));
    tests.add_for_all("streams::rotate_logs", &usual, |c| each_kind(c, rotate_logs));
    tests.add_for_all("streams::attach_to_input", &usual, |c| each_kind(c, attach_to_input));
    tests.add_for_all("streams::have_terminals", &usual, |c| each_kind(c, have_terminals));
    tests.add_for_all("streams::forward_ports", &usual, |c| each_kind(c, forward_ports));
}

/// kubectl's protocols, as the values of the variables that choose between them.
const WEB_SOCKETS: [&str; 2] = ["true", "false"];

/// kubectl with one of the protocols. It is ended when it takes too long.
fn kubectl(web_sockets: &str) -> Command {
    limited(kubectl_command().get_program(), web_sockets)
}

/// The same for a program that calls kubectl.
fn limited(program: impl AsRef<std::ffi::OsStr>, web_sockets: &str) -> Command {
    let mut command = Command::new("timeout");
    command.arg(PATIENCE.as_secs().to_string()).arg(program);
    for (name, value) in kubectl_command().get_envs() {
        command.envs(value.map(|value| (name, value)));
    }
    command.env("KUBECTL_REMOTE_COMMAND_WEBSOCKETS", web_sockets).stdin(Stdio::null());
    command
}

/// What a command that succeeded has printed.
fn printed(output: Output) -> Result<String> {
    ensure!(output.status.success(), "{output:?}");
    Ok(String::from_utf8(output.stdout)?)
}

/// Who follows sees every line, and the end.
fn follow_logs(cluster: &Cluster, kind: Kind) -> Result<()> {
    let script = "while [ ! -e /go ]; do sleep 0.1; done
i=0; while [ $i -lt 50 ]; do echo line $i; i=$((i+1)); sleep 0.05; done; printf unfinished";
    let spec = json!({"restartPolicy": "Never", "containers": [runs("c", script, &json!({}))]});
    cluster.run(&[kind.pod("followed", &spec)])?;
    let mut follow = kubectl("true");
    let follow = follow.args(["logs", "--follow", "followed"]).stdout(Stdio::piped()).stderr(Stdio::piped());
    let follow = follow.spawn().context("starting kubectl logs")?;
    cluster.exec("followed", &["touch", "/go"])?;
    let seen = printed(follow.wait_with_output()?)?;
    let lines: Vec<String> = (0..50).map(|number| format!("line {number}\n")).collect();
    ensure!(seen == lines.concat() + "unfinished", "{seen:?}");
    cluster.delete(&["followed"])
}

/// kubelet moves a log that has grown away, and asks the runtime to write to a new one.
fn rotate_logs(cluster: &Cluster, kind: Kind) -> Result<()> {
    let script = "head -c 3000000 /dev/zero | tr '\\0' x | fold -w 99; echo
while :; do if [ -e /more ]; then rm /more; echo more; fi; sleep 0.2; done";
    cluster.run(&[kind.pod("rotated", &json!({"containers": [runs("c", script, &json!({}))]}))])?;
    let uid = cluster.get(&["pod", "rotated"])?["metadata"]["uid"].as_str().context("no uid")?.to_owned();
    let directory = PathBuf::from(format!("/var/log/pods/default_rotated_{uid}/c"));
    until("the log is rotated", || {
        let names = fs::read_dir(&directory)?.flatten().map(|entry| entry.file_name());
        let names: Vec<String> = names.map(|name| name.to_string_lossy().into_owned()).collect();
        ensure!(names.iter().any(|name| name.starts_with("0.log.")), "{names:?}");
        ensure!(names.iter().any(|name| name == "0.log"), "{names:?}");
        Ok(())
    })?;
    cluster.exec("rotated", &["touch", "/more"])?;
    until("what comes later is in the new log", || {
        let seen = cluster.kubectl(&["logs", "rotated", "--tail", "1"])?;
        ensure!(seen == "more\n", "{seen:?}");
        Ok(())
    })?;
    cluster.delete(&["rotated"])
}

/// What goes in through `kubectl attach`, and its end, arrive; what comes out is seen there and in the log.
fn attach_to_input(cluster: &Cluster, kind: Kind) -> Result<()> {
    for web_sockets in WEB_SOCKETS {
        let script = "while read line; do echo \"got $line\"; done; echo end";
        let container = runs("c", script, &json!({"stdin": true, "stdinOnce": true}));
        cluster
            .run(&[kind.pod("attached", &json!({"restartPolicy": "Never", "containers": [container]}))])?;
        let mut attach = kubectl(web_sockets);
        attach.args(["attach", "--stdin", "attached"]);
        let attach = attach.stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(Stdio::piped());
        let mut attach = attach.spawn().context("starting kubectl attach")?;
        let mut input = attach.stdin.take().context("no input")?;
        input.write_all(b"one\ntwo\n")?;
        drop(input);
        let wanted = "got one\ngot two\nend\n";
        let seen = printed(attach.wait_with_output()?)?;
        ensure!(seen == wanted, "{seen:?}");
        until("the container has ended", || {
            let status = cluster.get(&["pod", "attached"])?["status"].clone();
            ensure!(status["phase"] == "Succeeded", "{status}");
            Ok(())
        })?;
        let log = cluster.kubectl(&["logs", "attached"])?;
        ensure!(log == wanted, "{log:?}");
        cluster.delete(&["attached"])?;
    }
    Ok(())
}

/// `kubectl exec -it` from a terminal has one in the container, of the same size.
fn have_terminals(cluster: &Cluster, kind: Kind) -> Result<()> {
    cluster.run(&[kind.pod("terminal", &json!({"containers": [waits("c", &json!({}))]}))])?;
    let inside = "tty; until [ \"$(stty size)\" = \"33 77\" ]; do sleep 0.1; done; echo sized; exit 6";
    let program = kubectl_command().get_program().to_string_lossy().into_owned();
    let outside = format!("stty rows 33 cols 77; exec {program} exec -it terminal -- sh -c '{inside}'");
    for web_sockets in WEB_SOCKETS {
        // script(1) is a terminal, and ends as its command does.
        let mut command = limited("script", web_sockets);
        let output = command.args(["--quiet", "--return", "--command", &outside, "/dev/null"]).output()?;
        let seen = String::from_utf8_lossy(&output.stdout);
        ensure!(seen.contains("/dev/pts/") && seen.contains("sized"), "{output:?}");
        ensure!(output.status.code() == Some(6), "{output:?}");
    }
    cluster.delete(&["terminal"])
}

/// Short answers and a long one.
fn forward_ports(cluster: &Cluster, kind: Kind) -> Result<()> {
    let container: Value = json!({
        "name": "c", "image": AGNHOST, "args": ["netexec"],
        "readinessProbe": {"httpGet": {"path": "/healthz", "port": 8080}, "periodSeconds": 1, "timeoutSeconds": 20},
    });
    cluster.run(&[kind.pod("forwarded", &json!({"containers": [container]}))])?;
    for web_sockets in WEB_SOCKETS {
        let forward = Forward::by(web_sockets, "forwarded")?;
        for _ in 0..3 {
            let answer = forward.get("/hostname")?;
            ensure!(answer.ends_with("forwarded"), "{answer:?}");
        }
        let answer = forward.get("/shell?shellCommand=seq+100000")?;
        ensure!((1..100_000).all(|number| number % 1000 != 0 || answer.contains(&format!("\\n{number}\\n"))));
        ensure!(answer.len() > 600_000, "{} bytes", answer.len());
    }
    cluster.delete(&["forwarded"])
}
