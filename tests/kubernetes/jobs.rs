//! Jobs that the clock starts.

use anyhow::{Context, Result, ensure};
use serde_json::json;

use crate::cluster::{Cluster, Settings, name};
use crate::workloads::{Kind, each_kind, runs};
use crate::{Tests, until};

pub(crate) fn add(tests: &mut Tests) {
    tests.add_for_all("jobs::start_every_minute", &Settings::default(), |c| each_kind(c, start_every_minute));
}

/// A CronJob's first run, and what is left of it: its log, and the time of its success.
fn start_every_minute(cluster: &Cluster, kind: Kind) -> Result<()> {
    let pods = json!({
        "metadata": {"annotations": kind.annotations(), "labels": {"app": "minutely"}},
        "spec": {"restartPolicy": "Never", "containers": [runs("c", "echo it is time", &json!({}))]},
    });
    cluster.apply(&json!({
        "apiVersion": "batch/v1", "kind": "CronJob", "metadata": {"name": "minutely"},
        "spec": {
            "schedule": "* * * * *",
            "concurrencyPolicy": "Forbid",
            "successfulJobsHistoryLimit": 1,
            "jobTemplate": {"spec": {"backoffLimit": 0, "template": pods}},
        },
    }))?;
    until("a run has succeeded", || {
        let status = cluster.get(&["cronjob", "minutely"])?["status"].clone();
        ensure!(status["lastSuccessfulTime"].is_string(), "{status}");
        Ok(())
    })?;
    // No further ones while this one is looked at.
    cluster.kubectl(&["patch", "cronjob", "minutely", "--patch", r#"{"spec": {"suspend": true}}"#])?;
    let pods = cluster.get(&["pods", "--selector", "app=minutely"])?;
    let succeeded = |pod: &&serde_json::Value| pod["status"]["phase"] == "Succeeded";
    let pod = pods["items"].as_array().context("no list")?.iter().find(succeeded);
    let pod = name(pod.with_context(|| format!("no pod has succeeded: {pods}"))?);
    let log = cluster.kubectl(&["logs", pod])?;
    ensure!(log == "it is time\n", "{log:?}");
    cluster.kubectl(&["delete", "cronjob", "minutely"])?;
    cluster.kubectl(&["wait", "--for=delete", "pod", "--selector", "app=minutely", "--timeout=240s"])?;
    Ok(())
}
