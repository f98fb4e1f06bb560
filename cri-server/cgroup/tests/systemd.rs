//! Against the host's own systemd, where it has one.

use std::process::{Command, Stdio};

use podvisor_cgroup::systemd::{Scope, Systemd};
use podvisor_cgroup::{Driver, Layout};

#[test]
fn scope_around_a_process() {
    if Driver::detect() != Driver::Systemd {
        println!("skipped: PID 1 of this host is not systemd");
        return;
    }
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
    runtime.block_on(async {
        let systemd = Systemd::new();
        let slice = format!("podvisortest{}.slice", std::process::id());
        let mut child = Command::new("sleep").arg("1000").stdin(Stdio::null()).spawn().unwrap();
        let scope = Scope {
            name: format!("podvisor-test-{}.scope", std::process::id()),
            slice: slice.clone(),
            description: "test of podvisor".into(),
            pids: vec![child.id()],
        };
        systemd.ensure_slice(&slice).await.unwrap();
        systemd.ensure_slice(&slice).await.unwrap();
        systemd.start_scope(&scope).await.unwrap();
        let layout = Layout::detect().unwrap();
        let cgroup = layout.processes().unwrap().cgroup_of(i32::try_from(child.id()).unwrap()).unwrap();
        assert!(cgroup.path().ends_with(&format!("/{slice}/{}", scope.name)), "{}", cgroup.path());
        cgroup.child("delegated").create().unwrap();

        assert!(systemd.start_scope(&scope).await.unwrap_err().is_unit_exists());
        systemd.stop_unit(&scope.name).await.unwrap();
        assert!(!child.wait().unwrap().success());
        systemd.stop_unit(&scope.name).await.unwrap();
        assert!(!cgroup.exists());
        // The name is free again.
        let mut child = Command::new("sleep").arg("1000").stdin(Stdio::null()).spawn().unwrap();
        systemd.start_scope(&Scope { pids: vec![child.id()], ..scope.clone() }).await.unwrap();
        systemd.stop_unit(&slice).await.unwrap();
        assert!(!child.wait().unwrap().success());
    });
}
