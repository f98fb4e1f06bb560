//! What an OCI runtime still knows of a container when there is no monitor to ask: it is made to forget it.

use std::time::Duration;

use super::record::PinnedRuntime;

const LIMIT: Duration = Duration::from_secs(30);

/// Whether the runtime's own directory names the container: `<id>/` (runc, crun), `<sandbox>_sandbox:<id>.state` (runsc).
fn remembers(runtime: &PinnedRuntime, id: &str) -> bool {
    let Ok(entries) = std::fs::read_dir(&runtime.root) else { return false };
    entries.flatten().any(|entry| {
        let name = entry.file_name();
        let name = name.to_string_lossy();
        let own = name.rsplit(':').next().unwrap_or_default();
        own.strip_prefix(id).is_some_and(|rest| rest.is_empty() || rest == ".state")
    })
}

/// Calls the runtime's `delete --force`, if it knows the container. Idempotent; what it cannot do is logged, because
/// nobody could do more about it.
pub(super) async fn forget(runtime: &PinnedRuntime, id: &str) {
    if !remembers(runtime, id) {
        return;
    }
    let mut command = tokio::process::Command::new(&runtime.path);
    command.args(&runtime.arguments).arg("--root").arg(&runtime.root);
    if runtime.systemd_cgroup {
        command.arg("--systemd-cgroup");
    }
    command.args(["delete", "--force", id]).stdin(std::process::Stdio::null());
    command.kill_on_drop(true);
    match tokio::time::timeout(LIMIT, command.output()).await {
        Ok(Ok(output)) if output.status.success() || !remembers(runtime, id) => {}
        Ok(Ok(output)) => {
            let text = String::from_utf8_lossy(&output.stderr);
            tracing::warn!(container = %id, error = %text.trim(), "the runtime could not delete a container");
        }
        Ok(Err(error)) => tracing::warn!(container = %id, %error, "the runtime cannot be called"),
        Err(_) => tracing::warn!(container = %id, "the runtime hangs while deleting a container"),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_container_is_found_by_the_names_that_runtimes_give_its_state() {
        let root = tempfile::tempdir().unwrap();
        let runtime = PinnedRuntime {
            path: "/nonexistent".into(),
            root: root.path().into(),
            arguments: Vec::new(),
            systemd_cgroup: false,
            sandbox_container: false,
            annotations: Vec::new(),
        };
        std::fs::create_dir(root.path().join("aa")).unwrap();
        std::fs::write(root.path().join("bb_sandbox:cc.state"), "").unwrap();
        std::fs::write(root.path().join("bb_sandbox:dd.lock"), "").unwrap();
        for (id, known) in [("aa", true), ("cc", true), ("a", false), ("bb", false), ("dd", false)] {
            assert_eq!(remembers(&runtime, id), known, "{id}");
        }
    }
}
