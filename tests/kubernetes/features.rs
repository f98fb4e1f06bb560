//! What newer versions of Kubernetes ask of a runtime: images as volumes, user namespaces, and hooks that run before the end.

use std::fs;

use anyhow::{Context, Result, ensure};
use serde_json::json;

use crate::cluster::{Cluster, Settings};
use crate::images::BUSYBOX;
use crate::machine::DIRECTORY;
use crate::workloads::{Kind, each_kind, runs, waits};
use crate::{Tests, until};

pub(crate) fn add(tests: &mut Tests) {
    let usual = Settings::default();
    tests.add_for_all("features::mount_images", &usual, |c| each_kind(c, mount_images));
    tests.add_for_all("features::have_user_namespaces", &usual, |c| each_kind(c, have_user_namespaces));
    tests.add_for_all("features::run_hooks_before_the_end", &usual, |c| {
        each_kind(c, run_hooks_before_the_end)
    });
    tests.add_for_all("features::resize_without_limits", &usual, |c| each_kind(c, resize_without_limits));
}

/// An image's files, or a directory of them, which nobody can change.
fn mount_images(cluster: &Cluster, kind: Kind) -> Result<()> {
    let container = waits(
        "c",
        &json!({"volumeMounts": [
            {"name": "image", "mountPath": "/image"},
            {"name": "image", "mountPath": "/part", "subPath": "bin"},
        ]}),
    );
    cluster.run(&[kind.pod(
        "imaged",
        &json!({
            "containers": [container],
            "volumes": [{"name": "image", "image": {"reference": BUSYBOX, "pullPolicy": "IfNotPresent"}}],
        }),
    )])?;
    let run = |script: &str| cluster.exec("imaged", &["sh", "-c", script]);
    ensure!(
        run("cmp /image/bin/busybox /bin/busybox && cmp /part/busybox /bin/busybox && echo same")?
            == "same\n"
    );
    let refused = run("echo x 2>&1 >/image/file; true")?;
    ensure!(refused.contains("Read-only file system"), "{refused:?}");
    cluster.delete(&["imaged"])
}

/// root in the pod is nobody on the node, and its volumes are its own all the same.
fn have_user_namespaces(cluster: &Cluster, kind: Kind) -> Result<()> {
    let map = json!({"apiVersion": "v1", "kind": "ConfigMap", "metadata": {"name": "mapped"}, "data": {"key": "value"}});
    cluster.apply(&map)?;
    let mounts = json!([{"name": "map", "mountPath": "/map"}, {"name": "disk", "mountPath": "/disk"}]);
    cluster.run(&[kind.pod(
        "users",
        &json!({
            "hostUsers": false,
            "containers": [waits("c", &json!({"volumeMounts": mounts}))],
            "volumes": [{"name": "map", "configMap": {"name": "mapped"}}, {"name": "disk", "emptyDir": {}}],
        }),
    )])?;
    let run = |script: &str| cluster.exec("users", &["sh", "-c", script]);
    let ids = run("cat /proc/self/uid_map")?;
    let mut ids = ids.split_whitespace().map(str::parse::<u32>);
    let (inside, outside, count) = (ids.next(), ids.next(), ids.next());
    ensure!(inside == Some(Ok(0)) && count == Some(Ok(65536)), "{inside:?} {outside:?} {count:?}");
    ensure!(outside.is_some_and(|first| first.is_ok_and(|first| first >= 65536)), "root is the node's own");
    ensure!(run("id -u; cat /map/key; stat -L -c ' %u' /map/key")? == "0\nvalue 0\n");
    ensure!(run("echo mine >/disk/file; stat -c %u /disk/file")? == "0\n");
    cluster.delete(&["users"])?;
    cluster.kubectl(&["delete", "configmap/mapped"]).map(drop)
}

/// The hook comes first, then the signal, and both have the time that the pod grants.
fn run_hooks_before_the_end(cluster: &Cluster, kind: Kind) -> Result<()> {
    let on_host = format!("{DIRECTORY}/hooks");
    fs::create_dir_all(&on_host)?;
    let container = runs(
        "c",
        "trap 'sleep 1; echo signal >>/host/end; exit 0' TERM; while :; do sleep 0.2; done",
        &json!({
            "volumeMounts": [{"name": "host", "mountPath": "/host"}],
            "lifecycle": {"preStop": {"exec": {"command": ["sh", "-c", "sleep 1; echo hook >>/host/end"]}}},
        }),
    );
    let mut pod = kind.pod(
        "hooked",
        &json!({
            "containers": [container],
            "volumes": [{"name": "host", "hostPath": {"path": on_host, "type": "Directory"}}],
        }),
    );
    pod["spec"]["terminationGracePeriodSeconds"] = 120.into();
    cluster.run(&[pod])?;
    cluster.kubectl(&["delete", "pod", "hooked"])?;
    let said = fs::read_to_string(format!("{on_host}/end"))?;
    ensure!(said == "hook\nsignal\n", "{said:?}");
    Ok(fs::remove_dir_all(on_host)?)
}

/// A pod that has no limits can be given more all the same, and keeps having none.
fn resize_without_limits(cluster: &Cluster, kind: Kind) -> Result<()> {
    let requests = |cpu: &str| json!({"resources": {"requests": {"cpu": cpu, "memory": "16Mi"}}});
    cluster.run(&[kind.pod("unlimited", &json!({"containers": [waits("c", &requests("50m"))]}))])?;
    let mut container = requests("100m");
    container["name"] = "c".into();
    let patch = json!({"spec": {"containers": [container]}}).to_string();
    cluster.kubectl(&["patch", "pod", "unlimited", "--subresource", "resize", "--patch", &patch])?;
    until("the pod has its new request", || {
        let status = cluster.get(&["pod", "unlimited"])?["status"].clone();
        let conditions = status["conditions"].as_array().context("none")?;
        let resizing = conditions
            .iter()
            .find(|one| one["type"].as_str().is_some_and(|name| name.starts_with("PodResize")));
        ensure!(resizing.is_none(), "{resizing:?}");
        let resources = &status["containerStatuses"][0]["resources"];
        ensure!(resources["requests"]["cpu"] == "100m" && resources["limits"].is_null(), "{resources}");
        ensure!(status["containerStatuses"][0]["restartCount"] == 0, "{status}");
        Ok(())
    })?;
    cluster.delete(&["unlimited"])
}
