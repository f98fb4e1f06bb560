//! What the conformance suite and the black-box tests stand on: test images made on the spot, a registry on loopback
//! that serves them, a private environment to run a container runtime in, and the reading of the suite's results.
//!
//! - [`layer`], [`image`]: tar layers, configurations, manifests and indexes, the same bytes for the same content;
//! - [`http`], [`registry`]: Debian's docker-registry as a child process, and pushing to it;
//! - [`catalogue`], [`contents`]: the images that critest names, and what is in them;
//! - [`sandbox`]: namespaces and cgroups of one's own, with a check for what was left behind;
//! - [`node`], [`peer`]: a daemon with directories and a configuration of its own, podvisor or containerd;
//! - [`suite`], [`report`], [`expected`]: running critest, reading ginkgo's JSON report, comparing it with the list of
//!   results that are expected.

pub mod catalogue;
pub mod contents;
pub mod expected;
pub mod http;
pub mod image;
pub mod layer;
pub mod node;
pub mod peer;
pub mod registry;
pub mod report;
pub mod sandbox;
pub mod suite;

use std::path::PathBuf;

/// The folder of build results: `CARGO_TARGET_DIR`, or `target` beside this crate's folder.
pub fn target_dir() -> PathBuf {
    std::env::var_os("CARGO_TARGET_DIR").map_or_else(|| project_dir().join("target"), PathBuf::from)
}

/// The root of the source tree that this crate was built from.
pub fn project_dir() -> PathBuf {
    PathBuf::from(env!("CARGO_MANIFEST_DIR")).parent().map(PathBuf::from).unwrap_or_default()
}

/// The folder of programs that `critest/tools/build` makes.
pub fn tools_dir() -> PathBuf {
    target_dir().join("tools")
}
