//! What every hypervisor program is made of, whatever drives the machine in it.
//!
//! | file | idea |
//! |---|---|
//! | `control.rs`, `failure.rs` | frames to and from the monitor; errors of the wire |
//! | `keeper.rs` | states, requests, and the loop that everything happens in |
//! | `verdict.rs` | why a machine is gone |
//! | `request.rs` | what is asked for, checked |
//! | `files.rs`, `tap.rs` | opens what the machine's process is handed |
//! | `process.rs` | that process |
//! | `console.rs` | the guest's last words |
//! | `sys.rs` | all unsafe code |
//!
//! `tests/lab` is what the tests of those programs have in common: a hypervisor with the test in the place of the monitor, and a guest whose
//! first process (`tests/init.c`) does what it is told.

pub mod console;
pub mod control;
pub mod failure;
pub mod files;
pub mod keeper;
pub mod process;
pub mod request;
pub mod sys;
pub mod tap;
pub mod verdict;
