//! podvisor's own metrics, for Prometheus: what the daemon was asked, how long it took, what there is.
//!
//! | file | idea |
//! |---|---|
//! | `text.rs` | the text format |
//! | `histogram.rs` | durations |
//! | `process.rs` | the daemon's own process |
//! | `page.rs` | the page, from counters and from what there is at the moment |
//! | `server.rs` | the page over HTTP |
//!
//! Metrics of pods and containers are not here: they go over the CRI to kubelet (`service/metrics`).
//!
//! Written by hand instead of with a client library: the format is twenty lines, and what is counted is either an atomic number or asked of
//! its owner when somebody looks.

mod histogram;
mod page;
mod process;
mod server;
mod text;

use std::collections::BTreeMap;
use std::sync::Mutex;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use podvisor_image_store::{ErrorKind, ImageError};
use tonic::Code;

use histogram::Histogram;
pub(crate) use page::Subjects;
pub(crate) use server::serve;

/// Most methods that are told apart. The CRI has about fifty; whoever may talk to the daemon could invent more.
const METHODS: usize = 100;

/// What is counted while it happens. One per daemon.
#[derive(Debug, Default)]
pub(crate) struct Telemetry {
    /// By method and code.
    rpcs: Mutex<BTreeMap<(String, &'static str), Histogram>>,
    /// By outcome.
    pulls: Mutex<BTreeMap<&'static str, Histogram>>,
    monitors_lost: AtomicU64,
    /// ms.
    recovery: AtomicU64,
    recovered: AtomicU64,
}

impl Telemetry {
    /// An RPC was answered; a stream of events at its beginning.
    pub(crate) fn rpc(&self, method: &str, code: Code, took: Duration) {
        let mut rpcs = self.rpcs.lock().expect("no panic under this lock");
        let known = rpcs.contains_key(&(method.to_owned(), code_name(code)));
        let method = if known || rpcs.len() < METHODS * 4 { method } else { "other" };
        rpcs.entry((method.to_owned(), code_name(code))).or_default().take(took);
    }

    /// A pull has ended.
    pub(crate) fn pull<T>(&self, outcome: &Result<T, ImageError>, took: Duration) {
        let reason = match outcome {
            Ok(_) => "ok",
            Err(error) => match error.kind() {
                ErrorKind::NotFound => "not_found",
                ErrorKind::Invalid => "invalid",
                ErrorKind::Unauthorized => "unauthorized",
                ErrorKind::Refused => "refused",
                ErrorKind::Unavailable => "unavailable",
                ErrorKind::Full => "disk_full",
                ErrorKind::Corrupt => "corrupt",
                ErrorKind::Internal => "internal",
            },
        };
        self.pulls.lock().expect("no panic under this lock").entry(reason).or_default().take(took);
    }

    /// A pod's monitor has died.
    pub(crate) fn monitor_lost(&self) {
        self.monitors_lost.fetch_add(1, Ordering::Relaxed);
    }

    /// The records of an earlier daemon's pods have been taken over.
    pub(crate) fn recovered(&self, pods: usize, took: Duration) {
        self.recovered.store(pods as u64, Ordering::Relaxed);
        self.recovery.store(u64::try_from(took.as_millis()).unwrap_or(u64::MAX), Ordering::Relaxed);
    }
}

/// As `google/rpc/code.proto` writes them.
fn code_name(code: Code) -> &'static str {
    match code {
        Code::Ok => "OK",
        Code::Cancelled => "CANCELLED",
        Code::Unknown => "UNKNOWN",
        Code::InvalidArgument => "INVALID_ARGUMENT",
        Code::DeadlineExceeded => "DEADLINE_EXCEEDED",
        Code::NotFound => "NOT_FOUND",
        Code::AlreadyExists => "ALREADY_EXISTS",
        Code::PermissionDenied => "PERMISSION_DENIED",
        Code::ResourceExhausted => "RESOURCE_EXHAUSTED",
        Code::FailedPrecondition => "FAILED_PRECONDITION",
        Code::Aborted => "ABORTED",
        Code::OutOfRange => "OUT_OF_RANGE",
        Code::Unimplemented => "UNIMPLEMENTED",
        Code::Internal => "INTERNAL",
        Code::Unavailable => "UNAVAILABLE",
        Code::DataLoss => "DATA_LOSS",
        Code::Unauthenticated => "UNAUTHENTICATED",
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn invented_methods_are_bounded() {
        let telemetry = Telemetry::default();
        telemetry.rpc("Version", Code::Ok, Duration::ZERO);
        for number in 0..10_000 {
            telemetry.rpc(&format!("Method{number}"), Code::Unimplemented, Duration::ZERO);
        }
        telemetry.rpc("Version", Code::Ok, Duration::ZERO);
        let rpcs = telemetry.rpcs.lock().unwrap();
        assert!(rpcs.len() <= METHODS * 4 + 17, "{}", rpcs.len());
        assert!(rpcs.contains_key(&("other".to_owned(), "UNIMPLEMENTED")));
    }
}
