//! Probes by gRPC (its health-checking protocol).

use anyhow::{Result, ensure};
use serde_json::json;

use crate::cluster::{Cluster, Settings};
use crate::images::AGNHOST;
use crate::workloads::{Kind, each_kind};
use crate::{Tests, until};

pub(crate) fn add(tests: &mut Tests) {
    tests.add_for_all("probes::by_grpc", &Settings::default(), |c| each_kind(c, by_grpc));
}

/// A server that is ready while it serves, and is started again when it says that it no longer does.
fn by_grpc(cluster: &Cluster, kind: Kind) -> Result<()> {
    let probe = |failures: u32| json!({"grpc": {"port": 5000}, "periodSeconds": 1, "failureThreshold": failures, "timeoutSeconds": 20});
    cluster.run(&[kind.pod(
        "grpc",
        &json!({"containers": [{
            "name": "c",
            "image": AGNHOST,
            "args": ["grpc-health-checking"],
            "startupProbe": probe(100),
            "readinessProbe": probe(1),
            "livenessProbe": probe(2),
        }]}),
    )])?;
    let before = cluster.get(&["pod", "grpc"])?["status"]["containerStatuses"][0].clone();
    ensure!(before["restartCount"] == 0, "{before}");
    cluster.exec("grpc", &["wget", "-q", "-O", "-", "http://127.0.0.1:8080/make-not-serving"])?;
    until("the server is started again, and is ready", || {
        let status = cluster.get(&["pod", "grpc"])?["status"]["containerStatuses"][0].clone();
        ensure!(status["restartCount"] == 1 && status["ready"] == true, "{status}");
        Ok(())
    })?;
    let events = cluster.kubectl(&["get", "events", "--field-selector", "involvedObject.name=grpc"])?;
    ensure!(events.contains("Liveness probe failed: service unhealthy"), "{events}");
    cluster.delete(&["grpc"])?;
    cluster.kubectl(&["delete", "events", "--field-selector", "involvedObject.name=grpc"]).map(drop)
}
