//! Which kernel modules a guest carries, in which order they are loaded, and how its first process learns that.
//!
//! | file | idea |
//! |---|---|
//! | `wanted.rs` | what a guest needs, each with its reason |
//! | `modinfo.rs` | what a module says about itself |
//! | `tree.rs` | the modules of a kernel package: files, built-in ones |
//! | `closure.rs` | what is wanted, and what that needs, in load order |
//! | `signature.rs` | the signature at a module's end |
//! | `list.rs` | the file `/modules` of the initramfs |
//!
//! Decision: dependencies come from the modules themselves (`depends=` and `softdep=` of their `.modinfo` section), not from
//! `modules.dep` and `modules.softdep`. Those two are made of the same facts by depmod after installation: a package that was only
//! unpacked has none, one for another kernel's directory needs depmod, and a stale one is wrong. `modules.builtin` comes from the
//! kernel's build and is needed: nothing else tells a built-in module from a missing one. A test compares with depmod.

mod closure;
mod list;
mod modinfo;
mod signature;
mod tree;
mod wanted;

use std::io;
use std::path::PathBuf;

use thiserror::Error;

pub(crate) use closure::{Closure, Module, resolve};
pub(crate) use list::write;
pub(crate) use signature::{is_enforced, strip};
pub(crate) use tree::Tree;
pub(crate) use wanted::{WANTED, Wanted};

use crate::decompress::DecompressError;
use crate::elf::ElfError;

/// When a module is loaded.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) enum When {
    /// At every start.
    Start,
    /// When a device, a mount or a rule asks for it.
    Demand,
}

/// Why the modules cannot be taken.
#[derive(Debug, Error)]
pub enum ModuleError {
    /// The directory is not one of a kernel's modules.
    #[error("{} is no directory of a kernel's modules: it has no readable file {file}; name /lib/modules/VERSION", directory.display())]
    NoDirectory {
        /// What was given.
        directory: PathBuf,
        /// What was looked for.
        file: &'static str,
        /// The answer.
        #[source]
        source: io::Error,
    },
    /// A file could not be read.
    #[error("reading {}", path.display())]
    Read {
        /// The file.
        path: PathBuf,
        /// The answer.
        #[source]
        source: io::Error,
    },
    /// More files than any kernel has.
    #[error("{} holds more than {limit} files: that is no kernel's directory", directory.display())]
    TooMany {
        /// What was given.
        directory: PathBuf,
        /// The most that are looked at.
        limit: usize,
    },
    /// A compressed module could not be unpacked.
    #[error("unpacking module {}", path.display())]
    Unpack {
        /// The file.
        path: PathBuf,
        /// What is wrong.
        #[source]
        source: DecompressError,
    },
    /// A module is no ELF file with a `.modinfo` section.
    #[error("module {} is not usable", path.display())]
    Elf {
        /// The file.
        path: PathBuf,
        /// What is wrong.
        #[source]
        source: ElfError,
    },
    /// A module says nothing about itself.
    #[error("module {} has no section .modinfo", .0.display())]
    NoInfo(PathBuf),
    /// The module was built for another kernel.
    #[error(
        "module {name} belongs to kernel {found}, not to {expected}: kernel and modules must be of one version"
    )]
    OtherKernel {
        /// Its name.
        name: String,
        /// What it says.
        found: String,
        /// The kernel's version.
        expected: String,
    },
    /// Something that no guest can do without.
    #[error("the kernel has no {name} ({why}), neither built in nor as a module")]
    Missing {
        /// The module's name.
        name: &'static str,
        /// What it is for.
        why: &'static str,
    },
    /// A named module does not exist.
    #[error("there is no module {0}, neither built in nor as a file")]
    Unknown(String),
    /// A module needs one that is not there.
    #[error(
        "module {name} needs {needs}, which is not there: the directory is incomplete; install all of the kernel's packages"
    )]
    MissingDependency {
        /// The module.
        name: String,
        /// What it needs.
        needs: String,
    },
    /// More dependencies than any module has.
    #[error("module {name} needs more than {limit} others: that is no kernel's module")]
    TooManyNeeds {
        /// Its name.
        name: String,
        /// The most that are followed.
        limit: usize,
    },
    /// Modules need each other.
    #[error("modules need each other in a circle: {}", .0.join(" → "))]
    Circle(Vec<String>),
}
