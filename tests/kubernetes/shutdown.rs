//! A node that is shut down: kubelet holds logind up until the pods have ended, each in the time that it has. Only in the lab, which has
//! a logind.

use std::fs;
use std::process::Command;

use anyhow::{Context, Result, ensure};
use serde_json::{Value, json};

use crate::cluster::{Cluster, Settings, name};
use crate::machine::{DIRECTORY, NAME, run};
use crate::until;
use crate::workloads::{Kind, runs};
use crate::{Tests, unit};

/// With this the power stays on: logind's order is refused, and logind tells everybody that the shutdown is off.
const REFUSAL: &str = "/run/systemd/system/poweroff.target.d";

/// The pod that ends when those before have been seen to.
const LAST: &str = "last";

pub(crate) fn add(tests: &mut Tests) {
    tests.add_in_lab("shutdown::lets_pods_end", &Settings::default(), lets_pods_end);
}

fn lets_pods_end(cluster: &mut Cluster) -> Result<()> {
    let ends = format!("{DIRECTORY}/ends");
    fs::create_dir_all(&ends)?;
    let pods =
        [(Kind::Trusted, "trusted", "go"), (Kind::Machine, "machine", "go"), (Kind::Trusted, LAST, LAST)];
    let pods = pods.map(|(kind, name, signal)| {
        // The volume of a machine is the node's directory as well.
        let script = format!(
            "trap 'while [ ! -e /ends/{signal} ]; do sleep 1; done; touch /ends/{name}-ended; exit 3' TERM
sleep 1000000 & wait"
        );
        let mounts = json!({"volumeMounts": [{"name": "ends", "mountPath": "/ends"}]});
        kind.pod(
            name,
            &json!({
                "terminationGracePeriodSeconds": 280,
                "containers": [runs("c", &script, &mounts)],
                "volumes": [{"name": "ends", "hostPath": {"path": ends}}],
            }),
        )
    });
    cluster.run(&pods)?;
    let containers = pods.each_ref().map(|pod| container(cluster, name(pod)));
    let locks = run(Command::new("systemd-inhibit").args(["--list", "--no-legend", "--no-pager"]))?;
    ensure!(locks.lines().any(|lock| lock.starts_with("kubelet")), "kubelet holds nothing up: {locks:?}");

    fs::create_dir_all(REFUSAL)?;
    fs::write(format!("{REFUSAL}/tests.conf"), "[Unit]\nRefuseManualStart=yes\n")?;
    unit::systemctl(&["daemon-reload"])?;
    let result = shut_down(cluster, &ends);
    fs::remove_dir_all(REFUSAL)?;
    unit::systemctl(&["daemon-reload"])?;
    result?;

    for (pod, container) in pods.iter().zip(containers) {
        ensure!(fs::exists(format!("{ends}/{}-ended", name(pod)))?, "{} did not end by itself", name(pod));
        let status: Value = serde_json::from_str(&cluster.crictl(&["inspect", &container?])?)?;
        let status = &status["status"];
        ensure!(status["state"] == "CONTAINER_EXITED" && status["exitCode"] == 3, "{}: {status}", name(pod));
    }
    // As after a boot: the control plane's pods have ended too.
    cluster.stop_kubelet()?;
    cluster.start_kubelet()?;
    cluster.wait()?;
    cluster.delete(&pods.each_ref().map(name))
}

/// Orders it, and returns when kubelet has let go and logind has found that the power stays on.
fn shut_down(cluster: &Cluster, ends: &str) -> Result<()> {
    logind(&["call"], &["PowerOff", "b", "false"])?;
    until("the node says that it goes", || {
        let node = cluster.get(&["node", NAME])?;
        let conditions = node["status"]["conditions"].as_array().context("no conditions")?;
        let ready = conditions.iter().find(|condition| condition["type"] == "Ready").context("no Ready")?;
        let said = ready["message"].as_str().unwrap_or_default();
        ensure!(ready["status"] == "False" && said.contains("node is shutting down"), "{ready}");
        Ok(())
    })?;
    fs::write(format!("{ends}/go"), "")?;
    // While another pod keeps the control plane alive, which ends after all others.
    for name in ["trusted", "machine"] {
        until("the pod's end is known", || {
            let status = cluster.get(&["pod", name])?["status"].clone();
            ensure!(status["phase"] == "Failed" && status["reason"] == "Terminated", "{name}: {status}");
            Ok(())
        })?;
    }
    fs::write(format!("{ends}/{LAST}"), "")?;
    until("kubelet lets go", || {
        let said = logind(&["get-property"], &["PreparingForShutdown"])?;
        ensure!(said.trim() == "b false", "{said}");
        Ok(())
    })
}

fn logind(verb: &[&str], member: &[&str]) -> Result<String> {
    let object = ["org.freedesktop.login1", "/org/freedesktop/login1", "org.freedesktop.login1.Manager"];
    run(Command::new("busctl").args([verb, &object, member].concat()))
}

/// The running container of a pod.
fn container(cluster: &Cluster, pod: &str) -> Result<String> {
    let pod = cluster.get(&["pod", pod])?;
    let id = pod["status"]["containerStatuses"][0]["containerID"].as_str().context("no container")?;
    Ok(id.rsplit('/').next().unwrap_or(id).to_owned())
}
