//! Guests: what a virtual machine of a pod starts from, built from a distribution's kernel, kept in several versions.
//!
//! A guest is an ELF kernel, an initramfs whose `/init` is the agent, and a manifest with the digests of all of it. Sandboxes keep
//! the guest that they began with. README.md has the layouts, the measurements and the sources.
//!
//! | file | idea |
//! |---|---|
//! | `debian.rs` | a kernel package by apt |
//! | `kernel.rs` | vmlinuz → ELF kernel with a PVH entry, nothing else in it |
//! | `modules/` | which modules, in which order |
//! | `agent.rs` | what is asked of the first process |
//! | `build.rs` | inputs → kernel, initramfs, manifest |
//! | `guests.rs`, `verify.rs` | guests on disk: installed, chosen, checked, removed |
//! | `scratch.rs` | where what is fetched lies meanwhile |
//! | `manifest.rs` | the manifest |
//! | `elf.rs`, `cpio.rs`, `decompress.rs`, `read.rs` | formats, read with every number checked |

mod agent;
mod build;
mod cpio;
mod debian;
mod decompress;
mod elf;
#[cfg(test)]
#[expect(clippy::cast_possible_truncation, clippy::format_push_string, reason = "small numbers and texts")]
mod fake;
mod guests;
mod kernel;
mod manifest;
mod modules;
mod read;
mod scratch;
mod verify;

use std::fmt;
use std::path::{Path, PathBuf};
use std::str::FromStr;

use thiserror::Error;

pub use agent::AgentError;
pub use build::{BuildError, Built, Inputs, build};
pub use cpio::CpioError;
pub use debian::{Debian, FetchError, Fetched, fetch};
pub use decompress::DecompressError;
pub use elf::ElfError;
pub use guests::{GuestError, Guests, Installed, Listed};
pub use kernel::KernelError;
pub use manifest::{AgentFile, KernelFile, Manifest, ModuleFile, Package, Source, Sum};
pub use modules::ModuleError;
pub use scratch::Scratch;
pub use verify::{Difference, How};

/// Identity of a guest: the first 16 hex digits of its manifest's SHA-256.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct GuestId(String);

/// Not an identity of a guest.
#[derive(Debug, Error, PartialEq, Eq)]
#[error("{0:?} is no id of a guest: those are 16 hex digits")]
pub struct NoGuestId(String);

impl GuestId {
    const DIGITS: usize = 16;

    /// `digest` has 64 hex digits.
    pub(crate) fn of_digest(digest: &str) -> Self {
        Self(digest.chars().take(Self::DIGITS).collect())
    }

    /// The digits.
    pub fn as_str(&self) -> &str {
        &self.0
    }
}

impl FromStr for GuestId {
    type Err = NoGuestId;

    fn from_str(text: &str) -> Result<Self, NoGuestId> {
        let good = text.len() == Self::DIGITS && text.bytes().all(|b| matches!(b, b'0'..=b'9' | b'a'..=b'f'));
        if good { Ok(Self(text.to_owned())) } else { Err(NoGuestId(text.to_owned())) }
    }
}

impl fmt::Display for GuestId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

/// An installed guest.
#[derive(Debug, Clone)]
pub struct Guest {
    id: GuestId,
    directory: PathBuf,
    manifest: Manifest,
}

impl Guest {
    /// Its identity, by which a sandbox is pinned to it.
    pub fn id(&self) -> &GuestId {
        &self.id
    }

    /// The ELF kernel.
    pub fn kernel(&self) -> PathBuf {
        self.directory.join("kernel")
    }

    /// The initramfs.
    pub fn initramfs(&self) -> PathBuf {
        self.directory.join("initramfs")
    }

    /// Where it is installed.
    pub fn directory(&self) -> &Path {
        &self.directory
    }

    /// What `uname -r` says in it.
    pub fn kernel_release(&self) -> &str {
        &self.manifest.kernel.release
    }

    /// Version of the protocol that its agent speaks.
    pub fn protocol(&self) -> u32 {
        self.manifest.agent.protocol
    }

    /// Bytes of its files on the disk, without the manifest.
    pub fn size(&self) -> u64 {
        self.manifest.kernel.size + self.manifest.initramfs.size
    }

    /// All about it.
    pub fn manifest(&self) -> &Manifest {
        &self.manifest
    }
}
