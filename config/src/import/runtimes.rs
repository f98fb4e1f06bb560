//! The other daemon's runtimes as handlers: an OCI runtime is a handler of its own, whatever starts a virtual machine is one more name of
//! the handler `vm`.

use std::path::Path;

use super::draft::Draft;
use super::source::Leaf;
use crate::Config;
use crate::value::{HANDLER_NAME, is_handler_name};

/// The handler that virtual machines get.
const VM: &str = "vm";

/// What a runtime is.
pub(super) enum Program {
    /// A program with runc's command line: a path or a bare name.
    Oci(String),
    /// A virtual machine for each pod.
    Vm,
    /// Nothing that podvisor can be told to start.
    Other(&'static str),
}

/// What a runtime has become.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) enum Role {
    /// A handler of this name.
    Oci(String),
    /// The handler for virtual machines.
    Vm,
}

/// The handlers of the file that is being made.
#[derive(Default)]
pub(super) struct Handlers {
    names_of_vm: Vec<String>,
}

/// What the program at `path` is. Kata's runtime speaks runc's command line too, and starts machines.
pub(super) fn program(path: &str) -> Program {
    let name = Path::new(path).file_name().unwrap_or_default().to_string_lossy();
    match &*name {
        name if name.contains("kata") => Program::Vm,
        // The shim's own command line is containerd's.
        "containerd-shim-runsc-v1" => Program::Oci("runsc".to_owned()),
        _ => Program::Oci(path.to_owned()),
    }
}

impl Handlers {
    /// One runtime, which `leaf` declares.
    pub(super) fn add(
        &mut self,
        draft: &mut Draft,
        name: &str,
        program: Program,
        leaf: &Leaf,
    ) -> Option<Role> {
        if !is_handler_name(name) {
            draft.by_hand(
                leaf,
                format!("{name:?} cannot be a handler's name ({HANDLER_NAME}): choose another"),
            );
            return None;
        }
        match program {
            Program::Other(what) => {
                draft.lost(leaf, format!("{what}: podvisor starts OCI runtimes and virtual machines"));
                None
            }
            Program::Vm => {
                let default = &Config::default().handlers[VM];
                if name == VM || default.aliases.iter().any(|alias| alias == name) {
                    draft.needless(leaf, format!("{name} is a name of handler {VM} by default"));
                } else {
                    self.names_of_vm.push(name.to_owned());
                    let aliases = default.aliases.iter().chain(&self.names_of_vm).cloned();
                    draft.set("runtime.handlers.vm", "aliases", aliases.collect::<Vec<_>>(), leaf);
                }
                Some(Role::Vm)
            }
            Program::Oci(path) => {
                let table = format!("runtime.handlers.{name}");
                let by_default = Config::default().handlers.contains_key(name) && name != VM;
                let program = Path::new(&path).file_name().unwrap_or_default().to_string_lossy().into_owned();
                if !by_default {
                    draft.set(&table, "type", "oci", leaf);
                }
                if path != name {
                    draft.set(&table, "path", path, leaf);
                } else if by_default {
                    draft.needless(leaf, format!("handler {name} is there by default"));
                }
                if program == "runsc" {
                    draft.set(&table, "sandbox_container", true, leaf);
                }
                Some(Role::Oci(name.to_owned()))
            }
        }
    }
}

/// Pods that name no runtime get this one.
pub(super) fn trusted(draft: &mut Draft, role: &Role, leaf: &Leaf) {
    match role {
        Role::Vm => draft.set("runtime", "default_workload_trust", "untrusted", leaf),
        Role::Oci(name) if *name == Config::default().runtime.trusted_handler => {
            draft.needless(leaf, format!("{name} is the trusted handler by default"));
        }
        Role::Oci(name) => draft.set("runtime", "trusted_handler", name.clone(), leaf),
    }
}

/// Untrusted pods that name no runtime get this one.
pub(super) fn untrusted(draft: &mut Draft, role: &Role, leaf: &Leaf) {
    match role {
        Role::Vm => draft.needless(leaf, format!("{VM} is the untrusted handler by default")),
        Role::Oci(name) => draft.set("runtime", "untrusted_handler", name.clone(), leaf),
    }
}
