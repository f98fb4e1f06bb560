//! What a guest consists of: `manifest.json` beside the kernel and the initramfs.

use serde::{Deserialize, Serialize};
use sha2::{Digest, Sha256};

use crate::GuestId;

/// Version of the format.
pub(crate) const VERSION: u32 = 1;

/// The whole manifest. Strict: one that a later podvisor wrote with more in it has another version.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Manifest {
    /// Version of this format, 1.
    pub version: u32,
    /// Name and version of the program that built the guest.
    pub builder: String,
    /// Where the kernel comes from.
    pub source: Source,
    /// The file `kernel`.
    pub kernel: KernelFile,
    /// The file `initramfs`.
    pub initramfs: Sum,
    /// `/init` in the initramfs.
    pub agent: AgentFile,
    /// `/bin/sh` in the initramfs, if it has one.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub shell: Option<Sum>,
    /// `/lib/modules/NAME.ko` in the initramfs, in load order.
    pub modules: Vec<ModuleFile>,
    /// Wanted modules that are built into the kernel.
    pub builtin: Vec<String>,
    /// Wanted modules that the kernel does not have. Nothing that every pod needs.
    pub missing: Vec<String>,
}

/// A file's digest and size.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Sum {
    /// 64 lowercase hex digits.
    pub sha256: String,
    /// Bytes.
    pub size: u64,
}

/// Where the kernel comes from.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Source {
    /// The distribution's vmlinuz.
    pub vmlinuz: Sum,
    /// Its package, where it was fetched as one.
    pub package: Option<Package>,
}

/// A package of the distribution.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Package {
    /// Its name.
    pub name: String,
    /// Its version.
    pub version: String,
    /// The suite that it was found in.
    pub suite: String,
}

/// The kernel as it is loaded.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct KernelFile {
    /// What `uname -r` says in the guest.
    pub release: String,
    /// Physical address of the 32-bit PVH entry.
    pub pvh_entry: u32,
    /// 64 lowercase hex digits.
    pub sha256: String,
    /// Bytes.
    pub size: u64,
}

/// The agent.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct AgentFile {
    /// Version of the protocol that it speaks.
    pub protocol: u32,
    /// 64 lowercase hex digits.
    pub sha256: String,
    /// Bytes.
    pub size: u64,
}

/// A module.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct ModuleFile {
    /// Its name as the kernel has it.
    pub name: String,
    /// Whether it is loaded at every start.
    pub start: bool,
    /// 64 lowercase hex digits, of the unpacked file.
    pub sha256: String,
    /// Bytes of the unpacked file.
    pub size: u64,
}

/// Digest of bytes: 64 lowercase hex digits.
pub(crate) fn sha256(data: &[u8]) -> String {
    hex::encode(Sha256::digest(data))
}

impl Sum {
    pub(crate) fn of(data: &[u8]) -> Self {
        Self { sha256: sha256(data), size: data.len() as u64 }
    }
}

impl Manifest {
    /// The file's bytes.
    pub(crate) fn to_bytes(&self) -> Vec<u8> {
        // Only maps with odd keys and writers that fail can make this fail.
        let mut bytes = serde_json::to_vec_pretty(self).unwrap_or_default();
        bytes.push(b'\n');
        bytes
    }

    /// The identity of the guest whose manifest has these bytes.
    pub(crate) fn id(bytes: &[u8]) -> GuestId {
        GuestId::of_digest(&sha256(bytes))
    }
}
