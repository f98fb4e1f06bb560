//! ExecSync: goes straight to the pod's monitor, past the pod's task, so that probes wait for nothing.

use std::time::Duration;

use podvisor_proto::cri;
use podvisor_proto::monitor::reply::Result as Answer;
use podvisor_proto::monitor::request::Verb;
use podvisor_proto::monitor::{ExecProcess, ExecSync};
use tonic::Status;

use super::running;
use crate::error::PodError;
use crate::id::random_hex;
use crate::monitor::MonitorError;
use crate::node::Node;
use crate::pod::Pods;
use crate::pod::view::ContainerView;

pub(super) async fn exec_sync(
    pods: &Pods,
    node: &Node,
    request: &cri::ExecSyncRequest,
) -> Result<cri::ExecSyncResponse, Status> {
    let (container, monitor) = running(pods, &request.container_id).await?;
    let seconds = u64::try_from(request.timeout)
        .map_err(|_| PodError::invalid("timeout", "must not be negative (0 means none)"))?;
    let process = process(node, &container, &request.cmd, false).await?;
    let verb = Verb::ExecSync(ExecSync {
        exec: Some(process),
        timeout_ms: seconds.saturating_mul(1000),
        output_limit: node.config().limits.exec_sync_output,
    });
    podvisor_fault::point("exec.ask");
    let answer = monitor.call(verb).await.map_err(PodError::from)?;
    podvisor_fault::point("exec.answered");
    match answer {
        Answer::ExecSync(done) if done.timed_out => Err(Status::deadline_exceeded(format!(
            "command {:?} did not end within {:?}",
            request.cmd,
            Duration::from_secs(seconds)
        ))),
        Answer::ExecSync(done) => {
            Ok(cri::ExecSyncResponse { stdout: done.stdout, stderr: done.stderr, exit_code: done.exit_code })
        }
        _ => Err(PodError::from(MonitorError::Confused { verb: "exec" }).into()),
    }
}

/// The process of an exec: like the container's own, with another command.
pub(crate) async fn process(
    node: &Node,
    container: &ContainerView,
    command: &[String],
    terminal: bool,
) -> Result<ExecProcess, PodError> {
    if command.is_empty() || command[0].is_empty() {
        return Err(PodError::invalid("cmd", "must not be empty"));
    }
    let path = node.bundle(&container.record.id).join("config.json");
    let text = tokio::fs::read(&path).await.map_err(|source| PodError::File {
        operation: "read",
        path: path.clone(),
        source,
    })?;
    let spec = serde_json::from_slice(&text).map_err(|error| PodError::File {
        operation: "parse",
        path,
        source: error.into(),
    })?;
    let process = podvisor_spec::exec(&spec, command, terminal)?;
    Ok(ExecProcess {
        container_id: container.record.id.to_string(),
        exec_id: random_hex(16),
        process: serde_json::to_vec(&process).unwrap_or_default(),
    })
}
