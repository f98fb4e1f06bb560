//! What is asked of the program that becomes the guest's first process.
//!
//! It says which protocol it speaks in an ELF note of owner `podvisor`, type 1, whose content is the version, four bytes, little
//! endian. A note can be read without running the program, which is made for a guest, and it cannot get separated from it.

use thiserror::Error;

use crate::elf::{Elf, ElfError, PT_INTERP};

/// Longest agent, bytes.
pub(crate) const LONGEST: u64 = 64 << 20;

/// Owner of the note.
const OWNER: &[u8] = b"podvisor";
/// Type of the note.
const PROTOCOL: u32 = 1;

/// Why a file cannot be the agent.
#[derive(Debug, Error)]
pub enum AgentError {
    /// Not an ELF program.
    #[error("it is no program for the guest")]
    Elf(#[source] ElfError),
    /// Needs a dynamic linker.
    #[error(
        "it is linked dynamically, and there are no libraries in the guest: `make build` links it statically"
    )]
    Dynamic,
    /// No note, or one of another size.
    #[error(
        "it does not say which protocol it speaks: it has no note of owner podvisor, so it is no podvisor-agent"
    )]
    NoProtocol,
}

/// There are no libraries in a guest.
fn is_static(elf: &Elf<'_>) -> Result<(), AgentError> {
    if elf.segments.iter().any(|segment| segment.kind == PT_INTERP) {
        return Err(AgentError::Dynamic);
    }
    Ok(())
}

/// Checks a program that is not the agent.
pub(crate) fn check_static(file: &[u8]) -> Result<(), AgentError> {
    is_static(&Elf::parse(file).map_err(AgentError::Elf)?)
}

/// Checks the program; gives the version of the protocol that it speaks.
pub(crate) fn protocol(file: &[u8]) -> Result<u32, AgentError> {
    let elf = Elf::parse(file).map_err(AgentError::Elf)?;
    is_static(&elf)?;
    let notes = elf.notes().map_err(AgentError::Elf)?;
    let note = notes.iter().find(|note| note.owner == OWNER && note.kind == PROTOCOL);
    note.and_then(|note| note.content.try_into().ok()).map(u32::from_le_bytes).ok_or(AgentError::NoProtocol)
}
