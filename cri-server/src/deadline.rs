//! One layer around every RPC: a call whose time is over is answered DEADLINE_EXCEEDED, as gRPC has it. tonic itself answers
//! CANCELLED, which a client that keeps its own time sees when the answer is quicker than its clock, and takes for something else.
//!
//! tonic asks what is inside before it looks at its clock, and this one was set first, so this one is always heard.

use std::pin::Pin;
use std::task::{Context, Poll};
use std::time::Duration;

use tonic::Status;
use tower::{Layer, Service};

/// Adds [`Timed`].
#[derive(Debug, Clone, Copy, Default)]
pub(crate) struct Deadline;

/// A service whose calls end when the caller's time is over.
#[derive(Debug, Clone)]
pub(crate) struct Timed<S>(S);

impl<S> Layer<S> for Deadline {
    type Service = Timed<S>;
    fn layer(&self, service: S) -> Timed<S> {
        Timed(service)
    }
}

impl<S, B, R> Service<http::Request<B>> for Timed<S>
where
    S: Service<http::Request<B>, Response = http::Response<R>>,
    S::Future: Send + 'static,
    S::Error: 'static,
    R: Default,
{
    type Response = S::Response;
    type Error = S::Error;
    type Future = Pin<Box<dyn Future<Output = Result<S::Response, S::Error>> + Send>>;

    fn poll_ready(&mut self, context: &mut Context<'_>) -> Poll<Result<(), S::Error>> {
        self.0.poll_ready(context)
    }

    fn call(&mut self, request: http::Request<B>) -> Self::Future {
        let limit = request.headers().get("grpc-timeout").and_then(|text| parse(text.to_str().ok()?));
        let clock = limit.map(tokio::time::sleep);
        let answer = self.0.call(request);
        let Some(clock) = clock else { return Box::pin(answer) };
        Box::pin(async move {
            tokio::select! {
                biased;
                answer = answer => answer,
                () = clock => Ok(Status::deadline_exceeded("the caller's time is over").into_http()),
            }
        })
    }
}

/// The header's value (gRPC over HTTP2, "Timeout"): at most eight digits and a unit.
fn parse(text: &str) -> Option<Duration> {
    let (digits, unit) = text.split_at_checked(text.len().checked_sub(1)?)?;
    if digits.len() > 8 || !digits.bytes().all(|byte| byte.is_ascii_digit()) {
        return None;
    }
    let count: u64 = digits.parse().ok()?;
    Some(match unit {
        "H" => Duration::from_secs(count * 3600),
        "M" => Duration::from_secs(count * 60),
        "S" => Duration::from_secs(count),
        "m" => Duration::from_millis(count),
        "u" => Duration::from_micros(count),
        "n" => Duration::from_nanos(count),
        _ => return None,
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn timeouts_are_read() {
        assert_eq!(parse("5H"), Some(Duration::from_secs(18_000)));
        assert_eq!(parse("99999999H"), Some(Duration::from_secs(99_999_999 * 3600)));
        assert_eq!(parse("1000000n"), Some(Duration::from_millis(1)));
        for bad in ["", "5", "m", "-1m", "+1m", "123456789S", "5d", "5ü"] {
            assert_eq!(parse(bad), None, "{bad}");
        }
    }

    #[tokio::test]
    async fn a_call_that_takes_too_long_says_so() {
        let never = tower::service_fn(|_: http::Request<()>| async {
            std::future::pending::<()>().await;
            Ok::<_, std::convert::Infallible>(http::Response::new(String::new()))
        });
        let mut timed = Deadline.layer(never);
        let request = http::Request::builder().header("grpc-timeout", "1m").body(()).unwrap();
        let answer = timed.call(request).await.unwrap();
        assert_eq!(answer.headers()["grpc-status"], "4");
    }
}
