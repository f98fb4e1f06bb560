//! Which pods are virtual machines: by annotation, by RuntimeClass, by the node's default; and that a pod stays what it was made as.

use std::fs;
use std::process::Command;

use anyhow::{Context, Result, ensure};
use podvisor_critest::{project_dir, target_dir};
use serde_json::{Value, json};

use crate::cluster::{Cluster, Settings, name};
use crate::images::BUSYBOX;
use crate::pods::{TRUSTED_SANDBOX, UNTRUSTED, host_kernel, machine, of_class, pod};
use crate::runtime::Setup;
use crate::{Tests, until};

pub(crate) fn add(tests: &mut Tests) {
    let usual = Settings::default();
    tests.add("trust::by_annotation_and_runtime_class", &usual, by_annotation_and_runtime_class);
    tests.add("trust::of_the_control_plane_stays", &usual, of_the_control_plane_stays);
    tests.add("trust::keeps_within_memory_limits", &usual, keeps_within_memory_limits);
    tests.add("trust::of_a_running_pod_does_not_change", &usual, of_a_running_pod_does_not_change);
    tests.add("trust::new_guests_are_for_new_pods", &usual, new_guests_are_for_new_pods);
}

/// Those that need a cluster of their own.
pub(crate) fn add_untrusted(tests: &mut Tests) {
    let setup = Setup { untrusted: true, ..Setup::default() };
    let settings = Settings { setup, ..Settings::default() };
    tests.add("trust::by_the_nodes_default", &settings, by_the_nodes_default);
}

/// The RuntimeClasses that are delivered, and one by another of the names that manifests for Kata Containers use.
fn apply_classes(cluster: &Cluster) -> Result<()> {
    let file = project_dir().join("config/kubernetes/runtimeclasses.yaml");
    cluster.kubectl(&["apply", "--filename", &file.display().to_string()])?;
    cluster.apply(&json!({
        "apiVersion": "node.k8s.io/v1", "kind": "RuntimeClass",
        "metadata": {"name": "kata-qemu"}, "handler": "kata-qemu",
    }))
}

/// A pod that is a virtual machine, for kubectl and for crictl.
fn is_machine(cluster: &Cluster, pod: &str) -> Result<()> {
    is_machine_by(cluster, pod, "vm")
}

/// The same, by this name of the handler.
fn is_machine_by(cluster: &Cluster, pod: &str, handler: &str) -> Result<()> {
    let kernel = cluster.kernel(pod)?;
    ensure!(kernel != host_kernel(), "{pod} runs on the node's kernel {kernel}");
    let sandbox = cluster.sandbox(pod)?;
    ensure!(sandbox["info"]["handler"] == handler, "{pod}: {sandbox}");
    let machine = &sandbox["info"]["virtualMachine"];
    ensure!(machine["kernelRelease"] == kernel.as_str(), "{pod}: {machine} {kernel}");
    Ok(())
}

/// A pod on the node's own kernel.
fn is_trusted(cluster: &Cluster, pod: &str) -> Result<()> {
    let handler = cluster.handler(pod)?;
    ensure!(handler == "runc", "{pod} runs by {handler}");
    Ok(())
}

fn by_annotation_and_runtime_class(cluster: &mut Cluster) -> Result<()> {
    apply_classes(cluster)?;
    let mut asked = pod("asked");
    asked["metadata"]["annotations"][TRUSTED_SANDBOX] = "false".into();
    let pods = [
        machine("annotated"),
        asked,
        of_class("by-vm", "vm"),
        of_class("by-kata", "kata"),
        of_class("by-kata-qemu", "kata-qemu"),
        of_class("by-runc", "runc"),
        pod("plain"),
    ];
    cluster.run(&pods)?;
    is_machine(cluster, "annotated")?;
    is_machine(cluster, "asked")?;
    // A class's name goes through as the pod's handler; an annotation leaves none.
    for (name, handler) in [("by-vm", "vm"), ("by-kata", "kata"), ("by-kata-qemu", "kata-qemu")] {
        is_machine_by(cluster, name, handler)?;
        let sandbox = cluster.sandbox(name)?;
        ensure!(sandbox["status"]["runtimeHandler"] == handler, "{name}: {}", sandbox["status"]);
    }
    for name in ["by-runc", "plain"] {
        is_trusted(cluster, name)?;
        ensure!(cluster.kernel(name)? == host_kernel(), "{name} runs on another kernel");
    }
    // What the class says of its overhead is the pod's.
    let overhead = cluster.get(&["pod", "by-vm"])?["spec"]["overhead"].clone();
    ensure!(overhead["memory"] == "160Mi", "{overhead}");
    cluster.delete(&pods.each_ref().map(name))
}

fn of_the_control_plane_stays(cluster: &mut Cluster) -> Result<()> {
    let pods = cluster.get(&["pods", "--namespace", "kube-system"])?;
    let mut seen = 0;
    for pod in pods["items"].as_array().context("no pods")? {
        is_trusted(cluster, name(pod))?;
        seen += 1;
    }
    ensure!(seen >= 7, "only {seen} pods of the control plane");
    Ok(())
}

/// On a node whose default is untrusted: its own agents stay on its kernel, and of the control plane only CoreDNS is none of them.
fn by_the_nodes_default(cluster: &mut Cluster) -> Result<()> {
    let pods = cluster.get(&["pods", "--namespace", "kube-system"])?;
    for pod in pods["items"].as_array().context("no pods")? {
        let wanted = if name(pod).starts_with("coredns") { "vm" } else { "runc" };
        let handler = cluster.handler(name(pod))?;
        ensure!(handler == wanted, "{} runs by {handler}", name(pod));
    }
    let mut agreeing = pod("agreeing");
    agreeing["metadata"]["annotations"][TRUSTED_SANDBOX] = "true".into();
    let mut on_host = pod("on-host");
    on_host["spec"]["hostNetwork"] = true.into();
    on_host["spec"]["containers"][0]["args"] = json!(["pause"]);
    cluster.run(&[pod("silent"), agreeing, on_host])?;
    // A pod cannot make itself trusted by saying so.
    is_machine(cluster, "silent")?;
    is_machine(cluster, "agreeing")?;
    is_trusted(cluster, "on-host")?;
    cluster.delete(&["silent", "agreeing", "on-host"])
}

/// A pod with a memory limit, which uses nearly all of it, and then more.
fn hungry(name: &str, class: &str) -> Value {
    let mut pod = of_class(name, class);
    pod["spec"]["restartPolicy"] = "Never".into();
    pod["spec"]["volumes"] = json!([{"name": "memory", "emptyDir": {"medium": "Memory"}}]);
    pod["spec"]["containers"] = json!([{
        "name": "c",
        "image": BUSYBOX,
        "command": ["sh", "-c", "dd if=/dev/zero of=/memory/full bs=1M count=56; while [ ! -e /more ]; do sleep 0.1; done; exec tail /dev/zero"],
        "resources": {"limits": {"memory": "64Mi", "cpu": "1"}, "requests": {"cpu": "10m"}},
        "volumeMounts": [{"name": "memory", "mountPath": "/memory"}],
    }]);
    pod
}

/// With a declared overhead and without: a limit is the containers' own, and who exceeds it is killed, not the machine.
fn keeps_within_memory_limits(cluster: &mut Cluster) -> Result<()> {
    apply_classes(cluster)?;
    // QEMU takes more for itself than podvisor-vmm does, which is what the delivered classes are for.
    cluster.apply(&json!({
        "apiVersion": "node.k8s.io/v1", "kind": "RuntimeClass",
        "metadata": {"name": "with-overhead"}, "handler": "vm",
        "overhead": {"podFixed": {"memory": "320Mi", "cpu": "100m"}},
    }))?;
    let names = [("hungry-overhead", "with-overhead"), ("hungry-vm", "kata-qemu"), ("hungry-runc", "runc")];
    let pods = names.map(|(name, class)| hungry(name, class));
    cluster.run(&pods)?;
    for (name, class) in names {
        until(&format!("{name} is full"), || {
            let size = cluster.exec(name, &["stat", "-c", "%s", "/memory/full"])?;
            ensure!(size.trim() == (56 << 20).to_string(), "{size}");
            Ok(())
        })?;
        if class != "runc" {
            is_machine_by(cluster, name, if class == "with-overhead" { "vm" } else { class })?;
        }
        // Who wants too much is killed at once, and this command with it perhaps.
        let _ = cluster.exec(name, &["touch", "/more"]);
        let ended = until(&format!("{name} has ended"), || {
            let pod = cluster.get(&["pod", name])?;
            let ended = pod["status"]["containerStatuses"][0]["state"]["terminated"].clone();
            ensure!(ended.is_object(), "{}", pod["status"]);
            Ok(ended)
        })?;
        ensure!(ended["reason"] == "OOMKilled" && ended["exitCode"] == 137, "{name}: {ended}");
    }
    cluster.delete(&names.map(|(name, _)| name))
}

/// Applying another annotation, or removing it, converts nothing.
fn of_a_running_pod_does_not_change(cluster: &mut Cluster) -> Result<()> {
    cluster.run(&[pod("trusted"), machine("untrusted")])?;
    let before = ["trusted", "untrusted"].map(|pod| cluster.sandbox(pod));
    let mut now_annotated = pod("trusted");
    now_annotated["metadata"]["annotations"][UNTRUSTED] = "true".into();
    let mut now_trusted = machine("untrusted");
    now_trusted["metadata"]["annotations"][UNTRUSTED] = "false".into();
    cluster.run(&[now_annotated, now_trusted])?;
    for (name, value) in [("trusted", "true"), ("untrusted", "false")] {
        let pod = cluster.get(&["pod", name])?;
        ensure!(pod["metadata"]["annotations"][UNTRUSTED] == value, "{}", pod["metadata"]);
    }
    is_trusted(cluster, "trusted")?;
    is_machine(cluster, "untrusted")?;
    for (name, before) in ["trusted", "untrusted"].into_iter().zip(before) {
        let (before, after) = (before?, cluster.sandbox(name)?);
        ensure!(before["status"]["id"] == after["status"]["id"], "{name} has another sandbox");
        let pod = cluster.get(&["pod", name])?;
        ensure!(pod["status"]["containerStatuses"][0]["restartCount"] == 0, "{}", pod["status"]);
    }
    cluster.delete(&["trusted", "untrusted"])
}

/// `podvisor guest build` of another kernel; pods that run keep theirs.
fn new_guests_are_for_new_pods(cluster: &mut Cluster) -> Result<()> {
    let guests = cluster.runtime.guests()?;
    let shared = fs::read_link(&guests).context("the guests are no link")?;
    fs::remove_file(&guests)?;
    let result = build_and_compare(cluster);
    fs::remove_dir_all(&guests)?;
    std::os::unix::fs::symlink(shared, &guests)?;
    result
}

fn build_and_compare(cluster: &Cluster) -> Result<()> {
    build_guest(cluster, "bookworm")?;
    cluster.run(&[machine("old")])?;
    let kernel = cluster.kernel("old")?;
    build_guest(cluster, "bookworm-backports")?;
    cluster.run(&[machine("new")])?;
    let newer = cluster.kernel("new")?;
    ensure!(kernel.starts_with("6.1.") && newer.starts_with("6.12."), "{kernel} {newer}");
    ensure!(cluster.kernel("old")? == kernel, "a running pod has got another kernel");
    cluster.delete(&["old", "new"])
}

fn build_guest(cluster: &Cluster, suite: &str) -> Result<()> {
    let package = target_dir().join("kernels").join(suite).join("package");
    let only = |directory: &str, start: &str| {
        let path = package.join(directory);
        let entries = fs::read_dir(&path).with_context(|| format!("{} (`make kernels`)", path.display()))?;
        let mut found = entries.flatten().filter(|e| e.file_name().to_string_lossy().starts_with(start));
        found.next().map(|entry| entry.path()).with_context(|| format!("nothing in {}", path.display()))
    };
    let mut command = Command::new(podvisor_critest::node::daemon_program());
    command.arg("--config").arg(cluster.runtime.configuration()?).args(["guest", "build", "--kernel"]);
    command.arg(only("boot", "vmlinuz-")?).arg("--modules").arg(only("lib/modules", "")?);
    crate::machine::run(&mut command).map(drop)
}
