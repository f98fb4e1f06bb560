//! podvisor: one daemon between kubelet and its pods. Serves the Kubernetes CRI, pulls images, and runs each pod with a trusted OCI
//! runtime. See README.md beside this crate for the map.

mod apparmor;
mod cdi;
mod check;
mod checkpoint;
mod cli;
mod deadline;
mod error;
mod events;
mod features;
mod guest;
mod hooks;
mod hypervisor;
mod id;
mod listener;
mod machine_usage;
mod memory;
mod meters;
mod monitor;
mod mount_attr;
mod mount_table;
mod node;
mod pause_image;
mod pause_program;
mod pod;
mod rates;
mod readings;
mod selinux;
mod serve;
mod service;
mod sessions;
mod shell;
mod telemetry;
mod timeline;
mod trace;

use std::process::ExitCode;

fn main() -> ExitCode {
    cli::main()
}
