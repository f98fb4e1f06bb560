//! kubelet evicts pods that take more of the node's disk than they may: their files are counted, whichever kernel wrote them.

use anyhow::{Result, ensure};
use serde_json::json;

use crate::cluster::{Cluster, Settings};
use crate::workloads::{Kind, each_kind, runs};
use crate::{Tests, until};

pub(crate) fn add(tests: &mut Tests) {
    let usual = Settings::default();
    tests.add_for_all("eviction::by_files_of_containers", &usual, |cluster| {
        let words = "Pod ephemeral local storage usage exceeds the total limit of containers 20Mi";
        each_kind(cluster, |cluster, kind| evicted(cluster, kind, "20Mi", "/file", words))
    });
    tests.add_for_all("eviction::by_an_empty_dir", &usual, |cluster| {
        let words = "Usage of EmptyDir volume \"scratch\" exceeds the limit \"20Mi\"";
        each_kind(cluster, |cluster, kind| evicted(cluster, kind, "1Gi", "/scratch/file", words))
    });
}

/// A pod writes what it may to a path, and then more; what kubelet says of it.
fn evicted(cluster: &Cluster, kind: Kind, limit: &str, path: &str, words: &str) -> Result<()> {
    // One that obeyed and ended with success would have succeeded.
    let container = runs(
        "c",
        "trap 'exit 1' TERM; while :; do sleep 0.2; done",
        &json!({
            "volumeMounts": [{"name": "scratch", "mountPath": "/scratch"}],
            "resources": {"limits": {"ephemeral-storage": limit}},
        }),
    );
    cluster.run(&[kind.pod(
        "hoards",
        &json!({
            "volumes": [{"name": "scratch", "emptyDir": {"sizeLimit": "20Mi"}}],
            "containers": [container],
        }),
    )])?;
    for mib in [10, 30] {
        let write = format!("dd if=/dev/zero of={path} bs=1M count={mib} 2>/dev/null; sync");
        cluster.exec("hoards", &["sh", "-c", &write])?;
    }
    until("the pod is evicted", || {
        let status = &cluster.get(&["pod", "hoards"])?["status"];
        ensure!(status["phase"] == "Failed" && status["reason"] == "Evicted", "{status}");
        ensure!(status["message"].as_str().is_some_and(|said| said.contains(words)), "{status}");
        Ok(())
    })?;
    cluster.delete(&["hoards"])
}
