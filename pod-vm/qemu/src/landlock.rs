//! The files that QEMU may open by name: its program, its libraries, its firmware, and what it starts from.
//!
//! Descriptors that it inherits are not affected. Landlock needs no rights and stays for good (landlock(7)).

use std::fs::File;
use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::unix::fs::OpenOptionsExt;
use std::path::Path;

use podvisor_hypervisor::sys::{self, RulesetAttributes};

use crate::kvm::{self, Access};

// LANDLOCK_ACCESS_FS_…, by bit.
const EXECUTE: u64 = 1 << 0;
const WRITE_FILE: u64 = 1 << 1;
const READ_FILE: u64 = 1 << 2;
const READ_DIR: u64 = 1 << 3;
const IOCTL_DEV: u64 = 1 << 15;

/// What programs and libraries are found below; what is not there on this machine is passed over.
const SYSTEM: [&str; 6] = ["/usr", "/lib", "/lib64", "/etc/ld.so.cache", "/nix/store", "/gnu/store"];
/// Sizes of pages, which memory is aligned to.
const FACTS: [&str; 2] = ["/sys/kernel/mm/transparent_hugepage", "/sys/kernel/mm/hugepages"];
const DEVICES: [&str; 3] = ["/dev/null", "/dev/zero", "/dev/urandom"];

/// The rules for a QEMU at `program` that reads `files`; `None` where the kernel has no Landlock.
pub(crate) fn rules(
    program: &Path,
    files: &[BorrowedFd<'_>],
    kvm: Option<&Access>,
) -> io::Result<Option<OwnedFd>> {
    let Some(version) = sys::landlock_version() else { return Ok(None) };
    let handled = RulesetAttributes::all(version);
    let ruleset = sys::landlock_ruleset(&handled)?;
    let allow = |path: &Path, rights: u64| -> io::Result<()> {
        let opened = File::options().read(true).custom_flags(libc::O_PATH | libc::O_CLOEXEC).open(path);
        let file = match opened {
            Ok(file) => file,
            Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(()),
            Err(error) => return Err(error),
        };
        // A right on directories only cannot be given on a file.
        let rights = if file.metadata()?.is_dir() { rights } else { rights & !READ_DIR };
        sys::landlock_allow(ruleset.as_fd(), file.as_fd(), rights & handled.files)
    };
    for path in SYSTEM {
        allow(Path::new(path), EXECUTE | READ_FILE | READ_DIR)?;
    }
    // One that is installed elsewhere has its firmware and libraries beside its directory.
    let beside = program.parent().and_then(Path::parent).filter(|prefix| prefix.parent().is_some());
    allow(beside.unwrap_or(program), EXECUTE | READ_FILE | READ_DIR)?;
    for path in FACTS {
        allow(Path::new(path), READ_FILE | READ_DIR)?;
    }
    for path in DEVICES {
        allow(Path::new(path), READ_FILE | WRITE_FILE | IOCTL_DEV)?;
    }
    let device = READ_FILE | WRITE_FILE | IOCTL_DEV;
    match kvm {
        Some(Access::Own(node)) => {
            sys::landlock_allow(ruleset.as_fd(), node.file.as_fd(), device & handled.files)?;
        }
        Some(_) => allow(Path::new(kvm::PATH), device)?,
        None => {}
    }
    for file in files {
        sys::landlock_allow(ruleset.as_fd(), *file, READ_FILE)?;
    }
    Ok(Some(ruleset))
}
