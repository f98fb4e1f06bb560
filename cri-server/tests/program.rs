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

#[test]
fn imports_what_a_node_has() {
    let directory = tempfile::tempdir().expect("a directory");
    let file = directory.path().join("config.toml");
    let text =
        "version = 2\n[plugins.'io.containerd.grpc.v1.cri']\nsandbox_image = 'mirror.example/pause:3.9'\n";
    std::fs::write(&file, text).expect("it is written");
    let import = |arguments: &[&str]| {
        let mut command = Command::new(env!("CARGO_BIN_EXE_podvisor"));
        command.args(["config", "import"]).args(arguments).output().expect("it runs")
    };
    let text = |bytes: &[u8]| String::from_utf8_lossy(bytes).into_owned();

    let output = import(&["--from-containerd", file.to_str().expect("plain")]);
    assert!(output.status.success(), "{output:?}");
    assert!(text(&output.stdout).contains("pause_image = \"mirror.example/pause:3.9\""), "{output:?}");
    assert!(text(&output.stderr).contains("sandbox_image (config.toml) -> image.pause_image"), "{output:?}");
    let made = directory.path().join("podvisor.toml");
    std::fs::write(&made, &output.stdout).expect("it is written");
    let mut validate = Command::new(env!("CARGO_BIN_EXE_podvisor"));
    let validate = validate.args(["config", "validate", "--config"]).arg(&made).output().expect("it runs");
    assert!(validate.status.success(), "{validate:?}");

    let missing = directory.path().join("missing");
    let output = import(&["--from-crio", missing.to_str().expect("plain")]);
    assert!(
        !output.status.success() && text(&output.stderr).contains("name the file to import"),
        "{output:?}"
    );
    // One of both has to be said.
    assert!(!import(&[]).status.success());
    assert!(!import(&["--from-crio", "--from-containerd"]).status.success());
}
