//! OCI seccomp profiles as programs for the kernel (seccomp(2), Documentation/userspace-api/seccomp_filter.rst), compiled on the host and
//! only loaded in the guest, so that the agent needs no compiler and no tables of system calls.
//!
//! A program first looks which calling convention a call uses, then finds its number by halving: a dozen comparisons for any of the 360
//! system calls, where a list would need up to 360.
//!
//! | file | idea |
//! |---|---|
//! | `profile.rs` | what is decided about each number: rules by number, as ranges |
//! | `condition.rs` | comparisons of arguments |
//! | `program.rs` | instructions |
//!
//! Readings, where the OCI spec leaves something open, are libseccomp's and runc's, because profiles are written against those:
//! - a rule without conditions wins over rules with some for the same call; otherwise the first that fits decides;
//! - conditions on the same argument are alternatives, on different ones all must hold;
//! - a rule that says what the default says anyway is left out;
//! - a name that no architecture here knows is left out: profiles name calls of all architectures and years;
//! - a calling convention that the profile does not list kills;
//! - a call newer than every call known here fails with ENOSYS where the default is an error, so that programs fall back to an older one.
//!
//! The x32 convention always fails with ENOSYS, listed or not: kernels of distributions have it switched off.

mod condition;
mod profile;
mod program;

pub use profile::{Compiled, SeccompError, compile};
