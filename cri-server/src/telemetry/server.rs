//! The page over HTTP, where `metrics.address` says. Loopback by choice of the operator: there is no authentication, and the page tells how many
//! pods there are and how busy the node is, but no name of a pod, image or container.

use std::convert::Infallible;
use std::net::SocketAddr;
use std::sync::Arc;
use std::time::Duration;

use bytes::Bytes;
use http::{Method, Request, Response, StatusCode};
use http_body_util::Full;
use hyper::body::Incoming;
use hyper::service::service_fn;
use hyper_util::rt::{TokioIo, TokioTimer};
use tokio::net::TcpListener;
use tokio::sync::Semaphore;

use super::Subjects;

/// Connections at once; a further one waits.
const CONNECTIONS: usize = 8;

/// Longest life of a connection: one that sends nothing must not keep others out.
const CONNECTION: Duration = Duration::from_secs(60);

/// Listens from now on.
pub(crate) async fn serve(address: SocketAddr, subjects: Subjects) -> std::io::Result<()> {
    let listener = TcpListener::bind(address).await?;
    tracing::info!(address = %listener.local_addr()?, "metrics are served");
    tokio::spawn(accept(listener, subjects));
    Ok(())
}

async fn accept(listener: TcpListener, subjects: Subjects) {
    let places = Arc::new(Semaphore::new(CONNECTIONS));
    loop {
        let Ok(place) = places.clone().acquire_owned().await else { return };
        let stream = match listener.accept().await {
            Ok((stream, _)) => stream,
            Err(error) => {
                // Out of descriptors, mostly: soon there may be some again.
                tracing::debug!(%error, "cannot accept a connection for metrics");
                tokio::time::sleep(Duration::from_millis(100)).await;
                continue;
            }
        };
        let subjects = subjects.clone();
        tokio::spawn(async move {
            let service = service_fn(move |request| {
                let answer = answer(&request, &subjects);
                async move { Ok::<_, Infallible>(answer) }
            });
            let connection = hyper::server::conn::http1::Builder::new()
                .timer(TokioTimer::new())
                .header_read_timeout(Duration::from_secs(10))
                .serve_connection(TokioIo::new(stream), service);
            // What a client does wrong is its own affair.
            let _ = tokio::time::timeout(CONNECTION, connection).await;
            drop(place);
        });
    }
}

fn answer(request: &Request<Incoming>, subjects: &Subjects) -> Response<Full<Bytes>> {
    let plain = |status, text: String| {
        let mut response = Response::new(Full::new(Bytes::from(text)));
        *response.status_mut() = status;
        let kind = http::HeaderValue::from_static("text/plain; version=0.0.4; charset=utf-8");
        response.headers_mut().insert(http::header::CONTENT_TYPE, kind);
        response
    };
    match (request.method(), request.uri().path()) {
        (&Method::GET | &Method::HEAD, "/metrics") => plain(StatusCode::OK, subjects.page()),
        (&Method::GET | &Method::HEAD, _) => plain(StatusCode::NOT_FOUND, "metrics are at /metrics\n".into()),
        _ => plain(StatusCode::METHOD_NOT_ALLOWED, "only GET\n".into()),
    }
}
