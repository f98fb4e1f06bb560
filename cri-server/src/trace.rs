//! One layer around every RPC: a span with its name, and one line and one count of its outcome and time.

use std::pin::Pin;
use std::sync::Arc;
use std::task::{Context, Poll};
use std::time::Instant;

use tonic::{Code, Status};
use tower::{Layer, Service};
use tracing::Instrument;

use crate::node::Node;

/// Adds [`Traced`].
#[derive(Debug, Clone)]
pub(crate) struct Trace(pub(crate) Arc<Node>);

/// A service whose calls are traced.
#[derive(Debug, Clone)]
pub(crate) struct Traced<S>(S, Arc<Node>);

impl<S> Layer<S> for Trace {
    type Service = Traced<S>;
    fn layer(&self, service: S) -> Traced<S> {
        Traced(service, self.0.clone())
    }
}

impl<S, B, R> Service<http::Request<B>> for Traced<S>
where
    S: Service<http::Request<B>, Response = http::Response<R>>,
    S::Future: Send + 'static,
    S::Error: 'static,
{
    type Response = S::Response;
    type Error = S::Error;
    type Future = Pin<Box<dyn Future<Output = Result<S::Response, S::Error>> + Send>>;

    fn poll_ready(&mut self, context: &mut Context<'_>) -> Poll<Result<(), S::Error>> {
        self.0.poll_ready(context)
    }

    fn call(&mut self, request: http::Request<B>) -> Self::Future {
        let rpc = request.uri().path().rsplit('/').next().unwrap_or_default().to_owned();
        let span = tracing::info_span!("rpc", rpc);
        let begin = Instant::now();
        let answer = self.0.call(request);
        let node = self.1.clone();
        let outcome = async move {
            let answer = answer.await;
            if let Ok(response) = &answer {
                report(&rpc, response.headers(), begin, &node);
            }
            answer
        };
        Box::pin(outcome.instrument(span))
    }
}

/// An error's code stands in the headers of the (body-less) response; success has none there yet.
fn report(rpc: &str, headers: &http::HeaderMap, begin: Instant, node: &Node) {
    let status = Status::from_header_map(headers);
    let code = status.as_ref().map_or(Code::Ok, Status::code);
    node.telemetry.rpc(rpc, code, begin.elapsed());
    let milliseconds = begin.elapsed().as_secs_f64() * 1000.0;
    // Quoted: what containers can put into a message must not look like a line of the log.
    let error = status.as_ref().map(|status| tracing::field::debug(status.message()));
    // Kubelet polls these all the time.
    let polled = ["List", "Status", "Stats", "Version", "ImageFsInfo", "Stream", "RuntimeConfig", "ExecSync"];
    let polled = polled.iter().any(|part| rpc.contains(part));
    if !polled {
        node.changes.notify_one();
    }
    if is_failure(code, polled) {
        tracing::warn!(rpc, ?code, error, milliseconds, "request failed");
    } else if polled {
        tracing::debug!(rpc, ?code, error, milliseconds, "request done");
    } else {
        tracing::info!(rpc, ?code, error, milliseconds, "request done");
    }
}

/// Whether an outcome is one that somebody should look at.
fn is_failure(code: Code, polled: bool) -> bool {
    match code {
        Code::Ok | Code::NotFound | Code::Unimplemented => false,
        // Whenever kubelet starts, it learns whether PodSandboxStats is implemented from how a call without an id is refused.
        Code::InvalidArgument => !polled,
        _ => true,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn probing_calls_are_no_failures() {
        assert!(!is_failure(Code::InvalidArgument, true));
        assert!(is_failure(Code::InvalidArgument, false));
        assert!(is_failure(Code::Internal, true));
    }
}
