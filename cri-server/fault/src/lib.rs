//! Points at which a test can let the daemon die.
//!
//! A debug build ends itself with SIGKILL at the point that `PODVISOR_FAULT` names (`NAME`, or `NAME:3` for the third time that it
//! comes by). In a release build [`point`] is nothing at all. The build profile decides and no feature, so that the daemon
//! which `cargo test` builds anyway has them, and nobody's release can.
//!
//! [`POINTS`] is the list of all of them: `tests/faults` walks through it and fails when one is never reached, a point that
//! is not in it panics.

/// The environment variable that names the point.
pub const VARIABLE: &str = "PODVISOR_FAULT";

/// Every point, in the order in which a pod's life passes them.
pub const POINTS: &[&str] = &[
    // PullImage
    "pull.layer-unpacked",
    "pull.layer-named",
    "pull.layers-durable",
    "pull.recorded",
    "pull.done",
    // Any record
    "record.directory",
    "record.written",
    "record.replaced",
    // RunPodSandbox
    "run.recorded",
    "run.files",
    "run.namespaces",
    "run.network",
    "run.monitor-taken",
    "run.adopted",
    "run.init",
    "run.launched",
    "run.ready",
    "run.failed",
    "run.released",
    "run.rolled-back",
    // CreateContainer
    "create.recorded",
    "create.snapshot",
    "create.mounted",
    "create.specified",
    "create.called",
    "create.built",
    "create.done",
    "create.failed",
    // StartContainer
    "start.recorded",
    "start.called",
    "start.done",
    "start.failed",
    // UpdateContainerResources
    "update.called",
    "update.recorded",
    // ExecSync
    "exec.ask",
    "exec.answered",
    // StopContainer
    "stop.ask",
    "stop.signalled",
    "stop.deadline",
    "stop.killed",
    "exit.heard",
    "exit.recorded",
    // RemoveContainer
    "remove.recorded",
    "remove.deleted",
    "remove.released",
    "remove.record-gone",
    "remove.done",
    // StopPodSandbox
    "stop-pod.not-ready",
    "stop-pod.monitor-ended",
    "stop-pod.released",
    "stop-pod.recorded",
    // Any release
    "release.directory",
    "release.mount",
    "release.namespaces",
    "release.network",
    "release.cgroup",
    "release.snapshot",
    // RemovePodSandbox
    "remove-pod.recorded",
    "remove-pod.record-gone",
    "remove-pod.forgotten",
    // RemoveImage
    "remove-image.recorded",
    "remove-image.collected",
];

/// Ends the daemon here if a test wants it.
#[cfg(debug_assertions)]
pub fn point(name: &'static str) {
    armed::pass(name);
}

/// Nothing: this is a release build.
#[cfg(not(debug_assertions))]
#[inline]
pub fn point(_name: &'static str) {}

#[cfg(debug_assertions)]
mod armed {
    use std::sync::LazyLock;
    use std::sync::atomic::{AtomicU32, Ordering};

    static WANTED: LazyLock<Option<(String, AtomicU32)>> = LazyLock::new(|| {
        let wanted = std::env::var(super::VARIABLE).ok()?;
        let (name, count) = wanted.split_once(':').unwrap_or((&wanted, "1"));
        assert!(super::POINTS.contains(&name), "there is no failure point {name:?}");
        Some((name.to_owned(), AtomicU32::new(count.parse().expect("a number of times"))))
    });

    pub(super) fn pass(name: &'static str) {
        assert!(super::POINTS.contains(&name), "failure point {name:?} is not in the list");
        if let Some((wanted, left)) = &*WANTED
            && wanted == name
            && left.fetch_sub(1, Ordering::SeqCst) == 1
        {
            // Delivered before this call returns, to all threads.
            let _ = rustix::process::kill_process(rustix::process::getpid(), rustix::process::Signal::KILL);
        }
    }
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeSet;

    #[test]
    fn every_point_has_a_name_of_its_own() {
        let names: BTreeSet<_> = super::POINTS.iter().collect();
        assert_eq!(names.len(), super::POINTS.len());
    }
}
