//! Cgroups of either version: which layout this host has, paths in either driver's syntax, making, moving, removing, reading.

use std::path::PathBuf;

/// The hierarchies that are mounted.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Layout {
    /// One unified hierarchy.
    V2 {
        /// Its mount point, e.g. `/sys/fs/cgroup`.
        mount: PathBuf,
    },
    /// Version 1 (also hybrid): controller name → mount point. `name=systemd` is listed as `systemd`.
    V1 {
        /// By controller.
        controllers: std::collections::BTreeMap<String, PathBuf>,
    },
}

/// Why a cgroup operation failed.
#[derive(Debug, thiserror::Error)]
#[error("placeholder")]
pub struct CgroupError;
