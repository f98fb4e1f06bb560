//! The program itself, as `cargo test` builds it: the failure tests run this build, which has failure points.

use std::process::Command;

#[test]
fn says_its_version() {
    let output = Command::new(env!("CARGO_BIN_EXE_podvisor")).arg("version").output().expect("it runs");
    assert!(output.status.success());
    assert_eq!(
        String::from_utf8_lossy(&output.stdout).trim(),
        concat!("podvisor ", env!("CARGO_PKG_VERSION"))
    );
}
