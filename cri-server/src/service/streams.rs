//! Exec, Attach and PortForward: checked here, then offered as a URL; the streams go between the streaming server and the pod's
//! monitor.

use podvisor_proto::cri;
use podvisor_streaming::{Server, Session};
use tonic::Status;

use super::running;
use crate::error::PodError;
use crate::pod::Pods;

pub(super) async fn exec(
    pods: &Pods,
    server: &Server,
    request: cri::ExecRequest,
) -> Result<cri::ExecResponse, Status> {
    let (container, _) = running(pods, &request.container_id).await?;
    if request.cmd.is_empty() || request.cmd[0].is_empty() {
        return Err(PodError::invalid("cmd", "must not be empty").into());
    }
    some_stream(request.stdin, request.stdout, request.stderr)?;
    one_output(request.tty, request.stderr)?;
    let url = server.offer(Session::Exec {
        container: container.record.id.to_string(),
        command: request.cmd,
        tty: request.tty,
        stdin: request.stdin,
        stdout: request.stdout,
        stderr: request.stderr,
    });
    Ok(cri::ExecResponse { url })
}

pub(super) async fn attach(
    pods: &Pods,
    server: &Server,
    request: &cri::AttachRequest,
) -> Result<cri::AttachResponse, Status> {
    let (container, _) = running(pods, &request.container_id).await?;
    some_stream(request.stdin, request.stdout, request.stderr)?;
    one_output(request.tty, request.stderr)?;
    let url = server.offer(Session::Attach {
        container: container.record.id.to_string(),
        tty: request.tty,
        stdin: request.stdin,
        stdout: request.stdout,
        stderr: request.stderr,
    });
    Ok(cri::AttachResponse { url })
}

/// As the comments of the CRI's requests demand.
fn some_stream(stdin: bool, stdout: bool, stderr: bool) -> Result<(), PodError> {
    if stdin || stdout || stderr {
        Ok(())
    } else {
        Err(PodError::invalid("stdin, stdout, stderr", "one of them must be given"))
    }
}

fn one_output(tty: bool, stderr: bool) -> Result<(), PodError> {
    if tty && stderr {
        return Err(PodError::invalid("stderr", "cannot be given with tty: a terminal has one output"));
    }
    Ok(())
}

pub(super) fn port_forward(
    pods: &Pods,
    server: &Server,
    request: &cri::PortForwardRequest,
) -> Result<cri::PortForwardResponse, Status> {
    let view = pods.find(&request.pod_sandbox_id)?.view();
    if !view.is_ready() {
        let id = view.record.id.to_string();
        return Err(PodError::NotReady { id, why: view.why().to_owned() }.into());
    }
    let mut ports = Vec::new();
    for port in &request.port {
        match u16::try_from(*port) {
            Ok(port) if port > 0 => ports.push(port),
            _ => return Err(PodError::invalid("port", format!("{port} is no port (1 to 65535)")).into()),
        }
    }
    let url = server.offer(Session::PortForward { sandbox: view.record.id.to_string(), ports });
    Ok(cri::PortForwardResponse { url })
}
