//! Containers by the kernel alone: an OCI runtime spec becomes processes, without another program in between.
//!
//! The guest's agent makes the containers of a pod with this. It is for a process with a single thread: the child is a clone of the caller
//! that goes on in Rust code until it executes the container's program.
//!
//! ```text
//! caller                                        child
//!   Plan::new(spec)        refuse, look nothing up
//!   Cgroup::create         limits before anybody is in it
//!   launch::create ───── clone3(INTO_CGROUP, PIDFD, new namespaces) ─────▶ joins namespaces, mounts, pivots, identity
//!   Launch::poll   ◀──── terminal, ready or the failed step ───────────────┤
//!   Launch::start  ───── one byte ─────────────────────────────────────────▶ execve
//! ```
//!
//! | file | idea |
//! |---|---|
//! | `plan.rs` | what a spec asks for, checked |
//! | `options.rs` | mount options by name |
//! | `process.rs` | what a process is to be: the first of a container or one more |
//! | `launch.rs` | the caller's side |
//! | `child.rs` | the child's steps in their order |
//! | `init.rs` | the first process of a pid namespace that containers share |
//! | `namespaces.rs` | joining and making |
//! | `pod.rs` | namespaces that a pod's containers share, with a user namespace that owns them |
//! | `filesystem.rs` | mounts, by descriptors |
//! | `root.rs` | devices, pivot, hidden paths |
//! | `credentials.rs` | user, groups, capabilities, filters |
//! | `terminal.rs` | a terminal of the container's own devpts |
//! | `report.rs` | what the child says |
//! | `cgroup.rs` | the container's cgroup, version 2 |
//! | `limits.rs` | resources as its files |
//! | `device_filter.rs` | which devices may be used |
//! | `sys.rs` | system calls without a safe wrapper |
//!
//! Invariants:
//! - A field of the spec that is not applied is refused by its name, never left out.
//! - Paths of the container's file system are opened with `RESOLVE_IN_ROOT`, and mounts are put on descriptors: no link of an image is
//!   ever followed out of its root.
//! - The child is born in its cgroup (`CLONE_INTO_CGROUP`), so nothing it does is outside its limits.
//!
//! `make test-oci-runtime` runs the runtime specification's own tests (runtime-tools) on it, through `examples/oci-runtime.rs`, beside runc;
//! `tests/runtime-tools.txt` has where they differ, and why.
//!
//! Needs Linux 5.12 (`mount_setattr`) and cgroup version 2.

mod cgroup;
mod child;
mod credentials;
mod device_filter;
mod error;
mod filesystem;
mod init;
mod launch;
mod limits;
mod namespaces;
mod options;
mod plan;
mod pod;
mod process;
mod report;
mod root;
mod sys;
mod terminal;

pub use cgroup::Cgroup;
pub use error::{ContainerError, Refused};
pub use init::start_init;
pub use launch::{Io, Launch, Pending, Running, create, execute};
pub use plan::Plan;
pub use pod::{IdRange, PodNamespaces};
pub use process::{ProcessPlan, Seccomp};
