//! podvisor-fs: serves one directory to one virtual machine as a virtio-fs device (vhost-user), and sees nothing else.
//!
//! The file system is crate `virtiofsd`'s; what is here is what it is told, and what it is kept from. One process per virtual machine,
//! a child of the pod's monitor, which kills it when it ends itself (PR_SET_PDEATHSIG is the parent's to set).
//!
//! | file | idea |
//! |---|---|
//! | `options.rs` | the command line |
//! | `confine.rs` | from root's process to one that has the shared tree and nothing else |
//! | `confine/identities.rs` | a user namespace of its own, in which all ids are what they are outside |
//! | `confine/tree.rs` | the shared tree as the root, and namespaces with nothing in them |
//! | `confine/capabilities.rs` | which capabilities remain, and why |
//! | `confine/syscalls.rs` | which system calls remain |
//! | `share.rs` | what the guest is promised: consistency, attributes, locks; the file system behind it |
//! | `private.rs` | which files only the guest changes |
//! | `device.rs`, `workers.rs` | from the guest's queues to the file system, by which thread |
//! | `serve.rs` | one connection, from the socket to its end |
//! | `notes.rs` | what is logged, at a bounded rate |
//! | `sys.rs` | system calls without a safe wrapper |

mod confine;
mod device;
mod notes;
mod options;
mod private;
mod serve;
mod share;
mod sys;
mod workers;

use std::error::Error;
use std::process::ExitCode;

use options::{Asked, Options};

fn main() -> ExitCode {
    let options = match Options::parse(std::env::args_os().skip(1)) {
        Ok(Asked::Serve(options)) => options,
        Ok(Asked::Version) => {
            println!("podvisor-fs {}", env!("CARGO_PKG_VERSION"));
            return ExitCode::SUCCESS;
        }
        Err(error) => {
            eprintln!("podvisor-fs: {error}\n{}", options::USAGE);
            return ExitCode::from(2);
        }
    };
    notes::init();
    match serve::run(options) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("podvisor-fs: {}", chain(&error));
            ExitCode::FAILURE
        }
    }
}

/// An error with its causes.
fn chain(error: &dyn Error) -> String {
    let mut text = error.to_string();
    let mut next = error.source();
    while let Some(cause) = next {
        text = format!("{text}: {cause}");
        next = cause.source();
    }
    text
}
