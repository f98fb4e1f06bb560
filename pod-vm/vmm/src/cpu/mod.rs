//! Virtual processors.
//!
//! | file | idea |
//! |---|---|
//! | `identity.rs` | what CPUID answers |
//! | `registers.rs` | the state that a processor begins with |
//! | `run.rs` | a processor's thread |

mod identity;
mod registers;
mod run;

pub(crate) use identity::{address_end, identity};
pub(crate) use registers::set_up;
pub(crate) use run::run;
