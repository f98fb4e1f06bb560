//! From a kernel, its modules and an agent to the files of a guest. Pure but for reading its inputs: the same inputs make the same
//! bytes.
//!
//! Layout of the initramfs, all of it root's:
//!
//! ```text
//! /init                    the agent
//! /modules                 which modules are loaded when: see modules/list.rs
//! /lib/modules/NAME.ko     the modules, unpacked
//! /dev/console, /dev/null  the first process has them before it mounts a devtmpfs
//! /bin/sh                  where one was given: the shell of `podvisor shell`
//! /dev /proc /run /sys     mount points, empty
//! /tmp
//! ```
//!
//! Why it is not compressed: README.md.

use std::io;
use std::path::{Path, PathBuf};

use thiserror::Error;

use crate::agent::{self, AgentError};
use crate::cpio::{self, Entry, Kind};
use crate::kernel::{Kernel, KernelError};
use crate::manifest::{self, AgentFile, KernelFile, Manifest, ModuleFile, Package, Source, Sum};
use crate::modules::{self, Closure, ModuleError, Tree, WANTED, When};
use crate::read::read_limited;

/// Longest vmlinuz, bytes.
const LONGEST_VMLINUZ: u64 = 256 << 20;

/// What a guest is built from.
#[derive(Debug, Clone)]
pub struct Inputs {
    /// The distribution's kernel, a bzImage, or an ELF kernel with a PVH entry.
    pub vmlinuz: PathBuf,
    /// The kernel's module directory (`/lib/modules/VERSION`).
    pub modules: PathBuf,
    /// The program that becomes the first process, static.
    pub agent: PathBuf,
    /// Modules that are carried besides those that every guest carries.
    pub extra_modules: Vec<String>,
    /// The package that kernel and modules come from, if that is known.
    pub package: Option<Package>,
    /// A shell for the node's operator, static. Without one nobody gets a console in the guest.
    pub shell: Option<PathBuf>,
}

/// A guest's files in memory.
#[derive(Debug)]
pub struct Built {
    pub(crate) manifest: Manifest,
    pub(crate) kernel: Vec<u8>,
    pub(crate) initramfs: Vec<u8>,
}

/// Why a guest cannot be built.
#[derive(Debug, Error)]
pub enum BuildError {
    /// An input cannot be read.
    #[error("reading {what} {}", path.display())]
    Read {
        /// Which input.
        what: &'static str,
        /// Its path.
        path: PathBuf,
        /// The answer.
        #[source]
        source: io::Error,
    },
    /// The kernel cannot be used.
    #[error("kernel {} cannot be used", path.display())]
    Kernel {
        /// Its path.
        path: PathBuf,
        /// Why not.
        #[source]
        source: KernelError,
    },
    /// The modules cannot be used.
    #[error("modules for kernel {release}")]
    Modules {
        /// The kernel's version.
        release: String,
        /// Why not.
        #[source]
        source: ModuleError,
    },
    /// The agent cannot be used.
    #[error("agent {} cannot be used", path.display())]
    Agent {
        /// Its path.
        path: PathBuf,
        /// Why not.
        #[source]
        source: AgentError,
    },
    /// The shell cannot be used.
    #[error("shell {} cannot be used", path.display())]
    Shell {
        /// Its path.
        path: PathBuf,
        /// Why not.
        #[source]
        source: AgentError,
    },
}

impl Built {
    /// What the guest consists of.
    pub fn manifest(&self) -> &Manifest {
        &self.manifest
    }

    /// The ELF kernel.
    pub fn kernel(&self) -> &[u8] {
        &self.kernel
    }

    /// The initramfs.
    pub fn initramfs(&self) -> &[u8] {
        &self.initramfs
    }
}

/// Builds a guest. Each step is told to `progress`.
pub fn build(inputs: &Inputs, progress: &mut dyn FnMut(&str)) -> Result<Built, BuildError> {
    let read = |what, path: &Path, limit| {
        read_limited(path, limit).map_err(|source| BuildError::Read { what, path: path.to_owned(), source })
    };
    // The agent first: it is what is missing most often, and quick to check.
    let agent = read("the agent", &inputs.agent, agent::LONGEST)?;
    let protocol =
        agent::protocol(&agent).map_err(|source| BuildError::Agent { path: inputs.agent.clone(), source })?;

    let shell = match &inputs.shell {
        Some(path) => {
            let shell = read("the shell", path, agent::LONGEST)?;
            agent::check_static(&shell).map_err(|source| BuildError::Shell { path: path.clone(), source })?;
            Some(shell)
        }
        None => None,
    };

    progress(&format!("unpacking kernel {}", inputs.vmlinuz.display()));
    let vmlinuz = read("the kernel", &inputs.vmlinuz, LONGEST_VMLINUZ)?;
    let kernel = Kernel::extract(&vmlinuz)
        .map_err(|source| BuildError::Kernel { path: inputs.vmlinuz.clone(), source })?;
    let source = Source { vmlinuz: Sum::of(&vmlinuz), package: inputs.package.clone() };
    drop(vmlinuz);

    progress(&format!("choosing modules for kernel {}", kernel.release));
    let failed = |source| BuildError::Modules { release: kernel.release.clone(), source };
    let tree = Tree::open(&inputs.modules).map_err(failed)?;
    let mut closure =
        modules::resolve(&tree, &kernel.release, WANTED, &inputs.extra_modules).map_err(failed)?;
    if !modules::is_enforced(&inputs.vmlinuz, &inputs.modules, &kernel.release) {
        for module in &mut closure.modules {
            modules::strip(&mut module.content);
        }
    }
    progress(&format!("packing {} of {} modules", closure.modules.len(), tree.len()));
    let initramfs = initramfs(&agent, shell.as_deref(), &closure);

    let modules = closure.modules.iter().map(|module| ModuleFile {
        name: module.name.clone(),
        start: module.when == When::Start,
        sha256: manifest::sha256(&module.content),
        size: module.content.len() as u64,
    });
    let manifest = Manifest {
        version: manifest::VERSION,
        builder: concat!("podvisor ", env!("CARGO_PKG_VERSION")).to_owned(),
        source,
        kernel: KernelFile {
            release: kernel.release.clone(),
            pvh_entry: kernel.pvh_entry,
            sha256: manifest::sha256(&kernel.elf),
            size: kernel.elf.len() as u64,
        },
        initramfs: Sum::of(&initramfs),
        agent: AgentFile { protocol, sha256: manifest::sha256(&agent), size: agent.len() as u64 },
        shell: shell.as_deref().map(Sum::of),
        modules: modules.collect(),
        builtin: closure.builtin,
        missing: closure.missing,
    };
    Ok(Built { manifest, kernel: kernel.elf, initramfs })
}

/// The archive: see the top of this file.
fn initramfs(agent: &[u8], shell: Option<&[u8]>, closure: &Closure) -> Vec<u8> {
    let list = modules::write(&closure.modules);
    let mut files: Vec<(String, &[u8])> =
        closure.modules.iter().map(|module| (module_path(&module.name), module.content.as_slice())).collect();
    files.sort();
    let directory = |name, mode| Entry { name, mode, kind: Kind::Directory };
    let shell = shell.map(|shell| {
        [directory("bin", 0o755), Entry { name: "bin/sh", mode: 0o755, kind: Kind::File(shell) }]
    });
    let mut entries: Vec<Entry<'_>> = shell.into_iter().flatten().collect();
    entries.extend([
        directory("dev", 0o755),
        // Numbers of Documentation/admin-guide/devices.txt.
        Entry { name: "dev/console", mode: 0o600, kind: Kind::Device(5, 1) },
        Entry { name: "dev/null", mode: 0o666, kind: Kind::Device(1, 3) },
        Entry { name: "init", mode: 0o755, kind: Kind::File(agent) },
        directory("lib", 0o755),
        directory("lib/modules", 0o755),
    ]);
    entries.extend(files.iter().map(|(name, content)| Entry {
        name,
        mode: 0o644,
        kind: Kind::File(content),
    }));
    entries.extend([
        Entry { name: "modules", mode: 0o644, kind: Kind::File(list.as_bytes()) },
        directory("proc", 0o555),
        directory("run", 0o755),
        directory("sys", 0o555),
        directory("tmp", 0o1777),
    ]);
    cpio::write(&entries)
}

/// Where a module is in the initramfs.
pub(crate) fn module_path(name: &str) -> String {
    format!("lib/modules/{name}.ko")
}
