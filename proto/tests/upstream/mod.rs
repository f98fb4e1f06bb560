//! Where the originals of protocols come from: Go's module proxy, through the `go` command, into Go's own module cache.

#![allow(unreachable_pub, missing_docs)]

use std::path::PathBuf;
use std::process::Command;

/// Directory of a Go module, named with its version.
pub fn module(upstream: &str) -> PathBuf {
    let elsewhere = tempfile::tempdir().expect("a temporary directory");
    std::fs::write(elsewhere.path().join("go.mod"), "module compare\n\ngo 1.21\n")
        .expect("go.mod is written");
    let output = Command::new("go")
        .args(["mod", "download", "-json", upstream])
        .env("GOWORK", "off")
        .env("GOFLAGS", "-mod=mod")
        .env("GOTOOLCHAIN", "local")
        .current_dir(elsewhere.path())
        .output();
    let output = output.unwrap_or_else(|error| {
        panic!(
            "cannot run `go`, which fetches the original to compare with: {error}; `make deps` installs it"
        )
    });
    let answer: serde_json::Value = serde_json::from_slice(&output.stdout).unwrap_or_default();
    match answer["Dir"].as_str() {
        Some(directory) if output.status.success() => directory.into(),
        _ => panic!(
            "`go mod download {upstream}` failed ({}): {}{}",
            output.status,
            answer["Error"].as_str().unwrap_or_default(),
            String::from_utf8_lossy(&output.stderr)
        ),
    }
}
