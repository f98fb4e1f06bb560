//! What lies in the guest's memory when its first processor begins.
//!
//! | file | idea |
//! |---|---|
//! | `elf.rs` | the kernel, and where it is entered |
//! | `pvh.rs` | what the kernel is told at its entry |
//! | `acpi.rs` | the tables by which it finds processors and devices |

pub(crate) mod acpi;
pub(crate) mod elf;
pub(crate) mod pvh;

use vm_memory::{GuestMemory, GuestMemoryError};

/// Why a guest cannot be begun.
#[derive(Debug, thiserror::Error)]
pub(crate) enum BootError {
    #[error("read the {0}")]
    Read(&'static str, #[source] std::io::Error),
    #[error("use the kernel: {0}")]
    Kernel(&'static str),
    #[error("put the {0} into the guest's memory: it has not enough")]
    Room(&'static str),
    #[error("write to the guest's memory")]
    Memory(#[from] GuestMemoryError),
}

/// Copies from a file into the guest's memory.
pub(crate) fn load(
    memory: &podvisor_virtio::device::Memory,
    what: &'static str,
    file: &std::fs::File,
    from: u64,
    to: u64,
    length: u64,
) -> Result<(), BootError> {
    use std::io::{Seek, SeekFrom};
    use vm_memory::{Bytes, GuestAddress};

    let length = usize::try_from(length).map_err(|_| BootError::Room(what))?;
    if length == 0 {
        return Ok(());
    }
    if !memory.check_range(GuestAddress(to), length) {
        return Err(BootError::Room(what));
    }
    let mut file = file;
    file.seek(SeekFrom::Start(from)).map_err(|error| BootError::Read(what, error))?;
    memory.read_exact_volatile_from(GuestAddress(to), &mut file, length).map_err(|error| match error {
        GuestMemoryError::IOError(error) => BootError::Read(what, error),
        other => BootError::Memory(other),
    })
}
