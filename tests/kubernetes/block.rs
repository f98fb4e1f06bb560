//! A local volume that is a block device.

use std::path::Path;

use anyhow::{Context, Result, ensure};
use podvisor_tests::block_volume::BlockVolume;
use serde_json::json;

use crate::Tests;
use crate::cluster::{Cluster, Settings};
use crate::machine::{DIRECTORY, NAME};
use crate::workloads::{Kind, each_kind, waits};

pub(crate) fn add(tests: &mut Tests) {
    tests.add_for_all("block::local_volume", &Settings::default(), |c| each_kind(c, local_volume));
}

/// What stands on the device is read in the pod, and what the pod writes stands on the device.
fn local_volume(cluster: &Cluster, kind: Kind) -> Result<()> {
    let volume = BlockVolume::of(Path::new(&format!("{DIRECTORY}/disk")), "from the node")?;
    let device = volume.device().to_str().context("the device's path is no text")?;
    let here = json!({"key": "kubernetes.io/hostname", "operator": "In", "values": [NAME]});
    cluster.apply(&json!({
        "apiVersion": "v1", "kind": "PersistentVolume", "metadata": {"name": "disk"},
        "spec": {
            "capacity": {"storage": "1Mi"},
            "volumeMode": "Block",
            "accessModes": ["ReadWriteOnce"],
            "storageClassName": "local",
            "persistentVolumeReclaimPolicy": "Retain",
            "local": {"path": device},
            "nodeAffinity": {"required": {"nodeSelectorTerms": [{"matchExpressions": [here]}]}},
        },
    }))?;
    cluster.apply(&json!({
        "apiVersion": "v1", "kind": "PersistentVolumeClaim", "metadata": {"name": "disk"},
        "spec": {
            "storageClassName": "local",
            "volumeMode": "Block",
            "accessModes": ["ReadWriteOnce"],
            "resources": {"requests": {"storage": "1Mi"}},
        },
    }))?;
    let container = waits("c", &json!({"volumeDevices": [{"name": "disk", "devicePath": "/dev/disk"}]}));
    cluster.run(&[kind.pod(
        "block",
        &json!({
            "containers": [container],
            "volumes": [{"name": "disk", "persistentVolumeClaim": {"claimName": "disk"}}],
        }),
    )])?;
    let run = |script: &str| cluster.exec("block", &["sh", "-c", script]);
    ensure!(run("test -b /dev/disk && blockdev --getsize64 /dev/disk")? == "1048576\n");
    ensure!(run("head -c 13 /dev/disk")? == "from the node");
    run("printf 'from the pod!' | dd of=/dev/disk bs=512 conv=notrunc,fsync 2>/dev/null")?;
    cluster.delete(&["block"])?;
    cluster.kubectl(&["delete", "pvc/disk", "pv/disk"])?;
    let text = volume.text()?;
    ensure!(text == "from the pod!", "{text:?}");
    Ok(())
}
