//! A cluster where the processor is emulated, as in the lab: everything in it takes ten times as long, so it is spared what it can do without
//! while what is tested stays as it is. Nothing in here is the runtime's or kubelet's way to it.

use std::fs;
use std::path::Path;
use std::process::Command;

use anyhow::Result;
use serde_json::{Value, json};

use crate::unit::Unit;

/// What Go programs are told: to collect garbage only where memory becomes short. It takes a quarter of a single processor otherwise.
const ENVIRONMENT: [(&str, &str); 2] = [("GOGC", "off"), ("GOMEMLIMIT", "600MiB")];

/// The controllers that a node and plain pods need; every other one watches, and lists, what nobody here makes.
const CONTROLLERS: &str = "certificatesigningrequest-approving-controller,\
    certificatesigningrequest-signing-controller,daemonset-controller,deployment-controller,\
    endpointslice-controller,namespace-controller,node-ipam-controller,node-lifecycle-controller,\
    replicaset-controller,root-ca-certificate-publisher-controller,serviceaccount-controller,\
    serviceaccount-token-controller";

/// What the control plane asks for, in thousandths of a processor: the others wait for the first two, and pods have to find room.
const REQUESTS: [(&str, u32); 4] =
    [("kube-apiserver", 200), ("etcd", 100), ("kube-controller-manager", 10), ("kube-scheduler", 10)];

/// Whether it is.
pub(crate) fn is_wanted() -> bool {
    Unit::is_wanted()
}

/// A command of a program written in Go.
pub(crate) fn spared(command: &mut Command) -> &mut Command {
    if is_wanted() {
        command.envs(ENVIRONMENT);
    }
    command
}

/// How much longer than elsewhere things may take.
pub(crate) fn slowness() -> u32 {
    if is_wanted() { 3 } else { 1 }
}

/// Additions to kubelet's configuration.
pub(crate) fn spare_kubelet(kubelet: &mut Value) {
    if is_wanted() {
        // What needs the API server ends a few times before that answers.
        kubelet["crashLoopBackOff"] = json!({"maxContainerRestartPeriod": "5s"});
    }
}

/// Additions to kubeadm's InitConfiguration, which refer to files in this directory.
pub(crate) fn spare_init(init: &mut Value, directory: &Path) -> Result<()> {
    if !is_wanted() {
        return Ok(());
    }
    fs::create_dir_all(directory)?;
    for (name, request) in REQUESTS {
        let resources = json!({"requests": {"cpu": format!("{request}m")}});
        let patch = json!({"spec": {"containers": [{"name": name, "resources": resources}]}});
        fs::write(directory.join(format!("{name}+strategic.json")), patch.to_string())?;
    }
    init["patches"] = json!({"directory": directory});
    Ok(())
}

/// Additions to kubeadm's ClusterConfiguration.
pub(crate) fn spare(cluster: &mut Value) {
    if !is_wanted() {
        return;
    }
    let environment: Vec<Value> =
        ENVIRONMENT.iter().map(|(name, value)| json!({"name": name, "value": value})).collect();
    // A tenth of the time that RSA takes for each connection.
    cluster["encryptionAlgorithm"] = "ECDSA-P256".into();
    let components: [(&str, &[(&str, &str)]); 3] = [
        (
            "apiServer",
            &[
                ("enable-priority-and-fairness", "false"),
                ("etcd-healthcheck-timeout", "30s"),
                ("etcd-readycheck-timeout", "30s"),
            ],
        ),
        // There is no second one, and who is late with its lease ends.
        ("controllerManager", &[("leader-elect", "false"), ("controllers", CONTROLLERS)]),
        ("scheduler", &[("leader-elect", "false")]),
    ];
    for (component, arguments) in components {
        add(&mut cluster[component], arguments, &environment);
    }
    // Its files are in memory, and every request would be reported as a slow one.
    let etcd = [
        ("unsafe-no-fsync", "true"),
        ("log-level", "error"),
        ("warning-apply-duration", "60s"),
        ("warning-unary-request-duration", "60s"),
        ("heartbeat-interval", "1000"),
        ("election-timeout", "10000"),
    ];
    add(&mut cluster["etcd"]["local"], &etcd, &environment);
}

fn add(component: &mut Value, arguments: &[(&str, &str)], environment: &[Value]) {
    let mut all = component["extraArgs"].as_array().cloned().unwrap_or_default();
    all.extend(arguments.iter().map(|(name, value)| json!({"name": name, "value": value})));
    component["extraArgs"] = all.into();
    component["extraEnvs"] = environment.to_vec().into();
}
